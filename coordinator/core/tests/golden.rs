//! Bytes that were once written must be read for ever. A failing row here means that the stored form has
//! changed: add a new form to the codec and keep this one readable; never edit the bytes.

#![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

use std::collections::BTreeSet;

use coordinator_core::state_machine::adoption::{AdoptedDeployment, Adoption};
use coordinator_core::state_machine::chute::{ChuteCode, ChuteDefinition, ChuteKey};
use coordinator_core::state_machine::codec::{
    decode_answer, decode_proposal, encode_answer, encode_proposal,
};
use coordinator_core::state_machine::command::{Answer, RequestId};
use coordinator_core::state_machine::deployment::Facts;
use coordinator_core::state_machine::effect::EffectOutcome;
use coordinator_core::state_machine::host::{Invite, InviteId, NewHost, Pin, Rotation};
use coordinator_core::state_machine::{Command, Faults, Proposal, Rejection, Reply, State, apply};
use protocol::hotkey::Signer;
use protocol::id::{ChuteId, ChuteVersion, ConfigId, DeploymentId, GpuId, InstanceId, JobId, ServerId};
use protocol::report::{HostFacts, WorkloadReport};
use protocol::time::UnixMillis;
use protocol::workload::{Fence, PortMapping, PortProtocol};
use sha2::{Digest, Sha256};

fn proposal(command: Command) -> Proposal {
    Proposal {
        request: RequestId(7),
        at: UnixMillis(1_800_000_000_000),
        guard: None,
        command,
    }
}

fn server() -> ServerId {
    ServerId::parse("server-1").unwrap()
}

fn facts() -> HostFacts {
    HostFacts {
        server: server(),
        name: "host-1".to_owned(),
        address: "203.0.113.1".to_owned(),
        proof_port: 30443,
        devices: vec![],
        cpu_count: 8,
        memory_gb: 64,
        disk_free_gb: 100,
        agent_version: "0.1.0".to_owned(),
    }
}

fn new_host() -> NewHost {
    NewHost {
        server: server(),
        name: "host-1".to_owned(),
        site: "here".to_owned(),
        address: "203.0.113.1:4433".to_owned(),
        key_hash: [9; 32],
    }
}

fn adoption() -> Adoption {
    let validator = Signer::from_seed(&[2; 32]).hotkey().clone();
    let gpu = GpuId::parse("0123456789abcdef0123456789abcdef").unwrap();
    let at = Some(UnixMillis(3000));
    let version = ChuteVersion::parse("v1").unwrap();
    let chute = ChuteDefinition {
        key: ChuteKey {
            validator: validator.clone(),
            chute: ChuteId::parse("chute-1").unwrap(),
        },
        version: version.clone(),
        name: "n".to_owned(),
        image: "i:1".to_owned(),
        chutes_version: None,
        gpu_count: 1,
        supported_gpus: BTreeSet::from(["a6000".to_owned()]),
        preemptible: true,
        tee: false,
        serves_requests: true,
        job_ports: vec![],
        effective_multiplier_milli: None,
    };
    let deployment = AdoptedDeployment {
        id: DeploymentId::parse("d-1").unwrap(),
        chute,
        code: ChuteCode {
            filename: "f".to_owned(),
            code: "c".to_owned(),
            ref_str: "r".to_owned(),
        },
        version,
        image: "i:1".to_owned(),
        chutes_version: Some("0.3.1".to_owned()),
        gpus: vec![gpu.clone()],
        job: Some(JobId::parse("j-1").unwrap()),
        config: Some(ConfigId::parse("c-1").unwrap()),
        instance: Some(InstanceId::parse("i-1").unwrap()),
        preemptible: true,
        facts: Facts {
            running_at: at,
            ready_at: None,
            claimed_at: at,
            verified_at: at,
            active_at: None,
        },
        ports: vec![PortMapping {
            internal: 8000,
            external: 31000,
            protocol: PortProtocol::Tcp,
        }],
        created_at: at,
    };
    Adoption {
        server: server(),
        validator,
        gpu_short_ref: "a6000".to_owned(),
        hourly_cost_usd_micros: 300_000,
        seed: Some(5),
        locked: true,
        gpus: vec![(gpu, true)],
        deployments: vec![deployment],
    }
}

#[test]
fn proposals_of_form_1_are_read() {
    let config = ConfigId::parse("config-1").unwrap();
    let rows = [
        (proposal(Command::PassTime), PASS_TIME),
        (
            proposal(Command::FoundCluster {
                authority_pem: "pem".to_owned(),
                sealed_key: vec![1, 2],
                founder: new_host(),
            }),
            FOUND_CLUSTER,
        ),
        (
            proposal(Command::InviteHost {
                id: InviteId(300),
                invite: Invite {
                    secret_hash: [7; 32],
                    expires_at: UnixMillis(1_800_000_600_000),
                    eligible: true,
                    site: Some("here".to_owned()),
                    used_by: None,
                },
            }),
            INVITE_HOST,
        ),
        (
            proposal(Command::JoinHost {
                id: InviteId(300),
                secret_hash: [7; 32],
                host: new_host(),
            }),
            JOIN_HOST,
        ),
        (proposal(Command::RemoveHost { server: server() }), REMOVE_HOST),
        (proposal(Command::RejoinHost { server: server() }), REJOIN_HOST),
        (proposal(Command::Recover { member: 3 }), RECOVER),
        (
            proposal(Command::RotateAuthority {
                rotation: Rotation {
                    old: [1; 32],
                    new: [2; 32],
                    authority_pem: "new".to_owned(),
                    bridge_pem: "bridge".to_owned(),
                    sealed_key: vec![2],
                    begun_at: UnixMillis(3000),
                },
            }),
            ROTATE_AUTHORITY,
        ),
        (
            proposal(Command::RecordAuthorities {
                server: server(),
                trusted: vec![[1; 32], [2; 32]],
            }),
            RECORD_AUTHORITIES,
        ),
        (
            proposal(Command::FinishRotation { new: [2; 32] }),
            FINISH_ROTATION,
        ),
        (proposal(Command::SetObserving { observing: true }), SET_OBSERVING),
        (proposal(Command::AdoptServer(adoption())), ADOPT_SERVER),
        (
            proposal(Command::ReplaceHotkey {
                old: Signer::from_seed(&[2; 32]).hotkey().clone(),
                new: Signer::from_seed(&[3; 32]).hotkey().clone(),
                sealed_key: vec![1, 2],
            }),
            REPLACE_HOTKEY,
        ),
        (
            proposal(Command::RecordAddress {
                server: server(),
                address: "203.0.113.1:4433".to_owned(),
            }),
            RECORD_ADDRESS,
        ),
        (
            proposal(Command::AddWorker {
                facts: facts(),
                sealed_kubeconfig: vec![0xaa, 0xbb],
            }),
            ADD_WORKER,
        ),
        (
            proposal(Command::RemoveWorker { server: server() }),
            REMOVE_WORKER,
        ),
        (
            proposal(Command::PinHost {
                server: server(),
                pin: Pin::Never,
            }),
            PIN_HOST,
        ),
        (
            proposal(Command::FinalizeFormat {
                format: 2,
                program: "0.2.0".to_owned(),
                vouched: BTreeSet::from([server()]),
            }),
            FINALIZE_FORMAT,
        ),
        (
            proposal(Command::LockServer {
                server: server(),
                locked: true,
            }),
            LOCK_SERVER,
        ),
        (proposal(Command::RecordHost { facts: facts() }), RECORD_HOST),
        (
            proposal(Command::RecordWorkloads {
                server: server(),
                report: WorkloadReport {
                    fence: Fence {
                        incarnation: 1,
                        revision: 300,
                    },
                    workloads: vec![],
                },
            }),
            RECORD_WORKLOADS,
        ),
        (
            proposal(Command::RecordInstanceActivated {
                config: Some(config.clone()),
                instance: InstanceId::parse("instance-1").unwrap(),
            }),
            RECORD_ACTIVATED,
        ),
        (
            proposal(Command::FinishEffect {
                effect: 12,
                outcome: EffectOutcome::LaunchConfig {
                    config,
                    sealed_token: vec![0xaa, 0xbb],
                },
            }),
            FINISH_EFFECT,
        ),
    ];
    for (proposal, bytes) in rows {
        assert_eq!(hex::encode(encode_proposal(&proposal)), bytes, "{proposal:?}");
        assert_eq!(decode_proposal(&hex::decode(bytes).unwrap()), Ok(proposal));
    }
}

#[test]
fn answers_of_form_1_are_read() {
    let rows: [(Answer, &str); 3] = [
        (Ok(Reply::Done), "000000"),
        (Ok(Reply::Unchanged), "000001"),
        (Err(Rejection::Replayed), "000102"),
    ];
    for (answer, bytes) in rows {
        assert_eq!(hex::encode(encode_answer(&answer)), bytes, "{answer:?}");
        assert_eq!(decode_answer(&hex::decode(bytes).unwrap()), Ok(answer));
    }
}

#[test]
fn damaged_and_newer_bytes_are_refused() {
    for bytes in [
        "",
        "01",
        "00",
        "0007",
        &format!("{PASS_TIME}00"),
        &PASS_TIME[..PASS_TIME.len() - 2],
    ] {
        assert!(decode_proposal(&hex::decode(bytes).unwrap()).is_err(), "{bytes}");
    }
}

/// A state after these commands, each of which changes something.
fn applied(commands: Vec<Command>) -> State {
    let mut state = State::new(Faults::none());
    for (number, command) in commands.into_iter().enumerate() {
        let request = RequestId(number as u128);
        let proposal = Proposal {
            request,
            ..proposal(command)
        };
        assert_eq!(apply(&mut state, proposal), Ok(Reply::Done));
    }
    state
}

/// All rows of a small state, by their hash: any change of any stored form shows.
#[test]
fn rows_of_form_1_are_written_alike() {
    let mut state = applied(vec![
        Command::RecordHost { facts: facts() },
        Command::LockServer {
            server: server(),
            locked: true,
        },
    ]);
    let mut hash = Sha256::new();
    for row in state.drain_rows() {
        hash.update([row.table]);
        hash.update(&row.key);
        hash.update(row.value.expect("nothing was deleted"));
    }
    assert_eq!(hex::encode(hash.finalize()), ROWS_SHA256);
}

#[test]
fn the_row_of_a_worker_is_written_alike() {
    let sealed_kubeconfig = vec![0xaa, 0xbb];
    let mut state = applied(vec![Command::AddWorker {
        facts: facts(),
        sealed_kubeconfig,
    }]);
    let row = state.drain_rows().into_iter().find(|row| row.table == 21);
    let row = row.expect("it was added");
    assert_eq!(hex::encode(row.value.unwrap()), WORKER_ROW);
}

/// The row that a program which is too old finds first: it is read like this for ever.
#[test]
fn the_row_of_the_format_never_changes() {
    let mut facts = facts();
    facts.agent_version = "0.2.0+format.2".to_owned();
    let mut state = applied(vec![
        Command::RecordHost { facts },
        Command::FinalizeFormat {
            format: 2,
            program: "0.2.0".to_owned(),
            vouched: BTreeSet::new(),
        },
    ]);
    let row = state
        .drain_rows()
        .into_iter()
        .min_by_key(|row| row.table)
        .unwrap();
    assert_eq!((row.table, hex::encode(row.key).as_str()), (0, "0000"));
    assert_eq!(hex::encode(row.value.unwrap()), FORMAT_ROW);
}

const WORKER_ROW: &str = "0002aabb80a0f1c2b134";
const FORMAT_ROW: &str = "000205302e322e3080a0f1c2b134";
const FOUND_CLUSTER: &str = "000780a0f1c2b134001a0370656d020102087365727665722d3106686f73742d310468657265103230332e302e3131332e313a343433330909090909090909090909090909090909090909090909090909090909090909";
const INVITE_HOST: &str = "000780a0f1c2b134001bac020707070707070707070707070707070707070707070707070707070707070707c0ef95c3b1340101046865726500";
const JOIN_HOST: &str = "000780a0f1c2b134001cac020707070707070707070707070707070707070707070707070707070707070707087365727665722d3106686f73742d310468657265103230332e302e3131332e313a343433330909090909090909090909090909090909090909090909090909090909090909";
const REMOVE_HOST: &str = "000780a0f1c2b134001d087365727665722d31";
const PIN_HOST: &str = "000780a0f1c2b134001e087365727665722d3102";
const REJOIN_HOST: &str = "000780a0f1c2b134001f087365727665722d31";
const FINALIZE_FORMAT: &str = "000780a0f1c2b13400200205302e322e3001087365727665722d31";
const RECOVER: &str = "000780a0f1c2b134002103";
const ROTATE_AUTHORITY: &str = "000780a0f1c2b134002201010101010101010101010101010101010101010101010101010101010101010202020202020202020202020202020202020202020202020202020202020202036e6577066272696467650102b817";
const RECORD_AUTHORITIES: &str = "000780a0f1c2b1340023087365727665722d310201010101010101010101010101010101010101010101010101010101010101010202020202020202020202020202020202020202020202020202020202020202";
const FINISH_ROTATION: &str =
    "000780a0f1c2b13400240202020202020202020202020202020202020202020202020202020202020202";
const SET_OBSERVING: &str = "000780a0f1c2b134002501";
const ADOPT_SERVER: &str = "000780a0f1c2b1340026087365727665722d3130354366437234375635447465366277784e4245384b396f4e6e5164396669617936614445456b67597446763777344671056136303030e0a71201050101203031323334353637383961626364656630313233343536373839616263646566010103642d3130354366437234375635447465366277784e4245384b396f4e6e5164396669617936614445456b675974467637773446710763687574652d31027631016e03693a31000101056136303030010001000001660163017202763103693a310105302e332e310120303132333435363738396162636465663031323334353637383961626364656601036a2d310103632d310103692d310101b8170001b81701b8170001c03e98f2010001b817";
const REPLACE_HOTKEY: &str = "000780a0f1c2b134002730354366437234375635447465366277784e4245384b396f4e6e5164396669617936614445456b675974467637773446713035464a34677539655658364447347159693168786b556775317961546d31436e51344d69695a506a505661586941546f020102";
const RECORD_ADDRESS: &str = "000780a0f1c2b1340028087365727665722d31103230332e302e3131332e313a34343333";
const ADD_WORKER: &str = "000780a0f1c2b1340029087365727665722d3106686f73742d310b3230332e302e3131332e31ebed010008406405302e312e3002aabb";
const REMOVE_WORKER: &str = "000780a0f1c2b134002a087365727665722d31";
const PASS_TIME: &str = "000780a0f1c2b1340019";
const LOCK_SERVER: &str = "000780a0f1c2b1340005087365727665722d3101";
const RECORD_HOST: &str =
    "000780a0f1c2b1340001087365727665722d3106686f73742d310b3230332e302e3131332e31ebed010008406405302e312e30";
const RECORD_WORKLOADS: &str = "000780a0f1c2b1340003087365727665722d3101ac0200";
const RECORD_ACTIVATED: &str = "000780a0f1c2b13400130108636f6e6669672d310a696e7374616e63652d31";
const FINISH_EFFECT: &str = "000780a0f1c2b13400180c0208636f6e6669672d3102aabb";
const ROWS_SHA256: &str = "e31761849d950ab3340e9cea5ef73b9eb71ff2609c931dcb4e33e1209a7ea940";
