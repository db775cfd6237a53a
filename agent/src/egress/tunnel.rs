//! Moves bytes between two connections until both sides have ended, with limits on silence.
//!
//! Short exchanges go through a buffer. A direction that has moved more than [`SPLICE_AFTER_BYTES`] goes on
//! through a pipe inside the kernel (`splice`), which copies nothing into this process.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

const BUFFER_BYTES: usize = 64 * 1024;
/// What a direction moves before a pipe is worth its two descriptors, in bytes.
const SPLICE_AFTER_BYTES: u64 = 256 * 1024;
/// What is asked of the kernel at once; a pipe takes less.
const SPLICE_BYTES: usize = 1 << 20;
/// Room of the pipe, if the kernel allows it.
const PIPE_BYTES: usize = 256 * 1024;

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
    let account = |bytes: u64| {
        moved.fetch_add(bytes, Ordering::Relaxed);
        counter.inc_by(bytes);
    };
    let is_over = copy(from, to, &account).await?;
    if !is_over {
        match pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC) {
            Ok(pipe) => splice_all(from.as_ref(), to.as_ref(), pipe, &account).await?,
            // No descriptor left: slower, but it goes on.
            Err(_) => while !copy(from, to, &account).await? {},
        }
    }
    ended.fetch_add(1, Ordering::Relaxed);
    to.shutdown().await
}

/// Copies through a buffer; true at the end, false when the direction has become worth a pipe.
async fn copy(from: &mut ReadHalf<'_>, to: &mut WriteHalf<'_>, account: &impl Fn(u64)) -> io::Result<bool> {
    let (mut buffer, mut copied) = (Vec::new(), 0);
    while copied < SPLICE_AFTER_BYTES {
        // An idle tunnel holds no buffer.
        from.readable().await?;
        buffer.reserve(BUFFER_BYTES);
        match from.try_read_buf(&mut buffer) {
            Ok(0) => return Ok(true),
            Ok(read) => {
                to.write_all(&buffer).await?;
                buffer.clear();
                if read < BUFFER_BYTES / 4 {
                    buffer = Vec::new();
                }
                copied += read as u64;
                account(read as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => buffer = Vec::new(),
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// Moves all the rest through a pipe. The pipe is empty whenever the source is asked, so a source that
/// would block is one without data.
async fn splice_all(
    from: &TcpStream,
    to: &TcpStream,
    (pipe_out, pipe_in): (OwnedFd, OwnedFd),
    account: &impl Fn(u64),
) -> io::Result<()> {
    // A smaller pipe works too.
    let _ = fcntl_setpipe_size(&pipe_in, PIPE_BYTES);
    let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
    loop {
        let taken = from
            .async_io(Interest::READABLE, || {
                Ok(splice(from, None, &pipe_in, None, SPLICE_BYTES, flags)?)
            })
            .await?;
        if taken == 0 {
            return Ok(());
        }
        let mut left = taken;
        while left > 0 {
            left -= to
                .async_io(Interest::WRITABLE, || {
                    Ok(splice(&pipe_out, None, to, None, left, flags)?)
                })
                .await?;
        }
        account(taken as u64);
    }
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
