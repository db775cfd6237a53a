//! Who is who inside the cluster: an authority of our own, and certificates for hosts and members.
//!
//! Every host makes its own key, which never leaves it; a member signs a certificate for it (`authority.rs`).
//! A certificate's names say what its owner is: its server id, and its member id if it is one (`certificate.rs`).
//! The files lie in one folder of the host, with mode 0600:
//!
//! ```text
//! host.key   the host's private key        host.pem   its certificate
//! ca.pem     the authority's certificate   ca.key     the authority's key: between founding and the first
//!                                                     write of the founder, which seals it into the state
//! ```

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use sha2::{Digest, Sha256};

mod authority;
mod certificate;

pub use authority::{Authority, HostKey, LIFE_MS, Names, key_hash};
pub use certificate::{Bearer, Identity, JoinVerifier};

/// The name under which every coordinator member answers hosts.
pub const COORDINATOR_NAME: &str = "coordinator.chutes.internal";
/// File with the authority's certificate.
pub const CA_CERTIFICATE: &str = "ca.pem";
/// File with the authority's private key, on the founder only, until the state has it.
pub const CA_KEY: &str = "ca.key";
/// File with a host's certificate.
pub const HOST_CERTIFICATE: &str = "host.pem";
/// File with a host's private key.
pub const HOST_KEY: &str = "host.key";

/// Why a certificate cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file is missing or unreadable.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path} holds no usable {what}")]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What was expected.
        what: &'static str,
    },
    /// Something that is no file does not hold what it should.
    #[error("no usable {0}")]
    Unusable(&'static str),
    /// Certificates could not be made.
    #[error("make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// TLS refuses the certificate or its key.
    #[error("TLS: {0}")]
    Tls(String),
}

/// Result of this room.
pub type Result<T> = std::result::Result<T, IdentityError>;

fn tls_error(error: &dyn std::fmt::Display) -> IdentityError {
    IdentityError::Tls(error.to_string())
}

/// SHA-256 of a certificate's DER; none when the text is no certificate.
#[must_use]
pub fn fingerprint(certificate_pem: &str) -> Option<[u8; 32]> {
    let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes()).ok()?;
    Some(Sha256::digest(&certificate).into())
}

/// Reads a file of the identity.
///
/// # Errors
/// [`IdentityError::File`].
pub fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|source| IdentityError::File {
        path: path.to_owned(),
        source,
    })
}

/// Writes a file of mode 0600 so that a crash leaves the old one or the new one.
///
/// # Errors
/// [`IdentityError::File`].
pub fn write_secret(path: &Path, text: &str) -> Result<()> {
    let failed = |source| IdentityError::File {
        path: path.to_owned(),
        source,
    };
    let temporary = path.with_extension("new");
    let mut options = std::fs::OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(failed)?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(failed)?;
    std::fs::rename(&temporary, path).map_err(failed)?;
    // The new name is on the disk only when the folder is.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = std::fs::File::open(folder.unwrap_or(Path::new(".")));
    folder.and_then(|folder| folder.sync_all()).map_err(failed)
}
