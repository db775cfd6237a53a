//! What members say to each other: versioned bytes of our own, not those of the Raft library.
//!
//! ```text
//! request:  version (1) | postcard of (cluster, receiver, Request)
//! answer:   version (1) | postcard of Answer
//! ```
//!
//! New requests and answers are appended to the enums; a change of meaning is a new version. Log entries
//! travel as they are stored (see `format`), with their checksum. Everything that arrives is bounded by
//! [`MESSAGE_BYTES_MAX`] and by its own length, so that nonsense costs an error and no memory.

use openraft::raft::TransferLeaderRequest;
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, VoteRequest, VoteResponse};
use openraft::{LogId, Vote};
use serde::{Deserialize, Serialize};
use std::fmt;

use crate::error::ProposeError;
use crate::format::{Crc, Fault, decode_entry, encode_entry};
use crate::raft::{LeaderId, RaftLogId, RaftVote, Types};

/// Largest request and largest answer. An entry has at most 4 MiB of commands.
pub const MESSAGE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Bytes of a snapshot in one request.
pub(crate) const CHUNK_BYTES: usize = 1024 * 1024;
/// Bytes of log entries in one append, unless a single entry is larger.
pub(crate) const APPEND_BYTES: usize = 1024 * 1024;

/// No log gets this long; keeps nonsense out of arithmetic.
const INDEX_MAX: u64 = 1 << 62;
const VERSION: u8 = 1;

/// Bytes that postcard copies as a whole.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Bytes(pub(crate) Vec<u8>);

// May hold secrets: never print the content.
impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Serialize for Bytes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Bytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Bytes, E> {
                Ok(Bytes(bytes.to_vec()))
            }
        }
        deserializer.deserialize_bytes(Visitor)
    }
}

/// Elements of a list in one message: each costs memory even when it is empty.
const LIST_MAX: usize = 1 << 16;

/// Reads a list of bounded length.
fn bounded<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<Bytes>, D::Error> {
    struct Visitor;
    impl<'de> serde::de::Visitor<'de> for Visitor {
        type Value = Vec<Bytes>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "up to {LIST_MAX} elements")
        }

        fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut elements: A) -> Result<Vec<Bytes>, A::Error> {
            let mut list = Vec::new();
            while let Some(element) = elements.next_element()? {
                if list.len() == LIST_MAX {
                    return Err(serde::de::Error::invalid_length(LIST_MAX + 1, &self));
                }
                list.push(element);
            }
            Ok(list)
        }
    }
    deserializer.deserialize_seq(Visitor)
}

/// Who stands for, or holds, which term.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ballot {
    pub(crate) term: u64,
    pub(crate) member: u64,
    pub(crate) committed: bool,
}

impl From<&RaftVote> for Ballot {
    fn from(vote: &RaftVote) -> Self {
        Self {
            term: vote.leader_id.term,
            member: vote.leader_id.node_id,
            committed: vote.committed,
        }
    }
}

impl From<Ballot> for RaftVote {
    fn from(ballot: Ballot) -> Self {
        let leader_id = LeaderId {
            term: ballot.term,
            node_id: ballot.member,
        };
        Vote {
            leader_id,
            committed: ballot.committed,
        }
    }
}

/// A place in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Position {
    pub(crate) term: u64,
    pub(crate) member: u64,
    pub(crate) index: u64,
}

impl From<&RaftLogId> for Position {
    fn from(id: &RaftLogId) -> Self {
        Self {
            term: id.leader_id.term,
            member: id.leader_id.node_id,
            index: id.index,
        }
    }
}

impl From<Position> for RaftLogId {
    fn from(position: Position) -> Self {
        let leader_id = LeaderId {
            term: position.term,
            node_id: position.member,
        };
        LogId {
            leader_id,
            index: position.index,
        }
    }
}

pub(crate) fn position(id: Option<&RaftLogId>) -> Option<Position> {
    id.map(Position::from)
}

/// Log entries after `previous`, none for a heartbeat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Append {
    pub(crate) ballot: Ballot,
    pub(crate) previous: Option<Position>,
    pub(crate) committed: Option<Position>,
    #[serde(deserialize_with = "bounded")]
    pub(crate) entries: Vec<Bytes>,
}

impl Append {
    pub(crate) fn of(rpc: &AppendEntriesRequest<Types>) -> Self {
        Self {
            ballot: Ballot::from(&rpc.vote),
            previous: position(rpc.prev_log_id.as_ref()),
            committed: position(rpc.leader_commit.as_ref()),
            entries: rpc
                .entries
                .iter()
                .map(|entry| Bytes(encode_entry(entry)))
                .collect(),
        }
    }

    pub(crate) fn into_rpc(self) -> Result<AppendEntriesRequest<Types>, Fault> {
        let mut entries = Vec::new();
        let first = match self.previous {
            None => 0,
            Some(position) if position.index < INDEX_MAX => position.index + 1,
            Some(_) => return Err(Fault::Damaged("a log of that length cannot be")),
        };
        for (index, sealed) in (first..).zip(&self.entries) {
            let entry = decode_entry(&sealed.0)?;
            if entry.log_id.index != index {
                return Err(Fault::Damaged("log entries are not consecutive"));
            }
            entries.push(entry);
        }
        Ok(AppendEntriesRequest {
            vote: self.ballot.into(),
            prev_log_id: self.previous.map(RaftLogId::from),
            entries,
            leader_commit: self.committed.map(RaftLogId::from),
        })
    }
}

/// A member that stands for election, or asks whether it would be of any use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Candidacy {
    pub(crate) ballot: Ballot,
    pub(crate) last: Option<Position>,
    pub(crate) transfer: bool,
}

impl Candidacy {
    pub(crate) fn of(rpc: &VoteRequest<Types>) -> Self {
        Self {
            ballot: Ballot::from(&rpc.vote),
            last: position(rpc.last_log_id.as_ref()),
            transfer: rpc.leadership_transfer,
        }
    }

    pub(crate) fn into_rpc(self) -> VoteRequest<Types> {
        let mut rpc = VoteRequest::new(self.ballot.into(), self.last.map(RaftLogId::from));
        rpc.leadership_transfer = self.transfer;
        rpc
    }
}

/// Tells one snapshot from another: what it contains, how long it is, and its checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SnapshotName {
    pub(crate) last: Option<Position>,
    pub(crate) size_bytes: u64,
    pub(crate) crc: u32,
}

/// A piece of a snapshot. Without bytes it only asks how far the receiver has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Chunk {
    pub(crate) ballot: Ballot,
    pub(crate) name: SnapshotName,
    pub(crate) offset: u64,
    pub(crate) bytes: Bytes,
}

/// The leader wants `to` to lead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Transfer {
    pub(crate) ballot: Ballot,
    pub(crate) to: u64,
    pub(crate) last: Option<Position>,
}

impl Transfer {
    pub(crate) fn of(rpc: &TransferLeaderRequest<Types>) -> Self {
        Self {
            ballot: Ballot::from(rpc.from_leader()),
            to: *rpc.to_node_id(),
            last: position(rpc.last_log_id()),
        }
    }

    pub(crate) fn into_rpc(self) -> TransferLeaderRequest<Types> {
        TransferLeaderRequest::new(self.ballot.into(), self.to, self.last.map(RaftLogId::from))
    }
}

/// What one member asks of another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Request {
    Append(Append),
    Vote(Candidacy),
    PreVote(Candidacy),
    Snapshot(Chunk),
    Transfer(Transfer),
    /// Commands from a member that does not lead, to become one entry.
    Propose {
        within_ms: u64,
        #[serde(deserialize_with = "bounded")]
        commands: Vec<Bytes>,
    },
    /// Up to where must a read on another member wait?
    ReadIndex {
        within_ms: u64,
    },
    /// How long is the way, and the lease at its end?
    Echo,
}

/// Why forwarded commands were not applied, or may not have been.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Refusal {
    Busy,
    TooLarge { size_bytes: u64, size_bytes_max: u64 },
    NotLeader { leader: Option<u64> },
    Timeout,
    OutcomeUnknown(String),
    Stopped,
}

impl From<ProposeError> for Refusal {
    fn from(error: ProposeError) -> Self {
        match error {
            ProposeError::Busy => Self::Busy,
            ProposeError::TooLarge {
                size_bytes,
                size_bytes_max,
            } => Self::TooLarge {
                size_bytes: size_bytes as u64,
                size_bytes_max: size_bytes_max as u64,
            },
            ProposeError::NotLeader { leader } => Self::NotLeader { leader },
            ProposeError::Timeout => Self::Timeout,
            ProposeError::OutcomeUnknown(why) => Self::OutcomeUnknown(why),
            ProposeError::Stopped => Self::Stopped,
        }
    }
}

impl From<Refusal> for ProposeError {
    fn from(refusal: Refusal) -> Self {
        let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        match refusal {
            Refusal::Busy => Self::Busy,
            Refusal::TooLarge {
                size_bytes,
                size_bytes_max,
            } => Self::TooLarge {
                size_bytes: size(size_bytes),
                size_bytes_max: size(size_bytes_max),
            },
            Refusal::NotLeader { leader } => Self::NotLeader { leader },
            Refusal::Timeout => Self::Timeout,
            Refusal::OutcomeUnknown(why) => Self::OutcomeUnknown(why),
            Refusal::Stopped => Self::Stopped,
        }
    }
}

/// What it answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Answer {
    Appended,
    AppendedUpTo(Option<Position>),
    Conflict,
    HigherBallot(Ballot),
    Voted {
        ballot: Ballot,
        last: Option<Position>,
        granted: bool,
    },
    /// The receiver has this many bytes; all of them while it installs the snapshot.
    SnapshotAt {
        offset: u64,
    },
    SnapshotInstalled {
        ballot: Ballot,
    },
    Transferring,
    NotTransferring(String),
    Proposed(#[serde(deserialize_with = "bounded")] Vec<Bytes>),
    NotProposed(Refusal),
    ReadAt {
        index: u64,
    },
    NotReadable {
        leader: Option<u64>,
    },
    /// How long after a leader's last message this member votes for nobody else.
    Echo {
        lease_ms: u64,
    },
}

impl From<AppendEntriesResponse<Types>> for Answer {
    fn from(response: AppendEntriesResponse<Types>) -> Self {
        match response {
            AppendEntriesResponse::Success => Self::Appended,
            AppendEntriesResponse::PartialSuccess(upto) => Self::AppendedUpTo(position(upto.as_ref())),
            AppendEntriesResponse::Conflict => Self::Conflict,
            AppendEntriesResponse::HigherVote(vote) => Self::HigherBallot(Ballot::from(&vote)),
        }
    }
}

impl From<VoteResponse<Types>> for Answer {
    fn from(response: VoteResponse<Types>) -> Self {
        Self::Voted {
            ballot: Ballot::from(&response.vote),
            last: position(response.last_log_id.as_ref()),
            granted: response.vote_granted,
        }
    }
}

/// Why bytes from a member are refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Garbage {
    #[error("{size_bytes} bytes, the limit is {MESSAGE_BYTES_MAX}")]
    TooLarge { size_bytes: usize },
    #[error("version {0} of the members' protocol, this release speaks version {VERSION}")]
    Version(u8),
    #[error("bytes that make no sense")]
    Nonsense,
    #[error("meant for member {to} of another cluster or member")]
    Misdirected { to: u64 },
}

/// A short stand-in for the cluster's name, to find requests that went astray.
pub(crate) fn cluster_mark(cluster: &str) -> u32 {
    Crc::of(cluster.as_bytes())
}

/// `bytes` are the large parts of the message, for the size of the buffer: one that grows is copied at each step.
fn encode(message: &impl Serialize, bytes: &[Bytes]) -> Vec<u8> {
    let size = bytes.iter().map(|bytes| bytes.0.len() + 5).sum::<usize>();
    let mut buffer = Vec::with_capacity(size + 128);
    buffer.push(VERSION);
    postcard::to_extend(message, buffer).expect("plain data in growing memory always encodes")
}

fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, Garbage> {
    if bytes.len() > MESSAGE_BYTES_MAX {
        return Err(Garbage::TooLarge {
            size_bytes: bytes.len(),
        });
    }
    let (version, body) = bytes.split_first().ok_or(Garbage::Nonsense)?;
    if *version != VERSION {
        return Err(Garbage::Version(*version));
    }
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        _ => Err(Garbage::Nonsense),
    }
}

pub(crate) fn encode_request(cluster: u32, to: u64, request: &Request) -> Vec<u8> {
    let bytes = match request {
        Request::Append(append) => append.entries.as_slice(),
        Request::Snapshot(chunk) => std::slice::from_ref(&chunk.bytes),
        Request::Propose { commands, .. } => commands,
        _ => &[],
    };
    encode(&(cluster, to, request), bytes)
}

pub(crate) fn decode_request(cluster: u32, to: u64, bytes: &[u8]) -> Result<Request, Garbage> {
    let (meant, meant_to, request): (u32, u64, Request) = decode(bytes)?;
    if (meant, meant_to) != (cluster, to) {
        return Err(Garbage::Misdirected { to: meant_to });
    }
    Ok(request)
}

pub(crate) fn encode_answer(answer: &Answer) -> Vec<u8> {
    encode(answer, &[])
}

pub(crate) fn decode_answer(bytes: &[u8]) -> Result<Answer, Garbage> {
    decode(bytes)
}

#[cfg(test)]
mod tests;
