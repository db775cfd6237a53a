//! What is wrong around this host.
//!
//! `chutes-agent doctor net`: whether UDP gets through between this host and the members, both ways. Out: every member
//! is asked, over QUIC. In: each that answers is asked to dial this host at the address that it told when it joined.
//! Where the agent does not run, a listener stands in for its door meanwhile.
//!
//! `chutes-agent doctor ready`: whether what this host is configured for does its work. It needs nothing but the
//! configuration and this host's network, so the chart's test is that.

use std::io::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use agent::config::checked::{certificates_folder, joining};
use agent::config::units::parse_duration;
use agent::config::{self, Sources};
use anyhow::Context as _;
use coordinator::door;
use coordinator::identity::Identity;
use coordinator::join::reach::{self, Reach};
use coordinator::join::wire::{Answer, Question};
use coordinator::join::{Admission, client};
use tokio::time::{Instant, sleep};

/// How long one answer may take: a member answers only once it has caught up, and says so before.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Between two questions to what is not ready.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// How it is asked.
#[derive(Debug, clap::Args)]
pub(crate) struct Patience {
    /// How long it may take to become ready, such as 30s
    #[arg(long, value_name = "TIME", default_value = "1m", value_parser = parse_duration)]
    patience: Duration,
}

/// What keeps this host from a member, and the way out.
async fn why_closed(member: &str) -> String {
    let reach = match reach::udp(member).await {
        Ok(reach) => reach,
        Err(error) => return format!("it cannot be tried: {error}"),
    };
    let way_out = match reach {
        Reach::Silent => {
            "a firewall here, there, or the provider's drops it: let UDP to that port through, and the answers back"
        }
        Reach::Refused => "no agent runs there, or its coordinator.hosts_listen is another one",
        Reach::Answers => "it is no firewall: what was said is the reason",
    };
    format!("{reach}: {way_out}")
}

fn say(line: &str) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}

/// Tries all ways, says what it found, and fails if one is closed that must be open.
///
/// # Errors
/// With what is closed.
pub(crate) async fn net(sources: &Sources) -> anyhow::Result<()> {
    let (written, _) = config::read(sources)?;
    let folder = certificates_folder(&written.data);
    let admission = Admission::read(&folder)?.context(
        "this host belongs to no cluster yet; what UDP does between here and there shows when it joins one",
    )?;
    let identity = Identity::of_host(&folder)?;
    // The port is taken while the agent runs, and then it answers by itself.
    let listen = written.coordinator.hosts_listen;
    let stand_in = if written.coordinator.enabled {
        door::open(listen, &identity).ok()
    } else {
        None
    };
    if let Some(endpoint) = stand_in.clone() {
        tokio::spawn(async move {
            while let Some(incoming) = endpoint.accept().await {
                tokio::spawn(async move {
                    incoming
                        .await
                        .map(|connection| connection.close(0_u8.into(), b"doctor"))
                });
            }
        });
    }
    let own = joining(&written).map(|host| host.address).unwrap_or_default();
    let mut closed = 0;
    for member in &admission.doors {
        if stand_in.is_some() && *member == own {
            say(&format!(
                "self {member}: no agent runs here; a listener stands in for it meanwhile"
            ))?;
            continue;
        }
        let began = Instant::now();
        let asked = client::ask_as_host(std::slice::from_ref(member), &folder, &Question::Probe).await;
        match asked {
            Err(error) => {
                closed += 1;
                say(&format!(
                    "out  {member}: CLOSED. {}. {error}",
                    why_closed(member).await
                ))?;
            }
            Ok(Answer::Probed {
                address,
                reached,
                detail,
            }) => {
                say(&format!(
                    "out  {member}: open, {} ms with its answer",
                    began.elapsed().as_millis()
                ))?;
                let needed = written.coordinator.enabled;
                let (word, advice) = match (reached, needed) {
                    (true, _) => ("open", ""),
                    (false, true) => (
                        "CLOSED",
                        ". Other members must reach this one: open that UDP port to this machine (its firewall, the \
                         provider's), or correct coordinator.advertise",
                    ),
                    (false, false) => (
                        "closed",
                        ", which is fine: a host without a vote needs outgoing connections only",
                    ),
                };
                closed += u32::from(!reached && needed);
                say(&format!(
                    "in   {address} from {member}: {word} ({detail}){advice}"
                ))?;
            }
            Ok(Answer::Refused(reason) | Answer::Unavailable(reason)) => {
                say(&format!("out  {member}: open, but it says: {reason}"))?;
            }
            Ok(Answer::Granted(_) | Answer::Noted) => anyhow::bail!("{member} answered another question"),
        }
    }
    drop(stand_in);
    anyhow::ensure!(closed == 0, "{closed} ways are closed");
    Ok(())
}

/// Asks all that runs here whether it is ready, says what it heard, and fails if anything is not in time.
///
/// # Errors
/// With how much is not.
pub(crate) async fn ready(sources: &Sources, arguments: &Patience) -> anyhow::Result<()> {
    // The caller may have installed one already; any is fine.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (written, _) = config::read(sources)?;
    let (member, host) = (written.coordinator.enabled, written.host.enabled);
    anyhow::ensure!(
        member || host,
        "nothing is to run here: host.enabled and coordinator.enabled are both false"
    );
    let doors = [
        (member, "member", written.coordinator.api_listen, "/ready"),
        (host, "GPU proof", written.proof.listen, "/ping"),
        (host, "images", written.registry.listen, "/v2/"),
    ];
    let http = reqwest::Client::builder().no_proxy().timeout(ANSWER_MAX);
    let http = http.build()?;
    let deadline = Instant::now() + arguments.patience;
    let mut missing = 0;
    for (_, what, listen, path) in doors.into_iter().filter(|(is_here, ..)| *is_here) {
        let url = format!("http://{}{path}", reachable(listen));
        match until_ready(&http, &url, deadline).await {
            Ok(()) => say(&format!("{what} {url}: ready"))?,
            Err(why) => {
                missing += 1;
                say(&format!("{what} {url}: NOT READY. {why}"))?;
            }
        }
    }
    anyhow::ensure!(
        missing == 0,
        "{missing} of what is to run here is not ready: the agent's log says why"
    );
    Ok(())
}

/// Asks until the answer is good; the last reason why it is not.
async fn until_ready(http: &reqwest::Client, url: &str, deadline: Instant) -> Result<(), String> {
    loop {
        let why = match http.get(url).send().await {
            Ok(answer) if answer.status().is_success() => return Ok(()),
            Ok(answer) => {
                let status = answer.status();
                let text = answer.text().await.unwrap_or_default();
                format!("It answers {status}: {}", text.trim())
            }
            Err(error) if error.is_connect() => "Nothing listens there".to_owned(),
            Err(error) => format!("It does not answer: {error}"),
        };
        if Instant::now() >= deadline {
            return Err(why);
        }
        sleep(ASK_EVERY).await;
    }
}

/// Where a door is reached from this machine.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let mut reached = listen;
    match listen {
        SocketAddr::V4(address) if address.ip().is_unspecified() => {
            reached.set_ip(Ipv4Addr::LOCALHOST.into())
        }
        SocketAddr::V6(address) if address.ip().is_unspecified() => {
            reached.set_ip(Ipv6Addr::LOCALHOST.into())
        }
        _ => {}
    }
    reached
}
