//! Appends to one member, one after the other, with what can go along in one.
//!
//! The library makes a request of every entry, and another one of every step of what is committed. Here the latter
//! wait a little for an entry to go along with, and entries go in groups to a member that they do not wait for. Nothing
//! is asked of the library while an answer is awaited: it takes the moment in which it made the last request for the
//! one in which the member was heard.

use futures_util::stream::{self, BoxStream, Stream, StreamExt as _};
use openraft::RaftNetworkV2 as _;
use openraft::error::RPCError;
use openraft::network::RPCOption;
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, StreamAppendError, StreamAppendResult};
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

use super::Peer;
use crate::log_store::log_file::size_in_memory;
use crate::raft::{RaftLogId, Types};
use crate::wire::APPEND_BYTES;

/// How often entries are sent to a member that they do not wait for.
const GATHER: Duration = Duration::from_millis(60);
/// So often it is asked again whether they wait for it now: another may have become slow.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// How long news of what is committed waits for entries to go along with.
const HOLD_COMMITTED: Duration = Duration::from_millis(2);

type Append = AppendEntriesRequest<Types>;
type Outcome = Result<StreamAppendResult<Types>, RPCError<Types>>;

struct Appends<'p, S> {
    peer: &'p mut Peer,
    input: S,
    ended: bool,
    /// It came while others were gathered, and does not go along with them.
    held: Option<Append>,
    /// When entries were sent last.
    sent: Option<Instant>,
}

/// Sends the appends of `input` and gives the answers; ends with it, or with the first that is no full success.
pub(super) fn answers<'p, S>(peer: &'p mut Peer, input: S, option: RPCOption) -> BoxStream<'p, Outcome>
where
    S: Stream<Item = Append> + Send + Unpin + 'static,
{
    let appends = Appends {
        peer,
        input,
        ended: false,
        held: None,
        sent: None,
    };
    let answers = stream::unfold(Some(appends), move |appends| {
        let option = option.clone();
        async move {
            let mut appends = appends?;
            let append = appends.next().await?;
            let last = last_of(&append);
            let answer = appends.exchange(append, option).await;
            let goes_on = matches!(&answer, Ok(Ok(upto)) if *upto == last);
            Some((answer, goes_on.then_some(appends)))
        }
    });
    answers.boxed()
}

impl<S> Appends<'_, S>
where
    S: Stream<Item = Append> + Send + Unpin,
{
    async fn more(&mut self) -> Option<Append> {
        if self.ended {
            return None;
        }
        let more = self.input.next().await;
        self.ended = more.is_none();
        more
    }

    async fn next(&mut self) -> Option<Append> {
        let mut append = match self.held.take() {
            Some(held) => held,
            None => self.more().await?,
        };
        let began = Instant::now();
        let mut bytes = size(&append);
        while bytes < APPEND_BYTES {
            let due = match self.sent {
                _ if append.entries.is_empty() => began + HOLD_COMMITTED,
                Some(sent) if !self.peer.is_waited_for() => sent + GATHER,
                _ => break,
            };
            let now = Instant::now();
            if due <= now {
                break;
            }
            tokio::select! {
                biased;
                more = self.more() => match more {
                    Some(more) if more.vote == append.vote && more.prev_log_id == last_of(&append) => {
                        bytes += size(&more);
                        append.entries.extend(more.entries);
                        append.leader_commit = more.leader_commit;
                    }
                    // A heartbeat and a probe are all that there is of their streams.
                    other => {
                        self.held = other;
                        break;
                    }
                },
                () = sleep_until(due.min(now + LOOK_AGAIN)) => {}
            }
        }
        Some(append)
    }

    async fn exchange(&mut self, append: Append, option: RPCOption) -> Outcome {
        let (previous, last) = (append.prev_log_id, last_of(&append));
        let has_entries = !append.entries.is_empty();
        if has_entries {
            self.sent = Some(Instant::now());
            self.peer.owes_answer();
        }
        let answer = self.peer.append_entries(append, option).await;
        if has_entries {
            self.peer.has_answered(answer.is_ok());
        }
        Ok(match answer? {
            AppendEntriesResponse::Success => Ok(last),
            AppendEntriesResponse::PartialSuccess(upto) => Ok(upto),
            AppendEntriesResponse::HigherVote(vote) => Err(StreamAppendError::HigherVote(vote)),
            AppendEntriesResponse::Conflict => match previous {
                Some(previous) => Err(StreamAppendError::Conflict(previous)),
                None => return Err(self.peer.unexpected().into()),
            },
        })
    }
}

fn last_of(append: &Append) -> Option<RaftLogId> {
    let last = append.entries.last().map(|entry| entry.log_id);
    last.or(append.prev_log_id)
}

fn size(append: &Append) -> usize {
    append.entries.iter().map(size_in_memory).sum()
}
