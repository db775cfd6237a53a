//! The Raft library's own suite for log and state stores, over memory without threads and over files with
//! them, and our own tests of the bounded tail and of snapshots.

use futures_util::stream;
use openraft::entry::RaftEntry as _;
use openraft::storage::{
    IOFlushed, RaftLogReader, RaftLogStorage, RaftSnapshotBuilder, RaftStateMachine, Snapshot,
};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::type_config::TypeConfigExt;
use openraft::{EntryPayload, LogId, StorageError};
use std::sync::Arc;
use std::time::Duration;

use crate::config::Config;
use crate::health::Shared;
use crate::log_store::LogStore;
use crate::machine::{Machine, StateMachine};
use crate::open;
use crate::raft::{Commands, LeaderId, RaftEntry, Types};
use crate::snapshot::MemorySnapshots;
use crate::state_store::RowChange;
use crate::storage::{Storage, Writer};
use crate::{Replica, Unconnected};

struct Nothing;

impl StateMachine for Nothing {
    fn apply(&mut self, _command: &[u8]) -> Vec<u8> {
        Vec::new()
    }

    fn changed_rows(&mut self) -> Vec<RowChange> {
        Vec::new()
    }

    fn load(&mut self, _rows: &mut dyn Iterator<Item = (u8, Vec<u8>, Vec<u8>)>) -> Result<(), String> {
        Ok(())
    }

    fn applied(&mut self, _index: u64) {}
}

fn in_memory() -> Config {
    let backend = || Box::new(redb::backends::InMemoryBackend::new());
    let snapshots = MemorySnapshots::default();
    let mut config = Config::new(
        "suite",
        0,
        Storage::Backend {
            log: backend(),
            state: backend(),
            snapshots,
        },
    );
    config.writer = Writer::Inline;
    config
}

async fn store(config: Config) -> (LogStore, Machine) {
    let opened = open::open(config, Box::new(Nothing), &Shared::new())
        .await
        .expect("a new store opens");
    (opened.log, opened.machine)
}

struct InMemory;

impl StoreBuilder<Types, LogStore, Machine> for InMemory {
    async fn build(&self) -> Result<((), LogStore, Machine), StorageError<Types>> {
        let (log, machine) = store(in_memory()).await;
        Ok(((), log, machine))
    }
}

struct InFiles;

impl StoreBuilder<Types, LogStore, Machine, tempfile::TempDir> for InFiles {
    async fn build(&self) -> Result<(tempfile::TempDir, LogStore, Machine), StorageError<Types>> {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let storage = Storage::Files {
            directory: directory.path().to_owned(),
        };
        let (log, machine) = store(Config::new("suite", 0, storage)).await;
        Ok((directory, log, machine))
    }
}

#[test]
fn the_librarys_suite_passes_in_memory() {
    Types::run(async { Suite::test_all(InMemory).await }).expect("every test of the suite passes");
}

#[test]
fn the_librarys_suite_passes_in_files() {
    Types::run(async { Suite::test_all(InFiles).await }).expect("every test of the suite passes");
}

fn entry(term: u64, index: u64) -> RaftEntry {
    let log_id = LogId {
        leader_id: LeaderId { term, node_id: 0 },
        index,
    };
    RaftEntry::new(log_id, EntryPayload::Normal(Commands::new(&[[1; 1000]])))
}

async fn append(log: &mut LogStore, entries: Vec<RaftEntry>) {
    let (sent, done) = Types::oneshot();
    log.append(entries, IOFlushed::signal(sent))
        .await
        .expect("it is queued");
    done.await
        .expect("the worker answers")
        .expect("the write succeeds");
}

#[test]
fn entries_that_memory_forgot_are_read_from_the_file() {
    Types::run(async {
        let mut config = in_memory();
        config.log_tail_bytes_max = 5_000;
        let shared = Shared::new();
        let opened = open::open(config, Box::new(Nothing), &shared)
            .await
            .expect("a new store opens");
        let mut log = opened.log;
        append(&mut log, (0..30).map(|index| entry(1, index)).collect()).await;
        let held = shared
            .counters
            .log_tail_bytes
            .load(std::sync::atomic::Ordering::Relaxed);
        assert!((1_000..=5_000).contains(&held), "{held} bytes in memory");
        let indexes =
            |entries: Vec<RaftEntry>| entries.iter().map(|entry| entry.log_id.index).collect::<Vec<_>>();
        for (range, expected) in [(0..30, 0..30), (3..8, 3..8), (25..40, 25..30), (28..28, 28..28)] {
            let entries = log
                .try_get_log_entries(range.clone())
                .await
                .expect("the log can be read");
            assert_eq!(indexes(entries), expected.collect::<Vec<_>>(), "{range:?}");
        }
        let mut reached = Vec::new();
        while reached.len() < 30 {
            let next = reached.len() as u64;
            let entries = log
                .limited_get_log_entries(next, 30)
                .await
                .expect("the log can be read");
            assert!(!entries.is_empty(), "an entry at least, of those from {next}");
            reached.extend(indexes(entries));
        }
        assert_eq!(reached, (0..30).collect::<Vec<_>>());
        for (range, bytes_max, expected) in [
            (0..9, 2_300, 0..2),
            (0..9, 1, 0..1),
            (27..30, 2_300, 27..29),
            (27..30, 1, 27..28),
        ] {
            let entries = log.read(range, bytes_max).await.expect("the log can be read");
            assert_eq!(
                indexes(entries),
                expected.collect::<Vec<_>>(),
                "{bytes_max} bytes"
            );
        }
        // What replaces a truncated end is read, not what was there before.
        log.truncate_after(Some(entry(1, 9).log_id))
            .await
            .expect("the end can be cut off");
        append(&mut log, (10..40).map(|index| entry(2, index)).collect()).await;
        let entries = log.try_get_log_entries(5..40).await.expect("the log can be read");
        assert!(
            entries
                .iter()
                .all(|entry| (entry.log_id.leader_id.term == 2) == (entry.log_id.index >= 10))
        );
        assert_eq!(indexes(entries), (5..40).collect::<Vec<_>>());
        log.purge(entry(2, 20).log_id)
            .await
            .expect("the beginning can be purged");
        let entries = log.try_get_log_entries(..).await.expect("the log can be read");
        assert_eq!(indexes(entries), (21..40).collect::<Vec<_>>());
    });
}

async fn apply(machine: &mut Machine, entries: Vec<RaftEntry>) {
    let entries = stream::iter(entries.into_iter().map(|entry| Ok((entry, None))));
    machine.apply(entries).await.expect("the machine works");
}

#[test]
fn a_snapshot_that_was_begun_earlier_does_not_replace_a_newer_one() {
    Types::run(async {
        let opened = open::open(in_memory(), Box::new(Nothing), &Shared::new()).await;
        let opened = opened.expect("a new store opens");
        let mut machine = opened.machine;
        apply(&mut machine, (0..3).map(|index| entry(1, index)).collect()).await;
        let mut builder = machine.get_snapshot_builder().await;
        // What a leader that is further sends in the meantime.
        let (_log, mut further) = store(in_memory()).await;
        apply(&mut further, (0..6).map(|index| entry(1, index)).collect()).await;
        let sent = further.get_snapshot_builder().await.build_snapshot().await;
        let Snapshot { meta, snapshot } = sent.expect("it is written");
        let installed = machine.install_snapshot(&meta, snapshot).await;
        installed.expect("it is sound");

        let built = builder.build_snapshot().await.expect("it is written");
        assert_eq!(built.meta, meta);
        let current = opened.place.current().expect("memory can be read");
        let current = current.expect("one is there").rows().expect("it is sound");
        assert_eq!(current.header().meta(), meta);
    });
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_is_wanted_while_another_is_written_follows_it() {
    let opened = Replica::open(in_memory(), Box::new(Nothing), Arc::new(Unconnected)).await;
    let replica = opened.expect("a new store opens");
    let mut wanted = tokio::task::JoinSet::new();
    let writing = replica.0.snapshot_lock.clone().lock_owned().await;
    for command in [b"a", b"b"] {
        replica
            .propose(command.to_vec())
            .await
            .expect("the only voter leads");
        let replica = replica.clone();
        wanted.spawn(async move { replica.snapshot().await });
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    drop(writing);
    while let Some(written) = wanted.join_next().await {
        written.expect("no panic").expect("it is written");
    }
    let metrics = replica.metrics();
    assert_eq!(metrics.snapshot_index, metrics.applied_index);
    replica.shutdown().await;
}
