//! Response bodies: streamed from the upstream (checked against a digest or not), read from a blob that is
//! stored or still arriving, or whole in memory.
//!
//! A checked body holds its newest piece back until the next one has come, so that a client never has the
//! whole of a body whose digest is wrong: the connection is cut before the last piece.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::{Instant, Sleep};

use crate::registry::digest::Verifier;
use crate::registry::metrics::Metrics;

/// Why a body broke off. The client sees a cut connection.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The upstream's connection failed.
    #[error("receive from the upstream: {0}")]
    Upstream(#[from] hyper::Error),
    /// Nothing came for too long.
    #[error("the upstream sent nothing for {0:?}")]
    Idle(Duration),
    /// The bytes are not what was asked for.
    #[error("the upstream's bytes do not have the digest asked for")]
    Mismatch,
    /// The blob store could not deliver.
    #[error("read from the blob store: {0}")]
    Store(String),
}

/// A body received from an upstream, with a limit on silence.
#[derive(Debug)]
pub struct UpstreamBody {
    incoming: Incoming,
    idle_timeout: Duration,
    timer: Pin<Box<Sleep>>,
    waiting: bool,
    metrics: Arc<Metrics>,
}

impl UpstreamBody {
    /// Wraps what hyper received.
    #[must_use]
    pub fn new(incoming: Incoming, idle_timeout: Duration, metrics: Arc<Metrics>) -> Self {
        let timer = Box::pin(tokio::time::sleep(idle_timeout));
        Self {
            incoming,
            idle_timeout,
            timer,
            waiting: false,
            metrics,
        }
    }

    /// The next piece; trailers are dropped.
    pub fn poll_bytes(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BodyError>>> {
        loop {
            match Pin::new(&mut self.incoming).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    self.waiting = false;
                    if let Ok(bytes) = frame.into_data() {
                        self.metrics.upstream_bytes.inc_by(bytes.len() as u64);
                        return Poll::Ready(Some(Ok(bytes)));
                    }
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error.into()))),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => {
                    // The timer is touched only when there is nothing to do anyway.
                    if !self.waiting {
                        self.waiting = true;
                        self.timer.as_mut().reset(Instant::now() + self.idle_timeout);
                    }
                    ready!(self.timer.as_mut().poll(cx));
                    return Poll::Ready(Some(Err(BodyError::Idle(self.idle_timeout))));
                }
            }
        }
    }

    /// The next piece, or `None` at the end.
    ///
    /// # Errors
    /// [`BodyError::Upstream`] or [`BodyError::Idle`].
    pub async fn next(&mut self) -> Option<Result<Bytes, BodyError>> {
        std::future::poll_fn(|cx| self.poll_bytes(cx)).await
    }

    /// The length that the upstream announced, in bytes.
    #[must_use]
    pub fn announced_bytes(&self) -> Option<u64> {
        self.incoming.size_hint().exact()
    }
}

/// The body of every response of the registry door.
#[derive(Debug)]
pub enum ResponseBody {
    /// Whole in memory.
    Full(Full<Bytes>, Arc<Metrics>),
    /// Passed on as it comes.
    Passing(UpstreamBody),
    /// Passed on as it comes, its last piece only once the digest is right.
    Checked {
        /// Where it comes from.
        upstream: UpstreamBody,
        /// `None` once it has spoken.
        verifier: Option<Box<Verifier>>,
        /// The piece held back.
        held: Option<Bytes>,
    },
    /// Pieces that a reader thread of the store sends.
    Stored {
        /// From the reader.
        pieces: mpsc::Receiver<Result<Bytes, BodyError>>,
        /// What is still to come, in bytes.
        remaining: u64,
        /// Frees the reader's place when the body is dropped.
        permit: OwnedSemaphorePermit,
        /// Counts what is sent.
        metrics: Arc<Metrics>,
    },
}

impl ResponseBody {
    /// A body that is whole in memory.
    #[must_use]
    pub fn full(bytes: impl Into<Bytes>, metrics: &Arc<Metrics>) -> Self {
        Self::Full(Full::new(bytes.into()), Arc::clone(metrics))
    }

    fn poll_bytes(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BodyError>>> {
        match self {
            Self::Full(full, _) => {
                let frame = ready!(Pin::new(full).poll_frame(cx));
                Poll::Ready(frame.and_then(|frame: Result<_, Infallible>| match frame {
                    Ok(frame) => frame.into_data().ok().map(Ok),
                    Err(never) => match never {},
                }))
            }
            Self::Passing(upstream) => upstream.poll_bytes(cx),
            Self::Checked {
                upstream,
                verifier,
                held,
            } => loop {
                match ready!(upstream.poll_bytes(cx)) {
                    Some(Ok(bytes)) => {
                        if bytes.is_empty() {
                            continue;
                        }
                        if let Some(verifier) = verifier {
                            verifier.update(&bytes);
                        }
                        if let Some(previous) = held.replace(bytes) {
                            return Poll::Ready(Some(Ok(previous)));
                        }
                    }
                    Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                    None => {
                        let Some(verifier) = verifier.take() else {
                            return Poll::Ready(None);
                        };
                        if !verifier.matches() {
                            upstream.metrics.digest_mismatches.inc();
                            tracing::warn!("a body without the digest asked for was cut off");
                            held.take();
                            return Poll::Ready(Some(Err(BodyError::Mismatch)));
                        }
                        return Poll::Ready(held.take().map(Ok));
                    }
                }
            },
            Self::Stored {
                pieces, remaining, ..
            } => {
                let piece = ready!(pieces.poll_recv(cx));
                if let Some(Ok(bytes)) = &piece {
                    *remaining = remaining.saturating_sub(bytes.len() as u64);
                }
                Poll::Ready(piece)
            }
        }
    }

    fn metrics(&self) -> &Metrics {
        match self {
            Self::Full(_, metrics) | Self::Stored { metrics, .. } => metrics,
            Self::Passing(upstream) | Self::Checked { upstream, .. } => &upstream.metrics,
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let piece = ready!(self.poll_bytes(cx));
        if let Some(Ok(bytes)) = &piece {
            self.metrics().client_bytes.inc_by(bytes.len() as u64);
        }
        Poll::Ready(piece.map(|bytes| bytes.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(full, _) => full.is_end_stream(),
            Self::Passing(upstream) => upstream.incoming.is_end_stream(),
            Self::Checked { verifier, held, .. } => verifier.is_none() && held.is_none(),
            Self::Stored { remaining, .. } => *remaining == 0,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(full, _) => full.size_hint(),
            Self::Passing(upstream) => upstream.incoming.size_hint(),
            Self::Checked { upstream, held, .. } => {
                let held = held.as_ref().map_or(0, |bytes| bytes.len() as u64);
                upstream
                    .announced_bytes()
                    .map_or_else(SizeHint::default, |left| SizeHint::with_exact(left + held))
            }
            Self::Stored { remaining, .. } => SizeHint::with_exact(*remaining),
        }
    }
}
