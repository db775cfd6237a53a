//! Counters of the egress door.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::egress::policy::Reason;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    reason: Reason,
}

/// All counters; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    allowed: Family<Labels, Counter>,
    denied: Family<Labels, Counter>,
    /// Bytes from chutes to the world.
    pub sent_bytes: Counter,
    /// Bytes from the world to chutes.
    pub received_bytes: Counter,
    /// Open tunnels and requests.
    pub connections: Gauge,
}

impl Metrics {
    /// Counts a decision.
    pub fn count(&self, allowed: bool, reason: Reason) {
        let family = if allowed { &self.allowed } else { &self.denied };
        family.get_or_create(&Labels { reason }).inc();
    }

    /// Tunnels opened for a reason.
    #[must_use]
    pub fn allowed(&self, reason: Reason) -> u64 {
        self.allowed.get_or_create(&Labels { reason }).get()
    }

    /// Requests refused for a reason.
    #[must_use]
    pub fn denied(&self, reason: Reason) -> u64 {
        self.denied.get_or_create(&Labels { reason }).get()
    }

    /// Puts all counters into a registry of metrics.
    pub fn register(&self, registry: &mut Registry) {
        let group = registry.sub_registry_with_prefix("egress");
        group.register("allowed", "Tunnels opened by reason", self.allowed.clone());
        group.register("denied", "Requests refused by reason", self.denied.clone());
        group.register(
            "sent_bytes",
            "Bytes from chutes to the world",
            self.sent_bytes.clone(),
        );
        group.register(
            "received_bytes",
            "Bytes from the world to chutes",
            self.received_bytes.clone(),
        );
        group.register("connections", "Open client connections", self.connections.clone());
    }
}
