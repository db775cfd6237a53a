//! Disks that lose power: what was not forced to them is lost, kept or torn by sectors.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use replica::{MemorySnapshots, Storage, StorageBackend};

/// A disk that keeps unsynced writes apart, so that a crash can lose or tear them; clones are the same disk.
#[derive(Debug, Clone)]
pub(super) struct Disk(Arc<Mutex<DiskState>>);

/// The power of a machine: its disks lose it at the same moment.
#[derive(Debug, Clone, Default)]
pub(super) struct Power(Arc<Mutex<Supply>>);

#[derive(Debug, Default)]
enum Supply {
    #[default]
    Good,
    /// It goes after so many more writes and syncs.
    GoesAfter(u64),
    /// The power stays, but no sync succeeds.
    NoSync,
}

impl Power {
    fn supply(&self) -> std::sync::MutexGuard<'_, Supply> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails after that many more writes and syncs.
    pub(super) fn fail_after(&self, steps: u64) {
        *self.supply() = Supply::GoesAfter(steps);
    }

    /// Fails every sync from now on.
    pub(super) fn fail_syncs(&self) {
        *self.supply() = Supply::NoSync;
    }

    fn restore(&self) {
        *self.supply() = Supply::Good;
    }

    fn step(&self, is_sync: bool) -> io::Result<()> {
        match &mut *self.supply() {
            Supply::GoesAfter(0) => Err(io::Error::other("the power is gone")),
            Supply::GoesAfter(left) => {
                *left -= 1;
                Ok(())
            }
            Supply::NoSync if is_sync => Err(io::Error::other("the disk does not sync")),
            Supply::NoSync | Supply::Good => Ok(()),
        }
    }
}

#[derive(Debug)]
struct DiskState {
    /// What survives a crash for certain.
    synced: Vec<u8>,
    /// What is read back now.
    current: Vec<u8>,
    /// Since the last sync, in order.
    unsynced: Vec<Change>,
    random: fastrand::Rng,
    power: Power,
    /// Whose lock it is: a restart after a crash makes a new one.
    generation: u64,
}

#[derive(Debug, Clone)]
enum Change {
    Write(u64, Vec<u8>),
    Length(u64),
}

fn change(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Length(length) => bytes.resize(usize::try_from(*length).expect("64 bits"), 0),
        Change::Write(offset, data) => {
            let offset = usize::try_from(*offset).expect("64 bits");
            let end = offset + data.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[offset..end].copy_from_slice(data);
        }
    }
}

impl Disk {
    pub(super) fn new(seed: u64, power: Power) -> Self {
        Self(Arc::new(Mutex::new(DiskState {
            synced: Vec::new(),
            current: Vec::new(),
            unsynced: Vec::new(),
            random: fastrand::Rng::with_seed(seed),
            power,
            generation: 0,
        })))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, DiskState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Comes back after a loss of power: each unsynced write is there, is not, or is there in part.
    pub(super) fn restart(&self) {
        let mut state = self.state();
        let state = &mut *state;
        let mut bytes = std::mem::take(&mut state.synced);
        for unsynced in std::mem::take(&mut state.unsynced) {
            match unsynced {
                // File systems order a change of length among the writes; a longer file may come without them.
                Change::Length(_) if state.random.bool() => change(&mut bytes, &unsynced),
                Change::Length(_) => {}
                Change::Write(offset, data) => {
                    let kept = match state.random.u8(0..3) {
                        0 => continue,
                        1 => data.len(),
                        // Sectors reach the disk whole.
                        _ => state.random.usize(0..=data.len()) / 512 * 512,
                    };
                    // A write beyond the end that the file never got is lost with it.
                    let end = usize::try_from(offset).expect("64 bits") + kept;
                    if kept > 0 && end <= bytes.len() {
                        change(&mut bytes, &Change::Write(offset, data[..kept].to_vec()));
                    }
                }
            }
        }
        state.synced.clone_from(&bytes);
        state.current = bytes;
        state.generation += 1;
    }

    pub(super) fn backend(&self) -> Box<dyn StorageBackend> {
        Box::new(Mounted {
            disk: self.clone(),
            generation: self.state().generation,
        })
    }
}

/// A disk as one run sees it: after a restart, what the previous run still holds reaches nothing.
#[derive(Debug)]
struct Mounted {
    disk: Disk,
    generation: u64,
}

impl Mounted {
    fn state(&self) -> io::Result<std::sync::MutexGuard<'_, DiskState>> {
        let state = self.disk.state();
        if state.generation == self.generation {
            Ok(state)
        } else {
            Err(io::Error::other("the power was gone"))
        }
    }
}

impl StorageBackend for Mounted {
    fn len(&self) -> io::Result<u64> {
        Ok(self.state()?.current.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.state()?;
        let offset = usize::try_from(offset).expect("64 bits");
        let bytes = state.current.get(offset..offset + out.len());
        out.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.state()?;
        state.power.step(false)?;
        let length = Change::Length(len);
        change(&mut state.current, &length);
        state.unsynced.push(length);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.state()?;
        state.power.step(true)?;
        let state = &mut *state;
        for unsynced in state.unsynced.drain(..) {
            change(&mut state.synced, &unsynced);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.state()?;
        state.power.step(false)?;
        let write = Change::Write(offset, data.to_vec());
        change(&mut state.current, &write);
        state.unsynced.push(write);
        Ok(())
    }
}

/// The disks of one member.
#[derive(Debug, Clone)]
pub(super) struct Disks {
    pub(super) power: Power,
    log: Disk,
    state: Disk,
    snapshots: MemorySnapshots,
}

impl Disks {
    pub(super) fn new(seed: u64) -> Self {
        let power = Power::default();
        let (log, state) = (Disk::new(seed, power.clone()), Disk::new(!seed, power.clone()));
        Self {
            power,
            log,
            state,
            snapshots: MemorySnapshots::default(),
        }
    }

    /// The disks as the next life of the member gets them.
    pub(super) fn storage(&self) -> Storage {
        Storage::Backend {
            log: self.log.backend(),
            state: self.state.backend(),
            snapshots: self.snapshots.clone(),
        }
    }

    /// The machine comes back after a loss of power.
    pub(super) fn restart(&self) {
        self.power.restore();
        self.log.restart();
        self.state.restart();
    }
}
