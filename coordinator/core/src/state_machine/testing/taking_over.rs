//! Taking over from another miner.

use std::collections::BTreeSet;

use protocol::gpu::DeviceInfo;
use protocol::hotkey::{Hotkey, Signer};
use protocol::id::{ChuteId, ChuteVersion, ConfigId, DeploymentId, GpuId, InstanceId, JobId};
use protocol::report::{HostFacts, WorkloadReport, WorkloadStatus};
use protocol::time::UnixMillis;
use protocol::workload::{PortMapping, WorkloadPhase};

use super::{World, id};
use crate::state_machine::adoption::{AdoptedDeployment, Adoption};
use crate::state_machine::chute::{ChuteCode, ChuteDefinition, ChuteKey};
use crate::state_machine::codec::Row;
use crate::state_machine::command::{Command, PayProfile, Placement};
use crate::state_machine::deployment::{Facts, Phase, StopReason};
use crate::state_machine::effect::{EffectKind, EffectOutcome, Subject};
use crate::state_machine::taking_over::Difference;
use crate::state_machine::{Faults, Rejection, Reply, State};

const NOW: u64 = 5_000_000;

fn validator() -> Hotkey {
    Signer::from_seed(&[2; 32]).hotkey().clone()
}

fn gpu(number: u8) -> GpuId {
    GpuId::parse(&format!("{number:032x}")).expect("32 digits")
}

/// An observing cluster with one host of four GPUs.
fn observing() -> World {
    let mut world = World::empty();
    for command in [
        Command::SetObserving { observing: true },
        Command::Configure {
            miner: Signer::from_seed(&[1; 32]).hotkey().clone(),
            validators: BTreeSet::from([validator()]),
            pay_profile: PayProfile::Of2026,
        },
        Command::RecordHost {
            facts: HostFacts {
                server: id("server-1"),
                name: "gpu-1".to_owned(),
                address: "203.0.113.1".to_owned(),
                proof_port: 1,
                devices: (1..=4).map(device).collect(),
                cpu_count: 32,
                memory_gb: 256,
                disk_free_gb: 500,
                agent_version: "0.1.0".to_owned(),
            },
        },
    ] {
        assert_eq!(world.at(NOW, command), Ok(Reply::Done));
    }
    world
}

fn device(number: u8) -> DeviceInfo {
    DeviceInfo {
        uuid: gpu(number),
        name: "NVIDIA RTX A6000".to_owned(),
        memory: 48 << 30,
        processors: 84,
        clock_rate_khz: 1_800_000,
        max_threads_per_processor: 1536,
    }
}

fn deployment(name: &str, gpus: &[u8], facts: Facts) -> AdoptedDeployment {
    let version = ChuteVersion::parse("v1").expect("good");
    let key = ChuteKey {
        validator: validator(),
        chute: ChuteId::parse("chute-1").expect("good"),
    };
    AdoptedDeployment {
        id: DeploymentId::parse(name).expect("good"),
        chute: ChuteDefinition {
            key,
            // A newer one is published than the one that runs.
            version: ChuteVersion::parse("v2").expect("good"),
            name: "acme/model".to_owned(),
            image: "acme/model:2".to_owned(),
            chutes_version: Some("0.3.40".to_owned()),
            gpu_count: 1,
            supported_gpus: BTreeSet::from(["a6000".to_owned()]),
            preemptible: true,
            tee: false,
            serves_requests: true,
            job_ports: Vec::new(),
            effective_multiplier_milli: None,
        },
        code: ChuteCode {
            filename: "app.py".to_owned(),
            code: "print()".to_owned(),
            ref_str: "app:chute".to_owned(),
        },
        version,
        image: "acme/model:1".to_owned(),
        chutes_version: Some("0.3.40".to_owned()),
        gpus: gpus.iter().map(|number| gpu(*number)).collect(),
        job: None,
        config: Some(ConfigId::parse(&format!("config-of-{name}")).expect("good")),
        instance: Some(InstanceId::parse(&format!("instance-of-{name}")).expect("good")),
        preemptible: true,
        facts,
        ports: Vec::new(),
        created_at: Some(UnixMillis(1_000)),
    }
}

fn earning() -> Facts {
    let at = Some(UnixMillis(2_000));
    Facts {
        running_at: at,
        ready_at: at,
        claimed_at: at,
        verified_at: at,
        active_at: at,
    }
}

fn adoption(deployments: Vec<AdoptedDeployment>) -> Adoption {
    Adoption {
        server: id("server-1"),
        validator: validator(),
        gpu_short_ref: "a6000".to_owned(),
        hourly_cost_usd_micros: 1_250_000,
        seed: Some(u64::MAX),
        locked: true,
        gpus: (1..=3).map(|number| (gpu(number), number < 3)).collect(),
        deployments,
    }
}

#[test]
fn a_server_is_taken_over_with_what_it_runs() {
    let mut world = observing();
    let waiting = Facts {
        claimed_at: Some(UnixMillis(2_000)),
        ..Facts::default()
    };
    let taken = adoption(vec![
        deployment("earns", &[1], earning()),
        AdoptedDeployment {
            // Of the flow in which a seed is enough to start it.
            chutes_version: None,
            ..deployment("starts", &[2, 3], waiting)
        },
    ]);
    let difference = world.0.difference(&taken);
    assert_eq!(difference.problems, Vec::<String>::new());
    assert_eq!(difference.changes.len(), 7, "{difference:?}");
    assert!(difference.changes[0].contains("at 1.25 $"), "{difference:?}");
    assert_eq!(
        world.at(NOW, Command::AdoptServer(taken.clone())),
        Ok(Reply::Done)
    );

    let server = world.0.servers().get(&id("server-1")).expect("it has joined");
    let terms = server.ready_enrolment().expect("it needs no verification");
    assert_eq!(
        (terms.seed, terms.hourly_cost_usd_micros, server.locked),
        (Some(u64::MAX), 1_250_000, true)
    );
    let verified: Vec<bool> = world
        .0
        .gpus()
        .values()
        .map(|gpu| gpu.verified_at.is_some())
        .collect();
    assert_eq!(verified, [true, true, false], "the fourth is not there");
    let of = |name: &str| {
        let id = DeploymentId::parse(name).expect("good");
        world.0.deployments().get(&id).expect("taken over").clone()
    };
    assert_eq!(of("earns").phase, Phase::Serving);
    assert_eq!(of("earns").created_at, UnixMillis(1_000));
    assert_eq!(of("starts").phase, Phase::Launched);
    assert_eq!(world.0.outbox().iter().count(), 0, "nobody is told anything");
    let desired = world.0.desired(&id("server-1")).expect("it has joined");
    assert_eq!(desired.workloads.len(), 2);
    for workload in desired.workloads {
        let spec = workload.spec;
        assert!(
            workload.sealed_token.is_none() && spec.legacy_seed.is_none(),
            "{spec:?}"
        );
    }

    assert_eq!(world.0.difference(&taken), Difference::default());
    assert_eq!(world.at(NOW, Command::AdoptServer(taken)), Ok(Reply::Unchanged));
}

#[test]
fn what_ended_here_and_runs_there_is_taken_over_afresh() {
    let mut world = observing();
    let taken = adoption(vec![deployment("earns", &[1], earning())]);
    world
        .at(NOW, Command::AdoptServer(taken.clone()))
        .expect("a good one");
    let server = id("server-1");
    let report = |world: &World, workloads| Command::RecordWorkloads {
        server: server.clone(),
        report: WorkloadReport {
            fence: world.0.fence_of(&server).expect("it has joined"),
            workloads,
        },
    };
    let deployment = DeploymentId::parse("earns").expect("good");
    let ended = WorkloadStatus {
        deployment: deployment.clone(),
        phase: WorkloadPhase::Ended {
            exit_code: Some(1),
            reason: "exit code 1".to_owned(),
        },
    };
    let command = report(&world, vec![ended]);
    world.at(NOW, command).expect("it belongs to it");
    let gone = report(&world, Vec::new());
    world.at(NOW, gone).expect("it belongs to it");
    assert_eq!(
        world.0.outbox().iter().count(),
        0,
        "the other miner tells the validator"
    );
    assert!(world.0.audits().contains_key(&deployment));
    assert_eq!(world.at(NOW, Command::AdoptServer(taken)), Ok(Reply::Done));
    assert!(world.0.audits().get(&deployment).is_none());
    let again = world.0.deployments().get(&deployment).expect("it is back");
    assert_eq!(again.phase, Phase::Serving);
}

#[test]
fn what_does_not_fit_is_named_and_nothing_is_changed() {
    let good = || deployment("one", &[1], earning());
    let mut foreign = adoption(vec![good()]);
    foreign.validator = Signer::from_seed(&[9; 32]).hotkey().clone();
    let mut blind = adoption(vec![]);
    blind.gpus.push((gpu(9), true));
    let mut twin = deployment("two", &[2], earning());
    twin.instance.clone_from(&good().instance);
    let mut same_config = deployment("two", &[2], earning());
    same_config.config.clone_from(&good().config);
    let mut none = adoption(vec![]);
    none.gpus.clear();
    for (taken, word) in [
        (foreign, "is not configured"),
        (blind, "does not see GPU 0000"),
        (none, "it has no GPUs there"),
        (
            adoption(vec![good(), twin]),
            "its instance instance-of-one is another's",
        ),
        (
            adoption(vec![good(), same_config]),
            "its launch config config-of-one is another's",
        ),
        (adoption(vec![good(), good()]), "it is named twice"),
        (
            adoption(vec![good(), deployment("two", &[1], earning())]),
            "is given to two deployments",
        ),
        (
            adoption(vec![deployment("two", &[4], earning())]),
            "is not of this server",
        ),
        (
            adoption(vec![deployment("two", &[], earning())]),
            "it has no GPUs",
        ),
    ] {
        let mut world = observing();
        world.0.drain_rows();
        let answer = world.at(NOW, Command::AdoptServer(taken));
        let Err(Rejection::Adoption(problems)) = answer else {
            panic!("{word}: {answer:?}");
        };
        assert!(
            problems.iter().any(|problem| problem.contains(word)),
            "{word}: {problems:?}"
        );
        let touched: BTreeSet<u8> = world.0.drain_rows().iter().map(|row| row.table).collect();
        assert_eq!(touched, BTreeSet::from([12]), "only the answer is remembered");
    }
}

#[test]
fn what_changed_there_is_taken_in() {
    let mut world = observing();
    let mut taken = adoption(vec![deployment("starts", &[1], Facts::default())]);
    taken.deployments[0].instance = None;
    world
        .at(NOW, Command::AdoptServer(taken.clone()))
        .expect("a good one");
    taken.locked = false;
    taken.hourly_cost_usd_micros = 1_500_000;
    taken.seed = Some(7);
    taken.deployments = vec![deployment("starts", &[1], earning())];
    let changes = world.0.difference(&taken).changes;
    assert_eq!(
        changes,
        [
            "1.5 $ per GPU and hour",
            "another seed",
            "unlocked",
            "deployment starts: claimed, verified, active"
        ]
    );
    assert_eq!(
        world.at(NOW, Command::AdoptServer(taken.clone())),
        Ok(Reply::Done)
    );
    assert_eq!(world.0.difference(&taken), Difference::default());
    let server = world.0.servers().get(&id("server-1")).expect("it has joined");
    let terms = server.ready_enrolment().expect("ready");
    assert_eq!(
        (server.locked, terms.seed, terms.hourly_cost_usd_micros),
        (false, Some(7), 1_500_000)
    );
    let known = world.0.deployments().values().next().expect("it is there");
    assert_eq!(known.phase, Phase::Serving);
}

#[test]
fn nothing_is_announced_or_placed_while_it_observes() {
    let mut world = observing();
    let facts = Facts {
        running_at: Some(UnixMillis(2_000)),
        ..Facts::default()
    };
    let mut legacy = deployment("legacy", &[1], facts);
    legacy.chutes_version = Some("0.2.9".to_owned());
    (legacy.config, legacy.instance) = (None, None);
    world
        .at(NOW, Command::AdoptServer(adoption(vec![legacy.clone()])))
        .expect("a good one");
    let server = id("server-1");
    let report = WorkloadReport {
        fence: world.0.fence_of(&server).expect("it has joined"),
        workloads: vec![WorkloadStatus {
            deployment: legacy.id.clone(),
            phase: WorkloadPhase::Running {
                ports: vec![PortMapping {
                    internal: 8000,
                    external: 31_000,
                    protocol: protocol::workload::PortProtocol::Tcp,
                }],
                ready: true,
            },
        }],
    };
    let command = Command::RecordWorkloads {
        server: server.clone(),
        report,
    };
    world.at(NOW, command).expect("it belongs to it");
    assert_eq!(world.0.outbox().iter().count(), 0, "the other miner announces it");
    let placement = Placement {
        deployment: DeploymentId::parse("new").expect("good"),
        chute: legacy.chute.key.clone(),
        version: legacy.chute.version.clone(),
        server,
        gpus: vec![gpu(2)],
        victims: Vec::new(),
        job: None,
        reason: String::new(),
    };
    let refused = world.at(NOW, Command::PlaceDeployment(placement));
    assert_eq!(
        refused,
        Err(Rejection::Placement("the cluster observes".to_owned()))
    );
    let act = Command::SetObserving { observing: false };
    world.at(NOW, act).expect("it observes");
    assert_eq!(world.0.outbox().iter().count(), 1, "nobody else will");
}

#[test]
fn a_cluster_that_acts_takes_nothing_over() {
    let mut world = observing();
    let act = Command::SetObserving { observing: false };
    world.at(NOW, act).expect("it observes");
    let taken = adoption(vec![deployment("one", &[1], earning())]);
    assert_eq!(
        world.at(NOW, Command::AdoptServer(taken)),
        Err(Rejection::NotObserving)
    );
}

#[test]
fn nothing_is_late_while_nobody_acts() {
    let mut world = observing();
    let taken = adoption(vec![deployment("starts", &[1], Facts::default())]);
    world.at(NOW, Command::AdoptServer(taken)).expect("a good one");
    let day = 24 * 3_600_000;
    assert_eq!(world.0.next_deadline(), None);
    world.at(NOW + day, Command::PassTime).expect("always accepted");
    let phase = |world: &World| world.0.deployments().values().next().expect("it is there").phase;
    assert_eq!(phase(&world), Phase::Launched);
    let act = Command::SetObserving { observing: false };
    world.at(NOW + day, act).expect("it observes");
    world.at(NOW + day, Command::PassTime).expect("always accepted");
    assert_eq!(
        phase(&world),
        Phase::Launched,
        "it has the whole time from now on"
    );
    world
        .at(NOW + 2 * day, Command::PassTime)
        .expect("always accepted");
    assert_eq!(phase(&world), Phase::Stopping);
}

/// The row that says so must be read for ever.
#[test]
fn observing_has_golden_bytes() {
    let mut world = World::empty();
    let set = Command::SetObserving { observing: true };
    assert_eq!(world.at(3_000, set.clone()), Ok(Reply::Done));
    assert_eq!(world.at(4_000, set), Ok(Reply::Unchanged));
    let rows = world.0.drain_rows();
    let row = rows.iter().find(|row| row.table == 20).expect("it is stored");
    let Row { key, value, .. } = row;
    assert_eq!(
        (&key[..], value.as_deref()),
        (&[0, 0][..], Some(&[0, 0xb8, 0x17][..]))
    );
    let mut stored = rows.into_iter().map(|row| {
        let value = row.value.expect("nothing went");
        (row.table, row.key, value)
    });
    let read = State::from_rows(&mut stored, Faults::none()).expect("good rows");
    assert_eq!(read.observing_since(), Some(UnixMillis(3_000)));
}

/// What is not told while the cluster observes is told when it acts again.
#[test]
fn an_end_while_observing_is_told_afterwards() {
    let mut world = observing();
    let mut job = deployment("runs-a-job", &[1], earning());
    job.job = Some(JobId::parse("job-1").expect("good"));
    world
        .at(NOW, Command::AdoptServer(adoption(vec![job])))
        .expect("a good one");
    let ended = StopReason::Operator("a test".to_owned());
    let stopped = DeploymentId::parse("runs-a-job").expect("good");
    world.0.stop(&stopped, ended);
    assert_eq!(world.0.outbox().iter().count(), 0);
    let act = Command::SetObserving { observing: false };
    world.at(NOW, act).expect("it observes");
    let kinds: Vec<_> = world.0.outbox().iter().map(|effect| &effect.kind).collect();
    assert!(
        matches!(
            kinds[..],
            [EffectKind::ReleaseJob { .. }, EffectKind::DeleteInstance { .. }]
        ),
        "{kinds:?}"
    );
    // Once more it observes before that is done.
    let observe = Command::SetObserving { observing: true };
    world.at(NOW, observe).expect("it acts");
    assert_eq!(world.0.outbox().iter().count(), 0);
}

/// Found by a review: the other miner was stopped before it saw the end, and here nothing was left of it when it acted.
#[test]
fn a_job_that_is_gone_when_the_cluster_acts_is_given_back() {
    let mut world = observing();
    let job = |name: &str, gpu: u8| {
        let mut job = deployment(name, &[gpu], earning());
        job.job = Some(JobId::parse(&format!("job-of-{name}")).expect("good"));
        job
    };
    let mut unclaimed = job("unclaimed", 3);
    unclaimed.instance = None;
    let chute = deployment("no-job", &[4], earning());
    let mut taken = adoption(vec![job("ended", 1), job("withdrawn", 2), unclaimed, chute]);
    taken.gpus.push((gpu(4), true));
    world.at(NOW, Command::AdoptServer(taken)).expect("a good one");
    let withdrawn = JobId::parse("job-of-withdrawn").expect("good");
    let command = Command::RecordJobDeleted { job: withdrawn };
    world.at(NOW, command).expect("it is known");
    // It has none of them any more, and once more as it is not to have them either.
    for _ in 0..2 {
        let report = WorkloadReport {
            fence: world.0.fence_of(&id("server-1")).expect("it has joined"),
            workloads: Vec::new(),
        };
        let server = id("server-1");
        let command = Command::RecordWorkloads { server, report };
        world.at(NOW + 1, command).expect("it belongs to it");
    }
    assert!(world.0.deployments().is_empty(), "all are gone");
    assert_eq!(world.0.outbox().iter().count(), 0);

    let act = Command::SetObserving { observing: false };
    world.at(NOW + 2, act).expect("it observes");
    let ended = JobId::parse("job-of-ended").expect("good");
    let release = EffectKind::ReleaseJob { job: ended };
    let kinds: Vec<_> = world.0.outbox().iter().map(|effect| &effect.kind).collect();
    assert_eq!(kinds, [&release], "once, and before its instance is deleted");
    let instance = InstanceId::parse("instance-of-ended").expect("good");
    let deployment = DeploymentId::parse("ended").expect("good");
    world.0.delete_late_instance(&deployment, instance);
    assert_eq!(world.0.outbox().iter().count(), 1, "its turn comes later");
    let finished = Command::FinishEffect {
        effect: world.0.outbox().iter().next().expect("it waits").id,
        outcome: EffectOutcome::Done,
    };
    world.at(NOW + 3, finished).expect("it was the oldest");
    for observing in [true, false] {
        let command = Command::SetObserving { observing };
        world.at(NOW + 4, command).expect("always accepted");
    }
    assert_eq!(world.0.outbox().iter().count(), 0, "not once more");
}

/// Found by a review: an instance that was to be deleted as a stranger, and is taken over.
#[test]
fn what_is_taken_over_is_not_deleted_as_a_stranger() {
    let mut world = observing();
    let taken = adoption(vec![deployment("earns", &[1], earning())]);
    let instance = InstanceId::parse("instance-of-earns").expect("good");
    let kind = EffectKind::DeleteInstance {
        chute: ChuteId::parse("chute-1").expect("good"),
        instance: instance.clone(),
    };
    world
        .0
        .push_effect(Subject::Instance(instance), validator(), kind);
    world.at(NOW, Command::AdoptServer(taken)).expect("a good one");
    assert_eq!(world.0.outbox().iter().count(), 0);
}

/// Found by a review: the other miner names one instance twice.
#[test]
fn an_instance_of_another_is_not_learnt() {
    let mut world = observing();
    let mut waiting = deployment("waits", &[1], Facts::default());
    waiting.instance = None;
    let earns = deployment("earns", &[2], earning());
    let both = adoption(vec![waiting.clone(), earns.clone()]);
    world.at(NOW, Command::AdoptServer(both)).expect("a good one");
    waiting.instance.clone_from(&earns.instance);
    let answer = world.at(NOW, Command::AdoptServer(adoption(vec![waiting])));
    assert!(matches!(answer, Err(Rejection::Adoption(_))), "{answer:?}");
}

/// One that was placed here before, and whose chute is announced by the miner.
#[test]
fn what_starts_while_it_observes_is_announced_afterwards() {
    let mut world = observing();
    let mut empty = adoption(Vec::new());
    empty.locked = false;
    let adopted = deployment("not-used", &[1], Facts::default());
    let mut definition = adopted.chute;
    definition.chutes_version = Some("0.2.9".to_owned());
    let (server, new) = (id("server-1"), DeploymentId::parse("new").expect("good"));
    let report = |world: &World, workloads| Command::RecordWorkloads {
        server: id("server-1"),
        report: WorkloadReport {
            fence: world.0.fence_of(&id("server-1")).expect("it has joined"),
            workloads,
        },
    };
    let nothing = report(&world, Vec::new());
    let placement = Placement {
        deployment: new.clone(),
        chute: definition.key.clone(),
        version: definition.version.clone(),
        server,
        gpus: vec![gpu(2)],
        victims: Vec::new(),
        job: None,
        reason: String::new(),
    };
    let code = adopted.code;
    for command in [
        Command::AdoptServer(empty),
        Command::RecordChute { definition, code },
        nothing,
        Command::SetObserving { observing: false },
        Command::PlaceDeployment(placement),
        Command::SetObserving { observing: true },
    ] {
        world.at(NOW, command).expect("the rules allow it");
    }
    let runs = WorkloadStatus {
        deployment: new,
        phase: WorkloadPhase::Running {
            ports: vec![PortMapping {
                internal: 8000,
                external: 31_000,
                protocol: protocol::workload::PortProtocol::Tcp,
            }],
            ready: true,
        },
    };
    let command = report(&world, vec![runs]);
    world.at(NOW, command).expect("it belongs to it");
    assert_eq!(world.0.outbox().iter().count(), 0);
    let act = Command::SetObserving { observing: false };
    world.at(NOW, act).expect("it observes");
    assert_eq!(world.0.outbox().iter().count(), 1);
}
