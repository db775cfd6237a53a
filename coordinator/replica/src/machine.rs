//! The application's state machine as the Raft library sees it.
//!
//! Commands are applied in memory. The rows that they change are written to `state.redb` some
//! [`COMMANDS_UNWRITTEN_MAX`] commands later, each once however often it changed, and nobody waits for them: after a
//! crash the log has the commands. Replies go out after the machine was told that the batch is applied, so that
//! whoever gets a reply also sees its effect.

use futures_util::{Stream, TryStreamExt};
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine, Snapshot};
use openraft::type_config::alias::SnapshotOf;
use openraft::{EntryPayload, StoredMembership};
use redb::ReadTransaction;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{MutexGuard, OwnedMutexGuard, oneshot};

use crate::faults::Faults;
use crate::health::{Shared, count};
use crate::raft::{RaftLogId, RaftMembership, RaftSnapshotMeta, Replies, Types};
use crate::snapshot::{self, Header, Place, Row, SnapshotData, SnapshotReader};
use crate::state_store::{Applied, RowChange, Rows, StateLane};
use crate::storage::Writer;

/// The application's replicated state. Deterministic: the same commands in the same order give the same
/// replies and rows on every member and in every release that still reads them.
pub trait StateMachine: Send + 'static {
    /// Applies one command and returns the reply for its proposer.
    fn apply(&mut self, command: &[u8]) -> Vec<u8>;

    /// The rows that differ from what the last call returned, or from what was loaded.
    fn changed_rows(&mut self) -> Vec<RowChange>;

    /// Replaces everything by these rows (table, key, value), ascending: at start, and after a snapshot was
    /// taken over.
    ///
    /// # Errors
    /// A row that this release does not understand; the replica does not start then.
    fn load(&mut self, rows: &mut dyn Iterator<Item = (u8, Vec<u8>, Vec<u8>)>) -> Result<(), String>;

    /// Called after each batch of applied entries, before the replies go out, with the log index reached:
    /// publish the state to readers here.
    fn applied(&mut self, index: u64);
}

/// After so many commands the rows that they changed are written. A restart applies at most these again, beside
/// what was not forced to the disk.
const COMMANDS_UNWRITTEN_MAX: usize = 2048;

/// Held while a snapshot is being written, so that a shutdown can wait for it.
pub(crate) type SnapshotLock = Arc<tokio::sync::Mutex<()>>;

/// The adapter between the Raft library, the application and the stores. When the library is started anew
/// in the same process, a successor takes over and this one does nothing any more.
pub(crate) struct Machine {
    body: Arc<tokio::sync::Mutex<Body>>,
    generation: u64,
}

struct Body {
    machine: Box<dyn StateMachine>,
    applied: Applied,
    /// Commands since rows were written.
    commands_unwritten: usize,
    cluster: String,
    state: StateLane,
    place: Place,
    writer: Writer,
    shared: Shared,
    snapshot_lock: SnapshotLock,
    faults: Faults,
    /// Generation of the adapter that may use this.
    generation: u64,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine")
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

/// What a machine is made of, besides the application.
#[derive(Debug, Clone)]
pub(crate) struct Parts {
    pub(crate) cluster: String,
    pub(crate) applied: Applied,
    pub(crate) state: StateLane,
    pub(crate) place: Place,
    pub(crate) writer: Writer,
    pub(crate) shared: Shared,
    pub(crate) snapshot_lock: SnapshotLock,
    pub(crate) faults: Faults,
}

impl Machine {
    /// A machine whose application has loaded the rows already.
    pub(crate) fn new(machine: Box<dyn StateMachine>, parts: Parts) -> Self {
        let Parts {
            cluster,
            applied,
            state,
            place,
            writer,
            shared,
            snapshot_lock,
            faults,
        } = parts;
        let body = Body {
            machine,
            applied,
            commands_unwritten: 0,
            cluster,
            state,
            place,
            writer,
            shared,
            snapshot_lock,
            faults,
            generation: 0,
        };
        Self {
            body: Arc::new(tokio::sync::Mutex::new(body)),
            generation: 0,
        }
    }

    /// A way to the application that outlives the library's.
    pub(crate) fn keep(&self) -> Self {
        Self {
            body: self.body.clone(),
            generation: self.generation,
        }
    }

    /// Takes over from every earlier adapter of the same application.
    pub(crate) async fn succeed(&self) -> Self {
        let mut body = self.body.lock().await;
        body.generation += 1;
        Self {
            body: self.body.clone(),
            generation: body.generation,
        }
    }

    /// Queues every row that is not written yet.
    pub(crate) async fn write_rows(&self) -> io::Result<()> {
        self.body.lock().await.write_rows().await
    }

    /// The last entry that is applied. The library's metrics learn it a moment later.
    pub(crate) async fn last_applied(&self) -> Option<RaftLogId> {
        self.body.lock().await.applied.last
    }

    async fn body(&self) -> io::Result<MutexGuard<'_, Body>> {
        let body = self.body.lock().await;
        if body.generation == self.generation {
            Ok(body)
        } else {
            Err(io::Error::other("another one has taken over"))
        }
    }
}

impl Body {
    /// Runs the application's code; a panic there stops this replica rather than letting it diverge.
    fn guarded<T>(&mut self, run: impl FnOnce(&mut dyn StateMachine) -> T) -> io::Result<T> {
        let shared = self.shared.clone();
        let machine = self.machine.as_mut();
        catch_unwind(AssertUnwindSafe(|| run(machine))).map_err(|panic| {
            let reason = format!("the state machine panicked: {}", text_of(&*panic));
            shared.fail(&reason);
            io::Error::other(reason)
        })
    }

    async fn write_rows(&mut self) -> io::Result<()> {
        // A panic may have left a command half applied: the next start applies it again, to rows without it.
        if let Some(reason) = self.shared.failure() {
            return Err(io::Error::other(reason));
        }
        let rows = self.guarded(StateMachine::changed_rows)?;
        self.commands_unwritten = 0;
        self.state.write(rows, self.applied.clone()).await
    }
}

/// What a panic said, for the person who has to do something about it.
fn text_of(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("it did not say why")
}

impl RaftStateMachine<Types> for Machine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> io::Result<(Option<RaftLogId>, RaftMembership)> {
        let body = self.body().await?;
        Ok((body.applied.last, body.applied.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> io::Result<()>
    where
        Strm: Stream<Item = io::Result<EntryResponder<Types>>> + Unpin + Send,
    {
        let mut body = self.body().await?;
        let mut answers = Vec::new();
        let mut applied = 0;
        while let Some((entry, responder)) = entries.try_next().await? {
            let mut replies = Replies::default();
            match entry.payload {
                EntryPayload::Blank => {}
                EntryPayload::Normal(commands) => {
                    let all = |machine: &mut dyn StateMachine| {
                        commands.iter().map(|command| machine.apply(command)).collect()
                    };
                    replies.0 = body.guarded(all)?;
                    count(&body.shared.counters.commands_applied, commands.count());
                    body.commands_unwritten += commands.count();
                }
                EntryPayload::Membership(membership) => {
                    body.applied.membership = StoredMembership::new(Some(entry.log_id), membership);
                }
            }
            body.applied.last = Some(entry.log_id);
            applied += 1;
            if let Some(responder) = responder {
                answers.push((responder, replies));
            }
        }
        let Some(last) = body.applied.last else {
            return Ok(());
        };
        count(&body.shared.counters.entries_applied, applied);
        body.guarded(|machine| machine.applied(last.index))?;
        if body.commands_unwritten >= COMMANDS_UNWRITTEN_MAX {
            body.write_rows().await?;
        }
        for (responder, replies) in answers {
            responder.send(replies);
        }
        Ok(())
    }

    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<SnapshotBuilder> {
        if !force && self.body.lock().await.snapshot_lock.try_lock().is_err() {
            // The previous one is still being written: the library asks again later.
            return None;
        }
        Some(self.get_snapshot_builder().await)
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        let mut body = self.body.lock().await;
        let view = match body.write_rows().await {
            Ok(()) => body.state.view().await,
            Err(error) => Err(error),
        };
        SnapshotBuilder {
            header: Header {
                cluster: body.cluster.clone(),
                applied: body.applied.clone(),
            },
            view: Mutex::new(Some(view)),
            state: body.state.clone(),
            place: body.place.clone(),
            writer: body.writer,
            shared: body.shared.clone(),
            lock: body.snapshot_lock.clone(),
            left_out: body.faults.snapshot_misses_table,
        }
    }

    async fn install_snapshot(&mut self, meta: &RaftSnapshotMeta, data: SnapshotData) -> io::Result<()> {
        let mut body = self.body().await?;
        let (place, cluster, received) = (body.place.clone(), body.cluster.clone(), data.clone());
        let lock = body.snapshot_lock.clone().lock_owned().await;
        let stored = body.writer.blocking(move || {
            let _lock = lock;
            keep_received(&place, &cluster, &received)
        });
        let header = stored.await??;
        if header.meta() != *meta {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the snapshot is not the one announced",
            ));
        }
        body.state.replace(data.clone(), header.applied.clone()).await?;
        let mut rows = SnapshotRows {
            reader: data.rows()?,
            fault: None,
        };
        body.guarded(|machine| machine.load(&mut rows))?
            .map_err(io::Error::other)?;
        if let Some(fault) = rows.fault {
            return Err(fault);
        }
        body.applied = header.applied;
        body.commands_unwritten = 0;
        let index = body.applied.last.map_or(0, |id| id.index);
        body.guarded(|machine| machine.applied(index))?;
        count(&body.shared.counters.snapshots_installed, 1);
        body.shared.note_snapshot(&data);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<SnapshotOf<Types, SnapshotData>>> {
        let (place, writer) = {
            let body = self.body.lock().await;
            (body.place.clone(), body.writer)
        };
        let current = writer.blocking(move || -> io::Result<_> {
            let Some(data) = place.current()? else {
                return Ok(None);
            };
            let meta = data.rows()?.header().meta();
            Ok(Some(Snapshot { meta, snapshot: data }))
        });
        current.await?
    }
}

/// Checks a snapshot and makes it the current one, unless it is that already.
fn keep_received(place: &Place, cluster: &str, received: &SnapshotData) -> io::Result<Header> {
    let header = snapshot::verify(received)?;
    if header.cluster != cluster {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the snapshot is of another cluster",
        ));
    }
    if let Some(current) = place.current()?
        && *current.rows()?.header() == header
    {
        return Ok(header);
    }
    let mut reader = received.rows()?;
    place.replace(|out| {
        let mut fault = None;
        let rows = std::iter::from_fn(|| {
            reader.next_row().unwrap_or_else(|error| {
                fault = Some(error);
                None
            })
        });
        snapshot::write(out, &header, rows)?;
        fault.map_or(Ok(()), Err)
    })?;
    Ok(header)
}

struct SnapshotRows {
    reader: SnapshotReader,
    fault: Option<io::Error>,
}

impl Iterator for SnapshotRows {
    type Item = (u8, Vec<u8>, Vec<u8>);

    fn next(&mut self) -> Option<Self::Item> {
        match self.reader.next_row() {
            Ok(row) => row.map(|Row { table, key, value }| (table, key, value)),
            Err(error) => {
                self.fault = Some(error);
                None
            }
        }
    }
}

type OrderedView = io::Result<oneshot::Receiver<io::Result<ReadTransaction>>>;

/// Writes a snapshot from a view of the state, while commands go on being applied.
pub(crate) struct SnapshotBuilder {
    header: Header,
    view: Mutex<Option<OrderedView>>,
    state: StateLane,
    place: Place,
    writer: Writer,
    shared: Shared,
    lock: SnapshotLock,
    /// A planted fault.
    left_out: Option<u8>,
}

impl SnapshotBuilder {
    async fn build(&mut self) -> io::Result<SnapshotOf<Types, SnapshotData>> {
        let ordered = self.view.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let ordered = ordered.ok_or_else(|| io::Error::other("a builder builds one snapshot"))??;
        let lock = self.lock.clone().lock_owned().await;
        let view = ordered.await.map_err(io::Error::other)??;
        let (place, header, left_out) = (self.place.clone(), self.header.clone(), self.left_out);
        let snapshot = self
            .writer
            .blocking(move || write_view(&place, header, &view, left_out, lock))
            .await??;
        self.shared.note_snapshot(&snapshot.snapshot);
        // The snapshot lets the library purge the log: first put the state itself on the disk.
        self.state.force().await?;
        count(&self.shared.counters.snapshots_built, 1);
        Ok(snapshot)
    }
}

impl RaftSnapshotBuilder<Types> for SnapshotBuilder {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> io::Result<SnapshotOf<Types, SnapshotData>> {
        let built = self.build().await;
        if let Err(error) = &built {
            self.shared.fail(&format!("write snapshot: {error}"));
        }
        built
    }
}

fn write_view(
    place: &Place,
    header: Header,
    view: &ReadTransaction,
    left_out: Option<u8>,
    _lock: OwnedMutexGuard<()>,
) -> io::Result<SnapshotOf<Types, SnapshotData>> {
    // A newer one may have been installed while this one waited for its turn: the log goes on from that.
    if let Some(current) = place.current()?
        && let Ok(meta) = current.rows().map(|rows| rows.header().meta())
        && meta.last_log_id > header.applied.last
    {
        return Ok(Snapshot {
            meta,
            snapshot: current,
        });
    }
    let mut rows = Rows::of(view).map_err(io::Error::other)?;
    place.replace(|out| {
        let each = rows.by_ref().map(|(table, key, value)| Row { table, key, value });
        let each = each.filter(|row| Some(row.table) != left_out);
        snapshot::write(out, &header, each)?;
        rows.fault().map_or(Ok(()), |fault| Err(io::Error::other(fault)))
    })?;
    let data = place
        .current()?
        .ok_or_else(|| io::Error::other("the snapshot just written is gone"))?;
    Ok(Snapshot {
        meta: header.meta(),
        snapshot: data,
    })
}
