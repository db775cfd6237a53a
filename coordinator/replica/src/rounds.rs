//! Barriers for reads, shared: one round of asking the other members serves all reads that wait for one.
//!
//! While a round is under way, those who come wait for the next one, which begins after they came.

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use std::sync::{Arc, Mutex, PoisonError};

use crate::Replica;
use crate::error::Error;

type Round = Shared<BoxFuture<'static, Result<(), Arc<Error>>>>;

/// The round that has not begun, and whose turn it is.
#[derive(Debug, Default)]
pub(crate) struct Rounds {
    next: Mutex<Option<Round>>,
    turn: tokio::sync::Mutex<()>,
}

impl Rounds {
    fn next(&self) -> std::sync::MutexGuard<'_, Option<Round>> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Replica {
    /// Waits for a round that begins after this call.
    pub(crate) async fn next_round(&self) -> Result<(), Error> {
        let round = {
            let mut next = self.0.rounds.next();
            next.get_or_insert_with(|| self.round()).clone()
        };
        round.await.map_err(|error| match &*error {
            Error::NotLeader { leader } => Error::NotLeader { leader: *leader },
            Error::Timeout => Error::Timeout,
            Error::Stopped => Error::Stopped,
            other => Error::Failed(other.to_string()),
        })
    }

    fn round(&self) -> Round {
        // Weak: a round that nobody waits for any more must not keep the replica.
        let inner = Arc::downgrade(&self.0);
        let round = async move {
            let replica = Self(inner.upgrade().ok_or(Error::Stopped)?);
            let _turn = replica.0.rounds.turn.lock().await;
            replica.0.rounds.next().take();
            Ok(replica.barrier().await?)
        };
        round.boxed().shared()
    }
}
