//! Web sites for egress tests: one listener on loopback for each name of the scenario. A development
//! resolver leads the names here; whoever gets through reads a greeting with the site's name.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

const CONNECTIONS_MAX: usize = 64;

/// One site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Site {
    /// Its name.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// Chutes must reach it; otherwise they must not.
    pub allowed: bool,
}

/// Starts a listener for each name.
pub(crate) async fn start(
    names: impl Iterator<Item = (String, bool)>,
    address: IpAddr,
    shutdown: &CancellationToken,
) -> io::Result<Vec<Site>> {
    let mut sites = vec![];
    for (name, allowed) in names {
        let listener = TcpListener::bind((address, 0)).await?;
        let address = listener.local_addr()?;
        tokio::spawn(serve(listener, name.clone(), shutdown.clone()));
        sites.push(Site {
            name,
            address,
            allowed,
        });
    }
    Ok(sites)
}

async fn serve(listener: TcpListener, name: String, shutdown: CancellationToken) {
    let slots = std::sync::Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (Ok((stream, _)), Ok(slot)) = (accepted, slots.clone().try_acquire_owned()) else {
            continue;
        };
        let name = name.clone();
        tokio::spawn(async move {
            let served = tokio::time::timeout(Duration::from_secs(10), greet(stream, &name)).await;
            if !matches!(served, Ok(Ok(()))) {
                tracing::debug!(site = name, "connection to a site failed");
            }
            drop(slot);
        });
    }
}

async fn greet(mut stream: TcpStream, name: &str) -> io::Result<()> {
    let mut request = [0; 1024];
    if stream.read(&mut request).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let text = greeting(name);
    let answer = format!(
        "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{text}",
        text.len()
    );
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}

/// What a site says.
#[must_use]
pub(crate) fn greeting(name: &str) -> String {
    format!("this is {name}\n")
}
