//! The Kubernetes cluster whose nodes enter by themselves: whose token a pod shows, and the `ConfigMap` that says
//! where the members are. What is made of it is decided elsewhere ([`coordinator::join::node`]).

use std::path::PathBuf;
use std::time::Duration;

use coordinator::join::node::{Error, Node, Nodes, Notice};
use coordinator::store::BoxFuture;
use futures_util::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::PostParams;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client};
use protocol::hotkey::Hotkey;
use tokio::time::timeout;

/// How long one call may take; less than the host that asks waits for an answer.
const CALL_MAX: Duration = Duration::from_secs(5);
/// What the API server says of a token's owner besides the account's name.
const POD: &str = "authentication.kubernetes.io/pod-name";
const NODE: &str = "authentication.kubernetes.io/node-name";
const NODE_UID: &str = "authentication.kubernetes.io/node-uid";

/// Names in that cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Of the `ConfigMap`.
    pub config_map: String,
    /// Of its namespace and the accounts'.
    pub namespace: String,
    /// Of the account of members' pods.
    pub member_account: String,
    /// Of the account of other hosts' pods.
    pub host_account: String,
    /// For whom the tokens are made.
    pub audience: String,
    /// File with the token of this pod.
    pub token_file: Option<PathBuf>,
    /// File that names the cluster; the surroundings when absent.
    pub kubeconfig: Option<PathBuf>,
}

impl Config {
    /// The `ConfigMap` as people are told of it.
    #[must_use]
    pub fn notice_name(&self) -> String {
        format!("ConfigMap {}/{}", self.namespace, self.config_map)
    }
}

/// The cluster.
#[derive(Clone)]
pub struct Cluster {
    config: Config,
    client: Client,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Cluster").field(&self.config).finish()
    }
}

impl Cluster {
    /// Does not ask the API server yet.
    ///
    /// # Errors
    /// No cluster is named, or none that can be used.
    pub async fn connect(config: Config) -> Result<Self, runtime::Error> {
        let client = runtime::kubernetes::client(config.kubeconfig.as_deref()).await?;
        Ok(Self { config, client })
    }

    fn notices(&self) -> Api<ConfigMap> {
        Api::namespaced(self.client.clone(), &self.config.namespace)
    }

    /// What the API server did not do, in words.
    fn trouble(&self, doing: &str, error: &kube::Error) -> Error {
        let what = format!("{doing} {}: {}", self.config.notice_name(), words(error));
        match error {
            kube::Error::Api(status) if status.code == 403 => {
                Error::Refused(format!("{what}: is the chart's role in place?"))
            }
            _ => Error::Unavailable(what),
        }
    }

    async fn read(&self) -> Result<Option<ConfigMap>, Error> {
        let doing = "read the";
        let read = in_time(self.notices().get_opt(&self.config.config_map)).await?;
        read.map_err(|error| self.trouble(doing, &error))
    }

    /// What the notice says, if it is there.
    ///
    /// # Errors
    /// It cannot be read, or says something else.
    pub async fn notice(&self) -> Result<Option<Notice>, Error> {
        let map = self.read().await?;
        map.map(|map| parse(&self.config, &map)).transpose()
    }

    /// Waits until there is a notice.
    ///
    /// # Errors
    /// As [`Self::notice`].
    pub async fn until_notice(&self) -> Result<Notice, Error> {
        let (api, name) = (self.notices(), &self.config.config_map);
        let mut seen = watcher::watch_object(api, name).default_backoff().boxed();
        loop {
            match seen.try_next().await {
                Ok(Some(Some(map))) => return parse(&self.config, &map),
                // It is watched again, after a pause.
                Ok(Some(None)) | Err(_) => {}
                Ok(None) => return Err(Error::Unavailable("the watch has ended".to_owned())),
            }
        }
    }

    /// Makes the notice; false if there is one already.
    ///
    /// # Errors
    /// It cannot be made.
    pub async fn found(&self, notice: &Notice) -> Result<bool, Error> {
        let (api, map, how) = (
            self.notices(),
            written(&self.config, notice),
            PostParams::default(),
        );
        match in_time(api.create(&how, &map)).await? {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(self.trouble("make the", &error)),
        }
    }

    async fn make_say(&self, notice: &Notice) -> Result<(), Error> {
        let Some(present) = self.read().await? else {
            self.found(notice).await?;
            return Ok(());
        };
        let says = parse(&self.config, &present)?;
        is_ours(&self.config, &says, notice)?;
        if says == *notice {
            return Ok(());
        }
        let mut wanted = written(&self.config, notice);
        // Whoever changed it in between has looked as well.
        wanted.metadata.resource_version = present.metadata.resource_version;
        let (api, how) = (self.notices(), PostParams::default());
        let written = in_time(api.replace(&self.config.config_map, &how, &wanted)).await?;
        written
            .map(drop)
            .map_err(|error| self.trouble("change the", &error))
    }

    async fn ask(&self, token: &str) -> Result<Node, Error> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                audiences: Some(vec![self.config.audience.clone()]),
                token: Some(token.to_owned()),
            },
            ..TokenReview::default()
        };
        let (api, how): (Api<TokenReview>, _) = (Api::all(self.client.clone()), PostParams::default());
        let answer = in_time(api.create(&how, &review)).await?;
        let answer = answer.map_err(|error| {
            Error::Unavailable(format!(
                "the API server does not say whose token this is: {}",
                words(&error)
            ))
        })?;
        owner(&self.config, answer.status.unwrap_or_default())
    }
}

/// What a notice says.
fn parse(config: &Config, map: &ConfigMap) -> Result<Notice, Error> {
    let damaged = |key: &str| {
        let name = config.notice_name();
        Error::Refused(format!(
            "{name} has no good {key}: it is not one of chutes-agent, or somebody has changed it. If it is to be \
             kept, name another one (nodes.config_map); if not, delete it, and a member writes it anew"
        ))
    };
    let data = map.data.as_ref();
    let of = |key: &str| data.and_then(|data| data.get(key)).ok_or_else(|| damaged(key));
    let lines = |text: &String| -> Vec<String> { text.lines().map(str::to_owned).collect() };
    let authorities = lines(of("authorities")?).into_iter().map(|line| {
        let mut hash = [0; 32];
        let read = hex::decode_to_slice(line.trim(), &mut hash);
        read.map(|()| hash).map_err(|_| damaged("authorities"))
    });
    Ok(Notice {
        cluster: of("cluster")?.clone(),
        miner: Hotkey::parse(of("miner")?).map_err(|_| damaged("miner"))?,
        authorities: authorities.collect::<Result<_, _>>()?,
        doors: lines(of("doors")?),
    })
}

/// A notice that says this.
fn written(config: &Config, notice: &Notice) -> ConfigMap {
    let authorities: Vec<String> = notice.authorities.iter().map(hex::encode).collect();
    let data = [
        ("cluster", notice.cluster.clone()),
        ("miner", notice.miner.to_string()),
        ("authorities", authorities.join("\n")),
        ("doors", notice.doors.join("\n")),
    ];
    ConfigMap {
        metadata: ObjectMeta {
            name: Some(config.config_map.clone()),
            ..ObjectMeta::default()
        },
        data: Some(data.map(|(key, text)| (key.to_owned(), text)).into()),
        ..ConfigMap::default()
    }
}

/// Refuses to write over what is not this cluster's.
fn is_ours(config: &Config, says: &Notice, notice: &Notice) -> Result<(), Error> {
    if says.cluster == notice.cluster && says.miner == notice.miner {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "{} is of the cluster {} of the miner {}, and this one is {}: if that one is no more, delete it",
        config.notice_name(),
        says.cluster,
        says.miner,
        notice.cluster
    )))
}

/// The node whose agent has this token, by what the API server says of it.
fn owner(config: &Config, status: TokenReviewStatus) -> Result<Node, Error> {
    let refused = |why: String| Err(Error::Refused(why));
    if status.authenticated != Some(true) {
        return refused(format!(
            "the API server does not take the token of the pod ({}): it must be one of this Kubernetes cluster, made \
             for the audience {}, and in its time",
            status.error.as_deref().unwrap_or("it says no more"),
            config.audience
        ));
    }
    // An API server that knows nothing of audiences says none.
    if !status
        .audiences
        .iter()
        .flatten()
        .any(|one| *one == config.audience)
    {
        return refused(format!(
            "the token of the pod is not made for the audience {}",
            config.audience
        ));
    }
    let user = status.user.unwrap_or_default();
    let name = user.username.unwrap_or_default();
    let account = |account: &str| format!("system:serviceaccount:{}:{account}", config.namespace);
    let member = name == account(&config.member_account);
    if !member && name != account(&config.host_account) {
        return refused(format!(
            "the token is of {name}, and only pods of {} and {} may enter",
            account(&config.member_account),
            account(&config.host_account)
        ));
    }
    let extra = user.extra.unwrap_or_default();
    let said = |key: &str| Some(extra.get(key)?.first()?.clone()).filter(|text| !text.is_empty());
    if said(POD).is_none() {
        return refused(format!(
            "the token of {name} is not bound to a pod: only one that the chart mounts into the agent's pod is"
        ));
    }
    match (said(NODE), said(NODE_UID)) {
        (Some(name), Some(uid)) => Ok(Node { name, uid, member }),
        _ => refused("the token names no node: Kubernetes 1.30 or newer is needed".to_owned()),
    }
}

/// What went wrong, without all that the API server adds.
fn words(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => format!("{} ({} {})", status.message, status.code, status.reason),
        other => other.to_string(),
    }
}

async fn in_time<T>(call: impl Future<Output = T>) -> Result<T, Error> {
    let answer = timeout(CALL_MAX, call).await;
    answer.map_err(|_| Error::Unavailable(format!("the API server does not answer within {CALL_MAX:?}")))
}

impl Nodes for Cluster {
    fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Node, Error>> {
        Box::pin(self.ask(token))
    }

    fn tell<'a>(&'a self, notice: &'a Notice) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(self.make_say(notice))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::authentication::v1::UserInfo;

    fn config() -> Config {
        Config {
            config_map: "map".to_owned(),
            namespace: "miner".to_owned(),
            member_account: "members".to_owned(),
            host_account: "hosts".to_owned(),
            audience: "us".to_owned(),
            token_file: None,
            kubeconfig: None,
        }
    }

    fn status(username: &str) -> TokenReviewStatus {
        let extra = [(POD, "agent-1"), (NODE, "node-1"), (NODE_UID, "u")];
        let extra = extra.map(|(key, value)| (key.to_owned(), vec![value.to_owned()]));
        TokenReviewStatus {
            authenticated: Some(true),
            audiences: Some(vec!["us".to_owned()]),
            error: None,
            user: Some(UserInfo {
                username: Some(username.to_owned()),
                extra: Some(extra.into()),
                ..UserInfo::default()
            }),
        }
    }

    fn refusal(status: TokenReviewStatus) -> String {
        owner(&config(), status).expect_err("it is refused").to_string()
    }

    fn notice() -> Notice {
        Notice {
            cluster: "chutes-1".to_owned(),
            miner: Hotkey::parse("5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY").expect("a hotkey"),
            authorities: vec![[1; 32], [0xab; 32]],
            doors: vec!["192.0.2.1:4433".to_owned(), "[2001:db8::1]:4433".to_owned()],
        }
    }

    #[test]
    fn a_notice_is_read_as_it_was_written() {
        let map = written(&config(), &notice());
        assert_eq!(parse(&config(), &map), Ok(notice()));
        for key in ["cluster", "miner", "authorities", "doors"] {
            let mut without = map.clone();
            without.data.as_mut().expect("it has some").remove(key);
            let why = parse(&config(), &without).expect_err("it is damaged").to_string();
            assert!(why.contains("ConfigMap miner/map") && why.contains(key), "{why}");
        }
        for (key, text) in [
            ("miner", "5abc"),
            ("authorities", "ab"),
            ("authorities", "not hexadecimal"),
        ] {
            let mut damaged = map.clone();
            let data = damaged.data.as_mut().expect("it has some");
            data.insert(key.to_owned(), text.to_owned());
            let why = parse(&config(), &damaged).expect_err("it is damaged").to_string();
            assert!(why.contains(key), "{why}");
        }
    }

    #[test]
    fn the_notice_of_another_cluster_is_left_as_it_is() {
        let mut moved = notice();
        moved.doors.pop();
        assert_eq!(is_ours(&config(), &notice(), &moved), Ok(()));
        let mut other = notice();
        other.cluster = "chutes-2".to_owned();
        let why = is_ours(&config(), &other, &notice())
            .expect_err("it is another's")
            .to_string();
        assert!(why.contains("chutes-2") && why.contains("delete it"), "{why}");
    }

    const HOST: &str = "system:serviceaccount:miner:hosts";

    #[test]
    fn the_account_says_who_votes_and_the_token_which_node_it_is() {
        let node = |member| Node {
            name: "node-1".to_owned(),
            uid: "u".to_owned(),
            member,
        };
        assert_eq!(owner(&config(), status(HOST)), Ok(node(false)));
        let members = status("system:serviceaccount:miner:members");
        assert_eq!(owner(&config(), members), Ok(node(true)));
    }

    #[test]
    fn everything_that_the_api_server_does_not_say_is_a_refusal() {
        for other in [
            "system:serviceaccount:other:hosts",
            "system:serviceaccount:miner:default",
            "hosts",
            "",
        ] {
            assert!(refusal(status(other)).contains("may enter"), "{other}");
        }
        let mut none = status(HOST);
        none.authenticated = None;
        none.error = Some("token has expired".to_owned());
        assert!(refusal(none).contains("(token has expired)"));
        for audiences in [None, Some(vec![]), Some(vec!["them".to_owned()])] {
            let mut other = status(HOST);
            other.audiences = audiences;
            assert!(refusal(other).contains("not made for the audience us"));
        }
        for (key, why) in [
            (POD, "not bound to a pod"),
            (NODE, "names no node"),
            (NODE_UID, "names no node"),
        ] {
            let mut without = status(HOST);
            let extra = without.user.as_mut().and_then(|user| user.extra.as_mut());
            extra.expect("it has some").remove(key);
            assert!(refusal(without).contains(why), "{key}");
        }
    }
}
