//! What validators say becomes commands. Pure: events and listings in, commands out.
//!
//! An event that names a version needs its definition, which only a listing or a read has: the caller
//! fetches it and hands it to [`record_chute`].

use std::collections::{BTreeMap, BTreeSet};

use coordinator_core::state_machine::chute::{ChuteCode, ChuteDefinition, ChuteKey};
use coordinator_core::state_machine::command::{ListedInstance, Listing, Observation};
use coordinator_core::state_machine::{Command, State};
use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, ChuteVersion};
use protocol::time::UnixMillis;
use protocol::workload::{LOGGING_PORT, PRIMARY_PORT, Port};

use super::event::Event;
use super::inventory::{self, Observed};
use super::rows::ChuteRow;

/// How long a bounty that was created by us hearing of it may be absent from the list, in ms.
const BOUNTY_MARGIN_MS: u64 = 60_000;

/// What is to be done about an event.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Intake {
    /// A definition to fetch and record before the commands are proposed.
    pub fetch: Option<(ChuteId, ChuteVersion)>,
    /// To be proposed in this order.
    pub commands: Vec<Command>,
}

/// What an event changes. Events are hints: what they miss, the listings bring.
#[must_use]
pub fn of_event(validator: &Hotkey, miner: &Hotkey, event: &Event) -> Intake {
    let key = |chute: &ChuteId| ChuteKey {
        validator: validator.clone(),
        chute: chute.clone(),
    };
    let one = |command| Intake {
        fetch: None,
        commands: vec![command],
    };
    match event {
        Event::GpuVerified { gpu } => one(Command::RecordGpuVerified { gpu: gpu.clone() }),
        Event::ChuteCreated { chute, version, .. } | Event::ChuteUpdated { chute, version, .. } => Intake {
            fetch: Some((chute.clone(), version.clone())),
            commands: vec![],
        },
        Event::ChuteDeleted { chute, .. } => one(Command::RecordChuteDeleted { chute: key(chute) }),
        Event::BountyChange { chute, bounty } => one(Command::RecordBounty {
            chute: key(chute),
            amount: *bounty,
        }),
        Event::ImageUpdated {
            name: Some(image),
            chutes_version,
            chutes,
            ..
        } => {
            let record = |chute: &ChuteId| Command::RecordImage {
                chute: key(chute),
                image: image.clone(),
                chutes_version: chutes_version.clone(),
            };
            Intake {
                fetch: None,
                commands: chutes.iter().map(record).collect(),
            }
        }
        Event::RollingUpdate {
            chute,
            instance,
            new_version,
            ..
        } => Intake {
            // The image may be newer than what we know, even if the version is not.
            fetch: Some((chute.clone(), new_version.clone())),
            commands: vec![Command::RecordRollingUpdate {
                instance: instance.clone(),
                version: new_version.clone(),
            }],
        },
        Event::InstanceCreated {
            instance,
            chute,
            config,
        } => one(Command::RecordInstanceCreated {
            validator: validator.clone(),
            chute: chute.clone(),
            config: config.clone(),
            instance: instance.clone(),
        }),
        Event::InstanceVerified { instance } => one(Command::RecordInstanceVerified {
            instance: instance.clone(),
        }),
        Event::InstanceActivated { instance, config, .. } => one(Command::RecordInstanceActivated {
            config: config.clone(),
            instance: instance.clone(),
        }),
        Event::InstanceDeleted {
            instance,
            config,
            message,
            ..
        } => one(Command::RecordInstanceDeleted {
            config: config.clone(),
            instance: instance.clone(),
            cause: message.clone().unwrap_or_else(|| "no cause given".to_owned()),
        }),
        Event::JobCreated {
            job,
            chute,
            gpu_count,
            excluded,
            disk_gb,
            ..
        } => one(Command::RecordJobOffer {
            job: job.clone(),
            chute: key(chute),
            gpu_count: *gpu_count,
            disk_gb: *disk_gb,
            excluded: excluded.contains(miner),
        }),
        Event::JobDeleted { job, .. } => one(Command::RecordJobDeleted { job: job.clone() }),
        Event::ImageUpdated { .. }
        | Event::ImageCreated { .. }
        | Event::ImageDeleted { .. }
        | Event::ForOtherMiner(_)
        | Event::Unknown(_) => Intake::default(),
    }
}

/// The command that records a chute as published.
#[must_use]
pub fn record_chute(validator: &Hotkey, row: &ChuteRow) -> Command {
    let mut job_ports: Vec<Port> = row
        .jobs
        .iter()
        .flat_map(|method| &method.ports)
        .filter(|port| !matches!(port.port, PRIMARY_PORT | LOGGING_PORT))
        .map(|port| Port {
            internal: port.port,
            protocol: port.protocol,
        })
        .collect();
    job_ports.sort_unstable();
    job_ports.dedup();
    let multiplier = row
        .effective_compute_multiplier_milli
        .or(row.node_selector.compute_multiplier_milli);
    Command::RecordChute {
        definition: ChuteDefinition {
            key: ChuteKey {
                validator: validator.clone(),
                chute: row.chute_id.clone(),
            },
            version: row.version.clone(),
            name: row.name.clone(),
            image: row.image.clone(),
            chutes_version: row.chutes_version.clone(),
            gpu_count: u32::try_from(row.node_selector.gpu_count)
                .unwrap_or(u32::MAX)
                .max(1),
            supported_gpus: row.supported_gpus.iter().cloned().collect(),
            // Before 2025-10 the validator did not say; a chute that is not public was then a private one.
            preemptible: row.preemptible.or(row.public).unwrap_or(true),
            tee: row.tee.unwrap_or(false),
            serves_requests: row.cords > 0,
            job_ports,
            effective_multiplier_milli: multiplier,
        },
        code: ChuteCode {
            filename: row.filename.clone(),
            code: row.code.clone(),
            ref_str: row.ref_str.clone(),
        },
    }
}

/// What a listing changes, as far as it differs from the state: catalogue first, then what refers to it.
#[must_use]
pub fn of_observation(state: &State, miner: &Hotkey, observed: &inventory::Observation) -> Vec<Command> {
    let validator = &observed.validator;
    let mut commands = Vec::new();
    for row in observed.chutes.rows() {
        let command = record_chute(validator, row);
        if differs(state, &command) {
            commands.push(command);
        }
    }
    let observation = core_observation(observed);
    if state.observation_matters(&observation) {
        commands.push(Command::Observe(observation));
    }
    commands.extend(bounty_commands(state, observed));
    for row in observed.jobs.rows().iter().filter(|row| row.is_open()) {
        if state.jobs().contains_key(&row.job_id) {
            continue;
        }
        let chute = ChuteKey {
            validator: validator.clone(),
            chute: row.chute_id.clone(),
        };
        let disk_gb = row.disk_gb().and_then(|gb| u32::try_from(gb).ok());
        let gpu_count = state
            .chutes()
            .get(&chute)
            .map_or(1, |chute| chute.definition.gpu_count);
        commands.push(Command::RecordJobOffer {
            job: row.job_id.clone(),
            chute,
            gpu_count,
            disk_gb: disk_gb.unwrap_or(super::event::JOB_DISK_GB_DEFAULT),
            excluded: row.miner_history.iter().any(|hotkey| hotkey == miner.as_str()),
        });
    }
    commands
}

fn differs(state: &State, command: &Command) -> bool {
    let Command::RecordChute { definition, code } = command else {
        return true;
    };
    let Some(known) = state.chutes().get(&definition.key) else {
        return true;
    };
    let version = coordinator_core::state_machine::chute::VersionKey {
        chute: definition.key.clone(),
        version: definition.version.clone(),
    };
    known.definition != *definition || state.codes().get(&version) != Some(code)
}

fn bounty_commands(state: &State, observed: &inventory::Observation) -> Vec<Command> {
    let validator = &observed.validator;
    let mut commands = Vec::new();
    for row in observed.bounties.rows() {
        let chute = ChuteKey {
            validator: validator.clone(),
            chute: row.chute_id.clone(),
        };
        let known = state.bounties().contains_key(&chute);
        if !known && state.chutes().contains_key(&chute) {
            commands.push(Command::RecordBounty {
                chute,
                amount: row.amount,
            });
        }
    }
    if let Some((asked_at, rows)) = observed.bounties.complete() {
        let open: BTreeSet<&ChuteId> = rows.iter().map(|row| &row.chute_id).collect();
        for (chute, bounty) in state.bounties().iter() {
            let old = bounty.seen_at + BOUNTY_MARGIN_MS <= asked_at;
            if chute.validator == *validator && old && !open.contains(&chute.chute) {
                commands.push(Command::RecordBountyOver { chute: chute.clone() });
            }
        }
    }
    commands
}

/// The listing as the state machine takes it: only complete lists are known.
#[must_use]
pub fn core_observation(observed: &inventory::Observation) -> Observation {
    let asked = |at: Option<UnixMillis>| at.unwrap_or(UnixMillis(u64::MAX));
    // The earliest of the times decides: an older one only makes the state machine more careful.
    let read_at = [
        observed.chutes.complete().map(|(at, _)| at),
        observed.instances.complete().map(|(at, _)| at),
        observed.nodes.complete().map(|(at, _)| at),
    ]
    .into_iter()
    .map(asked)
    .min()
    .filter(|at| at.0 != u64::MAX)
    .unwrap_or_default();
    Observation {
        validator: observed.validator.clone(),
        read_at,
        chutes: known(&observed.chutes, |row| {
            (row.chute_id.clone(), row.version.clone())
        }),
        instances: known(&observed.instances, |row| ListedInstance {
            instance: row.instance_id.clone(),
            chute: row.chute_id.clone(),
            config: row.config_id.clone(),
            active: row.active,
            verified: row.verified,
        }),
        gpus: known(&observed.nodes, |row| {
            (row.gpu.clone(), row.verified_at.is_some())
        }),
    }
}

fn known<T, R>(observed: &Observed<T>, convert: impl Fn(&T) -> R) -> Listing<Vec<R>> {
    match observed.complete() {
        Some((_, rows)) => Listing::Known(rows.iter().map(convert).collect()),
        None => Listing::Unknown,
    }
}

/// Chutes that the validator says it wants no more copies of at present.
#[must_use]
pub fn blocked_chutes(observed: &inventory::Observation) -> BTreeMap<ChuteId, &'static str> {
    let mut blocked = BTreeMap::new();
    for row in observed.utilization.rows() {
        if row.update_in_progress == Some(true) {
            blocked.insert(row.chute_id.clone(), "it is being updated");
        } else if row.scalable == Some(false) {
            blocked.insert(row.chute_id.clone(), "the validator wants no more copies");
        }
    }
    blocked
}
