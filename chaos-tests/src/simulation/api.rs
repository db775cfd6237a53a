//! The validator model's REST interface, with the troubles of a network in front of it.

use std::collections::BTreeSet;
use std::time::Duration;

use coordinator::validator::client::{Call, Deletion, SupportedGpus, ValidatorApi};
use coordinator::validator::rows::{
    ActiveInstanceRow, Advertised, BountyRow, ChuteRow, ImageRow, InstanceRow, JobRow, LaunchConfig,
    MetricRow, NewServer, NodeAdvertisement, NodeRow, RollingUpdateRow, SupportedGpu, UtilizationRow,
    VerificationStatus,
};
use coordinator::validator::stream::Listing;
use coordinator::validator::{Error, Result};
use futures_util::FutureExt;
use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, ChuteVersion, ConfigId, GpuId, InstanceId, JobId, ServerId};
use protocol::time::UnixMillis;
use protocol::workload::Secret;
use serde_json::json;
use tokio::time::sleep;

use super::validator::{Config, Inner, Instance, Node, Task, Validator};

/// A call that gets no answer for so long has failed.
const CALL_MAX: Duration = Duration::from_secs(15);

/// What the network does to one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Luck {
    Good,
    Refused(u16),
    Unreachable,
    Timeout,
    /// The deed is done, the answer is lost.
    AnswerLost,
}

fn refused(status: u16, detail: &str) -> Error {
    Error::Refused {
        status,
        detail: detail.to_owned(),
    }
}

fn unreachable() -> Error {
    Error::Unreachable("simulated".to_owned())
}

impl Validator {
    fn luck(&self, what: &'static str) -> (Luck, Duration, Duration) {
        let now = self.recorder.now_ms();
        let mut inner = self.lock();
        let mut before = Duration::from_millis(inner.random.u64(2..80));
        let after = Duration::from_millis(inner.random.u64(2..80));
        if inner.trouble.rest_down_until_ms > now {
            self.recorder.fault("REST down", what);
            return (Luck::Unreachable, before, after);
        }
        let roll = inner.random.u32(..1000);
        if !self.recorder.faults_are_on() {
            return (Luck::Good, before, after);
        }
        let (luck, kind) = match roll {
            0..=19 => {
                let statuses = [500, 502, 503, 504, 429];
                let status = statuses[inner.random.usize(..statuses.len())];
                (Luck::Refused(status), "REST error")
            }
            20..=34 => (Luck::Unreachable, "REST unreachable"),
            35..=39 => (Luck::Timeout, "REST timeout"),
            40..=64 => (Luck::AnswerLost, "REST answer lost"),
            65..=89 => {
                before += Duration::from_millis(inner.random.u64(500..6000));
                (Luck::Good, "REST slow")
            }
            // Granting takes the real validator long, too.
            90..=349 if what == "launch_config" => {
                before += Duration::from_millis(inner.random.u64(200..4000));
                (Luck::Good, "REST slow")
            }
            _ => return (Luck::Good, before, after),
        };
        self.recorder.fault(kind, what);
        (luck, before, after)
    }

    async fn call<T>(&self, what: &'static str, deed: impl FnOnce(&Self) -> Result<T> + Send) -> Result<T> {
        if let Some((member, network)) = &self.seen_by {
            network.check_acts(*member, what);
        }
        let (luck, before, after) = self.luck(what);
        sleep(before).await;
        if !self.is_reached(CALL_MAX).await {
            return Err(unreachable());
        }
        match luck {
            Luck::Refused(status) => return Err(refused(status, "simulated")),
            Luck::Unreachable => return Err(unreachable()),
            Luck::Timeout => {
                sleep(CALL_MAX).await;
                return Err(unreachable());
            }
            Luck::Good | Luck::AnswerLost => {}
        }
        let done = deed(self);
        sleep(after).await;
        if luck == Luck::AnswerLost || !self.is_reached(CALL_MAX).await {
            return Err(unreachable());
        }
        done
    }

    /// A stream: cut or with broken rows now and then. Without rows it says nothing, but for `says_none`.
    async fn list<T: Send>(
        &self,
        what: &'static str,
        says_none: bool,
        rows: impl FnOnce(&Inner) -> Vec<T> + Send,
    ) -> Result<Listing<T>> {
        self.call(what, |validator| {
            let mut inner = validator.lock();
            let mut rows = rows(&inner);
            let now = validator.recorder.now_ms();
            let trouble = &inner.trouble;
            let out = match what {
                "instances" => trouble.instances_unknown_until_ms > now,
                "chutes" => trouble.chutes_unknown_until_ms > now,
                _ => false,
            };
            if out || inner.one_in(40, &validator.recorder) {
                validator.recorder.fault("listing unknown", what);
                return Ok(Listing::Unknown);
            }
            if rows.len() > 1 && inner.one_in(30, &validator.recorder) {
                validator.recorder.fault("listing truncated", what);
                rows.truncate(rows.len() / 2);
                return Ok(Listing::Known { rows, broken_rows: 1 });
            }
            let may_lie = what == "instances" && !rows.is_empty() && !inner.trouble.lied;
            if may_lie && inner.one_in(25, &validator.recorder) {
                validator.recorder.fault("listing empty", what);
                inner.trouble.lied = true;
                rows.clear();
            }
            Ok(if rows.is_empty() && !says_none {
                Listing::Unknown
            } else {
                Listing::Known { rows, broken_rows: 0 }
            })
        })
        .await
    }

    fn grant(&self, chute: &ChuteId, job: Option<&JobId>) -> Result<LaunchConfig> {
        let now = self.recorder.now_ms();
        let mut inner = self.lock();
        let Some(row) = inner.chutes.get(chute) else {
            return Err(refused(404, "no such chute"));
        };
        let version = row.version.clone();
        let full = inner.trouble.full_until_ms > now;
        if full || inner.one_in(12, &self.recorder) {
            let statuses = [423, 423, 409, 429];
            let status = statuses[inner.random.usize(..statuses.len())];
            self.recorder.fault("launch refused", status);
            return Err(refused(status, "no room"));
        }
        if let Some(job_id) = job {
            let Some(job) = inner.jobs.get_mut(job_id).filter(|job| !job.over) else {
                return Err(refused(404, "no such job"));
            };
            if std::mem::replace(&mut job.tried, true) {
                return Err(refused(403, "you have tried this job"));
            }
        }
        let config = ConfigId::parse(&inner.name("config")).expect("letters and digits");
        let token = format!("token-of-{config}");
        let granted = Config::new(chute.clone(), version, job.cloned(), token.clone());
        inner.configs.insert(config.clone(), granted);
        drop(inner);
        self.recorder.event("launch configs");
        self.recorder
            .note(format_args!("validator: grants {config} for {chute}"));
        Ok(LaunchConfig {
            config,
            token: Secret::new(token),
        })
    }

    fn take_nodes(&self, server: &ServerId, gpus: &[NodeAdvertisement]) -> Result<Advertised> {
        let mut inner = self.lock();
        if gpus.iter().any(|gpu| inner.nodes.contains_key(&gpu.device.uuid)) {
            return Err(refused(409, "a GPU is known already"));
        }
        let (task_id, seed) = (inner.name("task"), inner.random.u64(..));
        let ready_at_ms = self.recorder.now_ms() + inner.random.u64(300..4000);
        let mut nodes = Vec::new();
        for gpu in gpus {
            let node = Node {
                server: server.clone(),
                seed,
                verified: false,
            };
            nodes.push(node_row(&gpu.device.uuid, &node));
            inner.nodes.insert(gpu.device.uuid.clone(), node);
        }
        let gpus = gpus.iter().map(|gpu| gpu.device.uuid.clone()).collect();
        inner.tasks.insert(task_id.clone(), Task { gpus, ready_at_ms });
        Ok(Advertised { task_id, nodes })
    }

    fn decide(&self, task_id: &str) -> VerificationStatus {
        let mut inner = self.lock();
        let now = self.recorder.now_ms();
        let Some(task) = inner.tasks.get(task_id).filter(|task| task.ready_at_ms <= now) else {
            return VerificationStatus::Pending;
        };
        let gpus = task.gpus.clone();
        if gpus.iter().any(|gpu| !inner.nodes.contains_key(gpu)) {
            return VerificationStatus::Failed("a GPU was deleted".to_owned());
        }
        for gpu in &gpus {
            if let Some(node) = inner.nodes.get_mut(gpu) {
                node.verified = true;
            }
        }
        VerificationStatus::Verified
    }

    fn announce(&self, chute: &ChuteId) -> Result<InstanceRow> {
        let mut inner = self.lock();
        let Some(row) = inner.chutes.get(chute) else {
            return Err(refused(404, "no such chute"));
        };
        let version = row.version.clone();
        let id = InstanceId::parse(&inner.name("instance")).expect("letters and digits");
        let instance = Instance {
            chute: chute.clone(),
            version,
            config: None,
            verified: false,
            active: false,
            since_ms: self.recorder.now_ms(),
        };
        let row = instance_row(&id, &instance);
        inner.instances.insert(id, instance);
        Ok(row)
    }

    fn activate_announced(&self, instance: &InstanceId) -> Result<InstanceRow> {
        let mut inner = self.lock();
        if inner.deletions_asked.contains(instance) {
            self.recorder.violation(format_args!(
                "{instance} is activated after its deletion was asked for"
            ));
        }
        let Some(row) = inner.instances.get_mut(instance) else {
            return Err(refused(404, "no such instance"));
        };
        (row.active, row.verified) = (true, true);
        self.recorder.event("activations");
        Ok(instance_row(instance, row))
    }
}

fn time(at_ms: u64) -> Option<UnixMillis> {
    Some(UnixMillis(at_ms))
}

fn node_row(gpu: &GpuId, node: &Node) -> NodeRow {
    NodeRow {
        gpu: gpu.clone(),
        server_id: Some(node.server.clone()),
        gpu_identifier: Some("a6000".to_owned()),
        seed: Some(node.seed),
        verification_host: None,
        verification_error: None,
        verified_at: if node.verified { time(1) } else { None },
    }
}

fn instance_row(id: &InstanceId, row: &Instance) -> InstanceRow {
    InstanceRow {
        instance_id: id.clone(),
        chute_id: row.chute.clone(),
        version: Some(row.version.clone()),
        config_id: row.config.clone(),
        active: row.active,
        verified: row.verified,
        created_at: time(row.since_ms),
        activated_at: None,
        last_verified_at: None,
        host: None,
        port: None,
        compute_multiplier_milli: None,
    }
}

impl ValidatorApi for Validator {
    fn hotkey(&self) -> &Hotkey {
        &self.hotkey
    }

    fn clock_offset_ms(&self) -> Option<i64> {
        Some(0)
    }

    fn ping(&self) -> Call<'_, ()> {
        self.call("ping", |_| Ok(())).boxed()
    }

    fn chutes(&self) -> Call<'_, Listing<ChuteRow>> {
        self.list("chutes", false, |inner| inner.chutes.values().cloned().collect())
            .boxed()
    }

    fn images(&self) -> Call<'_, Listing<ImageRow>> {
        self.list("images", false, |_| Vec::new()).boxed()
    }

    fn nodes(&self) -> Call<'_, Listing<NodeRow>> {
        let rows = |inner: &Inner| {
            inner
                .nodes
                .iter()
                .map(|(gpu, node)| node_row(gpu, node))
                .collect()
        };
        self.list("nodes", false, rows).boxed()
    }

    fn instances(&self) -> Call<'_, Listing<InstanceRow>> {
        let rows = |inner: &Inner| {
            inner
                .instances
                .iter()
                .map(|(id, row)| instance_row(id, row))
                .collect()
        };
        self.list("instances", true, rows).boxed()
    }

    fn jobs(&self) -> Call<'_, Listing<JobRow>> {
        let rows = |inner: &Inner| {
            let open = inner.jobs.iter().filter(|(_, job)| !job.over && !job.tried);
            open.map(|(id, job)| {
                let row = json!({"job_id": id, "chute_id": job.chute, "method": "train"});
                serde_json::from_value(row).expect("a good row")
            })
            .collect()
        };
        self.list("jobs", false, rows).boxed()
    }

    fn metrics(&self) -> Call<'_, Listing<MetricRow>> {
        let rows = |inner: &Inner| {
            let row = |chute: &ChuteId| MetricRow {
                chute_id: chute.clone(),
                instance_count: 3,
                total_invocations: 100,
                rate_limit_count: 10,
                total_compute_time_milli: Some(500_000),
                compute_multiplier_milli: Some(1000),
                total_usage_usd_micros: None,
            };
            inner.chutes.keys().map(row).collect()
        };
        self.list("metrics", false, rows).boxed()
    }

    fn active_instances(&self) -> Call<'_, Listing<ActiveInstanceRow>> {
        self.list("active_instances", false, |_| Vec::new()).boxed()
    }

    fn utilization(&self) -> Call<'_, Listing<UtilizationRow>> {
        self.list("utilization", false, |_| Vec::new()).boxed()
    }

    fn rolling_updates(&self) -> Call<'_, Listing<RollingUpdateRow>> {
        self.list("rolling_updates", false, |_| Vec::new()).boxed()
    }

    fn bounties(&self) -> Call<'_, Listing<BountyRow>> {
        let rows = |inner: &Inner| {
            let row = |(chute, amount): (&ChuteId, &u64)| BountyRow {
                chute_id: chute.clone(),
                amount: *amount,
                seconds_elapsed: 1,
                time_remaining: None,
            };
            inner.bounties.iter().map(row).collect()
        };
        self.list("bounties", false, rows).boxed()
    }

    fn supported_gpus(&self) -> Call<'_, SupportedGpus> {
        let gpus = SupportedGpus::from([("a6000".to_owned(), SupportedGpu::default())]);
        self.call("supported_gpus", |_| Ok(gpus)).boxed()
    }

    fn chute<'a>(&'a self, chute: &'a ChuteId, version: &'a ChuteVersion) -> Call<'a, Option<ChuteRow>> {
        self.call("chute", move |validator| {
            let row = validator.lock().chutes.get(chute).cloned();
            Ok(row.filter(|row| row.version == *version))
        })
        .boxed()
    }

    fn advertise<'a>(&'a self, server: &'a ServerId, gpus: &'a [NodeAdvertisement]) -> Call<'a, Advertised> {
        self.call("advertise", |validator| validator.take_nodes(server, gpus))
            .boxed()
    }

    fn add_server<'a>(&'a self, _server: &'a NewServer) -> Call<'a, ()> {
        self.call("add_server", |_| Err(refused(404, "no sealed workers here")))
            .boxed()
    }

    fn delete_server<'a>(&'a self, _server: &'a ServerId) -> Call<'a, Deletion> {
        self.call("delete_server", |_| Err(refused(404, "no sealed workers here")))
            .boxed()
    }

    fn verification_status<'a>(&'a self, task_id: &'a str) -> Call<'a, VerificationStatus> {
        let decide = |validator: &Self| {
            let status = validator.decide(task_id);
            if status == VerificationStatus::Verified {
                let gpus: BTreeSet<GpuId> = {
                    let inner = validator.lock();
                    inner
                        .tasks
                        .get(task_id)
                        .into_iter()
                        .flat_map(|task| task.gpus.clone())
                        .collect()
                };
                for gpu in gpus {
                    validator.emit("gpu_verified", json!({"gpu_id": gpu}), true);
                }
            }
            Ok(status)
        };
        self.call("verification_status", decide).boxed()
    }

    fn delete_node<'a>(&'a self, gpu: &'a GpuId) -> Call<'a, Deletion> {
        self.call("delete_node", move |validator| {
            let removed = validator.lock().nodes.remove(gpu);
            Ok(removed.map_or(Deletion::AlreadyGone, |_| Deletion::Deleted))
        })
        .boxed()
    }

    fn launch_config<'a>(&'a self, chute: &'a ChuteId, job: Option<&'a JobId>) -> Call<'a, LaunchConfig> {
        self.call("launch_config", move |validator| validator.grant(chute, job))
            .boxed()
    }

    fn delete_instance<'a>(&'a self, _chute: &'a ChuteId, instance: &'a InstanceId) -> Call<'a, Deletion> {
        self.call("delete_instance", move |validator| {
            validator.lock().deletions_asked.insert(instance.clone());
            Ok(if validator.delete(instance, "the miner asked for it") {
                Deletion::Deleted
            } else {
                Deletion::AlreadyGone
            })
        })
        .boxed()
    }

    fn release_job<'a>(&'a self, job: &'a JobId) -> Call<'a, Deletion> {
        self.call("release_job", move |validator| {
            validator
                .recorder
                .note(format_args!("validator: {job} is given back"));
            Ok(Deletion::Deleted)
        })
        .boxed()
    }

    fn announce_instance<'a>(
        &'a self,
        chute: &'a ChuteId,
        _gpus: &'a [GpuId],
        _host: &'a str,
        _port: u16,
    ) -> Call<'a, InstanceRow> {
        self.call("announce_instance", move |validator| validator.announce(chute))
            .boxed()
    }

    fn activate_instance<'a>(
        &'a self,
        _chute: &'a ChuteId,
        instance: &'a InstanceId,
    ) -> Call<'a, InstanceRow> {
        self.call("activate_instance", move |validator| {
            validator.activate_announced(instance)
        })
        .boxed()
    }

    fn upload_audit<'a>(&'a self, _report: &'a [u8], _block: u64) -> Call<'a, ()> {
        self.call("upload_audit", |_| Ok(())).boxed()
    }
}
