//! The built-in scenario: what `dev` runs. Eight software GPUs are enough for all of it.

use protocol::hotkey::Signer;

use super::{
    Action, ChuteSpec, DEVELOPMENT_MINER_SEED, Demand, Egress, Gates, Goals, JobSpec, Relaxed, RelaxedGpu,
    Scenario, Step, Timers,
};
use crate::pay::PayRule;

impl Scenario {
    /// Small chutes on software GPUs, a bounty, a job, an update with its rolling update, a deletion, and
    /// one allowed and one forbidden site.
    #[must_use]
    pub fn development() -> Self {
        let miner = Signer::from_seed_hex(DEVELOPMENT_MINER_SEED).expect("the constant is a seed");
        Self {
            name: "development".to_owned(),
            hotkeys: vec![miner.hotkey().clone()],
            relaxed: Relaxed {
                loopback_hosts: true,
                gpu_types: vec![RelaxedGpu {
                    short_ref: proof::SOFTWARE.short_ref.to_owned(),
                    iterations: proof::SOFTWARE.proof.0,
                    estimate_ms: 2_000,
                    // On a fast machine a software GPU needs less than a millisecond.
                    prove_ms_min: 0,
                    prove_ms_max: 30_000,
                    launch_deadline_ms: 45_000,
                }],
            },
            timers: Timers {
                cleanup_ms: 1_000,
                rolling_update_spacing_ms: Some(2_000),
                ..Timers::default()
            },
            gates: Gates {
                target_count: 1,
                ..Gates::default()
            },
            pay: PayRule {
                vesting_seconds: 10,
                ..PayRule::default()
            },
            egress: Egress {
                allowed: vec!["models.example".to_owned()],
                forbidden: vec!["forbidden.example".to_owned()],
            },
            redirect_blobs: true,
            program: program(),
            goals: Goals {
                gpus_proved: 8,
                deployments_verified: 5,
                egress_allowed: 1,
                egress_denied: 1,
                jobs_finished: 1,
                within_seconds: 85,
            },
            ..Self::default()
        }
    }
}

fn program() -> Vec<Step> {
    let publish = |at_ms, spec: ChuteSpec| step(at_ms, Action::PublishChute(Box::new(spec)));
    let chute = |name: &str| ChuteSpec {
        name: name.to_owned(),
        demand: Some(Demand::default()),
        ..ChuteSpec::default()
    };
    vec![
        publish(0, chute("chat-small")),
        publish(0, chute("embed")),
        publish(1_000, chute("whisper")),
        // Nothing here can run it: a supervisor has something to write about that changes nothing else.
        publish(
            2_000,
            ChuteSpec {
                include: vec!["b200".to_owned()],
                demand: None,
                ..chute("too-large")
            },
        ),
        publish(
            3_000,
            ChuteSpec {
                gpu_count: 2,
                ..chute("pair")
            },
        ),
        publish(4_000, chute("vision")),
        step(
            5_000,
            Action::OfferBounty {
                chute: "vision".to_owned(),
                amount: None,
            },
        ),
        publish(6_000, chute("short-lived")),
        publish(
            7_000,
            ChuteSpec {
                cords: vec![],
                jobs: vec![JobSpec {
                    name: "train".to_owned(),
                    ..JobSpec::default()
                }],
                demand: None,
                ..chute("batch")
            },
        ),
        step(
            8_000,
            Action::OfferJob {
                chute: "batch".to_owned(),
                method: "train".to_owned(),
                work_ms: 2_000,
                disk_gb: 10,
            },
        ),
        after_active(
            12_000,
            "chat-small",
            Action::UpdateChute {
                chute: "chat-small".to_owned(),
                code: None,
            },
        ),
        after_active(
            15_000,
            "short-lived",
            Action::DeleteChute {
                chute: "short-lived".to_owned(),
            },
        ),
    ]
}

fn step(at_ms: u64, action: Action) -> Step {
    Step {
        at_ms,
        when_active: None,
        action,
    }
}

fn after_active(at_ms: u64, chute: &str, action: Action) -> Step {
    Step {
        when_active: Some(chute.to_owned()),
        ..step(at_ms, action)
    }
}
