//! Snapshots: the whole state as one stream of bytes, in a file that is replaced as a whole.
//!
//! ```text
//! "CHUTSNAP" | length | envelope { cluster, last applied log id, membership } |
//! 1, table, key length, value length, key, value |  ... for each row, ascending
//! 0, number of rows (8), CRC-32 of everything before (4)
//! ```

use openraft::SnapshotMeta;
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Error;
use crate::format::{
    Crc, Cursor, Fault, Fields, put_membership, put_optional_log_id, seal, take_membership,
    take_optional_log_id, unseal,
};
use crate::raft::RaftSnapshotMeta;
use crate::state_store::Applied;
use crate::storage::{fault_in, replace_file};

pub(crate) mod receiving;
pub(crate) mod sending;

const MAGIC: &[u8; 8] = b"CHUTSNAP";
/// The header names the members; nothing else in it grows.
const HEADER_BYTES_MAX: usize = 1024 * 1024;
/// Keys and values are bounded by the size of a log entry; this is a check against nonsense lengths.
const ROW_BYTES_MAX: usize = 64 * 1024 * 1024;

/// One row of the state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) table: u8,
    pub(crate) key: Vec<u8>,
    pub(crate) value: Vec<u8>,
}

/// What a snapshot says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) cluster: String,
    pub(crate) applied: Applied,
}

impl Header {
    fn encode(&self) -> Vec<u8> {
        let mut fields = Fields::default();
        fields.bytes(self.cluster.as_bytes());
        put_optional_log_id(&mut fields, self.applied.last.as_ref());
        put_membership(&mut fields, &self.applied.membership);
        seal(&fields.finish())
    }

    fn decode(sealed: &[u8]) -> Result<Self, Fault> {
        let mut cursor = Cursor::new(unseal(sealed)?);
        let cluster = cursor.text()?;
        let last = take_optional_log_id(&mut cursor)?;
        let membership = take_membership(&mut cursor)?;
        cursor.end()?;
        Ok(Self {
            cluster,
            applied: Applied { last, membership },
        })
    }

    pub(crate) fn meta(&self) -> RaftSnapshotMeta {
        SnapshotMeta {
            last_log_id: self.applied.last,
            last_membership: self.applied.membership.clone(),
        }
    }
}

/// Why a snapshot cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error(transparent)]
    Fault(#[from] Fault),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<ReadError> for io::Error {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Io(error) => error,
            fault @ ReadError::Fault(_) => Self::new(io::ErrorKind::InvalidData, fault),
        }
    }
}

/// Writes a snapshot; returns the number of rows.
pub(crate) fn write(
    out: &mut dyn Write,
    header: &Header,
    rows: impl Iterator<Item = Row>,
) -> io::Result<u64> {
    let mut crc = Crc::new();
    let mut put = |bytes: &[u8]| {
        crc.update(bytes);
        out.write_all(bytes)
    };
    let sealed = header.encode();
    put(MAGIC)?;
    put(&length(sealed.len())?)?;
    put(&sealed)?;
    let mut count = 0u64;
    for row in rows {
        put(&[1, row.table])?;
        put(&length(row.key.len())?)?;
        put(&length(row.value.len())?)?;
        put(&row.key)?;
        put(&row.value)?;
        count += 1;
    }
    put(&[0])?;
    put(&count.to_le_bytes())?;
    let crc = crc.value();
    out.write_all(&crc.to_le_bytes())?;
    Ok(count)
}

fn length(length: usize) -> io::Result<[u8; 4]> {
    let length = u32::try_from(length).map_err(|_| io::Error::other("a row larger than 4 GiB"))?;
    Ok(length.to_le_bytes())
}

/// Reads a snapshot row by row. The last call, which finds no row, has checked the sum over everything; a
/// reader that stops earlier has checked nothing, see [`verify`].
pub(crate) struct SnapshotReader {
    input: Box<dyn Read + Send>,
    crc: Crc,
    header: Header,
    count: u64,
    ended: bool,
}

impl SnapshotReader {
    pub(crate) fn open(mut input: Box<dyn Read + Send>) -> Result<Self, ReadError> {
        let mut crc = Crc::new();
        let magic: [u8; 8] = take(&mut input, &mut crc)?;
        if &magic != MAGIC {
            return Err(Fault::Damaged("not a snapshot").into());
        }
        let length = u32::from_le_bytes(take(&mut input, &mut crc)?) as usize;
        let sealed = take_bytes(&mut input, &mut crc, length, HEADER_BYTES_MAX)?;
        let header = Header::decode(&sealed)?;
        Ok(Self {
            input,
            crc,
            header,
            count: 0,
            ended: false,
        })
    }

    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    pub(crate) fn next_row(&mut self) -> io::Result<Option<Row>> {
        Ok(self.read_row()?)
    }

    pub(crate) fn read_row(&mut self) -> Result<Option<Row>, ReadError> {
        if self.ended {
            return Ok(None);
        }
        let (input, crc) = (&mut self.input, &mut self.crc);
        match take::<1>(input, crc)? {
            [1] => {
                let [table] = take(input, crc)?;
                let key_length = u32::from_le_bytes(take(input, crc)?) as usize;
                let value_length = u32::from_le_bytes(take(input, crc)?) as usize;
                let key = take_bytes(input, crc, key_length, ROW_BYTES_MAX)?;
                let value = take_bytes(input, crc, value_length, ROW_BYTES_MAX)?;
                self.count += 1;
                Ok(Some(Row { table, key, value }))
            }
            [0] => {
                let count = u64::from_le_bytes(take(input, crc)?);
                let expected = crc.clone().value();
                let found = u32::from_le_bytes(take(input, &mut Crc::new())?);
                if count != self.count || found != expected {
                    return Err(Fault::Damaged("checksum of the snapshot does not match").into());
                }
                self.ended = true;
                Ok(None)
            }
            _ => Err(Fault::Damaged("unknown mark in the snapshot").into()),
        }
    }
}

fn early_end(error: io::Error) -> ReadError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => Fault::Damaged("the snapshot ends early").into(),
        _ => error.into(),
    }
}

fn take<const N: usize>(input: &mut dyn Read, crc: &mut Crc) -> Result<[u8; N], ReadError> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes).map_err(early_end)?;
    crc.update(&bytes);
    Ok(bytes)
}

fn take_bytes(input: &mut dyn Read, crc: &mut Crc, length: usize, max: usize) -> Result<Vec<u8>, ReadError> {
    if length > max {
        return Err(Fault::Damaged("a length in the snapshot makes no sense").into());
    }
    let mut bytes = vec![0; length];
    input.read_exact(&mut bytes).map_err(early_end)?;
    crc.update(&bytes);
    Ok(bytes)
}

/// Reads a snapshot to its end, so that nothing is replaced by a damaged one.
pub(crate) fn verify(data: &SnapshotData) -> Result<Header, ReadError> {
    let mut reader = data.rows()?;
    while reader.read_row()?.is_some() {}
    Ok(reader.header)
}

/// The bytes of one snapshot.
#[derive(Debug, Clone)]
pub(crate) enum SnapshotData {
    /// Kept open: it stays readable when a newer snapshot takes its name.
    File(Arc<std::fs::File>),
    Memory(Arc<Vec<u8>>),
}

impl SnapshotData {
    /// Reads from the start, independently of other readers.
    pub(crate) fn rows(&self) -> Result<SnapshotReader, ReadError> {
        SnapshotReader::open(self.bytes())
    }

    /// Its length, and the checksum at its end.
    pub(crate) fn size_and_crc(&self) -> io::Result<(u64, u32)> {
        let size_bytes = match self {
            Self::File(file) => file.metadata()?.len(),
            Self::Memory(bytes) => bytes.len() as u64,
        };
        let end = self.read_at(size_bytes.saturating_sub(4), 4)?;
        let crc = end.try_into().map_err(|_| io::ErrorKind::UnexpectedEof)?;
        Ok((size_bytes, u32::from_le_bytes(crc)))
    }

    /// Up to `size_bytes_max` bytes from `offset`; none at the end.
    pub(crate) fn read_at(&self, offset: u64, size_bytes_max: usize) -> io::Result<Vec<u8>> {
        match self {
            Self::File(file) => {
                let mut bytes = Vec::new();
                let mut input = At {
                    file: file.clone(),
                    offset,
                };
                input
                    .by_ref()
                    .take(size_bytes_max as u64)
                    .read_to_end(&mut bytes)?;
                Ok(bytes)
            }
            Self::Memory(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                let end = start.saturating_add(size_bytes_max).min(bytes.len());
                Ok(bytes[start..end].to_vec())
            }
        }
    }

    fn bytes(&self) -> Box<dyn Read + Send> {
        match self {
            Self::File(file) => Box::new(BufReader::with_capacity(
                64 * 1024,
                At {
                    file: file.clone(),
                    offset: 0,
                },
            )),
            Self::Memory(bytes) => Box::new(io::Cursor::new(Shareable(bytes.clone()))),
        }
    }
}

/// Reads a file at an own position.
struct At {
    file: Arc<std::fs::File>,
    offset: u64,
}

impl Read for At {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = std::os::unix::fs::FileExt::read_at(&*self.file, buffer, self.offset)?;
        self.offset += read as u64;
        Ok(read)
    }
}

struct Shareable(Arc<Vec<u8>>);

impl AsRef<[u8]> for Shareable {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Holds the snapshot of a store whose backends belong to the caller. Clones share it, so that it outlives
/// a restart in simulation.
#[derive(Debug, Clone, Default)]
pub struct MemorySnapshots(Arc<Mutex<Option<Arc<Vec<u8>>>>>);

/// Where the one current snapshot is kept.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    Directory(PathBuf),
    Memory(MemorySnapshots),
}

impl Place {
    /// Name of the snapshot for messages.
    pub(crate) fn file(&self) -> PathBuf {
        match self {
            Self::Directory(directory) => directory.join("state.snapshot"),
            Self::Memory(_) => PathBuf::from("state.snapshot (in memory)"),
        }
    }

    /// Makes what `write` writes the current snapshot, durably.
    pub(crate) fn replace(&self, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
        match self {
            Self::Directory(_) => replace_file(&self.file(), |out| write(out)),
            Self::Memory(place) => {
                let mut bytes = Vec::new();
                write(&mut bytes)?;
                *place.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(bytes));
                Ok(())
            }
        }
    }

    /// The current snapshot, if there is one.
    pub(crate) fn current(&self) -> io::Result<Option<SnapshotData>> {
        match self {
            Self::Directory(_) => match std::fs::File::open(self.file()) {
                Ok(file) => Ok(Some(SnapshotData::File(Arc::new(file)))),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error),
            },
            Self::Memory(place) => {
                let bytes = place.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
                Ok(bytes.map(SnapshotData::Memory))
            }
        }
    }

    /// Checks the current snapshot as a whole at start, and removes what a crash left half written.
    pub(crate) fn check(&self, cluster: &str) -> Result<Option<Header>, Error> {
        let file = self.file();
        let io = |source| Error::Io {
            file: file.clone(),
            source,
        };
        if let Self::Directory(_) = self {
            remove_if_there(&file.with_extension("tmp")).map_err(io)?;
        }
        let Some(data) = self.current().map_err(io)? else {
            return Ok(None);
        };
        let header = verify(&data).map_err(|error| match error {
            ReadError::Fault(fault) => fault_in(&file, fault),
            ReadError::Io(source) => Error::Io {
                file: file.clone(),
                source,
            },
        })?;
        if header.cluster != cluster {
            let (found, expected) = (
                format!("cluster {:?}", header.cluster),
                format!("cluster {cluster:?}"),
            );
            return Err(Error::Foreign {
                file,
                found,
                expected,
            });
        }
        Ok(Some(header))
    }
}

fn remove_if_there(file: &Path) -> io::Result<()> {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> (Header, Vec<Row>) {
        let header = Header {
            cluster: "c".into(),
            applied: Applied::default(),
        };
        let row = |table, key: &[u8], value: &[u8]| Row {
            table,
            key: key.to_vec(),
            value: value.to_vec(),
        };
        (header, vec![row(1, b"k", b"value"), row(2, b"", b"")])
    }

    fn bytes() -> Vec<u8> {
        let (header, rows) = sample();
        let mut out = Vec::new();
        write(&mut out, &header, rows.into_iter()).expect("writing to memory works");
        out
    }

    /// Version 1. Never edit: snapshots in the field hold these bytes.
    #[test]
    fn golden_bytes_of_version_1() {
        let hex: String = bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, GOLDEN);
    }

    const GOLDEN: &str = "\
        43485554534e4150140000000101000000630000000000000000000015f11e32010101000000050000006b7661\
        6c7565010200000000000000000002000000000000009029ab42";

    #[test]
    fn a_snapshot_reads_back() {
        let (header, rows) = sample();
        let mut reader = SnapshotData::Memory(Arc::new(bytes()))
            .rows()
            .expect("the header is sound");
        assert_eq!(reader.header(), &header);
        let mut found = Vec::new();
        while let Some(row) = reader.next_row().expect("the rows are sound") {
            found.push(row);
        }
        assert_eq!(found, rows);
    }

    #[test]
    fn any_cut_or_change_is_found() {
        let whole = bytes();
        for length in 0..whole.len() {
            let cut = SnapshotData::Memory(Arc::new(whole[..length].to_vec()));
            assert!(
                matches!(verify(&cut), Err(ReadError::Fault(_))),
                "cut to {length} bytes"
            );
        }
        for position in 0..whole.len() {
            let mut changed = whole.clone();
            changed[position] ^= 0x04;
            let changed = SnapshotData::Memory(Arc::new(changed));
            assert!(
                matches!(verify(&changed), Err(ReadError::Fault(_))),
                "byte {position} changed"
            );
        }
    }
}
