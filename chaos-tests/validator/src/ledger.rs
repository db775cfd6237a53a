//! The ledger: an append-only record of everything that was published, granted and refused, one JSON object
//! a line. It survives `kill -9`; a line that was cut by one is dropped at the next start.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, ConfigId, GpuId, InstanceId, JobId};
use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};

use crate::event::Event;

/// Entries that are kept in memory; older ones are in the file only.
pub const ENTRIES_IN_MEMORY_MAX: usize = 100_000;

/// One line of the ledger.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Counts from 1 without gaps.
    pub id: u64,
    /// When.
    pub at: UnixMillis,
    /// What.
    #[serde(flatten)]
    pub record: Record,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[expect(
    missing_docs,
    reason = "the members are the ids and texts that their names say"
)]
pub enum Record {
    /// The stand-in began to serve.
    Started { scenario: String, hotkey: Hotkey },
    /// An event was published, or would have been but for a planted fault.
    EventPublished {
        event: Event,
        /// Sockets that it was sent to at once.
        sent_to: usize,
        /// The planted fault, if any.
        fault: Option<String>,
    },
    /// A socket authenticated.
    SocketAuthenticated { session: u64, hotkey: Hotkey },
    /// An authentication was refused.
    SocketRefused { session: u64, reason: String },
    /// A socket ended.
    SocketClosed {
        session: u64,
        hotkey: Option<Hotkey>,
        reason: String,
    },
    /// GPUs were announced.
    NodesAnnounced {
        hotkey: Hotkey,
        uuids: Vec<GpuId>,
        task: String,
    },
    /// An announcement was refused.
    NodesRefused {
        hotkey: Hotkey,
        status: u16,
        reason: String,
    },
    /// GPUs were proved.
    NodesVerified {
        hotkey: Hotkey,
        uuids: Vec<GpuId>,
        elapsed_ms: u64,
    },
    /// A proof failed.
    NodesFailed {
        hotkey: Hotkey,
        uuids: Vec<GpuId>,
        reason: String,
    },
    /// A GPU was deleted.
    NodeDeleted { hotkey: Hotkey, uuid: GpuId },
    /// A sealed worker was announced, and taken.
    ServerAdded {
        hotkey: Hotkey,
        server: String,
        uuids: Vec<GpuId>,
    },
    /// A sealed worker was deleted.
    ServerDeleted { hotkey: Hotkey, server: String },
    /// A launch token was issued.
    TokenGranted {
        hotkey: Hotkey,
        chute: ChuteId,
        config: ConfigId,
        job: Option<JobId>,
    },
    /// A launch token was refused.
    TokenRefused {
        hotkey: Hotkey,
        chute: String,
        status: u16,
        reason: String,
    },
    /// A container claimed its launch config.
    ClaimGranted {
        hotkey: Hotkey,
        chute: ChuteId,
        config: ConfigId,
        instance: InstanceId,
        gpus: Vec<GpuId>,
        host: String,
        port: u16,
    },
    /// A claim was refused.
    ClaimRefused {
        config: String,
        status: u16,
        reason: String,
    },
    /// An instance announced itself in the legacy flow.
    LegacyAnnounced {
        hotkey: Hotkey,
        chute: ChuteId,
        instance: InstanceId,
        gpus: Vec<GpuId>,
    },
    /// An instance was verified.
    InstanceVerified { instance: InstanceId, chute: ChuteId },
    /// A verification was refused.
    VerificationRefused {
        config: String,
        status: u16,
        reason: String,
    },
    /// An instance was activated.
    InstanceActivated {
        instance: InstanceId,
        chute: ChuteId,
        bounty: Option<u64>,
    },
    /// An activation was refused.
    ActivationRefused {
        config: String,
        status: u16,
        reason: String,
    },
    /// An instance ended.
    InstanceDeleted {
        instance: InstanceId,
        chute: ChuteId,
        by: DeletedBy,
        reason: String,
    },
    /// A job was offered.
    JobOffered { job: JobId, chute: ChuteId },
    /// A job was claimed by an instance.
    JobClaimed { job: JobId, instance: InstanceId },
    /// A miner gave a job back.
    JobReleased { job: JobId, hotkey: Hotkey },
    /// A job ended.
    JobFinished { job: JobId, status: String },
    /// A bounty was opened.
    BountyOpened { chute: ChuteId },
    /// The registry answered.
    RegistryRequest {
        hotkey: Option<Hotkey>,
        method: String,
        path: String,
        status: u16,
        bytes: u64,
    },
    /// A chute told which sites it reached.
    EgressObserved {
        config: Option<ConfigId>,
        site: String,
        should_reach: bool,
        reached: bool,
        detail: String,
    },
    /// A planted fault hit a request.
    FaultInjected {
        method: String,
        path: String,
        fault: String,
    },
}

/// Who ended an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeletedBy {
    /// By its miner.
    Miner,
    /// By the validator.
    Validator,
    /// The job was done.
    JobDone,
    /// Its chute was deleted.
    Cascade,
}

/// The open ledger.
#[derive(Debug)]
pub(crate) struct Ledger {
    file: File,
    entries: VecDeque<Entry>,
    next: u64,
}

impl Ledger {
    /// Opens or begins a ledger.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)?;
        let mut entries = VecDeque::new();
        let (mut good_bytes, mut next) = (0_u64, 1);
        let mut reader = BufReader::new(&mut file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let length = reader.read_until(b'\n', &mut line)?;
            let whole = line.ends_with(b"\n");
            match serde_json::from_slice::<Entry>(&line) {
                Ok(entry) if whole => {
                    next = entry.id + 1;
                    push(&mut entries, entry);
                    good_bytes += length as u64;
                }
                _ if length == 0 || !whole => break,
                Ok(_) => break,
                Err(error) => {
                    let text = format!("{} line {next}: {error}", path.display());
                    return Err(io::Error::new(io::ErrorKind::InvalidData, text));
                }
            }
        }
        file.set_len(good_bytes)?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self { file, entries, next })
    }

    /// Appends; the line is with the operating system when this returns.
    pub(crate) fn append(&mut self, at: UnixMillis, record: Record) -> u64 {
        let id = self.next;
        self.next += 1;
        let entry = Entry { id, at, record };
        let mut line = serde_json::to_vec(&entry).expect("entries are plain data");
        line.push(b'\n');
        if let Err(error) = self.file.write_all(&line) {
            tracing::error!(%error, "the ledger cannot be written: entry {id} is in memory only");
        }
        push(&mut self.entries, entry);
        id
    }

    /// Entries after `after`, at most `limit`.
    pub(crate) fn after(&self, after: u64, limit: usize) -> Vec<Entry> {
        self.entries
            .iter()
            .filter(|entry| entry.id > after)
            .take(limit)
            .cloned()
            .collect()
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }
}

fn push(entries: &mut VecDeque<Entry>, entry: Entry) {
    if entries.len() == ENTRIES_IN_MEMORY_MAX {
        entries.pop_front();
    }
    entries.push_back(entry);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(path: &str) -> Record {
        Record::FaultInjected {
            method: "GET".to_owned(),
            path: path.to_owned(),
            fault: "empty".to_owned(),
        }
    }

    #[test]
    fn a_cut_line_is_dropped_and_counting_goes_on() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("ledger.jsonl");
        let at = UnixMillis(5);
        let mut ledger = Ledger::open(&path).expect("new");
        assert_eq!(
            (ledger.append(at, record("/a")), ledger.append(at, record("/b"))),
            (1, 2)
        );
        drop(ledger);
        let whole = std::fs::read(&path).expect("written");
        std::fs::write(&path, &whole[..whole.len() - 3]).expect("cut");
        let mut ledger = Ledger::open(&path).expect("a cut line is no error");
        assert_eq!(ledger.all().count(), 1);
        assert_eq!(ledger.append(at, record("/c")), 2);
        let again = Ledger::open(&path).expect("still readable");
        assert_eq!(again.after(1, 10), ledger.after(1, 10));
        std::fs::write(&path, b"nonsense\n").expect("spoilt");
        assert!(Ledger::open(&path).is_err());
    }
}
