//! The cache cleaner on real folders: what goes, what stays, and what it must never follow.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent::cache::policy::{Item, Leases, Limits, Place};
use agent::cache::sweep::{Error, Sweeper};
use agent::cache::{Config, Metrics, RawConfig, SharedLeases, sweep_once};
use protocol::id::ChuteId;
use protocol::time::UnixMillis;

const KIB: usize = 1024;
/// Later than any file that a test writes, by ten years.
const FAR: UnixMillis = UnixMillis(2_100_000_000_000);

struct Cache {
    folder: tempfile::TempDir,
    metrics: Metrics,
    leases: SharedLeases,
}

impl Cache {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().expect("a folder"),
            metrics: Metrics::default(),
            leases: SharedLeases::default(),
        }
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("cache")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    fn write(&self, name: &str, bytes: usize) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("below the root")).expect("made");
        fs::write(path, vec![7; bytes]).expect("written");
    }

    fn lease(&self, running: &[&str]) {
        let running: BTreeSet<ChuteId> = running.iter().map(|name| chute(name)).collect();
        self.leases.replace(Leases {
            running,
            last_deployed: BTreeMap::new(),
        });
    }

    /// Sweeps with limits that everything old breaks.
    fn sweep_old(&self) -> Result<(), Error> {
        let limits = Limits {
            age_max: Duration::from_secs(86_400),
            bytes_max: u64::MAX,
            free_bytes_min: 0,
        };
        let config = Config {
            directory: self.root(),
            limits,
            interval: Duration::from_secs(1),
        };
        sweep_once(&config, &self.leases, &self.metrics, FAR)
    }
}

fn chute(name: &str) -> ChuteId {
    ChuteId::parse(name).expect("valid")
}

#[test]
fn old_models_go_one_by_one_and_the_chutes_folder_stays() {
    let cache = Cache::new();
    cache.write("c1/hub/models--a--b/blobs/1", 100 * KIB);
    cache.write("c1/hub/datasets--a--b/blobs/1", KIB);
    cache.write("c1/hub/version.txt", 1);
    cache.write("c1/civitai/model.safetensors", 10 * KIB);
    cache.write("c1/civitai/notes.txt", 1);
    cache.write("c1/state/own.db", KIB);
    cache.write("c2/hub/models--c--d/blobs/1", KIB);
    cache.write("hub/models--shared--old/blobs/1", KIB);
    cache.write("stray file", 1);
    symlink("../blobs/1", cache.path("c1/hub/models--a--b/link")).expect("linked");
    cache.lease(&["c2"]);
    cache.sweep_old().expect("swept");
    for gone in [
        "c1/hub/models--a--b",
        "c1/hub/datasets--a--b",
        "c1/civitai/model.safetensors",
    ] {
        assert!(!cache.path(gone).exists(), "{gone}");
    }
    // A folder "hub" at the top is no chute's: what looks like a model in it is nobody's item.
    for kept in [
        "c1/hub/version.txt",
        "c1/civitai/notes.txt",
        "c1/state/own.db",
        "c2/hub/models--c--d/blobs/1",
        "hub/models--shared--old/blobs/1",
        "stray file",
    ] {
        assert!(cache.path(kept).exists(), "{kept}");
    }
    assert_eq!(cache.metrics.evictions.get(), 3);
    assert!(cache.metrics.evicted_bytes.get() >= 111 * KIB as u64);
    assert_eq!(
        fs::read_dir(cache.path(".chutes-trash")).expect("listed").count(),
        0
    );
}

#[test]
fn nothing_goes_before_leases_are_known() {
    let cache = Cache::new();
    cache.write("c1/hub/models--a--b/blobs/1", KIB);
    cache.sweep_old().expect("nothing to do");
    assert!(cache.path("c1/hub/models--a--b/blobs/1").exists());
    cache.lease(&[]);
    cache.sweep_old().expect("swept");
    assert!(!cache.path("c1/hub/models--a--b").exists());
}

#[test]
fn symlinks_are_never_followed_out() {
    let cache = Cache::new();
    let outside = cache.folder.path().join("outside");
    fs::create_dir_all(outside.join("hub/models--x--y")).expect("made");
    fs::write(outside.join("hub/models--x--y/precious"), "x").expect("written");
    fs::create_dir_all(cache.path("c1/hub/models--a--b")).expect("made");
    fs::create_dir_all(cache.path("c3/hub")).expect("made");
    // The chute's folder, its hub, a model, and something inside a model, each as a link.
    symlink(&outside, cache.path("c2")).expect("linked");
    fs::create_dir_all(cache.path("c4")).expect("made");
    symlink(outside.join("hub"), cache.path("c4/hub")).expect("linked");
    symlink(
        outside.join("hub/models--x--y"),
        cache.path("c3/hub/models--x--y"),
    )
    .expect("linked");
    symlink(&outside, cache.path("c1/hub/models--a--b/snapshots")).expect("linked");
    cache.lease(&[]);
    cache.sweep_old().expect("swept");
    assert!(outside.join("hub/models--x--y/precious").exists());
    assert!(
        !cache.path("c1/hub/models--a--b").exists(),
        "the model itself went"
    );
    assert_eq!(cache.metrics.evictions.get(), 1);

    // A folder that becomes a link between scan and eviction is refused.
    let mut sweeper = Sweeper::open(&cache.root()).expect("free");
    let item = Item {
        chute: chute("c4"),
        place: Place::Hub("models--x--y".to_owned()),
        bytes: 1,
        touched_at: UnixMillis(0),
    };
    assert!(matches!(sweeper.evict(&item), Err(Error::Io { .. })));
    assert!(outside.join("hub/models--x--y/precious").exists());
}

#[test]
fn only_one_sweeper_runs() {
    let cache = Cache::new();
    cache.write("c1/hub/models--a--b/blobs/1", KIB);
    cache.lease(&[]);
    let first = Sweeper::open(&cache.root()).expect("free");
    assert!(matches!(cache.sweep_old(), Err(Error::Locked(_))));
    assert!(cache.path("c1/hub/models--a--b").exists());
    drop(first);
    cache.sweep_old().expect("free again");
}

#[test]
fn a_sweep_that_was_cut_off_is_finished_by_the_next() {
    let cache = Cache::new();
    cache.write(".chutes-trash/1/blobs/x", KIB);
    drop(Sweeper::open(&cache.root()).expect("free"));
    assert!(!cache.path(".chutes-trash/1").exists());
}

#[test]
fn folders_that_are_too_much_are_refused() {
    let check = |directory: &str| {
        Config::check(&RawConfig {
            directory: Some(Path::new(directory).to_owned()),
            ..RawConfig::default()
        })
    };
    for bad in ["/", "/var", "cache", "/var/snap/../..", ""] {
        assert!(check(bad).is_err(), "{bad}");
    }
    assert!(check("/var/snap/cache").expect("fine").is_some());
    assert_eq!(Config::check(&RawConfig::default()), Ok(None));
}
