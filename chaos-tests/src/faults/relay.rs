//! A UDP relay between one address and another whose two directions can be made bad.
//!
//! Every client gets a socket of its own towards the target, so that answers find their way back. Datagrams wait
//! in memory for as long as they are delayed; how many is bounded, as in a real router.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::{CancellationToken, DropGuard};

/// The longest datagram of UDP.
const DATAGRAM_BYTES_MAX: usize = 65_536;
/// Datagrams that may wait in one direction of one client; more are lost.
const WAITING_MAX: usize = 4_096;
/// Clients at once; datagrams of others are lost.
const CLIENTS_MAX: usize = 1_024;

/// Which way a datagram goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From a client to the target.
    There,
    /// From the target to a client.
    Back,
}

/// What becomes of datagrams in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Quality {
    /// Each waits so long.
    pub delay: Duration,
    /// And up to this much longer; order may change then.
    pub jitter: Duration,
    /// Which part of them is lost, from 0 to 1.
    pub loss: f64,
    /// All are lost.
    pub cut: bool,
}

impl Quality {
    /// Nothing arrives.
    pub const CUT: Self = Self {
        delay: Duration::ZERO,
        jitter: Duration::ZERO,
        loss: 0.0,
        cut: true,
    };
}

/// How many datagrams there were.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Passed on.
    pub passed: u64,
    /// Lost on purpose.
    pub lost: u64,
}

/// A running relay; it ends when dropped.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    shared: Arc<Shared>,
    _stop: DropGuard,
}

#[derive(Debug)]
struct Shared {
    target: SocketAddr,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    there: Quality,
    back: Quality,
    /// Of clients at these addresses, instead: there, back.
    special: BTreeMap<IpAddr, (Quality, Quality)>,
    random: fastrand::Rng,
    counts: Counts,
    /// How often the ports towards the target were changed.
    changes: u64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When a datagram arrives; never if it is lost.
    fn fate(&self, client: IpAddr, direction: Direction) -> Option<Instant> {
        let mut inner = self.lock();
        let (there, back) = inner
            .special
            .get(&client)
            .copied()
            .unwrap_or((inner.there, inner.back));
        let quality = match direction {
            Direction::There => there,
            Direction::Back => back,
        };
        if quality.cut || inner.random.f64() < quality.loss {
            inner.counts.lost += 1;
            return None;
        }
        inner.counts.passed += 1;
        let more = quality.jitter.mul_f64(inner.random.f64());
        Some(Instant::now() + quality.delay + more)
    }
}

impl Relay {
    /// Listens on a free port of the target's kind of loopback address. `seed` decides what is lost.
    ///
    /// # Errors
    /// When no socket can be had.
    pub async fn start(target: SocketAddr, seed: u64) -> anyhow::Result<Self> {
        let any = SocketAddr::new(target.ip(), 0);
        let socket = UdpSocket::bind(any).await.context("listen for the relay")?;
        let address = socket.local_addr()?;
        let shared = Arc::new(Shared {
            target,
            inner: Mutex::new(Inner {
                there: Quality::default(),
                back: Quality::default(),
                special: BTreeMap::new(),
                random: fastrand::Rng::with_seed(seed),
                counts: Counts::default(),
                changes: 0,
            }),
        });
        let stop = CancellationToken::new();
        let (relaying, stopped) = (relay(Arc::new(socket), Arc::clone(&shared)), stop.clone());
        tokio::spawn(async move { stopped.run_until_cancelled(relaying).await });
        Ok(Self {
            address,
            shared,
            _stop: stop.drop_guard(),
        })
    }

    /// Where clients send to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes one direction, for datagrams that come from now on.
    pub fn set(&self, direction: Direction, quality: Quality) {
        let mut inner = self.shared.lock();
        match direction {
            Direction::There => inner.there = quality,
            Direction::Back => inner.back = quality,
        }
    }

    /// Changes both directions.
    pub fn set_both(&self, quality: Quality) {
        self.set(Direction::There, quality);
        self.set(Direction::Back, quality);
    }

    /// Changes one direction for clients at one address, whatever holds for all others.
    pub fn set_for(&self, client: IpAddr, direction: Direction, quality: Quality) {
        let mut inner = self.shared.lock();
        let all = (inner.there, inner.back);
        let (there, back) = inner.special.entry(client).or_insert(all);
        match direction {
            Direction::There => *there = quality,
            Direction::Back => *back = quality,
        }
    }

    /// Everything passes at once from now on, for all clients.
    pub fn heal(&self) {
        self.shared.lock().special.clear();
        self.set_both(Quality::default());
    }

    /// The target sees each client at another port from the client's next datagram on, as behind a NAT that has forgotten
    /// it; what is sent to the old ones is lost.
    pub fn change_ports(&self) {
        self.shared.lock().changes += 1;
    }

    /// How many there were so far, both ways together.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.shared.lock().counts
    }
}

type Datagram = (Instant, Vec<u8>);

async fn relay(door: Arc<UdpSocket>, shared: Arc<Shared>) {
    let mut clients: BTreeMap<SocketAddr, mpsc::Sender<Datagram>> = BTreeMap::new();
    let mut tasks = JoinSet::new();
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    let mut changes = 0;
    loop {
        // An error is the last datagram's, sent to a closed port.
        let Ok((bytes, client)) = door.recv_from(&mut buffer).await else {
            continue;
        };
        let changes_now = shared.lock().changes;
        if std::mem::replace(&mut changes, changes_now) != changes_now {
            clients.clear();
            tasks.abort_all();
        }
        if !clients.contains_key(&client) && clients.len() < CLIENTS_MAX {
            let Ok(upstream) = upstream(shared.target).await else {
                continue;
            };
            let upstream = Arc::new(upstream);
            let (there, waiting_there) = mpsc::channel(WAITING_MAX);
            let (back, waiting_back) = mpsc::channel(WAITING_MAX);
            let to_target = Arc::clone(&upstream);
            tasks.spawn(deliver(waiting_there, move |bytes: &[u8]| {
                let _ = to_target.try_send(bytes);
            }));
            let to_client = Arc::clone(&door);
            tasks.spawn(deliver(waiting_back, move |bytes: &[u8]| {
                let _ = to_client.try_send_to(bytes, client);
            }));
            tasks.spawn(take_back(upstream, client.ip(), back, Arc::clone(&shared)));
            clients.insert(client, there);
        }
        if let (Some(there), Some(at)) = (clients.get(&client), shared.fate(client.ip(), Direction::There)) {
            // A full queue loses it.
            let _ = there.try_send((at, buffer[..bytes].to_vec()));
        }
    }
}

async fn upstream(target: SocketAddr) -> std::io::Result<UdpSocket> {
    let socket = UdpSocket::bind(SocketAddr::new(target.ip(), 0)).await?;
    socket.connect(target).await?;
    Ok(socket)
}

async fn take_back(
    upstream: Arc<UdpSocket>,
    client: IpAddr,
    back: mpsc::Sender<Datagram>,
    shared: Arc<Shared>,
) {
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        // A target that does not listen answers with an error; it may listen later.
        let Ok(bytes) = upstream.recv(&mut buffer).await else {
            continue;
        };
        if let Some(at) = shared.fate(client, Direction::Back)
            && let Err(mpsc::error::TrySendError::Closed(_)) = back.try_send((at, buffer[..bytes].to_vec()))
        {
            return;
        }
    }
}

/// Passes datagrams on when their time has come, the earliest first.
async fn deliver(mut queue: mpsc::Receiver<Datagram>, pass_on: impl Fn(&[u8])) {
    let mut waiting: BTreeMap<(Instant, u64), Vec<u8>> = BTreeMap::new();
    let mut number = 0;
    loop {
        let next = waiting.first_key_value().map(|((at, _), _)| *at);
        let due = async {
            match next {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = due => {
                if let Some((_, bytes)) = waiting.pop_first() {
                    pass_on(&bytes);
                }
            }
            datagram = queue.recv(), if waiting.len() < WAITING_MAX => {
                let Some((at, bytes)) = datagram else { return };
                number += 1;
                waiting.insert((at, number), bytes);
            }
        }
    }
}
