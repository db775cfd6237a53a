//! Sealed workers as the leader drives them: for each the same runtime and the same loop that a host has, on a client of
//! the worker's own cluster, in the leader's process.
//!
//! The set that a worker should run is in memory only: whoever drives it has the state at hand, and begins anew with what
//! it finds in the cluster.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use coordinator::host_link::AskHost;
use coordinator::sealed_worker::{ATTESTATION_SERVICE_PORT, Access, Driven, Error, Node, Workers};
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use k8s_openapi::api::core::v1::Node as KubernetesNode;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::ListParams;
use kube::config::Kubeconfig;
use kube::{Api, Client, ResourceExt as _};
use protocol::id::ServerId;
use protocol::link::{FromHost, ToHost};
use protocol::logs::{HostAnswer, HostQuestion};
use protocol::workload::{Fence, Secret};
use runtime::Runtime;
use runtime::kubernetes::{Config, Kubernetes, client_of};
use runtime::manifest::Settings;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::host_plane::{self, REPORT_EVERY};
use crate::link::AnswerQuestion;
use crate::workloads::store::Store;
use crate::workloads::{self, Channels, Offer};

const QUEUE: usize = 8;
/// One call to a worker's API server may take so long.
const CALL_MAX: Duration = Duration::from_secs(10);
/// Port of the agent that a sealed worker brings along.
const ITS_AGENT_PORT: u16 = 32000;
const GIB: u64 = 1 << 30;

/// The way to the clusters of sealed workers.
#[derive(Debug, Clone)]
pub struct Clusters {
    /// Folder of what is left of workloads that are gone, with one folder for each worker.
    pub folder: PathBuf,
}

impl Workers for Clusters {
    fn reduce(&self, kubeconfig: &Secret, context: Option<&str>) -> Result<Secret, Error> {
        reduce(kubeconfig.reveal(), context).map_err(Error::Refused)
    }

    fn node<'a>(&'a self, kubeconfig: &'a Secret) -> BoxFuture<'a, Result<Node, Error>> {
        Box::pin(async move { look(client(kubeconfig).await?).await })
    }

    fn drive(&self, access: Access) -> BoxFuture<'static, Result<Driven, Error>> {
        let logs = self.folder.join(access.server.as_str());
        Box::pin(async move {
            let client = client(&access.kubeconfig).await?;
            let mut config = Config::new(Settings::for_worker(&access.node), logs);
            config.reserved_ports = vec![ATTESTATION_SERVICE_PORT, ITS_AGENT_PORT];
            drive(Arc::new(Kubernetes::start(client, config)))
        })
    }
}

/// One context, and nothing in it that leads to files or programs of whoever uses it.
fn reduce(text: &str, context: Option<&str>) -> Result<Secret, String> {
    // The error would show parts of the text.
    let mut file = Kubeconfig::from_yaml(text).map_err(|_| "this is no kubeconfig".to_owned())?;
    let name = match (context, &file.current_context) {
        (Some(name), _) => name.to_owned(),
        (None, Some(name)) => name.clone(),
        (None, None) => return Err("the kubeconfig has no current context: name one".to_owned()),
    };
    file.contexts.retain(|context| context.name == name);
    let context = file.contexts.first().and_then(|named| named.context.as_ref());
    let context = context.ok_or_else(|| format!("the kubeconfig has no context {name}"))?;
    let (cluster, user) = (context.cluster.clone(), context.user.clone().unwrap_or_default());
    file.clusters.retain(|named| named.name == cluster);
    file.auth_infos.retain(|named| named.name == user);
    let named = file.clusters.first().and_then(|named| named.cluster.as_ref());
    let cluster = named.ok_or_else(|| format!("the kubeconfig has no cluster {cluster}"))?;
    let user = file.auth_infos.first().and_then(|named| named.auth_info.as_ref());
    let user = user.ok_or_else(|| format!("the kubeconfig has no user for the context {name}"))?;
    if !cluster
        .server
        .as_deref()
        .is_some_and(|server| server.starts_with("https://"))
    {
        return Err("the kubeconfig's server must begin with https://".to_owned());
    }
    for (what, there) in [
        ("certificate-authority", cluster.certificate_authority.is_some()),
        ("client-certificate", user.client_certificate.is_some()),
        ("client-key", user.client_key.is_some()),
        ("tokenFile", user.token_file.is_some()),
        ("exec", user.exec.is_some()),
        ("auth-provider", user.auth_provider.is_some()),
    ] {
        if there {
            return Err(format!(
                "the kubeconfig names a file or a program ({what}), which is not there where it is used: `kubectl config view \
                 --raw --flatten --minify` writes one that has all in it; a program cannot be used"
            ));
        }
    }
    file.current_context = Some(name);
    file.preferences = None;
    file.extensions = None;
    let text = serde_json::to_string(&file).map_err(|_| "this is no kubeconfig".to_owned())?;
    Ok(Secret::new(text))
}

async fn client(kubeconfig: &Secret) -> Result<Client, Error> {
    let file = Kubeconfig::from_yaml(kubeconfig.reveal());
    let file = file.map_err(|_| Error::Refused("its kubeconfig cannot be read".to_owned()))?;
    client_of(file)
        .await
        .map_err(|why| Error::Refused(format!("its kubeconfig cannot be used: {why}")))
}

async fn look(client: Client) -> Result<Node, Error> {
    let nodes: Api<KubernetesNode> = Api::all(client);
    let params = ListParams::default().limit(2);
    let listed = timeout(CALL_MAX, nodes.list(&params)).await;
    let away = |why: String| {
        Error::Unavailable(format!(
            "the API server of the worker does not list its node: {why}"
        ))
    };
    let listed = listed.map_err(|_| away(format!("no answer within {CALL_MAX:?}")))?;
    let listed = listed.map_err(|error| match error {
        kube::Error::Api(status) => away(format!("{} ({})", status.message, status.code)),
        other => away(other.to_string()),
    })?;
    match &listed.items[..] {
        [node] => read(node),
        [] => Err(Error::Refused("the worker's cluster has no node".to_owned())),
        _ => Err(Error::Refused(
            "the worker's cluster has several nodes: a sealed worker is a cluster of its own".to_owned(),
        )),
    }
}

fn read(node: &KubernetesNode) -> Result<Node, Error> {
    let name = node.name_any();
    let label = |key: &str| node.labels().get(key).map(String::as_str);
    let uid = ServerId::parse(&node.uid().unwrap_or_default());
    let uid = uid.map_err(|error| Error::Refused(format!("the UID of node {name}: {error}")))?;
    let status = node.status.clone().unwrap_or_default();
    let addresses = status.addresses.unwrap_or_default();
    let of = |kind: &str| addresses.iter().find(|address| address.type_ == kind);
    let address = of("ExternalIP")
        .or_else(|| of("InternalIP"))
        .map(|address| address.address.clone());
    let capacity = status.capacity.unwrap_or_default();
    let amount = |key: &str| {
        let said = capacity.get(key).and_then(amount);
        said.ok_or_else(|| Error::Refused(format!("node {name} does not say how much {key} it has")))
    };
    let whole = |amount: u64| u32::try_from(amount).unwrap_or(u32::MAX);
    Ok(Node {
        uid,
        address: label("chutes/external-ip").map(str::to_owned).or(address),
        sealed: label("chutes/tee") == Some("true"),
        gpus: label("nvidia.com/gpu.count").and_then(|count| count.parse().ok()),
        cpu_count: whole(amount("cpu")?),
        memory_gb: whole(amount("memory")? / GIB),
        disk_gb: whole(amount("ephemeral-storage")? / GIB),
        name: name.clone(),
    })
}

/// The whole part of a quantity.
fn amount(quantity: &Quantity) -> Option<u64> {
    let text = quantity.0.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    Some(match unit {
        "" => number,
        "m" => number / 1000,
        "k" => number.checked_mul(1000)?,
        "M" => number.checked_mul(1_000_000)?,
        "G" => number.checked_mul(1_000_000_000)?,
        "Ki" => number.checked_mul(1 << 10)?,
        "Mi" => number.checked_mul(1 << 20)?,
        "Gi" => number.checked_mul(GIB)?,
        "Ti" => number.checked_mul(1 << 40)?,
        _ => return None,
    })
}

/// The loop of a host's workloads between two queues.
fn drive(runtime: Arc<dyn Runtime>) -> Result<Driven, Error> {
    let (store, found) = Store::in_memory().map_err(|error| Error::Unavailable(error.to_string()))?;
    let (offers, offers_in) = mpsc::channel(QUEUE);
    let (delivered, delivered_in) = watch::channel(Fence::default());
    let (report, report_in) = watch::channel(None);
    let channels = Channels {
        offers: offers_in,
        delivered: delivered_in,
        report,
        stored: watch::Sender::new(Fence::default()),
        chutes: watch::Sender::new(None),
    };
    let (reports_out, reports) = mpsc::channel(QUEUE);
    let (wants, wants_in) = mpsc::channel(QUEUE);
    let way = Arc::new(Way(host_plane::answers(Arc::clone(&runtime))));
    let end = CancellationToken::new();
    let converge = workloads::run(runtime, store, found.set, channels, REPORT_EVERY, end);
    let run = async move {
        tokio::select! {
            () = converge => {}
            () = tell(report_in, delivered, reports_out) => {}
            () = hear(wants_in, offers) => {}
        }
    };
    Ok(Driven {
        reports,
        wants,
        way,
        run: run.boxed(),
    })
}

async fn tell(
    mut report: watch::Receiver<Option<protocol::report::WorkloadReport>>,
    delivered: watch::Sender<Fence>,
    reports: mpsc::Sender<FromHost>,
) {
    while report.changed().await.is_ok() {
        let Some(newest) = report.borrow_and_update().clone() else {
            continue;
        };
        let fence = newest.fence;
        if reports.send(FromHost::Report(newest)).await.is_err() {
            return;
        }
        delivered.send_replace(fence);
    }
}

async fn hear(mut wants: mpsc::Receiver<ToHost>, offers: mpsc::Sender<Offer>) {
    while let Some(message) = wants.recv().await {
        let ToHost::Desired { fence, workloads } = message else {
            continue;
        };
        if offers.send(Offer { fence, workloads }).await.is_err() {
            return;
        }
    }
}

/// Asks the runtime itself.
struct Way(Arc<AnswerQuestion>);

impl std::fmt::Debug for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Way(in this process)")
    }
}

impl AskHost for Way {
    fn ask(
        &self,
        question: HostQuestion,
        within: Duration,
    ) -> BoxFuture<'static, Result<HostAnswer, String>> {
        let asked = (self.0)(question);
        Box::pin(async move {
            let answer = timeout(within, asked).await;
            answer.map_err(|_| "the worker did not answer in time".to_owned())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = r#"
apiVersion: v1
kind: Config
current-context: one
contexts:
- {name: one, context: {cluster: c1, user: u1}}
- {name: two, context: {cluster: c2, user: u2}}
clusters:
- {name: c1, cluster: {server: "https://192.0.2.7:6443", certificate-authority-data: QUJD}}
- {name: c2, cluster: {server: "https://192.0.2.8:6443", certificate-authority: /etc/ca.pem}}
users:
- {name: u1, user: {token: secret-of-one}}
- {name: u2, user: {token: secret-of-two}}
"#;

    #[test]
    fn of_a_kubeconfig_only_what_is_needed_is_kept() {
        let kept = reduce(WHOLE, None).expect("it is good");
        assert!(kept.reveal().contains("secret-of-one") && !kept.reveal().contains("two"));
        let again = reduce(kept.reveal(), None).expect("it is one itself");
        assert_eq!(again, kept);
    }

    #[test]
    fn what_leads_to_files_or_programs_of_a_member_is_refused_and_no_secret_is_shown() {
        let with = |user: &str| WHOLE.replace("token: secret-of-one", user);
        for (text, context, why) in [
            ("[1, 2".to_owned(), None, "no kubeconfig"),
            (WHOLE.to_owned(), Some("three"), "no context three"),
            (WHOLE.to_owned(), Some("two"), "(certificate-authority)"),
            (WHOLE.replace("current-context: one", ""), None, "name one"),
            (
                WHOLE.replace("https://192.0.2.7", "http://192.0.2.7"),
                None,
                "https://",
            ),
            (WHOLE.replace("name: u1", "name: u9"), None, "no user"),
            (with("tokenFile: /run/token"), None, "(tokenFile)"),
            (with("client-key: /run/key"), None, "(client-key)"),
            (
                with("exec: {apiVersion: client.authentication.k8s.io/v1, command: sh}"),
                None,
                "(exec)",
            ),
        ] {
            let error = reduce(&text, context).expect_err("it is of no use");
            assert!(error.contains(why) && !error.contains("secret"), "{error}");
        }
    }

    fn node(labels: &str) -> KubernetesNode {
        let text = format!(
            r#"{{"metadata":{{"name":"tee-1","uid":"6f1c2a9e-0000-4000-8000-000000000001","labels":{{{labels}}}}},
                "status":{{"addresses":[{{"type":"InternalIP","address":"10.0.0.7"}},{{"type":"ExternalIP","address":"192.0.2.7"}}],
                "capacity":{{"cpu":"63500m","memory":"527970452Ki","ephemeral-storage":"1Ti"}}}}}}"#
        );
        serde_json::from_str(&text).expect("a node")
    }

    #[test]
    fn a_node_is_read_as_a_server() {
        let plain = read(&node("")).expect("it says what is needed");
        assert_eq!(
            (plain.address.as_deref(), plain.sealed, plain.gpus),
            (Some("192.0.2.7"), false, None)
        );
        assert_eq!((plain.cpu_count, plain.memory_gb, plain.disk_gb), (63, 503, 1024));
        let labels = r#""chutes/tee":"true","nvidia.com/gpu.count":"8","chutes/external-ip":"198.51.100.1""#;
        let sealed = read(&node(labels)).expect("it says what is needed");
        assert_eq!(
            (sealed.address.as_deref(), sealed.sealed, sealed.gpus),
            (Some("198.51.100.1"), true, Some(8))
        );
        let mut silent = node("");
        silent.status = None;
        let error = read(&silent)
            .expect_err("it does not say how large it is")
            .to_string();
        assert!(error.contains("tee-1") && error.contains("cpu"), "{error}");
    }
}
