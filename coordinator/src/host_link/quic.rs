//! The host link over QUIC with mutual TLS: one connection, one bidirectional stream, frames of
//! `protocol::link`.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use protocol::id::ServerId;
use protocol::link::{Decoder, FromHost, MESSAGE_BYTES_MAX, ToHost, encode};
use protocol::logs::{HostAnswer, HostQuestion};
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::AskHost;
use super::session::{self, Context};

/// Messages that may wait in either direction.
const QUEUE: usize = 16;
/// Silence after which a member takes a connection for dead.
const IDLE_TIMEOUT: Duration = Duration::from_millis(1200);
/// Silence after which a host takes its member for dead, and both the connection: counted from when it said that it is
/// there, so that it is with another member within a second. Longer where the way is longer: QUIC waits three of its own
/// timeouts at least.
const HOST_IDLE_TIMEOUT: Duration = Duration::from_millis(500);
/// How often a host says that it is there; the member's answer to that is enough for both sides.
pub const KEEP_ALIVE: Duration = Duration::from_millis(250);

/// Transport settings of a door.
///
/// # Panics
/// Never: the timeout fits.
#[must_use]
pub fn transport() -> quinn::TransportConfig {
    let mut transport = quinn::TransportConfig::default();
    transport.max_idle_timeout(Some(IDLE_TIMEOUT.try_into().expect("it fits")));
    transport.max_concurrent_bidi_streams(1_u8.into());
    transport.max_concurrent_uni_streams(0_u8.into());
    transport
}

/// Transport settings of a host, which keeps the link alive. It opens the stream of messages; the member opens one for
/// each question, `questions` at a time.
///
/// # Panics
/// Never: the timeout fits.
#[must_use]
pub fn host_transport(questions: u32) -> quinn::TransportConfig {
    let mut transport = transport();
    transport.max_idle_timeout(Some(HOST_IDLE_TIMEOUT.try_into().expect("it fits")));
    transport.keep_alive_interval(Some(KEEP_ALIVE));
    transport.max_concurrent_bidi_streams(questions.into());
    transport
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Serves the host that a connection's certificate names, until either side ends.
///
/// # Errors
/// Why it ended: there is no other way out.
pub async fn serve(connection: &Connection, server: ServerId, context: Context) -> Result<(), Failure> {
    let way = Some(Arc::new(Way(connection.clone())) as _);
    let context = Context { way, ..context };
    let (send, receive) = connection.accept_bi().await?;
    let (from_host, incoming) = mpsc::channel(QUEUE);
    let (outgoing, to_host) = mpsc::channel(QUEUE);
    let end = tokio::select! {
        end = session::serve(context, |claimed: &ServerId| *claimed == server, incoming, outgoing) => {
            end.map_err(Into::into)
        }
        end = read(receive, from_host) => end,
        end = write(send, to_host) => end,
    };
    let reason = match &end {
        Ok(()) => "session ended".to_owned(),
        Err(error) => error.to_string(),
    };
    connection.close(0_u8.into(), reason.as_bytes());
    end
}

/// The connection of a host as the way to ask it: each question has a stream of its own.
#[derive(Debug, Clone)]
struct Way(Connection);

impl AskHost for Way {
    fn ask(
        &self,
        question: HostQuestion,
        within: Duration,
    ) -> BoxFuture<'static, Result<HostAnswer, String>> {
        let connection = self.0.clone();
        let ask = async move {
            let (mut send, mut receive) = connection.open_bi().await?;
            send.write_all(&encode(&question)?).await?;
            send.finish()?;
            let mut decoder = Decoder::default();
            decoder.push(&receive.read_to_end(MESSAGE_BYTES_MAX).await?);
            decoder
                .take_next()?
                .ok_or_else(|| Failure::from("its answer is cut off"))
        };
        Box::pin(async move {
            match timeout(within, ask).await {
                Ok(answer) => answer.map_err(|error| format!("the host did not answer: {error}")),
                Err(_) => Err(
                    "the host did not answer in time: its agent may be too old to know the question"
                        .to_owned(),
                ),
            }
        })
    }
}

async fn read(mut stream: RecvStream, messages: mpsc::Sender<FromHost>) -> Result<(), Failure> {
    let mut decoder = Decoder::default();
    while let Some(chunk) = stream.read_chunk(64 * 1024, true).await? {
        decoder.push(&chunk.bytes);
        while let Some(message) = decoder.take_next()? {
            messages.send(message).await?;
        }
    }
    Ok(())
}

async fn write(mut stream: SendStream, mut messages: mpsc::Receiver<ToHost>) -> Result<(), Failure> {
    while let Some(message) = messages.recv().await {
        stream.write_all(&encode(&message)?).await?;
    }
    Ok(())
}
