//! `chutes-agent enter`: a node of a Kubernetes cluster that several hosts share comes into the miner's cluster by
//! itself, or founds it, as its pod starts. It may be ended at any moment and run again: what is decided stands in
//! the notice, a `ConfigMap` which can be made only once, and in the admission in the data folder.
//!
//! | notice | own admission | what is done |
//! |---|---|---|
//! | none | none, on a member's node | found, make the notice; who comes second joins |
//! | none | none, elsewhere | wait for the notice, join |
//! | none | of a member | make the notice again |
//! | there | of its cluster | nothing |
//! | there | none, or of a cluster that never ran | join; the latter is thrown away |
//! | there | of another cluster | stop, and say so |

use std::path::Path;
use std::time::Duration;

use agent::config::checked::{self, certificates_folder, joining, run_folder};
use agent::config::units::parse_duration;
use agent::config::written::Written;
use agent::config::{self, Sources};
use agent::nodes::{self, Cluster};
use agent::processes::{Lock, private_folder};
use agent::signer;
use anyhow::{Context as _, bail, ensure};
use coordinator::clock::{Clock as _, WallClock};
use coordinator::identity::{HostKey, Identity};
use coordinator::join::node::Error as NodesError;
use coordinator::join::wire::{Enter, Granted, Question};
use coordinator::join::{Admission, Nodes as _, Notice, admission, client};
use coordinator::signer::Key;
use protocol::hotkey::Hotkey;
use tokio::time::{Instant, sleep};

use crate::setup::{runtime, say};

/// Between two tries.
const TRY_EVERY: Duration = Duration::from_secs(2);

/// How it is entered.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// How long members may be out of reach before it gives up, such as 30s: they may start at the same time as this
    #[arg(long, value_name = "TIME", default_value = "3m", value_parser = parse_duration)]
    patience: Duration,
}

/// Enters the cluster, or founds it.
///
/// # Errors
/// With a chain of reasons; run again it goes on from where it was.
pub(crate) fn enter(sources: &Sources, arguments: &Arguments) -> anyhow::Result<()> {
    let (written, _) = config::read(sources)?;
    let nodes = checked::nodes(&written).map_err(anyhow::Error::msg)?;
    let nodes = nodes.context(
        "nodes.config_map is missing: nodes enter by themselves only where the chart was installed with \
         cluster.shared = true. Elsewhere: chutes-agent init, or chutes-agent join TOKEN",
    )?;
    let _ = rustls::crypto::ring::default_provider().install_default();
    let folder = certificates_folder(&written.data);
    for folder in [&written.data, &run_folder(&written.data), &folder] {
        private_folder(folder)?;
    }
    let _lock = Lock::take(&written.data)?;
    runtime()?.block_on(async {
        let cluster = Cluster::connect(nodes.clone()).await?;
        let place = Place {
            written: &written,
            nodes: &nodes,
            folder: &folder,
            patience: arguments.patience,
        };
        Box::pin(place.enter(&cluster)).await
    })
}

/// This host, and what it was told.
struct Place<'a> {
    written: &'a Written,
    nodes: &'a nodes::Config,
    folder: &'a Path,
    patience: Duration,
}

impl Place<'_> {
    async fn enter(&self, cluster: &Cluster) -> anyhow::Result<()> {
        let own = Admission::read(self.folder)?;
        let wants_to_vote = self.written.coordinator.enabled;
        let notice = match (cluster.notice().await?, &own) {
            (Some(notice), _) => notice,
            (None, Some(own)) if own.member.is_none() => {
                return say(&format!(
                    "this host belongs to the cluster {} already",
                    own.cluster
                ));
            }
            (None, None) if !wants_to_vote => {
                say(&format!(
                    "waiting for a member to make the {}",
                    self.nodes.notice_name()
                ))?;
                cluster.until_notice().await?
            }
            (None, _) => {
                let own = match own.clone() {
                    Some(own) => own,
                    None => self.found(cluster).await?,
                };
                let notice = Notice {
                    cluster: own.cluster.clone(),
                    miner: self.miner()?,
                    authorities: Identity::of_host(self.folder)?.trusted(),
                    doors: own.doors,
                };
                if cluster.found(&notice).await? {
                    let what = if own.opened {
                        format!("the {} is made again for the", self.nodes.notice_name())
                    } else {
                        "founded the".to_owned()
                    };
                    return say(&format!("{what} cluster {}", own.cluster));
                }
                let other = cluster.notice().await?;
                other.with_context(|| format!("the {} went away again", self.nodes.notice_name()))?
            }
        };
        let miner = self.miner()?;
        ensure!(
            notice.miner == miner,
            "the {} is of the miner {}, and miner.hotkey is {miner}: one cluster is one hotkey",
            self.nodes.notice_name(),
            notice.miner
        );
        match Admission::read(self.folder)? {
            Some(own) if own.cluster == notice.cluster => {
                say(&format!(
                    "this host belongs to the cluster {} already",
                    own.cluster
                ))?;
                if own.member.is_none() && wants_to_vote {
                    say(
                        "it was let in without a vote: to make it a member, drain it, remove it with `chutes-miner \
                         host remove`, and delete its data folder",
                    )?;
                }
                return Ok(());
            }
            Some(own) if !own.never_ran(self.folder) => bail!(
                "this host belongs to the cluster {}, and the {} names {}: one of them is of former times. If it is the \
                 host's, remove it there, if that cluster still is, and delete {}; if it is the {1}, delete that, and a \
                 member makes it anew",
                own.cluster,
                self.nodes.notice_name(),
                notice.cluster,
                self.written.data.display()
            ),
            Some(own) => say(&format!(
                "another member was first: {} is thrown away, and {} is joined",
                own.cluster, notice.cluster
            ))?,
            None => {}
        }
        admission::discard(self.folder)?;
        let granted = self.join(cluster, notice).await?;
        admission::keep(self.folder, &granted)?;
        let what = match granted.admission.member {
            Some(member) => format!("member {member}"),
            None => "a host without a vote".to_owned(),
        };
        let name = &granted.admission.cluster;
        say(&format!("joined the cluster {name} as {what}"))
    }

    fn miner(&self) -> anyhow::Result<Hotkey> {
        Hotkey::parse(&self.written.miner.hotkey).context("miner.hotkey")
    }

    fn token(&self) -> anyhow::Result<String> {
        let file = self.nodes.token_file.as_deref();
        let file = file.context("nodes.token_file is missing: the token of this pod is in it")?;
        let text = std::fs::read_to_string(file);
        let text = text.with_context(|| format!("read the token in {}", file.display()))?;
        Ok(text.trim().to_owned())
    }

    /// Makes a cluster here. Nobody knows of it before the notice does.
    async fn found(&self, cluster: &Cluster) -> anyhow::Result<Admission> {
        // As members will ask for others: what is wrong with tokens or rights shows here first.
        let node = cluster.review(&self.token()?).await?;
        ensure!(
            node.member,
            "coordinator.enabled is true, and the account of this pod is not {}",
            self.nodes.member_account
        );
        let host = joining(self.written).map_err(anyhow::Error::msg)?;
        ensure!(
            host.name == node.name,
            "host.name is {}, and this is the node {}: leave it to the chart",
            host.name,
            node.name
        );
        admission::discard(self.folder)?;
        let name = &self.written.coordinator.cluster;
        let founded = admission::found(self.folder, name, &node.server(), &host.address, WallClock.now())?;
        founded.context("this host belongs to a cluster already")
    }

    async fn join(&self, cluster: &Cluster, mut notice: Notice) -> anyhow::Result<Granted> {
        let host = joining(self.written).map_err(anyhow::Error::msg)?;
        let hotkey = match &self.written.miner.seed_file {
            Some(file) if self.written.coordinator.enabled => {
                let seed = signer::read_seed(file).context("miner.seed_file")?;
                Some(Key::new(&seed).hotkey().clone())
            }
            Some(_) | None => None,
        };
        let public_key = HostKey::open_or_make(self.folder)?.public();
        let deadline = Instant::now() + self.patience;
        let mut told = None;
        loop {
            let question = Question::Enter(Box::new(Enter {
                token: self.token()?,
                site: host.site.clone(),
                address: host.address.clone(),
                public_key: public_key.clone(),
                hotkey: hotkey.clone(),
                clock: WallClock.now(),
            }));
            let error = match client::enter(&notice, &question).await {
                Ok(granted) => return Ok(granted),
                Err(error @ client::Error::Unreachable(_)) => error,
                Err(error) => return Err(error.into()),
            };
            if Instant::now() >= deadline {
                return Err(error).with_context(|| self.way_back(&notice));
            }
            let text = error.to_string();
            if told.as_ref() != Some(&text) {
                say(&format!("{text}; it is tried again"))?;
                told = Some(text);
            }
            sleep(TRY_EVERY).await;
            match cluster.notice().await {
                Ok(Some(now)) if now.cluster == notice.cluster => notice = now,
                Ok(_) => bail!("the {} is another one by now", self.nodes.notice_name()),
                Err(NodesError::Unavailable(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn way_back(&self, notice: &Notice) -> String {
        format!(
            "enter the cluster {}, which the {} names: no second one is founded beside it. Start one of its members; \
             if all are lost, restore a snapshot (docs/operations/backup.md). Only where nothing of it is to be kept, \
             delete the {1}: then the next member founds another cluster",
            notice.cluster,
            self.nodes.notice_name()
        )
    }
}
