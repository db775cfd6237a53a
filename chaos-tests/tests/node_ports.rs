//! Every NodePort of a cluster is taken, and the agent's doors on its node work all the same: images are pulled by the
//! names that it writes, and the management API and the GPU proof answer.
//!
//! ```text
//! outside 11.77.0.2 ---- 11.77.0.1 node 10.42.0.1 ---- 10.42.0.7 a pod, to which all NodePorts lead
//! ```
//! Each is a network namespace. On the node run the control plane with a real kube-proxy, the agent with all its
//! processes, and docker-registry as what its validator has. Not there: kubelet and containerd; skopeo pulls instead.

#[path = "node_ports/cluster.rs"]
mod cluster;
#[path = "node_ports/miner.rs"]
mod miner;
#[path = "../../agent/tests/registry/peers.rs"]
mod peers;
#[path = "../../agent/tests/processes/signed.rs"]
mod signed;
#[path = "packet_filter/spaces.rs"]
mod spaces;

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use chaos_tests::faults::network::Network;
use reqwest::{Method, StatusCode};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use tokio::time::{sleep, timeout};

use cluster::{Cluster, POD, POD_PORT};
use miner::{Doors, Miner, Validator};
use spaces::{Space, inside, ip, works};

/// Far above what is needed, on machines that have much else to do.
const PATIENCE: Duration = Duration::from_secs(120);
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// A connection to a door of the same machine.
const NEVER: Duration = Duration::from_secs(5);

/// Their numbers in the network.
pub(crate) const NODE_HOST: u8 = 1;
pub(crate) const OUTSIDE_HOST: u8 = 2;

/// The NodePorts of a cluster that is not ours, with all doors among them: the middle of 30000-32767, which Kubernetes
/// has unless it is told otherwise, since kube-proxy takes long for so many.
const GIVEN: &str = "30400-32010";
/// Where an agent listens unless it is told otherwise.
const USUAL: Doors = Doors {
    registry: 30500,
    api: 32000,
    proof: 30443,
};
/// Where it listens instead, since it cannot change those.
const MOVED: Doors = Doors {
    registry: 29500,
    api: 29000,
    proof: 29443,
};
/// How many NodePorts a chute gets.
const PORTS_OF_A_CHUTE: usize = 2;
const WARNING: &str = "the cluster may give chutes ports on which this agent listens";
const POD_SAYS: &str = "a pod answers";

/// The NodePorts of a k3s that Ansible installs.
fn ours() -> &'static str {
    let settings = include_str!("../../ansible/roles/k3s/templates/config.yaml.j2");
    let mut lines = settings.lines();
    let range = lines.find_map(|line| line.strip_prefix("service-node-port-range: "));
    range.expect("a k3s is told which there are")
}

fn ports(range: &str) -> RangeInclusive<u16> {
    let (first, last) = range.split_once('-').expect("a range");
    first.parse().expect("a port")..=last.parse().expect("a port")
}

/// The folder of the programs, or nothing with a word about it; CI needs them.
fn programs() -> Option<PathBuf> {
    let folder = std::env::var_os(kubernetes_control_plane::FOLDER_VARIABLE).map(PathBuf::from);
    let folder = folder.filter(|folder| folder.join("kube-proxy").is_file());
    if folder.is_none() {
        let why = "no Kubernetes control plane with kube-proxy: CHUTES_CONTROL_PLANE must name the folder that \
                   chaos-tests/control-plane/build prints";
        let required = std::env::var_os("REQUIRE_PEERS").is_some_and(|value| value == "1");
        assert!(!required, "{why}");
        eprintln!("NOT TESTED: NodePorts: {why}");
    }
    folder
}

/// Looks until there is something.
pub(crate) async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            sleep(LOOK_EVERY).await;
        }
    };
    let found = timeout(PATIENCE, found).await;
    found.unwrap_or_else(|_| panic!("not in time: {what}"))
}

struct World {
    network: Network,
    node: String,
    outside: String,
    pod: Space,
}

impl World {
    fn new() -> Self {
        let network = Network::create(OUTSIDE_HOST).expect("namespaces work here");
        let (node, outside) = (network.namespace(NODE_HOST), network.namespace(OUTSIDE_HOST));
        let pod = Space::new(format!("{}p", network.name()));
        let forward = "/proc/sys/net/ipv4/ip_forward";
        inside(&node, || std::fs::write(forward, "1").expect("of the namespace"));
        ip(
            &node,
            &format!("link add veth7 type veth peer name eth0 netns {}", &*pod),
        );
        ip(&node, "address add 10.42.0.1/24 dev veth7");
        ip(&node, "link set veth7 up");
        ip(&pod, "link set lo up");
        ip(&pod, &format!("address add {POD}/24 dev eth0"));
        ip(&pod, "link set eth0 up");
        ip(&pod, "route add default via 10.42.0.1");
        Self {
            network,
            node,
            outside,
            pod,
        }
    }

    /// Lets the pod answer whoever comes.
    fn answer_in_pod(&self) {
        let listener = inside(&self.pod, || TcpListener::bind((POD, POD_PORT)));
        let listener = listener.expect("nobody else is here");
        listener.set_nonblocking(true).expect("a socket");
        let listener = tokio::net::TcpListener::from_std(listener).expect("a socket");
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let answer = format!(
                        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{POD_SAYS}",
                        POD_SAYS.len()
                    );
                    // Who asks may have gone.
                    let _ = stream.read(&mut [0; 4096]).await;
                    let _ = stream.write_all(answer.as_bytes()).await;
                });
            }
        });
    }

    /// Who answers on the node's own loopback address.
    fn on_node(&self, port: u16) -> String {
        inside(&self.node, || answer(Ipv4Addr::LOCALHOST, port, "/v2/"))
    }

    /// Who answers outside at the node's address.
    fn outside(&self, port: u16) -> String {
        inside(&self.outside, || {
            answer(Network::address(NODE_HOST), port, "/ping")
        })
    }

    /// Waits until each of these leads to the pod, on the node and from outside.
    async fn until_they_lead_to_the_pod(&self, ports: &[u16]) {
        let (node, outside) = (Ipv4Addr::LOCALHOST, Network::address(NODE_HOST));
        for (namespace, address) in [(&self.node, node), (&self.outside, outside)] {
            let mut left = ports;
            until("NodePorts lead to the pod", async || {
                let leads = |port: &u16| answer(address, *port, "/").ends_with(POD_SAYS);
                let lead = inside(namespace, || left.iter().take_while(|port| leads(port)).count());
                left = &left[lead..];
                left.is_empty().then_some(())
            })
            .await;
        }
    }
}

/// What is answered to a plain request, or why nothing.
fn answer(address: Ipv4Addr, port: u16, path: &str) -> String {
    let asked = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::from((address, port)), NEVER)?;
        stream.set_read_timeout(Some(NEVER))?;
        stream.write_all(
            format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").as_bytes(),
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    asked().unwrap_or_else(|error| error.to_string())
}

/// An image in a registry of its own, and how a node gets it.
struct Images {
    folder: PathBuf,
    /// The names of the registry doors, all of which are the node itself, as Ansible writes it.
    hosts: PathBuf,
}

impl Images {
    /// Makes the image, and puts it into this registry under the name that chutes have.
    async fn new(folder: &Path, registry: SocketAddr, validator: &str) -> Self {
        let made = folder.join("made");
        peers::write_image(&made, 1 << 20).await;
        let (from, to) = (
            format!("oci:{}:v1", made.display()),
            format!("docker://{registry}/acme/app:1.0"),
        );
        let copy = [
            "--insecure-policy",
            "copy",
            "--preserve-digests",
            "--dest-tls-verify=false",
            &from,
            &to,
        ];
        peers::run("skopeo", &copy).await;
        let hosts = folder.join("hosts");
        let lines = format!("127.0.0.1 localhost\n127.0.0.1 {validator}.localregistry.chutes.ai\n");
        std::fs::write(&hosts, lines).expect("our own folder");
        Self {
            folder: folder.to_owned(),
            hosts,
        }
    }

    /// Pulls it by this name; fails if it is another one, or cannot be had.
    async fn pull(&self, name: &str) -> Result<(), String> {
        let pulled = tempfile::tempdir_in(&self.folder).expect("our own folder");
        // This machine's own file stays as it is: it is covered for this one process.
        let script = "mount --bind \"$0\" /etc/hosts && exec skopeo \"$@\"";
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--", "sh", "-c", script])
            .arg(&self.hosts);
        command.args([
            "--insecure-policy",
            "copy",
            "--preserve-digests",
            "--src-tls-verify=false",
        ]);
        command.arg(format!("docker://{name}"));
        command.arg(format!("oci:{}:v1", pulled.path().display()));
        for variable in ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"] {
            command.env_remove(variable);
        }
        let output = command.kill_on_drop(true).output().await.expect("started");
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        let same = peers::blobs_of(pulled.path()) == peers::blobs_of(&self.folder.join("made"));
        same.then_some(()).ok_or_else(|| "another image".to_owned())
    }
}

/// Starts the agent and waits until it has doors, and what it asks for images with.
async fn start(world: &World, miner: &mut Miner, doors: Doors) {
    miner.start(doors);
    miner.until_it_answers(doors.api).await;
    until("the coordinator signs for images", async || {
        world
            .on_node(doors.registry)
            .starts_with("HTTP/1.1 200")
            .then_some(())
    })
    .await;
}

/// Fails unless each door is the agent's.
async fn doors_work(world: &World, miner: &Miner, doors: Doors, images: &Images, image: &str) {
    assert_eq!(images.pull(image).await, Ok(()), "{image}");
    let (status, state) = miner
        .ask(doors.api, Method::GET, "/v1/state", &Value::Null)
        .expect("it answers");
    assert_eq!(status, StatusCode::OK, "{state}");
    assert!(state.contains("\"violations\":[]"), "{state}");
    let proof = world.outside(doors.proof);
    assert!(proof.ends_with("pong"), "{proof}");
}

/// Fails unless each door is the pod's.
fn doors_are_lost(world: &World, doors: Doors) {
    let answers = [
        world.on_node(doors.registry),
        world.outside(doors.api),
        world.outside(doors.proof),
    ];
    let lost = answers.iter().all(|answer| answer.ends_with(POD_SAYS));
    assert!(lost, "{answers:?}");
}

#[test]
fn images_are_pulled_and_doors_answer_with_every_node_port_taken() {
    let Some(programs) = programs() else { return };
    let others = ["skopeo", "docker-registry", "tar", "iptables", "unshare", "mount"];
    if !works("NodePorts") || !peers::have(&others) {
        return;
    }
    let world = World::new();
    inside(&world.node, || {
        // All its threads are on the node, too.
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(2).enable_all().build();
        runtime
            .expect("a runtime")
            .block_on(Box::pin(take_them(&world, programs)));
    });
}

async fn take_them(world: &World, programs: PathBuf) {
    let folder = tempfile::tempdir().expect("temporary folders can be made");
    let address = Network::address(NODE_HOST).to_string();
    let mut cluster = Cluster::start(programs, ours(), &address).await;
    world.answer_in_pod();
    let validator = Validator::start(folder.path()).await;
    let (_registry, registry) = peers::start_registry(folder.path()).await;
    let images = Images::new(folder.path(), registry, &validator.label()).await;
    let name = |doors: Doors| {
        format!(
            "{}.localregistry.chutes.ai:{}/acme/app:1.0",
            validator.label(),
            doors.registry
        )
    };
    let kubeconfig = cluster.kubeconfig();
    let mut miner = Miner::new(&world.network, folder.path(), &kubeconfig, &validator, registry);

    // The range is ours to set: Ansible leaves the doors out.
    start(world, &mut miner, USUAL).await;
    let taken = cluster.take_all_but(PORTS_OF_A_CHUTE, ports(ours())).await;
    miner.enrol(USUAL.api).await;
    let first = cluster.image_of_pod_after(0).await;
    assert_eq!(first, name(USUAL));
    cluster.must_be_full(ports(ours())).await;
    world.until_they_lead_to_the_pod(&taken).await;
    doors_work(world, &miner, USUAL, &images, &first).await;
    let said = miner.said();
    assert!(!said.contains(WARNING), "{said}");
    miner.stop().await;

    // It is not, and the doors are within: this is said, and they are lost.
    cluster.start_again_with(GIVEN).await;
    start(world, &mut miner, USUAL).await;
    until("the agent warns", async || {
        miner.said().contains(WARNING).then_some(())
    })
    .await;
    doors_work(world, &miner, USUAL, &images, &first).await;
    let taken = cluster.take_all_but(PORTS_OF_A_CHUTE, ports(GIVEN)).await;
    world.until_they_lead_to_the_pod(&taken).await;
    for door in [USUAL.registry, USUAL.api, USUAL.proof] {
        assert!(taken.contains(&door), "{door}");
    }
    doors_are_lost(world, USUAL);
    assert!(images.pull(&first).await.is_err(), "it comes from the pod");
    miner.stop().await;

    // The doors move outside.
    start(world, &mut miner, MOVED).await;
    validator.publish("second").await;
    let second = cluster.image_of_pod_after(1).await;
    assert_eq!(second, name(MOVED));
    cluster.must_be_full(ports(GIVEN)).await;
    doors_work(world, &miner, MOVED, &images, &second).await;
    doors_are_lost(world, USUAL);
    let said = miner.said();
    assert!(!said.contains(WARNING), "{said}");
    miner.stop().await;
    cluster.stop().await;
}
