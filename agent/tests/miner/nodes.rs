//! Nodes of a Kubernetes cluster that several hosts share enter by themselves: a real API server, one release of the
//! chart, its own configuration files, accounts and rights, and the tokens that a kubelet would mount.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use coordinator::clock::{Clock as _, WallClock};
use coordinator::join::{Admission, admission};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenReview};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod, Secret, ServiceAccount};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::wait::await_condition;
use kube::{Api, Client, ResourceExt as _};
use protocol::hotkey::Signer;
use protocol::id::ServerId;
use reqwest::{Method, StatusCode};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;
use validator_stand_in::scenario::DEVELOPMENT_MINER_SEED;

use super::cluster::Ports;
use super::control_plane::{ControlPlane, programs};
use super::signed::signed;
use super::{PATIENCE, alone, until};

mod tested;

use tested::tested;

const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/chutes-miner");
const VALIDATOR: &str = "5Dt7HZ7Zpw4DppPxFM7Ke3Cm7sDAWhsZXmM5ZAmE7dSVJbcQ";
const MINER: &str = "miner";
const CHUTES: &str = "chutes-shared";
const MEMBERS: &str = "gpu-chutes-miner-members";
const HOSTS: &str = "gpu-chutes-miner-hosts";
const NOTICE: &str = "gpu-chutes-miner-cluster";

fn object<K: serde::de::DeserializeOwned>(value: Value) -> K {
    serde_json::from_value(value).expect("a good object")
}

/// A cluster of Kubernetes with one release.
struct Shared {
    plane: ControlPlane,
    folder: TempDir,
    key: Signer,
    audience: String,
    http: reqwest::Client,
}

/// An agent's data on a node.
struct Home {
    folder: PathBuf,
    ports: Ports,
}

impl Home {
    fn admission(&self) -> Option<Admission> {
        Admission::read(&self.folder.join("data/host")).expect("it can be read")
    }

    fn give(&self, token: &str) {
        std::fs::write(self.folder.join("token"), token).expect("our own folder");
    }

    /// What the init container does.
    fn entering(&self) -> Command {
        let mut enter = Command::new(env!("CARGO_BIN_EXE_chutes-agent"));
        enter
            .arg("--config")
            .arg(self.folder.join("config.toml"))
            .arg("enter");
        enter.kill_on_drop(true);
        enter
    }

    /// What it says, and whether it goes well.
    async fn enter(&self) -> (bool, String) {
        self.enter_with(&[]).await
    }

    async fn enter_with(&self, arguments: &[&str]) -> (bool, String) {
        let done = timeout(PATIENCE * 2, self.entering().args(arguments).output()).await;
        let done = done.expect("it ends").expect("the program runs");
        let said = [done.stdout, done.stderr].concat();
        (done.status.success(), String::from_utf8_lossy(&said).into_owned())
    }

    async fn enters(&self) -> String {
        let (well, said) = self.enter().await;
        assert!(well, "{said}");
        said
    }

    async fn is_refused(&self, why: &str) {
        let (well, said) = self.enter_with(&["--patience", "1s"]).await;
        assert!(!well && said.contains(why), "not for {why:?}: {said}");
        assert_eq!(self.admission(), None);
    }

    fn run(&self) -> Child {
        let log = std::fs::File::create(self.folder.join("log")).expect("our own folder");
        Command::new(env!("CARGO_BIN_EXE_chutes-agent"))
            .arg("--config")
            .arg(self.folder.join("config.toml"))
            .arg("run")
            .stdin(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .expect("the program runs")
    }
}

impl Shared {
    async fn start(programs: PathBuf) -> Self {
        let plane = ControlPlane::start(programs).await;
        let key = Signer::from_seed_hex(DEVELOPMENT_MINER_SEED).expect("a seed");
        let hotkey = format!("miner.hotkey={}", key.hotkey());
        let namespace = format!("runtime.namespace={CHUTES}");
        let validator = format!(
            "validators.supported[0].hotkey={VALIDATOR},validators.supported[0].api=http://127.0.0.1:9,\
             validators.supported[0].socket=ws://127.0.0.1:9,validators.supported[0].registry=http://127.0.0.1:9"
        );
        let values = [
            "cluster.shared=true",
            "miner.seedSecret=seed",
            "coordinator.chutes=false",
            "proof.backend=cpu",
            &hotkey,
            &namespace,
            &validator,
        ];
        let notes = plane
            .install(("gpu", CHART), MINER, &values)
            .await
            .expect("it installs");
        assert!(
            notes.contains("node-restriction.kubernetes.io/chutes-member=true"),
            "{notes}"
        );
        Self {
            plane,
            folder: tempfile::tempdir().expect("a temporary folder"),
            audience: format!("chutes-miner:{}:{MINER}/gpu-chutes-miner", key.hotkey()),
            key,
            http: reqwest::Client::builder().no_proxy().build().expect("a client"),
        }
    }

    fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.plane.client.clone(), MINER)
    }

    async fn node(&self, name: &str) {
        let nodes: Api<Node> = Api::all(self.plane.client.clone());
        let node = object(json!({ "metadata": { "name": name } }));
        nodes
            .create(&PostParams::default(), &node)
            .await
            .expect("it works");
    }

    /// The pod that the DaemonSet of this account would have on a node.
    async fn pod(&self, node: &str, account: &str) {
        let sets: Api<DaemonSet> = self.api();
        let set = sets.get(account).await.expect("one of the release");
        let spec = set.spec.and_then(|spec| spec.template.spec).expect("it has one");
        assert_eq!(spec.service_account_name.as_deref(), Some(account));
        let init = spec
            .init_containers
            .iter()
            .flatten()
            .next()
            .expect("it enters first");
        let last = init.args.iter().flatten().next_back();
        assert_eq!(last.map(String::as_str), Some("enter"));
        let volumes = json!(spec.volumes);
        let has = |text: &str| volumes.to_string().contains(text);
        assert!(has(&format!("\"audience\":\"{}\"", self.audience)), "{volumes}");
        assert_eq!(has("\"secretName\":\"seed\""), account == MEMBERS, "{volumes}");
        let (chosen, kept_off) = (json!(spec.node_selector), json!(spec.affinity));
        let place = if account == MEMBERS { chosen } else { kept_off };
        let place = place.to_string();
        assert!(
            place.contains("node-restriction.kubernetes.io/chutes-member"),
            "{place}"
        );
        assert!(account == MEMBERS || place.contains("\"NotIn\""), "{place}");
        let pod = object(json!({
            "metadata": { "name": format!("{account}-{node}") },
            "spec": { "serviceAccountName": account, "nodeName": node, "containers": [{ "name": "agent", "image": "a" }] },
        }));
        let pods: Api<Pod> = self.api();
        pods.create(&PostParams::default(), &pod).await.expect("it works");
    }

    async fn forget(&self, node: &str, account: &str) {
        let pods: Api<Pod> = self.api();
        let now = DeleteParams::default().grace_period(0);
        pods.delete(&format!("{account}-{node}"), &now)
            .await
            .expect("it goes");
    }

    /// A token as a kubelet asks for it.
    async fn token(&self, account: &str, pod: Option<&str>, audience: Option<&str>) -> String {
        let mut spec =
            json!({ "audiences": audience.into_iter().collect::<Vec<_>>(), "expirationSeconds": 600 });
        if let Some(pod) = pod {
            spec["boundObjectRef"] = json!({ "kind": "Pod", "apiVersion": "v1", "name": pod });
        }
        let wanted: TokenRequest = object(json!({ "metadata": {}, "spec": spec }));
        let accounts: Api<ServiceAccount> = self.api();
        let made = accounts
            .create_token_request(account, &PostParams::default(), &wanted)
            .await;
        made.expect("it works").status.expect("it was given").token
    }

    async fn token_of(&self, node: &str, account: &str) -> String {
        let pod = format!("{account}-{node}");
        self.token(account, Some(&pod), Some(&self.audience)).await
    }

    /// A client with the rights of an agent's pod.
    async fn client_of(&self, node: &str, account: &str) -> Client {
        let pod = format!("{account}-{node}");
        let token = self.token(account, Some(&pod), None).await;
        self.plane.client_of(&token).expect("a good configuration")
    }

    /// Data of an agent on a node: the chart's configuration, with paths and ports that this machine has.
    async fn home(&self, name: &str, node: &str, account: &str) -> Home {
        let folder = self.folder.path().join(name);
        std::fs::create_dir(&folder).expect("our own folder");
        let home = Home {
            ports: Ports::free(),
            folder,
        };
        let pod = format!("{account}-{node}");
        let operator = std::fs::read_to_string(self.plane.kubeconfig()).expect("it is there");
        let mut kubeconfig: Value = serde_json::from_str(&operator).expect("it is JSON");
        kubeconfig["users"][0]["user"]["token"] = json!(self.token(account, Some(&pod), None).await);
        let file = home.folder.join("kubeconfig");
        std::fs::write(&file, kubeconfig.to_string()).expect("our own folder");
        home.give(&self.token_of(node, account).await);
        let seed = home.folder.join("seed");
        write_private(&seed, DEVELOPMENT_MINER_SEED);

        let maps: Api<ConfigMap> = self.api();
        let map = maps.get(account).await.expect("one of the release");
        let text = &map.data.expect("it holds something")["config.toml"];
        let mut config: toml::Table = text.parse().expect("good TOML");
        let path = |name: &str| home.folder.join(name).display().to_string().into();
        config["data"] = path("data");
        let mut set = |section: &str, key: &str, value: toml::Value| {
            let section = config.entry(section).or_insert_with(|| toml::Table::new().into());
            let section = section.as_table_mut().expect("a section");
            section.insert(key.to_owned(), value);
        };
        set("host", "name", node.into());
        set("host", "address", home.ports.api.ip().to_string().into());
        set("nodes", "token_file", path("token"));
        set("runtime", "kubeconfig", path("kubeconfig"));
        set("cache", "directory", path("cache"));
        for (section, address) in [
            ("proof", home.ports.proof),
            ("registry", home.ports.registry),
            ("egress", home.ports.egress),
        ] {
            set(section, "listen", address.to_string().into());
        }
        set("coordinator", "hosts_listen", home.ports.hosts.to_string().into());
        set("coordinator", "api_listen", home.ports.api.to_string().into());
        if account == MEMBERS {
            set("miner", "seed_file", path("seed"));
        }
        std::fs::write(home.folder.join("config.toml"), config.to_string()).expect("our own folder");
        home
    }

    /// A node, its pod and an empty data folder.
    async fn host(&self, node: &str, account: &str) -> Home {
        self.node(node).await;
        self.pod(node, account).await;
        self.home(node, node, account).await
    }

    /// Waits until the notice has so many lines under a key.
    async fn until_notice(&self, key: &'static str, count: usize) -> ConfigMap {
        let is_so = move |map: Option<&ConfigMap>| {
            let text = map.and_then(|map| map.data.as_ref()?.get(key));
            text.is_some_and(|text| text.lines().count() == count)
        };
        let seen = timeout(PATIENCE, await_condition(self.api(), NOTICE, is_so)).await;
        let seen = seen.unwrap_or_else(|_| panic!("the notice never had {count} {key}"));
        seen.expect("it can be watched").expect("it is there")
    }

    async fn ask(&self, home: &Home, method: Method, path: &str) -> (StatusCode, Value) {
        until(&format!("an answer to {path}"), async || {
            let request = signed(
                &self.http,
                &self.key,
                home.ports.api,
                method.clone(),
                path,
                &Value::Null,
            );
            let response = request.send().await.ok()?;
            let (status, text) = (response.status(), response.text().await.ok()?);
            let passes = [StatusCode::SERVICE_UNAVAILABLE, StatusCode::CONFLICT].contains(&status);
            (!passes).then(|| (status, serde_json::from_str(&text).unwrap_or(Value::String(text))))
        })
        .await
    }
}

fn write_private(path: &Path, text: &str) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::write(path, text).expect("our own folder");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).expect("our own file");
}

/// The claims of a token, changed and signed with a key.
fn signed_anew(token: &str, key_pem: &str, change: impl FnOnce(&mut Value)) -> String {
    let mut parts = token.split('.');
    let (header, claims) = (parts.next().expect("a header"), parts.next().expect("claims"));
    let claims = URL_SAFE_NO_PAD.decode(claims).expect("base64");
    let mut claims: Value = serde_json::from_slice(&claims).expect("JSON");
    change(&mut claims);
    let text = format!("{header}.{}", URL_SAFE_NO_PAD.encode(claims.to_string()));
    let key = rcgen::KeyPair::from_pem(key_pem).expect("a key");
    let random = SystemRandom::new();
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &key.serialize_der(), &random);
    let signature = key
        .expect("a key of P-256")
        .sign(&random, text.as_bytes())
        .expect("it signs");
    format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_of_a_shared_cluster_enter_by_themselves() {
    let Some(programs) = programs() else { return };
    let _alone = alone().await;
    let shared = Shared::start(programs).await;
    let first = shared.host("member-1", MEMBERS).await;
    let second = shared.host("member-2", MEMBERS).await;
    let plain = shared.host("gpu-1", HOSTS).await;
    Box::pin(forbidden(&shared)).await;
    Box::pin(interrupted(&shared)).await;

    let (founder, follower, running) = Box::pin(race(&shared, &first, &second, &plain)).await;
    let (helm, said) = Box::pin(tested(&shared, founder, &[])).await;
    assert!(
        helm.is_ok() && said.contains("/ready: ready\n"),
        "{helm:?} {said}"
    );
    let cluster = founder.admission().expect("it has founded").cluster;
    let notice = shared
        .until_notice("doors", 2)
        .await
        .data
        .expect("it says something");
    assert_eq!(notice["cluster"], cluster);
    assert_eq!(notice["miner"], shared.key.hotkey().to_string());
    for home in [founder, follower, &plain] {
        let admission = home.admission().expect("it is in");
        assert_eq!(admission.cluster, cluster);
        let lies = home.folder.join("data/host/ca.key").exists();
        assert!(!lies || home.folder == founder.folder, "who joins founds nothing");
    }
    assert_eq!(plain.admission().and_then(|own| own.member), None);
    assert_eq!(follower.admission().and_then(|own| own.member), Some(2));
    assert!(plain.enters().await.contains("already"), "it is left as it is");

    let mut agent = plain.run();
    until("the host is connected", async || {
        let (_, hosts) = shared.ask(founder, Method::GET, "/hosts").await;
        let rows = hosts.as_array().expect("a list");
        let row = rows
            .iter()
            .find(|row| row["name"] == "gpu-1")
            .expect("it has entered");
        assert_eq!(
            (&row["eligible"], &row["role"]),
            (&json!(false), &json!("observer"))
        );
        (row["connected"] == json!(true)).then_some(())
    })
    .await;

    Box::pin(bad_tokens(&shared)).await;
    Box::pin(lost_disk(&shared, founder, &cluster)).await;
    agent.kill().await.expect("it runs");
    Box::pin(node_made_again(&shared, founder, &plain)).await;

    // The founder of a cluster that never ran goes on as another member.
    let late = shared.host("member-3", MEMBERS).await;
    let folder = late.folder.join("data/host");
    std::fs::create_dir_all(&folder).expect("our own folder");
    let id = ServerId::parse("member-3").expect("an id");
    let door = late.ports.hosts.to_string();
    let own = admission::found(&folder, "late", &id, &door, WallClock.now()).expect("it works");
    let said = late.enters().await;
    assert!(
        said.contains(&own.expect("a cluster").cluster) && said.contains("is thrown away"),
        "{said}"
    );
    assert!(said.contains("as member 3"), "{said}");
    assert!(!folder.join("ca.key").exists(), "it founds nothing any more");

    let (status, answer) = shared.ask(founder, Method::POST, "/v1/ca/rotate").await;
    assert!(status.is_success(), "{status}: {answer}");
    shared.until_notice("authorities", 2).await;
    let maps: Api<ConfigMap> = shared.api();
    maps.delete(NOTICE, &DeleteParams::default())
        .await
        .expect("the operator may");
    let again = shared
        .until_notice("doors", 3)
        .await
        .data
        .expect("it says something");
    assert_eq!(again["cluster"], cluster, "the leader has made it anew");
    let after = shared.host("gpu-9", HOSTS).await;
    assert!(after.enters().await.contains(&cluster), "with two authorities");
    drop(running);
    let (helm, said) = Box::pin(tested(&shared, founder, &["--patience", "1s"])).await;
    let words = "/ready: NOT READY. Nothing listens there";
    assert!(helm.is_err() && said.contains(words), "{helm:?} {said}");
    shared.plane.stop().await;
}

/// Founding may end at any moment and goes on from there; a founder without its disk founds nothing.
async fn interrupted(shared: &Shared) {
    let home = shared.host("member-0", MEMBERS).await;
    assert!(home.enters().await.contains("founded the cluster"));
    let founded = home.admission().expect("it has founded");
    // After everything was done.
    assert!(home.enters().await.contains("already"));
    // Between the cluster on the disk and the notice.
    let maps: Api<ConfigMap> = shared.api();
    maps.delete(NOTICE, &DeleteParams::default())
        .await
        .expect("the operator may");
    assert!(home.enters().await.contains(&founded.cluster));
    assert_eq!(home.admission(), Some(founded.clone()));
    // Between the authority and the admission: nobody knows of what was made by then.
    maps.delete(NOTICE, &DeleteParams::default())
        .await
        .expect("the operator may");
    std::fs::remove_file(home.folder.join("data/host/admission.json")).expect("our own file");
    assert!(home.enters().await.contains("founded the cluster"));
    let again = home.admission().expect("it has founded");
    assert_ne!(again.cluster, founded.cluster);

    let empty = shared.home("without-disk", "member-0", MEMBERS).await;
    empty.is_refused("no second one is founded beside it").await;
    let notice = shared
        .until_notice("doors", 1)
        .await
        .data
        .expect("it says something");
    assert_eq!(notice["cluster"], again.cluster);
    // Of another miner.
    let mut other: toml::Table = std::fs::read_to_string(empty.folder.join("config.toml"))
        .expect("it is there")
        .parse()
        .expect("good TOML");
    let stranger = Signer::from_seed(&[9; 32]).hotkey().to_string();
    other["miner"]["hotkey"] = stranger.into();
    std::fs::write(empty.folder.join("config.toml"), other.to_string()).expect("our own folder");
    empty.is_refused("one cluster is one hotkey").await;
    maps.delete(NOTICE, &DeleteParams::default())
        .await
        .expect("the operator may");
}

/// A plain node waits, then two members' nodes start at the same moment. The founder, the other one, their agents.
async fn race<'a>(
    shared: &Shared,
    first: &'a Home,
    second: &'a Home,
    plain: &Home,
) -> (&'a Home, &'a Home, Vec<Child>) {
    let waiting = plain.entering().stdout(Stdio::piped()).spawn();
    let mut waiting = waiting.expect("the program runs");
    let mut lines = BufReader::new(waiting.stdout.take().expect("piped")).lines();
    let said = timeout(PATIENCE, lines.next_line())
        .await
        .expect("it says something");
    let said = said.expect("the pipe can be read").unwrap_or_default();
    assert!(
        said.contains("waiting for a member to make the ConfigMap"),
        "{said}"
    );

    let entering = async {
        let (mut one, mut other) = (Box::pin(first.enters()), Box::pin(second.enters()));
        let (said, founder, follower, rest) = tokio::select! {
            said = &mut one => (said, first, second, other),
            said = &mut other => (said, second, first, one),
        };
        assert!(said.contains("founded the cluster"), "{said}");
        let agent = founder.run();
        let said = rest.await;
        assert!(said.contains("as member 2"), "{said}");
        let maps: Api<ConfigMap> = shared.api();
        let notices = maps.list(&ListParams::default()).await.expect("it answers");
        assert_eq!(notices.iter().filter(|map| map.name_any() == NOTICE).count(), 1);
        (founder, follower, vec![agent, follower.run()])
    };
    let entered = entering.await;
    let ended = timeout(PATIENCE, waiting.wait()).await.expect("it ends");
    assert!(ended.expect("it is ours").success(), "it has joined");
    entered
}

/// Every token that is not this release's, in its time, of a pod that exists, is refused with the reason.
async fn bad_tokens(shared: &Shared) {
    let home = shared.host("gpu-2", HOSTS).await;
    let pod = format!("{HOSTS}-gpu-2");
    let good = shared.token_of("gpu-2", HOSTS).await;
    let (bound, audience) = (Some(pod.as_str()), Some(shared.audience.as_str()));
    let not_taken = "the API server does not take the token";

    home.give(&shared.token(HOSTS, bound, Some("chutes-miner:another")).await);
    home.is_refused("audience").await;
    home.give(&shared.token(HOSTS, bound, None).await);
    home.is_refused("audience").await;
    home.give(&shared.token(HOSTS, None, audience).await);
    home.is_refused("not bound to a pod").await;
    home.give("no token");
    home.is_refused(not_taken).await;

    let folder = shared.plane.kubeconfig();
    let key = folder.parent().expect("a folder").join("accounts.key");
    let key = std::fs::read_to_string(key).expect("it is there");
    home.give(&signed_anew(&good, &key, |claims| {
        let past = claims["exp"].as_u64().expect("a time") - 100_000;
        claims["exp"] = json!(past);
        for earlier in ["iat", "nbf"] {
            claims[earlier] = json!(past - 600);
        }
    }));
    home.is_refused("expired").await;
    let foreign = rcgen::KeyPair::generate().expect("a key").serialize_pem();
    home.give(&signed_anew(&good, &foreign, |_| {}));
    home.is_refused(not_taken).await;

    let accounts: Api<ServiceAccount> = shared.api();
    let other = object(json!({ "metadata": { "name": "other" } }));
    accounts
        .create(&PostParams::default(), &other)
        .await
        .expect("it works");
    let pods: Api<Pod> = shared.api();
    for (name, account) in [("other", "other"), ("gone", HOSTS)] {
        let pod = object(json!({
            "metadata": { "name": name },
            "spec": { "serviceAccountName": account, "nodeName": "gpu-2", "containers": [{ "name": "c", "image": "i" }] },
        }));
        pods.create(&PostParams::default(), &pod).await.expect("it works");
    }
    home.give(&shared.token("other", Some("other"), audience).await);
    home.is_refused("may enter").await;
    home.give(&shared.token(HOSTS, Some("gone"), audience).await);
    let now = DeleteParams::default().grace_period(0);
    pods.delete("gone", &now).await.expect("it goes");
    home.is_refused(not_taken).await;

    // A host that says that it is a member, with the seed and all, is none.
    let mut config = std::fs::read_to_string(home.folder.join("config.toml")).expect("it is there");
    let seed = home.folder.join("seed");
    config = config.replace("enabled = false", "enabled = true").replace(
        "[miner]\n",
        &format!("[miner]\nseed_file = \"{}\"\n", seed.display()),
    );
    std::fs::write(home.folder.join("config.toml"), config).expect("our own folder");
    // Signed anew without a change it is good: the refusals above were for what was changed.
    home.give(&signed_anew(&good, &key, |_| {}));
    let said = home.enters().await;
    assert!(said.contains("as a host without a vote"), "{said}");

    // A member that has not the seed is no member either.
    let mute = shared.host("member-9", MEMBERS).await;
    let text = std::fs::read_to_string(mute.folder.join("config.toml")).expect("it is there");
    let mut config: toml::Table = text.parse().expect("good TOML");
    config["miner"]
        .as_table_mut()
        .expect("a section")
        .remove("seed_file");
    std::fs::write(mute.folder.join("config.toml"), config.to_string()).expect("our own folder");
    mute.is_refused("need the miner's seed").await;
}

/// A founder without its data does not found again.
async fn lost_disk(shared: &Shared, founder: &Home, cluster: &str) {
    let node = if founder.folder.ends_with("member-1") {
        "member-1"
    } else {
        "member-2"
    };
    let empty = shared.home("empty", node, MEMBERS).await;
    empty
        .is_refused("has entered before, with a key that it has lost")
        .await;
    let notice = shared
        .until_notice("doors", 2)
        .await
        .data
        .expect("it says something");
    assert_eq!(notice["cluster"], cluster);
}

/// A node that was deleted and made again is another host, which waits until the one of before is removed.
async fn node_made_again(shared: &Shared, founder: &Home, before: &Home) {
    let nodes: Api<Node> = Api::all(shared.plane.client.clone());
    nodes
        .delete("gpu-1", &DeleteParams::default())
        .await
        .expect("it goes");
    shared.forget("gpu-1", HOSTS).await;
    shared.node("gpu-1").await;
    shared.pod("gpu-1", HOSTS).await;
    let again = shared.home("gpu-1-again", "gpu-1", HOSTS).await;
    again.is_refused("if the node was deleted and made again").await;
    let (status, answer) = shared.ask(founder, Method::DELETE, "/hosts/gpu-1").await;
    assert!(status.is_success(), "{status}: {answer}");
    again.enters().await;
    let (old, new) = (
        before.admission().expect("it was in"),
        again.admission().expect("it is in"),
    );
    assert_ne!(old.server, new.server);
}

/// What the two accounts must not be able to do besides what the chart's own test tries.
async fn forbidden(shared: &Shared) {
    let post = PostParams::default();
    let map = |name: &str| -> ConfigMap {
        object(
            json!({ "metadata": { "name": name, "labels": { "chutes/code": "true" } }, "data": { "cluster": "c" } }),
        )
    };
    let member = shared.client_of("member-1", MEMBERS).await;
    let host = shared.client_of("gpu-1", HOSTS).await;
    let maps = |client: &Client| -> Api<ConfigMap> { Api::namespaced(client.clone(), MINER) };
    let dry = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    until("the admission policy is in force", async || {
        maps(&member)
            .create(&dry, &map("other"))
            .await
            .is_err()
            .then_some(())
    })
    .await;
    let made = maps(&member).create(&dry, &map(NOTICE)).await;
    assert!(made.is_ok(), "a member may make the notice: {made:?}");
    let review: TokenReview = object(json!({ "metadata": {}, "spec": { "token": "t" } }));
    let reviews = |client: &Client| -> Api<TokenReview> { Api::all(client.clone()) };
    let asked = reviews(&member).create(&post, &review).await;
    assert!(asked.is_ok(), "a member may ask whose token it is: {asked:?}");

    // As if a member had made it.
    let operator: Api<ConfigMap> = shared.api();
    operator
        .create(&post, &map(NOTICE))
        .await
        .expect("the operator may");
    let (delete, list, patch) = (
        DeleteParams::default(),
        ListParams::default(),
        PatchParams::default(),
    );
    let change = Patch::Merge(json!({ "data": { "cluster": "mine" } }));
    let mut tried: Vec<(&str, kube::Result<()>)> = Vec::new();
    let mut present = operator.get(NOTICE).await.expect("it is there");
    present.data = None;
    let written = maps(&member).replace(NOTICE, &dry, &present).await;
    assert!(written.is_ok(), "a member may change the notice: {written:?}");
    tried.push((
        "change the notice, as a host",
        maps(&host).replace(NOTICE, &post, &present).await.map(drop),
    ));
    tried.push((
        "make the notice, as a host",
        maps(&host).create(&dry, &map("fresh")).await.map(drop),
    ));
    tried.push((
        "ask whose token it is, as a host",
        reviews(&host).create(&post, &review).await.map(drop),
    ));
    for (who, client) in [("a member", &member), ("a host", &host)] {
        let read = maps(client).get(NOTICE).await;
        assert!(read.is_ok(), "{who} may read the notice: {read:?}");
        let secrets: Api<Secret> = Api::namespaced(client.clone(), MINER);
        let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), MINER);
        let pods: Api<Pod> = Api::namespaced(client.clone(), MINER);
        let namespaces: Api<Namespace> = Api::all(client.clone());
        let request: TokenRequest =
            object(json!({ "metadata": {}, "spec": { "audiences": [shared.audience] } }));
        let pod = object(json!({ "metadata": { "name": "mine" },
            "spec": { "serviceAccountName": MEMBERS, "containers": [{ "name": "c", "image": "i" }] } }));
        tried.extend([
            (
                "make another ConfigMap beside it",
                maps(client).create(&post, &map("other")).await.map(drop),
            ),
            (
                "patch the notice",
                maps(client).patch(NOTICE, &patch, &change).await.map(drop),
            ),
            (
                "delete the notice",
                maps(client).delete(NOTICE, &delete).await.map(drop),
            ),
            ("list ConfigMaps", maps(client).list(&list).await.map(drop)),
            (
                "read the configuration",
                maps(client).get(MEMBERS).await.map(drop),
            ),
            ("read the seed", secrets.get("seed").await.map(drop)),
            ("list Secrets", secrets.list(&list).await.map(drop)),
            (
                "make a member's token",
                accounts
                    .create_token_request(MEMBERS, &post, &request)
                    .await
                    .map(drop),
            ),
            ("make a member's pod", pods.create(&post, &pod).await.map(drop)),
            ("list pods beside it", pods.list(&list).await.map(drop)),
            ("list namespaces", namespaces.list(&list).await.map(drop)),
        ]);
    }
    for (what, result) in &tried {
        let refused = matches!(result, Err(kube::Error::Api(status)) if matches!(status.code, 403 | 422));
        assert!(refused, "an agent may not {what}: {result:?}");
    }
    assert!(tried.len() >= 25, "{}", tried.len());
    operator.delete(NOTICE, &delete).await.expect("the operator may");
}
