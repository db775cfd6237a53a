//! Whether UDP gets through to a port, told apart from what else may keep a connection from being made.
//!
//! A datagram is sent that has the shape of a QUIC packet of a version that nobody speaks. Whoever speaks QUIC answers
//! it, certificates or not. A machine on which nobody listens says so by ICMP. Where nothing comes back at all,
//! something on the way drops it.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::time::timeout;

/// Times that it is sent: one datagram may be lost.
const TRIES: u32 = 3;
/// How long each may take.
const EACH_MAX: Duration = Duration::from_millis(700);
/// Bytes of the datagram: a shorter one is not answered, so that nobody is made to answer more than they got.
const BYTES: usize = 1200;

/// What came back from a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// An answer.
    Answers,
    /// The machine says that nobody listens.
    Refused,
    /// Nothing.
    Silent,
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Answers => "UDP gets there and back",
            Self::Refused => "UDP gets there, and nobody listens on the port",
            Self::Silent => "blocked UDP: neither an answer nor a refusal comes back",
        })
    }
}

/// Tries a `host:port`.
///
/// # Errors
/// The name has no address, or this machine cannot send there.
pub async fn udp(address: &str) -> io::Result<Reach> {
    let mut found = tokio::net::lookup_host(address).await?;
    let no_address = || io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let target = found.next().ok_or_else(no_address)?;
    let local: SocketAddr = match target {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(local).await?;
    socket.connect(target).await?;
    let (packet, mut answer) = (packet(), [0; 2048]);
    for _ in 0..TRIES {
        let exchange = async {
            socket.send(&packet).await?;
            socket.recv(&mut answer).await
        };
        match timeout(EACH_MAX, exchange).await {
            Ok(Ok(_)) => return Ok(Reach::Answers),
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => return Ok(Reach::Refused),
            Ok(Err(error)) => return Err(error),
            Err(_) => {}
        }
    }
    Ok(Reach::Silent)
}

/// A long header with a version out of those that are set aside to be unknown, and connection ids of 8 bytes.
fn packet() -> Vec<u8> {
    let mut packet = vec![0xc0, 0x1a, 0x2a, 0x3a, 0x4a];
    for _ in 0..2 {
        packet.push(8);
        packet.extend_from_slice(&fastrand::u64(..).to_be_bytes());
    }
    packet.resize(BYTES, 0);
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_that_drops_everything_is_told_from_one_that_nobody_has() {
        let silent = UdpSocket::bind("127.0.0.1:0").await.expect("a free port");
        let address = silent.local_addr().expect("bound").to_string();
        assert_eq!(udp(&address).await.expect("it can be sent"), Reach::Silent);
        drop(silent);
        assert_eq!(udp(&address).await.expect("it can be sent"), Reach::Refused);
        let answering = UdpSocket::bind("127.0.0.1:0").await.expect("a free port");
        let address = answering.local_addr().expect("bound").to_string();
        tokio::spawn(async move {
            let mut bytes = [0; 2048];
            let (length, from) = answering.recv_from(&mut bytes).await?;
            answering.send_to(&bytes[..length], from).await
        });
        assert_eq!(udp(&address).await.expect("it can be sent"), Reach::Answers);
        assert!(udp("no port").await.is_err());
    }
}
