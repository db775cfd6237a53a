//! What the GPU proof counts, in Prometheus' text form.

use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// Labels of a request.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: &'static str,
    status: u16,
}

/// The numbers of one proof process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    proof_seconds: Histogram,
}

impl Metrics {
    /// Zeros, and the number of devices.
    #[must_use]
    pub fn new(devices: usize) -> Self {
        let mut registry = Registry::with_prefix("proof");
        let requests = Family::<RequestLabels, Counter>::default();
        registry.register("requests", "Requests by route and status", requests.clone());
        let buckets = [0.01, 0.1, 0.5, 1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 240.0, 480.0];
        let proof_seconds = Histogram::new(buckets);
        registry.register_with_unit(
            "duration",
            "Time of a proof that was done, waiting included",
            Unit::Seconds,
            proof_seconds.clone(),
        );
        let gauge: Gauge = Gauge::default();
        gauge.set(i64::try_from(devices).unwrap_or(i64::MAX));
        registry.register("devices", "GPUs that this process proves", gauge);
        Self {
            registry,
            requests,
            proof_seconds,
        }
    }

    /// Counts an answered request.
    pub fn request(&self, route: &'static str, status: u16) {
        self.requests
            .get_or_create(&RequestLabels { route, status })
            .inc();
    }

    /// Notes how long a proof took that was really done.
    pub fn proof(&self, took: Duration) {
        self.proof_seconds.observe(took.as_secs_f64());
    }

    /// All of it as text.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        text::encode(&mut out, &self.registry).expect("writing to a string cannot fail");
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_appear_in_the_text() {
        let metrics = Metrics::new(8);
        metrics.request("/prove", 200);
        metrics.request("/prove", 200);
        metrics.request("/info", 401);
        metrics.proof(Duration::from_millis(20));
        let text = metrics.text();
        for line in [
            "proof_devices 8",
            r#"proof_requests_total{route="/prove",status="200"} 2"#,
            r#"proof_requests_total{route="/info",status="401"} 1"#,
            r#"proof_duration_seconds_bucket{le="0.1"} 1"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
