//! When the majority of the voters is lost for good: what a surviving member knows, and how it goes on alone.
//!
//! Both work on the files of a member that does not run. Who calls [`Survivor::go_alone`] has seen to it that a person knows
//! what that means: what others had acknowledged and this one never got is lost.

use std::path::{Path, PathBuf};

use coordinator_core::state_machine::codec::encode_proposal;
use coordinator_core::state_machine::command::RequestId;
use coordinator_core::state_machine::{Command, Proposal};
use protocol::time::UnixMillis;
use replica::Storage;
use replica::recovery::{Condition, inspect, recover};

use crate::identity::IdentityError;
use crate::join::Admission;

/// Why a member cannot go on alone.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is nobody's member.
    #[error(
        "this host belongs to no cluster: there is nothing to go on with. Run it on a host that voted; if none is left, \
             `chutes-agent restore` begins anew from a snapshot"
    )]
    NotJoined,
    /// It has no copy of the state.
    #[error(
        "this host is no member of its cluster: it never had a vote, nor a copy of the state. Run it on a host \
             that voted; if none is left, `chutes-agent restore` begins anew from a snapshot"
    )]
    NotAMember,
    /// What it had is gone.
    #[error(
        "the store of member {member} is not in {folder} any more: there is nothing to go on with. Bring the \
             folder back or run it on another member; if none is left, `chutes-agent restore` begins anew from a snapshot"
    )]
    StoreLost {
        /// Which.
        member: u64,
        /// Where it was.
        folder: PathBuf,
    },
    /// It was let in and has learned nothing yet.
    #[error(
        "this member has not received anything yet: there is nothing to go on with. Run it on another \
             member; if none is left, `chutes-agent restore` begins anew from a snapshot"
    )]
    Empty,
    /// It needs nobody.
    #[error("this member is the only voter: it needs no other one, start the agent")]
    IsAlone,
    /// Another cluster is meant.
    #[error("the cluster is {cluster}, not {typed:?}: nothing was changed")]
    OtherCluster {
        /// Its.
        cluster: String,
        /// As a person wrote it.
        typed: String,
    },
    /// The admission.
    #[error("cluster identity: {0}")]
    Identity(#[from] IdentityError),
    /// The store.
    #[error("open the replicated state: {0}")]
    Replica(#[from] replica::Error),
}

/// A member that could go on alone.
#[derive(Debug)]
pub struct Survivor {
    /// Id of its cluster.
    pub cluster: String,
    /// Its member id.
    pub member: u64,
    /// How far it has come.
    pub condition: Condition,
    folder: PathBuf,
}

impl Survivor {
    /// Looks at a member that does not run, by its folders of the coordinator and of its identity. Changes nothing.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn look(data: &Path, identity: &Path) -> Result<Self, Error> {
        let admission = Admission::read(identity)?.ok_or(Error::NotJoined)?;
        let member = admission.member.ok_or(Error::NotAMember)?;
        let folder = data.join("raft");
        if !folder.join("raft-log.redb").exists() {
            return Err(if admission.opened {
                Error::StoreLost { member, folder }
            } else {
                Error::Empty
            });
        }
        let condition = inspect(config(&admission.cluster, member, &folder)).await?;
        if condition.last_index.is_none() {
            return Err(Error::Empty);
        }
        if condition.voters.iter().eq([&member]) {
            return Err(Error::IsAlone);
        }
        Ok(Self {
            cluster: admission.cluster,
            member,
            condition,
            folder,
        })
    }

    /// Makes this member, which others will find at `address`, the only one of its cluster. The change and the
    /// command that tells hosts and the other members of it are written in one piece: either both count or none.
    /// `typed` is the cluster's id, by which a person says that this is meant.
    ///
    /// # Errors
    /// [`Error::OtherCluster`] and [`Error::Replica`].
    pub async fn go_alone(&self, typed: &str, address: String, now: UnixMillis) -> Result<(), Error> {
        if typed != self.cluster {
            return Err(Error::OtherCluster {
                cluster: self.cluster.clone(),
                typed: typed.to_owned(),
            });
        }
        let mut config = config(&self.cluster, self.member, &self.folder);
        config.address = address;
        let proposal = Proposal {
            request: RequestId(fastrand::u128(..)),
            at: now,
            guard: None,
            command: Command::Recover { member: self.member },
        };
        recover(config, vec![encode_proposal(&proposal)]).await?;
        Ok(())
    }
}

fn config(cluster: &str, member: u64, folder: &Path) -> replica::Config {
    let directory = folder.to_owned();
    replica::Config::new(cluster, member, Storage::Files { directory })
}
