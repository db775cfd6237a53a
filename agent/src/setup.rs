//! What an operator does once on a machine: `init` founds a cluster, `join` enters one, `rejoin` comes back into it
//! after the store is lost.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use agent::config::checked::{certificates_folder, coordinator_folder, joining, run_folder};
use agent::config::{self, DEFAULT_FILE, Sources, example};
use agent::processes::{Lock, private_folder};
use agent::signer;
use anyhow::Context as _;
use coordinator::clock::{Clock as _, WallClock};
use coordinator::identity::HostKey;
use coordinator::join::wire::{Join, Question};
use coordinator::join::{Admission, Token, admission, client};
use coordinator::signer::Key;

pub(crate) fn say(line: &str) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}

/// Writes an example configuration; with one that is filled in, founds a cluster on an eligible host. What exists is
/// left as it is.
///
/// # Errors
/// With a chain of reasons.
pub(crate) fn init(mut sources: Sources) -> anyhow::Result<()> {
    let file = sources
        .file
        .clone()
        .unwrap_or_else(|| PathBuf::from(DEFAULT_FILE));
    if !file.exists() {
        let data = sources
            .data
            .clone()
            .unwrap_or_else(|| config::Written::default().data);
        write_new(&file, &example::text(&std::path::absolute(data)?))?;
        return say(&format!(
            "{0} written: fill in what is empty, then chutes-agent --config {0} init once more",
            file.display()
        ));
    }
    sources.file = Some(file.clone());
    let (written, _) = config::read(&sources)?;
    private_folder(&written.data)?;
    private_folder(&run_folder(&written.data))?;
    let folder = certificates_folder(&written.data);
    private_folder(&folder)?;
    if let Some(admission) = Admission::read(&folder)? {
        say(&format!(
            "this host belongs to the cluster {} already, which is left as it is",
            admission.cluster
        ))?;
    } else if written.coordinator.enabled {
        let host = joining(&written).map_err(anyhow::Error::msg)?;
        let name = &written.coordinator.cluster;
        let founded = admission::found(&folder, name, &host.server, &host.address, WallClock.now())?;
        let cluster = founded.map_or_else(String::new, |admission| admission.cluster);
        say(&format!(
            "cluster {cluster} founded, with this host as its first member. Other hosts of the miner do not found \
             one: they join it, with a token from `chutes-miner host invite`"
        ))?;
    } else {
        say("next: chutes-agent join TOKEN, with a token from `chutes-miner host invite` on a member")?;
    }
    say(&format!(
        "next: chutes-agent --config {} config check",
        file.display()
    ))
}

/// How a host is invited.
#[derive(Debug, clap::Args)]
pub(crate) struct Invitation {
    /// The token
    #[arg(required_unless_present = "token_file")]
    token: Option<String>,
    /// File with the token
    #[arg(long, value_name = "FILE", conflicts_with = "token")]
    token_file: Option<PathBuf>,
    /// Leave a host that belongs to a cluster already as it is, and need no token for it
    #[arg(long)]
    if_needed: bool,
}

impl Invitation {
    fn token(&self) -> anyhow::Result<Token> {
        let text = match (&self.token, &self.token_file) {
            (Some(token), _) => token.clone(),
            (None, Some(file)) => {
                fs::read_to_string(file).with_context(|| format!("read the token in {}", file.display()))?
            }
            (None, None) => anyhow::bail!("a token of `chutes-miner host invite` is missing"),
        };
        Ok(text.trim().parse()?)
    }
}

/// Enters the cluster that a token invites to.
///
/// # Errors
/// With a chain of reasons.
pub(crate) fn join(sources: &Sources, invitation: &Invitation) -> anyhow::Result<()> {
    let (written, _) = config::read(sources)?;
    let folder = certificates_folder(&written.data);
    if invitation.if_needed
        && let Some(admission) = Admission::read(&folder)?
    {
        return say(&format!(
            "this host belongs to the cluster {} already",
            admission.cluster
        ));
    }
    let token = invitation.token()?;
    private_folder(&written.data)?;
    private_folder(&folder)?;
    let _lock = Lock::take(&written.data)?;
    if let Some(admission) = Admission::read(&folder)? {
        anyhow::ensure!(
            admission.cluster != token.cluster,
            "this host belongs to the cluster {} already: start the agent",
            admission.cluster
        );
        anyhow::bail!(
            "this host belongs to the cluster {}, and the token invites to {}: remove it there with `chutes-miner host \
             remove`, and delete {} and {}, before it joins another one",
            admission.cluster,
            token.cluster,
            folder.display(),
            coordinator_folder(&written.data).display(),
        );
    }
    let host = joining(&written).map_err(anyhow::Error::msg)?;
    let hotkey = match &written.miner.seed_file {
        Some(file) if written.coordinator.enabled => {
            let seed = signer::read_seed(file).context("miner.seed_file")?;
            Some(Key::new(&seed).hotkey().clone())
        }
        Some(_) | None => None,
    };
    let question = Question::Join(Box::new(Join {
        invite: token.invite,
        secret: token.secret,
        server: host.server,
        name: host.name,
        site: host.site,
        address: host.address,
        public_key: HostKey::open_or_make(&folder)?.public(),
        hotkey,
        clock: WallClock.now(),
    }));
    let granted = runtime()?.block_on(client::join(&token, &question))?;
    admission::keep(&folder, &granted)?;
    let what = match granted.admission.member {
        Some(member) => format!("member {member}"),
        None => "a host without a vote".to_owned(),
    };
    let cluster = &granted.admission.cluster;
    say(&format!(
        "joined the cluster {cluster} as {what}: start the agent"
    ))?;
    if granted.admission.member.is_some() && !written.coordinator.enabled {
        say("it was invited as a member: set coordinator.enabled = true")?;
    }
    Ok(())
}

/// Throws away what is left of a member's store, and comes back under another member id.
///
/// # Errors
/// With a chain of reasons.
pub(crate) fn rejoin(sources: &Sources) -> anyhow::Result<()> {
    let (written, _) = config::read(sources)?;
    let folder = certificates_folder(&written.data);
    let _lock = Lock::take(&written.data).context("stop the agent first")?;
    let admission = Admission::read(&folder)?.context(
        "this host belongs to no cluster: it can only join, with a token from `chutes-miner host invite`",
    )?;
    let answer = client::ask_as_host(&admission.doors, &folder, &Question::Rejoin);
    let answer = runtime()?.block_on(answer)?;
    let granted = client::granted(answer)?;
    // The new id is good only with an empty store: that goes first. A crash in between leaves the old id without a
    // store, which does not start.
    let store = coordinator_folder(&written.data);
    if store.exists() {
        let aside = store.with_extension("lost");
        if aside.exists() {
            fs::remove_dir_all(&aside).with_context(|| format!("remove {}", aside.display()))?;
        }
        fs::rename(&store, &aside).with_context(|| format!("put {} aside", store.display()))?;
        say(&format!("what was left of the store lies in {}", aside.display()))?;
    }
    admission::keep(&folder, &granted)?;
    let member = granted.admission.member.unwrap_or_default();
    say(&format!(
        "comes back as member {member}: start the agent, and it learns everything anew"
    ))
}

pub(crate) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().context("start the async runtime")
}

fn write_new(path: &Path, text: &str) -> anyhow::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    let mut options = fs::File::options();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("write {}", path.display()))?;
    Ok(file.write_all(text.as_bytes())?)
}
