//! Counters of the registry door.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// How a request ended, as far as its response head tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Outcome {
    /// Answered by the upstream with a status below 400.
    Upstream,
    /// Answered by the upstream with 400 or more, passed on as it is.
    UpstreamRefused,
    /// Answered from the blob store.
    Stored,
    /// Joined a download that another request had started.
    Joined,
    /// Refused by us: method, path or unknown validator.
    Refused,
    /// No usable signature.
    NoSignature,
    /// The upstream could not be reached or broke off.
    UpstreamDown,
    /// What the upstream sent does not have the digest asked for.
    DigestMismatch,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    outcome: Outcome,
}

/// All counters; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    requests: Family<Labels, Counter>,
    /// Body bytes received from registries and storage.
    pub upstream_bytes: Counter,
    /// Body bytes sent to clients.
    pub client_bytes: Counter,
    /// Bodies that did not have the digest asked for.
    pub digest_mismatches: Counter,
    /// Bytes of verified blobs on disk.
    pub stored_bytes: Gauge,
    /// Open client connections.
    pub connections: Gauge,
}

impl Metrics {
    /// Counts a request.
    pub fn count(&self, outcome: Outcome) {
        self.requests.get_or_create(&Labels { outcome }).inc();
    }

    /// Requests so far with an outcome.
    #[must_use]
    pub fn requests(&self, outcome: Outcome) -> u64 {
        self.requests.get_or_create(&Labels { outcome }).get()
    }

    /// Puts all counters into a registry of metrics.
    pub fn register(&self, registry: &mut Registry) {
        let group = registry.sub_registry_with_prefix("registry");
        group.register("requests", "Requests by outcome", self.requests.clone());
        group.register(
            "upstream_bytes",
            "Body bytes received from registries and storage: the image bytes pulled",
            self.upstream_bytes.clone(),
        );
        group.register(
            "client_bytes",
            "Body bytes sent to clients",
            self.client_bytes.clone(),
        );
        group.register(
            "digest_mismatches",
            "Bodies without the digest asked for",
            self.digest_mismatches.clone(),
        );
        group.register(
            "stored_bytes",
            "Bytes of verified blobs on disk",
            self.stored_bytes.clone(),
        );
        group.register("connections", "Open client connections", self.connections.clone());
    }
}
