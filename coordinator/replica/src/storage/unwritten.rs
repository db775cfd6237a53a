//! A file that is read and never written: what would be written to it stays in memory. For a full disk.

use redb::{BackendError, StorageBackend};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Bound;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

const PAGE: u64 = 4096;

#[derive(Debug)]
pub(crate) struct Unwritten {
    file: File,
    changed: Mutex<Changed>,
}

#[derive(Debug)]
struct Changed {
    length: u64,
    /// Bytes of the file from here on do not count: it was shortened.
    file_end: u64,
    pages: BTreeMap<u64, Box<[u8]>>,
}

impl Unwritten {
    /// # Errors
    /// The file is not there or cannot be read.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        Ok(Self {
            file,
            changed: Mutex::new(Changed {
                length,
                file_end: length,
                pages: BTreeMap::new(),
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Changed> {
        self.changed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fills `out` with what the file holds there; zeros behind its end.
    fn read_file(&self, changed: &Changed, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let there = changed.file_end.saturating_sub(offset).min(out.len() as u64);
        let (held, beyond) = out.split_at_mut(usize::try_from(there).map_err(io::Error::other)?);
        beyond.fill(0);
        self.file.read_exact_at(held, offset)
    }

    /// Cuts `offset..offset + length` at the borders of pages: page, beginning within it, length.
    fn pieces(offset: u64, length: usize) -> impl Iterator<Item = (u64, usize, usize)> {
        let end = offset + length as u64;
        (offset / PAGE..end.div_ceil(PAGE)).map(move |page| {
            let begin = offset.max(page * PAGE);
            let stop = end.min((page + 1) * PAGE);
            ((page), (begin % PAGE) as usize, (stop - begin) as usize)
        })
    }
}

impl StorageBackend for Unwritten {
    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().length)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let changed = self.lock();
        if offset + out.len() as u64 > changed.length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut done = 0;
        for (page, begin, length) in Self::pieces(offset, out.len()) {
            let piece = &mut out[done..done + length];
            match changed.pages.get(&page) {
                Some(bytes) => piece.copy_from_slice(&bytes[begin..begin + length]),
                None => self.read_file(&changed, page * PAGE + begin as u64, piece)?,
            }
            done += length;
        }
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let mut changed = self.lock();
        if length < changed.length {
            changed.file_end = changed.file_end.min(length);
            changed.pages.split_off(&length.div_ceil(PAGE));
            if let Some(last) = changed.pages.get_mut(&(length / PAGE)) {
                last[(length % PAGE) as usize..].fill(0);
            }
        }
        changed.length = length;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut changed = self.lock();
        changed.length = changed.length.max(offset + data.len() as u64);
        let mut done = 0;
        for (page, begin, length) in Self::pieces(offset, data.len()) {
            let mut bytes = match changed.pages.remove(&page) {
                Some(bytes) => bytes,
                None => {
                    let mut bytes = vec![0; PAGE as usize].into_boxed_slice();
                    self.read_file(&changed, page * PAGE, &mut bytes)?;
                    bytes
                }
            };
            bytes[begin..begin + length].copy_from_slice(&data[done..done + length]);
            changed.pages.insert(page, bytes);
            done += length;
        }
        Ok(())
    }

    // Nobody else sees what changes here, and who writes the file meanwhile is seen at the next opening.
    fn try_lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<bool, BackendError> {
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same as on a vector, whatever is done, and the file stays as it is.
    #[test]
    fn it_is_as_if_it_was_written_and_the_file_stays_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let mut random = fastrand::Rng::with_seed(1);
        for round in 0..50 {
            let before: Vec<u8> = (0..random.usize(..20_000)).map(|_| random.u8(1..)).collect();
            std::fs::write(&path, &before).unwrap();
            let file = Unwritten::open(&path).unwrap();
            let mut expected = before.clone();
            for _ in 0..40 {
                if random.u8(..4) == 0 {
                    let length = random.usize(..25_000);
                    file.set_len(length as u64).unwrap();
                    expected.resize(length, 0);
                } else {
                    let data = vec![random.u8(1..); random.usize(1..9_000)];
                    let offset = random.usize(..20_000);
                    expected.resize(expected.len().max(offset + data.len()), 0);
                    expected[offset..offset + data.len()].copy_from_slice(&data);
                    file.write(offset as u64, &data).unwrap();
                }
                assert_eq!(file.len().unwrap(), expected.len() as u64, "round {round}");
                let offset = random.usize(..=expected.len());
                let mut out = vec![9; random.usize(..=expected.len() - offset)];
                file.read(offset as u64, &mut out).unwrap();
                assert!(out == expected[offset..offset + out.len()], "round {round}");
                assert!(
                    file.read(offset as u64, &mut vec![0; expected.len() - offset + 1])
                        .is_err()
                );
            }
            assert_eq!(std::fs::read(&path).unwrap(), before);
        }
    }
}
