//! A TCP relay that can be cut: nothing passes and nothing is closed, as with a network that is gone. It is between
//! a member and the validator, where no datagrams of ours go.

use std::net::SocketAddr;

use anyhow::Context;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};

const PIECE_BYTES: usize = 16 << 10;

/// A running gate; it ends when dropped.
#[derive(Debug)]
pub struct Gate {
    address: SocketAddr,
    is_cut: watch::Sender<bool>,
    _stop: DropGuard,
}

impl Gate {
    /// Listens on a free port of the target's address.
    ///
    /// # Errors
    /// When no socket can be had.
    pub async fn start(target: SocketAddr) -> anyhow::Result<Self> {
        Self::start_at(SocketAddr::new(target.ip(), 0), target).await
    }

    /// Listens there.
    ///
    /// # Errors
    /// When no socket can be had.
    pub async fn start_at(listen: SocketAddr, target: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(listen).await.context("listen for the gate")?;
        let address = listener.local_addr()?;
        let (is_cut, followed) = watch::channel(false);
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        tokio::spawn(async move {
            stopped
                .run_until_cancelled(serve(listener, target, followed))
                .await
        });
        Ok(Self {
            address,
            is_cut,
            _stop: stop.drop_guard(),
        })
    }

    /// Where clients connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether nothing passes from now on.
    pub fn cut(&self, is_cut: bool) {
        self.is_cut.send_replace(is_cut);
    }
}

async fn serve(listener: TcpListener, target: SocketAddr, is_cut: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => {
                if let Ok((client, _)) = accepted {
                    connections.spawn(pass(client, target, is_cut.clone()));
                }
            }
        }
    }
}

async fn pass(client: TcpStream, target: SocketAddr, mut is_cut: watch::Receiver<bool>) {
    // Whoever connects through a cut gets no further than the handshake.
    if is_cut.wait_for(|cut| !cut).await.is_err() {
        return;
    }
    let Ok(server) = TcpStream::connect(target).await else {
        return;
    };
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    tokio::join!(
        copy(from_client, to_server, is_cut.clone()),
        copy(from_server, to_client, is_cut),
    );
}

async fn copy(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut is_cut: watch::Receiver<bool>) {
    let mut piece = vec![0; PIECE_BYTES];
    while let Ok(bytes @ 1..) = from.read(&mut piece).await {
        let open = is_cut.wait_for(|cut| !cut).await.is_ok();
        if !open || to.write_all(&piece[..bytes]).await.is_err() {
            return;
        }
    }
    let _ = to.shutdown().await;
}
