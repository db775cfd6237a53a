//! Knobs that make the stand-in misbehave as the real network does: refusals, slow and lost answers, cut
//! streams, lost, doubled and late events, dropped sockets, a wrong clock.

use serde::{Deserialize, Serialize};

/// What is planted now. Part of the scenario, replaceable at run time by the control interface.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Faults {
    /// Faults of HTTP answers; the first that fits and fires is used.
    pub http: Vec<HttpFault>,
    /// Faults of socket events; the first that fits and fires is used.
    pub events: Vec<EventFault>,
    /// All sockets are cut this often, in ms.
    pub drop_sockets_every_ms: Option<u64>,
    /// Added to the validator's clock when it checks nonces, in seconds.
    pub clock_skew_seconds: i64,
}

/// A fault of HTTP answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HttpFault {
    /// Start of the paths it fits.
    pub path: String,
    /// Method it fits; any when absent.
    #[serde(default)]
    pub method: Option<String>,
    /// How often it fires, in percent.
    #[serde(default = "always")]
    pub percent: u8,
    /// How many times at most; no limit when absent.
    #[serde(default)]
    pub times: Option<u32>,
    /// What happens.
    #[serde(flatten)]
    pub action: HttpAction,
}

/// What happens to an HTTP request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "snake_case")]
pub enum HttpAction {
    /// Answered with this status; nothing is done.
    Refuse {
        /// HTTP status.
        status: u16,
    },
    /// Done, but the answer is a 502.
    LoseAnswer,
    /// Done after a pause.
    Delay {
        /// Length of the pause.
        ms: u64,
    },
    /// The body ends after this many bytes and the connection breaks.
    Truncate {
        /// Bytes that still get through.
        after_bytes: usize,
    },
    /// Status and headers as usual, no body.
    Empty,
}

/// A fault of socket events.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EventFault {
    /// `reason` that it fits; any when absent.
    #[serde(default)]
    pub reason: Option<String>,
    /// How often it fires, in percent.
    #[serde(default = "always")]
    pub percent: u8,
    /// How many times at most; no limit when absent.
    #[serde(default)]
    pub times: Option<u32>,
    /// What happens.
    #[serde(flatten)]
    pub action: EventAction,
}

/// What happens to an event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "snake_case")]
pub enum EventAction {
    /// Nobody gets it.
    Lose,
    /// Everybody gets it twice.
    Duplicate,
    /// It comes late.
    Delay {
        /// How late.
        ms: u64,
    },
}

fn always() -> u8 {
    100
}

/// The planted faults with their generator, so that one seed gives one sequence.
#[derive(Debug)]
pub(crate) struct Planted {
    pub(crate) faults: Faults,
    random: fastrand::Rng,
}

impl Planted {
    pub(crate) fn new(faults: Faults, seed: u64) -> Self {
        Self {
            faults,
            random: fastrand::Rng::with_seed(seed),
        }
    }

    pub(crate) fn of_request(&mut self, method: &str, path: &str) -> Option<HttpAction> {
        let random = &mut self.random;
        self.faults.http.iter_mut().find_map(|fault| {
            let fits = path.starts_with(&fault.path)
                && fault
                    .method
                    .as_deref()
                    .is_none_or(|m| m.eq_ignore_ascii_case(method));
            (fits && fires(random, fault.percent, &mut fault.times)).then(|| fault.action.clone())
        })
    }

    pub(crate) fn of_event(&mut self, reason: &str) -> Option<EventAction> {
        let random = &mut self.random;
        self.faults.events.iter_mut().find_map(|fault| {
            let fits = fault.reason.as_deref().is_none_or(|r| r == reason);
            (fits && fires(random, fault.percent, &mut fault.times)).then(|| fault.action.clone())
        })
    }
}

fn fires(random: &mut fastrand::Rng, percent: u8, times: &mut Option<u32>) -> bool {
    if *times == Some(0) || random.u8(0..100) >= percent {
        return false;
    }
    if let Some(left) = times {
        *left -= 1;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_fires_where_it_fits_and_no_more_often_than_said() {
        let faults: Faults = serde_json::from_value(serde_json::json!({
            "http": [{"path": "/instances/", "method": "GET", "times": 2, "action": "refuse", "status": 423}],
            "events": [{"reason": "job_created", "action": "delay", "ms": 5}, {"percent": 0, "action": "lose"}],
        }))
        .expect("the documented form");
        let mut planted = Planted::new(faults, 1);
        let refuse = Some(HttpAction::Refuse { status: 423 });
        assert_eq!(planted.of_request("GET", "/miner/chutes/"), None);
        assert_eq!(planted.of_request("DELETE", "/instances/a/b"), None);
        assert_eq!(planted.of_request("GET", "/instances/launch_config"), refuse);
        assert_eq!(planted.of_request("get", "/instances/launch_config"), refuse);
        assert_eq!(planted.of_request("GET", "/instances/launch_config"), None);
        assert_eq!(
            planted.of_event("job_created"),
            Some(EventAction::Delay { ms: 5 })
        );
        assert_eq!(planted.of_event("job_deleted"), None);
    }
}
