//! Opening a store: locks, checks, and the application's rows, before the Raft library sees any of it.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::config::Config;
use crate::error::Error;
use crate::format::Identity;
use crate::health::Shared;
use crate::log_store::LogStore;
use crate::log_store::log_file::{self, LogFile, Stored};
use crate::machine::{Machine, Parts, SnapshotLock, StateMachine};
use crate::raft::RaftMembership;
use crate::snapshot::{Header, Place};
use crate::state_store::{self, Applied, Rows, StateFile, StateLane};
use crate::storage::{Directory, Lane, Storage, StoreFile};

/// Memory that redb may use for pages of the log: entries are mostly read from our own tail.
const LOG_CACHE_BYTES: usize = 1024 * 1024;
/// Memory that redb may use for pages of the state: rows are read only at start and for snapshots.
const STATE_CACHE_BYTES: usize = 1024 * 1024;

/// A store ready for the Raft library.
pub(crate) struct Opened {
    pub(crate) log: LogStore,
    pub(crate) state: StateLane,
    pub(crate) machine: Machine,
    pub(crate) place: Place,
    /// Members as far as they are known before the library starts.
    pub(crate) members: RaftMembership,
    pub(crate) snapshot_lock: SnapshotLock,
}

struct Checked {
    log: StoreFile,
    stored: Stored,
    state: StoreFile,
    applied: Applied,
    place: Place,
    members: RaftMembership,
    machine: Box<dyn StateMachine>,
}

/// Opens and checks everything, then starts the writers.
pub(crate) async fn open(
    config: Config,
    machine: Box<dyn StateMachine>,
    shared: &Shared,
) -> Result<Opened, Error> {
    let writer = config.writer;
    let (cluster, tail_bytes_max) = (config.cluster.clone(), config.log_tail_bytes_max);
    let faults = config.faults;
    let for_check = shared.clone();
    let checked = writer.blocking(move || check(config, machine, &for_check)).await;
    let checked = checked.map_err(|_| Error::Load("the state machine panicked".into()))??;
    let Checked {
        log,
        stored,
        state,
        applied,
        place,
        members,
        machine,
    } = checked;

    let (log_name, state_name) = (log.file.clone(), state.file.clone());
    let thread = |file| move |source| Error::Io { file, source };
    let durable_end = Arc::new(AtomicU64::new(applied.last.map_or(0, |id| id.index + 1)));
    let worker = StateFile::new(state, shared.clone(), durable_end.clone());
    let lane = Lane::start(writer, "raft-state", worker).map_err(thread(state_name))?;
    let state = StateLane::new(lane, durable_end);
    let log = LogStore::new(stored, tail_bytes_max, shared.clone(), state.clone(), |tail| {
        Lane::start(
            writer,
            "raft-log",
            LogFile::new(log, tail, shared.clone(), faults),
        )
    });
    let log = log.map_err(thread(log_name))?;
    let snapshot_lock = SnapshotLock::default();
    let parts = Parts {
        cluster,
        applied,
        state: state.clone(),
        place: place.clone(),
        writer,
        shared: shared.clone(),
        snapshot_lock: snapshot_lock.clone(),
        faults,
    };
    Ok(Opened {
        log,
        state,
        machine: Machine::new(machine, parts),
        place,
        members,
        snapshot_lock,
    })
}

fn check(config: Config, mut machine: Box<dyn StateMachine>, shared: &Shared) -> Result<Checked, Error> {
    let identity = Identity {
        cluster: config.cluster,
        node_id: config.node_id,
    };
    let mut directory = None;
    let ((log, log_name), (state, state_name), place) = match config.storage {
        Storage::Files { directory: path } => {
            let opened = Directory::open(path)?;
            opened.check_member(&identity)?;
            let (log, state) = (opened.log()?, opened.state()?);
            let place = Place::Directory(opened.path().to_owned());
            directory = Some(opened);
            (log, state, place)
        }
        Storage::Backend {
            log,
            state,
            snapshots,
        } => (
            (log, "log backend".into()),
            (state, "state backend".into()),
            Place::Memory(snapshots),
        ),
    };
    let counters = &shared.counters;
    let log = StoreFile::open(
        log,
        log_name,
        &identity,
        LOG_CACHE_BYTES,
        counters.log_fsyncs.clone(),
    )?;
    let state = StoreFile::open(
        state,
        state_name,
        &identity,
        STATE_CACHE_BYTES,
        counters.state_fsyncs.clone(),
    )?;
    let stored = log_file::load(&log, config.log_tail_bytes_max)?;
    let applied = state_store::load(&state)?;
    let snapshot = place.check(&identity.cluster)?;
    if let Ok(Some(data)) = place.current() {
        shared.note_snapshot(&data);
    }
    check_together(&stored, &applied, snapshot.as_ref(), &state)?;
    let members = newest_members(&stored, &applied, snapshot.as_ref());
    load_rows(&state, machine.as_mut())?;
    if let Some(last) = applied.last {
        machine.applied(last.index);
    }
    if let Some(directory) = directory {
        directory.stamp_member(&identity)?;
    }
    Ok(Checked {
        log,
        stored,
        state,
        applied,
        place,
        members,
        machine,
    })
}

/// Members as of the newest place that says so: after a crash the rows of the state may be older than the log and the
/// snapshot.
fn newest_members(stored: &Stored, applied: &Applied, snapshot: Option<&Header>) -> RaftMembership {
    let in_snapshot = snapshot.map(|header| &header.applied.membership);
    let all = stored.members.iter().chain(in_snapshot);
    let newest = all
        .chain([&applied.membership])
        .max_by_key(|members| *members.log_id());
    newest.unwrap_or(&applied.membership).clone()
}

/// Each file may be sound by itself and still not fit the others, as when one was restored from a copy.
fn check_together(
    stored: &Stored,
    applied: &Applied,
    snapshot: Option<&Header>,
    state: &StoreFile,
) -> Result<(), Error> {
    let reached = applied.last.max(snapshot.and_then(|header| header.applied.last));
    if stored.purged > reached {
        return Err(state.damaged("it is older than the beginning of the log"));
    }
    if reached.is_some() && stored.vote.is_none() {
        return Err(state.damaged("it holds a state although the log was never used"));
    }
    Ok(())
}

fn load_rows(state: &StoreFile, machine: &mut dyn StateMachine) -> Result<(), Error> {
    let (loaded, fault) = state.read(|view| {
        let mut rows = Rows::of(view)?;
        let loaded = machine.load(&mut rows);
        Ok((loaded, rows.fault()))
    })?;
    match fault {
        Some(fault) => Err(state.damaged(fault)),
        None => loaded.map_err(Error::Load),
    }
}
