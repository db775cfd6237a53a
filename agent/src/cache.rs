//! The model-cache cleaner: keeps `<cache>/<chute id>/` folders within age, size and free-space limits, as a
//! background task and off every launch path.
//!
//! Reading order: [`policy`] (pure), [`sweep`] (scan, delete), this page (leases, when). Until the first
//! leases have come nothing is deleted: unknown is not empty.

pub mod policy;
pub mod sweep;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::cache::policy::{Leases, Limits, plan};
use crate::cache::sweep::{Error, Sweeper};
use crate::config::units::{Size, Span};
use coordinator::clock::Clock;

/// Settings as written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RawConfig {
    /// The folder with one folder per chute; none means that nothing is cleaned.
    pub directory: Option<PathBuf>,
    /// What was not used for so long goes.
    pub age_max: Span,
    /// Everything together stays below this.
    pub bytes_max: Size,
    /// So much stays free on the file system.
    pub free_bytes_min: Size,
    /// How often to look.
    pub interval: Span,
}

impl Default for RawConfig {
    fn default() -> Self {
        Self {
            directory: None,
            age_max: Span::seconds(30 * 86_400),
            bytes_max: Size(500 << 30),
            free_bytes_min: Size(50 << 30),
            interval: Span::seconds(600),
        }
    }
}

/// Settings as checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The folder with one folder per chute.
    pub directory: PathBuf,
    /// Limits.
    pub limits: Limits,
    /// How often to look.
    pub interval: Duration,
}

/// Why settings are refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidConfig {
    /// Too close to everything else.
    #[error("cache.directory = {0:?} must be an absolute path at least two levels below /, without \"..\"")]
    Directory(PathBuf),
    /// A limit of nothing.
    #[error("cache.{0} must be more than zero")]
    Zero(&'static str),
}

impl Config {
    /// Checks settings; `None` when there is no folder to clean.
    ///
    /// # Errors
    /// [`InvalidConfig`].
    pub fn check(raw: &RawConfig) -> Result<Option<Self>, InvalidConfig> {
        let Some(directory) = &raw.directory else {
            return Ok(None);
        };
        let parent_steps = directory
            .components()
            .any(|part| part == std::path::Component::ParentDir);
        if !directory.is_absolute() || parent_steps || directory.components().count() < 3 {
            return Err(InvalidConfig::Directory(directory.clone()));
        }
        let limits = [
            ("age_max", raw.age_max.0.is_zero()),
            ("bytes_max", raw.bytes_max.0 == 0),
            ("interval", raw.interval.0.is_zero()),
        ];
        if let Some((name, _)) = limits.iter().find(|(_, zero)| *zero) {
            return Err(InvalidConfig::Zero(name));
        }
        Ok(Some(Self {
            directory: directory.clone(),
            limits: Limits {
                age_max: raw.age_max.0,
                bytes_max: raw.bytes_max.0,
                free_bytes_min: raw.free_bytes_min.0,
            },
            interval: raw.interval.0,
        }))
    }
}

/// Which chutes must keep their models; `None` until someone has said.
///
/// An eviction holds the read side while it renames, so once [`SharedLeases::replace`] has returned nothing
/// of a chute that it names goes any more.
#[derive(Debug, Clone, Default)]
pub struct SharedLeases(Arc<RwLock<Option<Leases>>>);

impl SharedLeases {
    /// Replaces what is known.
    pub fn replace(&self, leases: Leases) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(leases);
    }

    fn get(&self) -> Option<Leases> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Runs `work` if the chute has no lease, keeping leases as they are meanwhile.
    fn unless_running<T>(&self, chute: &protocol::id::ChuteId, work: impl FnOnce() -> T) -> Option<T> {
        let leases = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let free = leases
            .as_ref()
            .is_some_and(|leases| !leases.running.contains(chute));
        free.then(work)
    }
}

/// Counters of the cleaner.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    /// Bytes in the cache after the last sweep.
    pub bytes: Gauge,
    /// Items deleted.
    pub evictions: Counter,
    /// Bytes deleted.
    pub evicted_bytes: Counter,
    /// Sweeps that ended with an error.
    pub failures: Counter,
}

impl Metrics {
    /// Puts all counters into a registry of metrics.
    pub fn register(&self, registry: &mut Registry) {
        let group = registry.sub_registry_with_prefix("cache");
        group.register(
            "bytes",
            "Bytes in the model cache after the last sweep",
            self.bytes.clone(),
        );
        group.register("evictions", "Models deleted", self.evictions.clone());
        group.register("evicted_bytes", "Bytes deleted", self.evicted_bytes.clone());
        group.register(
            "failures",
            "Sweeps that ended with an error",
            self.failures.clone(),
        );
    }
}

/// One sweep. Does nothing until leases are known. Blocks.
///
/// # Errors
/// [`Error`]; a single item that cannot go is only warned about.
pub fn sweep_once(
    config: &Config,
    leases: &SharedLeases,
    metrics: &Metrics,
    now: UnixMillis,
) -> Result<(), Error> {
    let Some(known) = leases.get() else {
        tracing::debug!("the cache is not swept: no leases received yet");
        return Ok(());
    };
    let mut sweeper = Sweeper::open(&config.directory)?;
    let found = sweeper.scan()?;
    let mut bytes = found
        .items
        .iter()
        .fold(found.other_bytes, |sum, item| sum.saturating_add(item.bytes));
    for gone in plan(
        found.items,
        found.other_bytes,
        &known,
        config.limits,
        found.free_bytes,
        now,
    ) {
        let item = &gone.item;
        match leases.unless_running(&item.chute, || sweeper.evict(item)) {
            Some(Ok(())) => {
                tracing::info!(chute = %item.chute, place = ?item.place, bytes = item.bytes, cause = ?gone.cause, "evicted from the model cache");
                metrics.evictions.inc();
                metrics.evicted_bytes.inc_by(item.bytes);
                bytes = bytes.saturating_sub(item.bytes);
            }
            Some(Err(error)) => {
                tracing::warn!(chute = %item.chute, place = ?item.place, %error, "not evicted")
            }
            None => tracing::info!(chute = %item.chute, "kept: the chute was leased in the meantime"),
        }
    }
    sweeper.empty_trash()?;
    metrics.bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    Ok(())
}

/// Sweeps now and then until `shutdown`.
pub async fn run(
    config: Config,
    leases: SharedLeases,
    metrics: Metrics,
    clock: Arc<dyn Clock>,
    shutdown: CancellationToken,
) {
    loop {
        let (settings, known, counters, now) = (config.clone(), leases.clone(), metrics.clone(), clock.now());
        let swept = on_thread(move || sweep_once(&settings, &known, &counters, now)).await;
        if let Err(error) = swept
            .map_err(io::Error::other)
            .and_then(|swept| swept.map_err(io::Error::other))
        {
            metrics.failures.inc();
            tracing::warn!(%error, "sweep the model cache");
        }
        tokio::select! {
            () = tokio::time::sleep(config.interval) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a sweep is blocking file work; this is the seam that owns its thread"
)]
fn on_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> tokio::task::JoinHandle<T> {
    tokio::task::spawn_blocking(work)
}
