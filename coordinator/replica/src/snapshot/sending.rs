//! Brings a snapshot to another member, piece by piece. The receiver says how far it has come, so a piece
//! that was lost, or a connection, costs that piece and not the snapshot.

use openraft::type_config::alias::SnapshotOf;
use std::io;
use std::time::Duration;
use tokio::time::{Instant, sleep};

use super::SnapshotData;
use crate::raft::{RaftVote, Types};
use crate::transport::{CallError, Peer};
use crate::wire::{Answer, Ballot, Bytes, CHUNK_BYTES, Chunk, Request, SnapshotName, position};

/// A piece without an answer for this long has failed.
const PIECE_MAX: Duration = Duration::from_secs(10);
/// Between questions whether the receiver has installed the snapshot.
const INSTALLED_EVERY: Duration = Duration::from_millis(20);
/// How long a receiver may take to install it.
const INSTALL_MAX: Duration = Duration::from_secs(600);

/// Why a snapshot did not get there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("read the snapshot: {0}")]
    Read(#[from] io::Error),
}

/// Sends what the receiver lacks and waits until it has installed all of it. Returns the receiver's vote,
/// which is higher than ours when it follows another leader by now.
pub(crate) async fn send(
    peer: &Peer,
    vote: &RaftVote,
    snapshot: &SnapshotOf<Types, SnapshotData>,
) -> Result<RaftVote, Error> {
    let data = &snapshot.snapshot;
    let (size_bytes, crc) = data.size_and_crc()?;
    let name = SnapshotName {
        last: position(snapshot.meta.last_log_id.as_ref()),
        size_bytes,
        crc,
    };
    let (mut offset, mut bytes) = (0, Vec::new());
    let mut complete_since = None;
    loop {
        let chunk = Chunk {
            ballot: Ballot::from(vote),
            name,
            offset,
            bytes: Bytes(bytes),
        };
        match peer.ask(&Request::Snapshot(chunk), PIECE_MAX).await? {
            Answer::SnapshotInstalled { ballot } | Answer::HigherBallot(ballot) => return Ok(ballot.into()),
            Answer::SnapshotAt { offset: reached } if reached <= size_bytes => offset = reached,
            _ => return Err(peer.unexpected().into()),
        }
        bytes = Vec::new();
        if offset == size_bytes {
            let since = *complete_since.get_or_insert_with(Instant::now);
            if since.elapsed() > INSTALL_MAX {
                return Err(peer.unexpected().into());
            }
            sleep(INSTALLED_EVERY).await;
        } else {
            let data = data.clone();
            let read = peer
                .writer()
                .blocking(move || data.read_at(offset, CHUNK_BYTES))
                .await;
            bytes = read.map_err(io::Error::from)??;
        }
    }
}
