//! The host link against a coordinator that is just a QUIC listener: greeting, both directions, reconnect,
//! and certificates that do not fit.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use agent::clock::Clock;
use agent::link::{Config, Ends, Link, Quic};
use protocol::id::ServerId;
use protocol::link::{ALPN, Decoder, FromHost, ToHost, encode};
use protocol::report::{HostFacts, WorkloadReport};
use protocol::time::UnixMillis;
use protocol::workload::Fence;
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Endpoint, RecvStream, SendStream, ServerConfig};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use rustls::server::WebPkiClientVerifier;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

const NAME: &str = "coordinator.test";
const LONG: Duration = Duration::from_secs(20);

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("ring makes keys");
        Self(CertifiedIssuer::self_signed(params, key).expect("it signs"))
    }

    fn sign(&self, name: &str) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().expect("ring makes keys");
        let params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        (params.signed_by(&key, &self.0).expect("it signs"), key)
    }

    /// Files of a host that trusts `trusted`.
    fn write_host(&self, folder: &Path, trusted: &Self) {
        let (certificate, key) = self.sign("server-1");
        for (name, text) in [
            ("host.pem", certificate.pem()),
            ("host.key", key.serialize_pem()),
            ("ca.pem", trusted.0.pem()),
        ] {
            std::fs::write(folder.join(name), text).expect("writable");
        }
    }

    fn listen(&self) -> Endpoint {
        let (certificate, key) = self.sign(NAME);
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.0.der().clone()).expect("its own");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
        let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
        let mut tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("ring speaks it")
            .with_client_cert_verifier(clients.build().expect("one root"))
            .with_single_cert(vec![certificate.der().clone()], key)
            .expect("they fit");
        tls.alpn_protocols = vec![ALPN.to_vec()];
        let config = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls).expect("TLS 1.3")));
        Endpoint::server(config, "127.0.0.1:0".parse().expect("an address")).expect("loopback has ports")
    }
}

struct Host {
    _facts: watch::Sender<Option<HostFacts>>,
    _stored: watch::Sender<Fence>,
    report: watch::Sender<Option<WorkloadReport>>,
    delivered: watch::Receiver<Fence>,
    inbound: mpsc::Receiver<ToHost>,
    shutdown: CancellationToken,
}

const STORED: Fence = Fence {
    incarnation: 1,
    revision: 4,
};

fn facts() -> HostFacts {
    HostFacts {
        server: ServerId::parse("server-1").expect("valid"),
        name: "host-1".to_owned(),
        address: "127.0.1.1".to_owned(),
        proof_port: 30443,
        devices: Vec::new(),
        cpu_count: 1,
        memory_gb: 1,
        disk_free_gb: 1,
        agent_version: "0".to_owned(),
    }
}

fn host(folder: &Path, listener: &Endpoint) -> Host {
    let config = Config {
        members: vec![listener.local_addr().expect("it is bound").to_string()],
        server_name: NAME.to_owned(),
        certificates: folder.to_owned(),
    };
    let (facts, facts_in) = watch::channel(Some(facts()));
    let (stored, stored_in) = watch::channel(STORED);
    let (report, report_in) = watch::channel(None);
    let (delivered, delivered_out) = watch::channel(Fence::default());
    let (inbound, inbound_out) = mpsc::channel(4);
    let ends = Ends {
        facts: facts_in,
        stored: stored_in,
        report: report_in,
        delivered,
        inbound,
    };
    let shutdown = CancellationToken::new();
    let link = Box::new(Quic::new(config, Clock::new(|| UnixMillis(12_345))));
    tokio::spawn(link.run(ends, shutdown.clone()));
    Host {
        _facts: facts,
        _stored: stored,
        report,
        delivered: delivered_out,
        inbound: inbound_out,
        shutdown,
    }
}

struct Session {
    connection: quinn::Connection,
    out: SendStream,
    incoming: RecvStream,
    decoder: Decoder,
}

impl Session {
    async fn accept(listener: &Endpoint) -> Self {
        let connection = async {
            let incoming = listener.accept().await.expect("it listens");
            let connection = incoming.await.expect("the host has a certificate");
            let (out, incoming) = connection.accept_bi().await.expect("the host opens a stream");
            Self {
                connection,
                out,
                incoming,
                decoder: Decoder::default(),
            }
        };
        tokio::time::timeout(LONG, connection)
            .await
            .expect("the host connects")
    }

    async fn receive(&mut self) -> FromHost {
        loop {
            if let Some(message) = self.decoder.take_next().expect("good frames") {
                return message;
            }
            let chunk = tokio::time::timeout(LONG, self.incoming.read_chunk(1024, true));
            let chunk = chunk
                .await
                .expect("in time")
                .expect("it is up")
                .expect("it goes on");
            self.decoder.push(&chunk.bytes);
        }
    }
}

fn report(revision: u64) -> WorkloadReport {
    WorkloadReport {
        fence: Fence {
            incarnation: 1,
            revision,
        },
        workloads: Vec::new(),
    }
}

fn hello() -> FromHost {
    FromHost::Hello {
        facts: facts(),
        fence: STORED,
        clock: UnixMillis(12_345),
    }
}

#[tokio::test]
async fn a_host_greets_reports_obeys_and_comes_back() {
    let folder = tempfile::tempdir().expect("temporary folders can be made");
    let authority = Authority::new();
    authority.write_host(folder.path(), &authority);
    let listener = authority.listen();
    let mut host = host(folder.path(), &listener);
    let mut session = Session::accept(&listener).await;
    assert_eq!(session.receive().await, hello());
    host.report.send_replace(Some(report(4)));
    assert_eq!(session.receive().await, FromHost::Report(report(4)));
    host.delivered
        .wait_for(|fence| fence.revision == 4)
        .await
        .expect("it runs");
    let desired = ToHost::Desired {
        fence: Fence::default(),
        workloads: Vec::new(),
    };
    let frame = encode(&desired).expect("short");
    session.out.write_all(&frame).await.expect("it is up");
    assert_eq!(host.inbound.recv().await, Some(desired));
    // The link breaks; the next one begins with the greeting and the newest report.
    session.connection.close(0_u32.into(), b"gone");
    let mut session = Session::accept(&listener).await;
    assert_eq!(session.receive().await, hello());
    assert_eq!(session.receive().await, FromHost::Report(report(4)));
    // A frame that claims too much ends the connection, not the host.
    session.out.write_all(&[0xff; 8]).await.expect("it is up");
    let mut session = Session::accept(&listener).await;
    assert_eq!(session.receive().await, hello());
    host.shutdown.cancel();
    tokio::time::timeout(LONG, session.connection.closed())
        .await
        .expect("the host hangs up");
}

#[tokio::test]
async fn a_coordinator_of_another_cluster_hears_nothing() {
    let folder = tempfile::tempdir().expect("temporary folders can be made");
    let (ours, theirs) = (Authority::new(), Authority::new());
    ours.write_host(folder.path(), &ours);
    let listener = theirs.listen();
    let host = host(folder.path(), &listener);
    host.report.send_replace(Some(report(1)));
    for _ in 0..2 {
        let incoming = tokio::time::timeout(LONG, listener.accept())
            .await
            .expect("it tries again");
        assert!(incoming.expect("it listens").await.is_err());
    }
    assert_eq!(*host.delivered.borrow(), Fence::default());
}
