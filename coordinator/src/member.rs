//! A coordinator member: opens the replicated state, lets hosts and operators in, and leads when it is this
//! member's turn.

use std::sync::Arc;

use replica::{Replica, RowChange, StateMachine, Storage};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use coordinator_core::state_machine::{Command, Faults};

use crate::api;
use crate::backup::{Keeper, Snapshots};
use crate::clock::Clock;
use crate::config::Config;
use crate::executor::Validators;
use crate::host_link::{Hub, headers, quic, session};
use crate::identity::{Authority, IdentityError};
use crate::leader::{Leader, Listings, Scheduling};
use crate::membership;
use crate::signer::Sign;
use crate::store::{BoxFuture, Log, Machine, Store};
use crate::validator::http::Limits;
use crate::validator::socket::TcpDial;
use crate::validator::{self, Client, ValidatorApi};

/// The only member of a cluster of one.
const FIRST_MEMBER: u64 = 1;

/// After a failure of the replicated state, the rest gets so long to end.
const FAILED_STOP_MAX: std::time::Duration = std::time::Duration::from_secs(5);

/// Why a member cannot start, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The replicated state.
    #[error("open the replicated state: {0}")]
    Replica(#[from] replica::Error),
    /// The replicated state failed while this member ran: a full disk, say. Only a new start reads what is there.
    #[error("the replicated state failed: {0}; nothing more is acknowledged before a new start")]
    Failed(String),
    /// The cluster's certificates.
    #[error("cluster identity: {0}")]
    Identity(#[from] IdentityError),
    /// The door for hosts.
    #[error(transparent)]
    HostLink(#[from] quic::Error),
    /// The door for operators.
    #[error("listen for the management API on {0}: {1}")]
    Api(std::net::SocketAddr, std::io::Error),
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
    /// The folder cannot be made.
    #[error("{0}: {1}")]
    Folder(std::path::PathBuf, std::io::Error),
    /// The strategy does not exist.
    #[error("coordinator.strategy = {0:?} is not known; there is {1}")]
    Strategy(String, String),
}

/// Runs a member until `shutdown`; an acknowledged write is on disk when this returns.
///
/// # Errors
/// [`Error`] when it cannot start, and [`Error::Failed`] when the replicated state fails later.
pub async fn run(
    config: Config,
    signer: Arc<dyn Sign>,
    clock: Arc<dyn Clock>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    if *signer.hotkey() != config.miner {
        let (configured, signer) = (config.miner, signer.hotkey().clone());
        return Err(Error::OtherHotkey { configured, signer });
    }
    let identity_folder = config.data.join("identity");
    std::fs::create_dir_all(&identity_folder)
        .map_err(|error| Error::Folder(identity_folder.clone(), error))?;
    let authority = Authority::open_or_found(&identity_folder)?;
    let mut random = fastrand::Rng::new();
    let scheduling = Scheduling::new(&config.strategy, config.tick_every)
        .map_err(|known| Error::Strategy(config.strategy.clone(), known))?;

    let machine = Machine::new(Faults::none());
    let storage = Storage::Files {
        directory: config.data.join("raft"),
    };
    let replica_config = replica::Config::new(&config.cluster, FIRST_MEMBER, storage);
    let replica = Replica::open(
        replica_config,
        Box::new(machine.clone()),
        Arc::new(replica::Unconnected),
    )
    .await?;
    let log = Arc::new(ReplicatedLog::new(replica.clone()));
    let store = Store::new(machine, log, Arc::clone(&clock), random.u64(..));

    let mut validators = Validators::new();
    for validator in config.validators.iter() {
        let (signer, clock) = (Arc::clone(&signer), Arc::clone(&clock));
        let client = Client::new(validator, signer, clock, Limits::default(), random.fork())?;
        validators.insert(
            validator.hotkey.clone(),
            Arc::new(client) as Arc<dyn ValidatorApi>,
        );
    }
    let validators = Arc::new(validators);
    let (hub, listings) = (Hub::default(), Listings::default());

    let hosts = quic::listen(config.hosts_listen, &authority.member()?)?;
    let operators = tokio::net::TcpListener::bind(config.api_listen)
        .await
        .map_err(|error| Error::Api(config.api_listen, error))?;
    tracing::info!(hosts = %config.hosts_listen, api = %config.api_listen, "coordinator member serves");

    let services = TaskTracker::new();
    let stop = CancellationToken::new();
    let (header_sets, header_sets_followed) = watch::channel(Vec::new());
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
    let context = session::Context {
        store: store.clone(),
        signer: Arc::clone(&signer),
        hub: hub.clone(),
        headers: header_sets_followed,
    };
    services.spawn(quic::accept(hosts, context, stop.clone()));
    let api_config = api::Config {
        miner: config.miner.clone(),
        member: FIRST_MEMBER.to_string(),
        allow_plain_legacy_writes: config.allow_plain_legacy_writes,
        limits: api::Limits::default(),
    };
    let snapshots = Snapshots::new(config.cluster.clone(), store.clone(), replica.clone());
    let keeper = Keeper::new(snapshots, config.backup.clone());
    let deps = api::Deps {
        supported_gpus: Arc::new(validators.as_ref().clone()),
        host_reports: Arc::new(hub.clone()),
        validator_listing: Arc::new(listings.clone()),
        cluster: Arc::new(api::ReplicatedCluster::new(
            config.cluster.clone(),
            replica.clone(),
        )),
        backup: keeper.door(),
    };
    services.spawn(api::serve(
        api_config,
        store.clone(),
        deps,
        operators,
        stop.clone(),
    ));
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
    services.spawn(lead(leader, configure, replica.clone(), stop.clone()));
    services.spawn(keeper.run(stop.clone()));
    services.close();

    let failure = shutdown.run_until_cancelled(failure_of(replica.health())).await;
    tracing::info!("coordinator member stops");
    stop.cancel();
    let in_order = async {
        services.wait().await;
        replica.shutdown().await;
    };
    let Some(reason) = failure else {
        in_order.await;
        return Ok(());
    };
    // What is acknowledged is on the disk; what waits for the failed state may wait for ever.
    if tokio::time::timeout(FAILED_STOP_MAX, in_order).await.is_err() {
        tracing::warn!("not everything ended in order");
    }
    Err(Error::Failed(reason))
}

/// Waits until the replicated state fails.
async fn failure_of(mut health: watch::Receiver<replica::Health>) -> String {
    match health.wait_for(|health| !health.is_well()).await.as_deref() {
        Ok(replica::Health::Failed { reason }) => reason.clone(),
        Ok(replica::Health::Well) | Err(_) => "it has ended".to_owned(),
    }
}

/// Leads whenever this member is the leader, until `stop`. `configure` is what the configuration says, written
/// into the state first.
pub async fn lead(leader: Leader, configure: Command, replica: Replica, stop: CancellationToken) {
    let mut leadership = replica.leadership();
    loop {
        let waited = stop
            .run_until_cancelled(leadership.wait_for(|now| now.leads))
            .await;
        let Some(Ok(term)) = waited.map(|waited| waited.map(|now| now.term)) else {
            return;
        };
        tracing::info!(term, "this member leads");
        let ended = stop.child_token();
        let leading = async {
            if write_configuration(&leader, &configure, &ended).await {
                let members = membership::keep(leader.store.clone(), replica.clone(), ended.clone());
                tokio::join!(leader.clone().run(ended.clone()), members);
            }
        };
        let mut lost = leadership.clone();
        let lost = async {
            let _ = lost.wait_for(|now| !now.leads || now.term != term).await;
        };
        tokio::select! {
            biased;
            () = lost => tracing::warn!(term, "this member leads no more"),
            () = leading => {}
        }
        ended.cancel();
        if stop.is_cancelled() {
            return;
        }
    }
}

/// Writes the configuration into the state, if it differs; false if that was cancelled.
async fn write_configuration(leader: &Leader, configure: &Command, cancel: &CancellationToken) -> bool {
    loop {
        match leader.store.propose(configure.clone()).await {
            Ok(_) => return true,
            Err(error) => {
                tracing::warn!(%error, "the configuration is not recorded yet");
                let pause = tokio::time::sleep(std::time::Duration::from_millis(200));
                if cancel.run_until_cancelled(pause).await.is_none() {
                    return false;
                }
            }
        }
    }
}

impl StateMachine for Machine {
    fn apply(&mut self, command: &[u8], changed: &mut Vec<RowChange>) -> Vec<u8> {
        let (answer, rows) = Machine::apply(self, command);
        changed.extend(rows.into_iter().map(|row| RowChange {
            table: row.table,
            key: row.key,
            value: row.value,
        }));
        answer
    }

    fn load(&mut self, rows: &mut dyn Iterator<Item = (u8, Vec<u8>, Vec<u8>)>) -> Result<(), String> {
        Machine::load(self, rows).map_err(|error| error.to_string())
    }

    fn applied(&mut self, index: u64) {
        Machine::applied(self, index);
    }
}

/// The replica as the store's log.
#[derive(Debug)]
pub struct ReplicatedLog {
    replica: Replica,
}

impl ReplicatedLog {
    /// A log over this replica, which drives the machine that it was opened with.
    #[must_use]
    pub fn new(replica: Replica) -> Self {
        Self { replica }
    }
}

impl Log for ReplicatedLog {
    fn propose(&self, command: Vec<u8>) -> BoxFuture<'_, Result<Vec<u8>, String>> {
        Box::pin(async {
            self.replica
                .propose(command)
                .await
                .map_err(|error| error.to_string())
        })
    }

    fn linearizable(&self) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async {
            self.replica
                .linearizable()
                .await
                .map_err(|error| error.to_string())
        })
    }
}
