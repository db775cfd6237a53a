//! The asking side of the signer: one request at a time over a datagram socket, asked again when no answer
//! comes, because the signer may just be restarting. The supervisor keeps both ends of the pair open, so a
//! request that the old signer did not read is answered by the new one.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt};
use protocol::hotkey::Hotkey;
use protocol::signing::Headers;
use tokio::net::UnixDatagram;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::wire::{Answer, Ask, DATAGRAM_BYTES_MAX, KindCount, decode, encode};
use super::{Error, MessageKind, PLAINTEXT_BYTES_MAX, Result, SealedKind, Sign};

/// How long to wait for the signer.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For one answer, before the request is sent again.
    pub one_try: Duration,
    /// In all, waiting for other requests included.
    pub in_all: Duration,
}

impl Default for Patience {
    /// A signature takes less than a millisecond; a restart of the signer takes well below a second.
    fn default() -> Self {
        Self {
            one_try: Duration::from_millis(500),
            in_all: Duration::from_secs(5),
        }
    }
}

/// Asks the signer process.
#[derive(Debug)]
pub struct SignerClient {
    socket: Mutex<UnixDatagram>,
    next_id: AtomicU64,
    hotkey: Hotkey,
    patience: Patience,
}

impl SignerClient {
    /// Takes our end of the socket pair and asks for the hotkey. `first_id` starts the numbering of
    /// requests; a random one keeps late answers to a former process apart from ours.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the socket is unusable or no signer answers.
    pub async fn connect(fd: OwnedFd, first_id: u64, patience: Patience) -> Result<Self> {
        let usable = |e: std::io::Error| Error::Unavailable(e.to_string());
        let socket = std::os::unix::net::UnixDatagram::from(fd);
        socket.set_nonblocking(true).map_err(usable)?;
        let socket = UnixDatagram::from_std(socket).map_err(usable)?;
        let mut client = Self {
            socket: Mutex::new(socket),
            next_id: AtomicU64::new(first_id),
            // Replaced below; the zero key signs nothing.
            hotkey: Hotkey::from_public_key(&[0; 32]),
            patience,
        };
        match client.ask(&Ask::Hotkey).await? {
            Answer::Hotkey(text) => client.hotkey = Hotkey::parse(&text).map_err(|_| Error::Malformed)?,
            other => return Err(unexpected(other, "hotkey")),
        }
        Ok(client)
    }

    /// How much the signer has signed and refused since it started.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn counts(&self) -> Result<Vec<KindCount>> {
        match self.ask(&Ask::Counts).await? {
            Answer::Counts(counts) => Ok(counts),
            other => Err(unexpected(other, "counts")),
        }
    }

    async fn ask(&self, ask: &Ask) -> Result<Answer> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let request = encode(id, ask)?;
        let deadline = Instant::now() + self.patience.in_all;
        let give_up = |why: &str| Error::Unavailable(format!("{why}, {:?} waited", self.patience.in_all));
        // One at a time: if this future is dropped half-way, the answer is skipped by its id later.
        let socket = timeout_at(deadline, self.socket.lock())
            .await
            .map_err(|_| give_up("other requests wait before this one"))?;
        let mut why = "no answer".to_owned();
        while Instant::now() < deadline {
            let one_try = self.patience.one_try.min(deadline - Instant::now());
            match timeout(one_try, exchange(&socket, id, &request)).await {
                Ok(Ok(answer)) => return Ok(answer),
                // The other end is closed for the moment: nobody holds it, or it is being replaced.
                Ok(Err(error)) => {
                    why = error.to_string();
                    sleep(one_try.min(Duration::from_millis(50))).await;
                }
                Err(_) => {}
            }
        }
        Err(give_up(&why))
    }

    async fn bytes(&self, ask: Ask, kind: SealedKind) -> Result<Vec<u8>> {
        match self.ask(&ask).await? {
            Answer::Bytes(bytes) => Ok(bytes),
            other => Err(unexpected(other, kind.label())),
        }
    }
}

async fn exchange(socket: &UnixDatagram, id: u64, request: &[u8]) -> std::io::Result<Answer> {
    socket.send(request).await?;
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        let length = socket.recv(&mut buffer).await?;
        match decode::<Answer>(&buffer[..length]) {
            Ok((answered, answer)) if answered == id => return Ok(answer),
            // An answer to a request that was given up, or was sent twice.
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "unreadable answer from the signer"),
        }
    }
}

fn unexpected(answer: Answer, kind: &'static str) -> Error {
    match answer {
        Answer::Refused(why) => Error::Refused(why),
        Answer::Limited(kind) => Error::Limited(kind),
        Answer::NotOpened => Error::NotOpened(kind),
        Answer::TooLong(length) => Error::TooLong(usize::try_from(length).unwrap_or(usize::MAX)),
        Answer::Hotkey(_) | Answer::Signed(_) | Answer::Bytes(_) | Answer::Counts(_) => Error::Malformed,
    }
}

impl Sign for SignerClient {
    fn hotkey(&self) -> &Hotkey {
        &self.hotkey
    }

    fn to_validator(&self, kind: MessageKind) -> BoxFuture<'_, Result<Headers>> {
        async move {
            match self.ask(&Ask::Sign(kind)).await? {
                Answer::Signed(signed) => Ok(signed.headers(&kind, &self.hotkey)),
                other => Err(unexpected(other, kind.label())),
            }
        }
        .boxed()
    }

    fn seal<'a>(&'a self, kind: SealedKind, plaintext: &'a [u8]) -> BoxFuture<'a, Result<Vec<u8>>> {
        async move {
            if plaintext.len() > PLAINTEXT_BYTES_MAX {
                return Err(Error::TooLong(plaintext.len()));
            }
            self.bytes(Ask::Seal(kind, plaintext.to_vec()), kind).await
        }
        .boxed()
    }

    fn unseal<'a>(&'a self, kind: SealedKind, sealed: &'a [u8]) -> BoxFuture<'a, Result<Vec<u8>>> {
        async move { self.bytes(Ask::Unseal(kind, sealed.to_vec()), kind).await }.boxed()
    }
}
