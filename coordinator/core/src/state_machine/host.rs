//! The cluster's members and hosts: who was invited, who has joined, who is out again.
//!
//! A host joins with an invitation that is good once. A host that is *eligible* (it has the miner's seed) becomes
//! a member of the coordinator under an id that nobody had before. Keys are known by their hashes: the SHA-256 of
//! the public key that a host's certificate is made for.

use protocol::id::ServerId;
use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};

/// The member that founds a cluster.
pub const FIRST_MEMBER: u64 = 1;

/// SHA-256 of a public key, or of an invitation's secret.
pub type KeyHash = [u8; 32];

/// The cluster as such. There is one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// Certificate of the authority that signs for hosts, as PEM.
    pub authority_pem: String,
    /// Its private key, sealed with a key that only holders of the miner's seed can derive.
    pub sealed_key: Vec<u8>,
    /// The id of the next member.
    pub next_member: u64,
    /// When it was founded.
    pub founded_at: UnixMillis,
}

/// The authority that takes the place of the cluster's, while hosts change over to it. There is one at most.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rotation {
    /// SHA-256 of the DER of the old authority's certificate.
    pub old: KeyHash,
    /// The same of the new one.
    pub new: KeyHash,
    /// The new authority's certificate, as PEM.
    pub authority_pem: String,
    /// The new authority's key in a certificate of the old one, as PEM: who knows only the old one follows it.
    pub bridge_pem: String,
    /// The new authority's private key, sealed.
    pub sealed_key: Vec<u8>,
    /// When it began.
    pub begun_at: UnixMillis,
}

/// Whether a member should vote.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Pin {
    /// As the leader decides.
    #[default]
    Auto,
    /// Before others.
    Voter,
    /// Never.
    Never,
}

impl Pin {
    /// The word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Voter => "voter",
            Self::Never => "never",
        }
    }

    /// What the word means.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Auto, Self::Voter, Self::Never]
            .into_iter()
            .find(|pin| pin.as_str() == word)
    }
}

/// A host as it introduces itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewHost {
    /// Its id.
    pub server: ServerId,
    /// Its name, for people.
    pub name: String,
    /// Provider or place; empty if it has none.
    pub site: String,
    /// `host:port` of its QUIC door, where members reach it if it becomes one.
    pub address: String,
    /// Of its public key.
    pub key_hash: KeyHash,
}

/// A host that was let in once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// As it introduced itself.
    pub host: NewHost,
    /// Its member id, if it is eligible. Never used again by another, nor by the same host after a removal.
    pub member: Option<u64>,
    /// What the operator wants.
    pub pin: Pin,
    /// When it joined.
    pub joined_at: UnixMillis,
    /// When it was removed; its certificate is worthless since.
    pub revoked_at: Option<UnixMillis>,
    /// Keys under which it was a host before; worthless too.
    pub former_keys: Vec<KeyHash>,
}

impl HostRecord {
    /// It belongs to us.
    #[must_use]
    pub fn is_in(&self) -> bool {
        self.revoked_at.is_none()
    }
}

/// Names an invitation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct InviteId(pub u128);

/// An invitation that was given out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invite {
    /// Of its secret, which only the invited knows.
    pub secret_hash: KeyHash,
    /// Not good afterwards.
    pub expires_at: UnixMillis,
    /// Whoever comes with it becomes a member: it must have the seed.
    pub eligible: bool,
    /// The host's site; as the host says where it is none.
    pub site: Option<String>,
    /// Who came with it, by the hash of the key: the same may ask again when the answer was lost.
    pub used_by: Option<KeyHash>,
}

/// What the state holds against a host that enters, or for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entered {
    /// Nothing.
    NotYet,
    /// It is in already, with this very key.
    Before {
        /// Its member id, if it is eligible.
        member: Option<u64>,
    },
    /// It is in already, with another key.
    OtherKey,
    /// Another host has its name.
    NameTaken(ServerId),
}

/// What is known of the owner of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing<'a> {
    /// Nothing: it may have joined at a member that is ahead of this one.
    Unknown,
    /// It belongs to us.
    In(&'a HostRecord),
    /// It was removed.
    Removed(&'a HostRecord),
}
