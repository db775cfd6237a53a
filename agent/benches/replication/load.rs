//! The load generator: clients that each write, wait for the answer, and write again, over one kept connection.
//! The same code for both systems; only the bytes of a request differ. It shares the cores with what it measures, so it
//! does little itself.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use futures_util::future::try_join_all;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// Bytes of key and value, or of the ban's chute and reason, before they are put into JSON.
pub(crate) const COMMAND_BYTES: usize = 300;
/// A server that has just closed as many connections may still be at it.
const CONNECT_TRIES: u32 = 20;

/// What a system's clients send.
pub(crate) trait Requests {
    /// Where to.
    fn address(&self) -> SocketAddr;
    /// What opens a connection, if anything must. `signed`: each request will be signed by itself.
    fn open(&self, signed: bool) -> Option<Vec<u8>>;
    /// The `number`-th write (from 1) of a client on its connection.
    fn write(&self, client: usize, number: u64, signed: bool) -> Vec<u8>;
}

/// A text that differs for each write, and brings `beside` up to [`COMMAND_BYTES`].
pub(crate) fn value(client: usize, number: u64, beside: usize) -> String {
    let start = format!("{client} {number} ");
    let missing = COMMAND_BYTES.saturating_sub(start.len() + beside);
    start + &"x".repeat(missing)
}

/// What clients wrote.
pub(crate) struct Written {
    pub(crate) took: Duration,
    /// Of each write, ascending.
    pub(crate) latencies: Vec<Duration>,
}

impl Written {
    pub(crate) fn percentile(&self, share: f64) -> Duration {
        let place = (self.latencies.len() as f64 * share) as usize;
        let last = self.latencies.len().saturating_sub(1);
        self.latencies.get(place.min(last)).copied().unwrap_or_default()
    }
}

/// Clients with open connections.
pub(crate) struct Load<'a> {
    requests: &'a dyn Requests,
    signed: bool,
    clients: Vec<Client>,
}

impl<'a> Load<'a> {
    pub(crate) async fn connect(
        requests: &'a dyn Requests,
        count: usize,
        signed: bool,
    ) -> anyhow::Result<Self> {
        let opening = (0..count).map(|number| Client::connect(requests, number, signed));
        let clients = try_join_all(opening).await?;
        Ok(Self {
            requests,
            signed,
            clients,
        })
    }

    /// Writes for so long; each write is waited for, and one that is refused is an error.
    pub(crate) async fn run(&mut self, time: Duration) -> anyhow::Result<Written> {
        let began = Instant::now();
        let until = began + time;
        let (requests, signed) = (self.requests, self.signed);
        let writing = self
            .clients
            .iter_mut()
            .map(|client| client.write_until(requests, signed, until));
        let mut latencies = try_join_all(writing).await?.concat();
        let took = began.elapsed();
        latencies.sort_unstable();
        anyhow::ensure!(!latencies.is_empty(), "nothing was written");
        Ok(Written { took, latencies })
    }
}

struct Client {
    number: usize,
    written: u64,
    stream: TcpStream,
    received: Vec<u8>,
}

impl Client {
    async fn connect(requests: &dyn Requests, number: usize, signed: bool) -> anyhow::Result<Self> {
        let mut tries = 0;
        loop {
            let error = match Self::try_connect(requests, number, signed).await {
                Ok(client) => return Ok(client),
                Err(error) => error,
            };
            tries += 1;
            if tries >= CONNECT_TRIES {
                return Err(error.context(format!("client {number} does not get in")));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn try_connect(requests: &dyn Requests, number: usize, signed: bool) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(requests.address()).await?;
        stream.set_nodelay(true)?;
        let mut client = Self {
            number,
            written: 0,
            stream,
            received: Vec::new(),
        };
        // A server that is full closes the connection only after it has accepted it: an answer shows that it did not.
        let first = requests.open(signed).unwrap_or_else(|| {
            client.written = 1;
            requests.write(number, 1, signed)
        });
        client.exchange(&first).await?;
        Ok(client)
    }

    async fn write_until(
        &mut self,
        requests: &dyn Requests,
        signed: bool,
        until: Instant,
    ) -> anyhow::Result<Vec<Duration>> {
        let mut latencies = Vec::new();
        while Instant::now() < until {
            self.written += 1;
            let request = requests.write(self.number, self.written, signed);
            let began = Instant::now();
            self.exchange(&request).await?;
            latencies.push(began.elapsed());
        }
        Ok(latencies)
    }

    async fn exchange(&mut self, request: &[u8]) -> anyhow::Result<()> {
        self.stream.write_all(request).await?;
        self.received.clear();
        loop {
            let read = self.stream.read_buf(&mut self.received).await?;
            anyhow::ensure!(read > 0, "the connection was closed");
            if is_whole(&self.received)? {
                return Ok(());
            }
        }
    }
}

/// Whether a whole answer has arrived; an error if it is no success.
fn is_whole(received: &[u8]) -> anyhow::Result<bool> {
    let Some(end) = received.windows(4).position(|four| four == b"\r\n\r\n") else {
        return Ok(false);
    };
    let head = std::str::from_utf8(&received[..end])?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length")
            .then(|| value.trim().parse().ok())?
    });
    let length: usize = length.with_context(|| format!("an answer without a length: {head}"))?;
    if received.len() < end + 4 + length {
        return Ok(false);
    }
    let is_well = head.starts_with("HTTP/1.1 200");
    anyhow::ensure!(is_well, "refused: {}", String::from_utf8_lossy(received));
    Ok(true)
}
