//! What is written down of a workload, so that the next agent finds it again.
//!
//! The order is the safety: `Starting` before a process exists, `Started` before that process may run the
//! chute (it waits at a gate, see [`super::start`]), `Ended` before that is reported. The launch token is
//! never written here.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

use protocol::id::GpuId;
use protocol::workload::PortMapping;
use serde::{Deserialize, Serialize};

use super::table::Identity;

const FILE: &str = "record.json";
const VERSION: u32 = 1;

/// A workload on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    version: u32,
    /// GPUs that it was given.
    pub(crate) gpus: Vec<GpuId>,
    /// Address that its ports are bound to.
    pub(crate) host: String,
    /// Its ports.
    pub(crate) ports: Vec<PortMapping>,
    /// External port of its health check.
    pub(crate) health_port: u16,
    /// How far it is.
    pub(crate) state: State,
}

/// How far a workload is, on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    /// No process, or one that waits at the gate and ends with its agent.
    Starting,
    /// A process that runs the chute, or will as soon as it passes the gate.
    Started {
        /// Leader of its process group.
        leader: Identity,
        /// The boot that the identity is valid in.
        boot_id: String,
    },
    /// It ended by itself, or could not start.
    Ended {
        /// Exit code, when it is known.
        exit_code: Option<i32>,
        /// One line for a person.
        reason: String,
    },
}

impl Record {
    /// A workload that is about to start.
    pub(crate) fn starting(
        gpus: Vec<GpuId>,
        host: String,
        ports: Vec<PortMapping>,
        health_port: u16,
    ) -> Self {
        Self {
            version: VERSION,
            gpus,
            host,
            ports,
            health_port,
            state: State::Starting,
        }
    }

    /// Writes it durably: after a crash there is the old record or the new one.
    pub(crate) fn save(&self, folder: &Path) -> io::Result<()> {
        let temporary = folder.join(".record.json.new");
        let mut file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        file.sync_all()?;
        std::fs::rename(&temporary, folder.join(FILE))?;
        File::open(folder)?.sync_all()
    }

    /// Reads it back; nothing when the folder has none.
    pub(crate) fn load(folder: &Path) -> io::Result<Option<Self>> {
        let bytes = match std::fs::read(folder.join(FILE)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let record: Self = serde_json::from_slice(&bytes)?;
        if record.version != VERSION {
            let text = format!("version {} of a record is not known", record.version);
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(Some(record))
    }
}

/// Makes a folder, and those above it, that only we may enter.
pub(crate) fn make_folder(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_back_and_a_foreign_one_refused() {
        let folder = tempfile::tempdir().expect("temporary folders can be made");
        assert_eq!(Record::load(folder.path()).expect("absent is fine"), None);
        let mut record = Record::starting(Vec::new(), "127.0.0.1".to_owned(), Vec::new(), 31001);
        record.state = State::Started {
            leader: Identity {
                pid: 1,
                start_ticks: 2,
            },
            boot_id: "boot".to_owned(),
        };
        record.save(folder.path()).expect("writable");
        assert_eq!(
            Record::load(folder.path()).expect("readable"),
            Some(record.clone())
        );
        record.version = 2;
        record.save(folder.path()).expect("writable");
        assert!(Record::load(folder.path()).is_err());
        std::fs::write(folder.path().join(FILE), "{").expect("writable");
        assert!(Record::load(folder.path()).is_err());
    }
}
