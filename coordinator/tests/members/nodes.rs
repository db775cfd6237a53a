//! Nodes that enter by themselves, with a Kubernetes cluster that the test plays: its words are what counts, and the
//! leader tells it where the members are.

use std::sync::Arc;

use coordinator::clock::{Clock as _, WallClock};
use coordinator::identity::{HostKey, Identity};
use coordinator::join::client;
use coordinator::join::node::{Error, Node, Nodes, Notice};
use coordinator::join::wire::{Enter, Granted, Question};
use coordinator::store::BoxFuture;
use protocol::hotkey::Signer;
use protocol::time::UnixMillis;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::cluster::Host;
use super::{PATIENCE, until};

/// Takes the token `NAME/UID` for a host and `NAME/UID/member` for a member; keeps what it is told.
#[derive(Debug)]
struct Cluster {
    told: watch::Sender<Option<Notice>>,
}

impl Cluster {
    fn new() -> Arc<Self> {
        let told = watch::Sender::new(None);
        Arc::new(Self { told })
    }

    async fn until_told(&self, is_so: impl Fn(&Notice) -> bool) -> Notice {
        let mut told = self.told.subscribe();
        let waited =
            tokio::time::timeout(PATIENCE, told.wait_for(|now| now.as_ref().is_some_and(&is_so))).await;
        let found = waited.expect("it is told in time").expect("it is there").clone();
        found.expect("some")
    }
}

impl Nodes for Cluster {
    fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Node, Error>> {
        let words: Vec<&str> = token.split('/').collect();
        let node = |name: &str, uid: &str, member| Node {
            name: name.to_owned(),
            uid: uid.to_owned(),
            member,
        };
        let answer = match words[..] {
            [name, uid] => Ok(node(name, uid, false)),
            [name, uid, "member"] => Ok(node(name, uid, true)),
            ["away"] => Err(Error::Unavailable("the API server is away".to_owned())),
            _ => Err(Error::Refused("this is no token".to_owned())),
        };
        Box::pin(async { answer })
    }

    fn tell<'a>(&'a self, notice: &'a Notice) -> BoxFuture<'a, Result<(), Error>> {
        self.told.send_replace(Some(notice.clone()));
        Box::pin(async { Ok(()) })
    }
}

fn notice(of: &Host) -> Notice {
    let identity = Identity::of_host(&of.identity()).expect("it has one");
    Notice {
        cluster: "test".to_owned(),
        miner: of.miner(),
        authorities: identity.trusted(),
        doors: vec![of.door.to_string()],
    }
}

fn wish(host: &Host, token: &str) -> Enter {
    Enter {
        token: token.to_owned(),
        site: String::new(),
        address: host.door.to_string(),
        public_key: HostKey::open_or_make(&host.identity()).expect("a key").public(),
        hotkey: Some(host.miner()),
        clock: WallClock.now(),
    }
}

async fn ask(of: &Host, enter: Enter) -> Result<Granted, client::Error> {
    client::enter(&notice(of), &Question::Enter(Box::new(enter))).await
}

async fn refused(of: &Host, why: &str, enter: Enter) {
    let answer = ask(of, enter).await;
    let error = answer
        .err()
        .unwrap_or_else(|| panic!("not refused: {why}"))
        .to_string();
    assert!(error.contains(why), "{why} is not in: {error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cluster_of_kubernetes_says_who_a_node_is() {
    let mut first = Host::new(1);
    first.found();
    first.start();
    until("the cluster is founded", async || first.leader().await).await;
    let other = Host::new(2);
    refused(&first, "knows of no Kubernetes cluster", wish(&other, "gpu-7/u")).await;
    first.stop().await;
    first.nodes = Some(Cluster::new());
    first.start();
    until("it leads", async || first.leader().await).await;

    let away = ask(&first, wish(&other, "away")).await;
    let Err(client::Error::Unreachable(reasons)) = away else {
        panic!("it is worth another try: {away:?}");
    };
    assert!(reasons[0].contains("the API server is away"), "{reasons:?}");
    refused(&first, "this is no token", wish(&other, "hello")).await;
    let mut late = wish(&other, "gpu-7/u");
    late.clock = UnixMillis(late.clock.0 - 3_600_000);
    refused(&first, "clock is 36", late).await;
    let mut foreign = wish(&other, "gpu-7/u");
    foreign.hotkey = Some(Signer::from_seed(&[9; 32]).hotkey().clone());
    refused(&first, "one cluster is one hotkey", foreign).await;
    let mut mute = wish(&other, "voter/u/member");
    mute.hotkey = None;
    refused(&first, "need the miner's seed", mute).await;
    let mut crooked = wish(&other, "gpu-7/u");
    crooked.address = "a\nb".to_owned();
    refused(&first, "address is no word", crooked).await;
    refused(&first, "belongs to the host host-1", wish(&other, "host-1/u")).await;
    let hosts = first
        .ask(Method::GET, "/hosts", &Value::Null)
        .await
        .expect("it answers");
    assert_eq!(hosts.as_array().map(Vec::len), Some(1), "nobody is in: {hosts}");

    // It has the seed, and is no member all the same.
    let granted = ask(&first, wish(&other, "gpu-7/u")).await.expect("it is a node");
    assert_eq!(granted.admission.member, None);
    assert!(granted.admission.server.as_str().starts_with("gpu-7-"));
    let again = ask(&first, wish(&other, "gpu-7/u"))
        .await
        .expect("the answer was lost");
    assert_eq!(again.admission.server, granted.admission.server);
    // The account of its pod is another one now: a host stays what it was let in as.
    let now = ask(&first, wish(&other, "gpu-7/u/member"))
        .await
        .expect("it is in");
    assert_eq!(now.admission.member, None);

    let third = Host::new(3);
    refused(&first, "with a key that it has lost", wish(&third, "gpu-7/u")).await;
    refused(&first, "deleted and made again", wish(&third, "gpu-7/v")).await;
    let granted = ask(&first, wish(&third, "voter/u/member"))
        .await
        .expect("it is a node");
    assert_eq!(granted.admission.member, Some(2));
    first.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_leads_tells_where_the_members_are() {
    let cluster = Cluster::new();
    let mut hosts = [1, 2, 3].map(Host::new);
    for host in &mut hosts {
        host.nodes = Some(Arc::clone(&cluster) as Arc<dyn Nodes>);
    }
    let [first, second, third] = &mut hosts;
    first.found();
    first.start();
    let told = cluster
        .until_told(|told| told.doors == [first.door.to_string()])
        .await;
    assert_eq!(told.authorities, notice(first).authorities);
    assert_eq!(told.miner, first.miner());
    for host in [&mut *second, &mut *third] {
        let token = first.invite(json!({ "eligible": true })).await;
        host.join(&token).await.expect("it is invited");
        host.start();
    }
    cluster.until_told(|told| told.doors.len() == 3).await;
    until("three vote", async || {
        (first.voters().await.len() == 3).then_some(())
    })
    .await;

    let rotated = second.ask(Method::POST, "/v1/ca/rotate", &Value::Null).await;
    assert!(rotated.is_ok(), "{rotated:?}");
    cluster.until_told(|told| told.authorities.len() == 2).await;

    // The next leader goes on with it.
    first.stop().await;
    until("another one leads", async || {
        second.leader().await.filter(|leader| leader != "host-1")
    })
    .await;
    let gone = second.ask(Method::DELETE, "/hosts/host-1", &Value::Null).await;
    assert!(gone.is_ok(), "{gone:?}");
    cluster.until_told(|told| told.doors.len() == 2).await;
    for host in [second, third] {
        host.stop().await;
    }
}
