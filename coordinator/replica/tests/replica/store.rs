//! What the tests share: a counter machine whose published state can be read, a backend that loses unsynced
//! writes, and short ways to open a replica.

use replica::{Config, MemorySnapshots, Replica, RowChange, StateMachine, Storage, Writer};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// What the machine published at its last `applied`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Published {
    pub(crate) index: u64,
    /// Commands in the order in which they were applied.
    pub(crate) applied: Vec<Vec<u8>>,
    pub(crate) rows: BTreeMap<(u8, Vec<u8>), Vec<u8>>,
}

/// Appends every command to a list: row (1, position) holds the command, row (0, "count") their number. The
/// reply is the position.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    next: u64,
    rows: BTreeMap<(u8, Vec<u8>), Vec<u8>>,
    changed: Vec<RowChange>,
    pub(crate) published: Arc<Mutex<Published>>,
}

impl Journal {
    pub(crate) fn new() -> (Box<Self>, Arc<Mutex<Published>>) {
        let machine = Box::<Self>::default();
        let published = machine.published.clone();
        (machine, published)
    }

    fn put(&mut self, table: u8, key: Vec<u8>, value: Vec<u8>) {
        self.rows.insert((table, key.clone()), value.clone());
        self.changed.push(RowChange {
            table,
            key,
            value: Some(value),
        });
    }
}

impl StateMachine for Journal {
    fn apply(&mut self, command: &[u8]) -> Vec<u8> {
        assert_ne!(command, b"panic", "the test wants a panic");
        let position = self.next;
        self.next += 1;
        self.put(1, position.to_be_bytes().to_vec(), command.to_vec());
        self.put(0, b"count".to_vec(), self.next.to_be_bytes().to_vec());
        position.to_be_bytes().to_vec()
    }

    fn changed_rows(&mut self) -> Vec<RowChange> {
        std::mem::take(&mut self.changed)
    }

    fn load(&mut self, rows: &mut dyn Iterator<Item = (u8, Vec<u8>, Vec<u8>)>) -> Result<(), String> {
        self.changed.clear();
        self.rows = rows.map(|(table, key, value)| ((table, key), value)).collect();
        self.next = self.rows.keys().filter(|(table, _)| *table == 1).count() as u64;
        let count = self.rows.get(&(0, b"count".to_vec()));
        let count = count.map_or(0, |bytes| {
            u64::from_be_bytes(bytes.as_slice().try_into().expect("8 bytes"))
        });
        if count == self.next {
            Ok(())
        } else {
            Err(format!("{count} counted, {} rows", self.next))
        }
    }

    fn applied(&mut self, index: u64) {
        let applied = self
            .rows
            .iter()
            .filter(|((table, _), _)| *table == 1)
            .map(|(_, v)| v.clone())
            .collect();
        let rows = self.rows.clone();
        *self.published.lock().expect("no test panics with it") = Published { index, applied, rows };
    }
}

pub(crate) fn position(reply: &[u8]) -> u64 {
    u64::from_be_bytes(reply.try_into().expect("a position is 8 bytes"))
}

pub(crate) fn files(directory: &Path) -> Config {
    Config::new(
        "test",
        1,
        Storage::Files {
            directory: directory.to_owned(),
        },
    )
}

pub(crate) async fn open(config: Config) -> (Replica, Arc<Mutex<Published>>) {
    let (machine, published) = Journal::new();
    let replica = Replica::open(config, machine, Arc::new(replica::Unconnected))
        .await
        .expect("the store is sound");
    (replica, published)
}

/// What the message of a refused open says.
pub(crate) async fn refusal(config: Config) -> String {
    let (machine, _) = Journal::new();
    match Replica::open(config, machine, Arc::new(replica::Unconnected)).await {
        Ok(_) => panic!("the store must be refused"),
        Err(error) => error.to_string(),
    }
}

/// A disk that keeps unsynced writes apart, so that a crash can lose or tear them, and that can run full or
/// fail to sync. Clones are the same disk.
#[derive(Debug, Clone)]
pub(crate) struct Disk(Arc<Mutex<DiskState>>);

/// The power of a machine: its disks lose it at the same moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Power(Arc<Mutex<Option<u64>>>);

impl Power {
    /// Fails after that many more writes and syncs; `None` is never.
    pub(crate) fn fail_after(&self, steps: Option<u64>) {
        *self.0.lock().expect("no test panics with it") = steps;
    }

    fn step(&self) -> io::Result<()> {
        match &mut *self.0.lock().expect("no test panics with it") {
            Some(0) => Err(io::Error::other("the power is gone")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
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
    full: bool,
    syncs_fail: bool,
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
    pub(crate) fn new(seed: u64, power: Power) -> Self {
        Self(Arc::new(Mutex::new(DiskState {
            synced: Vec::new(),
            current: Vec::new(),
            unsynced: Vec::new(),
            random: fastrand::Rng::with_seed(seed),
            power,
            full: false,
            syncs_fail: false,
            generation: 0,
        })))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, DiskState> {
        self.0.lock().expect("no test panics with it")
    }

    pub(crate) fn fill(&self, full: bool) {
        self.state().full = full;
    }

    pub(crate) fn fail_syncs(&self, fail: bool) {
        self.state().syncs_fail = fail;
    }

    /// Comes back after a loss of power: each unsynced write is there, is not, or is there in part.
    pub(crate) fn restart(&self) {
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

    pub(crate) fn backend(&self) -> Box<dyn replica::StorageBackend> {
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

impl replica::StorageBackend for Mounted {
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
        state.power.step()?;
        if state.full && len > state.current.len() as u64 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let length = Change::Length(len);
        change(&mut state.current, &length);
        state.unsynced.push(length);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.state()?;
        state.power.step()?;
        if state.syncs_fail {
            return Err(io::Error::other("the disk does not answer"));
        }
        let state = &mut *state;
        for unsynced in state.unsynced.drain(..) {
            change(&mut state.synced, &unsynced);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.state()?;
        state.power.step()?;
        if state.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let write = Change::Write(offset, data.to_vec());
        change(&mut state.current, &write);
        state.unsynced.push(write);
        Ok(())
    }
}

/// The disks of one member.
#[derive(Debug, Clone)]
pub(crate) struct Disks {
    pub(crate) power: Power,
    pub(crate) log: Disk,
    pub(crate) state: Disk,
    pub(crate) snapshots: MemorySnapshots,
}

impl Disks {
    pub(crate) fn new(seed: u64) -> Self {
        let power = Power::default();
        let (log, state) = (Disk::new(seed, power.clone()), Disk::new(!seed, power.clone()));
        Self {
            power,
            log,
            state,
            snapshots: MemorySnapshots::default(),
        }
    }

    /// A replica without threads over these disks.
    pub(crate) fn config(&self, seed: u64) -> Config {
        let (log, state) = (self.log.backend(), self.state.backend());
        let storage = Storage::Backend {
            log,
            state,
            snapshots: self.snapshots.clone(),
        };
        let mut config = Config::new("test", 1, storage);
        config.writer = Writer::Inline;
        config.seed = Some(seed);
        config
    }

    /// The machine comes back after a loss of power.
    pub(crate) fn restart(&self) {
        self.power.fail_after(None);
        self.log.restart();
        self.state.restart();
    }
}
