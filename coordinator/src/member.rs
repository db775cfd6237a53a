//! A coordinator member: opens the replicated state, lets hosts, other members and operators in, and leads when it
//! is this member's turn.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use replica::{Replica, RowChange, Start, StateMachine, Storage};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use coordinator_core::state_machine::codec::Row;
use coordinator_core::state_machine::host::NewHost;
use coordinator_core::state_machine::{Command, Faults, Rejection};
use futures_util::FutureExt as _;

mod address;
mod certificate;
mod log;
mod miner;
mod reading;

use crate::api;
use crate::backup::{Keeper, Snapshots};
use crate::clock::{AgreedClock, Clock};
use crate::config::Config;
use crate::door;
use crate::executor::Validators;
use crate::host_link::{Hub, headers, session};
use crate::identity::{CA_CERTIFICATE, CA_KEY, HostKey, Identity, IdentityError, key_hash, read_text};
use crate::join::{Admission, Gate, Nodes, gate, node};
use crate::leader::{Leader, Listings, Scheduling};
use crate::member_link;
use crate::membership::{self, HandOver, Wish};
use crate::sealed_worker::Workers;
use crate::signer::{SealedKind, Sign};
use crate::store::{self, Machine, Store};
use crate::validator::http::Limits;
use crate::validator::socket::TcpDial;
use crate::validator::{self, Client, ValidatorApi};

pub use log::ReplicatedLog;

/// After a failure of the replicated state, the rest gets so long to end.
const FAILED_STOP_MAX: Duration = Duration::from_secs(5);
/// Before leading begins anew after it has ended by itself, so that a fault that repeats does not do so at once.
const LEAD_AGAIN: Duration = Duration::from_secs(1);

/// Why a member cannot start, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The replicated state.
    #[error("open the replicated state: {0}")]
    Replica(#[from] replica::Error),
    /// The replicated state failed while this member ran: a full disk, say. Only a new start reads what is there.
    #[error("the replicated state failed: {0}; nothing more is acknowledged before a new start")]
    Failed(String),
    /// The host's certificate or admission.
    #[error("cluster identity: {0}")]
    Identity(#[from] IdentityError),
    /// The host belongs to no cluster.
    #[error(
        "this host belongs to no cluster yet: `chutes-agent init` founds one, `chutes-agent join TOKEN` joins one \
         (a token comes from `chutes-miner host invite` on a member)"
    )]
    NotJoined,
    /// The host was let in without a vote.
    #[error(
        "this host was invited without --eligible and cannot be a member: set coordinator.enabled = false, or remove \
         it and join again with an invitation that says --eligible"
    )]
    NotEligible,
    /// What the member had promised to others is lost.
    #[error(
        "the store of member {member} is not in {folder} any more: it must not go on under this id, since others \
         count on what it stored. If the very folder that it wrote last can be brought back, do; if not, run \
         `chutes-agent rejoin`, or, if no other member is left, `chutes-agent restore`"
    )]
    StoreLost {
        /// Which.
        member: u64,
        /// Where it was.
        folder: std::path::PathBuf,
    },
    /// The authority's key could not be sealed.
    #[error("seal the key of the cluster's authority: {0}")]
    Seal(crate::signer::Error),
    /// The door for hosts and members.
    #[error(transparent)]
    Door(#[from] door::Error),
    /// A door for operators.
    #[error("listen for the {0} on {1}: {2}")]
    Listen(&'static str, SocketAddr, std::io::Error),
    /// A validator's client.
    #[error("validator client: {0}")]
    Validator(#[from] validator::Error),
    /// The signer has another key than the configuration says.
    #[error("miner.hotkey is {configured}, but the seed that the signer holds belongs to {signer}")]
    OtherHotkey {
        /// In the configuration.
        configured: protocol::hotkey::Hotkey,
        /// In the seed file.
        signer: protocol::hotkey::Hotkey,
    },
    /// The strategy does not exist.
    #[error("coordinator.strategy = {0:?} is not known; there is {1}")]
    Strategy(String, String),
}

/// Runs a member until `shutdown`; an acknowledged write is on disk when this returns. On a full disk, from the start or
/// in the middle of it, local reads are answered until there is room; then it fails, to be started anew. `nodes` is the
/// Kubernetes cluster whose nodes enter by themselves, if there is one; `workers` is the way to those of sealed workers.
///
/// # Errors
/// [`Error`] when it cannot start, and [`Error::Failed`] when the replicated state fails later.
pub async fn run(
    config: Config,
    signer: Arc<dyn Sign>,
    clock: Arc<dyn Clock>,
    nodes: Option<Arc<dyn Nodes>>,
    workers: Option<Arc<dyn Workers>>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    if *signer.hotkey() != config.miner {
        let (configured, signer) = (config.miner, signer.hotkey().clone());
        return Err(Error::OtherHotkey { configured, signer });
    }
    let mut random = fastrand::Rng::new();
    let scheduling = Scheduling::new(&config.strategy, config.tick_every)
        .map_err(|known| Error::Strategy(config.strategy.clone(), known))?;
    let (admission, member) = admission(&config)?;
    let identity = Identity::of_host(&config.identity)?;
    let founding = founding(&config, &admission, signer.as_ref()).await?;
    let endpoint = door::open(config.hosts_listen, &identity)?;
    let peers = door::peers(endpoint.clone(), config.identity.clone());

    let machine = Machine::new(Faults::none());
    let mut replica_config = stored(&config, &admission, member);
    replica_config.address.clone_from(&config.advertise);
    replica_config.timing = config.timing;
    replica_config.start = if founding.is_some() {
        Start::Found
    } else {
        Start::Join
    };
    let opened = Replica::open(replica_config, Box::new(machine.clone()), Arc::new(peers.clone())).await;
    let replica = match opened {
        Ok(replica) => replica,
        Err(error) => {
            endpoint.close(0_u8.into(), b"it does not start");
            let reason = error.to_string();
            if !reading::is_of_a_full_disk(&reason) {
                return Err(error.into());
            }
            let stored = stored(&config, &admission, member);
            let read = reading::serve(&config, stored, signer, clock, &reason, shutdown).await;
            // What could not be read either, in a store that is new, is no news.
            return read.map_err(|failed| match failed {
                Error::Replica(_) => error.into(),
                other => other,
            });
        }
    };
    // Before anybody is served: from now on others may count on what is in it. Not earlier: a store that could not be
    // made, on a full disk say, is not lost.
    Admission::note_opened(&config.identity)?;
    let log = Arc::new(ReplicatedLog::new(replica.clone()));
    let agreed = AgreedClock::new(member, clock);
    let clock: Arc<dyn Clock> = Arc::new(agreed.clone());
    let store = Store::new(machine.clone(), log, Arc::clone(&clock), random.u64(..));

    let mut validators = Validators::new();
    for validator in config.validators.iter() {
        let (signer, clock) = (Arc::clone(&signer), Arc::clone(&clock));
        let asked = store.clone();
        let leads_now = Arc::new(move || asked.leads_now());
        let client = Client::new(
            validator,
            signer,
            clock,
            Limits::default(),
            leads_now,
            random.fork(),
        )?;
        validators.insert(
            validator.hotkey.clone(),
            Arc::new(client) as Arc<dyn ValidatorApi>,
        );
    }
    let validators = Arc::new(validators);
    let (hub, listings) = (Hub::default(), Listings::default());
    let operators = listen("management API", config.api_listen).await?;
    let prometheus = match config.metrics_listen {
        Some(address) => Some(listen("metrics", address).await?),
        None => None,
    };
    tracing::info!(member, hosts = %config.hosts_listen, api = %config.api_listen, "coordinator member serves");

    let services = TaskTracker::new();
    let stop = CancellationToken::new();
    let asking = member_link::Asking {
        peers: Arc::new(peers.clone()),
        replica: replica.clone(),
    };
    let (header_sets, header_sets_followed) = watch::channel(Vec::new());
    let (doors, doors_followed) = watch::channel(Vec::new());
    let (in_touch, in_touch_followed) = watch::channel(true);
    let (serving, serving_followed) = watch::channel(true);
    let names = config
        .validators
        .iter()
        .map(|validator| validator.hotkey.clone())
        .collect();
    services.spawn(headers::publish(
        Arc::clone(&signer),
        Arc::clone(&clock),
        names,
        header_sets,
        stop.clone(),
    ));
    services.spawn(follow_doors(
        store.clone(),
        config.identity.clone(),
        doors,
        stop.clone(),
    ));
    services.spawn(asking.clone().tell(hub.clone(), in_touch, stop.clone()));
    let compared = asking
        .clone()
        .compare_clocks(agreed.clone(), store.clone(), stop.clone());
    services.spawn(compared);
    let watched = miner::Watch {
        own: config.miner.clone(),
        store: store.clone(),
        asking: asking.clone(),
    };
    services.spawn(watched.keep(in_touch_followed, serving, stop.clone()));
    let certificate = certificate::Keeper {
        endpoint: endpoint.clone(),
        folder: config.identity.clone(),
        server: admission.server.clone(),
        store: store.clone(),
    };
    services.spawn(certificate.keep(stop.clone()));
    let address = address::Keeper {
        address: config.advertise.clone(),
        members: config.members.clone(),
        server: admission.server.clone(),
        folder: config.identity.clone(),
        store: store.clone(),
        replica: replica.clone(),
        peers: peers.clone(),
    };
    services.spawn(address.keep(stop.clone()));

    let snapshots = Snapshots::new(admission.cluster.clone(), store.clone(), replica.clone());
    let keeper = Keeper::new(snapshots, config.backup.clone());
    let (hand_over, wishes) = HandOver::channel();
    membership::ask_before_handing_over(&replica, hand_over.clone());
    let deps = api::Deps {
        supported_gpus: Arc::new(validators.as_ref().clone()),
        hosts: Arc::new(hub.clone()),
        validator_listing: Arc::new(listings.clone()),
        scheduling: scheduling.clone(),
        cluster: Arc::new(api::ReplicatedCluster::new(
            admission.cluster.clone(),
            replica.clone(),
            hand_over,
            agreed.clone(),
        )),
        backup: keeper.door(),
        others: Arc::new(asking),
        signer: Arc::clone(&signer),
        workers: workers.clone(),
    };
    let limits = api::Limits::default();
    let routes = api::routes(api_config(&config), store.clone(), deps);
    // They outlive the rest where the disk is full.
    let (doors_of_operators, close_operators) = (TaskTracker::new(), CancellationToken::new());
    let serve = |routes, listener| api::serve(routes, limits, listener, close_operators.clone());
    doors_of_operators.spawn(serve(routes.operators, operators));
    if let Some(prometheus) = prometheus {
        doors_of_operators.spawn(serve(routes.metrics, prometheus));
    }
    doors_of_operators.close();
    let at_the_door = door::Services {
        hosts: session::Context {
            store: store.clone(),
            signer: Arc::clone(&signer),
            hub: hub.clone(),
            headers: header_sets_followed,
            doors: doors_followed,
            in_touch: serving_followed,
            way: None,
        },
        replica: replica.clone(),
        members: member_link::Answering {
            hub: hub.clone(),
            replica: replica.clone(),
            clock: agreed,
            hotkey: config.miner.clone(),
            requests: routes.members,
        },
        gate: Gate {
            store: store.clone(),
            signer: Arc::clone(&signer),
            cluster: admission.cluster.clone(),
            endpoint: endpoint.clone(),
            identity: config.identity.clone(),
            peers,
            joins: Arc::new(Semaphore::new(gate::JOINS_MAX)),
            nodes: nodes.clone(),
        },
    };
    // Raft needs the door until the lead is handed over: it closes after the rest.
    let close_door = CancellationToken::new();
    let door = tokio::spawn(door::serve(endpoint, at_the_door, close_door.clone()));

    if let Some(nodes) = nodes {
        let (store, leadership, stop) = (store.clone(), replica.leadership(), stop.clone());
        let (cluster, miner) = (admission.cluster.clone(), config.miner.clone());
        services.spawn(async move {
            node::keep(nodes.as_ref(), &store, (&cluster, &miner), leadership, stop).await;
        });
    }
    let leader = Leader {
        store: store.clone(),
        signer,
        directory: config.validators.clone(),
        validators,
        dial: Arc::new(TcpDial),
        hub,
        listings,
        observe_every: config.observe_every,
        scheduling,
        workers,
        seed: random.u64(..),
    };
    let configure = Command::Configure {
        miner: config.miner.clone(),
        validators: config
            .validators
            .iter()
            .map(|validator| validator.hotkey.clone())
            .collect(),
        pay_profile: config.pay_profile,
    };
    if founding.is_some() {
        services.spawn(forget_authority(store, config.identity.clone(), stop.clone()));
    }
    let observing = config
        .found_observing
        .then_some(Command::SetObserving { observing: true });
    let founding = founding.map_or_else(Vec::new, |found| observing.into_iter().chain([found]).collect());
    services.spawn(lead(
        leader,
        founding,
        configure,
        replica.clone(),
        wishes,
        stop.clone(),
    ));
    services.spawn(keeper.run(stop.clone()));
    services.close();

    let failure = shutdown.run_until_cancelled(failure_of(replica.health())).await;
    let full = failure.as_deref().is_some_and(reading::is_of_a_full_disk);
    match &failure {
        Some(reason) if full => reading::say(reason),
        _ => {
            tracing::info!("coordinator member stops");
            close_operators.cancel();
        }
    }
    stop.cancel();
    let in_order = async {
        services.wait().await;
        replica.shutdown().await;
        close_door.cancel();
        // It ends by itself; a panic in it was logged.
        let _ = door.await;
    };
    let Some(reason) = failure else {
        in_order.await;
        doors_of_operators.wait().await;
        return Ok(());
    };
    // What is acknowledged is on the disk; what waits for the failed state may wait for ever.
    if tokio::time::timeout(FAILED_STOP_MAX, in_order).await.is_err() {
        tracing::warn!("not everything ended in order");
    }
    let room = async {
        if full {
            reading::catch_up(stored(&config, &admission, member), &machine).await;
            reading::until_there_is_room(&config.data).await;
        }
    };
    let stopped = shutdown.run_until_cancelled(room).await.is_none();
    close_operators.cancel();
    doors_of_operators.wait().await;
    if stopped {
        Ok(())
    } else {
        Err(Error::Failed(reason))
    }
}

/// The store of a member, as far as it must be known to read it.
fn stored(config: &Config, admission: &Admission, member: u64) -> replica::Config {
    let directory = config.data.join("raft");
    replica::Config::new(&admission.cluster, member, Storage::Files { directory })
}

fn api_config(config: &Config) -> api::Config {
    api::Config {
        miner: config.miner.clone(),
        member: config.name.clone(),
        allow_plain_legacy_writes: config.allow_plain_legacy_writes,
        limits: api::Limits::default(),
    }
}

async fn listen(what: &'static str, address: SocketAddr) -> Result<TcpListener, Error> {
    let listener = TcpListener::bind(address).await;
    listener.map_err(|error| Error::Listen(what, address, error))
}

/// This host's place in the cluster and its member id; refused when the store was opened once and is gone.
fn admission(config: &Config) -> Result<(Admission, u64), Error> {
    let admission = Admission::read(&config.identity)?.ok_or(Error::NotJoined)?;
    let member = admission.member.ok_or(Error::NotEligible)?;
    let folder = config.data.join("raft");
    if admission.opened && !folder.join("raft-log.redb").exists() {
        return Err(Error::StoreLost { member, folder });
    }
    Ok((admission, member))
}

/// The command that founds the cluster, on its founder, until the state holds the authority.
async fn founding(
    config: &Config,
    admission: &Admission,
    signer: &dyn Sign,
) -> Result<Option<Command>, Error> {
    let key = config.identity.join(CA_KEY);
    if !key.exists() {
        return Ok(None);
    }
    let sealed = signer
        .seal(SealedKind::ClusterCaKey, read_text(&key)?.as_bytes())
        .await;
    let founder = NewHost {
        server: admission.server.clone(),
        name: config.name.clone(),
        site: config.site.clone(),
        address: config.advertise.clone(),
        key_hash: key_hash(&HostKey::open_or_make(&config.identity)?.public()),
    };
    Ok(Some(Command::FoundCluster {
        authority_pem: read_text(&config.identity.join(CA_CERTIFICATE))?,
        sealed_key: sealed.map_err(Error::Seal)?,
        founder,
    }))
}

/// Deletes the authority's key from the disk once the state has it.
async fn forget_authority(store: Store, folder: std::path::PathBuf, cancel: CancellationToken) {
    let mut changes = store.changes();
    let forgotten = async {
        // What is applied here is on the disk already: the founder is the only voter.
        while store.read(|state| state.cluster().is_none()) {
            changes.changed().await;
        }
        match std::fs::remove_file(folder.join(CA_KEY)) {
            Ok(()) => tracing::info!("the cluster is founded"),
            Err(error) => tracing::error!(%error, "the authority's key lies on the disk still; delete it"),
        }
    };
    cancel.run_until_cancelled(forgotten).await;
}

/// Publishes the members' doors whenever they change, and keeps them in `folder`: who comes back after the others went
/// on without it must know where they are.
async fn follow_doors(
    store: Store,
    folder: std::path::PathBuf,
    doors: watch::Sender<Vec<String>>,
    cancel: CancellationToken,
) {
    let mut changes = store.changes();
    loop {
        let now: Vec<String> = store.read(|state| {
            let members = state.members();
            members.map(|(_, host)| host.host.address.clone()).collect()
        });
        let changed = doors.send_if_modified(|before| {
            let changed = *before != now;
            before.clone_from(&now);
            changed
        });
        if changed
            && !now.is_empty()
            && let Err(error) = Admission::remember_doors(&folder, now)
        {
            tracing::warn!(%error, "the members' doors are not remembered");
        }
        if cancel.run_until_cancelled(changes.changed()).await.is_none() {
            return;
        }
    }
}

/// Waits until the replicated state fails.
async fn failure_of(mut health: watch::Receiver<replica::Health>) -> String {
    match health.wait_for(|health| !health.is_well()).await.as_deref() {
        Ok(replica::Health::Failed { reason }) => reason.clone(),
        Ok(replica::Health::Well) | Err(_) => "it has ended".to_owned(),
    }
}

/// Leads whenever this member is the leader, until `stop`. Before anything else the cluster is founded, unless it was,
/// and what the configuration says is written down. With the seed of another miner than the cluster's it only keeps
/// the members right: the hotkey was replaced, and its host has not followed yet. On a wish, or when stopped, it ends what
/// it does as a leader while it still leads, so that all that it has received is recorded.
pub async fn lead(
    mut leader: Leader,
    founding: Vec<Command>,
    configure: Command,
    replica: Replica,
    mut wishes: mpsc::Receiver<Wish>,
    stop: CancellationToken,
) {
    let mut leadership = replica.leadership();
    loop {
        let waited = async { leadership.wait_for(|now| now.leads).await.map(|now| now.term) };
        let waited = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            waited = waited => waited,
            Some(wish) = wishes.recv() => {
                // It says why not.
                wish.carry_out(&replica).await;
                continue;
            }
        };
        let Ok(term) = waited else { return };
        tracing::info!(term, "this member leads");
        let ended = stop.child_token();
        let this_time = leader.next_time();
        let (store, own) = (leader.store.clone(), leader.signer.hotkey().clone());
        let leading = async {
            let kept = membership::keep(store.clone(), replica.clone(), ended.clone());
            let members = async {
                tokio::select! {
                    biased;
                    wish = kept => wish,
                    Some(wish) = membership::next_wish(&mut wishes, &replica) => Some(wish),
                }
            };
            match write_first(&store, &founding, &configure, &ended).await {
                First::Written => {
                    // None goes on without the others: leading begins anew when one of them ends.
                    let end_with = ended.clone().drop_guard();
                    let run = this_time.run(ended.clone()).map(|()| drop(end_with));
                    let end_with = ended.clone().drop_guard();
                    let members = members.inspect(|_| drop(end_with));
                    let led = async { tokio::join!(run, members).1 };
                    tokio::select! {
                        biased;
                        () = miner::replaced(&store, &own) => None,
                        wish = led => wish,
                    }
                }
                First::OtherMiner => members.await,
                First::Cancelled => None,
            }
        };
        let mut lost = leadership.clone();
        let lost = async {
            let _ = lost.wait_for(|now| !now.leads || now.term != term).await;
        };
        let begins_anew = tokio::select! {
            biased;
            () = lost => {
                tracing::warn!(term, "this member leads no more");
                false
            }
            wish = leading => {
                if let Some(wish) = wish {
                    wish.carry_out(&replica).await;
                }
                true
            }
        };
        ended.cancel();
        let pause = tokio::time::sleep(if begins_anew { LEAD_AGAIN } else { Duration::ZERO });
        if stop.run_until_cancelled(pause).await.is_none() {
            return;
        }
    }
}

/// What became of [`write_first`].
enum First {
    Written,
    /// The cluster belongs to another miner than this member's seed.
    OtherMiner,
    Cancelled,
}

/// Writes what comes first into the state.
async fn write_first(
    store: &Store,
    founding: &[Command],
    configure: &Command,
    cancel: &CancellationToken,
) -> First {
    while let Err(error) = try_write_first(store, founding, configure).await {
        if matches!(error, store::Error::Rejected(Rejection::OtherMiner(_))) {
            return First::OtherMiner;
        }
        tracing::warn!(%error, "the configuration is not recorded yet");
        let pause = tokio::time::sleep(Duration::from_millis(200));
        if cancel.run_until_cancelled(pause).await.is_none() {
            return First::Cancelled;
        }
    }
    First::Written
}

async fn try_write_first(
    store: &Store,
    founding: &[Command],
    configure: &Command,
) -> Result<(), store::Error> {
    if !founding.is_empty() {
        store.linearizable().await?;
    }
    let founded = store.read(|state| state.cluster().is_some());
    let founding = if founded { &[] } else { founding };
    for command in founding.iter().chain([configure]) {
        store.propose(command.clone()).await?;
    }
    Ok(())
}

impl StateMachine for Machine {
    fn apply(&mut self, command: &[u8]) -> Vec<u8> {
        Machine::apply(self, command)
    }

    fn changed_rows(&mut self) -> Vec<RowChange> {
        let rows = Machine::changed_rows(self).into_iter();
        rows.map(|Row { table, key, value }| RowChange { table, key, value })
            .collect()
    }

    fn load(&mut self, rows: &mut dyn Iterator<Item = (u8, Vec<u8>, Vec<u8>)>) -> Result<(), String> {
        Machine::load(self, rows).map_err(|error| error.to_string())
    }

    fn applied(&mut self, index: u64) {
        Machine::applied(self, index);
    }
}
