//! Group commit: gathers waiting commands into one log entry.
//!
//! While an entry is on its way (at most `entries_in_flight_max`), commands wait; when it returns, all that
//! wait go into the next one. So load makes entries larger rather than more numerous. A full queue answers
//! "busy" at once. On a member that does not lead, what would be an entry goes to the leader as one request.

use futures_util::stream::{FuturesUnordered, StreamExt};
use openraft::error::{ClientWriteError, RaftError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::error::ProposeError;
use crate::forward;
use crate::health::{Shared, count};
use crate::raft::{Commands, CurrentRaft, Raft};
use crate::transport::Network;

/// Limits of the proposer.
#[derive(Debug, Clone)]
pub struct Proposals {
    /// Commands in one log entry. Default 512.
    pub commands_per_entry_max: usize,
    /// Bytes of commands in one log entry, hence the largest command. Default 1 MiB.
    pub entry_bytes_max: usize,
    /// Log entries on their way at once. With 1 each takes all that came while the last one was on its way: the fewest
    /// entries, and the least work for each command. Default 1.
    pub entries_in_flight_max: usize,
    /// Commands that may wait before the answer is "busy". Default 4096.
    pub waiting_max: usize,
    /// How long a command may wait for a leader that is ready, and then for its entry. Default 5 s.
    pub timeout_ms: u64,
}

impl Default for Proposals {
    fn default() -> Self {
        Self {
            commands_per_entry_max: 512,
            entry_bytes_max: 1024 * 1024,
            entries_in_flight_max: 1,
            waiting_max: 4096,
            timeout_ms: 5000,
        }
    }
}

/// So often all other tasks run once before an entry that is smaller than expected goes out: microseconds, unless they
/// have something to do.
const PASSES: usize = 8;

type Answer = Result<Vec<u8>, ProposeError>;

/// One command that waits for its entry.
#[derive(Debug)]
pub(crate) struct Proposal {
    command: Vec<u8>,
    deadline: Instant,
    answer: oneshot::Sender<Answer>,
}

/// The way into the proposer's queue.
#[derive(Debug, Clone)]
pub(crate) struct Queue {
    sender: mpsc::Sender<Proposal>,
    limits: Proposals,
}

impl Queue {
    pub(crate) fn new(limits: Proposals) -> (Self, mpsc::Receiver<Proposal>) {
        let (sender, receiver) = mpsc::channel(limits.waiting_max);
        (Self { sender, limits }, receiver)
    }

    /// Whether the proposer takes no more commands.
    pub(crate) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    pub(crate) fn entry_bytes_max(&self) -> usize {
        self.limits.entry_bytes_max
    }

    pub(crate) async fn propose(&self, command: Vec<u8>) -> Answer {
        let (size_bytes, size_bytes_max) = (command.len(), self.limits.entry_bytes_max);
        if size_bytes > size_bytes_max {
            return Err(ProposeError::TooLarge {
                size_bytes,
                size_bytes_max,
            });
        }
        let deadline = Instant::now() + Duration::from_millis(self.limits.timeout_ms);
        let (answer, answered) = oneshot::channel();
        match self.sender.try_send(Proposal {
            command,
            deadline,
            answer,
        }) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => return Err(ProposeError::Busy),
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(ProposeError::Stopped),
        }
        answered
            .await
            .unwrap_or_else(|_| Err(ProposeError::OutcomeUnknown("the proposer ended".into())))
    }
}

/// The task that turns waiting commands into log entries.
pub(crate) struct Proposer {
    current: CurrentRaft,
    network: Network,
    queue: mpsc::Receiver<Proposal>,
    /// A command that did not fit into the last entry.
    held: Option<Proposal>,
    limits: Proposals,
    shared: Shared,
    stop: oneshot::Receiver<()>,
}

impl Proposer {
    pub(crate) fn new(
        current: CurrentRaft,
        network: Network,
        queue: mpsc::Receiver<Proposal>,
        limits: Proposals,
        shared: Shared,
        stop: oneshot::Receiver<()>,
    ) -> Self {
        Self {
            current,
            network,
            queue,
            held: None,
            limits,
            shared,
            stop,
        }
    }

    /// Runs until stopped, or until nobody can propose any more. Commands that still wait at a stop are
    /// answered with "stopped"; entries on their way are waited for.
    pub(crate) async fn run(mut self) {
        let mut in_flight = FuturesUnordered::new();
        let mut expected = 0;
        loop {
            let may_send = in_flight.len() < self.limits.entries_in_flight_max;
            tokio::select! {
                biased;
                _ = &mut self.stop => break,
                Some(answered) = in_flight.next() => expected = answered + self.queue.len(),
                first = next(&mut self.held, &mut self.queue), if may_send => {
                    let Some(first) = first else { break };
                    // Whoever got an answer of the last entry may be about to propose again, and is let in with those who
                    // waited for it. Otherwise there would be two groups that take turns, in twice as many entries.
                    for _ in 0..PASSES {
                        if self.queue.len() + 1 >= expected {
                            break;
                        }
                        yield_now().await;
                    }
                    let gathered = self.gather(first);
                    if !gathered.is_empty() {
                        let (raft, network) = (self.current.borrow().clone(), self.network.clone());
                        in_flight.push(send(raft, network, self.shared.clone(), gathered));
                    }
                }
            }
        }
        self.queue.close();
        while let Some(proposal) = next(&mut self.held, &mut self.queue).await {
            answer(proposal, Err(ProposeError::Stopped));
        }
        while in_flight.next().await.is_some() {}
    }

    /// Takes what waits, within the limits of one entry.
    fn gather(&mut self, first: Proposal) -> Vec<Proposal> {
        let now = Instant::now();
        let mut bytes = 0;
        let mut gathered = Vec::new();
        let mut candidate = Some(first);
        while let Some(proposal) = candidate.take() {
            if proposal.deadline <= now {
                answer(proposal, Err(ProposeError::Timeout));
            } else if bytes + proposal.command.len() > self.limits.entry_bytes_max {
                self.held = Some(proposal);
                break;
            } else {
                bytes += proposal.command.len();
                gathered.push(proposal);
            }
            if gathered.len() < self.limits.commands_per_entry_max {
                candidate = self.queue.try_recv().ok();
            }
        }
        gathered
    }
}

/// The next command; may be dropped and called again without losing one.
async fn next(held: &mut Option<Proposal>, queue: &mut mpsc::Receiver<Proposal>) -> Option<Proposal> {
    match held.take() {
        Some(proposal) => Some(proposal),
        None => queue.recv().await,
    }
}

fn answer(proposal: Proposal, result: Answer) {
    // An error means that the caller gave up waiting.
    let _ = proposal.answer.send(result);
}

/// Brings one entry through the log and answers its commands; how many there were.
async fn send(raft: Raft, network: Network, shared: Shared, proposals: Vec<Proposal>) -> usize {
    let deadline = proposals
        .iter()
        .map(|proposal| proposal.deadline)
        .max()
        .unwrap_or_else(Instant::now);
    let (mut commands, mut answers) = (Vec::new(), Vec::new());
    for proposal in proposals {
        commands.push(proposal.command);
        answers.push(proposal.answer);
    }
    let commands_in_entry = commands.len();
    count(&shared.counters.entries_proposed, 1);
    let result = match write(&raft, Some(&network), Commands::new(&commands), deadline).await {
        Ok(replies) if replies.len() == answers.len() => Ok(replies),
        Ok(_) => Err(ProposeError::OutcomeUnknown(
            "the number of replies does not match".into(),
        )),
        Err(error) => Err(error),
    };
    match result {
        Ok(replies) => {
            count(&shared.counters.commands_acknowledged, replies.len());
            for (waiting, reply) in answers.into_iter().zip(replies) {
                let _ = waiting.send(Ok(reply));
            }
        }
        Err(error) => {
            for waiting in answers {
                let _ = waiting.send(Err(error.clone()));
            }
        }
    }
    commands_in_entry
}

/// Waits before asking again whether the leader is ready.
pub(crate) struct Backoff(Duration);

impl Backoff {
    pub(crate) fn new() -> Self {
        Self(Duration::from_millis(2))
    }

    /// Sleeps a little longer each time, but not past the deadline. False when the deadline has passed.
    pub(crate) async fn wait(&mut self, deadline: Instant) -> bool {
        let now = Instant::now();
        sleep_until(deadline.min(now + self.0)).await;
        self.0 = (self.0 * 2).min(Duration::from_millis(50));
        Instant::now() < deadline
    }
}

/// Brings commands through the log as one entry: here, or through `network` where the leader is.
pub(crate) async fn write(
    raft: &Raft,
    network: Option<&Network>,
    commands: Commands,
    deadline: Instant,
) -> Result<Vec<Vec<u8>>, ProposeError> {
    let mut backoff = Backoff::new();
    loop {
        let Ok(written) = timeout_at(deadline, raft.client_write(commands.clone())).await else {
            return Err(ProposeError::OutcomeUnknown(
                "no answer within the deadline".into(),
            ));
        };
        let leader = match written {
            Ok(response) => return Ok(response.data.0),
            // Refused before it entered the log: no leader yet, or the lease of a new one is not confirmed.
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(forward))) => {
                forward.leader_id.filter(|leader| leader != raft.node_id())
            }
            Err(error) => return Err(ProposeError::OutcomeUnknown(error.to_string())),
        };
        if leader.is_some() && network.is_none() {
            return Err(ProposeError::NotLeader { leader });
        }
        let peer = leader
            .zip(network)
            .and_then(|(leader, network)| forward::leader(raft, network, leader));
        if let Some(peer) = peer {
            match forward::propose(raft, &peer, &commands, deadline).await {
                // It certainly did not propose them: ask whoever leads by then.
                Err(ProposeError::NotLeader { .. } | ProposeError::Stopped) => {}
                answer => return answer,
            }
        }
        if !backoff.wait(deadline).await {
            return Err(ProposeError::Timeout);
        }
    }
}
