//! The host link against a coordinator that is just a QUIC listener: greeting, both directions, reconnect,
//! and certificates that do not fit. At the end the whole host process, with neighbours that only listen.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use agent::host_plane::facts::Identity;
use agent::host_plane::{self, RuntimeKind};
use agent::link::{Config, Ends, Link, Quic};
use axum::Router;
use axum::http::{Method, Uri};
use coordinator::clock::ManualClock;
use coordinator::join::Admission;
use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, ChuteVersion, DeploymentId, ServerId};
use protocol::link::{ALPN, Decoder, FromHost, RegistryHeaders, ToHost, encode};
use protocol::logs::{HostAnswer, HostQuestion};
use protocol::report::{HostFacts, WorkloadReport};
use protocol::time::UnixMillis;
use protocol::workload::{Fence, Port, PortProtocol, WorkloadPhase, WorkloadSpec};
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
        first: Some(listener.local_addr().expect("it is bound").to_string()),
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
        answers: Arc::new(|question| {
            let told = format!("{question:?}");
            Box::pin(std::future::ready(HostAnswer::Failed(told)))
        }),
    };
    let shutdown = CancellationToken::new();
    let link = Box::new(Quic::new(config, Arc::new(ManualClock::at(UnixMillis(12_345)))));
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

/// A process of the host that says which GPUs there are and notes what it is told.
fn neighbour(socket: &Path, told: mpsc::Sender<String>) {
    let listener = tokio::net::UnixListener::bind(socket).expect("the folder is ours");
    let app = Router::new().fallback(async move |method: Method, uri: Uri, body: String| {
        if method == Method::PUT {
            told.send(format!("{uri} {body}")).await.expect("the test listens");
        }
        r#"{"devices":[{"uuid":"aabbccdd00112233445566778899eeff","name":"NVIDIA H100 80GB HBM3","memory":1,"processors":1,"clock_rate":1.0,"max_threads_per_processor":1}]}"#
    });
    tokio::spawn(axum::serve(listener, app).into_future());
}

/// A TCP port of loopback that nobody has at this moment.
fn free_port() -> std::net::SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has ports");
    listener.local_addr().expect("it is bound")
}

#[tokio::test]
async fn the_whole_process_joins_link_workloads_and_neighbours() {
    let folder = tempfile::tempdir().expect("temporary folders can be made");
    let data = folder.path();
    let authority = Authority::new();
    authority.write_host(data, &authority);
    let listener = authority.listen();
    let admission = Admission {
        cluster: "test-1".to_owned(),
        server: ServerId::parse("server-1").expect("valid"),
        member: None,
        doors: Vec::new(),
        certificate_until: UnixMillis(u64::MAX),
        opened: false,
    };
    admission.write(data).expect("ours");
    std::fs::create_dir(data.join("run")).expect("ours");
    let (told, mut telling) = mpsc::channel(64);
    neighbour(&data.join("run/proof.sock"), told.clone());
    neighbour(&data.join("run/data.sock"), told);
    // A registry that has no image: what comes of it is told as the end of the workload.
    let registry = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("loopback has ports");
    let registry_address = registry.local_addr().expect("it is bound");
    let nothing = Router::new().fallback(async || axum::http::StatusCode::NOT_FOUND);
    tokio::spawn(axum::serve(registry, nothing).into_future());

    let validators = vec!["http://127.0.0.1:1".to_owned()];
    let process = runtime::process::Config::new(data.to_owned(), registry_address, validators);
    let config = host_plane::Config {
        data: data.to_owned(),
        identity: Identity {
            server: ServerId::parse("server-1").expect("valid"),
            name: "host-1".to_owned(),
            address: "127.0.1.1".to_owned(),
            proof_port: 30443,
        },
        link: Config {
            first: Some(listener.local_addr().expect("it is bound").to_string()),
            server_name: NAME.to_owned(),
            certificates: data.to_owned(),
        },
        runtime: RuntimeKind::Process(Box::new(process)),
        packet_filter: None,
        metrics_listen: Some(free_port()),
    };
    let metrics = config.metrics_listen.expect("set");
    let shutdown = CancellationToken::new();
    let task = tokio::spawn(host_plane::run(config.clone(), shutdown.clone()));

    let mut session = Session::accept(&listener).await;
    let FromHost::Hello { facts, fence, .. } = session.receive().await else {
        panic!("a host greets first");
    };
    assert_eq!((facts.devices.len(), fence), (1, Fence::default()));
    assert!(facts.cpu_count > 0 && facts.memory_gb > 0);
    let error = host_plane::run(config, shutdown.clone())
        .await
        .expect_err("one agent is enough");
    assert!(error.to_string().contains("another agent"), "{error}");

    let text = reqwest::get(format!("http://{metrics}/metrics")).await;
    let text = text.expect("it listens").text().await.expect("it is text");
    for process in ["proof", "data"] {
        let up = format!("chutes_process_up{{process=\"{process}\"}} 1\n");
        assert!(text.contains(&up), "{text}");
    }

    let headers = ToHost::RegistryHeaders(vec![RegistryHeaders {
        validator: Hotkey::from_public_key(&[2; 32]),
        headers: vec![("X-Chutes-Hotkey".to_owned(), "us".to_owned())],
        expires_at: UnixMillis(99),
    }]);
    let fence = Fence {
        incarnation: 1,
        revision: 1,
    };
    let port = |internal| Port {
        internal,
        protocol: PortProtocol::Tcp,
    };
    let spec = WorkloadSpec {
        deployment: DeploymentId::parse("deployment-of-the-whole-process").expect("valid"),
        validator: Hotkey::from_public_key(&[2; 32]),
        miner: Hotkey::from_public_key(&[1; 32]),
        chute: ChuteId::parse("chute-1").expect("valid"),
        version: ChuteVersion::parse("v1").expect("valid"),
        image: "someone/absent:1.0".to_owned(),
        ref_str: "echo:chute".to_owned(),
        filename: "echo.py".to_owned(),
        code: String::new(),
        chutes_version: None,
        gpus: Vec::new(),
        external_host: "127.0.0.1".to_owned(),
        config: None,
        launch_token: None,
        legacy_seed: None,
        job: None,
        ports: vec![port(8000), port(8001)],
        cpu_count: 1,
        memory_gb: 1,
        disk_gb: 1,
    };
    let desired = ToHost::Desired {
        fence,
        workloads: vec![spec],
    };
    for message in [headers, desired] {
        let frame = encode(&message).expect("short");
        session.out.write_all(&frame).await.expect("it is up");
    }
    let reason = loop {
        let FromHost::Report(report) = session.receive().await else {
            continue;
        };
        if let [workload] = report.workloads.as_slice()
            && let WorkloadPhase::Ended { reason, .. } = &workload.phase
        {
            assert_eq!(report.fence, fence);
            break reason.clone();
        }
    };
    assert!(reason.contains("404"), "{reason}");
    let mut wanted = vec![
        "/registry/headers [{\"validator\":",
        "/cache/leases {\"running\":[\"chute-1\"]",
    ];
    while !wanted.is_empty() {
        let line = tokio::time::timeout(LONG, telling.recv())
            .await
            .expect("in time")
            .expect("it listens");
        wanted.retain(|start| !line.starts_with(start));
    }
    shutdown.cancel();
    tokio::time::timeout(LONG, task)
        .await
        .expect("in time")
        .expect("no panic")
        .expect("a clean end");
}

#[tokio::test]
async fn questions_are_answered_each_on_its_own_stream() {
    let folder = tempfile::tempdir().expect("temporary folders can be made");
    let authority = Authority::new();
    authority.write_host(folder.path(), &authority);
    let listener = authority.listen();
    let _host = host(folder.path(), &listener);
    let mut session = Session::accept(&listener).await;
    assert_eq!(session.receive().await, hello());
    let question = HostQuestion::Events(DeploymentId::parse("d1").expect("valid"));
    // One that is nonsense ends its own stream and nothing else.
    for (bytes, is_answered) in [
        (vec![0, 0, 0, 1, 9], false),
        (encode(&question).expect("short"), true),
    ] {
        let (mut send, mut receive) = session.connection.open_bi().await.expect("the host lets us");
        send.write_all(&bytes).await.expect("it is up");
        send.finish().expect("it is open");
        let answer = receive.read_to_end(1 << 20).await;
        let mut decoder = Decoder::default();
        decoder.push(&answer.unwrap_or_default());
        let answer = decoder.take_next::<HostAnswer>().expect("good frames");
        let expected = HostAnswer::Failed(format!("{question:?}"));
        assert_eq!(answer, is_answered.then_some(expected));
    }
}
