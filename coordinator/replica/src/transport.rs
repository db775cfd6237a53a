//! The way to other members: bytes to a member, bytes back.
//!
//! [`Network`] turns the Raft library's calls into requests and knows nothing of connections; a
//! [`Transport`] carries requests and knows nothing of Raft. Calls end by our own limits, not by those that
//! the library hands over: it gives an append one heartbeat, within which a member far away never answers.
//! A member that cannot be reached is reported as such, which makes the library wait longer and longer
//! between attempts.

use futures_util::future::{BoxFuture, ready};
use futures_util::stream::{BoxStream, Stream};
use openraft::error::{NetworkError, RPCError, ReplicationClosed, StreamingError};
use openraft::network::RPCOption;

use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::type_config::alias::SnapshotOf;
use openraft::{BasicNode, RaftNetworkFactory, RaftNetworkV2};
use std::collections::BTreeSet;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::membership::Membership;
use crate::raft::{RaftLogId, RaftVote, Types};
use crate::snapshot::SnapshotData;
use crate::snapshot::sending;
use crate::storage::Writer;
use crate::urgency::Quickest;
use crate::wire::{self, Answer, Append, Candidacy, Request, Transfer};

mod gathering;

/// An append without any answer for this long has failed.
const APPEND_MAX: Duration = Duration::from_secs(1);

/// Carries one request to a member and its answer back. The other end gives the request to
/// [`crate::Replica::answer`], together with the id of the member that it has made sure is calling.
pub trait Transport: Send + Sync + 'static {
    /// Asks `member` at `address`; gives up after `within`. Requests and answers are at most
    /// [`crate::MESSAGE_BYTES_MAX`] bytes.
    fn call<'a>(
        &'a self,
        member: u64,
        address: &'a str,
        request: Vec<u8>,
        within: Duration,
    ) -> BoxFuture<'a, Result<Vec<u8>, Unreachable>>;
}

/// The member did not answer. It may have got the request all the same.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Unreachable {
    /// What happened, for the operator.
    pub reason: String,
}

/// The transport of a member that has no way to others: a cluster of one.
#[derive(Debug, Clone, Copy)]
pub struct Unconnected;

impl Transport for Unconnected {
    fn call<'a>(
        &'a self,
        member: u64,
        _address: &'a str,
        _request: Vec<u8>,
        _within: Duration,
    ) -> BoxFuture<'a, Result<Vec<u8>, Unreachable>> {
        let reason = format!("member {member}: this member has no transport");
        Box::pin(async move { Err(Unreachable { reason }) })
    }
}

/// Why a call to a member came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CallError {
    #[error("member {member} at {address:?} cannot be reached: {reason}")]
    Unreachable {
        member: u64,
        address: String,
        reason: Unreachable,
    },
    #[error("member {member} answered with {reason}")]
    Garbage { member: u64, reason: wire::Garbage },
    #[error("member {member} gave an answer to another question")]
    Unexpected { member: u64 },
    #[error("member {member} is told nothing while no majority answers")]
    Quiet { member: u64 },
}

impl From<CallError> for RPCError<Types> {
    fn from(error: CallError) -> Self {
        // Also for nonsense: what answers so is not worth an immediate repetition.
        Self::Unreachable(openraft::error::Unreachable::new(&error))
    }
}

/// Makes requests out of what the Raft library and the proposer want, for any member.
#[derive(Clone)]
pub(crate) struct Network {
    transport: Arc<dyn Transport>,
    cluster: u32,
    /// Reads snapshots that are sent.
    writer: Writer,
    /// The newest membership: the library keeps the address that a member had when it began to replicate to it.
    members: Arc<Mutex<Membership>>,
    /// Members that did not answer last time, to say it once.
    silent: Arc<Mutex<BTreeSet<u64>>>,
    /// Whether this member keeps what it would say as a leader to itself.
    quiet: Arc<AtomicBool>,
    own: u64,
    quickest: Quickest,
}

impl Network {
    /// The way from member `own` to the others.
    pub(crate) fn new(transport: Arc<dyn Transport>, cluster: &str, own: u64, writer: Writer) -> Self {
        Self {
            transport,
            own,
            quickest: Quickest::default(),
            cluster: wire::cluster_mark(cluster),
            writer,
            members: Arc::default(),
            silent: Arc::default(),
            quiet: Arc::default(),
        }
    }

    /// From now on members are called where this says that they are.
    pub(crate) fn set_members(&self, members: Membership) {
        *self.members() = members;
    }

    /// Whether appends and heartbeats are kept back from now on.
    pub(crate) fn set_quiet(&self, quiet: bool) {
        self.quiet.store(quiet, Ordering::Relaxed);
    }

    fn members(&self) -> MutexGuard<'_, Membership> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn address(&self, member: u64) -> Option<String> {
        self.members().address(member).map(str::to_owned)
    }

    fn note(&self, member: u64, error: Option<&CallError>) {
        let mut silent = self.silent.lock().unwrap_or_else(PoisonError::into_inner);
        match error {
            None if silent.remove(&member) => tracing::info!(member, "the member answers again"),
            Some(error) if silent.insert(member) => tracing::warn!(member, %error, "a member is silent"),
            _ => {}
        }
    }

    pub(crate) fn writer(&self) -> Writer {
        self.writer
    }

    pub(crate) fn peer(&self, member: u64, address: &str) -> Peer {
        Peer {
            network: self.clone(),
            member,
            address: address.to_owned(),
        }
    }
}

impl RaftNetworkFactory<Types> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Peer {
        self.peer(target, &node.addr)
    }
}

/// One other member.
pub(crate) struct Peer {
    network: Network,
    pub(crate) member: u64,
    /// Where it was when this was made.
    address: String,
}

impl Peer {
    pub(crate) async fn ask(&self, request: &Request, within: Duration) -> Result<Answer, CallError> {
        let answer = self.ask_once(request, within).await;
        self.network.note(self.member, answer.as_ref().err());
        answer
    }

    async fn ask_once(&self, request: &Request, within: Duration) -> Result<Answer, CallError> {
        let member = self.member;
        let bytes = wire::encode_request(self.network.cluster, member, request);
        let address = self.network.address(member);
        let address = address.unwrap_or_else(|| self.address.clone());
        let answer = self.network.transport.call(member, &address, bytes, within).await;
        let answer = answer.map_err(|reason| CallError::Unreachable {
            member,
            address,
            reason,
        })?;
        wire::decode_answer(&answer).map_err(|reason| CallError::Garbage { member, reason })
    }

    /// Whether entries wait for this member.
    fn is_waited_for(&self) -> bool {
        let network = &self.network;
        network
            .quickest
            .includes(self.member, network.own, &network.members())
    }

    /// Entries are sent to it.
    fn owes_answer(&self) {
        self.network.quickest.asked(self.member);
    }

    /// It answered to entries, or could not be reached.
    fn has_answered(&self, well: bool) {
        self.network.quickest.answered(self.member, well);
    }

    pub(crate) fn unexpected(&self) -> CallError {
        CallError::Unexpected { member: self.member }
    }

    pub(crate) fn writer(&self) -> Writer {
        self.network.writer
    }

    async fn ask_for_vote(
        &self,
        request: Request,
        option: &RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        match self.ask(&request, option.hard_ttl()).await? {
            Answer::Voted {
                ballot,
                last,
                granted,
            } => Ok(VoteResponse::new(
                RaftVote::from(ballot),
                last.map(RaftLogId::from),
                granted,
            )),
            _ => Err(self.unexpected().into()),
        }
    }
}

impl RaftNetworkV2<Types> for Peer {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<Types>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, RPCError<Types>> {
        if self.network.quiet.load(Ordering::Relaxed) {
            return Err(CallError::Quiet { member: self.member }.into());
        }
        let append = Append::of(&rpc);
        drop(rpc);
        let bytes: usize = append.entries.iter().map(|entry| entry.0.len()).sum();
        // At least 1 MiB a second, or the way is too slow to be called one.
        let within = APPEND_MAX.mul_f64(1.0 + bytes as f64 / wire::APPEND_BYTES as f64);
        match self.ask(&Request::Append(append), within).await? {
            Answer::Appended => Ok(AppendEntriesResponse::Success),
            Answer::AppendedUpTo(upto) => {
                Ok(AppendEntriesResponse::PartialSuccess(upto.map(RaftLogId::from)))
            }
            Answer::Conflict => Ok(AppendEntriesResponse::Conflict),
            Answer::HigherBallot(ballot) => Ok(AppendEntriesResponse::HigherVote(ballot.into())),
            _ => Err(self.unexpected().into()),
        }
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<
        's,
        Result<BoxStream<'s, Result<StreamAppendResult<Types>, RPCError<Types>>>, RPCError<Types>>,
    >
    where
        S: Stream<Item = AppendEntriesRequest<Types>> + Send + Unpin + 'static,
    {
        Box::pin(ready(Ok(gathering::answers(self, input, option))))
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        self.ask_for_vote(Request::Vote(Candidacy::of(&rpc)), &option)
            .await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        self.ask_for_vote(Request::PreVote(Candidacy::of(&rpc)), &option)
            .await
    }

    async fn full_snapshot(
        &mut self,
        vote: RaftVote,
        snapshot: SnapshotOf<Types, SnapshotData>,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let sent = sending::send(self, &vote, &snapshot);
        let mut cancel = std::pin::pin!(cancel);
        tokio::select! {
            biased;
            closed = &mut cancel => Err(StreamingError::Closed(closed)),
            sent = sent => sent.map(SnapshotResponse::new).map_err(|error| match error {
                sending::Error::Call(error) => StreamingError::from(RPCError::from(error)),
                sending::Error::Read(error) => StreamingError::Network(NetworkError::new(&error)),
            }),
        }
    }

    async fn transfer_leader(
        &mut self,
        rpc: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Types>, RPCError<Types>> {
        let request = Request::Transfer(Transfer::of(&rpc));
        match self.ask(&request, option.hard_ttl()).await? {
            Answer::Transferring => Ok(Ok(())),
            Answer::NotTransferring(reason) => {
                tracing::info!(member = self.member, reason, "does not take over the lead");
                Err(RPCError::Network(NetworkError::from_string(reason)))
            }
            _ => Err(self.unexpected().into()),
        }
    }
}
