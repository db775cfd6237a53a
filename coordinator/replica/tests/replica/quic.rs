//! Members over QUIC on loopback, with certificates of their own authority.

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Connection, Endpoint, ServerConfig};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use replica::quic::{ALPN, Peers, serve, server_name, transport_config};
use replica::{MESSAGE_BYTES_MAX, Pace, Replica, Start, Timing, Transport};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use crate::store::{Disks, Journal, Published};

const SOON: Duration = Duration::from_secs(2);
const LOCALHOST: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Issues certificates that all members trust.
struct Authority {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut parameters = CertificateParams::new(Vec::new()).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.self_signed(&key).unwrap().der().clone();
        let issuer = Issuer::new(parameters, key);
        Self { certificate, issuer }
    }

    fn issue(&self, member: u64) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let mut parameters = CertificateParams::new(vec![server_name(member)]).unwrap();
        parameters.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        (certificate.der().clone(), key.into())
    }

    fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).unwrap();
        Arc::new(roots)
    }

    /// A UDP port that accepts holders of a certificate, and the settings to dial with.
    fn endpoint(&self, member: u64) -> (Endpoint, ClientConfig) {
        self.endpoint_at(member, LOCALHOST).unwrap()
    }

    fn endpoint_at(&self, member: u64, at: SocketAddr) -> std::io::Result<(Endpoint, ClientConfig)> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let (certificate, key) = self.issue(member);
        let verifier =
            rustls::server::WebPkiClientVerifier::builder_with_provider(self.roots(), provider.clone());
        let mut server = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier.build().unwrap())
            .with_single_cert(vec![certificate.clone()], key.clone_key())
            .unwrap();
        server.alpn_protocols = vec![ALPN.to_vec()];
        let mut client = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(self.roots())
            .with_client_auth_cert(vec![certificate], key)
            .unwrap();
        client.alpn_protocols = vec![ALPN.to_vec()];
        let mut server = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(server).unwrap()));
        server.transport_config(Arc::new(transport_config()));
        let endpoint = Endpoint::server(server, at)?;
        let client = ClientConfig::new(Arc::new(QuicClientConfig::try_from(client).unwrap()));
        Ok((endpoint, client))
    }
}

/// The member that the caller's certificate names, as the owner of the port finds it out.
fn caller(connection: &Connection) -> u64 {
    let identity = connection.peer_identity().expect("the caller has a certificate");
    let chain = identity.downcast::<Vec<CertificateDer<'static>>>().unwrap();
    let text = String::from_utf8_lossy(&chain[0]).into_owned();
    (1..10)
        .find(|member| text.contains(&server_name(*member)))
        .expect("a member's name")
}

type Slot = Arc<watch::Sender<Option<Replica>>>;

/// Accepts members and answers them, with the replica once it is open; the coordinator's answers are echoes.
fn accept(endpoint: Endpoint, slot: Slot) -> JoinHandle<()> {
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            let slot = slot.clone();
            tokio::spawn(async move {
                let Ok(connection) = incoming.await else { return };
                let from = caller(&connection);
                let of_replica = move |from, bytes: Vec<u8>| {
                    let replica = slot.borrow().clone();
                    async move {
                        let replica = replica.ok_or_else(|| "not open yet".to_owned())?;
                        replica
                            .answer(from, &bytes)
                            .await
                            .map_err(|error| error.to_string())
                    }
                };
                let of_coordinator = |from, mut bytes: Vec<u8>| async move {
                    if bytes == b"no" {
                        return Err("refused here".to_owned());
                    }
                    bytes.extend_from_slice(format!(" of {from}").as_bytes());
                    Ok(bytes)
                };
                serve(connection, from, of_replica, of_coordinator).await;
            });
        }
    })
}

struct Member {
    replica: Replica,
    published: Arc<Mutex<Published>>,
    endpoint: Endpoint,
    address: String,
}

async fn member(authority: &Authority, member: u64, start: Start) -> Member {
    let (endpoint, client) = authority.endpoint(member);
    let address = endpoint.local_addr().unwrap().to_string();
    let slot = Arc::new(watch::Sender::new(None));
    accept(endpoint.clone(), slot.clone());
    let mut config = Disks::new(member).config(member);
    config.node_id = member;
    config.address.clone_from(&address);
    config.start = start;
    config.timing = Timing::Exact(Pace::of_heartbeat(200));
    let (machine, published) = Journal::new();
    let peers = Peers::new(endpoint.clone(), move |_| Ok(client.clone()));
    let replica = Replica::open(config, machine, Arc::new(peers)).await.unwrap();
    slot.send_replace(Some(replica.clone()));
    Member {
        replica,
        published,
        endpoint,
        address,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_members_replicate_fail_over_and_send_a_snapshot() {
    let authority = Authority::new();
    let first = member(&authority, 1, Start::Found).await;
    first.replica.linearizable().await.unwrap();
    for number in 0..30u8 {
        first.replica.propose(vec![number; 100_000]).await.unwrap();
    }
    // The others come by snapshot: three pieces.
    first.replica.snapshot().await.unwrap();
    let mut joined = Vec::new();
    for id in [2, 3] {
        let other = member(&authority, id, Start::Join).await;
        first
            .replica
            .add_learner(id, other.address.clone())
            .await
            .unwrap();
        joined.push(other);
    }
    // Not what is written meanwhile: of that they are always a little behind.
    let last = first.replica.metrics().last_index;
    let caught_up = async {
        loop {
            let progress = first.replica.progress();
            if progress.len() == 2 && progress.values().all(|it| it.matched >= last) {
                break;
            }
            first.replica.leadership().changed().await.unwrap();
        }
    };
    // News of the others' progress comes with each commit.
    let nudge = async {
        loop {
            first.replica.propose(b"nudge".to_vec()).await.unwrap();
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        caught_up = timeout(Duration::from_secs(30), caught_up) => caught_up.expect("they catch up"),
        () = nudge => {}
    }
    first.replica.set_voters([1, 2, 3].into()).await.unwrap();
    joined[0].replica.propose(b"forwarded".to_vec()).await.unwrap();
    joined[1].replica.linearizable().await.unwrap();
    let applied = joined[1].published.lock().unwrap().applied.clone();
    assert_eq!(applied.last().unwrap(), b"forwarded");
    assert_eq!(applied[29], vec![29; 100_000]);

    // The leader is gone without a word.
    first.endpoint.close(0_u8.into(), b"");
    let began = Instant::now();
    let proposed = async { while joined[0].replica.propose(b"after".to_vec()).await.is_err() {} };
    timeout(Duration::from_secs(20), proposed)
        .await
        .expect("another leads");
    println!("failover took {:?}", began.elapsed());
    joined[1].replica.linearizable().await.unwrap();
    let applied = joined[1].published.lock().unwrap().applied.clone();
    assert!(applied.contains(&b"forwarded".to_vec()) && applied.contains(&b"after".to_vec()));
    for other in joined {
        other.replica.shutdown().await;
    }
}

/// One end that only answers the coordinator's questions.
fn answering(authority: &Authority, member: u64) -> (Endpoint, SocketAddr) {
    let (endpoint, _) = authority.endpoint(member);
    let address = endpoint.local_addr().unwrap();
    accept(endpoint.clone(), Arc::new(watch::Sender::new(None)));
    (endpoint, address)
}

fn asking(authority: &Authority, member: u64) -> (Endpoint, Peers) {
    let (endpoint, client) = authority.endpoint(member);
    let peers = Peers::new(endpoint.clone(), move |_| Ok(client.clone()));
    (endpoint, peers)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_coordinators_questions_have_answers_reasons_and_limits() {
    let authority = Authority::new();
    let (_two, address) = answering(&authority, 2);
    let address = address.to_string();
    let (_one, peers) = asking(&authority, 1);
    let ask = |question: Vec<u8>| peers.ask(2, &address, question, SOON);
    assert_eq!(ask(b"who".to_vec()).await.unwrap(), b"who of 1");
    let reason = ask(b"no".to_vec()).await.unwrap_err().reason;
    assert_eq!(reason, "refused here");
    let reason = ask(vec![0; MESSAGE_BYTES_MAX + 1]).await.unwrap_err().reason;
    assert!(reason.contains("limit"), "{reason}");
    let reason = peers
        .call(2, &address, Vec::new(), SOON)
        .await
        .unwrap_err()
        .reason;
    assert_eq!(reason, "not open yet");
    // The largest there is, many at once.
    let large = vec![7; MESSAGE_BYTES_MAX - 100];
    for answer in
        futures_util::future::join_all((0..6).map(|_| peers.ask(2, &address, large.clone(), 20 * SOON))).await
    {
        assert_eq!(answer.unwrap().len(), large.len() + " of 1".len());
    }
    // Whoever has another member's certificate does not answer under this one's name.
    let reason = peers
        .ask(3, &address, b"who".to_vec(), SOON)
        .await
        .unwrap_err()
        .reason;
    assert!(reason.contains("ertificate"), "{reason}");
    // Somebody else's authority is nobody's.
    let (_foreign, stranger) = asking(&Authority::new(), 1);
    let reason = stranger
        .ask(2, &address, b"who".to_vec(), SOON)
        .await
        .unwrap_err()
        .reason;
    assert!(reason.contains("ertificate"), "{reason}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_full_of_nonsense_cost_only_themselves() {
    let authority = Authority::new();
    let (_two, address) = answering(&authority, 2);
    let (endpoint, client) = authority.endpoint(1);
    let connection = endpoint
        .connect_with(client, address, &server_name(2))
        .unwrap()
        .await
        .unwrap();
    for nonsense in [
        vec![9; 40],
        vec![1],
        vec![1, 255, 255, 255, 255, 0],
        vec![2, 100, 0, 0, 0, 1, 2, 3],
        Vec::new(),
    ] {
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        send.write_all(&nonsense).await.unwrap();
        send.finish().unwrap();
        let answer = timeout(SOON, receive.read_to_end(100))
            .await
            .expect("it is told at once");
        assert_eq!(answer.unwrap_or_default(), b"", "{nonsense:?}");
    }
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    send.write_all(&[2, 2, 0, 0, 0, b'o', b'k']).await.unwrap();
    send.finish().unwrap();
    assert_eq!(receive.read_to_end(100).await.unwrap(), b"\0ok of 1");
}

/// Passes datagrams between one caller and whoever is behind at the moment.
struct Relay {
    address: String,
    behind: watch::Sender<SocketAddr>,
}

impl Relay {
    async fn new(behind: SocketAddr) -> Self {
        let front = UdpSocket::bind(LOCALHOST).await.unwrap();
        let back = UdpSocket::bind(LOCALHOST).await.unwrap();
        let address = front.local_addr().unwrap().to_string();
        let (behind, current) = watch::channel(behind);
        tokio::spawn(async move {
            let (mut from_caller, mut from_behind) = ([0; 2048], [0; 2048]);
            let mut caller = None;
            loop {
                tokio::select! {
                    Ok((length, from)) = front.recv_from(&mut from_caller) => {
                        caller = Some(from);
                        let to = *current.borrow();
                        let _ = back.send_to(&from_caller[..length], to).await;
                    }
                    Ok((length, from)) = back.recv_from(&mut from_behind) => {
                        let (to, is_current) = (caller, from == *current.borrow());
                        if let Some(to) = to && is_current {
                            let _ = front.send_to(&from_behind[..length], to).await;
                        }
                    }
                }
            }
        });
        Self { address, behind }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_starts_again_without_a_word_is_dialled_again_within_seconds() {
    let authority = Authority::new();
    let (_before, before) = answering(&authority, 2);
    let (_after, after) = answering(&authority, 2);
    let relay = Relay::new(before).await;
    let (_one, peers) = asking(&authority, 1);
    let ask = || peers.ask(2, &relay.address, b"who".to_vec(), Duration::from_millis(150));
    while ask().await.is_err() {}
    // What comes now knows nothing of the connection; short questions go on being asked, as heartbeats are.
    relay.behind.send_replace(after);
    let began = Instant::now();
    let mut failures = 0;
    while ask().await.is_err() {
        failures += 1;
        assert!(began.elapsed() < Duration::from_secs(4), "still no answer");
    }
    assert!(failures > 0, "the first questions went to nobody");
    println!("answered again after {:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_there_is_an_answer_in_time() {
    let authority = Authority::new();
    let deaf = UdpSocket::bind(LOCALHOST).await.unwrap();
    let address = deaf.local_addr().unwrap().to_string();
    let (_one, peers) = asking(&authority, 1);
    let began = Instant::now();
    let within = Duration::from_millis(300);
    let reason = peers
        .ask(2, &address, b"who".to_vec(), within)
        .await
        .unwrap_err()
        .reason;
    assert!(reason.contains("300ms"), "{reason}");
    assert!(began.elapsed() < Duration::from_secs(2));
    let reason = peers
        .ask(3, "nowhere.invalid:1", b"who".to_vec(), SOON)
        .await
        .unwrap_err()
        .reason;
    assert!(reason.contains("nowhere.invalid"), "{reason}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_is_dialled_where_it_says_that_it_is_if_it_is_there() {
    let authority = Authority::new();
    let deaf = UdpSocket::bind(LOCALHOST).await.unwrap();
    let old = deaf.local_addr().unwrap().to_string();
    let (two, new) = answering(&authority, 2);
    let (three, other) = answering(&authority, 3);
    let (_one, peers) = asking(&authority, 1);
    let ask = async |address: &str| peers.ask(2, address, b"who".to_vec(), 3 * SOON).await;

    // Also while an attempt at the old address is under way.
    let before = tokio::spawn({
        let (peers, old) = (peers.clone(), old.clone());
        async move { peers.ask(2, &old, b"who".to_vec(), SOON).await }
    });
    let mut datagram = [0; 2048];
    deaf.recv_from(&mut datagram).await.unwrap();
    peers.note_moved(2, new.to_string());
    let began = Instant::now();
    assert_eq!(ask(&old).await.unwrap(), b"who of 1");
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    assert_eq!(peers.moved_to(), [new.to_string()]);
    before.abort();

    // Looked for there anyway, it is nothing to remember.
    assert_eq!(ask(&new.to_string()).await.unwrap(), b"who of 1");
    assert!(peers.moved_to().is_empty());

    // Somebody else is there: where it is looked for counts.
    peers.note_moved(2, other.to_string());
    assert_eq!(ask(&new.to_string()).await.unwrap(), b"who of 1");

    // It was there, and is looked for at a third place by now.
    peers.note_moved(2, new.to_string());
    assert_eq!(ask(&old).await.unwrap(), b"who of 1");
    two.close(0_u8.into(), b"");
    let (_two, third) = answering(&authority, 2);
    assert_eq!(ask(&third.to_string()).await.unwrap(), b"who of 1");
    assert!(peers.moved_to().is_empty());
    three.close(0_u8.into(), b"");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_find_each_other_over_ipv6_too() {
    let authority = Authority::new();
    let at = SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, 0));
    let Ok((two, _)) = authority.endpoint_at(2, at) else {
        println!("not tested: this machine has no IPv6 loopback");
        return;
    };
    let address = two.local_addr().unwrap().to_string();
    accept(two, Arc::new(watch::Sender::new(None)));
    let (one, client) = authority.endpoint_at(1, at).unwrap();
    let peers = Peers::new(one, move |_| Ok(client.clone()));
    let answer = peers.ask(2, &address, b"who".to_vec(), SOON).await.unwrap();
    assert_eq!(answer, b"who of 1");
}
