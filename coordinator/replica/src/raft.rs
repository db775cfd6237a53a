//! The Raft library's types as this crate fills them in. Nothing of them leaves the crate.
//!
//! The runtime is the library's seeded one, in production too: every future that enters the library is
//! wrapped in [`Seed::scope`], with a seed from the operating system in production and from the test in
//! simulation. So both run the same code.

use openraft::{BasicNode, type_config::alias};
use openraft_rt::{AsyncRuntime, deterministic_rng::DeterministicRng};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::format::{Cursor, Fault, Fields};
use crate::machine::Machine;
use crate::runtime::Tokio;

openraft::declare_raft_types!(
    /// One log entry carries many commands.
    pub(crate) Types:
        D = Commands,
        R = Replies,
        NodeId = u64,
        Node = BasicNode,
        AsyncRuntime = SeededRuntime,
);

pub(crate) type SeededRuntime = DeterministicRng<Tokio>;
pub(crate) type Raft = openraft::Raft<Types, Machine>;
/// The library's handle, which is another one after a change of timing. Does not keep the replica open.
pub(crate) type CurrentRaft = tokio::sync::watch::Receiver<Raft>;
pub(crate) type LeaderId = alias::LeaderIdOf<Types>;
pub(crate) type RaftLogId = alias::LogIdOf<Types>;
pub(crate) type RaftEntry = alias::EntryOf<Types>;
pub(crate) type RaftVote = alias::VoteOf<Types>;
pub(crate) type RaftMembership = alias::StoredMembershipOf<Types>;
pub(crate) type RaftSnapshotMeta = alias::SnapshotMetaOf<Types>;

/// The commands of one log entry. Cheap to clone: replication and the log tail share them.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Commands {
    count: usize,
    /// All of them as a log entry holds them: each after its length.
    packed: Arc<[u8]>,
}

impl Commands {
    pub(crate) fn new<C: AsRef<[u8]>>(list: &[C]) -> Self {
        let mut fields = Fields::default();
        for command in list {
            fields.bytes(command.as_ref());
        }
        Self {
            count: list.len(),
            packed: fields.finish().into(),
        }
    }

    /// Takes `count` commands, and nothing else, from where [`Commands::packed`] was written.
    pub(crate) fn unpack(count: usize, cursor: &mut Cursor<'_>) -> Result<Self, Fault> {
        let packed = cursor.rest();
        for _ in 0..count {
            cursor.bytes()?;
        }
        let length = packed.len() - cursor.rest().len();
        Ok(Self {
            count,
            packed: packed[..length].into(),
        })
    }

    /// How many.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Their bytes, each after its length.
    pub(crate) fn packed(&self) -> &[u8] {
        &self.packed
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let mut cursor = Cursor::new(&self.packed);
        (0..self.count).map(move |_| cursor.bytes().expect("they were checked when they were packed"))
    }

    pub(crate) fn size_bytes(&self) -> usize {
        self.packed.len()
    }
}

// Commands may hold secrets: never print their content.
impl std::fmt::Debug for Commands {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} commands", self.count)
    }
}

impl std::fmt::Display for Commands {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} commands", self.count)
    }
}

impl Serialize for Commands {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.iter()
            .map(<[u8]>::to_vec)
            .collect::<Vec<_>>()
            .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Commands {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self::new(&Vec::<Vec<u8>>::deserialize(deserializer)?))
    }
}

/// One reply for each command of an entry, in order.
#[derive(Clone, Default, Serialize, Deserialize)]
pub(crate) struct Replies(pub(crate) Vec<Vec<u8>>);

impl std::fmt::Debug for Replies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} replies", self.0.len())
    }
}

/// Hands out seeds to the futures that enter the Raft library.
#[derive(Debug)]
pub(crate) struct Seed(AtomicU64);

impl Seed {
    pub(crate) fn new(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }

    /// Runs `future` where the library finds its random numbers. Tasks that it spawns inherit the scope.
    pub(crate) async fn scope<F: Future>(&self, future: F) -> F::Output {
        // An odd step visits all 2^64 seeds before it repeats one; the runtime mixes the bits.
        let seed = self.0.fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed);
        SeededRuntime::scope(seed, future).await
    }
}

/// Starts a task that inherits the scope of [`Seed`]. Call it only inside of one.
pub(crate) fn spawn<F>(future: F)
where
    F: Future<Output = ()> + Send + 'static,
{
    // The task ends by itself; nobody waits for its handle.
    drop(SeededRuntime::spawn(future));
}
