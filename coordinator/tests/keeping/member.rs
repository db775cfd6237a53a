//! A member with its files in a temporary folder, and a cluster in its state.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use coordinator::backup::{Place, Settings, Snapshots};
use coordinator::clock::ManualClock;
use coordinator::member::ReplicatedLog;
use coordinator::signer::SealedKind;
use coordinator::signer::key::{Key, Seed};
use coordinator::store::{Machine, Store};
use coordinator_core::state_machine::command::PayProfile;
use coordinator_core::state_machine::host::NewHost;
use coordinator_core::state_machine::{Command, Faults};
use protocol::hotkey::Signer;
use protocol::id::ServerId;
use protocol::snapshot_file::SnapshotKey;
use protocol::time::UnixMillis;
use replica::{Replica, Storage, Unconnected};

/// 2027-01-15.
pub(crate) const START: UnixMillis = UnixMillis(1_800_000_000_000);
pub(crate) const CLUSTER: &str = "miner-1";

pub(crate) fn key() -> SnapshotKey {
    SnapshotKey::new([3; 32])
}

/// The miner's seed.
pub(crate) fn seed() -> Key {
    Key::new(&Seed::new([0x5e; 32]))
}

pub(crate) fn server(name: &str) -> ServerId {
    ServerId::parse(name).unwrap()
}

pub(crate) fn host(name: &str, key: u8) -> NewHost {
    NewHost {
        server: server(name),
        name: name.to_owned(),
        site: "east".to_owned(),
        address: format!("{name}.example:4433"),
        key_hash: [key; 32],
    }
}

/// A member that runs.
pub(crate) struct Member {
    pub(crate) folder: PathBuf,
    pub(crate) replica: Replica,
    pub(crate) store: Store,
    pub(crate) machine: Machine,
    pub(crate) clock: ManualClock,
}

impl Member {
    /// Opens the store in `folder/raft`.
    pub(crate) async fn open(folder: &Path, id: u64) -> Result<Self, replica::Error> {
        let machine = Machine::new(Faults::none());
        let storage = Storage::Files {
            directory: folder.join("raft"),
        };
        let config = replica::Config::new(CLUSTER, id, storage);
        let replica = Replica::open(config, Box::new(machine.clone()), Arc::new(Unconnected)).await?;
        let log = Arc::new(ReplicatedLog::new(replica.clone()));
        let clock = ManualClock::at(START);
        let store = Store::new(machine.clone(), log, Arc::new(clock.clone()), id);
        Ok(Self {
            folder: folder.to_owned(),
            replica,
            store,
            machine,
            clock,
        })
    }

    /// A cluster with an authority, configured.
    pub(crate) async fn founded(folder: &Path) -> Self {
        let member = Self::open(folder, 1).await.expect("an empty folder");
        let sealed_key = seed()
            .seal(SealedKind::ClusterCaKey, b"the authority's key")
            .unwrap();
        member
            .propose(Command::FoundCluster {
                authority_pem: "certificate".to_owned(),
                sealed_key,
                founder: host("first", 1),
            })
            .await;
        let validator = Signer::from_seed(&[2; 32]).hotkey().clone();
        member
            .propose(Command::Configure {
                miner: seed().hotkey().clone(),
                validators: BTreeSet::from([validator]),
                pay_profile: PayProfile::Of2026,
            })
            .await;
        member
    }

    pub(crate) async fn propose(&self, command: Command) {
        self.store.propose(command).await.expect("the rules allow it");
    }

    pub(crate) fn snapshots(&self) -> Snapshots {
        Snapshots::new(CLUSTER.to_owned(), self.store.clone(), self.replica.clone())
    }

    pub(crate) fn settings(&self, place: Place, keep: usize) -> Settings {
        Settings {
            every: Duration::from_secs(60 * 60),
            keep,
            recipient: key().recipient(),
            place,
            spool: self.folder.join("backup.part"),
        }
    }

    /// Later by so many minutes.
    pub(crate) fn pass_minutes(&self, minutes: u64) {
        use coordinator::clock::Clock as _;
        self.clock.set(self.clock.now() + minutes * 60_000);
    }

    /// A snapshot as a file.
    pub(crate) async fn saved(&self, to: &Path) {
        let mut stream = self.snapshots().sealed(&key().recipient()).await.unwrap();
        let mut file = Vec::new();
        while let Some(piece) = stream.next().await.unwrap() {
            file.extend(piece);
        }
        std::fs::write(to, file).unwrap();
    }
}
