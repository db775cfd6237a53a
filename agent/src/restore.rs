//! `restore`: a snapshot file becomes the store of this machine, which is then the only member of its cluster.
//!
//! The agent must not run, and must not have run here: the machine gets a key of its own, and the old one's store and
//! certificate are not touched. What is written, in this order: the store in `coordinator/raft`; the host's key, and
//! its certificate by the authority that the snapshot holds, sealed with the miner's seed; the admission, which says
//! that the rest is whole.

use std::fs;
use std::path::{Path, PathBuf};

use agent::config::checked::{Joining, certificates_folder, coordinator_folder, joining};
use agent::config::{self, Sources, Written};
use agent::processes::{Lock, private_folder};
use agent::signer::read_seed;
use anyhow::{Context as _, ensure};
use coordinator::backup::restore::Restoring;
use coordinator::clock::{Clock as _, WallClock};
use coordinator::identity::{Authority, HOST_KEY, HostKey, LIFE_MS, Names, key_hash};
use coordinator::join::wire::Granted;
use coordinator::join::{Admission, admission};
use coordinator::signer::{Key, SealedKind};
use coordinator_core::state_machine::host::NewHost;
use protocol::snapshot_file::SnapshotKey;
use protocol::time::UnixMillis;

use crate::setup::{runtime, say};

/// What is restored, and from what.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The snapshot
    file: PathBuf,
    /// Key file that opens it
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// Id of the cluster, typed by hand: it must be the one in the snapshot (`chutes-miner snapshot inspect FILE`)
    #[arg(long)]
    cluster: String,
}

/// Restores a snapshot into this machine's empty data folder.
///
/// # Errors
/// With a chain of reasons; a store that was there is left as it is.
pub(crate) fn restore(sources: &Sources, arguments: &Arguments) -> anyhow::Result<()> {
    let (written, _) = config::read(sources)?;
    ensure!(
        written.coordinator.enabled,
        "coordinator.enabled is false: only a member of the coordinator can be restored"
    );
    let place = joining(&written).map_err(anyhow::Error::msg)?;
    let seed = seed(&written)?;
    let key = snapshot_key(&arguments.key)?;

    private_folder(&written.data)?;
    let _lock = Lock::take(&written.data).context("stop the agent first")?;
    let (coordinator, folder) = (
        coordinator_folder(&written.data),
        certificates_folder(&written.data),
    );
    let store = coordinator.join("raft");
    refuse_remains(&store, &folder)?;
    private_folder(&coordinator)?;
    let restoring = Restoring::open(&arguments.file, &key, &arguments.cluster, &coordinator)?;
    let authority = authority(&restoring, &seed)?;

    private_folder(&folder)?;
    let own = HostKey::open_or_make(&folder)?.public();
    let now = WallClock.now();
    let done = format!(
        "cluster {} restored as of {}: {} rows, log index {}",
        restoring.head().cluster,
        restoring.head().created_at,
        restoring.summary().rows.values().sum::<u64>(),
        restoring.head().last_index,
    );
    let lost_after = restoring.head().created_at;
    let host = introduced(&place, &own);
    let member = runtime()?.block_on(restoring.into_store(host, store, now))?;
    let granted = granted(&arguments.cluster, &place, member, &own, &authority, now)?;
    admission::keep(&folder, &granted)?;

    say(&format!(
        "{done}\nhost {} is member {member}, the only one. What happened after {lost_after} is lost\nnext: see to it \
         that no member of before starts again on its old data; start the agent; invite the others anew with \
         chutes-miner host invite --eligible",
        place.name
    ))
}

fn seed(written: &Written) -> anyhow::Result<Key> {
    let file = written.miner.seed_file.as_ref();
    let file = file.context("miner.seed_file is missing: the cluster's authority is sealed with the seed")?;
    Ok(Key::new(&read_seed(file).context("miner.seed_file")?))
}

fn snapshot_key(file: &Path) -> anyhow::Result<SnapshotKey> {
    let reading = || format!("read the key file {}", file.display());
    let text = fs::read_to_string(file).with_context(reading)?;
    SnapshotKey::parse(&text).with_context(reading)
}

/// Refuses a machine that belongs to a cluster, or did: its key may be one that the state calls worthless.
fn refuse_remains(store: &Path, folder: &Path) -> anyhow::Result<()> {
    for remains in [
        store.to_owned(),
        folder.join(admission::FILE),
        folder.join(HOST_KEY),
    ] {
        ensure!(
            !remains.exists(),
            "{} exists: a snapshot is restored on a machine that belongs to no cluster. Move {} and {} away first, \
             and keep them until the restored cluster runs",
            remains.display(),
            store.display(),
            folder.display()
        );
    }
    Ok(())
}

/// The cluster's authority, out of the snapshot.
fn authority(restoring: &Restoring, seed: &Key) -> anyhow::Result<Authority> {
    if let Some(miner) = restoring.miner() {
        ensure!(
            miner == seed.hotkey(),
            "this is a snapshot of the miner {miner}, and miner.seed_file holds the seed of {}",
            seed.hotkey()
        );
    }
    let cluster = restoring.cluster()?;
    let opened = seed.unseal(SealedKind::ClusterCaKey, &cluster.sealed_key);
    let opened = opened.context("open the cluster's authority: is miner.seed_file this miner's seed?")?;
    let pem = String::from_utf8(opened).context("the key of the cluster's authority is no PEM")?;
    Ok(Authority::from_pem(cluster.authority_pem.clone(), &pem)?)
}

fn introduced(place: &Joining, public_key: &[u8]) -> NewHost {
    NewHost {
        server: place.server.clone(),
        name: place.name.clone(),
        site: place.site.clone(),
        address: place.address.clone(),
        key_hash: key_hash(public_key),
    }
}

/// What a member would have answered, had one been left.
fn granted(
    cluster: &str,
    place: &Joining,
    member: u64,
    public_key: &[u8],
    authority: &Authority,
    now: UnixMillis,
) -> anyhow::Result<Granted> {
    let names = Names {
        server: place.server.clone(),
        member: Some(member),
    };
    let certificate_pem = authority.issue(&names, public_key, now)?;
    Ok(Granted {
        admission: Admission {
            cluster: cluster.to_owned(),
            server: names.server,
            member: names.member,
            doors: vec![place.address.clone()],
            certificate_until: now + LIFE_MS,
            // The store is there: if it is gone one day, it was lost.
            opened: true,
        },
        certificate_pem,
        authority_pem: authority.certificate_pem().to_owned(),
    })
}
