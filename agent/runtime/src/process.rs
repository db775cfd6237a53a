//! Workloads as child processes, for development and tests. This isolates nothing: a chute runs as the
//! agent's user and sees its files. Therefore [`Process::open`] refuses unless every validator is on
//! this machine.
//!
//! Reading order: [`image`], [`pull`] and [`unpack`] (from a reference to a folder), [`ports`], [`start`]
//! (a process behind a gate), [`record`] (what is on disk, in which order), [`table`] (who is who), [`life`]
//! (all of it for one workload), [`output`], [`fault`].
//!
//! Processes outlive the agent. The next one finds them by process id, time of start and boot, and goes on
//! watching them. No deployment ever has two processes, and one whose chute was let loose once is never
//! started again.

pub mod fault;
mod image;
mod life;
mod output;
mod ports;
mod pull;
mod record;
mod start;
mod table;
mod unpack;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, TryLockError};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use protocol::id::DeploymentId;
use protocol::logs::{Log, LogQuery, WorkloadEvent};
use protocol::report::WorkloadStatus;
use protocol::workload::{Fence, PortMapping, WorkloadPhase, WorkloadSpec};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

use self::fault::Faults;
use self::life::{Origin, Workload, live};
use self::pull::Images;
use self::record::{Record, State, make_folder};
use crate::logs::Kept;
use crate::{Error, Observed, Runtime};

const LOCK: &str = ".lock";
const LOCK_ATTEMPTS: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(50);
const REMOVING: &str = ".removing-";
const LOGS: &str = "workload-logs";

/// How workloads run on this machine.
#[derive(Debug, Clone)]
pub struct Config {
    /// Folder for images, workloads and their logs.
    pub data: PathBuf,
    /// Folder that holds one folder of models for each chute.
    pub cache: PathBuf,
    /// The host's registry proxy.
    pub registry: SocketAddr,
    /// Port in the host name by which the proxy finds the validator.
    pub registry_port: u16,
    /// URLs of all configured validators.
    pub validators: Vec<String>,
    /// External ports to choose from.
    pub ports: RangeInclusive<u16>,
    /// URL of the explicit egress proxy, for old chutes libraries.
    pub egress_door: Option<String>,
    /// Time between the request to stop and the kill.
    pub stop_grace: Duration,
    /// Time between health checks until one passes; five times as long afterwards.
    pub health_period: Duration,
    /// How long a registry that is not there is asked again.
    pub pull_patience: Duration,
    /// Most bytes of an image, packed and unpacked.
    pub image_bytes_max: u64,
    /// Nothing, outside of tests.
    pub faults: Faults,
}

impl Config {
    /// The usual values.
    #[must_use]
    pub fn new(data: PathBuf, registry: SocketAddr, validators: Vec<String>) -> Self {
        Self {
            cache: data.join("cache"),
            data,
            registry,
            registry_port: 30500,
            validators,
            ports: 31000..=31999,
            egress_door: None,
            stop_grace: Duration::from_secs(10),
            health_period: Duration::from_secs(1),
            pull_patience: Duration::from_secs(600),
            image_bytes_max: 64 << 30,
            faults: Faults::none(),
        }
    }
}

/// The runtime.
#[derive(Debug)]
pub struct Process {
    host: Arc<Host>,
    tasks: Mutex<JoinSet<()>>,
}

/// What the lives of all workloads share.
#[derive(Debug)]
struct Host {
    config: Config,
    workloads_folder: PathBuf,
    /// What is left of workloads that are gone.
    kept: Kept,
    images: Images,
    client: reqwest::Client,
    boot_id: String,
    workloads: Mutex<BTreeMap<DeploymentId, Arc<Workload>>>,
    ports: Mutex<BTreeMap<DeploymentId, Vec<u16>>>,
    changes: watch::Sender<u64>,
    /// Held as long as this agent may touch the folder.
    _lock: File,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Host {
    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    fn forget(&self, deployment: &DeploymentId) {
        lock(&self.workloads).remove(deployment);
        self.changed();
    }

    /// Chooses ports while nobody else does.
    fn reserve(
        &self,
        deployment: &DeploymentId,
        choose: impl FnOnce(&BTreeSet<u16>) -> Option<Vec<PortMapping>>,
    ) -> Option<Vec<PortMapping>> {
        let mut reserved = lock(&self.ports);
        let taken = reserved.values().flatten().copied().collect();
        let chosen = choose(&taken)?;
        reserved.insert(
            deployment.clone(),
            chosen.iter().map(|port| port.external).collect(),
        );
        Some(chosen)
    }

    fn release(&self, deployment: &DeploymentId) {
        lock(&self.ports).remove(deployment);
    }

    /// Removes a workload's folder; one that is half removed is not taken for a workload.
    fn remove_folder(&self, name: &str) -> io::Result<()> {
        let aside = self.workloads_folder.join(format!("{REMOVING}{name}"));
        if_there(std::fs::remove_dir_all(&aside))?;
        if_there(std::fs::rename(self.workloads_folder.join(name), &aside))?;
        if_there(std::fs::remove_dir_all(&aside))
    }
}

fn if_there(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

impl Process {
    /// Opens the folder and adopts what runs already.
    ///
    /// # Errors
    /// [`Error::Refused`] unless every validator is on this machine, or when another agent uses the folder;
    /// [`Error::Io`] when the folder or the process table cannot be read: what runs is not known then.
    pub async fn open(config: Config) -> Result<Self, Error> {
        require_loopback(&config.validators)?;
        // The caller may have installed one already; any is fine, since no TLS is spoken here.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let data = std::path::absolute(&config.data).map_err(at("find the data folder"))?;
        let config = Config {
            cache: std::path::absolute(&config.cache).map_err(at("find the cache folder"))?,
            ..config
        };
        let workloads_folder = data.join("workloads");
        make_folder(&workloads_folder).map_err(at("make the workloads folder"))?;
        let guard = lock_folder(&workloads_folder).await?;
        let settings = pull::Settings {
            registry: config.registry,
            registry_port: config.registry_port,
            patience: config.pull_patience,
            bytes_max: config.image_bytes_max,
        };
        let images = Images::open(data.join("images"), settings).map_err(at("open the images folder"))?;
        let client = reqwest::Client::builder().no_proxy().build();
        let process = Self {
            host: Arc::new(Host {
                workloads_folder,
                kept: Kept::new(data.join(LOGS)),
                images,
                client: client.map_err(|e| at("make an HTTP client")(io::Error::other(e)))?,
                boot_id: table::boot_id().map_err(at("read the boot id"))?,
                workloads: Mutex::default(),
                ports: Mutex::default(),
                changes: watch::channel(0).0,
                _lock: guard,
                config,
            }),
            tasks: Mutex::default(),
        };
        process
            .recover()
            .map_err(at("find the workloads of the last agent"))?;
        Ok(process)
    }

    /// Gives up watching, as an agent that ends does. The processes go on.
    pub async fn close(self) {
        let mut tasks = std::mem::take(&mut *lock(&self.tasks));
        tasks.shutdown().await;
    }

    fn recover(&self) -> io::Result<()> {
        for item in std::fs::read_dir(&self.host.workloads_folder)? {
            let item = item?;
            let name = item.file_name().to_string_lossy().into_owned();
            if name.starts_with(REMOVING) {
                std::fs::remove_dir_all(item.path())?;
            } else if let (true, Ok(deployment)) = (item.file_type()?.is_dir(), DeploymentId::parse(&name)) {
                self.recover_one(deployment)?;
            }
        }
        Ok(())
    }

    fn recover_one(&self, deployment: DeploymentId) -> io::Result<()> {
        let folder = self.host.workloads_folder.join(deployment.as_str());
        let record = match Record::load(&folder) {
            Ok(record) => record,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                let reason = format!("its record cannot be read: {error}");
                let record = Record::starting(Vec::new(), String::new(), Vec::new(), 0);
                self.begin(
                    deployment,
                    Vec::new(),
                    WorkloadPhase::Stopping,
                    Origin::Lost(record, reason),
                );
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let Some(record) = record else {
            return self.host.remove_folder(deployment.as_str());
        };
        let gpus = record.gpus.clone();
        match record.state.clone() {
            // Whatever waits at the gate ends without its agent.
            State::Starting => self.host.remove_folder(deployment.as_str())?,
            State::Ended { exit_code, reason } => {
                let phase = WorkloadPhase::Ended { exit_code, reason };
                self.begin(deployment, gpus, phase, Origin::Ended);
            }
            State::Started { leader, boot_id } => {
                let same_boot = boot_id == self.host.boot_id;
                if same_boot && table::is_running(leader)? {
                    let ports = record.ports.clone();
                    let external = ports.iter().map(|port| port.external).collect();
                    lock(&self.host.ports).insert(deployment.clone(), external);
                    tracing::info!(%deployment, pid = leader.pid, "workload adopted");
                    let phase = WorkloadPhase::Running { ports, ready: false };
                    self.begin(deployment, gpus, phase, Origin::Adopted(record, leader));
                } else if same_boot && !start::was_released(&folder)? {
                    self.host.remove_folder(deployment.as_str())?;
                } else {
                    let reason = if same_boot {
                        "it ended while no agent watched it"
                    } else {
                        "the machine was started anew"
                    };
                    let origin = Origin::Lost(record, reason.to_owned());
                    self.begin(deployment, gpus, WorkloadPhase::Stopping, origin);
                }
            }
        }
        Ok(())
    }

    fn read(&self, query: &LogQuery) -> Result<Option<Log>, Error> {
        if query.previous {
            let why =
                "a workload that ended is not started again here: there is no run before the present one";
            return Err(Error::Refused(why.to_owned()));
        }
        let deployment = &query.deployment;
        let after = query.place::<u64>().map_err(Error::Refused)?;
        let phase = lock(&self.host.workloads).get(deployment).map(|it| it.phase());
        if let Some(phase) = phase {
            let folder = self.host.workloads_folder.join(deployment.as_str());
            let ended = matches!(phase, WorkloadPhase::Ended { .. });
            let (text, next) = output::read(&folder, after, ended).map_err(at("read its output"))?;
            return Ok(Some(Log {
                text,
                next: Some(next.to_string()),
                gone: false,
            }));
        }
        let kept = self.host.kept.get(deployment).map_err(Error::kept)?;
        Ok(kept.map(|remains| Log {
            text: output::kept_after(&remains, after).to_owned(),
            next: remains.end.clone(),
            gone: true,
        }))
    }

    fn begin(
        &self,
        deployment: DeploymentId,
        gpus: Vec<protocol::id::GpuId>,
        phase: WorkloadPhase,
        origin: Origin,
    ) {
        let mut workloads = lock(&self.host.workloads);
        if workloads.contains_key(&deployment) {
            return;
        }
        let workload = Arc::new(Workload::new(deployment.clone(), gpus, phase));
        workloads.insert(deployment, Arc::clone(&workload));
        drop(workloads);
        let mut tasks = lock(&self.tasks);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(live(Arc::clone(&self.host), workload, origin));
        drop(tasks);
        self.host.changed();
    }
}

impl Runtime for Process {
    fn apply<'a>(&'a self, _fence: Fence, spec: &'a WorkloadSpec) -> BoxFuture<'a, Result<(), Error>> {
        async move {
            let origin = Origin::New(Box::new(spec.clone()));
            self.begin(
                spec.deployment.clone(),
                spec.gpus.clone(),
                WorkloadPhase::Pending,
                origin,
            );
            Ok(())
        }
        .boxed()
    }

    fn stop<'a>(&'a self, deployment: &'a DeploymentId) -> BoxFuture<'a, Result<(), Error>> {
        async move {
            if let Some(workload) = lock(&self.host.workloads).get(deployment) {
                workload.ask_to_stop();
            }
            Ok(())
        }
        .boxed()
    }

    fn observe(&self) -> BoxFuture<'_, Result<Vec<Observed>, Error>> {
        let workloads = lock(&self.host.workloads);
        let observed = |workload: &Arc<Workload>| Observed {
            status: WorkloadStatus {
                deployment: workload.deployment.clone(),
                phase: workload.phase(),
            },
            gpus: workload.gpus.clone(),
        };
        std::future::ready(Ok(workloads.values().map(observed).collect())).boxed()
    }

    fn log<'a>(&'a self, query: &'a LogQuery) -> BoxFuture<'a, Result<Option<Log>, Error>> {
        std::future::ready(self.read(query)).boxed()
    }

    /// Nothing happens to a process that its phases do not say.
    fn events<'a>(
        &'a self,
        deployment: &'a DeploymentId,
    ) -> BoxFuture<'a, Result<Option<Vec<WorkloadEvent>>, Error>> {
        let runs = lock(&self.host.workloads).contains_key(deployment);
        let events = if runs {
            Ok(Some(Vec::new()))
        } else {
            let kept = self.host.kept.get(deployment).map_err(Error::kept);
            kept.map(|remains| remains.map(|remains| remains.events))
        };
        std::future::ready(events).boxed()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.host.changes.subscribe()
    }
}

fn at(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Io {
        what: what.to_owned(),
        source,
    }
}

/// A process that another agent was just starting when it died holds the lock until it has become
/// something else: a short while is waited for it.
async fn lock_folder(folder: &std::path::Path) -> Result<File, Error> {
    let path = folder.join(LOCK);
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path);
    let file = file.map_err(at("open the lock of the workloads folder"))?;
    for _ in 0..LOCK_ATTEMPTS {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => sleep(LOCK_PAUSE).await,
            Err(TryLockError::Error(source)) => return Err(at("lock the workloads folder")(source)),
        }
    }
    let text = format!(
        "another agent uses {}: two would start workloads twice",
        folder.display()
    );
    Err(Error::Refused(text))
}

/// Chutes are strangers' code. From a real validator they must not run without isolation.
fn require_loopback(validators: &[String]) -> Result<(), Error> {
    let why = "runtime = \"process\" isolates nothing: the code of chutes would run as this user, with \
               access to its files, network and other chutes";
    if validators.is_empty() {
        return Err(Error::Refused(format!(
            "{why}; no validator is configured, so none is known to be local"
        )));
    }
    let is_local = |url: &String| {
        let url = reqwest::Url::parse(url).ok()?;
        let host = url.host_str()?.trim_matches(['[', ']']);
        let local = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
        local.then_some(())
    };
    match validators.iter().find(|url| is_local(url).is_none()) {
        None => Ok(()),
        Some(url) => Err(Error::Refused(format!(
            "{why}; it is for development with a validator on this machine, and {url} is not one"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_validators_on_this_machine_are_accepted() {
        let check = |urls: &[&str]| {
            require_loopback(&urls.iter().map(|url| (*url).to_owned()).collect::<Vec<_>>()).is_ok()
        };
        assert!(check(&[
            "http://127.0.0.1:8000",
            "ws://127.0.1.9:1",
            "http://localhost",
            "http://[::1]:1"
        ]));
        for bad in [
            "https://api.example.org",
            "http://127.0.0.1.example.org",
            "http://10.0.0.1",
            "http://localhost.example.org",
            "http://user@example.org",
            "127.0.0.1",
            "",
        ] {
            assert!(!check(&["http://127.0.0.1", bad]), "{bad:?}");
        }
        assert!(!check(&[]));
    }
}
