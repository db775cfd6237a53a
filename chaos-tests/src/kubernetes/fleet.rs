//! The fleet: control plane, validator stand-in, agents and chutes, looked at from all sides.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use futures_util::StreamExt as _;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Secret, Service};
use kube::api::{ListParams, PostParams};
use kube::{Api, ResourceExt as _};
use kubernetes_control_plane::{ControlPlane, Settings};
use runtime::manifest::{DEPLOYMENT_LABEL, gpus_of};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Child;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use validator_stand_in::ledger::{Entry, Record};
use validator_stand_in::scenario::{
    Action, ChuteSpec, DEVELOPMENT_MINER_SEED, Demand, Egress, Goals, Scenario,
};

use super::agents::Agents;
use super::jobs::Jobs;
use super::pods::{Pods, Running};
use super::{Options, nodes};
use crate::members::Outcome;
use crate::members::cluster::start_stand_in;
use crate::storm::checks::{self, Endings};
use crate::storm::doors::{self, Doors};
use crate::storm::processes::Process;

/// Members of the coordinator, with fewer nodes fewer.
const MEMBERS: usize = 3;
const MINER: &str = "miner";
const CHUTES: &str = "chutes";
const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/chutes-miner");
/// What a software GPU costs, in dollars per hour.
const HOURLY_COST_USD: f64 = 0.01;
/// Hosts whose GPUs are verified at a time.
const VERIFIED_AT_A_TIME: usize = 8;
const START_PATIENCE: Duration = Duration::from_secs(300);
/// How long what events alone end may take.
const EVENTS_PATIENCE: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Ends the stream about a host whose GPUs are verified.
const BOOTSTRAPPED: &str = "completed server bootstrapping";

/// All of it. It ends when it is dropped.
pub(super) struct Fleet {
    pub(super) plane: ControlPlane,
    count: usize,
    /// Of each node.
    gpus: usize,
    /// What the stand-in says of itself.
    ready: Value,
    doors: Doors,
    stand_in: Child,
    agents: Agents,
    pods: Arc<Pods>,
    jobs: Arc<Jobs>,
    watching: Vec<JoinHandle<()>>,
    before: BTreeSet<String>,
    /// Names of the chutes that must run.
    wanted: BTreeSet<String>,
    ledger: Vec<Entry>,
    doubled: BTreeSet<String>,
    violations: BTreeSet<String>,
    reasons: Vec<String>,
    looks: u64,
    pods_max: usize,
    pods_kept: usize,
    /// Deployments that an operator had to stop at the end.
    stopped_by_hand: usize,
    install_ms: u64,
    folder: TempDir,
}

/// The development scenario, as far as pods can play it: what they pull and which sites they reach is not there.
fn scenario() -> Scenario {
    Scenario {
        name: "kubernetes".to_owned(),
        egress: Egress::default(),
        goals: Goals::default(),
        ..Scenario::development()
    }
}

fn rows<'a>(state: &'a Value, table: &str) -> &'a [Value] {
    state[table].as_array().map_or(&[], Vec::as_slice)
}

impl Fleet {
    /// Starts everything: afterwards each node's agent runs, and its GPUs are known to the coordinator.
    pub(super) async fn start(options: &Options, programs: PathBuf) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("chutes-k8s-").tempdir()?;
        let data = folder.path().canonicalize()?;
        let agent = options.common.executable()?;
        let settings = Settings {
            controllers: "job-controller,garbage-collector-controller,serviceaccount-controller,daemonset-controller",
            plays_nodes: true,
            ..Settings::default()
        };
        let plane = ControlPlane::start(programs, settings).await?;
        let network = nodes::free_network()?;
        let members = MEMBERS.min(options.nodes);
        nodes::register(&plane.client, network, (options.nodes, members), options.gpus).await?;
        let file = data.join("scenario.toml");
        std::fs::write(
            &file,
            toml::to_string(&Scenario {
                program: vec![],
                ..scenario()
            })?,
        )?;
        let stand_in = start_stand_in(&agent, &data, Some(&file)).await?;
        let ready = doors::ready(&data)?;
        let apis = (1..=members).map(|number| {
            let address = nodes::address(network, number)?;
            anyhow::Ok((address, super::API_PORT).into())
        });
        let pods = Pods::new(plane.client.clone(), CHUTES, &agent, &data.join("pods"))?;
        let mut fleet = Self {
            count: options.nodes,
            gpus: options.gpus,
            ready,
            doors: Doors::of(&data, apis.collect::<anyhow::Result<_>>()?)?,
            stand_in,
            agents: Agents::new(&agent, &data.join("agents")),
            pods,
            jobs: Arc::default(),
            watching: Vec::new(),
            before: BTreeSet::new(),
            wanted: BTreeSet::new(),
            ledger: Vec::new(),
            doubled: BTreeSet::new(),
            violations: BTreeSet::new(),
            reasons: Vec::new(),
            looks: 0,
            pods_max: 0,
            pods_kept: 0,
            stopped_by_hand: 0,
            install_ms: 0,
            plane,
            folder,
        };
        if let Err(error) = fleet.install(options).await {
            let kept = fleet.folder.keep();
            return Err(error.context(format!("logs and data are in {}", kept.display())));
        }
        Ok(fleet)
    }

    /// Installs the chart, and runs what it makes.
    async fn install(&mut self, options: &Options) -> anyhow::Result<()> {
        let client = self.plane.client.clone();
        let namespaces: Api<Namespace> = Api::all(client.clone());
        let namespace = serde_json::from_value(json!({ "metadata": { "name": MINER } }))?;
        namespaces.create(&PostParams::default(), &namespace).await?;
        let seeds: Api<Secret> = Api::namespaced(client.clone(), MINER);
        let seed =
            json!({ "metadata": { "name": "seed" }, "stringData": { "seed": DEVELOPMENT_MINER_SEED } });
        seeds
            .create(&PostParams::default(), &serde_json::from_value(seed)?)
            .await?;

        let began = Instant::now();
        let values = self.values(options)?;
        let file = self.folder.path().join("values.yaml");
        // JSON is YAML.
        std::fs::write(&file, values.to_string())?;
        let file = file.display().to_string();
        let install = ["install", "gpu", CHART, "--namespace", MINER, "--values", &file];
        self.plane.helm(&install).await.map_err(anyhow::Error::msg)?;
        self.install_ms = super::ms(began);

        self.before = self.remains().await?;
        self.watching.push(tokio::spawn(Arc::clone(&self.pods).play()));
        let jobs = Arc::clone(&self.jobs).watch(client, CHUTES.to_owned());
        self.watching.push(tokio::spawn(jobs));
        self.agents
            .start(&self.plane, MINER, self.count, START_PATIENCE)
            .await
    }

    /// The values of the chart.
    fn values(&self, options: &Options) -> anyhow::Result<Value> {
        let key = protocol::hotkey::Signer::from_seed_hex(DEVELOPMENT_MINER_SEED)?;
        let ready = &self.ready;
        let validator = json!({ "hotkey": ready["validator"], "api": ready["api_url"],
            "socket": ready["socket_url"], "registry": ready["registry_url"] });
        Ok(json!({
            "miner": { "hotkey": key.hotkey(), "seedSecret": "seed" },
            "cluster": { "shared": true },
            "agent": { "nodeSelector": { "nvidia.com/gpu.present": "true" } },
            "validators": { "supported": [validator] },
            "proof": { "backend": "cpu" },
            "runtime": { "namespace": CHUTES },
            "settings": {
                "proof.software_gpus": options.gpus,
                "registry.store_free_bytes_min": "1GiB",
                "coordinator.tick": "3s",
                "coordinator.observe": "3s",
            },
        }))
    }

    /// Notes what must not be.
    pub(super) fn complain(&mut self, reason: String) {
        self.reasons.push(reason);
    }

    /// Lets the miner verify the GPUs of all hosts, and waits until all of them are.
    pub(super) async fn until_verified(&mut self) -> anyhow::Result<()> {
        let validator = &self.ready["validator"];
        let doors = &self.doors;
        let adding = (1..=self.count).map(|number| async move {
            let body = json!({ "name": nodes::name(number), "validator": validator,
                "hourly_cost": HOURLY_COST_USD, "gpu_short_ref": "software" });
            let deadline = Instant::now() + START_PATIENCE;
            loop {
                // It has not joined yet, or the stream outlasts patience; asked again, the host is known.
                match doors.write("/servers/", &body).await {
                    Ok(frames) if frames.to_string().contains(BOOTSTRAPPED) => return Ok(()),
                    Ok(frames) if Instant::now() >= deadline => anyhow::bail!("gpu-{number}: {frames}"),
                    Ok(_) => sleep(LOOK_EVERY).await,
                    Err(error) if format!("{error:#}").contains("409") => return Ok(()),
                    Err(error) if Instant::now() >= deadline => return Err(error),
                    Err(_) => sleep(LOOK_EVERY).await,
                }
            }
        });
        let mut adding = futures_util::stream::iter(adding).buffer_unordered(VERIFIED_AT_A_TIME);
        while let Some(added) = adding.next().await {
            added?;
        }
        drop(adding);
        let (gpus, deadline) = (self.count * self.gpus, Instant::now() + START_PATIENCE);
        loop {
            let state = self.doors.state().await?;
            let verified = rows(&state, "gpus")
                .iter()
                .filter(|gpu| gpu["verified"] == true)
                .count();
            if verified == gpus {
                return Ok(());
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "{verified} of {gpus} GPUs are verified"
            );
            sleep(LOOK_EVERY).await;
        }
    }

    /// Something that owners or users do, and what is wanted after it.
    async fn act(&mut self, action: Action) -> anyhow::Result<Value> {
        let said = self.doors.act(&serde_json::to_value(&action)?).await?;
        match action {
            Action::PublishChute(spec) => {
                // What no node here has runs nowhere.
                let fits = usize::try_from(spec.gpu_count).is_ok_and(|gpus| gpus <= self.gpus);
                if spec.demand.is_some() && spec.include.is_empty() && fits {
                    self.wanted.insert(spec.name);
                }
            }
            Action::DeleteChute { chute } => {
                self.wanted.remove(&chute);
            }
            _ => {}
        }
        Ok(said)
    }

    /// Publishes a chute of which one instance is wanted; its id.
    pub(super) async fn publish(&mut self, name: &str) -> anyhow::Result<String> {
        let spec = ChuteSpec {
            name: name.to_owned(),
            demand: Some(Demand::default()),
            ..ChuteSpec::default()
        };
        let published = self.act(Action::PublishChute(Box::new(spec))).await?;
        let id = published["chute_id"].as_str();
        id.map(str::to_owned)
            .with_context(|| format!("no chute_id: {published}"))
    }

    /// The owner deletes a chute, if there is one of this name.
    pub(super) async fn delete(&mut self, name: &str) -> anyhow::Result<()> {
        if self.wanted.contains(name) {
            let chute = name.to_owned();
            self.act(Action::DeleteChute { chute }).await?;
        }
        Ok(())
    }

    /// Runs the program of the development scenario, from its start.
    pub(super) async fn run_program(&mut self) -> anyhow::Result<()> {
        let began = Instant::now();
        for step in scenario().program {
            tokio::time::sleep_until(began + Duration::from_millis(step.at_ms)).await;
            if let Some(name) = &step.when_active {
                let deadline = Instant::now() + START_PATIENCE;
                let active = |state: &Value| {
                    rows(state, "deployments")
                        .iter()
                        .any(|row| row["chute_name"] == name.as_str() && row["active_at"].is_u64())
                };
                while !active(&self.look().await?) {
                    anyhow::ensure!(Instant::now() < deadline, "{name} has no active instance");
                    sleep(LOOK_EVERY).await;
                }
            }
            self.act(step.action).await?;
        }
        let deadline = Instant::now() + START_PATIENCE;
        let finished = |entry: &Entry| matches!(&entry.record, Record::JobFinished { .. });
        while !self.ledger.iter().any(finished) {
            anyhow::ensure!(Instant::now() < deadline, "the job is not finished");
            self.look().await?;
            sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// From a new chute's event until its Job is seen at the API server, in ms.
    pub(super) async fn time_event(&mut self, name: &str) -> anyhow::Result<u64> {
        let chute = self.publish(name).await?;
        let seen = tokio::time::timeout(START_PATIENCE, self.jobs.first_of(&chute)).await;
        let seen = seen.with_context(|| format!("no Job of {name}"))?;
        self.read_ledger().await?;
        let published = self.ledger.iter().rev().find(|entry| {
            matches!(&entry.record, Record::EventPublished { event, .. } if event.data["chute_id"] == chute.as_str())
        });
        let taken = seen.since(published.context("the event is not in the ledger")?.at);
        // Its pod starts on this machine, where the next one's would be somewhere else.
        let is_active = |entry: &Entry| matches!(&entry.record, Record::InstanceActivated { chute: of, .. } if of.as_str() == chute);
        let deadline = Instant::now() + START_PATIENCE;
        while !self.ledger.iter().rev().any(is_active) {
            anyhow::ensure!(Instant::now() < deadline, "{name} is not active");
            sleep(LOOK_EVERY).await;
            self.read_ledger().await?;
        }
        Ok(taken)
    }

    async fn read_ledger(&mut self) -> anyhow::Result<()> {
        let after = self.ledger.last().map_or(0, |entry| entry.id);
        let new = self.doors.ledger(after).await?;
        self.ledger.extend(new);
        Ok(())
    }

    /// Looks at the miner's state and at what must hold at any time.
    async fn look(&mut self) -> anyhow::Result<Value> {
        let state = self.doors.state().await?;
        let violations = rows(&state, "violations").iter();
        self.violations.extend(violations.map(ToString::to_string));
        self.read_ledger().await?;
        let validator = self.doors.validator().await?;
        let running = self.pods.running();
        self.pods_max = self.pods_max.max(running.len());
        self.doubled
            .extend(checks::doubled(&validator, &counts(&running)));
        self.looks += 1;
        Ok(state)
    }

    /// What is not as it should be when nothing is under way.
    async fn unsettled(&mut self) -> anyhow::Result<Vec<String>> {
        let state = self.look().await?;
        let validator = self.doors.validator().await?;
        let running = self.pods.running();
        let mut found = checks::orphaned(&state, &validator, &counts(&running));
        found.extend(checks::under_way(&state));
        let jobs: Api<Job> = Api::namespaced(self.plane.client.clone(), CHUTES);
        let jobs = jobs.list(&ListParams::default()).await?;
        for job in &jobs {
            let id = job.labels().get(DEPLOYMENT_LABEL).cloned().unwrap_or_default();
            let mut deployments = rows(&state, "deployments").iter();
            match deployments.find(|row| row["deployment_id"] == id.as_str()) {
                Some(row) => found.extend(differs(&state, row, job)),
                None => found.push(format!("Job {} has no deployment", job.name_any())),
            }
        }
        let runs = |name: &String| {
            let mut deployments = rows(&state, "deployments").iter();
            deployments.any(|row| row["chute_name"] == name.as_str())
        };
        let idle = self.wanted.iter().filter(|name| !runs(name));
        found.extend(idle.map(|name| format!("the chute {name} does not run")));
        Ok(found)
    }

    /// Waits until each side has its other and nothing is under way.
    pub(super) async fn settle(&mut self, patience: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            let found = match self.unsettled().await {
                Ok(found) if found.is_empty() => return Ok(()),
                Ok(found) => found,
                Err(error) => vec![format!("{error:#}")],
            };
            let some: Vec<&String> = found.iter().take(5).collect();
            anyhow::ensure!(
                Instant::now() < deadline,
                "{} things are not settled: {some:?}",
                found.len()
            );
            sleep(LOOK_EVERY).await;
        }
    }

    /// What runs now.
    pub(super) fn remember(&self) -> Vec<Running> {
        self.pods.running()
    }

    /// What ran must still run in the same pod, unless somebody else than the miner ended it.
    pub(super) async fn check_kept(&mut self, before: &[Running]) -> anyhow::Result<()> {
        let state = self.look().await?;
        let endings = Endings::of(&self.ledger);
        let running = self.pods.running();
        for one in before {
            if running.contains(one) {
                self.pods_kept += 1;
                continue;
            }
            let row = checks::row_of(&state, &one.deployment);
            if !ended_by_others(row, &endings, &self.wanted) {
                let (deployment, node) = (&one.deployment, &one.node);
                let why = row.map_or(&Value::Null, |row| &row["stop_reason"]);
                self.reasons.push(format!(
                    "the pod of deployment {deployment} on {node} ended: {why}"
                ));
            }
        }
        Ok(())
    }

    /// Owners delete all chutes; nothing may be left of them.
    pub(super) async fn remove_all(&mut self) -> anyhow::Result<()> {
        let validator = self.doors.validator().await?;
        for chute in rows(&validator, "chutes") {
            let chute = chute["name"].as_str().unwrap_or_default().to_owned();
            self.act(Action::DeleteChute { chute }).await?;
        }
        if self.settle(EVENTS_PATIENCE).await.is_err() {
            self.stop_what_the_budget_left().await?;
        }
        self.settle(super::CALM_PATIENCE).await?;
        let deadline = Instant::now() + super::CALM_PATIENCE;
        loop {
            let left: Vec<String> = self.remains().await?.difference(&self.before).cloned().collect();
            if left.is_empty() {
                break;
            }
            let some = &left[..left.len().min(5)];
            anyhow::ensure!(
                Instant::now() < deadline,
                "{} objects are left: {some:?}",
                left.len()
            );
            sleep(LOOK_EVERY).await;
        }
        let state = self.look().await?;
        let held = rows(&state, "gpus")
            .iter()
            .filter(|gpu| !gpu["holder"].is_null())
            .count();
        anyhow::ensure!(held == 0, "{held} GPUs are held by nothing");
        Ok(())
    }

    /// What an operator does when events were lost with the leader that had received them: listings say so, too, but what
    /// they alone say away stays within a budget.
    async fn stop_what_the_budget_left(&mut self) -> anyhow::Result<()> {
        let state = self.look().await?;
        let live = rows(&state, "deployments")
            .iter()
            .filter(|row| row["live"] == true);
        let left: Vec<&Value> = live.map(|row| &row["deployment_id"]).collect();
        self.stopped_by_hand += left.len();
        if !left.is_empty() {
            let body = json!({ "deployments": left, "reason": "its chute is gone", "allow_loss": true, "budgeted": false });
            self.doors.write("/v1/stop", &body).await?;
        }
        Ok(())
    }

    /// The names of all objects where chutes run.
    async fn remains(&self) -> anyhow::Result<BTreeSet<String>> {
        let mut names = BTreeSet::new();
        self.list::<Job>(&mut names).await?;
        self.list::<Pod>(&mut names).await?;
        self.list::<Service>(&mut names).await?;
        self.list::<ConfigMap>(&mut names).await?;
        self.list::<Secret>(&mut names).await?;
        Ok(names)
    }

    async fn list<K>(&self, names: &mut BTreeSet<String>) -> anyhow::Result<()>
    where
        K: kube::Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned,
    {
        let api: Api<K> = Api::namespaced(self.plane.client.clone(), CHUTES);
        for object in api.list(&ListParams::default()).await? {
            names.insert(format!("{} {}", K::kind(&()), object.name_any()));
        }
        Ok(())
    }

    /// CPU time of the members' processes so far.
    pub(super) fn members_cpu(&self) -> Duration {
        let agents = self.agents.members();
        let of_member = |pid: i32| u32::try_from(pid).is_ok_and(|pid| agents.contains(&pid));
        let all = Process::all().into_iter();
        let ours = all.filter(|process| of_member(process.pid) || of_member(process.parent));
        ours.map(|process| process.cpu()).sum()
    }

    /// All figures, and the end of everything.
    pub(super) async fn conclude(mut self, figures: Value) -> anyhow::Result<Outcome> {
        self.doubled.extend(checks::claimed_twice(&self.ledger));
        let verified = |entry: &&Entry| matches!(entry.record, Record::InstanceVerified { .. });
        let activated = |entry: &&Entry| matches!(entry.record, Record::InstanceActivated { .. });
        let (verified, activated) = (
            self.ledger.iter().filter(verified).count(),
            self.ledger.iter().filter(activated).count(),
        );
        let mut reasons = std::mem::take(&mut self.reasons);
        reasons.extend(self.pods.trouble());
        reasons.extend(self.agents.trouble());
        reasons.extend(self.doubled.iter().cloned());
        reasons.extend(self.violations.iter().map(|text| format!("invariant: {text}")));
        if let Some(ended) = self.stand_in.try_wait()? {
            reasons.push(format!("the stand-in ended: {ended}"));
        }
        let mut all = json!({
            "ok": reasons.is_empty(),
            "nodes": self.count,
            "helm_install_ms": self.install_ms,
            "instances_verified": verified,
            "instances_activated": activated,
            "pods_max": self.pods_max,
            "pods_kept": self.pods_kept,
            "stopped_by_hand": self.stopped_by_hand,
            "doubled": self.doubled.len(),
            "invariant_violations": self.violations.len(),
            "looks": self.looks,
        });
        if let (Some(all), Value::Object(figures)) = (all.as_object_mut(), figures) {
            all.extend(figures);
        }
        for watching in &self.watching {
            watching.abort();
        }
        self.agents.stop().await;
        self.plane.stop().await?;
        if !reasons.is_empty() {
            let kept = self.folder.keep();
            reasons.push(format!("logs and data are in {}", kept.display()));
        }
        Ok(Outcome {
            figures: all,
            reasons,
        })
    }
}

fn counts(running: &[Running]) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for one in running {
        *counts.entry(one.deployment.as_str()).or_default() += 1;
    }
    counts
}

/// Whether somebody else than the miner ended a pod, by the row of its deployment. What is wanted still was to go on
/// whatever the validator says of its instance.
fn ended_by_others(row: Option<&Value>, endings: &Endings, wanted: &BTreeSet<String>) -> bool {
    row.is_some_and(|row| {
        let name = row["chute_name"].as_str();
        !name.is_some_and(|name| wanted.contains(name)) && endings.explain(row)
    })
}

/// What a Job has otherwise than its deployment.
fn differs(state: &Value, row: &Value, job: &Job) -> Vec<String> {
    let mut found = Vec::new();
    let spec = job.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
    let node = spec.and_then(|spec| spec.node_name.as_deref());
    let mut servers = rows(state, "servers").iter();
    let server = servers.find(|server| server["server_id"] == row["server_id"]);
    let server = server.and_then(|server| server["name"].as_str());
    if server != node {
        found.push(format!(
            "Job {} runs on {node:?}, its deployment on {server:?}",
            job.name_any()
        ));
    }
    let gpus = gpus_of(job).unwrap_or_default();
    let gpus: BTreeSet<&str> = gpus.iter().map(|gpu| gpu.as_str()).collect();
    let given: BTreeSet<&str> = rows(row, "gpus").iter().filter_map(Value::as_str).collect();
    if gpus != given {
        found.push(format!(
            "Job {} has the GPUs {gpus:?}, its deployment {given:?}",
            job.name_any()
        ));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_others_explain_the_end_of_a_pod_and_nothing_does_of_a_chute_that_is_wanted() {
        let deleted = |instance: &str, by: &str| {
            let entry = json!({ "id": 1, "at": 1, "kind": "instance_deleted", "instance": instance, "chute": "c",
                "by": by, "reason": "" });
            serde_json::from_value::<Entry>(entry).expect("a ledger entry")
        };
        let endings = Endings::of(&[deleted("i1", "cascade"), deleted("i2", "miner")]);
        let wanted = BTreeSet::from(["fleet-2".to_owned()]);
        let rows = [
            ("i1", json!("fleet-1"), true),
            // Its chute is gone.
            ("i1", Value::Null, true),
            ("i1", json!("fleet-2"), false),
            ("i2", json!("fleet-1"), false),
            ("i2", Value::Null, false),
        ];
        for (instance, name, expected) in rows {
            let row = json!({ "instance_id": instance, "chute_id": "c", "chute_name": name });
            assert_eq!(ended_by_others(Some(&row), &endings, &wanted), expected, "{row}");
        }
        assert!(!ended_by_others(None, &endings, &wanted), "nobody knows of it");
    }
}
