//! The agents' own pods, as the chart's DaemonSet makes them: this program plays the kubelet that runs them.
//!
//! Each gets its volumes, environment and arguments, and a token bound to its pod. Its init containers run as they are;
//! a member runs as the processes that it is. Host planes and GPU proofs of hosts without a vote run many in this
//! process, each with its own link, API client and folder: all nodes are one machine.
//!
//! Added to what a pod says are the addresses to listen on (the node's own instead of all) and the kubeconfig, since
//! the API server is not where a pod finds it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agent::config::{self, Sources};
use agent::{host_plane, proof_plane};
use anyhow::Context;
use futures_util::{StreamExt as _, stream};
use k8s_openapi::api::core::v1::{ConfigMap, Container, HostPathVolumeSource, Pod, Secret, Volume};
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt as _};
use kubernetes_control_plane::{ControlPlane, ends_with_us};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::members::cluster::write_private;

/// Label that says whether a pod's host is a member.
const COMPONENT: &str = "app.kubernetes.io/component";
/// Pods are started so many at a time.
const AT_A_TIME: usize = 8;
const ASK_EVERY: Duration = Duration::from_millis(200);
/// An init container that fails is run again after this pause.
const INIT_AGAIN: Duration = Duration::from_secs(1);
const INIT_PATIENCE: Duration = Duration::from_secs(240);

/// Where files of the node and files of the pod are.
type Mounts = Vec<(String, PathBuf)>;

/// A pod of an agent, ready to run.
#[derive(Debug)]
struct Machine {
    name: String,
    folder: PathBuf,
    /// Longest path in the container first.
    mounts: Mounts,
    /// Settings that are added.
    added: Vec<String>,
    node_address: Ipv4Addr,
    pod: Pod,
}

/// All agents of a cluster.
#[derive(Debug)]
pub(super) struct Agents {
    executable: PathBuf,
    folder: PathBuf,
    shutdown: CancellationToken,
    planes: Mutex<JoinSet<()>>,
    /// Members, by node.
    members: Mutex<BTreeMap<String, Child>>,
    trouble: Arc<Mutex<Vec<String>>>,
}

impl Agents {
    pub(super) fn new(executable: &Path, folder: &Path) -> Self {
        Self {
            executable: executable.to_owned(),
            folder: folder.to_owned(),
            shutdown: CancellationToken::new(),
            planes: Mutex::default(),
            members: Mutex::default(),
            trouble: Arc::default(),
        }
    }

    /// Starts the pods of the agents, once there are so many that run.
    pub(super) async fn start(
        &self,
        plane: &ControlPlane,
        namespace: &str,
        count: usize,
        patience: Duration,
    ) -> anyhow::Result<()> {
        let pods: Api<Pod> = Api::namespaced(plane.client.clone(), namespace);
        let deadline = Instant::now() + patience;
        let mut all = loop {
            let all = pods.list(&ListParams::default()).await?.items;
            let runs = |pod: &&Pod| {
                pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running")
            };
            let running = all.iter().filter(runs).count();
            if running == count {
                break all;
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "{running} of {} pods of the agents run, not {count}",
                all.len()
            );
            sleep(ASK_EVERY).await;
        };
        // Hosts wait for members: started so many at a time, they would wait for ever.
        let waits = |pod: &Pod| pod.labels().get(COMPONENT).map(String::as_str) != Some("member");
        all.sort_by_key(waits);
        let mut machines = Vec::new();
        for pod in all {
            machines.push(self.prepare(plane, namespace, pod).await?);
        }
        let entering = stream::iter(machines).map(|machine| self.enter(machine));
        let mut entering = entering.buffer_unordered(AT_A_TIME);
        while let Some(entered) = entering.next().await {
            entered?;
        }
        Ok(())
    }

    /// Makes the volumes of a pod.
    async fn prepare(&self, plane: &ControlPlane, namespace: &str, pod: Pod) -> anyhow::Result<Machine> {
        let name = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
        let name = name.context("a pod without a node")?;
        let folder = self.folder.join(&name);
        fs::create_dir_all(&folder)?;
        let address = pod.status.as_ref().and_then(|status| status.host_ip.as_deref());
        let node_address: Ipv4Addr = address.context("a pod without an address")?.parse()?;
        let spec = pod.spec.as_ref().context("a pod without a spec")?;
        let mut places = BTreeMap::new();
        for volume in spec.volumes.iter().flatten() {
            let place = folder.join(&volume.name);
            let there = fill(plane, namespace, (&pod, volume), &place).await;
            if there.with_context(|| format!("volume {} of {name}", volume.name))? {
                places.insert(volume.name.clone(), place);
            }
        }
        let containers = spec
            .containers
            .iter()
            .chain(spec.init_containers.iter().flatten());
        let mounts = containers.flat_map(|container| container.volume_mounts.iter().flatten());
        let mounts =
            mounts.filter_map(|mount| Some((mount.mount_path.clone(), places.get(&mount.name)?.clone())));
        let mut mounts: Mounts = mounts.collect();
        mounts.sort_by_key(|(path, _)| std::cmp::Reverse(path.len()));
        mounts.dedup();
        // Files name each other by where they are in the container.
        for (_, place) in &mounts {
            let file = place.join("config.toml");
            if file.exists() {
                let text = fs::read_to_string(&file)?;
                fs::write(&file, replace(&mounts, &text))?;
            }
        }
        let kubeconfig = folder.join("kubeconfig");
        let token = plane.token_of(&pod, &[]).await?;
        write_private(&kubeconfig, &plane.kubeconfig_with(&token))?;
        let added = vec![
            format!("runtime.kubeconfig={}", kubeconfig.display()),
            format!("coordinator.hosts_listen={node_address}:4433"),
            format!("coordinator.advertise={node_address}:4433"),
            format!("coordinator.api_listen={node_address}:{}", super::API_PORT),
            format!("proof.listen={node_address}:30443"),
            format!("registry.listen={node_address}:30500"),
            format!("egress.listen={node_address}:3128"),
        ];
        Ok(Machine {
            name,
            folder,
            mounts,
            added,
            node_address,
            pod,
        })
    }

    /// Runs the init containers, and starts what the pod is for.
    async fn enter(&self, machine: Machine) -> anyhow::Result<()> {
        let spec = machine.pod.spec.as_ref().context("a pod without a spec")?;
        for container in spec.init_containers.iter().flatten() {
            self.initialize(&machine, container).await?;
        }
        let container = spec.containers.first().context("a pod without a container")?;
        let sources = machine.sources(container);
        let loaded = config::load(&sources).with_context(|| format!("configuration of {}", machine.name))?;
        if loaded.config.member.is_some() {
            let child = self.command(&machine, container)?.spawn()?;
            let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
            members.insert(machine.name.clone(), child);
        } else if let Some(host) = loaded.config.host {
            let data = &loaded.config.data;
            agent::processes::private_folder(data)?;
            agent::processes::private_folder(&config::checked::run_folder(data))?;
            self.run_planes(&machine.name, host);
        }
        Ok(())
    }

    /// Host plane and GPU proof of one node, in this process.
    fn run_planes(&self, name: &str, host: config::checked::HostServices) {
        let mut planes = self.planes.lock().unwrap_or_else(PoisonError::into_inner);
        let (shutdown, trouble) = (self.shutdown.clone(), Arc::clone(&self.trouble));
        let end = self.shutdown.clone();
        let node = name.to_owned();
        let complain = move |what: &str, error: &dyn std::fmt::Display| {
            let mut trouble = trouble.lock().unwrap_or_else(PoisonError::into_inner);
            trouble.push(format!("{what} of {node}: {error}"));
        };
        let said = complain.clone();
        planes.spawn(async move {
            if let Err(error) = Box::pin(host_plane::run(host.host, shutdown)).await {
                said("host plane", &error);
            }
        });
        planes.spawn(async move {
            if let Err(error) = Box::pin(proof_plane::run(host.proof, end)).await {
                complain("GPU proof", &error);
            }
        });
    }

    /// Runs an init container until it succeeds, as a kubelet does.
    async fn initialize(&self, machine: &Machine, container: &Container) -> anyhow::Result<()> {
        let deadline = Instant::now() + INIT_PATIENCE;
        loop {
            let mut command = self.command(machine, container)?;
            let output = command.stderr(Stdio::piped()).output().await?;
            if output.status.success() {
                return Ok(());
            }
            let said = String::from_utf8_lossy(&output.stderr);
            anyhow::ensure!(
                Instant::now() < deadline,
                "init container {} of {}: {}",
                container.name,
                machine.name,
                said.trim()
            );
            sleep(INIT_AGAIN).await;
        }
    }

    fn command(&self, machine: &Machine, container: &Container) -> anyhow::Result<Command> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(machine.folder.join("log"))?;
        let mut command = Command::from(ends_with_us("KILL", &self.executable));
        for setting in &machine.added {
            command.args(["--set", setting]);
        }
        command
            .args(machine.arguments(container))
            .env_clear()
            .envs(machine.environment(container))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true);
        Ok(command)
    }

    /// The processes of the members.
    pub(super) fn members(&self) -> Vec<u32> {
        let members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        members.values().filter_map(Child::id).collect()
    }

    /// What ended that should not.
    pub(super) fn trouble(&self) -> Vec<String> {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        trouble.clone()
    }

    /// Ends all of them.
    pub(super) async fn stop(self) {
        self.shutdown.cancel();
        let mut planes = self.planes.into_inner().unwrap_or_else(PoisonError::into_inner);
        while planes.join_next().await.is_some() {}
        let members = self.members.into_inner().unwrap_or_else(PoisonError::into_inner);
        for mut child in members.into_values() {
            // It may have ended; its processes end with it.
            let _ = child.kill().await;
        }
    }
}

impl Machine {
    fn arguments(&self, container: &Container) -> Vec<String> {
        let arguments = container.args.iter().flatten();
        arguments
            .map(|argument| replace(&self.mounts, argument))
            .collect()
    }

    fn environment(&self, container: &Container) -> Vec<(String, String)> {
        let mut environment: Vec<(String, String)> = Vec::new();
        for variable in container.env.iter().flatten() {
            let source = variable
                .value_from
                .as_ref()
                .and_then(|from| from.field_ref.as_ref());
            let value = match source.map(|field| field.field_path.as_str()) {
                Some("spec.nodeName") => self.name.clone(),
                Some("status.hostIP" | "status.podIP") => self.node_address.to_string(),
                Some("metadata.name") => self.pod.name_any(),
                Some("metadata.namespace") => self.pod.namespace().unwrap_or_default(),
                _ => variable.value.clone().unwrap_or_default(),
            };
            let known = environment.iter();
            let value = known.fold(value, |value, (name, known)| {
                value.replace(&format!("$({name})"), known)
            });
            environment.push((variable.name.clone(), replace(&self.mounts, &value)));
        }
        environment
    }

    /// The settings of what this pod runs.
    fn sources(&self, container: &Container) -> Sources {
        let mut sources = Sources {
            environment: self.environment(container),
            assignments: self.added.clone(),
            ..Sources::default()
        };
        let mut arguments = self.arguments(container).into_iter();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--config" => sources.file = arguments.next().map(PathBuf::from),
                "--set" => sources.assignments.extend(arguments.next()),
                _ => {}
            }
        }
        sources
    }
}

/// A text with the places of files instead of where they are in a container.
fn replace(mounts: &Mounts, text: &str) -> String {
    let mut replaced = String::new();
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        if let Some((path, place)) = mounts.iter().find(|(path, _)| rest.starts_with(path.as_str())) {
            replaced.push_str(&place.display().to_string());
            rest = &rest[path.len()..];
        } else {
            replaced.push(next);
            rest = &rest[next.len_utf8()..];
        }
    }
    replaced
}

/// Fills a volume; false if what the pod needs is on this machine anyway.
async fn fill(
    plane: &ControlPlane,
    namespace: &str,
    (pod, volume): (&Pod, &Volume),
    place: &Path,
) -> anyhow::Result<bool> {
    let client: &Client = &plane.client;
    let file = |path: &HostPathVolumeSource| path.type_.as_deref() == Some("File");
    if volume.empty_dir.is_some() || volume.host_path.as_ref().is_some_and(file) {
        return Ok(false);
    }
    fs::create_dir_all(place)?;
    if let Some(map) = &volume.config_map {
        let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
        for (key, value) in maps.get(&map.name).await?.data.unwrap_or_default() {
            fs::write(place.join(key), value)?;
        }
    }
    if let Some(secret) = &volume.secret {
        let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
        let name = secret.secret_name.as_deref().context("a volume of no secret")?;
        let found = if secret.optional == Some(true) {
            secrets.get_opt(name).await?
        } else {
            Some(secrets.get(name).await?)
        };
        for (key, value) in found.and_then(|found| found.data).unwrap_or_default() {
            write_private(&place.join(key), &String::from_utf8(value.0)?)?;
        }
    }
    let projected = volume
        .projected
        .as_ref()
        .and_then(|projected| projected.sources.as_ref());
    for source in projected.into_iter().flatten() {
        if let Some(token) = &source.service_account_token {
            let audiences: Vec<String> = token.audience.iter().cloned().collect();
            write_private(&place.join(&token.path), &plane.token_of(pod, &audiences).await?)?;
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_in_is_not_replaced_again() {
        let mounts = vec![
            ("/data/seed".to_owned(), PathBuf::from("/data/host/seed")),
            ("/data".to_owned(), PathBuf::from("/data/host")),
        ];
        assert_eq!(
            replace(&mounts, "a = \"/data/seed/x\", /data/y"),
            "a = \"/data/host/seed/x\", /data/host/y"
        );
    }
}
