//! Moves bytes between two connections until both sides have ended, with limits on silence.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

const BUFFER_BYTES: usize = 64 * 1024;

/// Limits of a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest time without a byte in either direction.
    pub idle: Duration,
    /// The same once one side has ended.
    pub half_closed: Duration,
}

/// Why a tunnel ended early.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing moved for too long.
    #[error("nothing moved for too long")]
    Idle,
    /// A side broke.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Runs the tunnel. `sent` and `received` count bytes, seen from the client.
///
/// # Errors
/// [`Error`]; the caller drops both connections either way.
pub async fn run(
    client: &mut TcpStream,
    server: &mut TcpStream,
    limits: Limits,
    sent: &Counter,
    received: &Counter,
) -> Result<(), Error> {
    let moved = AtomicU64::new(0);
    let ended = AtomicU64::new(0);
    let (mut client_read, mut client_write) = client.split();
    let (mut server_read, mut server_write) = server.split();
    let both = async {
        tokio::try_join!(
            pump(&mut client_read, &mut server_write, &moved, &ended, sent),
            pump(&mut server_read, &mut client_write, &moved, &ended, received),
        )
    };
    tokio::select! {
        result = both => result.map(|_| ()).map_err(Error::Io),
        () = silence(&moved, &ended, limits) => Err(Error::Idle),
    }
}

async fn pump(
    from: &mut ReadHalf<'_>,
    to: &mut WriteHalf<'_>,
    moved: &AtomicU64,
    ended: &AtomicU64,
    counter: &Counter,
) -> io::Result<()> {
    let mut buffer = Vec::new();
    loop {
        // An idle tunnel holds no buffer.
        from.readable().await?;
        buffer.reserve(BUFFER_BYTES);
        match from.try_read_buf(&mut buffer) {
            Ok(0) => break,
            Ok(read) => {
                to.write_all(&buffer).await?;
                buffer.clear();
                if read < BUFFER_BYTES / 4 {
                    buffer = Vec::new();
                }
                moved.fetch_add(read as u64, Ordering::Relaxed);
                counter.inc_by(read as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    ended.fetch_add(1, Ordering::Relaxed);
    to.shutdown().await
}

/// Ends when nothing moved during a whole limit. Looks a few times per limit instead of arming a timer per
/// piece.
async fn silence(moved: &AtomicU64, ended: &AtomicU64, limits: Limits) {
    const LOOKS: u32 = 4;
    let (mut last, mut silent_looks) = ((0, 0), 0);
    loop {
        let half_closed = ended.load(Ordering::Relaxed) > 0;
        let limit = if half_closed {
            limits.half_closed
        } else {
            limits.idle
        };
        tokio::time::sleep(limit / LOOKS).await;
        let now = (moved.load(Ordering::Relaxed), ended.load(Ordering::Relaxed));
        silent_looks = if now == last { silent_looks + 1 } else { 0 };
        last = now;
        if silent_looks >= LOOKS {
            return;
        }
    }
}
