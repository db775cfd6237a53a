//! Settings as they are written. The comments on the keys are the documentation of the keys:
//! `docs/configuration.md` is made of them.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use coordinator::validator::directory::ValidatorSettings;
use coordinator_core::scheduler::strategy;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::units::Span;
use crate::{cache, egress, packet_filter, registry};

/// The whole file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Written {
    /// Folder of all that the agent keeps; only its owner can look into it.
    pub data: PathBuf,
    /// Who we work for, the first being the default for images that name no validator; 1 to 16.
    pub validators: Vec<ValidatorSettings>,
    /// Who we are.
    pub miner: Miner,
    /// This machine as a host of workloads.
    pub host: Host,
    /// This machine as a member of the coordinator.
    pub coordinator: Coordinator,
    /// The Kubernetes cluster whose nodes enter by themselves, if this host is one of them.
    pub nodes: Nodes,
    /// Snapshots of the state that a member puts away elsewhere, encrypted.
    pub backup: Backup,
    /// The GPU proof, which validators ask for.
    pub proof: Proof,
    /// The registry door, through which images are pulled.
    pub registry: registry::RawConfig,
    /// The egress door, through which chutes reach the outside.
    pub egress: egress::RawConfig,
    /// The cleaner of the cache of models.
    pub cache: cache::RawConfig,
    /// How chutes run.
    pub runtime: Runtime,
    /// What pods reach of this host and around it.
    pub packet_filter: packet_filter::RawConfig,
    /// The replicated log, on members.
    pub raft: Raft,
    /// What is logged, on standard error.
    pub log: Log,
}

impl Default for Written {
    fn default() -> Self {
        Self {
            data: PathBuf::from("/var/lib/chutes-agent"),
            validators: Vec::new(),
            miner: Miner::default(),
            host: Host::default(),
            coordinator: Coordinator::default(),
            nodes: Nodes::default(),
            backup: Backup::default(),
            proof: Proof::default(),
            registry: registry::RawConfig::default(),
            egress: egress::RawConfig::default(),
            cache: cache::RawConfig::default(),
            runtime: Runtime::default(),
            packet_filter: packet_filter::RawConfig::default(),
            raft: Raft::default(),
            log: Log::default(),
        }
    }
}

/// `[miner]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Miner {
    /// The miner's SS58 address. Required.
    pub hotkey: String,
    /// File with the miner's seed: hexadecimal, or a wallet's hotkey file; mode 0600. Required on members of
    /// the coordinator, and of no use elsewhere.
    pub seed_file: Option<PathBuf>,
    /// Allow the seed on a machine that also runs chutes. Without it such a machine is no member.
    pub seed_on_gpu_host: bool,
    /// User and group, as numbers `"user:group"`, that the signer becomes when it is started as root.
    pub signer_user: Option<String>,
}

/// `[host]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Host {
    /// Run workloads here. A machine that does not is a member of the coordinator only.
    pub enabled: bool,
    /// Name that people use; the machine's name when absent.
    pub name: Option<String>,
    /// Identity of this host, also in its certificate: letters, digits, `-` and `.`. When absent the one under which it
    /// has joined, and before that made from the name and the machine's id; must not change afterwards.
    pub id: Option<String>,
    /// Address under which validators reach this host from outside. Required on hosts.
    pub address: Option<String>,
    /// Member of the coordinator to connect to first, as `address:port`; this machine's own when absent and
    /// `coordinator.enabled` is true. All members are known from joining.
    pub coordinator: Option<String>,
    /// Provider or place of this machine. Members are spread over sites, so that the loss of one stops nothing;
    /// an invitation may say another one.
    pub site: Option<String>,
    /// TCP address where Prometheus reads `/metrics` of the host's doors, cache and GPU proof without a signature; none
    /// when absent. Open it to networks that you trust only.
    pub metrics_listen: Option<SocketAddr>,
    /// For settings that several hosts share: addresses under which validators reach them from outside, by `host.name`.
    /// A host that is not named here has `host.address`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub addresses: BTreeMap<String, String>,
}

impl Default for Host {
    fn default() -> Self {
        Self {
            enabled: true,
            name: None,
            id: None,
            address: None,
            coordinator: None,
            site: None,
            metrics_listen: None,
            addresses: BTreeMap::new(),
        }
    }
}

/// `[coordinator]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Coordinator {
    /// Be a member of the coordinator: keep the state, speak with validators, decide.
    pub enabled: bool,
    /// Name of the cluster that `init` founds; where a host has joined, the name is known from there.
    pub cluster: String,
    /// UDP address where hosts and other members connect (QUIC with certificates of the cluster on both sides).
    pub hosts_listen: SocketAddr,
    /// Where others reach `coordinator.hosts_listen`, as `address:port`. When absent, that address itself, or
    /// `host.address` with its port if it is none in particular.
    pub advertise: Option<String>,
    /// Where other members are, as `address:port` each, besides where they are known to be. Needed when all members get
    /// new addresses at once: set the others' on every member, and take it out when they have found each other.
    pub members: Vec<String>,
    /// TCP address of the management API. It has no TLS of its own: loopback, or an address with TLS in front.
    pub api_listen: SocketAddr,
    /// TCP address where Prometheus reads `/metrics` of this member without a signature; none when absent. Open it to
    /// networks that you trust only.
    pub metrics_listen: Option<SocketAddr>,
    /// Rules of pay that protect running instances: `"2026"`, or `"2025-09"`.
    pub pay_profile: PayProfile,
    /// Name of the strategy that places chutes.
    pub strategy: String,
    /// Between two passes of the strategy when nothing happens.
    pub tick: Span,
    /// Between two listings of what a validator knows, when nothing asks for one earlier.
    pub observe: Span,
    /// A cluster that this member founds only observes: it opens no validator's socket, tells validators nothing and
    /// places nothing until `chutes-miner observe stop`. For taking over what another miner runs.
    pub found_observing: bool,
    /// Accept changes signed in the original scheme, which binds neither method nor path, from anywhere and
    /// without TLS; for old clients in a network that you trust.
    pub allow_plain_legacy_writes: bool,
}

impl Default for Coordinator {
    fn default() -> Self {
        Self {
            enabled: false,
            cluster: "chutes".to_owned(),
            hosts_listen: SocketAddr::from(([0, 0, 0, 0], 4433)),
            advertise: None,
            members: Vec::new(),
            api_listen: SocketAddr::from(([127, 0, 0, 1], 32000)),
            metrics_listen: None,
            pay_profile: PayProfile::Of2026,
            strategy: strategy::NAMES[0].to_owned(),
            tick: Span::seconds(15),
            observe: Span::seconds(60),
            found_observing: false,
            allow_plain_legacy_writes: false,
        }
    }
}

/// `[nodes]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Nodes {
    /// Name of the `ConfigMap` that says which cluster there is and where its members are. `chutes-agent enter` makes
    /// or follows it, and the leader keeps it right. Nodes enter by themselves where it is set; the rest of this
    /// section is required then.
    pub config_map: Option<String>,
    /// Its namespace, which is also that of the two accounts.
    pub namespace: Option<String>,
    /// Service account of the pods whose hosts become members.
    pub member_account: Option<String>,
    /// Service account of all other pods of the agent: their hosts get no vote.
    pub host_account: Option<String>,
    /// For whom pods' tokens are made that are shown on entering: a word that nothing else uses.
    pub audience: Option<String>,
    /// File with the token of this pod, which is read again each time. Needed by `chutes-agent enter` only.
    pub token_file: Option<PathBuf>,
}

/// Rules of pay by the year in which they came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PayProfile {
    /// 60 min from verification.
    #[serde(rename = "2025-09")]
    Of2025September,
    /// 63 min from activation.
    #[serde(rename = "2026")]
    Of2026,
}

/// `[backup]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Backup {
    /// Directory for snapshots, best one that is on another machine. Without it and without a bucket none are
    /// put away by themselves.
    pub directory: Option<PathBuf>,
    /// Bucket for snapshots, instead of a directory, in a store that speaks S3.
    pub bucket: Option<String>,
    /// Base URL of the store, such as `https://s3.eu-central-1.amazonaws.com`. Required with a bucket.
    pub endpoint: Option<String>,
    /// Region of the bucket, as the store calls it.
    pub region: String,
    /// What the names of the objects begin with, such as `miner/`.
    pub prefix: String,
    /// File with the bucket's keys, as lines `aws_access_key_id = ...` and `aws_secret_access_key = ...`; mode
    /// 0600. Required with a bucket.
    pub key_file: Option<PathBuf>,
    /// Public half of the key that opens the snapshots: `chutes-miner snapshot keygen` makes it. Required with a
    /// directory or a bucket.
    pub recipient: Option<String>,
    /// Between two snapshots.
    pub every: Span,
    /// So many snapshots are kept, the newest ones; older ones of this cluster are deleted.
    pub keep: usize,
}

impl Default for Backup {
    fn default() -> Self {
        Self {
            directory: None,
            bucket: None,
            endpoint: None,
            region: "us-east-1".to_owned(),
            prefix: String::new(),
            key_file: None,
            recipient: None,
            every: Span::seconds(6 * 60 * 60),
            keep: 28,
        }
    }
}

/// `[proof]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Proof {
    /// Where validators connect; the same port must be open at `host.address`.
    pub listen: SocketAddr,
    /// What proves: `"cuda"`, the cards that the driver shows, or `"cpu"`, software GPUs for development,
    /// with validators on this machine only.
    pub backend: ProofBackend,
    /// How many software GPUs the backend `"cpu"` has.
    pub software_gpus: usize,
    /// How long a proof may wait for the one in front of it.
    pub wait_max: Span,
    /// How many proofs may wait; more are refused.
    pub waiting_max: usize,
    /// How long the work of one proof may take.
    pub work_max: Span,
}

impl Default for Proof {
    fn default() -> Self {
        let limits = crate::gpu::worker::Limits::default();
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 30443)),
            backend: ProofBackend::Cuda,
            software_gpus: 8,
            wait_max: Span(limits.wait_max),
            waiting_max: limits.waiting_max,
            work_max: Span(limits.work_max),
        }
    }
}

/// What proves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProofBackend {
    /// The cards that the driver shows.
    Cuda,
    /// Software GPUs.
    Cpu,
}

/// `[runtime]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Runtime {
    /// What runs chutes: `"kubernetes"`, or `"process"`, child processes for development, which isolate nothing and
    /// are refused unless all validators are on this machine.
    pub kind: RuntimeKind,
    /// Kubeconfig file of the cluster that this host is a node of. Without it: the file that `KUBECONFIG` names,
    /// else `~/.kube/config`, else the service account of the pod that the agent runs in (`kubernetes` only).
    pub kubeconfig: Option<PathBuf>,
    /// Namespace of all chutes; it must exist (`kubernetes` only).
    pub namespace: String,
    /// Name of the node that this host is; `host.name` if missing (`kubernetes` only).
    pub node: Option<String>,
    /// Runtime class that gives containers the GPUs of `NVIDIA_VISIBLE_DEVICES`: `nvidia` on k3s,
    /// `nvidia-container-runtime` where the GPU operator made it on microk8s (`kubernetes` only).
    pub runtime_class: String,
    /// Image of the container that prepares a chute's cache folder; needs `/bin/sh` (`kubernetes` only).
    pub init_image: String,
    /// External ports that chutes may get, as `"first-last"` (`process` only; a cluster has its own range).
    pub ports: String,
    /// Time between asking a chute to stop and killing it.
    pub stop_grace: Span,
}

impl Default for Runtime {
    fn default() -> Self {
        Self {
            kind: RuntimeKind::Kubernetes,
            kubeconfig: None,
            namespace: "chutes".to_owned(),
            node: None,
            runtime_class: "nvidia".to_owned(),
            init_image: "busybox:1.37.0".to_owned(),
            ports: "31000-31999".to_owned(),
            stop_grace: Span::seconds(30),
        }
    }
}

/// What runs chutes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RuntimeKind {
    /// Pods and jobs.
    Kubernetes,
    /// Child processes.
    Process,
}

/// `[raft]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Raft {
    /// Heartbeats and elections: `"lan"` for members in one place (a new leader within about a second), `"wan"` for
    /// members far apart (within about five), `"auto"` by the measured round trips.
    pub timing: Timing,
}

impl Default for Raft {
    fn default() -> Self {
        Self { timing: Timing::Auto }
    }
}

/// Heartbeats and elections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Timing {
    /// By the measured round trips.
    Auto,
    /// Members in one place.
    Lan,
    /// Members far apart.
    Wan,
}

/// `[log]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// Least severe level to log: `"error"`, `"warn"`, `"info"`, `"debug"`, `"trace"`; or several directives
    /// such as `"info,coordinator=debug"`. Directives in the variable `RUST_LOG` are added.
    pub level: String,
    /// Form of a line: `"text"` or `"json"`.
    pub format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
            format: LogFormat::Text,
        }
    }
}

/// Form of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

/// What the machine says of itself, for defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// Its id; empty when it has none.
    pub id: String,
}

impl Machine {
    /// The machine that this runs on.
    #[must_use]
    pub fn this() -> Self {
        let read = |path| {
            std::fs::read_to_string(path).map_or_else(|_| String::new(), |text| text.trim().to_owned())
        };
        Self {
            name: read("/proc/sys/kernel/hostname"),
            id: read("/etc/machine-id"),
        }
    }
}

impl Written {
    /// Fills in what depends on the machine and on other keys, so that what is printed and what child
    /// processes get is complete.
    pub fn fill_in(&mut self, machine: &Machine) {
        let name = self.host.name.get_or_insert_with(|| machine.name.clone());
        self.host.id.get_or_insert_with(|| {
            let allowed = |c: char| {
                if c.is_ascii_alphanumeric() {
                    c.to_ascii_lowercase()
                } else {
                    '-'
                }
            };
            let readable: String = name.chars().map(allowed).take(48).collect();
            let digest = hex::encode(Sha256::digest(format!("{name}\n{}", machine.id)));
            format!("{}-{}", readable.trim_matches('-'), &digest[..8])
                .trim_start_matches('-')
                .to_owned()
        });
        if self.coordinator.enabled && self.host.enabled {
            let mut own = self.coordinator.hosts_listen;
            if own.ip().is_unspecified() {
                own.set_ip(match own {
                    SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                    SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
                });
            }
            self.host.coordinator.get_or_insert_with(|| own.to_string());
        }
        if let Ok(absolute) = std::path::absolute(&self.data) {
            self.data = absolute;
        }
    }
}
