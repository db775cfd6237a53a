//! Which desired set may replace the one we have (pure).

use protocol::workload::{Fence, WorkloadSpec};
use serde::{Deserialize, Serialize};

/// What should run here, as last taken over.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DesiredSet {
    /// Orders it.
    pub fence: Fence,
    /// All of it.
    pub workloads: Vec<WorkloadSpec>,
    /// The coordinator was sent a full report under this incarnation. Nothing is started or removed before:
    /// a cluster that was restored from an old snapshot does not know what runs here.
    pub reported: bool,
}

impl DesiredSet {
    /// True once any set was taken over. Before, what should run is unknown, which is not nothing.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.fence != Fence::default()
    }
}

/// Why an offered set is not taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// From a leader, or a cluster, of the past.
    #[error("its fence {offered} is lower than ours, {stored}")]
    Lower {
        /// Ours.
        stored: Fence,
        /// Its.
        offered: Fence,
    },
    /// Two sets under one fence: somebody broke a rule, and neither is known to be right.
    #[error("its fence {0} is ours, but it holds other workloads")]
    Conflict(Fence),
}

/// What to do with an offered set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Store it, then make it true.
    Take(DesiredSet),
    /// It is the one that we have.
    Same,
    /// Keep ours.
    Refuse(Refusal),
}

/// Judges an offered set.
#[must_use]
pub fn judge(stored: &DesiredSet, fence: Fence, workloads: Vec<WorkloadSpec>) -> Verdict {
    if fence < stored.fence || fence == Fence::default() {
        return Verdict::Refuse(Refusal::Lower {
            stored: stored.fence,
            offered: fence,
        });
    }
    if fence == stored.fence {
        return if workloads == stored.workloads {
            Verdict::Same
        } else {
            Verdict::Refuse(Refusal::Conflict(fence))
        };
    }
    Verdict::Take(DesiredSet {
        fence,
        workloads,
        reported: stored.reported && fence.incarnation == stored.fence.incarnation,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use protocol::hotkey::Hotkey;
    use protocol::id::{ChuteId, ChuteVersion, DeploymentId};

    pub(crate) fn spec(name: &str) -> WorkloadSpec {
        WorkloadSpec {
            deployment: DeploymentId::parse(name).expect("valid"),
            validator: Hotkey::from_public_key(&[2; 32]),
            miner: Hotkey::from_public_key(&[1; 32]),
            chute: ChuteId::parse("chute").expect("valid"),
            version: ChuteVersion::parse("v1").expect("valid"),
            image: "someone/echo:1.0".to_owned(),
            ref_str: "echo:chute".to_owned(),
            filename: "echo.py".to_owned(),
            code: "pass".to_owned(),
            chutes_version: None,
            gpus: Vec::new(),
            external_host: "127.0.0.1".to_owned(),
            config: None,
            launch_token: None,
            legacy_seed: Some(7),
            job: None,
            ports: Vec::new(),
            cpu_count: 1,
            memory_gb: 1,
            disk_gb: 1,
        }
    }

    #[test]
    fn the_fence_table() {
        let fence = |(incarnation, revision)| Fence {
            incarnation,
            revision,
        };
        let stored = DesiredSet {
            fence: fence((2, 5)),
            workloads: vec![spec("a")],
            reported: true,
        };
        for (offered, name, expected) in [
            ((2, 6), "a", "take, reported"),
            ((2, 6), "b", "take, reported"),
            ((2, 9), "b", "take, reported"),
            ((3, 1), "b", "take, report first"),
            ((3, 9), "a", "take, report first"),
            ((2, 5), "a", "same"),
            ((2, 5), "b", "conflict"),
            ((2, 4), "a", "lower"),
            ((1, 9), "b", "lower"),
            ((0, 0), "b", "lower"),
        ] {
            let seen = match judge(&stored, fence(offered), vec![spec(name)]) {
                Verdict::Take(set) if set.reported => "take, reported",
                Verdict::Take(_) => "take, report first",
                Verdict::Same => "same",
                Verdict::Refuse(Refusal::Conflict(_)) => "conflict",
                Verdict::Refuse(Refusal::Lower { .. }) => "lower",
            };
            assert_eq!(seen, expected, "{offered:?} {name}");
        }
        let none = DesiredSet::default();
        assert!(matches!(judge(&none, fence((1, 1)), Vec::new()), Verdict::Take(set) if !set.reported));
        assert!(matches!(
            judge(&none, fence((0, 0)), Vec::new()),
            Verdict::Refuse(_)
        ));
    }
}
