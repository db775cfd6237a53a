//! The host process: the link to the coordinator, the workloads, and what the host says of itself.
//!
//! ```text
//! coordinator <--link--> host process --> runtime (workloads)
//!                          |  |
//!        proof.sock GET /devices   data.sock PUT /registry/headers, PUT /cache/leases
//!                          both: GET /metrics, for Prometheus (metrics.rs)
//! ```
//!
//! The neighbours are other processes of this host and may be down at any moment. Without the proof process
//! the GPUs that were last seen count; the coordinator is told nothing before any were.

pub mod facts;
pub mod metrics;
pub mod neighbour;

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use protocol::gpu::DeviceInfo;
use protocol::link::{RegistryHeaders, ToHost};
use protocol::logs::{HostAnswer, HostQuestion};
use protocol::report::HostFacts;
use protocol::workload::Fence;
use runtime::Runtime;
use runtime::kubernetes::{self, Kubernetes};
use runtime::process::Process;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use self::facts::Identity;
use self::neighbour::Neighbour;
use crate::cache::policy::Leases;
use crate::link::{self, AnswerQuestion, Ends, Link, Quic};
use crate::packet_filter::{self, table::Table};
use crate::workloads::store::Store;
use crate::workloads::{self, Channels, Offer};
use coordinator::clock::{Clock, WallClock};

pub(crate) const REPORT_EVERY: Duration = Duration::from_secs(10);
/// Facts are looked at again, and neighbours that may have started anew are told again, so often.
const REFRESH: Duration = Duration::from_secs(20);
const RETRY: Duration = Duration::from_secs(1);
/// A question about a workload is answered within this time; members wait a little longer.
const ANSWER_MAX: Duration = Duration::from_secs(8);
const QUEUE: usize = 8;

/// Settings of the process.
#[derive(Debug, Clone)]
pub struct Config {
    /// Data directory of the host: `agent.redb`, certificates, `run/*.sock`.
    pub data: PathBuf,
    /// What the host is called and where it is reached.
    pub identity: Identity,
    /// The link to the coordinator.
    pub link: link::Config,
    /// How workloads run.
    pub runtime: RuntimeKind,
    /// What pods reach of the host, if they are filtered.
    pub packet_filter: Option<packet_filter::Config>,
    /// Where Prometheus reads the metrics of the host's processes.
    pub metrics_listen: Option<SocketAddr>,
}

/// How workloads run.
#[derive(Debug, Clone)]
pub enum RuntimeKind {
    /// As Jobs on a node of a Kubernetes cluster.
    Kubernetes(Box<Node>),
    /// As child processes, for development.
    Process(Box<runtime::process::Config>),
}

/// The node that this host is.
#[derive(Debug, Clone)]
pub struct Node {
    /// Kubeconfig of its cluster; none: whatever the surroundings offer.
    pub kubeconfig: Option<PathBuf>,
    /// What its chutes are like.
    pub config: runtime::kubernetes::Config,
}

/// Why the process cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database.
    #[error(transparent)]
    Store(#[from] workloads::store::Error),
    /// The runtime.
    #[error("runtime: {0}")]
    Runtime(#[from] runtime::Error),
    /// The certificate or the admission.
    #[error("cluster identity: {0}")]
    Identity(#[from] coordinator::identity::IdentityError),
    /// Pods would not be filtered.
    #[error("packet filter: {0}")]
    PacketFilter(#[from] packet_filter::Error),
    /// The host belongs to no cluster.
    #[error(
        "this host belongs to no cluster yet: `chutes-agent join TOKEN` joins one (a token comes from `chutes-miner \
         host invite` on a member), `chutes-agent init` founds one on the first host"
    )]
    NotJoined,
    /// The door of Prometheus.
    #[error("listen for the metrics on {0}: {1}")]
    Metrics(SocketAddr, io::Error),
    /// The way to the neighbours.
    #[error("neighbours: {0}")]
    Neighbour(#[from] neighbour::Error),
}

/// Runs the host process until `shutdown`. Workloads go on afterwards.
///
/// # Errors
/// [`Error`] when it cannot start: the database is in use or damaged, or the runtime refuses.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), Error> {
    // The caller may have installed one already; any is fine.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let clock: Arc<dyn Clock> = Arc::new(WallClock);
    let folder = config.link.certificates.clone();
    coordinator::join::Admission::read(&folder)?.ok_or(Error::NotJoined)?;
    let link = Box::new(Quic::new(config.link.clone(), Arc::clone(&clock)));
    // The database first: it keeps a second agent from touching anything.
    let (store, found) = Store::open(&config.data.join("agent.redb"))?;
    if config.packet_filter.is_none() {
        packet_filter::switched_off(&Table::default(), &config.data).await;
    }
    match config.runtime.clone() {
        RuntimeKind::Kubernetes(node) => {
            let client = kubernetes::client(node.kubeconfig.as_deref()).await?;
            let name = &node.config.settings.node_name;
            // Before anything can be started.
            let filter = match config.packet_filter.clone() {
                Some(filter) => packet_filter::start(filter, client.clone(), name.clone(), &config.data)
                    .await?
                    .boxed(),
                None => std::future::pending().boxed(),
            };
            let runtime = Arc::new(Kubernetes::start(client, node.config));
            tokio::select! {
                result = serve(&config, (store, found), link, runtime, shutdown) => result,
                // It is begun anew, and starts nothing until the filter is there.
                error = filter => Err(error.into()),
            }
        }
        RuntimeKind::Process(settings) => {
            let runtime = Arc::new(Process::open(*settings).await?);
            let result = serve(&config, (store, found), link, Arc::clone(&runtime) as _, shutdown).await;
            if let Some(runtime) = Arc::into_inner(runtime) {
                runtime.close().await;
            }
            result
        }
    }
}

/// All of the process but the choice of its parts.
async fn serve(
    config: &Config,
    (store, found): (Store, workloads::store::Found),
    link: Box<dyn Link>,
    runtime: Arc<dyn Runtime>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let proof = Neighbour::new(&config.data.join("run/proof.sock"))?;
    let data = Neighbour::new(&config.data.join("run/data.sock"))?;
    let (offers, offers_in) = mpsc::channel(QUEUE);
    let (inbound, inbound_in) = mpsc::channel(QUEUE);
    let (delivered, delivered_in) = watch::channel(Fence::default());
    let (report, report_in) = watch::channel(None);
    let (stored, stored_in) = watch::channel(found.set.fence);
    let (chutes, chutes_in) = watch::channel(None);
    let (facts, facts_in) = watch::channel(None);
    let (headers, headers_in) = watch::channel(None);

    let mut tasks = JoinSet::new();
    if let Some(address) = config.metrics_listen {
        let listener = TcpListener::bind(address).await;
        let listener = listener.map_err(|error| Error::Metrics(address, error))?;
        let processes = vec![("proof", proof.clone()), ("data", data.clone())];
        tasks.spawn(metrics::serve(listener, processes, shutdown.clone()));
    }
    let answers = answers(Arc::clone(&runtime));
    let channels = Channels {
        offers: offers_in,
        delivered: delivered_in,
        report,
        stored,
        chutes,
    };
    let loop_end = shutdown.clone();
    let set = found.set;
    tasks.spawn(workloads::run(
        runtime,
        store.clone(),
        set,
        channels,
        REPORT_EVERY,
        loop_end,
    ));
    let ends = Ends {
        facts: facts_in,
        stored: stored_in,
        report: report_in,
        delivered,
        inbound,
        answers,
    };
    tasks.spawn(link.run(ends, shutdown.clone()));
    let until = |end: CancellationToken, task: futures_util::future::BoxFuture<'static, ()>| async move {
        end.run_until_cancelled(task).await;
    };
    let identity = config.identity.clone();
    let folder = config.data.clone();
    let look = look_at_facts(identity, folder, proof, store, found.devices, facts);
    tasks.spawn(until(shutdown.clone(), Box::pin(look)));
    tasks.spawn(until(
        shutdown.clone(),
        Box::pin(sort(inbound_in, offers, headers)),
    ));
    let tell = self::tell(data.clone(), "/registry/headers", headers_in, Clone::clone);
    tasks.spawn(until(shutdown.clone(), Box::pin(tell)));
    let leases = |chutes: &Option<BTreeSet<_>>| {
        let running = chutes.clone()?;
        Some(Leases {
            running,
            ..Leases::default()
        })
    };
    let tell = self::tell(data, "/cache/leases", chutes_in, leases);
    tasks.spawn(until(shutdown.clone(), Box::pin(tell)));

    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended
            && error.is_panic()
        {
            // A half-dead host process would look alive: end it, the supervisor starts it anew.
            std::panic::resume_unwind(error.into_panic());
        }
    }
    Ok(())
}

/// What the runtime knows of a workload, for whoever asks.
pub(crate) fn answers(runtime: Arc<dyn Runtime>) -> Arc<AnswerQuestion> {
    Arc::new(move |question| {
        let runtime = Arc::clone(&runtime);
        Box::pin(async move {
            let answer = async {
                match &question {
                    HostQuestion::Log(query) => runtime.log(query).await.map(|log| log.map(HostAnswer::Log)),
                    HostQuestion::Events(deployment) => {
                        let events = runtime.events(deployment).await;
                        events.map(|events| events.map(HostAnswer::Events))
                    }
                }
            };
            let Ok(answer) = timeout(ANSWER_MAX, answer).await else {
                return HostAnswer::Failed(format!("no answer of what runs it within {ANSWER_MAX:?}"));
            };
            match answer {
                Ok(answer) => answer.unwrap_or(HostAnswer::Unknown),
                Err(runtime::Error::Refused(why)) => HostAnswer::Refused(why),
                Err(error) => HostAnswer::Failed(error.to_string()),
            }
        })
    })
}

/// Hands on what the coordinator says, each to its place.
async fn sort(
    mut inbound: mpsc::Receiver<ToHost>,
    offers: mpsc::Sender<Offer>,
    headers: watch::Sender<Option<Vec<RegistryHeaders>>>,
) {
    while let Some(message) = inbound.recv().await {
        match message {
            ToHost::Desired { fence, workloads } => {
                if offers.send(Offer { fence, workloads }).await.is_err() {
                    return;
                }
            }
            ToHost::RegistryHeaders(sets) => {
                headers.send_replace(Some(sets));
            }
            // The link keeps them to itself.
            ToHost::Doors(_) | ToHost::Authorities(_) => {}
        }
    }
}

/// Tells a neighbour the newest value, and again from time to time, since it may have started anew.
async fn tell<T, B: serde::Serialize>(
    neighbour: Neighbour,
    path: &'static str,
    mut values: watch::Receiver<T>,
    body: impl Fn(&T) -> Option<B>,
) {
    let mut told = true;
    loop {
        let value = body(&values.borrow_and_update());
        if let Some(value) = value {
            let result = neighbour.put(path, &value).await;
            if let Err(error) = &result
                && told
            {
                tracing::warn!(path, %error, "a neighbour was not told, retried");
            }
            told = result.is_ok();
        }
        let pause = if told { REFRESH } else { RETRY };
        if matches!(timeout(pause, values.changed()).await, Ok(Err(_))) {
            return;
        }
    }
}

/// Looks at the host again and again, and tells what has changed.
async fn look_at_facts(
    identity: Identity,
    folder: PathBuf,
    proof: Neighbour,
    store: Store,
    mut devices: Option<Vec<DeviceInfo>>,
    facts: watch::Sender<Option<HostFacts>>,
) {
    loop {
        let seen = proof.devices().await;
        let answered = seen.is_ok();
        match seen {
            Ok(seen) if devices.as_ref() != Some(&seen) => {
                if let Err(error) = store.put_devices(&seen).await {
                    tracing::warn!(%error, "the GPUs are not remembered");
                }
                devices = Some(seen);
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "the GPUs that were last seen count"),
        }
        if let Some(devices) = devices.clone() {
            match facts::gather(&identity, devices, &folder) {
                Ok(now) => {
                    facts.send_if_modified(|last| {
                        let news = last.as_ref().is_none_or(|last| facts::differ(last, &now));
                        if news {
                            *last = Some(now);
                        }
                        news
                    });
                }
                Err(error) => tracing::error!(%error, "the size of this host is not known"),
            }
        }
        sleep(if answered { REFRESH } else { RETRY }).await;
    }
}
