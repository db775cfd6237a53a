//! What a thousand hosts cost one leader: memory and CPU of its coordinator process per host link, and how long a
//! change of desired state takes to reach a host.
//!
//! The member is the real `chutes-agent`; the hosts are its real link (`agent::link`) over QUIC on loopback, each
//! with a certificate of its own, a thousand in this process, with nothing behind them. A change is begun by the host
//! itself: changed facts go in, are written to the log with an fsync, and the new desired set comes back, so the
//! figure is above what the change alone takes.
//!
//! `cargo bench -p agent --bench host_links [-- --hosts 1000]`; the last line is one JSON object.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use agent::link::{Config, Ends, Link as _, Quic};
use anyhow::Context as _;
use coordinator::clock::{Clock, WallClock};
use coordinator::identity::HostKey;
use coordinator::join::wire::{Join, Question};
use coordinator::join::{Token, admission, client};
use protocol::hotkey::Signer;
use protocol::id::ServerId;
use protocol::link::ToHost;
use protocol::logs::HostAnswer;
use protocol::report::{HostFacts, WorkloadReport};
use protocol::signing::BoundRequest;
use protocol::workload::Fence;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

const SEED: [u8; 32] = [1; 32];
const PATIENCE: Duration = Duration::from_secs(120);
/// How long the idle links are watched.
const IDLE: Duration = Duration::from_secs(30);
/// Changes that are timed, one at a time.
const CHANGES: usize = 500;

struct Member {
    process: Child,
    api: SocketAddr,
    http: reqwest::Client,
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Member {
    fn start(folder: &Path) -> anyhow::Result<Self> {
        let agent = env!("CARGO_BIN_EXE_chutes-agent");
        let door = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let api = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let seed = folder.join("seed");
        std::fs::write(&seed, hex::encode(SEED))?;
        std::fs::set_permissions(&seed, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        let hotkey = Signer::from_seed(&SEED).hotkey().clone();
        let validator = Signer::from_seed(&[2; 32]).hotkey().clone();
        let config = folder.join("config.toml");
        let text = format!(
            "data = \"{}\"\n[miner]\nhotkey = \"{hotkey}\"\nseed_file = \"{}\"\n[[validators]]\nhotkey = \
             \"{validator}\"\napi = \"http://127.0.0.1:9\"\nsocket = \"ws://127.0.0.1:9\"\nregistry = \
             \"127.0.0.1:9\"\n[host]\nenabled = false\nname = \"member\"\nid = \"member\"\n[coordinator]\nenabled = \
             true\nhosts_listen = \"{door}\"\napi_listen = \"{api}\"\n[raft]\ntiming = \"lan\"\n[log]\nlevel = \
             \"error\"\n",
            folder.join("data").display(),
            seed.display(),
        );
        std::fs::write(&config, text)?;
        let run = |command: &str| {
            let mut process = Command::new(agent);
            process.args([command, "--config"]).arg(&config);
            process.stdin(Stdio::null()).stdout(Stdio::null());
            process
        };
        anyhow::ensure!(run("init").status()?.success(), "init failed");
        Ok(Self {
            process: run("run").spawn()?,
            api,
            http: reqwest::Client::builder().no_proxy().build()?,
        })
    }

    async fn invite(&self) -> anyhow::Result<Token> {
        let bound = BoundRequest {
            method: "POST",
            path_and_query: "/hosts/invites",
            body: &[],
        };
        let mut request = self.http.post(format!("http://{}/hosts/invites", self.api));
        for (name, value) in bound.sign(&Signer::from_seed(&SEED), WallClock.now(), fastrand::u128(..)) {
            request = request.header(name, value);
        }
        let answer: Value = request.send().await?.error_for_status()?.json().await?;
        Ok(answer["token"].as_str().context("no token")?.parse()?)
    }

    /// The coordinator's process: a child of the supervisor.
    fn coordinator(&self) -> anyhow::Result<u32> {
        for entry in std::fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<u32>().ok())
            else {
                continue;
            };
            let Ok(line) = std::fs::read(entry.path().join("cmdline")) else {
                continue;
            };
            let mut words = line.split(|byte| *byte == 0);
            let is_coordinator = words.nth(1) == Some(b"coordinator");
            let ours = parent_of(pid) == Some(self.process.id());
            if is_coordinator && ours {
                return Ok(pid);
            }
        }
        anyhow::bail!("no coordinator process")
    }
}

/// The numbers of /proc/PID/stat behind the name in brackets.
fn stat(pid: u32) -> Option<Vec<u64>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(") ")?;
    Some(rest.split(' ').map(|word| word.parse().unwrap_or(0)).collect())
}

fn parent_of(pid: u32) -> Option<u32> {
    stat(pid)?.get(1).and_then(|parent| u32::try_from(*parent).ok())
}

/// User and system time so far, in ms: clock ticks are hundredths of a second on Linux.
fn cpu_ms(pid: u32) -> anyhow::Result<u64> {
    let stat = stat(pid).context("the process has ended")?;
    Ok((stat[11] + stat[12]) * 10)
}

fn resident_kib(pid: u32) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let word = line
        .and_then(|line| line.split_whitespace().next())
        .context("no VmRSS")?;
    Ok(word.parse()?)
}

struct Host {
    facts: watch::Sender<Option<HostFacts>>,
    inbound: mpsc::Receiver<ToHost>,
    _stored: watch::Sender<Fence>,
    _report: watch::Sender<Option<WorkloadReport>>,
    _delivered: watch::Receiver<Fence>,
}

impl Host {
    async fn join(member: &Member, folder: &Path, number: usize) -> anyhow::Result<ServerId> {
        std::fs::create_dir_all(folder)?;
        let token = member.invite().await?;
        let server = ServerId::parse(&format!("host-{number}"))?;
        let question = Question::Join(Box::new(Join {
            invite: token.invite,
            secret: token.secret,
            server: server.clone(),
            name: server.to_string(),
            site: String::new(),
            address: "192.0.2.1".to_owned(),
            public_key: HostKey::open_or_make(folder)?.public(),
            hotkey: None,
            clock: WallClock.now(),
        }));
        admission::keep(folder, &client::join(&token, &question).await?)?;
        Ok(server)
    }

    fn link(folder: &Path, server: ServerId, stop: &CancellationToken) -> Self {
        let facts = HostFacts {
            name: server.to_string(),
            server,
            address: "192.0.2.1".to_owned(),
            proof_port: 30443,
            devices: Vec::new(),
            cpu_count: 64,
            memory_gb: 512,
            disk_free_gb: 1000,
            agent_version: "bench".to_owned(),
        };
        let (facts, facts_in) = watch::channel(Some(facts));
        let (stored, stored_in) = watch::channel(Fence::default());
        let (report, report_in) = watch::channel(None);
        let (delivered, delivered_in) = watch::channel(Fence::default());
        let (to_host, inbound) = mpsc::channel(64);
        let ends = Ends {
            facts: facts_in,
            stored: stored_in,
            report: report_in,
            delivered,
            inbound: to_host,
            answers: Arc::new(|_| Box::pin(std::future::ready(HostAnswer::Unknown))),
        };
        let config = Config {
            first: None,
            server_name: coordinator::identity::COORDINATOR_NAME.to_owned(),
            certificates: folder.to_owned(),
        };
        let link = Box::new(Quic::new(config, Arc::new(WallClock)));
        tokio::spawn(link.run(ends, stop.clone()));
        Self {
            facts,
            inbound,
            _stored: stored,
            _report: report,
            _delivered: delivered_in,
        }
    }

    /// Waits for the next desired set.
    async fn desired(&mut self) -> anyhow::Result<()> {
        loop {
            let message = timeout(PATIENCE, self.inbound.recv())
                .await
                .context("nothing came")?;
            match message.context("the link ended")? {
                ToHost::Desired { .. } => return Ok(()),
                ToHost::RegistryHeaders(_) | ToHost::Doors(_) | ToHost::Authorities(_) => {}
            }
        }
    }
}

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip_while(|word| word != "--hosts");
    let hosts: usize = arguments.nth(1).map_or(Ok(1000), |count| count.parse())?;
    let _ = rustls::crypto::ring::default_provider().install_default();
    // A socket for each host, and as many to join with.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(measure(hosts))
}

async fn measure(count: usize) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let member = Member::start(folder.path())?;
    timeout(PATIENCE, async {
        while member.invite().await.is_err() {
            sleep(Duration::from_millis(100)).await;
        }
    })
    .await
    .context("the member does not serve")?;
    let pid = member.coordinator()?;
    let mut joined = BTreeMap::new();
    let began = Instant::now();
    for number in 0..count {
        let home = folder.path().join(format!("host-{number}"));
        joined.insert(home.clone(), Host::join(&member, &home, number).await?);
    }
    let joined_ms = began.elapsed().as_millis();

    let (memory_before, cpu_before) = (resident_kib(pid)?, cpu_ms(pid)?);
    let (stop, began) = (CancellationToken::new(), Instant::now());
    let mut hosts: Vec<Host> = joined
        .into_iter()
        .map(|(home, server)| Host::link(&home, server, &stop))
        .collect();
    for host in &mut hosts {
        host.desired().await?;
    }
    let linked_ms = began.elapsed().as_millis();
    let (memory_linked, cpu_linked) = (resident_kib(pid)?, cpu_ms(pid)?);
    sleep(IDLE).await;
    let cpu_idle = cpu_ms(pid)? - cpu_linked;

    let mut random = fastrand::Rng::with_seed(1);
    let mut times_us = Vec::new();
    for change in 0..CHANGES {
        let host = random.usize(..hosts.len());
        let host = &mut hosts[host];
        let began = Instant::now();
        host.facts.send_modify(|facts| {
            if let Some(facts) = facts {
                facts.disk_free_gb = 1001 + u32::try_from(change).unwrap_or(0);
            }
        });
        host.desired().await?;
        times_us.push(u64::try_from(began.elapsed().as_micros())?);
    }
    times_us.sort_unstable();
    let at = |permille: usize| times_us[(times_us.len() - 1) * permille / 1000];
    let memory_after = resident_kib(pid)?;
    let linked = f64::from(u32::try_from(count)?);
    let per_link = |total: u64| f64::from(u32::try_from(total).unwrap_or(u32::MAX)) / linked;
    let result = json!({
        "hosts": count,
        "join_ms_each": per_link(u64::try_from(joined_ms)?),
        "all_linked_ms": u64::try_from(linked_ms)?,
        "memory_kib_before": memory_before,
        "memory_kib_linked": memory_linked,
        "memory_kib_after": memory_after,
        "memory_kib_per_link": per_link(memory_linked.saturating_sub(memory_before)),
        "cpu_ms_to_link_each": per_link(cpu_linked - cpu_before),
        "cpu_permille_idle": cpu_idle * 1000 / u64::try_from(IDLE.as_millis())?,
        "cpu_us_per_link_and_second_idle": per_link(cpu_idle * 1000) / IDLE.as_secs_f64(),
        "desired_us": { "p50": at(500), "p99": at(990), "max": at(1000) },
    });
    stop.cancel();
    Ok(writeln!(std::io::stdout(), "{result}")?)
}
