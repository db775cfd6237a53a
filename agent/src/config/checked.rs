//! Settings as checked: what each service gets. All that is wrong is collected, each with the place where it
//! was written.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use coordinator::identity::COORDINATOR_NAME;
use coordinator::validator::Directory;
use coordinator_core::scheduler::strategy;
use coordinator_core::state_machine::command::PayProfile;
use proof::Profile;
use protocol::hotkey::Hotkey;
use protocol::id::ServerId;

use super::Problem;
use super::layers::Origins;
use super::written::{self, ProofBackend, RuntimeKind, Written};
use crate::gpu::worker::Limits;
use crate::host_plane::facts::Identity;
use crate::proof_plane::Backend;
use crate::{
    cache, data_plane, egress, host_plane, link, nodes, packet_filter, proof_plane, registry, signer,
    telemetry,
};
use ::runtime::manifest::{NODE_CHARACTERS_MAX, Settings};

/// The longest path of a Unix socket, less some room for the names that stand for a socket not yet there.
const SOCKET_PATH_BYTES_MAX: usize = 100;

/// What runs on this machine, and how.
#[derive(Debug, Clone)]
pub struct Config {
    /// Folder of all that the agent keeps.
    pub data: PathBuf,
    /// What is logged.
    pub log: written::Log,
    /// On members of the coordinator.
    pub member: Option<Member>,
    /// On hosts.
    pub host: Option<HostServices>,
}

/// What runs on a member of the coordinator.
#[derive(Debug, Clone)]
pub struct Member {
    /// The process with the seed.
    pub signer: signer::Config,
    /// The member itself.
    pub coordinator: coordinator::config::Config,
    /// The cluster whose nodes enter by themselves.
    pub nodes: Option<nodes::Config>,
}

/// What runs on a host.
#[derive(Debug, Clone)]
pub struct HostServices {
    /// Workloads and the link to the coordinator.
    pub host: host_plane::Config,
    /// The GPU proof.
    pub proof: proof_plane::Config,
    /// Registry door, egress door and cache cleaner.
    pub data: data_plane::Config,
}

/// Folder of the processes' sockets in the data folder.
#[must_use]
pub fn run_folder(data: &Path) -> PathBuf {
    data.join("run")
}

/// Folder of a member's log and state in its data folder.
#[must_use]
pub fn coordinator_folder(data: &Path) -> PathBuf {
    data.join("coordinator")
}

/// Folder of a host's certificate and its admission to the cluster in its data folder.
#[must_use]
pub fn certificates_folder(data: &Path) -> PathBuf {
    data.join("host")
}

mod backup;

struct Checker<'a> {
    origins: &'a Origins,
    problems: Vec<Problem>,
}

impl Checker<'_> {
    /// Notes what is wrong with a key; the text names the key itself.
    fn complain(&mut self, key: &str, text: impl Display) {
        self.problems.push(Problem {
            origin: self.origins.of(key),
            text: text.to_string(),
        });
    }

    /// The value, or a note.
    fn take<T, E: Display>(&mut self, key: &str, result: Result<T, E>) -> Option<T> {
        let named = |error| format!("{key}: {error}");
        result.map_err(|error| self.complain(key, named(error))).ok()
    }

    /// The value, or a note whose text names the key already.
    fn take_named<T, E: Display>(&mut self, key: &str, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.complain(key, error)).ok()
    }

    /// The value, or a note that it is missing.
    fn require<'v>(&mut self, key: &str, value: Option<&'v String>, why: &str) -> Option<&'v str> {
        let value = value.map(String::as_str).filter(|text| !text.trim().is_empty());
        if value.is_none() {
            self.complain(key, format!("{key} is missing: {why}"));
        }
        value
    }
}

/// Checks everything.
///
/// # Errors
/// All that is wrong.
pub fn check(written: &Written, origins: &Origins) -> Result<Config, Vec<Problem>> {
    let mut checker = Checker {
        origins,
        problems: Vec::new(),
    };
    let config = attempt(written, &mut checker);
    match config {
        Some(config) if checker.problems.is_empty() => Ok(config),
        _ => Err(checker.problems),
    }
}

/// `None` only with a problem noted.
fn attempt(written: &Written, checker: &mut Checker<'_>) -> Option<Config> {
    let socket = run_folder(&written.data).join("agent.sock");
    if socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
        let path = written.data.display();
        checker.complain(
            "data",
            format!("data = \"{path}\" is too long for the sockets below it"),
        );
    }
    let filter = telemetry::filter(&written.log.level);
    checker.take("log.level", filter);
    if !written.host.enabled && !written.coordinator.enabled {
        let text = "host.enabled and coordinator.enabled are both false: there is nothing to run";
        checker.complain("host.enabled", text);
    }

    let why = "the miner's SS58 address";
    let hotkey = checker.require("miner.hotkey", Some(&written.miner.hotkey), why);
    let miner = hotkey.and_then(|text| checker.take("miner.hotkey", Hotkey::parse(text)));
    let validators = checker.take_named("validators", Directory::check(&written.validators));

    let member = written
        .coordinator
        .enabled
        .then(|| member(written, miner.as_ref(), validators.as_ref(), checker));
    let host = written
        .host
        .enabled
        .then(|| host(written, miner.as_ref(), validators.as_ref(), checker));
    Some(Config {
        data: written.data.clone(),
        log: written.log.clone(),
        member: transpose(member)?,
        host: transpose(host)?,
    })
}

/// Not wanted is fine; wanted but not possible is not.
#[expect(clippy::option_option, reason = "wanted or not, possible or not")]
fn transpose<T>(wanted: Option<Option<T>>) -> Option<Option<T>> {
    match wanted {
        None => Some(None),
        Some(None) => None,
        Some(possible) => Some(possible),
    }
}

fn member(
    written: &Written,
    miner: Option<&Hotkey>,
    validators: Option<&Directory>,
    checker: &mut Checker<'_>,
) -> Option<Member> {
    let (settings, keys) = (&written.coordinator, &written.miner);
    if written.host.enabled && !keys.seed_on_gpu_host {
        checker.complain(
            "miner.seed_on_gpu_host",
            "coordinator.enabled puts the miner's seed on a machine that runs chutes: set \
             miner.seed_on_gpu_host = true to allow that, or host.enabled = false",
        );
    }
    if keys.seed_file.is_none() {
        let text = "miner.seed_file is missing: a member of the coordinator signs with it";
        checker.complain("miner.seed_file", text);
    }
    if keys
        .seed_file
        .as_ref()
        .is_some_and(|path| looks_like_a_seed(path))
    {
        // Not repeated here: errors are logged.
        let text =
            "miner.seed_file holds a seed: write it into a file of mode 0600, and the file's path here";
        checker.complain("miner.seed_file", text);
    }
    let become_user = match &keys.signer_user {
        None => Some(None),
        Some(text) => checker.take("miner.signer_user", user_and_group(text)).map(Some),
    };
    if strategy::by_name(&settings.strategy).is_none() {
        let known = strategy::NAMES.join(", ");
        let text = format!(
            "coordinator.strategy = {:?} is not known; there is {known}",
            settings.strategy
        );
        checker.complain("coordinator.strategy", text);
    }
    for (key, span) in [
        ("coordinator.tick", settings.tick),
        ("coordinator.observe", settings.observe),
    ] {
        if span.0.is_zero() {
            checker.complain(key, format!("{key} must be more than zero"));
        }
    }
    if settings.cluster.trim().is_empty() {
        checker.complain("coordinator.cluster", "coordinator.cluster must not be empty");
    }
    for member in &settings.members {
        if let Err(error) = with_port(member) {
            checker.complain("coordinator.members", format!("coordinator.members: {error}"));
        }
    }
    let backup = backup::check(written, checker);
    let nodes = checker.take_named("nodes.config_map", nodes(written));
    Some(Member {
        signer: signer::Config {
            seed_file: keys.seed_file.clone()?,
            become_user: become_user?,
        },
        coordinator: coordinator::config::Config {
            data: coordinator_folder(&written.data),
            identity: certificates_folder(&written.data),
            name: written.host.name.clone().unwrap_or_default(),
            site: written.host.site.clone().unwrap_or_default(),
            advertise: checker.take("coordinator.advertise", advertised(written))?,
            members: settings.members.clone(),
            timing: match written.raft.timing {
                written::Timing::Auto => replica::Timing::Auto,
                written::Timing::Lan => replica::Timing::Lan,
                written::Timing::Wan => replica::Timing::Wan,
            },
            miner: miner?.clone(),
            validators: validators?.clone(),
            hosts_listen: settings.hosts_listen,
            api_listen: settings.api_listen,
            metrics_listen: settings.metrics_listen,
            pay_profile: match settings.pay_profile {
                written::PayProfile::Of2025September => PayProfile::Of2025September,
                written::PayProfile::Of2026 => PayProfile::Of2026,
            },
            strategy: settings.strategy.clone(),
            tick_every: settings.tick.0,
            observe_every: settings.observe.0,
            found_observing: settings.found_observing,
            allow_plain_legacy_writes: settings.allow_plain_legacy_writes,
            backup: backup?,
        },
        nodes: nodes?,
    })
}

fn host(
    written: &Written,
    miner: Option<&Hotkey>,
    validators: Option<&Directory>,
    checker: &mut Checker<'_>,
) -> Option<HostServices> {
    let identity = identity(written, checker);
    let runtime = runtime(written, validators, checker);
    let packet_filter = checker.take_named("packet_filter", packet_filter(written));
    let proof = proof(written, identity.as_ref(), miner, validators, checker);
    let data = validators.and_then(|validators| data(written, validators, checker));
    Some(HostServices {
        host: host_plane::Config {
            data: written.data.clone(),
            identity: identity?,
            link: link::Config {
                first: written.host.coordinator.clone(),
                server_name: COORDINATOR_NAME.to_owned(),
                certificates: certificates_folder(&written.data),
            },
            runtime: runtime?,
            packet_filter: packet_filter?,
            metrics_listen: written.host.metrics_listen,
        },
        proof: proof?,
        data: data?,
    })
}

fn identity(written: &Written, checker: &mut Checker<'_>) -> Option<Identity> {
    let name = checker.require(
        "host.name",
        written.host.name.as_ref(),
        "what people call this host",
    );
    let id = checker
        .require("host.id", written.host.id.as_ref(), "the identity of this host")
        .and_then(|text| checker.take("host.id", server_id(text)));
    let why = "where validators reach this host from outside";
    let of_name = name.and_then(|name| written.host.addresses.get(name));
    let (key, address) = match of_name {
        Some(address) => ("host.addresses", Some(address.as_str())),
        None => (
            "host.address",
            checker.require("host.address", written.host.address.as_ref(), why),
        ),
    };
    if let Some(address) = address
        && (address.is_empty() || address.contains("://") || address.contains(['/', ' ']))
    {
        let text = format!("{key} = {address:?}: write an address or a name alone, without a scheme");
        checker.complain(key, text);
    }
    Some(Identity {
        server: id?,
        name: name?.to_owned(),
        address: address?.to_owned(),
        proof_port: written.proof.listen.port(),
    })
}

/// A host as it introduces itself to a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joining {
    /// Its id.
    pub server: ServerId,
    /// Its name.
    pub name: String,
    /// Its site; empty if it has none.
    pub site: String,
    /// `host:port` where members would reach it.
    pub address: String,
}

/// What `init` and `join` say of this machine.
///
/// # Errors
/// What is missing or wrong, naming the key.
pub fn joining(written: &Written) -> Result<Joining, String> {
    let id = written.host.id.as_deref().ok_or("host.id is missing")?;
    Ok(Joining {
        server: server_id(id).map_err(|error| format!("host.id: {error}"))?,
        name: written.host.name.clone().ok_or("host.name is missing")?,
        site: written.host.site.clone().unwrap_or_default(),
        address: if written.coordinator.enabled {
            advertised(written).map_err(|error| format!("coordinator.advertise: {error}"))?
        } else {
            written.host.address.clone().unwrap_or_default()
        },
    })
}

/// The cluster whose nodes enter by themselves, if there is one.
///
/// # Errors
/// What is missing, naming the key.
pub fn nodes(written: &Written) -> Result<Option<nodes::Config>, String> {
    let settings = &written.nodes;
    let given = |text: &Option<String>| text.clone().filter(|text| !text.trim().is_empty());
    let Some(config_map) = given(&settings.config_map) else {
        return Ok(None);
    };
    let required = |key: &str, text: &Option<String>| {
        given(text).ok_or_else(|| format!("nodes.{key} is missing: nodes.config_map needs it"))
    };
    let config = nodes::Config {
        config_map,
        namespace: required("namespace", &settings.namespace)?,
        member_account: required("member_account", &settings.member_account)?,
        host_account: required("host_account", &settings.host_account)?,
        audience: required("audience", &settings.audience)?,
        token_file: settings.token_file.clone(),
        kubeconfig: written.runtime.kubeconfig.clone(),
    };
    if config.member_account == config.host_account {
        return Err(
            "nodes.member_account and nodes.host_account must be two: the account says who votes".to_owned(),
        );
    }
    Ok(Some(config))
}

/// Refuses what is no address of a door.
fn with_port(address: &str) -> Result<(), String> {
    let parts = address.rsplit_once(':');
    let port = parts.filter(|(host, _)| !host.is_empty());
    match port.and_then(|(_, port)| port.parse::<u16>().ok()) {
        Some(port) if port != 0 => Ok(()),
        _ => Err(format!(
            "{address:?}: write \"address:port\", such as \"192.0.2.1:4433\""
        )),
    }
}

/// Where others reach the member's door.
fn advertised(written: &Written) -> Result<String, String> {
    let (settings, listen) = (&written.coordinator, written.coordinator.hosts_listen);
    if let Some(address) = settings.advertise.as_deref() {
        return with_port(address).map(|()| address.to_owned());
    }
    if !listen.ip().is_unspecified() {
        return Ok(listen.to_string());
    }
    let address = written
        .host
        .address
        .as_deref()
        .filter(|address| !address.trim().is_empty());
    let address = address.ok_or(
        "is missing: where other machines reach coordinator.hosts_listen, as \"address:port\"; host.address would do too",
    )?;
    let bracketed = address.parse::<std::net::Ipv6Addr>().is_ok();
    Ok(if bracketed {
        format!("[{address}]:{}", listen.port())
    } else {
        format!("{address}:{}", listen.port())
    })
}

/// A server's id stands in a certificate as a DNS name.
///
/// # Errors
/// What is wrong with it.
pub fn server_id(text: &str) -> Result<ServerId, String> {
    let id = ServerId::parse(text).map_err(|error| error.to_string())?;
    let label = |label: &str| {
        let inside = |c: char| c.is_ascii_alphanumeric() || c == '-';
        (1..=63).contains(&label.len())
            && label.chars().all(inside)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if !text.split('.').all(label) {
        return Err(format!(
            "{text:?} is not valid: letters, digits and '-', in parts of at most 63 with '.' between them"
        ));
    }
    Ok(id)
}

/// Validators that are not on this machine; the reason why something for development is refused.
fn strangers(validators: Option<&Directory>) -> Option<String> {
    let mut all = validators.into_iter().flat_map(Directory::iter);
    all.find(|validator| !validator.is_loopback())
        .map(|validator| format!("{} at {} is not", validator.hotkey, validator.api))
}

fn runtime(
    written: &Written,
    validators: Option<&Directory>,
    checker: &mut Checker<'_>,
) -> Option<host_plane::RuntimeKind> {
    match written.runtime.kind {
        RuntimeKind::Kubernetes => {
            let node = kubernetes(written);
            let name = &node.config.settings.node_name;
            if name.len() > NODE_CHARACTERS_MAX {
                let text = format!(
                    "the node {name} has a name of more than {NODE_CHARACTERS_MAX} characters, which no label holds: \
                     give it a shorter one"
                );
                checker.complain("runtime.node", text);
            }
            Some(host_plane::RuntimeKind::Kubernetes(Box::new(node)))
        }
        RuntimeKind::Process => {
            let processes = processes(written, validators, checker)?;
            Some(host_plane::RuntimeKind::Process(Box::new(processes)))
        }
    }
}

fn kubernetes(written: &Written) -> host_plane::Node {
    let settings = &written.runtime;
    let name = settings.node.as_ref().or(written.host.name.as_ref());
    let mut node = Settings::for_node(name.map_or("", String::as_str));
    node.namespace.clone_from(&settings.namespace);
    node.registry_port = written.registry.listen.port();
    node.runtime_class.clone_from(&settings.runtime_class);
    node.init_image.clone_from(&settings.init_image);
    node.raw_sockets = !written.packet_filter.enabled;
    node.stop_grace_seconds = i64::try_from(settings.stop_grace.0.as_secs()).unwrap_or(i64::MAX);
    if let Some(cache) = &written.cache.directory {
        node.cache_root = cache.display().to_string();
    }
    let mut config = ::runtime::kubernetes::Config::new(node, written.data.join("runtime/workload-logs"));
    let doors = [
        Some(written.registry.listen.port()),
        Some(written.egress.listen.port()),
        written
            .coordinator
            .enabled
            .then_some(written.coordinator.api_listen.port()),
        written
            .coordinator
            .enabled
            .then_some(written.coordinator.hosts_listen.port()),
        Some(written.proof.listen.port()),
        written.host.metrics_listen.map(|listen| listen.port()),
        written.coordinator.metrics_listen.map(|listen| listen.port()),
    ];
    config.reserved_ports = doors.into_iter().flatten().collect();
    host_plane::Node {
        kubeconfig: settings.kubeconfig.clone(),
        config,
    }
}

fn packet_filter(written: &Written) -> Result<Option<packet_filter::Config>, String> {
    let config = packet_filter::Config::check(&written.packet_filter, written.egress.listen)?;
    let (Some(filter), runtime) = (&config, &written.runtime) else {
        return Ok(None);
    };
    if runtime.kind != RuntimeKind::Kubernetes {
        return Err(
            "packet_filter.enabled = true needs runtime.kind = \"kubernetes\": elsewhere there are no pods"
                .to_owned(),
        );
    }
    if filter.trusted_namespaces.contains(&runtime.namespace) {
        return Err(format!(
            "packet_filter.trusted_namespaces has {:?}, the namespace of the chutes (runtime.namespace): they would not be \
             filtered",
            runtime.namespace
        ));
    }
    Ok(config)
}

fn processes(
    written: &Written,
    validators: Option<&Directory>,
    checker: &mut Checker<'_>,
) -> Option<runtime::process::Config> {
    if let Some(stranger) = strangers(validators) {
        let text = format!(
            "runtime.kind = \"process\" isolates nothing: a chute runs as the agent's user and sees its files. \
             Every validator must be on this machine (loopback), but {stranger}"
        );
        checker.complain("runtime.kind", text);
    }
    let ports = checker.take("runtime.ports", port_range(&written.runtime.ports));
    let urls = |validator: &coordinator::validator::ValidatorConfig| {
        [&validator.api, &validator.socket, &validator.registry].map(ToString::to_string)
    };
    let mut config = runtime::process::Config::new(
        written.data.join("runtime"),
        written.registry.listen,
        validators?.iter().flat_map(urls).collect(),
    );
    if let Some(cache) = &written.cache.directory {
        config.cache.clone_from(cache);
    }
    config.ports = ports?;
    config.stop_grace = written.runtime.stop_grace.0;
    config.egress_door = Some(format!("http://{}", written.egress.listen));
    Some(config)
}

fn proof(
    written: &Written,
    identity: Option<&Identity>,
    miner: Option<&Hotkey>,
    validators: Option<&Directory>,
    checker: &mut Checker<'_>,
) -> Option<proof_plane::Config> {
    let settings = &written.proof;
    if settings.backend == ProofBackend::Cpu {
        if let Some(stranger) = strangers(validators) {
            let text = format!(
                "proof.backend = \"cpu\" shows software GPUs, for development only: every validator must be on \
                 this machine (loopback), but {stranger}"
            );
            checker.complain("proof.backend", text);
        }
        if settings.software_gpus == 0 {
            checker.complain(
                "proof.software_gpus",
                "proof.software_gpus must be more than zero",
            );
        }
    }
    for (key, zero) in [
        ("proof.wait_max", settings.wait_max.0.is_zero()),
        ("proof.waiting_max", settings.waiting_max == 0),
        ("proof.work_max", settings.work_max.0.is_zero()),
    ] {
        if zero {
            checker.complain(key, format!("{key} must be more than zero"));
        }
    }
    let (miner, validators, identity) = (miner?, validators?, identity?);
    let (backend, profile) = match settings.backend {
        ProofBackend::Cuda => (Backend::Cuda, Profile::STANDARD),
        ProofBackend::Cpu => {
            let backend = Backend::Cpu {
                count: settings.software_gpus,
                uuid_seed: format!("{miner}/{}", identity.server),
            };
            (backend, Profile::DEVELOPMENT)
        }
    };
    Some(proof_plane::Config {
        listen: settings.listen,
        socket: run_folder(&written.data).join("proof.sock"),
        miner: miner.clone(),
        validators: validators
            .iter()
            .map(|validator| (validator.hotkey.clone(), validator.api.clone()))
            .collect(),
        backend,
        profile,
        limits: Limits {
            wait_max: settings.wait_max.0,
            waiting_max: settings.waiting_max,
            work_max: settings.work_max.0,
            ..Limits::default()
        },
    })
}

fn data(written: &Written, validators: &Directory, checker: &mut Checker<'_>) -> Option<data_plane::Config> {
    let upstreams: Vec<registry::RawUpstream> = validators
        .iter()
        .map(|validator| registry::RawUpstream {
            hotkey: validator.hotkey.to_string(),
            registry: validator.registry.to_string(),
            ca_file: None,
        })
        .collect();
    let hosts: Vec<&str> = validators
        .iter()
        .flat_map(|validator| [&validator.api, &validator.socket, &validator.registry])
        .filter_map(|url| url.host_str())
        .collect();
    let store = written.data.join("blobs");
    let registry = registry::Config::check(&written.registry, &upstreams, store);
    let registry = checker.take_named("registry", registry);
    let egress = checker.take_named("egress", egress::Config::check(&written.egress, hosts));
    let cache = checker.take_named("cache", cache::Config::check(&written.cache));
    Some(data_plane::Config {
        registry: registry?,
        egress: egress?,
        cache: cache?,
        socket: run_folder(&written.data).join("data.sock"),
    })
}

/// 32 bytes in hexadecimal, or twelve words and more: what wallets show as a seed.
fn looks_like_a_seed(path: &Path) -> bool {
    let text = path.to_string_lossy();
    let digits = text.trim().trim_start_matches("0x");
    let hexadecimal = digits.len() == 64 && digits.chars().all(|c| c.is_ascii_hexdigit());
    hexadecimal || text.split_whitespace().count() >= 12
}

fn user_and_group(text: &str) -> Result<(u32, u32), String> {
    let numbers = text.split_once(':').and_then(|(user, group)| {
        let (user, group) = (user.parse::<u32>().ok()?, group.parse::<u32>().ok()?);
        (user != 0 && group != 0).then_some((user, group))
    });
    numbers.ok_or_else(|| {
        format!("{text:?}: write two numbers other than 0, \"user:group\", such as \"65534:65534\"")
    })
}

fn port_range(text: &str) -> Result<RangeInclusive<u16>, String> {
    let range = text.split_once('-').and_then(|(first, last)| {
        let (first, last) = (
            first.trim().parse::<u16>().ok()?,
            last.trim().parse::<u16>().ok()?,
        );
        (first >= 1024 && first <= last).then_some(first..=last)
    });
    range.ok_or_else(|| {
        format!("{text:?}: write \"first-last\" with ports from 1024 to 65535, such as \"31000-31999\"")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_forms_are_read_and_nothing_else() {
        assert_eq!(port_range("31000-31999"), Ok(31000..=31999));
        for bad in ["", "31000", "2-1", "80-90", "31000-70000", "31999-31000"] {
            assert!(port_range(bad).is_err(), "{bad}");
        }
        assert_eq!(user_and_group("65534:65534"), Ok((65534, 65534)));
        for bad in ["nobody", "0:0", "1", "1:0", "-1:1", "1:1:1"] {
            assert!(user_and_group(bad).is_err(), "{bad}");
        }
        assert!(server_id("host-1.dev").is_ok());
        for bad in ["", "a_b", "-a", "a..b", "a-", "A b"] {
            assert!(server_id(bad).is_err(), "{bad}");
        }
    }
}
