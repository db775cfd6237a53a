//! The command line as it is written.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Table,
    /// JSON, two spaces deep.
    Json,
    /// YAML.
    Yaml,
}

/// Manages a chutes.ai miner.
#[derive(Debug, Parser)]
#[command(name = "chutes-miner", version, disable_help_subcommand = true)]
pub(crate) struct Arguments {
    /// How results are printed
    #[arg(long, global = true, value_enum)]
    pub(crate) output: Option<Output>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The key that signs.
#[derive(Debug, Clone, Args)]
pub(crate) struct Key {
    /// Hotkey file: JSON with ss58Address and secretSeed
    #[arg(long, env = "HOTKEY", value_name = "PATH")]
    pub(crate) hotkey: PathBuf,
}

/// Where the miner's API is, and the key for it.
#[derive(Debug, Clone, Args)]
pub(crate) struct Miner {
    #[command(flatten)]
    pub(crate) key: Key,
    /// Base URL of the miner's management API; of several, joined by commas, the first that is there
    #[arg(
        long,
        env = "MINER_API",
        value_name = "URL",
        default_value = "http://127.0.0.1:32000"
    )]
    pub(crate) miner_api: String,
}

/// Where the validator's API is, and the key for it.
#[derive(Debug, Clone, Args)]
pub(crate) struct Validator {
    #[command(flatten)]
    pub(crate) key: Key,
    /// Base URL of the validator's API
    #[arg(
        long,
        env = "VALIDATOR_API",
        value_name = "URL",
        default_value = "https://api.chutes.ai"
    )]
    pub(crate) validator_api: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Puts a joined host with GPUs to work for a validator
    AddNode {
        #[command(flatten)]
        miner: Miner,
        /// Name of the host
        #[arg(long)]
        name: String,
        /// Hotkey of the validator
        #[arg(long)]
        validator: String,
        /// What ONE GPU of the host costs you per hour, in dollars (not the whole host)
        #[arg(long, value_name = "USD_PER_GPU")]
        hourly_cost: f64,
        /// GPU type in the validator's words, such as h100_sxm
        #[arg(long)]
        gpu_short_ref: String,
        /// Accepted for newer scripts; not needed here
        #[arg(long, value_name = "URL")]
        agent_api: Option<String>,
    },
    /// Takes a host away from its validator and stops what runs on it
    DeleteNode {
        #[command(flatten)]
        miner: Miner,
        /// Name or id of the host
        #[arg(long)]
        name: String,
        /// Ask nothing, stop jobs too
        #[arg(long, short)]
        yes: bool,
    },
    /// Stops every deployment on every host; jobs only with --include-jobs
    PurgeDeployments {
        #[command(flatten)]
        miner: Miner,
        /// Stop jobs too
        #[arg(long)]
        include_jobs: bool,
    },
    /// Stops one deployment, or those of one host
    PurgeDeployment {
        #[command(flatten)]
        miner: Miner,
        /// The deployment
        #[arg(long, short)]
        deployment_id: Option<String>,
        /// Name or id of the host
        #[arg(long, short)]
        node_id: Option<String>,
        /// With --node-id: stop jobs too
        #[arg(long)]
        include_jobs: bool,
        /// Ask nothing
        #[arg(long, short)]
        yes: bool,
    },
    /// Stops the deployments of one host; jobs only with --include-jobs
    PurgeServer {
        #[command(flatten)]
        miner: Miner,
        /// Name or id of the host
        #[arg(long, short)]
        name: String,
        /// Stop jobs too
        #[arg(long)]
        include_jobs: bool,
        /// Ask nothing
        #[arg(long, short)]
        yes: bool,
    },
    /// Shows the servers, GPUs and deployments that this miner knows
    LocalInventory {
        #[command(flatten)]
        miner: Miner,
        /// Print JSON
        #[arg(long, overrides_with = "no_raw_json")]
        raw_json: bool,
        #[arg(long, hide = true)]
        no_raw_json: bool,
        /// Only this server: exact name or id
        #[arg(long, short)]
        name: Option<String>,
    },
    /// Shows the GPUs that the validator knows of this miner
    RemoteInventory {
        #[command(flatten)]
        validator: Validator,
        /// Print JSON
        #[arg(long, overrides_with = "no_raw_json")]
        raw_json: bool,
        #[arg(long, hide = true)]
        no_raw_json: bool,
    },
    /// Deletes ALL GPUs of this miner from the validator
    ScorchRemote {
        #[command(flatten)]
        validator: Validator,
        /// Ask nothing
        #[arg(long)]
        yes: bool,
    },
    /// Deletes one GPU from the validator
    DeleteRemote {
        #[command(flatten)]
        validator: Validator,
        /// The GPU
        #[arg(long)]
        gpu_id: String,
    },
    /// Gives a server no new work; what runs there goes on
    Lock {
        #[command(flatten)]
        miner: Miner,
        /// Name or id of the host
        #[arg(long)]
        name: String,
    },
    /// Lifts a lock
    Unlock {
        #[command(flatten)]
        miner: Miner,
        /// Name or id of the host
        #[arg(long)]
        name: String,
    },
    /// Shows the cluster on one screen
    Status {
        #[command(flatten)]
        miner: Miner,
    },
    /// Shows each deployment with the times of its launch
    Deployments {
        #[command(flatten)]
        miner: Miner,
        /// Those that are gone, the last one first
        #[arg(long)]
        gone: bool,
    },
    /// Prints what a deployment wrote; of one that is gone, the end of it, for seven days
    Logs {
        #[command(flatten)]
        miner: Miner,
        /// Id of the deployment
        deployment: String,
        /// Go on until the deployment is gone
        #[arg(long, short, conflicts_with = "previous")]
        follow: bool,
        /// Of the run before the present one
        #[arg(long, short)]
        previous: bool,
    },
    /// Shows what happened to a deployment on its host; of one that is gone, for seven days
    Events {
        #[command(flatten)]
        miner: Miner,
        /// Id of the deployment
        deployment: String,
    },
    /// Prints what the validator has of an instance's output before it became active
    InstanceLogs {
        /// Base URL of the validator's API
        #[arg(
            long,
            env = "VALIDATOR_API",
            value_name = "URL",
            default_value = "https://api.chutes.ai"
        )]
        validator_api: String,
        /// The launch token of the instance
        #[arg(long, short, env = "CHUTES_LAUNCH_JWT", hide_env_values = true)]
        jwt: String,
        /// Only what came after this time: YYYY-MM-DDTHH:MM:SS
        #[arg(long, short)]
        cursor: Option<String>,
    },
    /// Compares the record with the hosts and the validators, a reason for each difference
    Diff {
        #[command(flatten)]
        miner: Miner,
        /// Also what agrees
        #[arg(long)]
        all: bool,
        /// Stop the deployments named by --select, within the deletion budget
        #[arg(long, requires = "select")]
        fix: bool,
        /// Deployments to stop; nothing else is touched
        #[arg(long, value_name = "ID", num_args = 1.., requires = "fix")]
        select: Vec<String>,
        /// With --fix: jobs too
        #[arg(long, requires = "fix")]
        include_jobs: bool,
        /// With --fix: also deployments whose pay has not vested, and private chutes
        #[arg(long, requires = "fix")]
        allow_loss: bool,
    },
    /// Says why a chute, server or deployment is where it is, or is not
    Explain {
        #[command(flatten)]
        miner: Miner,
        #[command(flatten)]
        subject: Subject,
    },
    /// Never runs a chute
    Ban {
        #[command(flatten)]
        miner: Miner,
        /// Id or name of the chute
        #[arg(long)]
        chute: String,
        /// Its validator, where two use the same id
        #[arg(long)]
        validator: Option<String>,
        /// Why, for those who come later
        #[arg(long)]
        reason: String,
    },
    /// Invites hosts, lists them, removes them, says which of them should vote
    Host {
        #[command(subcommand)]
        command: HostCommand,
    },
    /// Shows who votes and who leads, hands the lead over
    Raft {
        #[command(subcommand)]
        command: RaftCommand,
    },
    /// Saves the state as an encrypted file, looks at such files
    Snapshot {
        #[command(subcommand)]
        command: SnapshotCommand,
    },
    /// Shows what each host runs, finalizes an upgrade
    Upgrade {
        #[command(subcommand)]
        command: UpgradeCommand,
    },
    /// Shows the authority of hosts' certificates, changes over to another one
    Ca {
        #[command(subcommand)]
        command: CaCommand,
    },
    /// Shows the miner's hotkey and which host has its seed, replaces it by another one
    Hotkey {
        #[command(subcommand)]
        command: HotkeyCommand,
    },
    /// Adds, lists and removes sealed workers: servers without an agent, driven through the kubeconfig of each
    Worker {
        #[command(subcommand)]
        command: WorkerCommand,
    },
    /// Lets the cluster only watch, while another miner acts with this hotkey, or act again; shows what it would do
    Observe {
        #[command(subcommand)]
        command: ObserveCommand,
    },
    /// Takes over a running original miner without stopping a chute; without --apply it only says what it would do
    Import(Import),
    /// Writes what this miner knows into the original's database: the way back; without --apply it only says what it
    /// would do
    Export(Export),
    /// Lifts a ban
    Unban {
        #[command(flatten)]
        miner: Miner,
        /// Id or name of the chute
        #[arg(long)]
        chute: String,
        /// Its validator, where two use the same id
        #[arg(long)]
        validator: Option<String>,
    },
}

/// What is taken over.
#[derive(Debug, Clone, Args)]
pub(crate) struct Import {
    #[command(flatten)]
    pub(crate) miner: Miner,
    /// URL of the original miner's database: postgresql://USER:PASSWORD@HOST:PORT/DATABASE
    #[arg(long, env = "POSTGRESQL", hide_env_values = true, value_name = "URL")]
    pub(crate) postgres: String,
    /// Kubeconfig file of the original miner's cluster [default: that of the surroundings]
    #[arg(long, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// Namespace of the chutes
    #[arg(long, default_value = "chutes")]
    pub(crate) namespace: String,
    /// Do it
    #[arg(long)]
    pub(crate) apply: bool,
    /// Show also what the cluster would do if it had taken them over and acted; nothing is written anywhere
    #[arg(long, conflicts_with = "apply")]
    pub(crate) observe: bool,
    /// With --observe: go on, and print decisions as they come (+) and go (-)
    #[arg(long, short, requires = "observe")]
    pub(crate) follow: bool,
    /// Only this server (repeatable)
    #[arg(long, value_name = "NAME")]
    pub(crate) server: Vec<String>,
}

/// What is handed back.
#[derive(Debug, Clone, Args)]
pub(crate) struct Export {
    #[command(flatten)]
    pub(crate) miner: Miner,
    /// URL of the original miner's database: postgresql://USER:PASSWORD@HOST:PORT/DATABASE
    #[arg(long, env = "POSTGRESQL", hide_env_values = true, value_name = "URL")]
    pub(crate) postgres: Option<String>,
    /// Kubeconfig file of the original miner's cluster [default: that of the surroundings]
    #[arg(long, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// Namespace of the chutes
    #[arg(long, default_value = "chutes")]
    pub(crate) namespace: String,
    /// Take our marks off the objects instead, once the agents are removed
    #[arg(long)]
    pub(crate) release: bool,
    /// Do it
    #[arg(long)]
    pub(crate) apply: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum HostCommand {
    /// Makes a join token, good once
    Invite {
        #[command(flatten)]
        miner: Miner,
        /// The host has the miner's seed and becomes a member of the coordinator
        #[arg(long)]
        eligible: bool,
        /// How long it is good: 90s, 10m, 2h; 24h at most [default: 1h]
        #[arg(long)]
        ttl: Option<String>,
        /// The host's site, whatever it says itself
        #[arg(long)]
        site: Option<String>,
    },
    /// Shows the hosts and their roles
    List {
        #[command(flatten)]
        miner: Miner,
    },
    /// Takes a host out of the cluster; delete-node comes first
    Remove {
        #[command(flatten)]
        miner: Miner,
        /// Name or id of the host
        name: String,
        /// Ask nothing
        #[arg(long, short)]
        yes: bool,
    },
    /// Says whether a host should vote
    Pin {
        #[command(flatten)]
        miner: Miner,
        /// Name or id of the host
        name: String,
        #[arg(value_enum)]
        pin: PinWord,
    },
}

/// Whether a host should vote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PinWord {
    /// As the leader decides
    Auto,
    /// Before others
    Voter,
    /// Never
    Never,
}

#[derive(Debug, Subcommand)]
pub(crate) enum RaftCommand {
    /// Shows the members, how far each has come, and what the loss of each site would do
    Status {
        #[command(flatten)]
        miner: Miner,
    },
    /// Hands the lead to a host
    Transfer {
        #[command(flatten)]
        miner: Miner,
        /// Name or id of the host; left out: whoever has come farthest
        host: Option<String>,
    },
    /// Says what to do when the majority of the voters is lost for good
    Recover,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CaCommand {
    /// Shows which authority each host's certificate is of
    Status {
        #[command(flatten)]
        miner: Miner,
    },
    /// Makes another authority, to which all hosts change over by themselves
    Rotate {
        #[command(flatten)]
        miner: Miner,
        /// Drop the old one; refused while a host still carries a certificate of it
        #[arg(long)]
        finish: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum HotkeyCommand {
    /// Shows the miner's hotkey, whose seed each member runs with, and what keeps the hotkey from being replaced
    Status {
        #[command(flatten)]
        miner: Miner,
    },
    /// Gives the miner another hotkey; refused while validators know GPUs or instances of the old one
    Replace {
        #[command(flatten)]
        miner: Miner,
        /// Hotkey file of the new one: JSON with ss58Address and secretSeed; its seed does not leave this machine
        #[arg(long, value_name = "PATH")]
        new_hotkey: PathBuf,
        /// Ask nothing
        #[arg(long, short)]
        yes: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum WorkerCommand {
    /// Adds a worker, or gives one that is known another kubeconfig
    Add(AddWorker),
    /// Lists workers
    List {
        #[command(flatten)]
        miner: Miner,
    },
    /// Forgets a worker that works for no validator
    Remove {
        #[command(flatten)]
        miner: Miner,
        /// Name or id of the worker
        name: String,
        /// Ask nothing
        #[arg(long, short)]
        yes: bool,
    },
}

/// A worker to be added.
#[derive(Debug, Clone, Args)]
pub(crate) struct AddWorker {
    #[command(flatten)]
    pub(crate) miner: Miner,
    /// Kubeconfig of its cluster, with everything in it (`kubectl config view --raw --flatten --minify`); - for standard
    /// input
    #[arg(
        long,
        value_name = "PATH",
        required_unless_present = "agent_api",
        conflicts_with = "agent_api"
    )]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// The worker's own agent, which hands its kubeconfig out to its miner, such as http://192.0.2.7:32000
    #[arg(long, value_name = "URL")]
    pub(crate) agent_api: Option<String>,
    /// Which context of the kubeconfig [default: the current one]
    #[arg(long)]
    pub(crate) context: Option<String>,
    /// Where validators reach the worker [default: as its node says]
    #[arg(long)]
    pub(crate) address: Option<String>,
    /// Port of its attestation service [default: 30443]
    #[arg(long, value_name = "PORT")]
    pub(crate) attestation_port: Option<u16>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Makes the key that opens snapshots, and prints its public half
    Keygen {
        /// File for the key; it must not exist
        file: PathBuf,
    },
    /// Saves a snapshot with everything acknowledged so far
    Save {
        #[command(flatten)]
        miner: Miner,
        /// File to write; left out: the name that the member gives it, in this folder
        #[arg(long, value_name = "FILE")]
        to: Option<PathBuf>,
        /// Public half of the key that opens it; left out: backup.recipient of the member's configuration
        #[arg(long, value_name = "WORD", conflicts_with = "key")]
        recipient: Option<String>,
        /// Key file that opens it; the saved file is then read back
        #[arg(long, value_name = "FILE")]
        key: Option<PathBuf>,
    },
    /// Shows what a snapshot says of itself; with the key also what is in it, and that it is sound
    Inspect {
        /// The snapshot
        file: PathBuf,
        /// Key file that opens it
        #[arg(long, value_name = "FILE")]
        key: Option<PathBuf>,
    },
    /// Tries a snapshot and its key, and says what to run on the new machine
    Restore {
        /// The snapshot
        file: PathBuf,
        /// Key file that opens it
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
        /// Name of the cluster; it must be the one in the snapshot
        #[arg(long)]
        cluster: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum UpgradeCommand {
    /// Shows what each host runs, and whether something is to be finalized
    Status {
        #[command(flatten)]
        miner: Miner,
    },
    /// Allows what came with the present version; the version before is refused afterwards
    Finalize {
        #[command(flatten)]
        miner: Miner,
        /// Host that reports no version, and that you have looked after yourself (repeatable)
        #[arg(long, value_name = "HOST")]
        vouch: Vec<String>,
        /// Ask nothing
        #[arg(long, short)]
        yes: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ObserveCommand {
    /// Show what the cluster would do now if it acted: what it would place, stop and delete; nothing is done
    Trial {
        #[command(flatten)]
        miner: Miner,
        /// Also say of each chute that would be left alone why
        #[arg(long, conflicts_with = "follow")]
        all: bool,
        /// Go on, and print decisions as they come (+) and go (-)
        #[arg(long, short)]
        follow: bool,
    },
    /// Leave validators alone from now on: no socket, no launch, nothing told; what runs goes on
    Start {
        #[command(flatten)]
        miner: Miner,
    },
    /// Act from now on; no other miner may act with this hotkey
    Stop {
        #[command(flatten)]
        miner: Miner,
        /// Ask nothing
        #[arg(long, short)]
        yes: bool,
    },
}

#[derive(Debug, Clone, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Subject {
    /// Id or name of a chute
    #[arg(long)]
    pub(crate) chute: Option<String>,
    /// Name or id of a server
    #[arg(long)]
    pub(crate) server: Option<String>,
    /// Id of a deployment
    #[arg(long)]
    pub(crate) deployment: Option<String>,
}
