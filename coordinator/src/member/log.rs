//! The replica as the store's log.

use replica::{ProposeError, Replica};

use crate::store::{BoxFuture, Error, Log};

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

    /// An error, with what an operator needs to know where nobody leads.
    fn explained(&self, error: &dyn std::fmt::Display) -> String {
        if self.replica.leads_now() {
            return error.to_string();
        }
        let own = self.replica.member();
        let leader = self.replica.leadership().borrow().leader;
        let voters = self.replica.membership().voters;
        let majority = voters.len() / 2 + 1;
        let voters = voters.iter().map(|(member, address)| {
            let mark = match *member {
                member if member == own => ", this one",
                member if Some(member) == leader => ", which leads or led last",
                _ => "",
            };
            format!("member {member} at {address}{mark}")
        });
        let voters = voters.collect::<Vec<_>>().join("; ");
        format!(
            "{error}: {majority} of these voters must be there and hear each other ({voters}). What this member knows can \
             be read with the header X-Chutes-Read: local; if most of them are lost for good, see `chutes-miner raft \
             recover`"
        )
    }
}

impl Log for ReplicatedLog {
    fn propose(&self, command: Vec<u8>) -> BoxFuture<'_, Result<Vec<u8>, Error>> {
        Box::pin(async {
            let proposed = self.replica.propose(command).await;
            proposed.map_err(|error| match error {
                ProposeError::Timeout | ProposeError::NotLeader { .. } => {
                    Error::Unavailable(self.explained(&error))
                }
                ProposeError::OutcomeUnknown(_) => Error::OutcomeUnknown(self.explained(&error)),
                certain => Error::Unavailable(certain.to_string()),
            })
        })
    }

    fn linearizable(&self) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async {
            let read = self.replica.linearizable().await;
            read.map_err(|error| match error {
                replica::Error::Timeout | replica::Error::NotLeader { .. } => {
                    Error::Unavailable(self.explained(&error))
                }
                other => Error::Unavailable(other.to_string()),
            })
        })
    }

    fn leads_now(&self) -> bool {
        self.replica.leads_now()
    }
}
