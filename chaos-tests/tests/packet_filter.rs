//! The agent's packet filter against the kernel: a node with pods behind a bridge and somebody outside, each in a
//! network namespace of its own. Nothing outside of them is touched.
//!
//! ```text
//! outside 11.77.0.2 ---- 11.77.0.1 node --cni0 10.42.0.1-- 10.42.0.7 chute
//!         fd77::2        fd77::1            fd00:42::1  \- 10.42.0.5 system (trusted)
//! ```
//! What kube-proxy does is a foreign table: a NodePort of the chute, and a ClusterIP that is the API server on the node.

#[path = "packet_filter/spaces.rs"]
mod spaces;

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::time::Duration;

use agent::config::{self, Sources};
use agent::host_plane;
use agent::packet_filter::rules::{Rules, TABLE};
use agent::packet_filter::table::{self, Table};
use agent::packet_filter::{Config, Error, Filter, RawConfig, give_up_the_right, remove, was_installed};
use chaos_tests::faults::network::Network;
use coordinator::join::admission;
use protocol::id::ServerId;
use protocol::time::UnixMillis;
use rustix::thread::set_no_new_privs;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use spaces::{Space, awaited, done, inside, ip, works};

/// A packet that is dropped does not come.
const NEVER: Duration = Duration::from_millis(700);
const SOON: Duration = Duration::from_secs(10);

const NODE_PORT: u16 = 31000;
const TCP_FORBIDDEN: [u16; 5] = [32000, 30500, 6443, 10250, 22];
const QUIC: u16 = 4433;
const EGRESS: u16 = 3128;
const DNS: u16 = 53;

const FOREIGN: &str = "
    table inet foreign {
        chain inwards {
            type nat hook prerouting priority dstnat;
            ip daddr 11.77.0.1 tcp dport 31000 dnat ip to 10.42.0.7:8000
            ip6 daddr fd77::1 tcp dport 31000 dnat ip6 to [fd00:42::7]:8000
            ip daddr 10.43.0.1 tcp dport 443 dnat ip to 11.77.0.1:6443
        }
        chain outwards {
            type nat hook postrouting priority srcnat;
            oifname \"eth0\" ip saddr 10.42.0.0/16 masquerade
            oifname \"eth0\" ip6 saddr fd00:42::/48 masquerade
            oifname \"cni0\" ct status dnat masquerade
        }
    }";

/// Where somebody listens.
struct Listeners {
    tcp: Vec<TcpListener>,
    quic: UdpSocket,
    dns: UdpSocket,
}

struct World {
    network: Network,
    node: String,
    outside: String,
    chute: Space,
    system: Space,
    folder: tempfile::TempDir,
    /// On the node.
    doors: Listeners,
    /// Those of the chute and of the outside.
    others: Vec<TcpListener>,
}

impl World {
    fn new() -> Self {
        let network = Network::create(2).expect("namespaces work here");
        let (node, outside) = (network.namespace(1), network.namespace(2));
        let pod = |letter| Space::new(format!("{}{letter}", network.name()));
        let (chute, system) = (pod("c"), pod("d"));
        for (namespace, address) in [(&node, "fd77::1/64"), (&outside, "fd77::2/64")] {
            ip(namespace, &format!("address add {address} dev eth0 nodad"));
        }
        for path in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            let path = format!("/proc/sys/net/{path}");
            inside(&node, || std::fs::write(&path, "1").expect("of the namespace"));
        }
        ip(&node, "link add cni0 type bridge");
        ip(&node, "address add 10.42.0.1/24 dev cni0");
        ip(&node, "address add fd00:42::1/64 dev cni0 nodad");
        ip(&node, "link set cni0 up");
        for (number, pod) in [(7, &*chute), (5, &*system)] {
            ip(
                &node,
                &format!("link add veth{number} type veth peer name eth0 netns {pod}"),
            );
            ip(&node, &format!("link set veth{number} master cni0 up"));
            ip(
                &node,
                &format!("link set veth{number} type bridge_slave hairpin on"),
            );
            ip(pod, "link set lo up");
            ip(pod, &format!("address add 10.42.0.{number}/24 dev eth0"));
            ip(pod, &format!("address add fd00:42::{number}/64 dev eth0 nodad"));
            ip(pod, "link set eth0 up");
            ip(pod, "route add default via 10.42.0.1");
            ip(pod, "-6 route add default via fd00:42::1");
        }
        ip(&node, "route add default via 11.77.0.2");
        ip(&node, "-6 route add default via fd77::2");
        // What is outside: a provider's metadata service, and a server.
        ip(&outside, "address add 169.254.169.254/32 dev lo");
        ip(&outside, "address add fd00:ec2::254/128 dev lo nodad");
        done(network.command(1, "nft").arg(FOREIGN));

        let listen = |port: u16| TcpListener::bind(("::", port)).expect("nobody else is here");
        let doors = inside(&node, || Listeners {
            tcp: TCP_FORBIDDEN
                .into_iter()
                .chain([EGRESS, DNS])
                .map(listen)
                .collect(),
            quic: UdpSocket::bind(("::", QUIC)).expect("nobody else is here"),
            dns: UdpSocket::bind(("::", DNS)).expect("nobody else is here"),
        });
        let mut others = vec![inside(&chute, || listen(8000))];
        others.extend(inside(&outside, || [80, 443].map(listen)));
        Self {
            node,
            outside,
            chute,
            system,
            folder: tempfile::tempdir().expect("temporary folders can be made"),
            doors,
            others,
            network,
        }
    }

    /// The agent's filter, with an egress door and a name server on the node.
    fn rules() -> Rules {
        let written = RawConfig {
            enabled: true,
            open: vec!["udp/53".to_owned(), "tcp/53".to_owned()],
            ..RawConfig::default()
        };
        let door = SocketAddr::from(([0, 0, 0, 0], EGRESS));
        let config = Config::check(&written, door).expect("good settings");
        config.expect("it is switched on").rules
    }

    fn trusted() -> BTreeSet<IpAddr> {
        ["10.42.0.5", "fd00:42::5"]
            .map(|it| it.parse().expect("an address"))
            .into()
    }

    fn install(&self, rules: Rules) {
        let (_keep, trusted) = watch::channel(Self::trusted());
        awaited(&self.node, async || {
            let filter = Filter::install(rules, Table::default(), trusted, self.folder.path()).await;
            filter.map(drop).expect("it works");
        });
    }

    /// All rules of the node but what they count.
    fn ruleset(&self) -> String {
        done(
            self.network
                .command(1, "nft")
                .args(["--stateless", "list", "ruleset"]),
        )
    }

    fn foreign(&self) -> String {
        done(
            self.network
                .command(1, "nft")
                .args(["list", "table", "inet", "foreign"]),
        )
    }

    /// Which of these somebody in a namespace connects to.
    fn connects(&self, from: &str, to: &[&str]) -> Vec<bool> {
        let one = |to: &&str| {
            let address: SocketAddr = to.parse().expect("an address");
            inside(from, move || TcpStream::connect_timeout(&address, NEVER).is_ok())
        };
        std::thread::scope(|scope| {
            let all: Vec<_> = to.iter().map(|to| scope.spawn(move || one(to))).collect();
            all.into_iter()
                .map(|it| it.join().expect("no panic inside"))
                .collect()
        })
    }

    fn check(&self, what: &str, from: &str, to: &[&str], expected: bool) {
        let wrong: Vec<_> = to
            .iter()
            .zip(self.connects(from, to))
            .filter(|(_, it)| *it != expected)
            .map(|(to, _)| to)
            .collect();
        assert!(
            wrong.is_empty(),
            "{what}: connected should be {expected}: {wrong:?}"
        );
    }

    /// Whether a packet of the chute gets to a socket of the node.
    fn hears(&self, socket: &UdpSocket, to: &str) -> bool {
        let word = fastrand::u64(..).to_be_bytes();
        let address: SocketAddr = to.parse().expect("an address");
        inside(&self.chute, || {
            let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let sender = UdpSocket::bind(any).expect("a free port");
            sender.send_to(&word, address).expect("it is sent");
        });
        socket.set_read_timeout(Some(NEVER)).expect("a time");
        let mut heard = [0; 8];
        // Nobody else sends here.
        socket.recv_from(&mut heard).is_ok_and(|_| heard == word)
    }
}

const FORBIDDEN: [&str; 16] = [
    // Each by an address that pods see, by the node's own, and over IPv6.
    "10.42.0.1:32000",
    "11.77.0.1:32000",
    "[fd77::1]:32000",
    "10.42.0.1:30500",
    "[fd00:42::1]:30500",
    "11.77.0.1:6443",
    "[fd77::1]:6443",
    "11.77.0.1:10250",
    "[fd77::1]:10250",
    "11.77.0.1:22",
    // The API server by its ClusterIP, and the chute's own NodePort by the node's address.
    "10.43.0.1:443",
    "11.77.0.1:31000",
    "[fd77::1]:31000",
    // Metadata, forwarded.
    "169.254.169.254:80",
    "[fd00:ec2::254]:80",
    "[fd00:42::1]:6443",
];

const ALLOWED: [&str; 8] = [
    "10.42.0.1:3128",
    "11.77.0.1:3128",
    "[fd00:42::1]:3128",
    "10.42.0.1:53",
    "[fd77::1]:53",
    "11.77.0.2:443",
    "[fd77::2]:443",
    "11.77.0.2:80",
];

fn quic_and_dns(world: &World) -> [bool; 4] {
    let (quic, dns) = (&world.doors.quic, &world.doors.dns);
    [
        world.hears(quic, &format!("11.77.0.1:{QUIC}")),
        world.hears(quic, &format!("[fd77::1]:{QUIC}")),
        world.hears(dns, &format!("10.42.0.1:{DNS}")),
        world.hears(dns, &format!("[fd00:42::1]:{DNS}")),
    ]
}

#[test]
fn pods_reach_the_doors_of_their_host_and_nothing_else_there() {
    if !works("the packet filter") {
        return;
    }
    let world = World::new();
    assert_eq!((world.doors.tcp.len(), world.others.len()), (7, 3));
    // Without it everything is reached: what follows says something.
    world.check("before", &world.chute, &FORBIDDEN, true);
    world.check("before", &world.chute, &ALLOWED, true);
    assert_eq!(quic_and_dns(&world), [true; 4]);
    let mut old = inside(&world.chute, || {
        TcpStream::connect("11.77.0.1:32000").expect("it listens")
    });
    let api = &world.doors.tcp[0];
    let mut accepted = loop {
        let (stream, peer) = api.accept().expect("it was connected");
        if peer.port() == old.local_addr().expect("connected").port() {
            break stream;
        }
    };
    accepted.set_read_timeout(Some(NEVER)).expect("a time");
    old.write_all(b"a").expect("sent");
    assert_eq!(accepted.read(&mut [0; 1]).ok(), Some(1));
    let foreign = world.foreign();

    world.install(World::rules());
    // Nobody knows his neighbours from before.
    for (namespace, interface) in [
        (&*world.chute, "eth0"),
        (&*world.system, "eth0"),
        (&world.node, "cni0"),
    ] {
        ip(namespace, &format!("neighbour flush dev {interface}"));
    }
    world.check("a chute", &world.chute, &FORBIDDEN, false);
    world.check("a chute", &world.chute, &ALLOWED, true);
    assert_eq!(quic_and_dns(&world), [false, false, true, true]);
    old.write_all(b"b").expect("it is put into a buffer");
    assert!(
        accepted.read(&mut [0; 1]).is_err(),
        "what was begun before goes on"
    );
    // The cluster's own pods ask the API server and the kubelet.
    let system = [
        "10.43.0.1:443",
        "11.77.0.1:6443",
        "[fd77::1]:6443",
        "11.77.0.1:10250",
        "169.254.169.254:80",
    ];
    world.check("a pod of the cluster", &world.system, &system, true);
    // Probes, NodePorts, and what the host does itself.
    let pod = ["10.42.0.7:8000", "[fd00:42::7]:8000"];
    world.check("the host", &world.node, &pod, true);
    world.check("another pod", &world.system, &pod, true);
    let own = [
        "127.0.0.1:32000",
        "[::1]:32000",
        "10.42.0.1:30500",
        "11.77.0.1:6443",
        "169.254.169.254:80",
    ];
    world.check("the host", &world.node, &own, true);
    let node_port = [format!("11.77.0.1:{NODE_PORT}"), format!("[fd77::1]:{NODE_PORT}")];
    let from_outside = [
        node_port[0].as_str(),
        node_port[1].as_str(),
        "11.77.0.1:32000",
        "[fd77::1]:6443",
    ];
    world.check("somebody outside", &world.outside, &from_outside, true);
    assert_eq!(world.foreign(), foreign, "nobody else's rules are touched");

    // The same once more changes nothing.
    let ruleset = world.ruleset();
    world.install(World::rules());
    assert_eq!(world.ruleset(), ruleset);

    // Told by their networks alone; the host has an address in them.
    let networks = ["10.42.0.0/16", "fd00:42::/48"];
    world.install(Rules {
        interfaces: Vec::new(),
        networks: networks.map(|it| it.parse().expect("a network")).to_vec(),
        ..World::rules()
    });
    world.check("a chute", &world.chute, &FORBIDDEN, false);
    world.check("a chute", &world.chute, &ALLOWED, true);
    world.check("a pod of the cluster", &world.system, &system, true);
    world.check("the host", &world.node, &own, true);
    world.check("somebody outside", &world.outside, &from_outside, true);
    // Removed, and removed once more.
    let folder = world.folder.path();
    assert!(was_installed(folder).expect("readable"));
    for _ in 0..2 {
        awaited(&world.node, async || {
            remove(&Table::default(), folder).await.expect("root may")
        });
    }
    assert!(!was_installed(folder).expect("readable"));
    assert!(!world.ruleset().contains(TABLE));
    assert_eq!(world.foreign(), foreign, "nobody else's rules are touched");
    world.check("after", &world.chute, &FORBIDDEN, true);
}

/// Looks until the rules of the node are as wanted.
async fn until(world: &World, what: &str, wanted: impl Fn(&str) -> bool) {
    let seen = async {
        while !wanted(&world.ruleset()) {
            // The table is kept on this thread.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let seen = tokio::time::timeout(SOON, seen).await;
    assert!(seen.is_ok(), "waited for {what}");
}

#[test]
fn it_is_kept_and_follows_who_is_trusted() {
    if !works("the packet filter") {
        return;
    }
    let world = World::new();
    let (tell, trusted) = watch::channel(BTreeSet::new());
    awaited(&world.node, async || {
        let table = Table::default();
        let filter = Filter::install(World::rules(), table.clone(), trusted, world.folder.path()).await;
        let kept = filter
            .expect("it works")
            .renewed_every(Duration::from_millis(20))
            .keep();
        let changes = async {
            let trusts = |it: &str| it.contains("10.42.0.5") && it.contains("fd00:42::5");
            until(&world, "a table", |it| it.contains(TABLE) && !trusts(it)).await;
            tell.send_replace(World::trusted());
            until(&world, "the pods of the cluster", trusts).await;
            table.load("flush ruleset").await.expect("root may");
            until(&world, "the table, made anew", trusts).await;
            let emptied = format!("flush chain inet {TABLE} to_host");
            table.load(&emptied).await.expect("root may");
            until(&world, "the chain, made anew", |it| {
                it.contains("goto of_pod_to_host")
            })
            .await;
            tell.send_replace(BTreeSet::new());
            until(&world, "a table that trusts nobody", |it| {
                it.contains(TABLE) && !trusts(it)
            })
            .await;
        };
        tokio::select! {
            error = kept => panic!("it gave up: {error}"),
            () = changes => {}
        }
    });
}

#[test]
fn where_it_cannot_be_installed_the_reason_is_said() {
    if !works("the packet filter") {
        return;
    }
    let world = World::new();
    let refused = |table: Table, prepare: fn()| {
        let (_keep, trusted) = watch::channel(BTreeSet::new());
        let error = awaited(&world.node, async || {
            prepare();
            let filter = Filter::install(World::rules(), table, trusted, world.folder.path()).await;
            filter.map(drop).expect_err("it cannot")
        });
        assert!(!world.ruleset().contains(TABLE));
        error
    };
    let missing = refused(Table::with_program(PathBuf::from("/no/such/nft")), || {});
    let said = missing.to_string();
    assert!(
        said.contains("/no/such/nft") && said.contains("install nftables"),
        "{said}"
    );
    // As a process of the agent that is not to touch it: also the programs that it starts may not.
    let not_permitted = refused(Table::default(), || {
        give_up_the_right().expect("one may");
        set_no_new_privs(true).expect("one may");
    });
    assert!(
        matches!(not_permitted, Error::Table(table::Error::NotPermitted)),
        "{not_permitted}"
    );
    assert!(not_permitted.to_string().contains("NET_ADMIN"));
    // No interface of a pod: nothing would be filtered.
    ip(&world.node, "link delete cni0");
    ip(&world.node, "link delete veth7");
    ip(&world.node, "link delete veth5");
    let useless = refused(Table::default(), || {});
    assert!(matches!(useless, Error::Useless(_)), "{useless}");
    assert!(
        useless.to_string().contains("packet_filter.networks"),
        "{useless}"
    );
}

/// A host of a cluster of its own, whose API server does not answer; what its process says when it ends.
fn host(
    world: &World,
    enabled: bool,
    stop: impl AsyncFnOnce(CancellationToken) + Send,
) -> Result<(), String> {
    let folder = world.folder.path();
    // The thread of an earlier host may not have closed it yet; in another process it would be gone.
    let _ = std::fs::remove_file(folder.join("agent.redb"));
    let (kubeconfig, file) = (folder.join("kubeconfig"), folder.join("config.toml"));
    let cluster = r#"{ "clusters": [{ "name": "c", "cluster": { "server": "http://127.0.0.1:9" } }], "users": [],
        "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "" } }], "current-context": "c" }"#;
    std::fs::write(&kubeconfig, cluster).expect("ours");
    let text = format!(
        r#"
data = "{data}"
[miner]
hotkey = "5CcyqxXnJucaCnQQvvUg5EPzj1uoNAxACZvzArHw5aVDvgNH"
[[validators]]
hotkey = "5Dt7HZ7Zpw4DppPxFM7Ke3Cm7sDAWhsZXmM5ZAmE7dSVJbcQ"
api = "http://127.0.0.1:9"
socket = "ws://127.0.0.1:9"
registry = "127.0.0.1:9"
[host]
name = "host-1"
id = "host-1"
address = "11.77.0.1"
coordinator = "127.0.0.1:9"
[runtime]
kubeconfig = "{kubeconfig}"
[packet_filter]
enabled = {enabled}
"#,
        data = folder.display(),
        kubeconfig = kubeconfig.display(),
    );
    std::fs::write(&file, text).expect("ours");
    let sources = Sources {
        file: Some(file),
        ..Sources::default()
    };
    let config = config::load(&sources).expect("good settings").config;
    let config = config.host.expect("it is a host").host;
    let (server, now) = (
        ServerId::parse("host-1").expect("an id"),
        UnixMillis::from_unix_seconds(1_780_000_000),
    );
    std::fs::create_dir_all(folder.join("host")).expect("ours");
    let admitted = admission::found(&folder.join("host"), "chutes", &server, "11.77.0.1:4433", now);
    admitted.expect("ours");
    awaited(&world.node, async || {
        let shutdown = CancellationToken::new();
        let mut running = Box::pin(host_plane::run(config, shutdown.clone()));
        let ended = tokio::select! {
            ended = &mut running => ended,
            () = stop(shutdown) => running.await,
        };
        ended.map_err(|error| error.to_string())
    })
}

#[test]
fn a_host_starts_nothing_without_it_and_removes_it_when_it_is_switched_off() {
    if !works("the packet filter") {
        return;
    }
    let world = World::new();
    let until = |wanted: bool| {
        let world = &world;
        async move |shutdown: CancellationToken| {
            self::until(world, "the table", |it| it.contains(TABLE) == wanted).await;
            shutdown.cancel();
        }
    };
    assert_eq!(host(&world, true, until(true)), Ok(()));
    assert!(
        world.ruleset().contains(TABLE),
        "it outlives the agent, as chutes do"
    );
    let foreign = world.foreign();
    assert_eq!(host(&world, false, until(false)), Ok(()));
    assert_eq!(world.foreign(), foreign, "nobody else's rules are touched");

    // It ends by itself, before anybody asks it to.
    for name in ["cni0", "veth7", "veth5"] {
        ip(&world.node, &format!("link delete {name}"));
    }
    let after_long = async |shutdown: CancellationToken| {
        tokio::time::sleep(SOON).await;
        shutdown.cancel();
    };
    let why = host(&world, true, after_long).expect_err("no pod would be filtered");
    assert!(why.starts_with("packet filter: none of the interfaces"), "{why}");
    assert!(!world.ruleset().contains(TABLE));
}
