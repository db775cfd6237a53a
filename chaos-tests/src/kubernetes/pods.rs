//! The containers of chutes: for each pod that runs, a chute stand-in with exactly that pod's command and environment,
//! and when it ends by itself, the status that a kubelet would report.
//!
//! Added to what the pod says are the address to listen on, since there is no address translation, and where the code
//! was mounted.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::api::{Patch, PatchParams};
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt as _};
use kubernetes_control_plane::ends_with_us;
use runtime::manifest::DEPLOYMENT_LABEL;
use serde_json::json;
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// Between two questions to an API server that is away.
pub(super) const ASK_AGAIN: Duration = Duration::from_millis(200);

/// Plays all pods of a namespace.
pub(super) struct Pods {
    client: Client,
    namespace: String,
    folder: PathBuf,
    chutes: PathBuf,
    running: Mutex<BTreeMap<String, Playing>>,
    trouble: Mutex<Vec<String>>,
}

/// The container of one pod, by the pod's UID.
#[derive(Debug)]
struct Playing {
    deployment: String,
    node: String,
    end: CancellationToken,
}

/// Asks until the API server answers, which may be away for a while.
pub(super) async fn answered<T, F>(mut ask: impl FnMut() -> F) -> kube::Result<T>
where
    F: Future<Output = kube::Result<T>>,
{
    loop {
        match ask().await {
            Err(error) if !matches!(error, kube::Error::Api(_)) => sleep(ASK_AGAIN).await,
            answer => return answer,
        }
    }
}

/// A chute that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Running {
    /// UID of its pod.
    pub(super) pod: String,
    pub(super) deployment: String,
    pub(super) node: String,
}

impl Pods {
    /// Plays them with this executable as what their images hold.
    pub(super) fn new(
        client: Client,
        namespace: &str,
        executable: &Path,
        folder: &Path,
    ) -> anyhow::Result<Arc<Self>> {
        std::fs::create_dir_all(folder)?;
        let chutes = folder.join("chutes");
        std::os::unix::fs::symlink(executable, &chutes)?;
        Ok(Arc::new(Self {
            client,
            namespace: namespace.to_owned(),
            folder: folder.to_owned(),
            chutes,
            running: Mutex::default(),
            trouble: Mutex::default(),
        }))
    }

    fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What runs now.
    pub(super) fn running(&self) -> Vec<Running> {
        let running = Self::lock(&self.running);
        let all = running.iter().map(|(uid, one)| Running {
            pod: uid.clone(),
            deployment: one.deployment.clone(),
            node: one.node.clone(),
        });
        all.collect()
    }

    /// Pods that could not be played, and why.
    pub(super) fn trouble(&self) -> Vec<String> {
        Self::lock(&self.trouble).clone()
    }

    /// Plays until it is dropped; the containers end with it.
    pub(super) async fn play(self: Arc<Self>) {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let mut events = Box::pin(watcher(pods, watcher::Config::default()));
        let mut containers = JoinSet::new();
        let mut listed: Vec<String> = Vec::new();
        while let Some(event) = events.next().await {
            while containers.try_join_next().is_some() {}
            match event {
                Ok(watcher::Event::Apply(pod)) => self.see(pod, &mut containers),
                Ok(watcher::Event::Init) => listed.clear(),
                Ok(watcher::Event::InitApply(pod)) => {
                    listed.extend(pod.uid());
                    self.see(pod, &mut containers);
                }
                Ok(watcher::Event::InitDone) => {
                    Self::lock(&self.running).retain(|uid, one| {
                        let stays = listed.contains(uid);
                        if !stays {
                            one.end.cancel();
                        }
                        stays
                    });
                }
                Ok(watcher::Event::Delete(pod)) => self.end(&pod),
                // The API server may be away; the watch begins anew.
                Err(_) => sleep(ASK_AGAIN).await,
            }
        }
    }

    fn end(&self, pod: &Pod) {
        if let Some(one) = pod.uid().and_then(|uid| Self::lock(&self.running).remove(&uid)) {
            one.end.cancel();
        }
    }

    fn see(self: &Arc<Self>, pod: Pod, containers: &mut JoinSet<()>) {
        if pod.metadata.deletion_timestamp.is_some() {
            return self.end(&pod);
        }
        let runs = pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running");
        let (Some(uid), Some(deployment)) = (pod.uid(), pod.labels().get(DEPLOYMENT_LABEL)) else {
            return;
        };
        let mut running = Self::lock(&self.running);
        if !runs || running.contains_key(&uid) {
            return;
        }
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
        let end = CancellationToken::new();
        let playing = Playing {
            deployment: deployment.clone(),
            node: node.unwrap_or_default(),
            end: end.clone(),
        };
        running.insert(uid.clone(), playing);
        drop(running);
        let this = Arc::clone(self);
        containers.spawn(async move {
            let name = pod.name_any();
            let ended = end.run_until_cancelled(this.contain(&pod)).await;
            let Some(ended) = ended else { return };
            if let Err(error) = ended {
                Self::lock(&this.trouble).push(format!("pod {name}: {error:#}"));
            }
            Self::lock(&this.running).remove(&uid);
        });
    }

    /// Runs the container to its end, and reports that.
    async fn contain(&self, pod: &Pod) -> anyhow::Result<()> {
        let mut child = self.start(pod).await?;
        let status = child.wait().await?;
        let code = status.code().unwrap_or(137);
        let (phase, reason) = if code == 0 {
            ("Succeeded", "Completed")
        } else {
            ("Failed", "Error")
        };
        let container = json!({ "name": "chute", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": { "terminated": { "exitCode": code, "reason": reason } } });
        let status = json!({ "status": { "phase": phase, "containerStatuses": [container] } });
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let (name, status, how) = (pod.name_any(), Patch::Merge(status), PatchParams::default());
        let told = answered(|| pods.patch_status(&name, &how, &status)).await;
        match told {
            // It was deleted meanwhile.
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            told => Ok(told.map(drop)?),
        }
    }

    async fn start(&self, pod: &Pod) -> anyhow::Result<Child> {
        let spec = pod.spec.as_ref().context("it has no spec")?;
        let container = spec.containers.first().context("it has no container")?;
        let mut volumes = spec.volumes.iter().flatten();
        let code = volumes.find_map(|volume| volume.config_map.as_ref());
        let code = &code.context("no volume holds its code")?.name;
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace);
        let data = answered(|| maps.get(code)).await?.data.unwrap_or_default();
        let file = self.folder.join(pod.name_any());
        std::fs::write(&file, data.values().next().context("its code is empty")?)?;
        let variables = container.env.iter().flatten();
        let variables: BTreeMap<&str, &str> = variables
            .map(|it| (it.name.as_str(), it.value.as_deref().unwrap_or_default()))
            .collect();
        let command = container.command.as_ref().context("it has no command")?;
        anyhow::ensure!(command[0] == "chutes", "its command is {command:?}");
        let host = variables.get("CHUTES_EXTERNAL_HOST");
        let mut chute = Command::from(ends_with_us("KILL", &self.chutes));
        chute
            .args(&command[1..])
            .env_clear()
            .envs(&variables)
            .env("CHUTES_PROCESS_BIND_HOST", host.context("it knows no address")?)
            .env("CHUTES_CODE_FILE", &file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        Ok(chute.spawn()?)
    }
}
