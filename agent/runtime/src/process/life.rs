//! The life of one workload: pull, start, watch, end, be removed. One task for each, and it alone changes
//! the workload's phase and its folder.

use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocol::id::{DeploymentId, GpuId};
use protocol::workload::{PRIMARY_PORT, WorkloadPhase, WorkloadSpec};
use tokio::process::Child;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::fault::Step;
use super::record::{Record, State, make_folder};
use super::start::{self, Place};
use super::table::{self, Identity};
use super::{Host, output, ports};
use crate::environment::health_port;

const RETRY_AFTER: Duration = Duration::from_secs(1);
const HEALTH_TIMEOUT: Duration = Duration::from_secs(2);
/// How many checks in a row must fail until a workload that was ready no longer is.
const HEALTH_FAILURES_MAX: u32 = 3;

/// A workload as others see it.
#[derive(Debug)]
pub(crate) struct Workload {
    pub(crate) deployment: DeploymentId,
    pub(crate) gpus: Vec<GpuId>,
    phase: Mutex<WorkloadPhase>,
    stop: watch::Sender<bool>,
}

/// Where a life begins.
#[derive(Debug)]
pub(crate) enum Origin {
    /// A new workload.
    New(Box<WorkloadSpec>),
    /// Started by an earlier agent and still running.
    Adopted(Record, Identity),
    /// Its process is gone, its descendants may not be.
    Lost(Record, String),
    /// It ended before.
    Ended,
}

struct Running {
    record: Record,
    leader: Identity,
    /// Only when it was started by us.
    child: Option<Child>,
}

impl Workload {
    pub(crate) fn new(deployment: DeploymentId, gpus: Vec<GpuId>, phase: WorkloadPhase) -> Self {
        Self {
            deployment,
            gpus,
            phase: Mutex::new(phase),
            stop: watch::channel(false).0,
        }
    }

    pub(crate) fn phase(&self) -> WorkloadPhase {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn ask_to_stop(&self) {
        self.stop.send_replace(true);
    }
}

/// Lives through one workload, until it is removed.
pub(crate) async fn live(host: Arc<Host>, workload: Arc<Workload>, origin: Origin) {
    let life = Life {
        folder: host.workloads_folder.join(workload.deployment.as_str()),
        host,
        workload,
    };
    life.run(origin).await;
}

struct Life {
    host: Arc<Host>,
    workload: Arc<Workload>,
    folder: PathBuf,
}

impl Life {
    async fn run(self, origin: Origin) {
        let mut leader = None;
        let mut child = None;
        let running = match origin {
            Origin::New(spec) => match self.begin(&spec).await {
                Ok(running) => running,
                Err(reason) => {
                    self.end(self.empty_record(&spec), None, reason).await;
                    None
                }
            },
            Origin::Adopted(record, leader) => Some(Running {
                record,
                leader,
                child: None,
            }),
            Origin::Lost(record, reason) => {
                self.end_processes(None).await;
                self.end(record, None, reason).await;
                None
            }
            Origin::Ended => None,
        };
        if let Some(mut running) = running {
            if self.watch(&running).await {
                self.end_processes(Some(running.leader)).await;
                let status = match running.child.as_mut() {
                    Some(child) => child.wait().await.ok(),
                    None => None,
                };
                if !retried("look for the gate", || start::was_released(&self.folder)).await {
                    return self.remove().await;
                }
                let (exit_code, reason) = describe(status);
                self.end(running.record, exit_code, reason).await;
            } else {
                leader = Some(running.leader);
                child = running.child;
            }
        }
        self.stop_asked().await;
        self.set_phase(WorkloadPhase::Stopping);
        self.end_processes(leader).await;
        if let Some(mut child) = child {
            // All have ended; this only takes it off the process table.
            let _ = child.wait().await;
        }
        self.host.config.faults.reach(Step::ProcessesEnded).await;
        let deployment = &self.workload.deployment;
        let kept = output::remains(&self.folder);
        if let Err(error) = kept.and_then(|remains| self.host.kept.put(deployment, &remains)) {
            tracing::warn!(deployment = %self.workload.deployment, %error, "its logs were not kept");
        }
        self.remove().await;
    }

    /// From the specification to a process that runs the chute. Nothing when it is to stop already.
    async fn begin(&self, spec: &WorkloadSpec) -> Result<Option<Running>, String> {
        let address: IpAddr = spec
            .external_host
            .parse()
            .map_err(|_| format!("{:?} is not an IP address to bind", spec.external_host))?;
        let progress = |bytes_done| self.set_phase(WorkloadPhase::Pulling { bytes_done });
        progress(0);
        let image = tokio::select! {
            biased;
            () = self.stop_asked() => return Ok(None),
            image = self.host.images.pull(&spec.validator, &spec.image, &progress) => {
                image.map_err(|error| format!("pull {}: {error}", spec.image))?
            }
        };
        let io = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
        let code = start::code_path(&self.folder, &spec.filename)
            .ok_or_else(|| format!("{:?} is not a file name", spec.filename))?;
        let cache = self.host.config.cache.join(spec.chute.as_str());
        make_folder(&self.folder.join("app")).map_err(io("make its folder"))?;
        make_folder(&cache.join("hub")).map_err(io("make the cache folder"))?;
        make_folder(&cache.join("civitai")).map_err(io("make the cache folder"))?;
        std::fs::write(&code, &spec.code).map_err(io("write its code"))?;
        self.host.config.faults.reach(Step::FolderMade).await;

        let ports = self.host.reserve(&spec.deployment, |taken| {
            ports::choose(self.host.config.ports.clone(), address, &spec.ports, taken)
        });
        let ports = ports.ok_or("no port is free")?;
        let inside = health_port(spec);
        let external = |internal| ports.iter().find(|port| port.internal == internal);
        let health = external(inside)
            .or_else(|| external(PRIMARY_PORT))
            .map(|port| port.external);
        let health = health.ok_or("it has no port for the health check")?;
        let gpus = spec.gpus.clone();
        let mut record = Record::starting(gpus, spec.external_host.clone(), ports, health);
        record.save(&self.folder).map_err(io("write its record"))?;
        self.host.config.faults.reach(Step::StartingRecorded).await;

        let place = Place {
            folder: &self.folder,
            cache: &cache,
            ports: &record.ports,
            egress_door: self.host.config.egress_door.as_deref(),
        };
        let gated = start::start(spec, &image, &place).map_err(io("start"))?;
        self.host.config.faults.reach(Step::ProcessGated).await;
        let leader = gated.identity;
        record.state = State::Started {
            leader,
            boot_id: self.host.boot_id.clone(),
        };
        record.save(&self.folder).map_err(io("write its record"))?;
        self.host.config.faults.reach(Step::StartedRecorded).await;
        let child = gated.release().await.map_err(io("release"))?;
        self.host.config.faults.reach(Step::Released).await;
        tracing::info!(deployment = %spec.deployment, pid = leader.pid, "workload started");
        Ok(Some(Running {
            record,
            leader,
            child: Some(child),
        }))
    }

    /// Waits until the process has ended (true) or is to stop (false).
    async fn watch(&self, running: &Running) -> bool {
        let health = self.health(&running.record);
        tokio::select! {
            biased;
            () = self.stop_asked() => false,
            () = ended(running.leader) => true,
            never = health => match never {},
        }
    }

    async fn health(&self, record: &Record) -> Infallible {
        let running = |ready| WorkloadPhase::Running {
            ports: record.ports.clone(),
            ready,
        };
        self.set_phase(running(false));
        let host = match record.host.parse::<IpAddr>() {
            Ok(IpAddr::V6(address)) => format!("[{address}]"),
            _ => record.host.clone(),
        };
        let url = format!("http://{host}:{}/_alive", record.health_port);
        let mut ready = false;
        let mut failures = 0;
        loop {
            let request = async {
                let response = self.host.client.get(&url).send().await;
                response.is_ok_and(|response| response.status().is_success())
            };
            let alive = timeout(HEALTH_TIMEOUT, request).await.unwrap_or(false);
            failures = if alive { 0 } else { failures + 1 };
            if alive != ready && (alive || failures >= HEALTH_FAILURES_MAX) {
                ready = alive;
                self.set_phase(running(ready));
            }
            if let Err(error) = output::bound(&self.folder) {
                tracing::warn!(deployment = %self.workload.deployment, %error, "its logs were not cut");
            }
            let period = self.host.config.health_period;
            sleep(if ready { period * 5 } else { period }).await;
        }
    }

    async fn stop_asked(&self) {
        // The sender lives as long as the workload, so that waiting cannot fail.
        let _ = self.workload.stop.subscribe().wait_for(|stop| *stop).await;
    }

    async fn end_processes(&self, leader: Option<Identity>) {
        let marker = self.workload.deployment.as_str();
        while let Err(error) = table::end_all(leader, marker, self.host.config.stop_grace).await {
            tracing::error!(deployment = marker, %error, "its processes cannot be ended");
            sleep(RETRY_AFTER).await;
        }
    }

    /// Writes the end down, then shows it.
    async fn end(&self, mut record: Record, exit_code: Option<i32>, reason: String) {
        tracing::info!(deployment = %self.workload.deployment, exit_code, reason, "workload ended");
        record.state = State::Ended {
            exit_code,
            reason: reason.clone(),
        };
        let save = || make_folder(&self.folder).and_then(|()| record.save(&self.folder));
        // A full disk must not keep its GPUs from being reported free.
        if let Err(error) = save() {
            tracing::error!(deployment = %self.workload.deployment, %error, "its end was not written down");
        }
        self.host.config.faults.reach(Step::EndRecorded).await;
        self.host.release(&self.workload.deployment);
        self.set_phase(WorkloadPhase::Ended { exit_code, reason });
    }

    fn empty_record(&self, spec: &WorkloadSpec) -> Record {
        Record::starting(
            self.workload.gpus.clone(),
            spec.external_host.clone(),
            Vec::new(),
            0,
        )
    }

    /// Makes it as if it had never been.
    async fn remove(&self) {
        let name = self.workload.deployment.as_str();
        retried("remove its folder", || self.host.remove_folder(name)).await;
        self.host.config.faults.reach(Step::FolderRemoved).await;
        self.host.release(&self.workload.deployment);
        self.host.forget(&self.workload.deployment);
    }

    fn set_phase(&self, phase: WorkloadPhase) {
        let mut current = self.workload.phase.lock().unwrap_or_else(PoisonError::into_inner);
        if *current != phase {
            *current = phase;
            drop(current);
            self.host.changed();
        }
    }
}

async fn ended(leader: Identity) {
    while let Err(error) = table::ended(leader).await {
        tracing::error!(pid = leader.pid, %error, "a process cannot be watched");
        sleep(RETRY_AFTER).await;
    }
}

async fn retried<T>(what: &str, mut attempt: impl FnMut() -> io::Result<T>) -> T {
    loop {
        match attempt() {
            Ok(value) => return value,
            Err(error) => tracing::error!(what, %error, "retried"),
        }
        sleep(RETRY_AFTER).await;
    }
}

fn describe(status: Option<std::process::ExitStatus>) -> (Option<i32>, String) {
    use std::os::unix::process::ExitStatusExt as _;
    let Some(status) = status else {
        let reason = "it ended; the exit code went to the agent that started it";
        return (None, reason.to_owned());
    };
    match (status.code(), status.signal()) {
        (Some(code), _) => (Some(code), format!("exit code {code}")),
        (None, Some(signal)) => (None, format!("killed by signal {signal}")),
        (None, None) => (None, status.to_string()),
    }
}
