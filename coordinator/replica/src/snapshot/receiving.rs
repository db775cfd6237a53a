//! Takes a snapshot from the leader, piece by piece, into a file without a name (memory in simulation), and
//! installs it once it is complete and its checksum holds. One at a time.

use openraft::storage::Snapshot;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, watch};
use tokio::time::timeout;

use super::{Place, SnapshotData, verify};
use crate::raft::{Raft, RaftLogId, RaftSnapshotMeta, RaftVote, Seed, spawn};
use crate::storage::{Writer, private_file};
use crate::wire::{Answer, Ballot, CHUNK_BYTES, Chunk, SnapshotName};

/// A leader that announces more than this is refused.
const SIZE_BYTES_MAX: u64 = 64 * 1024 * 1024 * 1024;
/// How long a question for the end of the installation is kept waiting before the answer is "not yet".
const ANSWER_WITHIN: Duration = Duration::from_secs(3);

/// Where the bytes of an incomplete snapshot are.
#[derive(Debug)]
enum Partial {
    File(Arc<File>),
    Memory(Vec<u8>),
}

type Outcome = Option<Result<RaftVote, String>>;

/// How far a snapshot has come.
#[derive(Debug, Default)]
enum Progress {
    #[default]
    Nothing,
    Arriving {
        name: SnapshotName,
        partial: Partial,
        size_bytes: u64,
    },
    Installing {
        name: SnapshotName,
        outcome: watch::Receiver<Outcome>,
    },
}

impl Progress {
    /// How the installation of this snapshot ends, if it has begun.
    ///
    /// # Errors
    /// While another one is installed.
    fn installing(&self, name: SnapshotName) -> io::Result<Option<watch::Receiver<Outcome>>> {
        let Self::Installing { name: other, outcome } = self else {
            return Ok(None);
        };
        if *other == name {
            return Ok(Some(outcome.clone()));
        }
        // A task that panicked is gone and has said nothing.
        let goes_on = outcome.borrow().is_none() && outcome.has_changed().is_ok();
        if goes_on {
            return Err(invalid("another snapshot is being installed"));
        }
        Ok(None)
    }
}

/// The receiver of one member.
#[derive(Debug)]
pub(crate) struct Receiver {
    cluster: String,
    place: Place,
    writer: Writer,
    progress: Mutex<Progress>,
}

impl Receiver {
    pub(crate) fn new(cluster: String, place: Place, writer: Writer) -> Self {
        Self {
            cluster,
            place,
            writer,
            progress: Mutex::default(),
        }
    }

    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    /// Takes a piece. The caller has made sure that it comes from the current leader.
    pub(crate) async fn take(&self, raft: &Raft, seed: &Seed, chunk: Chunk) -> io::Result<Answer> {
        let name = chunk.name;
        if chunk.bytes.0.len() > CHUNK_BYTES || name.size_bytes > SIZE_BYTES_MAX || name.size_bytes == 0 {
            return Err(invalid("a piece, or a snapshot, of a size that is not allowed"));
        }
        let mut progress = self.progress.lock().await;
        let installing = progress.installing(name)?;
        if let Some(mut outcome) = installing {
            drop(progress);
            return self.installed(name, &mut outcome).await;
        }
        if !matches!(&*progress, Progress::Arriving { name: other, .. } if *other == name) {
            *progress = Progress::Arriving {
                name,
                partial: self.partial().await?,
                size_bytes: 0,
            };
        }
        let Progress::Arriving {
            partial, size_bytes, ..
        } = &mut *progress
        else {
            return Err(io::Error::other("the snapshot was just begun"));
        };
        let bytes = chunk.bytes.0;
        if chunk.offset != *size_bytes || bytes.is_empty() {
            return Ok(Answer::SnapshotAt { offset: *size_bytes });
        }
        let end = *size_bytes + bytes.len() as u64;
        if end > name.size_bytes {
            return Err(invalid("a piece beyond the end of the snapshot"));
        }
        self.write(partial, *size_bytes, bytes).await?;
        *size_bytes = end;
        if end < name.size_bytes {
            return Ok(Answer::SnapshotAt { offset: end });
        }
        let data = match std::mem::take(&mut *progress) {
            Progress::Arriving { partial, .. } => match partial {
                Partial::File(file) => SnapshotData::File(file),
                Partial::Memory(bytes) => SnapshotData::Memory(Arc::new(bytes)),
            },
            _ => return Err(io::Error::other("the snapshot was just completed")),
        };
        let meta = self.check(&data, name).await?;
        let (out, mut outcome) = watch::channel(None);
        *progress = Progress::Installing {
            name,
            outcome: outcome.clone(),
        };
        drop(progress);
        let (raft, vote) = (raft.clone(), RaftVote::from(chunk.ballot));
        let install = async move {
            let snapshot = Snapshot { meta, snapshot: data };
            let installed = raft.install_full_snapshot(vote, snapshot).await;
            let installed = installed
                .map(|response| response.vote)
                .map_err(|fatal| fatal.to_string());
            // An error means that nobody asks any more.
            let _ = out.send(Some(installed));
        };
        // A task of its own: it goes on when the leader gives up the call that completed the snapshot.
        seed.scope(async { spawn(install) }).await;
        self.installed(name, &mut outcome).await
    }

    async fn installed(
        &self,
        name: SnapshotName,
        outcome: &mut watch::Receiver<Outcome>,
    ) -> io::Result<Answer> {
        let waited = timeout(ANSWER_WITHIN, outcome.wait_for(Option::is_some)).await;
        // The guard of the channel must not live across the lock below.
        let installed = waited.map(|installed| installed.map_or(None, |installed| installed.clone()));
        let Ok(installed) = installed else {
            return Ok(Answer::SnapshotAt {
                offset: name.size_bytes,
            });
        };
        match installed {
            Some(Ok(vote)) => Ok(Answer::SnapshotInstalled {
                ballot: Ballot::from(&vote),
            }),
            failed => {
                let mut progress = self.progress.lock().await;
                // Another one may have begun to arrive meanwhile.
                if let Ok(Some(_)) = progress.installing(name) {
                    *progress = Progress::Nothing;
                }
                let reason = failed.and_then(Result::err);
                let reason = reason.unwrap_or_else(|| "the installation ended early".to_owned());
                Err(io::Error::other(reason))
            }
        }
    }

    async fn partial(&self) -> io::Result<Partial> {
        let Place::Directory(directory) = &self.place else {
            return Ok(Partial::Memory(Vec::new()));
        };
        let path = directory.join("received.tmp");
        let opened = self.writer.blocking(move || -> io::Result<File> {
            let file = private_file()
                .read(true)
                .create(true)
                .truncate(true)
                .open(&path)?;
            // Without a name it is gone with its last handle, also after a crash.
            std::fs::remove_file(&path)?;
            Ok(file)
        });
        Ok(Partial::File(Arc::new(opened.await??)))
    }

    async fn write(&self, partial: &mut Partial, offset: u64, bytes: Vec<u8>) -> io::Result<()> {
        match partial {
            Partial::Memory(memory) => {
                memory.extend_from_slice(&bytes);
                Ok(())
            }
            Partial::File(file) => {
                let file = file.clone();
                self.writer
                    .blocking(move || file.write_all_at(&bytes, offset))
                    .await?
            }
        }
    }

    /// The Raft library takes a snapshot that cannot be installed for a broken disk: look before.
    async fn check(&self, data: &SnapshotData, name: SnapshotName) -> io::Result<RaftSnapshotMeta> {
        let (checked, cluster) = (data.clone(), self.cluster.clone());
        let header = self.writer.blocking(move || verify(&checked)).await??;
        let meta = header.meta();
        if header.cluster != cluster || meta.last_log_id != name.last.map(RaftLogId::from) {
            return Err(invalid("the snapshot is not the one announced"));
        }
        Ok(meta)
    }
}

fn invalid(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_installation_that_ended_without_a_word_is_in_nobodys_way() {
        let name = |size_bytes| SnapshotName {
            last: None,
            size_bytes,
            crc: 1,
        };
        let (task, outcome) = watch::channel(None);
        let progress = Progress::Installing {
            name: name(1),
            outcome,
        };
        assert!(matches!(progress.installing(name(1)), Ok(Some(_))));
        assert!(progress.installing(name(2)).is_err(), "one at a time");
        drop(task);
        assert!(matches!(progress.installing(name(2)), Ok(None)));
    }
}
