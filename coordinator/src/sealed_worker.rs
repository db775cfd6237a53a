//! Sealed workers: servers without our agent, driven by the leader through the kubeconfig of each.
//!
//! ```text
//! state (workers, sealed kubeconfigs) --> drive --opened kubeconfig--> Workers --> API server of the worker
//!                                           |  <-------------------- reports
//!                                        session (as of any host, in this process)
//! ```
//! To the rest of the coordinator a worker is a host whose link has no wire: the same session takes its reports and
//! hands out its desired sets. It begins with the worker's first report and ends when none comes any more, so that a
//! worker whose API server is away counts as silent. What is driven is in no memory but the state's and the worker's own
//! cluster's: the next leader begins with what it finds there.
//!
//! - [`attestation`]: what a worker says of its GPUs.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use coordinator_core::state_machine::worker::Worker;
use futures_util::future::BoxFuture;
use protocol::gpu::DeviceInfo;
use protocol::id::ServerId;
use protocol::link::{FromHost, ToHost};
use protocol::report::HostFacts;
use protocol::workload::{Fence, Secret};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::host_link::{AskHost, Hub, session};
use crate::signer::{SealedKind, Sign};
use crate::store::Store;

pub mod attestation;

/// Port of the attestation service, where an operator names no other.
pub const ATTESTATION_SERVICE_PORT: u16 = 30443;
/// A worker that reports nothing for so long is silent. It reports every ten seconds.
pub const SILENCE_MAX: Duration = Duration::from_secs(25);
/// Between two looks at a worker's node and GPUs.
const LOOK_EVERY: Duration = Duration::from_secs(300);
/// Before what has failed is tried again.
const AGAIN: Duration = Duration::from_secs(10);
/// Messages that may wait in either direction.
const QUEUE: usize = 16;

/// Access to the cluster of a worker, opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// Which worker.
    pub server: ServerId,
    /// Name of its node.
    pub node: String,
    /// Kubeconfig with one context, and all that it needs in it.
    pub kubeconfig: Secret,
}

/// The node of a worker, as its API server shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its UID.
    pub uid: ServerId,
    /// Its name.
    pub name: String,
    /// Where it is reached: its external address, else its internal one.
    pub address: Option<String>,
    /// It says that it runs in a trusted execution environment (label `chutes/tee`).
    pub sealed: bool,
    /// GPUs that it says it has (label `nvidia.com/gpu.count`).
    pub gpus: Option<usize>,
    /// CPUs in all.
    pub cpu_count: u32,
    /// RAM in all, in GB.
    pub memory_gb: u32,
    /// Disk for containers, in GB.
    pub disk_gb: u32,
}

/// Why a worker cannot be reached, or is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// What was given is of no use: another try will not help.
    #[error("{0}")]
    Refused(String),
    /// Its API server or its attestation service does not answer as it should.
    #[error("{0}")]
    Unavailable(String),
}

/// A worker that is driven, as the two ends of a link.
pub struct Driven {
    /// What it says: reports, and nothing else.
    pub reports: mpsc::Receiver<FromHost>,
    /// What it is told: desired sets; all else is for hosts.
    pub wants: mpsc::Sender<ToHost>,
    /// The way to ask it about its workloads.
    pub way: Arc<dyn AskHost>,
    /// Drives it until dropped; what runs goes on.
    pub run: BoxFuture<'static, ()>,
}

impl fmt::Debug for Driven {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driven")
            .field("way", &self.way)
            .finish_non_exhaustive()
    }
}

/// The clusters of workers, as this program reaches them.
pub trait Workers: fmt::Debug + Send + Sync {
    /// What is needed of a kubeconfig: one context (`context`, or the current one), with nothing that leads to files or
    /// programs of this machine.
    ///
    /// # Errors
    /// [`Error::Refused`], saying what is wrong with it.
    fn reduce(&self, kubeconfig: &Secret, context: Option<&str>) -> Result<Secret, Error>;

    /// The one node of the cluster.
    fn node<'a>(&'a self, kubeconfig: &'a Secret) -> BoxFuture<'a, Result<Node, Error>>;

    /// Begins to drive a worker.
    fn drive(&self, access: Access) -> BoxFuture<'static, Result<Driven, Error>>;
}

/// What is known of a worker, in the form of what a host says of itself.
///
/// # Errors
/// [`Error`]: the node is no sealed worker, or not all of its GPUs are attested.
pub fn facts(node: Node, address: String, port: u16, devices: Vec<DeviceInfo>) -> Result<HostFacts, Error> {
    let name = node.name;
    if !node.sealed {
        return Err(Error::Refused(format!(
            "node {name} has no label chutes/tee=true: only sealed workers are driven from elsewhere, on any other machine \
             the agent is installed"
        )));
    }
    let seen = devices.len();
    if node.gpus.is_some_and(|gpus| gpus != seen) {
        let gpus = node.gpus.unwrap_or_default();
        return Err(Error::Unavailable(format!(
            "node {name} has {gpus} GPUs by its label nvidia.com/gpu.count, and its attestation service lists {seen}"
        )));
    }
    Ok(HostFacts {
        server: node.uid,
        name,
        address,
        proof_port: port,
        devices,
        cpu_count: node.cpu_count,
        memory_gb: node.memory_gb,
        disk_free_gb: node.disk_gb,
        agent_version: String::new(),
    })
}

/// What driving works with.
#[derive(Debug, Clone)]
pub struct Drive {
    /// The state.
    pub store: Store,
    /// Opens kubeconfigs and launch tokens, and signs for attestation services.
    pub signer: Arc<dyn Sign>,
    /// Who is connected.
    pub hub: Hub,
    /// The way to the clusters.
    pub workers: Arc<dyn Workers>,
    /// After this without a report a worker is silent: [`SILENCE_MAX`].
    pub silence_max: Duration,
}

impl Drive {
    /// Drives every worker of the state until cancelled.
    pub async fn all(self, cancel: CancellationToken) {
        let mut changes = self.store.changes();
        let mut tasks = JoinSet::new();
        let mut driven: BTreeMap<ServerId, (Vec<u8>, AbortHandle)> = BTreeMap::new();
        loop {
            if let Some(wanted) = self.changed(&driven) {
                driven.retain(|id, (sealed, task)| {
                    let stays = wanted.get(id) == Some(sealed) && !task.is_finished();
                    if !stays {
                        task.abort();
                    }
                    stays
                });
                for (id, sealed) in wanted {
                    if let Entry::Vacant(place) = driven.entry(id) {
                        let task = tasks.spawn(self.clone().one(place.key().clone(), sealed.clone()));
                        place.insert((sealed, task));
                    }
                }
            }
            tokio::select! {
                biased;
                () = cancel.cancelled() => break,
                // One that was given up, or has panicked: then it is begun anew.
                Some(ended) = tasks.join_next() => {
                    if let Err(error) = ended && error.is_panic() {
                        tracing::error!(%error, "driving a worker has ended");
                        cancel.run_until_cancelled(sleep(AGAIN)).await;
                    }
                }
                () = changes.changed() => {}
            }
        }
        tasks.shutdown().await;
    }

    /// The workers with their sealed kubeconfigs, unless just these are driven: the state changes with every write, and they
    /// hardly ever.
    fn changed(
        &self,
        driven: &BTreeMap<ServerId, (Vec<u8>, AbortHandle)>,
    ) -> Option<BTreeMap<ServerId, Vec<u8>>> {
        self.store.read(|state| {
            let workers = state.workers();
            let is_driven = |(id, worker): (&ServerId, &Worker)| {
                let found = driven.get(id);
                found.is_some_and(|(sealed, task)| *sealed == worker.sealed_kubeconfig && !task.is_finished())
            };
            if workers.len() == driven.len() && workers.iter().all(is_driven) {
                return None;
            }
            let kubeconfig =
                |(id, worker): (&ServerId, &Worker)| (id.clone(), worker.sealed_kubeconfig.clone());
            Some(workers.iter().map(kubeconfig).collect())
        })
    }

    /// Drives one worker for ever.
    async fn one(self, server: ServerId, sealed: Vec<u8>) {
        loop {
            match self.try_one(&server, &sealed).await {
                Ok(()) => {}
                Err(error) => tracing::warn!(%server, %error, "a worker is not driven, tried again"),
            }
            sleep(AGAIN).await;
        }
    }

    async fn try_one(&self, server: &ServerId, sealed: &[u8]) -> Result<(), Error> {
        let opened = self.signer.unseal(SealedKind::Kubeconfig, sealed).await;
        let opened = opened.map_err(|error| Error::Unavailable(error.to_string()))?;
        let kubeconfig = String::from_utf8(opened);
        let kubeconfig = kubeconfig.map_err(|_| Error::Refused("its kubeconfig is no text".to_owned()))?;
        let Some(known) = self.facts_of(server) else {
            return Ok(());
        };
        let access = Access {
            server: server.clone(),
            node: known.name,
            kubeconfig: Secret::new(kubeconfig),
        };
        // Where its API server is away, nothing is reported either.
        if let Ok(node) = self.workers.node(&access.kubeconfig).await {
            is_still(&access, &node)?;
        }
        let driven = self.workers.drive(access.clone()).await?;
        let (facts, facts_followed) = watch::channel(None);
        tokio::select! {
            () = driven.run => Err(Error::Unavailable("it is not driven any more".to_owned())),
            () = self.sessions(server, driven.reports, driven.wants, driven.way, facts_followed) => Ok(()),
            error = self.look(&access, facts) => Err(error),
        }
    }

    fn facts_of(&self, server: &ServerId) -> Option<HostFacts> {
        self.store.read(|state| {
            let server = state.servers().get(server)?;
            Some(server.facts.clone())
        })
    }

    /// Looks at the node and its GPUs again and again. What is known stays while nobody answers; it ends when the node is
    /// no longer the worker.
    async fn look(&self, access: &Access, facts: watch::Sender<Option<HostFacts>>) -> Error {
        let mut looks = interval(LOOK_EVERY);
        loop {
            looks.tick().await;
            let Some(known) = self.facts_of(&access.server) else {
                continue;
            };
            match self.seen(access, &known).await {
                Ok(seen) => {
                    facts.send_if_modified(|last| {
                        let news = seen != known && last.as_ref() != Some(&seen);
                        if news {
                            *last = Some(seen);
                        }
                        news
                    });
                }
                Err(error @ Error::Refused(_)) => return error,
                Err(error @ Error::Unavailable(_)) => {
                    tracing::warn!(worker = known.name, %error, "what is known of a worker stays")
                }
            }
        }
    }

    async fn seen(&self, access: &Access, known: &HostFacts) -> Result<HostFacts, Error> {
        let node = self.workers.node(&access.kubeconfig).await?;
        is_still(access, &node)?;
        let devices = attestation::devices(self.signer.as_ref(), &known.address, known.proof_port).await?;
        facts(node, known.address.clone(), known.proof_port, devices)
    }

    /// One session after the other, each as long as reports come.
    async fn sessions(
        &self,
        server: &ServerId,
        mut reports: mpsc::Receiver<FromHost>,
        wants: mpsc::Sender<ToHost>,
        way: Arc<dyn AskHost>,
        mut facts: watch::Receiver<Option<HostFacts>>,
    ) {
        // What hosts are told besides is for hosts.
        let (_headers, headers) = watch::channel(Vec::new());
        let (_doors, doors) = watch::channel(Vec::new());
        let (_in_touch, in_touch) = watch::channel(true);
        let context = session::Context {
            store: self.store.clone(),
            signer: Arc::clone(&self.signer),
            hub: self.hub.clone(),
            headers,
            doors,
            in_touch,
            way: Some(way),
        };
        while let Some(first) = reports.recv().await {
            let Some(known) = self.facts_of(server) else {
                return;
            };
            let hello = FromHost::Hello {
                facts: known,
                fence: Fence::default(),
                clock: self.store.clock().now(),
            };
            let (to_session, incoming) = mpsc::channel(QUEUE);
            let served = session::serve(context.clone(), |id| id == server, incoming, wants.clone());
            let fed = async {
                let mut heard_at = Instant::now();
                for message in [hello, first] {
                    if to_session.send(message).await.is_err() {
                        return;
                    }
                }
                loop {
                    let message = tokio::select! {
                        report = timeout(self.silence_max.saturating_sub(heard_at.elapsed()), reports.recv()) => match report {
                            Ok(Some(report)) => {
                                heard_at = Instant::now();
                                report
                            }
                            Ok(None) | Err(_) => return,
                        },
                        Ok(()) = facts.changed() => match facts.borrow_and_update().clone() {
                            Some(facts) => FromHost::Facts(facts),
                            None => continue,
                        },
                    };
                    if to_session.send(message).await.is_err() {
                        return;
                    }
                }
            };
            tokio::select! {
                end = served => if let Err(end) = end {
                    tracing::warn!(%server, %end, "the session of a worker");
                },
                () = fed => tracing::warn!(%server, "a worker is silent: its API server does not say what runs there"),
            }
        }
    }
}

/// Refuses a node that took the place of the worker's.
fn is_still(access: &Access, node: &Node) -> Result<(), Error> {
    if node.uid == access.server {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "node {} was made anew, and its UID is {} now: remove the worker {}, and add it again",
        node.name, node.uid, access.node
    )))
}
