//! A host's place in the cluster, as it keeps it in its folder.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use coordinator_core::state_machine::host::FIRST_MEMBER;
use protocol::id::ServerId;
use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};

use crate::identity::{
    Authority, CA_CERTIFICATE, CA_KEY, HOST_CERTIFICATE, HostKey, IdentityError, LIFE_MS, Names, read_text,
    write_secret,
};

/// File with the admission.
pub const FILE: &str = "admission.json";

/// Taken by whoever changes the files here: a host's two processes both do.
const LOCK: &str = "admission.lock";

/// What the cluster has given to a host, besides its certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Admission {
    /// Id of the cluster: its name and a random end.
    pub cluster: String,
    /// The host's id.
    pub server: ServerId,
    /// Its member id, if it is eligible.
    pub member: Option<u64>,
    /// `host:port` of members' doors, as far as they were known when this was written.
    pub doors: Vec<String>,
    /// When its certificate ends.
    pub certificate_until: UnixMillis,
    /// Its store was opened under this member id once. If it is not there afterwards it was lost, and with it what
    /// this member had promised to others: it must not go on under this id.
    pub opened: bool,
}

impl Admission {
    /// True for a cluster that its founder has made, and that has never run.
    #[must_use]
    pub fn never_ran(&self, folder: &Path) -> bool {
        self.member == Some(FIRST_MEMBER) && !self.opened && folder.join(CA_KEY).exists()
    }

    /// Reads the admission of a folder; none if the host has not joined.
    ///
    /// # Errors
    /// [`IdentityError`] naming the file.
    pub fn read(folder: &Path) -> Result<Option<Self>, IdentityError> {
        let (path, what) = (folder.join(FILE), "admission to a cluster");
        if !path.exists() {
            return Ok(None);
        }
        let read = serde_json::from_str(&read_text(&path)?);
        read.map(Some)
            .map_err(|_| IdentityError::Malformed { path, what })
    }

    /// Keeps the members' doors in the folder of a host that has joined, for when the present ones are gone.
    ///
    /// # Errors
    /// [`IdentityError::File`].
    pub fn remember_doors(folder: &Path, doors: Vec<String>) -> Result<(), IdentityError> {
        let _lock = lock(folder)?;
        match Self::read(folder)? {
            Some(admission) if admission.doors != doors => Self { doors, ..admission }.put(folder),
            _ => Ok(()),
        }
    }

    /// Notes that the store of the member is in use.
    ///
    /// # Errors
    /// [`IdentityError`] naming the file.
    pub fn note_opened(folder: &Path) -> Result<(), IdentityError> {
        let _lock = lock(folder)?;
        match Self::read(folder)? {
            Some(admission) if !admission.opened => Self {
                opened: true,
                ..admission
            }
            .put(folder),
            _ => Ok(()),
        }
    }

    /// Writes it. Written last, it says that the other files are whole.
    ///
    /// # Errors
    /// [`IdentityError::File`].
    pub fn write(&self, folder: &Path) -> Result<(), IdentityError> {
        let _lock = lock(folder)?;
        self.put(folder)
    }

    /// With the lock taken.
    fn put(&self, folder: &Path) -> Result<(), IdentityError> {
        let text = serde_json::to_string_pretty(self).expect("texts and numbers");
        write_secret(&folder.join(FILE), &text)
    }
}

/// Keeps others from changing what lies in `folder` until it is dropped.
fn lock(folder: &Path) -> Result<File, IdentityError> {
    let path = folder.join(LOCK);
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).mode(0o600).open(&path);
    let locked = file.and_then(|file| file.lock().map(|()| file));
    locked.map_err(|source| IdentityError::File { path, source })
}

/// Founds a cluster of which this host is the first member: authority, certificate and admission, in its folder.
/// The cluster begins to exist when the member is started. None if the folder has an admission already.
///
/// # Errors
/// [`IdentityError`].
pub fn found(
    folder: &Path,
    name: &str,
    server: &ServerId,
    address: &str,
    now: UnixMillis,
) -> Result<Option<Admission>, IdentityError> {
    if Admission::read(folder)?.is_some() {
        return Ok(None);
    }
    let authority = Authority::found(folder)?;
    let key = HostKey::open_or_make(folder)?;
    let names = Names {
        server: server.clone(),
        member: Some(FIRST_MEMBER),
    };
    let certificate = authority.issue(&names, &key.public(), now)?;
    write_secret(&folder.join(HOST_CERTIFICATE), &certificate)?;
    let admission = Admission {
        cluster: format!("{name}-{:08x}", fastrand::u32(..)),
        server: server.clone(),
        member: Some(FIRST_MEMBER),
        doors: vec![address.to_owned()],
        certificate_until: now + LIFE_MS,
        opened: false,
    };
    admission.write(folder)?;
    Ok(Some(admission))
}

/// Throws away what a host that belongs to no cluster, or that founded one which never ran, has of it: all but its own
/// key. In this order, so that a crash in between leaves nothing that could be taken for whole.
///
/// # Errors
/// [`IdentityError::File`].
pub fn discard(folder: &Path) -> Result<(), IdentityError> {
    for name in [FILE, HOST_CERTIFICATE, CA_CERTIFICATE, CA_KEY] {
        let path = folder.join(name);
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(IdentityError::File { path, source });
            }
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// Keeps what a member answered: certificates first, the admission last. Who trusts a new authority has its
/// certificate already, also after a crash in between. A store that was in use under this member id stays so.
///
/// # Errors
/// [`IdentityError::File`].
pub fn keep(folder: &Path, granted: &super::wire::Granted) -> Result<(), IdentityError> {
    let _lock = lock(folder)?;
    let mut admission = granted.admission.clone();
    let is_same =
        |before: &Admission| (&before.cluster, before.member) == (&admission.cluster, admission.member);
    let before = Admission::read(folder)?.filter(is_same);
    admission.opened |= before.is_some_and(|before| before.opened);
    write_secret(&folder.join(HOST_CERTIFICATE), &granted.certificate_pem)?;
    write_secret(&folder.join(CA_CERTIFICATE), &granted.authority_pem)?;
    admission.put(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission() -> Admission {
        Admission {
            cluster: "test-1".to_owned(),
            server: ServerId::parse("host-2").expect("an id"),
            member: Some(2),
            doors: Vec::new(),
            certificate_until: UnixMillis(1),
            opened: false,
        }
    }

    /// Found in review: of two processes that changed the file at the same time one wrote back what it had read before, and
    /// a store that was lost afterwards began empty under the old member id.
    #[test]
    fn two_that_change_the_admission_lose_nothing_of_each_other() {
        const ROUNDS: usize = 200;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let folder = folder.path();
        admission().write(folder).expect("ours");
        let read = || Admission::read(folder).expect("whole").expect("it is there");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..ROUNDS {
                    let doors = vec![format!("host-{round}:4433")];
                    Admission::remember_doors(folder, doors).expect("ours");
                }
            });
            Admission::note_opened(folder).expect("ours");
            for _ in 0..ROUNDS {
                let mut now = read();
                assert!(now.opened, "it was noted");
                now.certificate_until = UnixMillis(2);
                now.write(folder).expect("ours");
            }
        });
        assert!(read().opened);
        Admission::note_opened(folder).expect("ours");
        let doors = vec!["host-1:4433".to_owned()];
        Admission::remember_doors(folder, doors.clone()).expect("ours");
        assert_eq!(read().doors, doors);
    }

    #[test]
    fn a_renewed_admission_says_that_the_store_was_opened_while_it_was_asked_for() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let folder = folder.path();
        admission().write(folder).expect("ours");
        let mut granted = super::super::wire::Granted {
            certificate_pem: String::new(),
            authority_pem: String::new(),
            admission: admission(),
        };
        Admission::note_opened(folder).expect("ours");
        keep(folder, &granted).expect("ours");
        let opened = || {
            Admission::read(folder)
                .expect("whole")
                .expect("it is there")
                .opened
        };
        assert!(opened());
        // Under another id the host begins anew.
        granted.admission.member = Some(3);
        keep(folder, &granted).expect("ours");
        assert!(!opened());
    }
}
