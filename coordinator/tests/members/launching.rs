//! A leader that hands over while a validator is asked for a launch config: the config is for this miner once, and the
//! next leader would be refused.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use axum::http::StatusCode;
use axum::{Json, Router, routing};
use coordinator::clock::WallClock;
use coordinator::join::Admission;
use coordinator::member::ReplicatedLog;
use coordinator::store::{Machine, Store};
use coordinator_core::state_machine::chute::{ChuteCode, ChuteDefinition, ChuteKey};
use coordinator_core::state_machine::command::{PayProfile, Placement};
use coordinator_core::state_machine::effect::{EffectKind, EffectOutcome};
use coordinator_core::state_machine::{Command, Faults};
use protocol::gpu::DeviceInfo;
use protocol::hotkey::{Hotkey, Signer};
use protocol::id::{ChuteId, ChuteVersion, DeploymentId, GpuId, JobId, ServerId};
use protocol::report::{HostFacts, WorkloadReport};
use protocol::workload::Fence;
use replica::{Replica, Storage, Unconnected};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Notify;

use super::cluster::{Host, cluster_founded_by_the_first};
use super::handing_over::{Validator, hosts_with_a_validator, until_offered};
use super::until;

/// What a validator knows of launch configs.
#[derive(Default)]
struct Launches {
    asked: AtomicU32,
    was_asked: Notify,
}

/// Gives the one launch config that there is, a moment after the goodbye to the validator's socket.
async fn launch_config(launches: Arc<Launches>, validator: Arc<Validator>) -> (StatusCode, Json<Value>) {
    if launches.asked.fetch_add(1, Ordering::Relaxed) > 0 {
        let again = json!({ "detail": "already attempted by this hotkey" });
        return (StatusCode::FORBIDDEN, Json(again));
    }
    launches.was_asked.notify_one();
    validator.goodbye.notified().await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let granted = json!({ "token": "token-1", "config_id": "config-1" });
    (StatusCode::OK, Json(granted))
}

fn device() -> DeviceInfo {
    DeviceInfo {
        uuid: GpuId::from_device_uuid(&"a".repeat(32)).expect("an id"),
        name: "NVIDIA H100 80GB HBM3".to_owned(),
        memory: 85_031_714_816,
        processors: 132,
        clock_rate_khz: 1_980_000,
        max_threads_per_processor: 2048,
    }
}

fn gpu_host() -> ServerId {
    ServerId::parse("gpu-a").expect("an id")
}

/// A host is enrolled, and a job is offered.
fn offered(validator: &Hotkey, incarnation: u64) -> Vec<Command> {
    let server = gpu_host();
    let facts = HostFacts {
        server: server.clone(),
        name: "gpu-a".to_owned(),
        address: "198.51.100.7".to_owned(),
        proof_port: 30443,
        devices: vec![device()],
        cpu_count: 26,
        memory_gb: 126,
        disk_free_gb: 500,
        agent_version: "0.1.0".to_owned(),
    };
    let fence = Fence {
        incarnation,
        revision: 0,
    };
    let workloads = Vec::new();
    let report = WorkloadReport { fence, workloads };
    let key = ChuteKey {
        validator: validator.clone(),
        chute: ChuteId::parse("trained").expect("an id"),
    };
    let definition = ChuteDefinition {
        key: key.clone(),
        version: ChuteVersion::parse("v1").expect("an id"),
        name: "trained".to_owned(),
        image: "user/image:tag".to_owned(),
        chutes_version: Some("0.3.40".to_owned()),
        gpu_count: 1,
        supported_gpus: BTreeSet::from(["h100_sxm".to_owned()]),
        preemptible: true,
        tee: false,
        serves_requests: true,
        job_ports: Vec::new(),
        effective_multiplier_milli: Some(1500),
    };
    let code = ChuteCode {
        filename: "app.py".to_owned(),
        code: "chute = Chute()\n".to_owned(),
        ref_str: "app:chute".to_owned(),
    };
    vec![
        Command::RecordHost { facts },
        Command::EnrolServer {
            server: server.clone(),
            validator: validator.clone(),
            gpu_short_ref: "h100_sxm".to_owned(),
            hourly_cost_usd_micros: 1_500_000,
        },
        Command::RecordWorkloads { server, report },
        Command::RecordChute { definition, code },
        Command::RecordJobOffer {
            job: JobId::parse("job-1").expect("an id"),
            chute: key,
            gpu_count: 1,
            disk_gb: 10,
            excluded: false,
        },
    ]
}

fn placed(validator: &Hotkey) -> Command {
    Command::PlaceDeployment(Placement {
        deployment: DeploymentId::parse("dep-1").expect("an id"),
        chute: ChuteKey {
            validator: validator.clone(),
            chute: ChuteId::parse("trained").expect("an id"),
        },
        version: ChuteVersion::parse("v1").expect("an id"),
        server: gpu_host(),
        gpus: vec![device().uuid],
        victims: Vec::new(),
        job: Some(JobId::parse("job-1").expect("an id")),
        reason: "it is a job".to_owned(),
    })
}

/// Founds a cluster in which a job waits for its launch config, and which observes: nobody asks for it yet.
async fn found_with_a_job(host: &Host) {
    host.found();
    let admission = Admission::read(&host.identity()).expect("ours").expect("founded");
    let machine = Machine::new(Faults::none());
    let directory = host.raft_folder();
    let mut config = replica::Config::new(&admission.cluster, 1, Storage::Files { directory });
    config.address = host.door.to_string();
    let opened = Replica::open(config, Box::new(machine.clone()), Arc::new(Unconnected)).await;
    let replica = opened.expect("an empty folder");
    let log = Arc::new(ReplicatedLog::new(replica.clone()));
    let store = Store::new(machine, log, Arc::new(WallClock), 1);
    let propose = async |command| store.propose(command).await.expect("the rules allow it");

    let validator = Signer::from_seed(&[2; 32]).hotkey().clone();
    propose(Command::Configure {
        miner: host.miner(),
        validators: BTreeSet::from([validator.clone()]),
        pay_profile: PayProfile::Of2026,
    })
    .await;
    let incarnation = store.read(|state| state.settings().incarnation);
    for command in offered(&validator, incarnation) {
        propose(command).await;
        while let Some(effect) = store.read(|state| state.outbox().ready().next().cloned()) {
            let outcome = match effect.kind {
                EffectKind::AdvertiseGpus { .. } => EffectOutcome::Advertised {
                    task: "task-1".to_owned(),
                    seed: 1,
                },
                EffectKind::AwaitVerification { .. } => EffectOutcome::Verified,
                other => panic!("nobody asked for it: {other:?}"),
            };
            let effect = effect.id;
            propose(Command::FinishEffect { effect, outcome }).await;
        }
    }
    propose(placed(&validator)).await;
    propose(Command::SetObserving { observing: true }).await;
    replica.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_launch_config_that_is_on_its_way_is_recorded_before_the_lead_is_handed_over() {
    let (mut hosts, validator) = hosts_with_a_validator().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let launches = Arc::new(Launches::default());
    for host in &mut hosts {
        host.validator = listener.local_addr().expect("bound");
    }
    let (asked, of) = (Arc::clone(&launches), Arc::clone(&validator));
    let launch = move || launch_config(Arc::clone(&asked), Arc::clone(&of));
    let routes = Router::new().route("/instances/launch_config", routing::get(launch));
    tokio::spawn(async move { axum::serve(listener, routes).await });
    found_with_a_job(&hosts[0]).await;
    let [mut first, mut second, mut third] = cluster_founded_by_the_first(hosts).await;

    let act = json!({ "observing": false });
    let answer = first.ask(Method::PUT, "/v1/observing", &act).await;
    assert_eq!(answer.expect("it leads")["changed"], true);
    launches.was_asked.notified().await;
    until_offered(&third, &["1-early"]).await;
    let handed_over = json!({ "to": "host-2" });
    let answer = first.ask(Method::POST, "/v1/raft/transfer", &handed_over).await;
    assert_eq!(answer.expect("it follows")["host"], "host-2");

    // Long enough for the second one to ask, had it to.
    let launched = until("the deployment went on or ended", async || {
        let state = second.ask(Method::GET, "/v1/state", &Value::Null).await.ok()?;
        let deployments = state["deployments"].as_array()?;
        let launched = deployments.iter().find(|it| it["deployment_id"] == "dep-1");
        let launched = launched.cloned().unwrap_or_default();
        (launched["phase"] != "requested").then_some(launched)
    })
    .await;
    assert_eq!(launched["phase"], "assigned", "{launched}");
    assert_eq!(launches.asked.load(Ordering::Relaxed), 1);
    for host in [&mut first, &mut second, &mut third] {
        host.stop().await;
    }
}
