//! Snapshots that leave the cluster, encrypted to a key that only the operator has.
//!
//! ```text
//! replica --> stream.rs (encrypts, in pieces) --> API, for `chutes-miner snapshot save`
//!                                             \-> here, every so often --> target.rs: directory or bucket
//! file --> restore.rs --> the store of a new member
//! ```
//! - `stream.rs`: a snapshot of a running member as a file for an operator;
//! - `name.rs`: what such files are called, and which of them are ours (pure);
//! - `target.rs`, `bucket.rs`, `signature.rs`: where they are kept;
//! - `restore.rs`: the way back;
//! - here: settings, the schedule, and how the last one went.
//!
//! Only a leader runs the schedule. What it goes by is what it finds at the target, so that a new leader neither
//! repeats nor misses one.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use protocol::snapshot_file::{InvalidSnapshotKey, Recipient};
use protocol::time::UnixMillis;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;

mod bucket;
mod name;
pub mod restore;
pub mod signature;
mod stream;
mod target;

pub use bucket::{BucketSettings, Credentials};
pub use name::Name;
pub use stream::{Snapshots, Stream};
pub use target::{Place, Target};

/// After a failure it is tried again after this, or after `every` if that is shorter.
const RETRY_MAX: Duration = Duration::from_secs(5 * 60);
/// By so much the clock of whoever took a snapshot may have been ahead.
const AHEAD_MAX: Duration = Duration::from_secs(5 * 60);

/// Settings of the schedule, as checked.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Between two snapshots.
    pub every: Duration,
    /// So many are kept, the newest ones.
    pub keep: usize,
    /// Who can read them.
    pub recipient: Recipient,
    /// Where they go.
    pub place: Place,
    /// Where a snapshot waits while it is sent; what lies there is encrypted already.
    pub spool: PathBuf,
}

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The member could not take one.
    #[error("take a snapshot: {0}")]
    Take(String),
    /// The operator's key is none.
    #[error(transparent)]
    Key(#[from] InvalidSnapshotKey),
    /// The disk.
    #[error("{}: {source}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The bucket's server.
    #[error("bucket: {0}")]
    Bucket(String),
}

/// Result of this room.
pub type Result<T> = std::result::Result<T, Error>;

/// A snapshot that was put away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    /// When it was taken.
    pub at: UnixMillis,
    /// What it is called.
    pub name: String,
    /// Size of the file.
    pub size_bytes: u64,
}

/// How it goes, as this member knows it: others know nothing while they do not lead.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The last one that this member put away.
    pub last: Option<Done>,
    /// What went wrong since then.
    pub failure: Option<(UnixMillis, String)>,
}

/// Where the schedule tells how it goes. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Reports(watch::Sender<Report>);

impl Reports {
    /// How it goes.
    #[must_use]
    pub fn get(&self) -> Report {
        self.0.borrow().clone()
    }

    /// Follows how it goes.
    #[must_use]
    pub fn follow(&self) -> watch::Receiver<Report> {
        self.0.subscribe()
    }

    fn set(&self, change: impl FnOnce(&mut Report)) {
        self.0.send_modify(change);
    }
}

/// What the management API needs of all this.
#[derive(Debug, Clone)]
pub struct Door {
    snapshots: Option<Snapshots>,
    recipient: Option<Recipient>,
    reports: Reports,
    /// One at a time: each reads the whole state.
    turn: Arc<Semaphore>,
}

impl Default for Door {
    fn default() -> Self {
        Self::new(None, None, Reports::default())
    }
}

impl Door {
    /// A door to `snapshots`. `recipient` is the key of the configuration, for requests that name none.
    #[must_use]
    pub fn new(snapshots: Option<Snapshots>, recipient: Option<Recipient>, reports: Reports) -> Self {
        Self {
            snapshots,
            recipient,
            reports,
            turn: Arc::new(Semaphore::new(1)),
        }
    }

    /// Where snapshots come from; none where the state is kept nowhere.
    #[must_use]
    pub fn snapshots(&self) -> Option<&Snapshots> {
        self.snapshots.as_ref()
    }

    /// The key of the configuration.
    #[must_use]
    pub fn recipient(&self) -> Option<&Recipient> {
        self.recipient.as_ref()
    }

    /// How the schedule goes.
    #[must_use]
    pub fn report(&self) -> Report {
        self.reports.get()
    }

    /// The right to stream one now; none while another is streamed.
    #[must_use]
    pub fn turn(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.turn).try_acquire_owned().ok()
    }
}

/// The snapshots of one member: for the API at any time, and by the schedule while it leads.
#[derive(Debug, Clone)]
pub struct Keeper {
    snapshots: Snapshots,
    settings: Option<Settings>,
    reports: Reports,
}

impl Keeper {
    /// Without settings there is no schedule.
    #[must_use]
    pub fn new(snapshots: Snapshots, settings: Option<Settings>) -> Self {
        Self {
            snapshots,
            settings,
            reports: Reports::default(),
        }
    }

    /// What the management API needs.
    #[must_use]
    pub fn door(&self) -> Door {
        let recipient = self.settings.as_ref().map(|settings| settings.recipient);
        Door::new(Some(self.snapshots.clone()), recipient, self.reports.clone())
    }

    /// Where the schedule tells how it goes.
    #[must_use]
    pub fn reports(&self) -> &Reports {
        &self.reports
    }

    /// Puts a snapshot away every so often whenever this member leads, until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let Some(settings) = &self.settings else {
            return;
        };
        let _ = stop.run_until_cancelled(self.while_leading(settings)).await;
    }

    async fn while_leading(&self, settings: &Settings) {
        let mut leadership = self.snapshots.leadership();
        let mut lost = leadership.clone();
        while leadership.wait_for(|now| now.leads).await.is_ok() {
            tokio::select! {
                _ = lost.wait_for(|now| !now.leads) => self.reports.set(|report| *report = Report::default()),
                () = keep_on(&self.snapshots, settings, &self.reports) => {}
            }
        }
    }
}

async fn keep_on(snapshots: &Snapshots, settings: &Settings, reports: &Reports) {
    snapshots.founded().await;
    let clock = snapshots.clock();
    let retry = settings.every.min(RETRY_MAX);
    loop {
        let wait = match once_when_due(snapshots, settings, reports).await {
            Ok(wait) => wait,
            Err(error) => {
                tracing::warn!(%error, "no snapshot was put away; it is tried again");
                let failure = (clock.now(), error.to_string());
                reports.set(|report| report.failure = Some(failure));
                retry
            }
        };
        tokio::time::sleep(wait).await;
    }
}

/// Puts one away if it is time, and says how long it is until the next one.
async fn once_when_due(snapshots: &Snapshots, settings: &Settings, reports: &Reports) -> Result<Duration> {
    let target = Target::open(&settings.place)?;
    let cluster = snapshots.cluster();
    let now = snapshots.clock().now();
    let (past, ahead) = by_now(target.list(cluster).await?, now);
    if let Some(name) = ahead.last() {
        tracing::warn!(
            name = name.text(cluster),
            "a snapshot is of a time to come: it was taken by a clock that was ahead, and tells nothing of when the next \
             one is due"
        );
    }
    if let Some(wait) = wait_after(past.last().copied(), settings.every, now) {
        return Ok(wait);
    }
    let done = put_away(snapshots, settings, &target).await?;
    tracing::info!(
        name = done.name,
        size_bytes = done.size_bytes,
        "a snapshot was put away"
    );
    let forgotten = forget_old(&target, cluster, settings.keep, now).await;
    reports.set(|report| {
        *report = Report {
            last: Some(done),
            failure: None,
        };
    });
    forgotten?;
    Ok(settings.every)
}

/// Snapshots up to now, and those of a time to come. Clocks may differ by a little.
fn by_now(mut names: Vec<Name>, now: UnixMillis) -> (Vec<Name>, Vec<Name>) {
    let past = names.partition_point(|name| name.at <= now + AHEAD_MAX);
    let ahead = names.split_off(past);
    (names, ahead)
}

/// How long it is until the next one is due, after the newest that is there.
fn wait_after(newest: Option<Name>, every: Duration, now: UnixMillis) -> Option<Duration> {
    let age = Duration::from_millis(now.since(newest?.at));
    every.checked_sub(age).filter(|wait| !wait.is_zero())
}

/// Puts one snapshot away now.
///
/// # Errors
/// [`Error`]; what was half written is no snapshot by its name.
pub async fn put_away(snapshots: &Snapshots, settings: &Settings, target: &Target) -> Result<Done> {
    let mut stream = snapshots.sealed(&settings.recipient).await?;
    let head = stream.head();
    let name = Name {
        at: head.created_at,
        last_index: head.last_index,
    };
    let (at, name) = (head.created_at, name.text(&head.cluster));
    let size_bytes = target.put(&name, &mut stream, &settings.spool).await?;
    Ok(Done { at, name, size_bytes })
}

/// Deletes all but the `keep` newest snapshots of this cluster; nothing else is touched, and those of a time to come are
/// neither counted nor deleted.
async fn forget_old(target: &Target, cluster: &str, keep: usize, now: UnixMillis) -> Result<()> {
    let (names, _) = by_now(target.list(cluster).await?, now);
    let surplus = names.len().saturating_sub(keep);
    for name in &names[..surplus] {
        target.delete(&name.text(cluster)).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A new leader neither repeats nor misses one: it goes by what is at the target.
    #[test]
    fn the_next_one_is_due_so_long_after_the_newest() {
        let every = Duration::from_secs(3600);
        let now = UnixMillis::from_unix_seconds(1_800_000_000);
        let aged = |seconds: u64| Name {
            at: now - seconds * 1000,
            last_index: 1,
        };
        for (newest, wait) in [
            (None, None),
            (Some(aged(0)), Some(3600)),
            (Some(aged(3540)), Some(60)),
            (Some(aged(3600)), None),
            (Some(aged(999_999)), None),
        ] {
            assert_eq!(
                wait_after(newest, every, now),
                wait.map(Duration::from_secs),
                "{newest:?}"
            );
        }
        // A clock that was ahead a little: as if it were just now.
        let ahead = Name {
            at: now + 5_000,
            last_index: 1,
        };
        assert_eq!(wait_after(Some(ahead), every, now), Some(every));
    }

    /// One that was taken by a clock a year ahead stopped them for a year.
    #[test]
    fn a_snapshot_of_a_time_to_come_is_not_counted() {
        let now = UnixMillis::from_unix_seconds(1_800_000_000);
        let of = |at| Name { at, last_index: 1 };
        let (old, late) = (of(now - 7_200_000), of(now + 60_000));
        let year = of(now + 365 * 86_400_000);
        assert_eq!(by_now(vec![old, late, year], now), (vec![old, late], vec![year]));
        assert_eq!(by_now(vec![year], now), (vec![], vec![year]));
        assert_eq!(by_now(vec![], now), (vec![], vec![]));
    }
}
