//! Everything that our hotkey signs or seals, behind one seam.
//!
//! The seed lives in one process without network. The rest of the system asks it, over a datagram socket,
//! for signatures over the *enumerated* kinds of message below and for nothing else; that process uses its
//! own clock, so a caller cannot have a message of another day signed. The same key material seals secrets
//! that the replicated state must carry.
//!
//! - `key.rs`: the seed, signing and sealing; used by the signer process and by [`LocalSigner`];
//! - `wire.rs`: the datagrams between the two processes;
//! - `client.rs`: [`SignerClient`], the asking side.

use std::fmt;
use std::sync::Arc;

use futures_util::future::{BoxFuture, FutureExt, ready};
use protocol::hotkey::Hotkey;
use protocol::signing::{Headers, Purpose};
use serde::{Deserialize, Serialize};

use crate::clock::Clock;

mod client;
pub mod key;
pub mod wire;

pub use client::{Patience, SignerClient};
pub use key::{Key, Seed};
pub use protocol::sealing::SealedKind;

/// A route whose signature covers the request's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum BodyRoute {
    /// `POST /nodes/`: GPUs are advertised.
    AdvertiseNodes,
    /// `POST /instances/{chute_id}/`: an instance is announced (before 0.3.0).
    AnnounceInstance,
    /// `PATCH /instances/{chute_id}/{instance_id}`: an instance is activated (before 0.3.0).
    ActivateInstance,
    /// `POST /audit/miner_data`.
    UploadAudit,
    /// `POST /servers/`: a sealed worker is announced.
    AddServer,
}

/// Every kind of message that a miner signs (`validator-protocol`, section 1.6). What is not listed is not
/// signed. The order is part of the wire format between processes: append only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum MessageKind {
    /// Websocket `authenticate`.
    SocketAuth,
    /// Headers of registry requests.
    Registry,
    /// Reads of `/miner/*`.
    MinerRead,
    /// `DELETE /miner/jobs/{job_id}`; the same words as a read, counted apart.
    ReleaseJob,
    /// `GET /instances/launch_config`.
    LaunchConfig,
    /// `DELETE /instances/{chute_id}/{instance_id}`.
    DeleteInstance,
    /// `DELETE /nodes/{uuid}`.
    DeleteNode,
    /// `GET /nodes/verification_status`.
    VerificationStatus,
    /// `GET /devices` of our own GPU proof API, signed by the miner for itself.
    OwnDevices,
    /// A request with a body.
    Body {
        /// The route it goes to.
        route: BodyRoute,
        /// SHA-256 of the exact body.
        sha256: [u8; 32],
    },
    /// `DELETE /servers/{id}`.
    DeleteServer,
    /// `GET /server/devices` of a sealed worker's attestation service.
    AttestedDevices,
}

/// How many rows [`MessageKind::row`] distinguishes.
pub const MESSAGE_KIND_ROWS: usize = 16;

impl MessageKind {
    /// The name in counts and logs.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::SocketAuth => "socket_auth",
            Self::Registry => "registry",
            Self::MinerRead => "miner_read",
            Self::ReleaseJob => "release_job",
            Self::LaunchConfig => "launch_config",
            Self::DeleteInstance => "delete_instance",
            Self::DeleteNode => "delete_node",
            Self::VerificationStatus => "verification_status",
            Self::OwnDevices => "own_devices",
            Self::Body { route, .. } => match route {
                BodyRoute::AdvertiseNodes => "advertise_nodes",
                BodyRoute::AnnounceInstance => "announce_instance",
                BodyRoute::ActivateInstance => "activate_instance",
                BodyRoute::UploadAudit => "upload_audit",
                BodyRoute::AddServer => "add_server",
            },
            Self::DeleteServer => "delete_server",
            Self::AttestedDevices => "attested_devices",
        }
    }

    /// Row of a table with one row for each kind.
    #[must_use]
    pub fn row(&self) -> usize {
        match self {
            Self::SocketAuth => 0,
            Self::Registry => 1,
            Self::MinerRead => 2,
            Self::ReleaseJob => 3,
            Self::LaunchConfig => 4,
            Self::DeleteInstance => 5,
            Self::DeleteNode => 6,
            Self::VerificationStatus => 7,
            Self::OwnDevices => 8,
            Self::Body { route, .. } => match route {
                BodyRoute::AdvertiseNodes => 9,
                BodyRoute::AnnounceInstance => 10,
                BodyRoute::ActivateInstance => 11,
                BodyRoute::UploadAudit => 12,
                BodyRoute::AddServer => 13,
            },
            Self::DeleteServer => 14,
            Self::AttestedDevices => 15,
        }
    }

    /// The end of the signed string: a purpose or the hexadecimal hash of the body.
    fn tail(&self) -> String {
        let purpose = match self {
            Self::SocketAuth => Purpose::Sockets,
            Self::Registry => Purpose::Registry,
            Self::MinerRead | Self::ReleaseJob => Purpose::Miner,
            Self::LaunchConfig => Purpose::Launch,
            Self::DeleteInstance => Purpose::Instances,
            Self::DeleteNode => Purpose::Nodes,
            Self::VerificationStatus | Self::OwnDevices => Purpose::Graval,
            Self::DeleteServer => Purpose::Tee,
            Self::AttestedDevices => Purpose::Attest,
            Self::Body { sha256, .. } => return hex::encode(sha256),
        };
        purpose.as_str().to_owned()
    }
}

/// The longest plain text that can be sealed, in bytes: a request must fit into one datagram.
pub const PLAINTEXT_BYTES_MAX: usize = 48 * 1024;

/// Why nothing was signed, sealed or opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The signer does not sign this.
    #[error("the signer refused: {0}")]
    Refused(String),
    /// More of this kind was asked for than the signer's limit allows.
    #[error("the signer's limit for {0} is reached")]
    Limited(String),
    /// The signer gave no answer in time.
    #[error("the signer does not answer ({0})")]
    Unavailable(String),
    /// The answer makes no sense.
    #[error("the signer's answer is malformed")]
    Malformed,
    /// The sealed bytes are cut, altered, of another kind, of another seed or of a newer version.
    #[error("the sealed value does not open as {0}")]
    NotOpened(&'static str),
    /// The plain text is longer than [`PLAINTEXT_BYTES_MAX`].
    #[error("{0} bytes cannot be sealed, at most {PLAINTEXT_BYTES_MAX} can")]
    TooLong(usize),
}

impl Error {
    /// True if the same request may succeed later.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Limited(_) | Self::Unavailable(_))
    }
}

/// Result of the signer.
pub type Result<T> = std::result::Result<T, Error>;

/// The seam behind which the seed is.
pub trait Sign: fmt::Debug + Send + Sync {
    /// The address that signs.
    fn hotkey(&self) -> &Hotkey;

    /// Headers of a request to a validator ([`MessageKind::OwnDevices`]: to our own GPU proof API).
    fn to_validator(&self, kind: MessageKind) -> BoxFuture<'_, Result<Headers>>;

    /// Seals a secret: only holders of the seed can open it.
    fn seal<'a>(&'a self, kind: SealedKind, plaintext: &'a [u8]) -> BoxFuture<'a, Result<Vec<u8>>>;

    /// Opens what [`Sign::seal`] made, with any version of this program.
    fn unseal<'a>(&'a self, kind: SealedKind, sealed: &'a [u8]) -> BoxFuture<'a, Result<Vec<u8>>>;
}

/// A signer in this process: for tests, the simulation and tools that the operator hands the seed to.
#[derive(Debug)]
pub struct LocalSigner {
    key: Key,
    clock: Arc<dyn Clock>,
}

impl LocalSigner {
    /// Signs with `key`, at the times of `clock`.
    #[must_use]
    pub fn new(key: Key, clock: Arc<dyn Clock>) -> Self {
        Self { key, clock }
    }
}

impl Sign for LocalSigner {
    fn hotkey(&self) -> &Hotkey {
        self.key.hotkey()
    }

    fn to_validator(&self, kind: MessageKind) -> BoxFuture<'_, Result<Headers>> {
        let signed = self.key.sign(&kind, self.clock.now());
        ready(Ok(signed.headers(&kind, self.key.hotkey()))).boxed()
    }

    fn seal<'a>(&'a self, kind: SealedKind, plaintext: &'a [u8]) -> BoxFuture<'a, Result<Vec<u8>>> {
        ready(self.key.seal(kind, plaintext)).boxed()
    }

    fn unseal<'a>(&'a self, kind: SealedKind, sealed: &'a [u8]) -> BoxFuture<'a, Result<Vec<u8>>> {
        ready(self.key.unseal(kind, sealed)).boxed()
    }
}
