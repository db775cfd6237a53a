//! Data of every format that was ever released is read for ever, row by row.
//!
//! `golden/v1.tar.gz` is the folder of a member as the first release wrote it, `golden/v1.rows` what is in it: one
//! line for each row, table, key and value in hexadecimal. They are never edited. A new format gets a folder of its
//! own, made by `WRITE_GOLDEN=1 cargo test -p coordinator --test keeping golden`.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use coordinator_core::state_machine::chute::{ChuteCode, ChuteDefinition, ChuteKey};
use coordinator_core::state_machine::codec::Row;
use coordinator_core::state_machine::command::{
    ListedInstance, Listing, Observation, PayProfile, Placement, Proposal, RequestId,
};
use coordinator_core::state_machine::effect::{EffectKind, EffectOutcome};
use coordinator_core::state_machine::host::{Invite, InviteId, Pin};
use coordinator_core::state_machine::{Command, Faults, State, apply, format};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use protocol::gpu::DeviceInfo;
use protocol::hotkey::{Hotkey, Signer};
use protocol::id::{ChuteId, ChuteVersion, ConfigId, DeploymentId, GpuId, InstanceId, JobId};
use protocol::report::{HostFacts, WorkloadReport};
use protocol::workload::Fence;

use super::member::{Member, START, host, server};

/// The repository may carry so much of it.
const GOLDEN_BYTES_MAX: u64 = 200 * 1024;

pub(crate) fn facts(name: &str) -> HostFacts {
    let device = |digit: char| DeviceInfo {
        uuid: gpu(digit),
        name: "NVIDIA H100 80GB HBM3".to_owned(),
        memory: 85_031_714_816,
        processors: 132,
        clock_rate_khz: 1_980_000,
        max_threads_per_processor: 2048,
    };
    HostFacts {
        server: server(name),
        name: name.to_owned(),
        address: "198.51.100.7".to_owned(),
        proof_port: 30443,
        devices: match name {
            "gpu-a" => "abc".chars().map(device).collect(),
            "gpu-c" => vec![device('d')],
            _ => vec![],
        },
        cpu_count: 26,
        memory_gb: 126,
        disk_free_gb: 500,
        agent_version: "0.1.0".to_owned(),
    }
}

fn gpu(digit: char) -> GpuId {
    GpuId::from_device_uuid(&digit.to_string().repeat(32)).unwrap()
}

fn validator() -> Hotkey {
    Signer::from_seed(&[2; 32]).hotkey().clone()
}

fn chute(name: &str) -> ChuteKey {
    ChuteKey {
        validator: validator(),
        chute: ChuteId::parse(name).unwrap(),
    }
}

fn deployment(name: &str) -> DeploymentId {
    DeploymentId::parse(name).unwrap()
}

/// A step: a command, or the good end of all effects that are ready.
#[expect(clippy::large_enum_variant, reason = "a few dozen of them, once")]
enum Step {
    Do(Command),
    Finish,
}

/// The incarnation of a cluster that is configured by the second step.
const INCARNATION: u64 = START.0 / 1000 + 2;

/// Commands that leave rows in every table of the first format.
fn steps(incarnation: u64) -> Vec<Step> {
    let mut steps = vec![
        Command::FoundCluster {
            authority_pem: "certificate".to_owned(),
            sealed_key: vec![1, 2, 3],
            founder: host("first", 1),
        },
        Command::Configure {
            miner: Signer::from_seed(&[1; 32]).hotkey().clone(),
            validators: BTreeSet::from([validator()]),
            pay_profile: PayProfile::Of2026,
        },
        Command::InviteHost {
            id: InviteId(7),
            invite: Invite {
                secret_hash: [7; 32],
                expires_at: START + 3_600_000,
                eligible: true,
                site: Some("west".to_owned()),
                used_by: None,
            },
        },
        Command::JoinHost {
            id: InviteId(7),
            secret_hash: [7; 32],
            host: host("second", 2),
        },
        Command::PinHost {
            server: server("second"),
            pin: Pin::Never,
        },
        Command::RecordHost {
            facts: facts("gpu-a"),
        },
        Command::RecordHost {
            facts: facts("gpu-b"),
        },
        Command::EnrolServer {
            server: server("gpu-a"),
            validator: validator(),
            gpu_short_ref: "h100_sxm".to_owned(),
            hourly_cost_usd_micros: 1_500_000,
        },
    ];
    let mut all: Vec<Step> = steps.drain(..).map(Step::Do).collect();
    all.extend([Step::Finish, Step::Finish]);
    let report = WorkloadReport {
        fence: Fence {
            incarnation,
            revision: 0,
        },
        workloads: vec![],
    };
    steps.push(Command::RecordWorkloads {
        server: server("gpu-a"),
        report,
    });
    for name in ["chute-1", "chute-2"] {
        let definition = ChuteDefinition {
            key: chute(name),
            version: ChuteVersion::parse("v1").unwrap(),
            name: format!("name of {name}"),
            image: "user/image:tag".to_owned(),
            chutes_version: Some("0.3.40".to_owned()),
            gpu_count: 1,
            supported_gpus: BTreeSet::from(["h100_sxm".to_owned(), "h200".to_owned()]),
            preemptible: true,
            tee: false,
            serves_requests: true,
            job_ports: vec![],
            effective_multiplier_milli: Some(1500),
        };
        let code = ChuteCode {
            filename: "app.py".to_owned(),
            code: "chute = Chute()\n".to_owned(),
            ref_str: "app:chute".to_owned(),
        };
        steps.push(Command::RecordChute { definition, code });
    }
    steps.extend([
        Command::RecordBounty {
            chute: chute("chute-1"),
            amount: 100,
        },
        Command::RecordJobOffer {
            job: JobId::parse("job-1").unwrap(),
            chute: chute("chute-2"),
            gpu_count: 1,
            disk_gb: 10,
            excluded: false,
        },
    ]);
    for (name, on, digit, job) in [
        ("dep-1", "chute-1", 'a', None),
        ("dep-2", "chute-2", 'b', Some("job-1")),
        ("dep-3", "chute-1", 'c', None),
    ] {
        steps.push(Command::PlaceDeployment(Placement {
            deployment: deployment(name),
            chute: chute(on),
            version: ChuteVersion::parse("v1").unwrap(),
            server: server("gpu-a"),
            gpus: vec![gpu(digit)],
            victims: vec![],
            job: job.map(|job| JobId::parse(job).unwrap()),
            reason: "the best value for its cost".to_owned(),
        }));
    }
    all.extend(steps.drain(..).map(Step::Do));
    all.push(Step::Finish);
    let stranger = ListedInstance {
        instance: InstanceId::parse("inst-9").unwrap(),
        chute: ChuteId::parse("chute-9").unwrap(),
        config: None,
        active: true,
        verified: true,
    };
    let activated = ListedInstance {
        instance: InstanceId::parse("inst-1").unwrap(),
        chute: ChuteId::parse("chute-1").unwrap(),
        config: Some(ConfigId::parse("config-dep-1").unwrap()),
        active: true,
        verified: true,
    };
    all.extend(
        [
            Command::StopDeployments {
                deployments: vec![deployment("dep-3")],
                reason: coordinator_core::state_machine::deployment::StopReason::Operator(
                    "enough".to_owned(),
                ),
                allowance: coordinator_core::state_machine::command::Allowance {
                    loss: true,
                    jobs: true,
                    budgeted: true,
                },
            },
            Command::RecordInstanceCreated {
                validator: validator(),
                chute: ChuteId::parse("chute-1").unwrap(),
                config: activated.config.clone(),
                instance: activated.instance.clone(),
            },
            Command::Observe(Observation {
                validator: validator(),
                read_at: START + 60_000,
                chutes: Listing::Unknown,
                instances: Listing::Known(vec![activated, stranger]),
                gpus: Listing::Unknown,
            }),
            Command::RecordHost {
                facts: facts("gpu-c"),
            },
            // What it asks of the validator is not done yet.
            Command::EnrolServer {
                server: server("gpu-c"),
                validator: validator(),
                gpu_short_ref: "h100_sxm".to_owned(),
                hourly_cost_usd_micros: 1_500_000,
            },
        ]
        .map(Step::Do),
    );
    all
}

pub(crate) fn good_end(kind: &EffectKind) -> Option<EffectOutcome> {
    Some(match kind {
        EffectKind::AdvertiseGpus { .. } => EffectOutcome::Advertised {
            task: "task-1".to_owned(),
            seed: u64::MAX,
        },
        EffectKind::AwaitVerification { .. } => EffectOutcome::Verified,
        EffectKind::FetchLaunchConfig { deployment, .. } => EffectOutcome::LaunchConfig {
            config: ConfigId::parse(&format!("config-{deployment}")).unwrap(),
            sealed_token: vec![4, 5, 6],
        },
        _ => return None,
    })
}

/// A host that is enrolled and a deployment on it, by command after command, all at [`START`].
pub(crate) fn a_deployment() -> Vec<Command> {
    let commands = steps(START.unix_seconds())
        .into_iter()
        .filter_map(|step| match step {
            Step::Do(command) => Some(command),
            Step::Finish => None,
        });
    let wanted = |command: &Command| match command {
        Command::Configure { .. } | Command::RecordChute { .. } => true,
        Command::EnrolServer { server, .. } => server.as_str() == "gpu-a",
        Command::RecordHost { facts } => facts.name == "gpu-a",
        Command::RecordWorkloads { .. } => true,
        Command::PlaceDeployment(placement) => placement.deployment == deployment("dep-1"),
        _ => false,
    };
    commands.filter(wanted).collect()
}

/// What the steps leave, as this program does them.
fn present() -> State {
    let mut state = State::new(Faults::none());
    let mut number = 0;
    let mut propose = |state: &mut State, command: Command| {
        number += 1;
        let proposal = Proposal {
            request: RequestId(number),
            at: START + u64::try_from(number).unwrap() * 1000,
            guard: (number % 3 == 0).then_some([u8::try_from(number).unwrap(); 32]),
            command,
        };
        let answer = apply(state, proposal.clone());
        assert!(answer.is_ok(), "{proposal:?}: {answer:?}");
    };
    for step in steps(INCARNATION) {
        match step {
            Step::Do(command) => propose(&mut state, command),
            Step::Finish => {
                let ready = state.outbox().ready();
                let ends: Vec<_> = ready
                    .filter_map(|effect| Some((effect.id, good_end(&effect.kind)?)))
                    .collect();
                for (effect, outcome) in ends {
                    propose(&mut state, Command::FinishEffect { effect, outcome });
                }
            }
        }
    }
    state
}

type Rows = Vec<(u8, Vec<u8>, Vec<u8>)>;

fn with_value(row: Row) -> Option<(u8, Vec<u8>, Vec<u8>)> {
    Some((row.table, row.key, row.value?))
}

fn sorted(rows: impl Iterator<Item = (u8, Vec<u8>, Vec<u8>)>) -> Rows {
    let mut rows: Rows = rows.collect();
    rows.sort();
    rows
}

fn text(rows: &Rows) -> String {
    let mut text = String::new();
    for (table, key, value) in rows {
        writeln!(text, "{table} {} {}", hex::encode(key), hex::encode(value)).unwrap();
    }
    text
}

/// Rows of a state that was finalized by a program after this one.
pub(crate) fn too_new_rows() -> Rows {
    let mut state = State::new(Faults::none());
    let mut facts = facts("gpu-a");
    facts.agent_version = format::announced("9.9.9", 99);
    for (number, command) in [
        Command::RecordHost { facts },
        Command::FinalizeFormat {
            format: 99,
            program: "9.9.9".to_owned(),
            vouched: BTreeSet::new(),
        },
    ]
    .into_iter()
    .enumerate()
    {
        let proposal = Proposal {
            request: RequestId(number as u128),
            at: START,
            guard: None,
            command,
        };
        apply(&mut state, proposal).unwrap();
    }
    sorted(state.drain_rows().into_iter().filter_map(with_value))
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/keeping/golden")
        .join(name)
}

/// A snapshot as members send it to each other.
async fn saved(member: &Member) -> Vec<u8> {
    let saved = member.replica.save().await.unwrap();
    let mut bytes = Vec::new();
    loop {
        let piece = saved.read_at(bytes.len() as u64).await.unwrap();
        if piece.is_empty() {
            return bytes;
        }
        bytes.extend(piece);
    }
}

/// All rows of a store's folder, as this program reads them.
async fn rows_of(folder: &Path) -> Rows {
    let member = Member::open(folder, 1).await.expect("it is read for ever");
    member.store.linearizable().await.unwrap();
    let file = folder.join("rows");
    std::fs::write(&file, saved(&member).await).unwrap();
    member.replica.shutdown().await;
    let rows = replica::backup::Rows::open(&file).unwrap();
    sorted(rows)
}

/// Makes the folder of a member whose state is the present one: half of it in rows, the rest in the log.
async fn write_golden(name: &str, folder: &Path) {
    let member = Member::open(folder, 1).await.unwrap();
    let mut number = 0;
    for step in steps(INCARNATION) {
        let commands = match step {
            Step::Do(command) => vec![command],
            Step::Finish => member.machine.read(|state| {
                let ready = state.outbox().ready();
                let ends = ready.filter_map(|effect| Some((effect.id, good_end(&effect.kind)?)));
                ends.map(|(effect, outcome)| Command::FinishEffect { effect, outcome })
                    .collect()
            }),
        };
        for command in commands {
            number += 1;
            member.clock.set(START + u64::try_from(number).unwrap() * 1000);
            let guard = (number % 3 == 0).then_some([u8::try_from(number).unwrap(); 32]);
            member
                .store
                .propose_as(RequestId(number), guard, command)
                .await
                .unwrap();
        }
        if number == 10 {
            member.replica.snapshot().await.unwrap();
        }
    }
    member.replica.shutdown().await;
    let packed = std::fs::File::create(golden(&format!("{name}.tar.gz"))).unwrap();
    let mut packed = tar::Builder::new(GzEncoder::new(packed, Compression::best()));
    packed.mode(tar::HeaderMode::Deterministic);
    packed.append_dir_all("raft", folder.join("raft")).unwrap();
    packed.into_inner().unwrap().finish().unwrap();
}

#[tokio::test]
async fn a_folder_of_the_first_format_is_read_row_by_row() {
    let folder = tempfile::tempdir().unwrap();
    if std::env::var_os("WRITE_GOLDEN").is_some() {
        std::fs::create_dir_all(golden("")).unwrap();
        write_golden("v1", folder.path()).await;
        std::fs::write(golden("v1.rows"), text(&rows_of(folder.path()).await)).unwrap();
        return;
    }
    let expected = std::fs::read_to_string(golden("v1.rows")).unwrap();
    // Before the first release each answer was a row.
    for name in ["v1", "v1-answers-in-rows"] {
        let folder = folder.path().join(name);
        let packed = std::fs::File::open(golden(&format!("{name}.tar.gz"))).unwrap();
        assert!(packed.metadata().unwrap().len() < GOLDEN_BYTES_MAX);
        tar::Archive::new(GzDecoder::new(packed)).unpack(&folder).unwrap();
        let found = text(&rows_of(&folder).await);
        assert!(found == expected, "rows of {name} differ:\n{found}");
    }
    assert!(expected.lines().count() > 30);
}

/// A folder as a program after this one leaves it: refused with both versions and the way out, however often it is
/// started, and nothing in it changes.
#[tokio::test]
async fn a_folder_of_a_newer_format_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let member = Member::founded(&folder.path().join("old")).await;
    let plain = folder.path().join("plain");
    std::fs::write(&plain, saved(&member).await).unwrap();
    member.replica.shutdown().await;
    let newer = folder.path().join("newer");
    let storage = replica::Storage::Files {
        directory: newer.join("raft"),
    };
    let config = replica::Config::new(super::member::CLUSTER, 7, storage);
    let rows = too_new_rows().into_iter().filter(|(table, ..)| *table == 0);
    let rows = rows.map(|(table, key, value)| replica::RowChange {
        table,
        key,
        value: Some(value),
    });
    replica::backup::restore(config, plain, rows.collect())
        .await
        .unwrap();
    for _ in 0..2 {
        let refused = Member::open(&newer, 7).await.err().unwrap().to_string();
        for part in ["format 99", "9.9.9", format::PROGRAM, "snapshot"] {
            assert!(refused.contains(part), "{part}: {refused}");
        }
    }
}

/// A member that is left behind by an upgrade stops rather than go on with what it cannot read.
#[tokio::test]
async fn a_member_that_learns_of_a_newer_format_stops() {
    let folder = tempfile::tempdir().unwrap();
    let member = Member::open(folder.path(), 1).await.unwrap();
    let mut facts = facts("gpu-a");
    facts.agent_version = format::announced("9.9.9", 99);
    member.propose(Command::RecordHost { facts }).await;
    let mut health = member.replica.health();
    let finalize = Command::FinalizeFormat {
        format: 99,
        program: "9.9.9".to_owned(),
        vouched: BTreeSet::new(),
    };
    let proposed = member.store.propose(finalize);
    tokio::select! {
        _ = proposed => {}
        _ = health.wait_for(|health| !health.is_well()) => {}
    }
    let health = health.wait_for(|health| !health.is_well()).await.unwrap().clone();
    let said = format!("{health:?}");
    assert!(said.contains("format 99") && said.contains("9.9.9"), "{said}");
    member.replica.clone().shutdown().await;
    drop(member);
    let again = tokio::time::timeout(std::time::Duration::from_secs(60), Member::open(folder.path(), 1));
    let again = again.await.expect("it does not wait for ever");
    let refused = again.err().unwrap().to_string();
    assert!(
        refused.contains("format 99") && refused.contains("9.9.9"),
        "{refused}"
    );
}

/// Until an upgrade is finalized, this program writes what the program before reads: the same rows, byte by byte.
#[test]
fn what_is_written_before_an_upgrade_is_finalized_is_the_first_format() {
    let mut state = present();
    assert_eq!(state.format(), format::FIRST);
    let rows = sorted(state.drain_rows().into_iter().filter_map(with_value));
    let tables: BTreeSet<u8> = rows.iter().map(|(table, ..)| *table).collect();
    // Table 9 holds deployments that are gone: none is so soon. Table 0 comes with the first upgrade.
    let expected = (1..=16).filter(|table| *table != 9).collect();
    assert_eq!(tables, expected, "the steps leave rows in every table");
    for (table, key, value) in &rows {
        // Answers had a form before the first release.
        let form = u8::from(*table == 12);
        assert_eq!(value.first(), Some(&form), "table {table}: the form of a row");
        assert!(
            *table == 1 || key.first() == Some(&0),
            "table {table}: the form of a key"
        );
    }
    let golden = std::fs::read_to_string(golden("v1.rows")).unwrap();
    assert!(
        text(&rows) == golden,
        "a row is written otherwise than in format 1:\n{}",
        text(&rows)
    );
}
