//! The catalogue: chutes with their versions, bounties, and what we learnt from failed launches.

use std::collections::{BTreeMap, BTreeSet};

use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, ChuteVersion};
use protocol::time::UnixMillis;
use protocol::workload::Port;
use serde::{Deserialize, Serialize};

/// A chute in one validator's catalogue. Two validators may use one id for different chutes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChuteKey {
    /// Whose catalogue.
    pub validator: Hotkey,
    /// Which chute.
    pub chute: ChuteId,
}

/// One version of a chute. Kept while it is current or any deployment runs it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VersionKey {
    /// Which chute.
    pub chute: ChuteKey,
    /// Which version.
    pub version: ChuteVersion,
}

/// What does not change within a version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChuteCode {
    /// File name of the code.
    pub filename: String,
    /// Its source text.
    pub code: String,
    /// `module:variable`.
    pub ref_str: String,
}

/// What a validator publishes of a chute, as far as we need it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChuteDefinition {
    /// Which chute.
    pub key: ChuteKey,
    /// Its current version.
    pub version: ChuteVersion,
    /// Its name, for people.
    pub name: String,
    /// Image without registry: `user/name:tag`.
    pub image: String,
    /// Version of the chutes library in the image; decides the launch flow.
    pub chutes_version: Option<String>,
    /// GPUs that one deployment needs, all on one server.
    pub gpu_count: u32,
    /// GPU types that it runs on.
    pub supported_gpus: BTreeSet<String>,
    /// False for private chutes: they are never preempted.
    pub preemptible: bool,
    /// Must run on a sealed worker.
    pub tee: bool,
    /// It serves requests (has cords); otherwise it only runs jobs.
    pub serves_requests: bool,
    /// Ports that its jobs need.
    pub job_ports: Vec<Port>,
    /// What an instance earns per second at present, in thousandths.
    pub effective_multiplier_milli: Option<u64>,
}

/// A chute with what we know of it besides the definition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chute {
    /// What the validator publishes; the code is kept by version.
    pub definition: ChuteDefinition,
    /// When we first heard of it.
    pub recorded_at: UnixMillis,
    /// The operator never wants it.
    pub ban_reason: Option<String>,
    /// No launch before this time, and why.
    pub cooldown: Option<Cooldown>,
    /// Launches that failed, by GPU type.
    pub failures: BTreeMap<String, Failures>,
    /// First listing that did not have it.
    pub missing_since: Option<UnixMillis>,
}

/// A pause after the validator refused a launch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cooldown {
    /// No launch before.
    pub until: UnixMillis,
    /// Refusals in a row; the pause doubles with each.
    pub refusals: u32,
    /// What the validator said.
    pub reason: String,
}

/// Memory of failed launches of a chute on one GPU type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failures {
    /// In a row.
    pub count: u32,
    /// Not placed on this type before.
    pub until: UnixMillis,
}

/// Failed launches on one GPU type before the chute is kept off it.
pub const FAILURES_BEFORE_PAUSE: u32 = 3;

impl Failures {
    /// The memory after one more failure: from the third on, a pause that doubles from 10 min to 12 h.
    #[must_use]
    pub fn after_one_more(previous: Option<&Self>, at: UnixMillis) -> Self {
        let count = previous.map_or(0, |failures| failures.count).saturating_add(1);
        let pause_ms = match count.checked_sub(FAILURES_BEFORE_PAUSE) {
            None => 0,
            Some(beyond) => (600_000_u64 << beyond.min(8)).min(12 * 3_600_000),
        };
        Self {
            count,
            until: at + pause_ms,
        }
    }
}

impl Cooldown {
    /// The pause after one more refusal: `first_ms`, doubling up to an hour (but never below `first_ms`).
    #[must_use]
    pub fn after_refusal(previous: Option<&Self>, at: UnixMillis, first_ms: u64, reason: String) -> Self {
        let refusals = previous.map_or(0, |cooldown| cooldown.refusals).saturating_add(1);
        let pause_ms = (first_ms << (refusals - 1).min(16)).min(first_ms.max(3_600_000));
        Self {
            until: at + pause_ms,
            refusals,
            reason,
        }
    }
}

/// A reward for the first instance of a chute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bounty {
    /// In the validator's units.
    pub amount: u64,
    /// When we first heard of it.
    pub seen_at: UnixMillis,
    /// Forgotten then, if nothing renews it.
    pub expires_at: UnixMillis,
}

/// True if a chutes library of this version announces itself by a launch config (0.3.0 and newer); older
/// or unknown ones are announced by the miner (`validator-protocol`, section 6.1).
#[must_use]
pub fn uses_launch_config(chutes_version: Option<&str>) -> bool {
    numeric_version(chutes_version) >= [0, 3, 0]
}

/// True if a chute with this version of the library has a port on a sealed worker that shows what it runs in (0.6.0 and
/// newer; `kubernetes-objects`, section 1.3).
#[must_use]
pub fn attests(chutes_version: Option<&str>) -> bool {
    numeric_version(chutes_version) >= [0, 6, 0]
}

/// `X.Y.Z` of a version text, without suffixes such as `.rc1`; what is missing counts as 0.
#[must_use]
pub fn numeric_version(text: Option<&str>) -> [u64; 3] {
    let mut parts = text.unwrap_or_default().split('.').map(|part| {
        let digits: String = part.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap_or(0)
    });
    [
        parts.next().unwrap_or(0),
        parts.next().unwrap_or(0),
        parts.next().unwrap_or(0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_launch_flow_follows_the_library_version() {
        for (version, launch_config) in [
            (None, false),
            (Some(""), false),
            (Some("0.2.61"), false),
            (Some("0.3.0"), true),
            (Some("0.3.0.rc4"), true),
            (Some("0.3.40"), true),
            (Some("1"), true),
        ] {
            assert_eq!(uses_launch_config(version), launch_config, "{version:?}");
        }
    }

    #[test]
    fn pauses_grow_and_end() {
        let at = UnixMillis(0);
        let mut failures = None;
        let mut pauses = vec![];
        for _ in 0..14 {
            let next = Failures::after_one_more(failures.as_ref(), at);
            pauses.push(next.until.0 / 60_000);
            failures = Some(next);
        }
        assert_eq!(
            pauses,
            [0, 0, 10, 20, 40, 80, 160, 320, 640, 720, 720, 720, 720, 720]
        );
        let first = Cooldown::after_refusal(None, at, 30_000, "423".to_owned());
        let second = Cooldown::after_refusal(Some(&first), at, 30_000, "423".to_owned());
        assert_eq!((first.until.0, second.until.0), (30_000, 60_000));
    }
}
