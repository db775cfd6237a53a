//! Answers what other members ask. Nothing here trusts a request: what makes no sense, is meant for another
//! member, or speaks in the name of a third one, is an error.

use openraft::ReadPolicy;
use openraft::async_runtime::WatchReceiver;
use openraft::error::{Fatal, LinearizableReadError, RaftError};
use std::time::Duration;
use tokio::time::{Instant, timeout};

use crate::error::{Error, ProposeError};
use crate::proposer;
use crate::raft::{Commands, RaftVote, Types};
use crate::wire::{self, Answer, Ballot, Bytes, Candidacy, Chunk, Refusal, Request, Transfer};
use crate::{Inner, Replica};

/// Batches of commands from other members that may be under way at once.
pub(crate) const FORWARDED_MAX: usize = 64;

impl Replica {
    /// Answers a request of another member: the other end of [`crate::Transport::call`]. The caller has made
    /// sure that it comes from member `from`.
    ///
    /// # Errors
    /// `Refused` for what makes no sense, `Stopped`, `Failed`.
    pub async fn answer(&self, from: u64, request: &[u8]) -> Result<Vec<u8>, Error> {
        let refused = |reason: String| Error::Refused { from, reason };
        let decoded = wire::decode_request(self.0.cluster, self.member(), request);
        let request = decoded.map_err(|garbage| refused(garbage.to_string()))?;
        if let Some(claimed) = sender(&request)
            && claimed != from
        {
            return Err(refused(format!("it speaks in the name of member {claimed}")));
        }
        let answer = self.0.seed.scope(self.answer_to(from, request)).await?;
        Ok(wire::encode_answer(&answer))
    }

    async fn answer_to(&self, from: u64, request: Request) -> Result<Answer, Error> {
        let (inner, raft) = (&*self.0, self.0.raft());
        let fatal = |error: RaftError<Types>| match error {
            RaftError::Fatal(fatal) => self.failed(&fatal),
        };
        match request {
            Request::Append(append) => {
                let rpc = append.into_rpc().map_err(|fault| Error::Refused {
                    from,
                    reason: fault.to_string(),
                })?;
                raft.append_entries(rpc).await.map(Answer::from).map_err(fatal)
            }
            Request::Vote(candidacy) => {
                let voted = raft.vote(candidacy.into_rpc()).await;
                voted.map(Answer::from).map_err(fatal)
            }
            Request::PreVote(candidacy) => {
                let voted = raft.pre_vote(candidacy.into_rpc()).await;
                voted.map(Answer::from).map_err(fatal)
            }
            Request::Snapshot(chunk) => self.take_chunk(from, chunk).await,
            Request::Transfer(transfer) => {
                let handled = raft.handle_transfer_leader(transfer.into_rpc()).await;
                Ok(
                    match handled.map_err(|fatal: Fatal<Types>| self.failed(&fatal))? {
                        Ok(()) => Answer::Transferring,
                        Err(why) => Answer::NotTransferring(why.to_string()),
                    },
                )
            }
            Request::Propose { .. } | Request::ReadIndex { .. } if !self.is_member(from) => {
                Err(Error::Refused {
                    from,
                    reason: "it is no member, or not any more".to_owned(),
                })
            }
            Request::Propose { within_ms, commands } => {
                let within = Duration::from_millis(within_ms).min(inner.timeout);
                Ok(match propose(inner, commands, within).await {
                    Ok(replies) => Answer::Proposed(replies.into_iter().map(Bytes).collect()),
                    Err(error) => Answer::NotProposed(Refusal::from(error)),
                })
            }
            Request::ReadIndex { within_ms } => self.read_index(Duration::from_millis(within_ms)).await,
            Request::Echo => Ok(Answer::Echo {
                lease_ms: inner.own_lease_ms(),
            }),
        }
    }

    fn is_member(&self, member: u64) -> bool {
        let raft = self.0.raft();
        let metrics = raft.metrics();
        metrics
            .borrow_watched()
            .membership_config
            .get_node(&member)
            .is_some()
    }

    async fn take_chunk(&self, from: u64, chunk: Chunk) -> Result<Answer, Error> {
        let (inner, raft) = (&*self.0, self.0.raft());
        let own = raft.metrics().borrow_watched().vote;
        if own > RaftVote::from(chunk.ballot) {
            return Ok(Answer::HigherBallot(Ballot::from(&own)));
        }
        let taken = inner.receiver.take(&raft, &inner.seed, chunk).await;
        taken.map_err(|error| Error::Refused {
            from,
            reason: error.to_string(),
        })
    }

    async fn read_index(&self, within: Duration) -> Result<Answer, Error> {
        let raft = self.0.raft();
        let barrier = raft.get_read_log_id(ReadPolicy::ReadIndex);
        let leader = match timeout(within, barrier).await {
            Ok(Ok((id, _))) => return Ok(Answer::ReadAt { index: id.index() }),
            Ok(Err(RaftError::Fatal(fatal))) => return Err(self.failed(&fatal)),
            Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward)))) => {
                forward.leader_id
            }
            Ok(Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_)))) | Err(_) => None,
        };
        Ok(Answer::NotReadable { leader })
    }
}

/// In whose name a request speaks.
fn sender(request: &Request) -> Option<u64> {
    match request {
        Request::Append(append) => Some(append.ballot.member),
        Request::Vote(Candidacy { ballot, .. })
        | Request::PreVote(Candidacy { ballot, .. })
        | Request::Snapshot(Chunk { ballot, .. })
        | Request::Transfer(Transfer { ballot, .. }) => Some(ballot.member),
        Request::Propose { .. } | Request::ReadIndex { .. } | Request::Echo => None,
    }
}

/// Proposes another member's commands as one entry, here or not at all.
async fn propose(
    inner: &Inner,
    commands: Vec<Bytes>,
    within: Duration,
) -> Result<Vec<Vec<u8>>, ProposeError> {
    let size_bytes = commands.iter().map(|command| command.0.len()).sum();
    let size_bytes_max = inner.queue.entry_bytes_max();
    if size_bytes > size_bytes_max {
        return Err(ProposeError::TooLarge {
            size_bytes,
            size_bytes_max,
        });
    }
    if inner.queue.is_closed() {
        return Err(ProposeError::Stopped);
    }
    let Ok(_permit) = inner.forwarded.try_acquire() else {
        return Err(ProposeError::Busy);
    };
    let count = commands.len();
    let commands = Commands::new(&commands);
    let replies = proposer::write(&inner.raft(), None, commands, Instant::now() + within).await?;
    if replies.len() == count {
        Ok(replies)
    } else {
        let why = "the number of replies does not match".to_owned();
        Err(ProposeError::OutcomeUnknown(why))
    }
}
