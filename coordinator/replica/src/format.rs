//! Bytes as stored: every value is an envelope `version, body, CRC-32 (little endian) of both`.
//!
//! The encodings are ours, not those of the Raft library, so that a new library version cannot change them.
//! Integers are little endian, byte strings carry a 32-bit length. Old versions are read forever: the golden
//! bytes in the tests below never change, new versions are added beside them.

use openraft::{BasicNode, Entry, EntryPayload, LogId, Membership, StoredMembership, Vote};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::raft::{Commands, LeaderId, RaftEntry, RaftLogId, RaftMembership, RaftVote};

/// Highest format version that this release reads, and the one that it writes.
pub(crate) const VERSION: u8 = 1;

/// Why stored bytes are refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Fault {
    #[error("format {0} is newer than this release")]
    Newer(u8),
    #[error("{0}")]
    Damaged(&'static str),
}

/// CRC-32 (IEEE 802.3, reflected), as in zip and Ethernet.
#[derive(Debug, Clone, Default)]
pub(crate) struct Crc(crc32fast::Hasher);

impl Crc {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(crate) fn value(self) -> u32 {
        self.0.finalize()
    }

    pub(crate) fn of(bytes: &[u8]) -> u32 {
        crc32fast::hash(bytes)
    }
}

/// Puts `body` into an envelope.
pub(crate) fn seal(body: &[u8]) -> Vec<u8> {
    let mut sealed = Vec::with_capacity(body.len() + 5);
    sealed.push(VERSION);
    sealed.extend_from_slice(body);
    let crc = Crc::of(&sealed);
    sealed.extend_from_slice(&crc.to_le_bytes());
    sealed
}

/// Takes the body out of an envelope.
pub(crate) fn unseal(sealed: &[u8]) -> Result<&[u8], Fault> {
    let (Some(version), Some((content, crc))) = (sealed.first(), sealed.split_last_chunk::<4>()) else {
        return Err(Fault::Damaged("value too short"));
    };
    if *version > VERSION {
        return Err(Fault::Newer(*version));
    }
    if *version == 0 || Crc::of(content) != u32::from_le_bytes(*crc) {
        return Err(Fault::Damaged("checksum does not match"));
    }
    content.get(1..).ok_or(Fault::Damaged("value too short"))
}

/// Writes fields one after the other.
#[derive(Debug, Default)]
pub(crate) struct Fields(Vec<u8>);

impl Fields {
    pub(crate) fn byte(&mut self, value: u8) {
        self.0.push(value);
    }

    pub(crate) fn integer(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn length(&mut self, value: usize) {
        let value = u32::try_from(value).expect("limits keep every stored value far below 4 GiB");
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn bytes(&mut self, value: &[u8]) {
        self.length(value.len());
        self.0.extend_from_slice(value);
    }

    /// Fields that were written already.
    pub(crate) fn raw(&mut self, fields: &[u8]) {
        self.0.extend_from_slice(fields);
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.0
    }
}

/// Reads fields one after the other.
#[derive(Debug)]
pub(crate) struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let (head, rest) = self
            .0
            .split_first_chunk::<N>()
            .ok_or(Fault::Damaged("value ends early"))?;
        self.0 = rest;
        Ok(*head)
    }

    pub(crate) fn byte(&mut self) -> Result<u8, Fault> {
        Ok(self.take::<1>()?[0])
    }

    pub(crate) fn integer(&mut self) -> Result<u64, Fault> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    pub(crate) fn length(&mut self) -> Result<usize, Fault> {
        Ok(u32::from_le_bytes(self.take()?) as usize)
    }

    pub(crate) fn bytes(&mut self) -> Result<&'a [u8], Fault> {
        let length = self.length()?;
        let (head, rest) = self
            .0
            .split_at_checked(length)
            .ok_or(Fault::Damaged("value ends early"))?;
        self.0 = rest;
        Ok(head)
    }

    /// What is not read yet.
    pub(crate) fn rest(&self) -> &'a [u8] {
        self.0
    }

    pub(crate) fn text(&mut self) -> Result<String, Fault> {
        String::from_utf8(self.bytes()?.to_vec()).map_err(|_| Fault::Damaged("text is not UTF-8"))
    }

    pub(crate) fn end(self) -> Result<(), Fault> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(Fault::Damaged("value has bytes left over"))
        }
    }
}

fn put_log_id(fields: &mut Fields, id: &RaftLogId) {
    fields.integer(id.leader_id.term);
    fields.integer(id.leader_id.node_id);
    fields.integer(id.index);
}

fn take_log_id(cursor: &mut Cursor<'_>) -> Result<RaftLogId, Fault> {
    let leader_id = LeaderId {
        term: cursor.integer()?,
        node_id: cursor.integer()?,
    };
    Ok(LogId {
        leader_id,
        index: cursor.integer()?,
    })
}

/// Writes a log id that may be absent.
pub(crate) fn put_optional_log_id(fields: &mut Fields, id: Option<&RaftLogId>) {
    fields.byte(u8::from(id.is_some()));
    if let Some(id) = id {
        put_log_id(fields, id);
    }
}

/// Reads a log id that may be absent.
pub(crate) fn take_optional_log_id(cursor: &mut Cursor<'_>) -> Result<Option<RaftLogId>, Fault> {
    match cursor.byte()? {
        0 => Ok(None),
        1 => Ok(Some(take_log_id(cursor)?)),
        _ => Err(Fault::Damaged("unknown mark for an optional value")),
    }
}

fn put_members(fields: &mut Fields, membership: &Membership<u64, BasicNode>) {
    let configs = membership.get_joint_config();
    fields.length(configs.len());
    for voters in configs {
        fields.length(voters.len());
        for voter in voters {
            fields.integer(*voter);
        }
    }
    let nodes: Vec<_> = membership.nodes().collect();
    fields.length(nodes.len());
    for (id, node) in nodes {
        fields.integer(*id);
        fields.bytes(node.addr.as_bytes());
    }
}

fn take_members(cursor: &mut Cursor<'_>) -> Result<Membership<u64, BasicNode>, Fault> {
    let mut configs = Vec::new();
    for _ in 0..cursor.length()? {
        let mut voters = BTreeSet::new();
        for _ in 0..cursor.length()? {
            voters.insert(cursor.integer()?);
        }
        configs.push(voters);
    }
    let mut nodes = BTreeMap::new();
    for _ in 0..cursor.length()? {
        nodes.insert(cursor.integer()?, BasicNode { addr: cursor.text()? });
    }
    if configs.is_empty() && nodes.is_empty() {
        return Ok(Membership::default());
    }
    Membership::new(configs, nodes).map_err(|_| Fault::Damaged("membership contradicts itself"))
}

/// Writes the last membership and the log id at which it was set.
pub(crate) fn put_membership(fields: &mut Fields, stored: &RaftMembership) {
    put_optional_log_id(fields, stored.log_id().as_ref());
    put_members(fields, stored.membership());
}

/// Reads what [`put_membership`] wrote.
pub(crate) fn take_membership(cursor: &mut Cursor<'_>) -> Result<RaftMembership, Fault> {
    let log_id = take_optional_log_id(cursor)?;
    Ok(StoredMembership::new(log_id, take_members(cursor)?))
}

const BLANK: u8 = 0;
const COMMANDS: u8 = 1;
const MEMBERSHIP: u8 = 2;

/// A log entry in its envelope.
pub(crate) fn encode_entry(entry: &RaftEntry) -> Vec<u8> {
    let mut sealed = Vec::new();
    encode_entry_into(&mut sealed, entry);
    sealed
}

/// Puts a log entry in its envelope in place of what `sealed` holds.
pub(crate) fn encode_entry_into(sealed: &mut Vec<u8>, entry: &RaftEntry) {
    sealed.clear();
    if let EntryPayload::Normal(commands) = &entry.payload {
        sealed.reserve_exact(commands.size_bytes() + 64);
    }
    let mut fields = Fields(std::mem::take(sealed));
    fields.byte(VERSION);
    put_log_id(&mut fields, &entry.log_id);
    match &entry.payload {
        EntryPayload::Blank => fields.byte(BLANK),
        EntryPayload::Normal(commands) => {
            fields.byte(COMMANDS);
            fields.length(commands.count());
            fields.raw(commands.packed());
        }
        EntryPayload::Membership(membership) => {
            fields.byte(MEMBERSHIP);
            put_members(&mut fields, membership);
        }
    }
    *sealed = fields.finish();
    let crc = Crc::of(sealed);
    sealed.extend_from_slice(&crc.to_le_bytes());
}

/// Reads what [`encode_entry`] wrote.
pub(crate) fn decode_entry(sealed: &[u8]) -> Result<RaftEntry, Fault> {
    let mut cursor = Cursor::new(unseal(sealed)?);
    let log_id = take_log_id(&mut cursor)?;
    let payload = match cursor.byte()? {
        BLANK => EntryPayload::Blank,
        COMMANDS => {
            let count = cursor.length()?;
            EntryPayload::Normal(Commands::unpack(count, &mut cursor)?)
        }
        MEMBERSHIP => EntryPayload::Membership(take_members(&mut cursor)?),
        _ => return Err(Fault::Damaged("unknown kind of log entry")),
    };
    cursor.end()?;
    Ok(Entry { log_id, payload })
}

/// A lease in its envelope; whole milliseconds.
pub(crate) fn encode_lease(lease: Duration) -> Vec<u8> {
    let mut fields = Fields::default();
    fields.integer(u64::try_from(lease.as_millis()).unwrap_or(u64::MAX));
    seal(&fields.finish())
}

/// Reads what [`encode_lease`] wrote.
pub(crate) fn decode_lease(sealed: &[u8]) -> Result<Duration, Fault> {
    let mut cursor = Cursor::new(unseal(sealed)?);
    let lease = Duration::from_millis(cursor.integer()?);
    cursor.end()?;
    Ok(lease)
}

/// A vote in its envelope.
pub(crate) fn encode_vote(vote: &RaftVote) -> Vec<u8> {
    let mut fields = Fields::default();
    fields.integer(vote.leader_id.term);
    fields.integer(vote.leader_id.node_id);
    fields.byte(u8::from(vote.committed));
    seal(&fields.finish())
}

/// Reads what [`encode_vote`] wrote.
pub(crate) fn decode_vote(sealed: &[u8]) -> Result<RaftVote, Fault> {
    let mut cursor = Cursor::new(unseal(sealed)?);
    let leader_id = LeaderId {
        term: cursor.integer()?,
        node_id: cursor.integer()?,
    };
    let committed = match cursor.byte()? {
        0 => false,
        1 => true,
        _ => return Err(Fault::Damaged("unknown mark in a vote")),
    };
    cursor.end()?;
    Ok(Vote { leader_id, committed })
}

/// An optional log id in its envelope: what is purged, what is committed.
pub(crate) fn encode_log_id(id: Option<&RaftLogId>) -> Vec<u8> {
    let mut fields = Fields::default();
    put_optional_log_id(&mut fields, id);
    seal(&fields.finish())
}

/// Reads what [`encode_log_id`] wrote.
pub(crate) fn decode_log_id(sealed: &[u8]) -> Result<Option<RaftLogId>, Fault> {
    let mut cursor = Cursor::new(unseal(sealed)?);
    let id = take_optional_log_id(&mut cursor)?;
    cursor.end()?;
    Ok(id)
}

/// How far the state has come, in its envelope: last applied entry and last membership.
pub(crate) fn encode_applied(applied: Option<&RaftLogId>, membership: &RaftMembership) -> Vec<u8> {
    let mut fields = Fields::default();
    put_optional_log_id(&mut fields, applied);
    put_membership(&mut fields, membership);
    seal(&fields.finish())
}

/// Reads what [`encode_applied`] wrote.
pub(crate) fn decode_applied(sealed: &[u8]) -> Result<(Option<RaftLogId>, RaftMembership), Fault> {
    let mut cursor = Cursor::new(unseal(sealed)?);
    let applied = take_optional_log_id(&mut cursor)?;
    let membership = take_membership(&mut cursor)?;
    cursor.end()?;
    Ok((applied, membership))
}

/// Whose a file is: cluster and member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) cluster: String,
    pub(crate) node_id: u64,
}

impl Identity {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut fields = Fields::default();
        fields.bytes(self.cluster.as_bytes());
        fields.integer(self.node_id);
        seal(&fields.finish())
    }

    pub(crate) fn decode(sealed: &[u8]) -> Result<Self, Fault> {
        let mut cursor = Cursor::new(unseal(sealed)?);
        let identity = Self {
            cluster: cursor.text()?,
            node_id: cursor.integer()?,
        };
        cursor.end()?;
        Ok(identity)
    }
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "member {} of cluster {:?}", self.node_id, self.cluster)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn id(term: u64, node: u64, index: u64) -> RaftLogId {
        LogId {
            leader_id: LeaderId { term, node_id: node },
            index,
        }
    }

    fn members() -> Membership<u64, BasicNode> {
        Membership::new(
            vec![BTreeSet::from([1])],
            BTreeMap::from([(1, BasicNode { addr: "a:1".into() })]),
        )
        .expect("the voter is among the nodes")
    }

    /// Version 1 of every stored value. Never edit these bytes: files in the field hold them.
    #[test]
    fn golden_bytes_of_version_1() {
        fn check(what: &str, bytes: &[u8], golden: &str) {
            assert_eq!(hex(bytes), golden, "{what}");
        }
        let blank = Entry {
            log_id: id(1, 2, 3),
            payload: EntryPayload::Blank,
        };
        check("blank entry", &encode_entry(&blank), GOLDEN_BLANK);
        let commands = Entry {
            log_id: id(1, 2, 4),
            payload: EntryPayload::Normal(Commands::new(&[&b"ab"[..], b""])),
        };
        check("commands", &encode_entry(&commands), GOLDEN_COMMANDS);
        let membership = Entry {
            log_id: id(1, 2, 5),
            payload: EntryPayload::Membership(members()),
        };
        check("membership", &encode_entry(&membership), GOLDEN_MEMBERSHIP);
        let vote = Vote {
            leader_id: LeaderId { term: 7, node_id: 1 },
            committed: true,
        };
        check("vote", &encode_vote(&vote), GOLDEN_VOTE);
        check("no log id", &encode_log_id(None), "0100be23c258");
        let stored = StoredMembership::new(Some(id(1, 2, 5)), members());
        check(
            "applied",
            &encode_applied(Some(&id(1, 2, 9)), &stored),
            GOLDEN_APPLIED,
        );
        let identity = Identity {
            cluster: "c".into(),
            node_id: 1,
        };
        check("identity", &identity.encode(), GOLDEN_IDENTITY);
        let lease = Duration::from_millis(480);
        check("lease", &encode_lease(lease), GOLDEN_LEASE);

        assert_eq!(decode_entry(&encode_entry(&blank)), Ok(blank));
        assert_eq!(decode_entry(&encode_entry(&commands)), Ok(commands));
        assert_eq!(decode_entry(&encode_entry(&membership)), Ok(membership));
        assert_eq!(decode_vote(&encode_vote(&vote)), Ok(vote));
        let applied = encode_applied(Some(&id(1, 2, 9)), &stored);
        assert_eq!(decode_applied(&applied), Ok((Some(id(1, 2, 9)), stored)));
        assert_eq!(Identity::decode(&identity.encode()), Ok(identity));
        assert_eq!(decode_lease(&encode_lease(lease)), Ok(lease));
    }

    const GOLDEN_BLANK: &str = "0101000000000000000200000000000000030000000000000000a924cb00";
    const GOLDEN_COMMANDS: &str = "\
        01010000000000000002000000000000000400000000000000010200000002000000616200000000c4e38869";
    const GOLDEN_MEMBERSHIP: &str = "\
        010100000000000000020000000000000005000000000000000201000000010000000100000000000000010000\
        00010000000000000003000000613a313ce22406";
    const GOLDEN_VOTE: &str = "0107000000000000000100000000000000013221a7c8";
    const GOLDEN_APPLIED: &str = "\
        010101000000000000000200000000000000090000000000000001010000000000000002000000000000000500\
        0000000000000100000001000000010000000000000001000000010000000000000003000000613a31e2574a2f";
    const GOLDEN_LEASE: &str = "01e001000000000000382ed5d4";
    const GOLDEN_IDENTITY: &str = "0101000000630100000000000000cbfc6638";

    #[test]
    fn checksum_is_the_usual_crc32() {
        assert_eq!(Crc::of(b"123456789"), 0xCBF4_3926);
    }

    #[test]
    fn any_changed_or_missing_byte_is_refused() {
        let commands = Commands::new(&[b"hello", b"world"]);
        let sealed = encode_entry(&Entry {
            log_id: id(1, 2, 4),
            payload: EntryPayload::Normal(commands),
        });
        for length in 0..sealed.len() {
            assert!(decode_entry(&sealed[..length]).is_err(), "cut to {length} bytes");
        }
        for position in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[position] ^= 0x20;
            assert!(decode_entry(&changed).is_err(), "byte {position} changed");
        }
    }

    #[test]
    fn a_newer_version_is_told_apart_from_damage() {
        let mut sealed = seal(b"body");
        sealed[0] = VERSION + 1;
        assert_eq!(unseal(&sealed), Err(Fault::Newer(VERSION + 1)));
        assert_eq!(unseal(b""), Err(Fault::Damaged("value too short")));
    }
}
