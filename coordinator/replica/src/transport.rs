//! The way to other members: bytes to a member, bytes back.
//!
//! [`Network`] turns the Raft library's calls into requests and knows nothing of connections; a
//! [`Transport`] carries requests and knows nothing of Raft. The only transport so far is [`Unconnected`],
//! for a cluster of one voter. Calls end by their own deadline, and a member that cannot be reached is
//! reported as such, which makes the library wait longer and longer between attempts.

use futures_util::future::BoxFuture;
use openraft::error::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::RPCOption;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
};
use openraft::type_config::alias::SnapshotOf;
use openraft::{BasicNode, RaftNetworkFactory, RaftNetworkV2};
use serde::{Serialize, de::DeserializeOwned};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use crate::raft::{RaftVote, Types};
use crate::snapshot::SnapshotData;

/// What is asked of another member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Append,
    Vote,
    PreVote,
}

/// The member did not answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("member {member} at {address:?} cannot be reached: {reason}")]
pub(crate) struct NoAnswer {
    pub(crate) member: u64,
    pub(crate) address: String,
    pub(crate) reason: &'static str,
}

/// Carries one request to a member and its answer back.
pub(crate) trait Transport: Send + Sync + 'static {
    fn call<'a>(
        &'a self,
        member: u64,
        address: &'a str,
        call: Call,
        request: Vec<u8>,
        within: Duration,
    ) -> BoxFuture<'a, Result<Vec<u8>, NoAnswer>>;
}

/// The transport of a member that has no way to others.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unconnected;

impl Transport for Unconnected {
    fn call<'a>(
        &'a self,
        member: u64,
        address: &'a str,
        _call: Call,
        _request: Vec<u8>,
        _within: Duration,
    ) -> BoxFuture<'a, Result<Vec<u8>, NoAnswer>> {
        let reason = "this member has no transport";
        Box::pin(async move {
            Err(NoAnswer {
                member,
                address: address.to_owned(),
                reason,
            })
        })
    }
}

/// Makes a [`Peer`] for each other member.
#[derive(Clone)]
pub(crate) struct Network(Arc<dyn Transport>);

impl Network {
    pub(crate) fn new(transport: impl Transport) -> Self {
        Self(Arc::new(transport))
    }
}

impl RaftNetworkFactory<Types> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Peer {
        Peer {
            member: target,
            address: node.addr.clone(),
            transport: self.0.clone(),
        }
    }
}

/// The Raft library's view of one other member.
pub(crate) struct Peer {
    member: u64,
    address: String,
    transport: Arc<dyn Transport>,
}

impl Peer {
    async fn call<Q: Serialize, A: DeserializeOwned>(
        &self,
        call: Call,
        request: &Q,
        option: &RPCOption,
    ) -> Result<A, RPCError<Types>> {
        let request =
            postcard::to_stdvec(request).map_err(|error| RPCError::Network(NetworkError::new(&error)))?;
        let answer = self
            .transport
            .call(self.member, &self.address, call, request, option.soft_ttl())
            .await;
        let answer = answer.map_err(|error| RPCError::Unreachable(Unreachable::new(&error)))?;
        postcard::from_bytes(&answer).map_err(|error| RPCError::Network(NetworkError::new(&error)))
    }
}

impl RaftNetworkV2<Types> for Peer {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<Types>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, RPCError<Types>> {
        self.call(Call::Append, &rpc, &option).await
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        self.call(Call::Vote, &rpc, &option).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        self.call(Call::PreVote, &rpc, &option).await
    }

    async fn full_snapshot(
        &mut self,
        _vote: RaftVote,
        _snapshot: SnapshotOf<Types, SnapshotData>,
        _cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        // A snapshot is streamed rather than called; a transport that can stream brings that way with it.
        let reason = "its transport carries no snapshots";
        let error = NoAnswer {
            member: self.member,
            address: self.address.clone(),
            reason,
        };
        Err(StreamingError::Unreachable(Unreachable::new(&error)))
    }
}
