//! The authority as members use it: its key is in the state, sealed, and opened only to sign.

use coordinator_core::state_machine::host::{Cluster, Rotation};
use protocol::time::UnixMillis;

use crate::identity::{Authority, IdentityError, fingerprint};
use crate::signer::{self, SealedKind, Sign};

/// Why the authority cannot sign.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The signer did not open or seal its key.
    #[error("the authority's key: {0}")]
    Signer(#[from] signer::Error),
    /// What the state holds is no certificate or no key.
    #[error("the authority's certificate or key is damaged")]
    Damaged,
    /// A certificate could not be made.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// Opens an authority that the state holds.
///
/// # Errors
/// [`Error`].
pub async fn open(signer: &dyn Sign, certificate_pem: String, sealed_key: &[u8]) -> Result<Authority, Error> {
    let key = signer.unseal(SealedKind::ClusterCaKey, sealed_key).await?;
    let key = String::from_utf8(key).map_err(|_| Error::Damaged)?;
    Ok(Authority::from_pem(certificate_pem, &key)?)
}

/// Makes the authority that comes after the cluster's.
///
/// # Errors
/// [`Error`].
pub async fn successor(signer: &dyn Sign, cluster: &Cluster, now: UnixMillis) -> Result<Rotation, Error> {
    let old = open(signer, cluster.authority_pem.clone(), &cluster.sealed_key).await?;
    let (new, key) = Authority::make()?;
    let hash = |authority: &Authority| fingerprint(authority.certificate_pem()).ok_or(Error::Damaged);
    Ok(Rotation {
        old: hash(&old)?,
        new: hash(&new)?,
        authority_pem: new.certificate_pem().to_owned(),
        bridge_pem: old.bridge_to(&new)?,
        sealed_key: signer.seal(SealedKind::ClusterCaKey, key.as_bytes()).await?,
        begun_at: now,
    })
}
