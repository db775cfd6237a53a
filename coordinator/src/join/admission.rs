//! A host's place in the cluster, as it keeps it in its folder.

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
        match Self::read(folder)? {
            Some(admission) if admission.doors != doors => Self { doors, ..admission }.write(folder),
            _ => Ok(()),
        }
    }

    /// Writes it. Written last, it says that the other files are whole.
    ///
    /// # Errors
    /// [`IdentityError::File`].
    pub fn write(&self, folder: &Path) -> Result<(), IdentityError> {
        let text = serde_json::to_string_pretty(self).expect("texts and numbers");
        write_secret(&folder.join(FILE), &text)
    }
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
/// certificate already, also after a crash in between.
///
/// # Errors
/// [`IdentityError::File`].
pub fn keep(folder: &Path, granted: &super::wire::Granted) -> Result<(), IdentityError> {
    write_secret(&folder.join(HOST_CERTIFICATE), &granted.certificate_pem)?;
    write_secret(&folder.join(CA_CERTIFICATE), &granted.authority_pem)?;
    granted.admission.write(folder)
}
