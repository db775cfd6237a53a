//! Nodes of a Kubernetes cluster that several hosts share enter by themselves: each shows the token of its agent's
//! pod, and the cluster's API server says whose it is. Where the members are stands in a notice, an object of that
//! cluster which the leader keeps right.
//!
//! ```text
//! node: enter --reads--> notice (cluster, authorities, doors) <--writes-- founder, then the leader
//!          |---token---> gate --asks--> API server: which account, which pod, which node
//! ```
//! Name and id of such a host are made of the node's name and UID, and whether it becomes a member is decided by the
//! account of its pod. What the host says of itself decides neither.

use std::fmt;
use std::time::Duration;

use protocol::hotkey::Hotkey;
use protocol::id::ServerId;
use replica::Leadership;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::identity::fingerprint;
use crate::store::{BoxFuture, Store};

/// Between two looks at what the notice should say.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Between two writes that change nothing: somebody may have deleted the notice. Also after one that failed.
const WRITE_EVERY: Duration = Duration::from_secs(30);
/// Letters of the node's name in an id: with what follows them they are one part of a DNS name.
const ID_LETTERS_MAX: usize = 46;
/// Digits of the digest in an id.
const ID_DIGITS: usize = 16;

/// A node whose agent has shown a good token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its name in the cluster of Kubernetes.
    pub name: String,
    /// What the API server calls it; another one when it is deleted and made again.
    pub uid: String,
    /// The account of its pod is that of members.
    pub member: bool,
}

impl Node {
    /// The id of the host that this node is.
    #[must_use]
    pub fn server(&self) -> ServerId {
        let letter = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
        let readable: String = self.name.chars().map(letter).take(ID_LETTERS_MAX).collect();
        let digest = hex::encode(Sha256::digest(format!("{}\n{}", self.name, self.uid)));
        let id = format!("{}-{}", readable.trim_matches('-'), &digest[..ID_DIGITS]);
        let id = id.trim_start_matches('-').to_ascii_lowercase();
        ServerId::parse(&id).expect("letters, digits and '-'")
    }
}

/// What those who want to enter are told.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// Id of the cluster.
    pub cluster: String,
    /// Whose it is.
    pub miner: Hotkey,
    /// SHA-256 of the DER of its authorities' certificates.
    pub authorities: Vec<[u8; 32]>,
    /// `host:port` of members' doors.
    pub doors: Vec<String>,
}

impl fmt::Debug for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let authorities: Vec<String> = self.authorities.iter().map(hex::encode).collect();
        f.debug_struct("Notice")
            .field("cluster", &self.cluster)
            .field("miner", &self.miner)
            .field("authorities", &authorities)
            .field("doors", &self.doors)
            .finish()
    }
}

/// Why a token is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It is not the token of an agent's pod.
    #[error("{0}")]
    Refused(String),
    /// The API server cannot be asked.
    #[error("{0}")]
    Unavailable(String),
}

/// The cluster of Kubernetes, as a member asks it.
pub trait Nodes: fmt::Debug + Send + Sync {
    /// Whose token this is.
    fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Node, Error>>;

    /// Makes the notice say this; it stays as it is when it is another cluster's.
    fn tell<'a>(&'a self, notice: &'a Notice) -> BoxFuture<'a, Result<(), Error>>;
}

/// What the notice should say; none before the cluster is founded.
#[must_use]
pub fn notice(store: &Store, cluster: &str, miner: &Hotkey) -> Option<Notice> {
    let (authorities, doors) = store.read(|state| {
        let mut authorities = vec![state.cluster()?.authority_pem.clone()];
        authorities.extend(state.rotation().map(|rotation| rotation.authority_pem.clone()));
        let members = state.members();
        let doors: Vec<String> = members.map(|(_, host)| host.host.address.clone()).collect();
        Some((authorities, doors))
    })?;
    Some(Notice {
        cluster: cluster.to_owned(),
        miner: miner.clone(),
        authorities: authorities.iter().filter_map(|pem| fingerprint(pem)).collect(),
        doors,
    })
}

/// Keeps the notice right whenever this member leads, until cancelled.
pub async fn keep(
    nodes: &dyn Nodes,
    store: &Store,
    (cluster, miner): (&str, &Hotkey),
    mut leadership: watch::Receiver<Leadership>,
    cancel: CancellationToken,
) {
    let mut written: Option<(Notice, Instant)> = None;
    loop {
        let leads = async { leadership.wait_for(|now| now.leads).await.is_ok() };
        if cancel.run_until_cancelled(leads).await != Some(true) {
            return;
        }
        let wanted = notice(store, cluster, miner);
        let is_written = |wanted: &Notice| {
            let last = written.as_ref();
            last.is_some_and(|(last, at)| last == wanted && at.elapsed() < WRITE_EVERY)
        };
        let mut pause = LOOK_EVERY;
        if let Some(wanted) = wanted.filter(|wanted| !is_written(wanted)) {
            // One that leads no more must not take back what its successor wrote.
            let told = async {
                let leads = store.linearizable().await;
                leads.map_err(|error| Error::Unavailable(error.to_string()))?;
                nodes.tell(&wanted).await
            };
            match cancel.run_until_cancelled(told).await {
                None => return,
                Some(Ok(())) => written = Some((wanted, Instant::now())),
                Some(Err(error)) => {
                    tracing::warn!(%error, "nodes that want to enter are not told where the members are");
                    pause = WRITE_EVERY;
                }
            }
        }
        if cancel
            .run_until_cancelled(tokio::time::sleep(pause))
            .await
            .is_none()
        {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str, uid: &str) -> String {
        let node = Node {
            name: name.to_owned(),
            uid: uid.to_owned(),
            member: false,
        };
        node.server().to_string()
    }

    #[test]
    fn a_node_that_was_made_again_is_another_host() {
        let first = id("gpu-1.example", "6f1c");
        assert!(first.starts_with("gpu-1-example-"), "{first}");
        assert_eq!(first, id("gpu-1.example", "6f1c"));
        assert_ne!(first, id("gpu-1.example", "6f1d"));
        assert_ne!(id("gpu.1", "u"), id("gpu-1", "u"), "their letters are the same");
    }

    #[test]
    fn an_id_is_one_part_of_a_dns_name_whatever_the_name() {
        for name in ["n", "-", "", "a.b", &"long.".repeat(50)] {
            let id = id(name, "u");
            assert!((1..=63).contains(&id.len()), "{id}");
            assert!(
                !id.starts_with('-') && !id.ends_with('-') && !id.contains('.'),
                "{id}"
            );
        }
    }
}
