//! What the validator does of itself: publishes, updates and deletes chutes, offers bounties and jobs, rolls
//! updates out, deletes instances that never got anywhere.

use std::time::Duration;

use coordinator::validator::rows::{ChuteRow, JobMethod, NodeSelector};
use protocol::id::{ChuteId, ChuteVersion, InstanceId, JobId};
use serde_json::json;
use tokio::time::sleep;

use super::validator::{Job, Validator};

/// An instance that is not verified for so long is deleted.
const UNVERIFIED_MAX_MS: u64 = 45_000;
/// The most chutes at a time.
const CHUTES_MAX: usize = 9;

fn row(id: ChuteId, version: ChuteVersion, random: &mut fastrand::Rng) -> ChuteRow {
    let library = ["0.2.61", "0.3.12", "0.3.40", "0.3.40"][random.usize(..4)];
    ChuteRow {
        name: format!("acme/{id}"),
        image: format!("acme/{id}:1"),
        image_id: format!("image-of-{id}"),
        code: format!("# {version}\n"),
        filename: "app.py".to_owned(),
        ref_str: "app:chute".to_owned(),
        chutes_version: Some(library.to_owned()),
        supported_gpus: vec!["a6000".to_owned()],
        node_selector: NodeSelector {
            gpu_count: random.u64(1..3),
            ..NodeSelector::default()
        },
        cords: 1,
        jobs: vec![JobMethod {
            name: "train".to_owned(),
            ports: Vec::new(),
            disk_gb: Some(20),
        }],
        concurrency: 1,
        public: Some(true),
        preemptible: Some(random.u8(..5) != 0),
        tee: Some(false),
        effective_compute_multiplier_milli: Some(random.u64(200..4000)),
        chute_id: id,
        version,
    }
}

impl Validator {
    fn version(&self) -> ChuteVersion {
        let name = self.lock().name("version");
        ChuteVersion::parse(&name).expect("letters and digits")
    }

    pub(super) fn publish(&self) {
        let version = self.version();
        let mut inner = self.lock();
        if inner.chutes.len() >= CHUTES_MAX {
            return;
        }
        let id = ChuteId::parse(&inner.name("chute")).expect("letters and digits");
        let row = row(id.clone(), version.clone(), &mut inner.random);
        inner.chutes.insert(id.clone(), row);
        drop(inner);
        self.recorder
            .note(format_args!("validator: publishes {id} {version}"));
        self.emit(
            "chute_created",
            json!({"chute_id": id, "version": version, "job_only": false}),
            false,
        );
    }

    fn any_chute(&self) -> Option<ChuteId> {
        let mut inner = self.lock();
        let ids: Vec<ChuteId> = inner.chutes.keys().cloned().collect();
        let at = inner.random.usize(..ids.len().max(1));
        ids.get(at).cloned()
    }

    fn update(&self, chute: &ChuteId) {
        let version = self.version();
        let targets: Vec<(InstanceId, ChuteVersion)> = {
            let mut inner = self.lock();
            let mut random = inner.random.fork();
            let Some(known) = inner.chutes.get_mut(chute) else {
                return;
            };
            let mut fresh = row(chute.clone(), version.clone(), &mut random);
            // The library of a chute changes seldom, its size never.
            fresh.node_selector.clone_from(&known.node_selector);
            *known = fresh;
            let of_chute = inner.instances.iter().filter(|(_, row)| row.chute == *chute);
            of_chute
                .map(|(id, row)| (id.clone(), row.version.clone()))
                .collect()
        };
        self.recorder
            .note(format_args!("validator: updates {chute} to {version}"));
        self.emit(
            "chute_updated",
            json!({"chute_id": chute, "version": version, "job_only": false}),
            false,
        );
        for (instance, old_version) in targets {
            let data = json!({
                "chute_id": chute, "instance_id": instance, "old_version": old_version,
                "new_version": version, "reason": "code change",
            });
            self.emit("rolling_update", data, true);
        }
    }

    fn withdraw(&self, chute: &ChuteId) {
        let instances: Vec<InstanceId> = {
            let mut inner = self.lock();
            inner.chutes.remove(chute);
            inner.bounties.remove(chute);
            for job in inner.jobs.values_mut().filter(|job| job.chute == *chute) {
                job.over = true;
            }
            let of_chute = inner.instances.iter().filter(|(_, row)| row.chute == *chute);
            of_chute.map(|(id, _)| id.clone()).collect()
        };
        self.recorder.note(format_args!("validator: withdraws {chute}"));
        self.emit(
            "chute_deleted",
            json!({"chute_id": chute, "version": null}),
            false,
        );
        for instance in instances {
            self.delete(&instance, "its chute was deleted");
        }
    }

    fn offer_bounty(&self, chute: &ChuteId) {
        let amount = {
            let mut inner = self.lock();
            let amount = inner.random.u64(10..5000);
            inner.bounties.insert(chute.clone(), amount);
            amount
        };
        self.emit(
            "bounty_change",
            json!({"chute_id": chute, "bounty": amount}),
            false,
        );
    }

    fn offer_job(&self, chute: &ChuteId) {
        let job = {
            let mut inner = self.lock();
            let id = JobId::parse(&inner.name("job")).expect("letters and digits");
            inner.jobs.insert(id.clone(), Job::new(chute.clone()));
            id
        };
        self.recorder
            .note(format_args!("validator: offers {job} of {chute}"));
        let data = json!({
            "job_id": job, "chute_id": chute, "image_id": "i", "method": "train", "gpu_count": 1,
            "compute_multiplier": 1.0, "exclude": [], "disk_gb": 20,
        });
        self.emit("job_created", data, false);
    }

    fn withdraw_job(&self) {
        let job = {
            let mut inner = self.lock();
            let open = inner.jobs.iter_mut().find(|(_, job)| !job.over);
            open.map(|(id, job)| {
                job.over = true;
                id.clone()
            })
        };
        if let Some(job) = job {
            self.emit("job_deleted", json!({"job_id": job}), false);
        }
    }

    /// Any instance, for the fault director.
    pub(super) fn any_instance(&self) -> Option<InstanceId> {
        let mut inner = self.lock();
        let ids: Vec<InstanceId> = inner.instances.keys().cloned().collect();
        let at = inner.random.usize(..ids.len().max(1));
        ids.get(at).cloned()
    }

    /// Trades until faults end, cleans up for ever.
    pub(super) async fn trade(self) {
        for _ in 0..4 {
            self.publish();
        }
        loop {
            let (pause_ms, deed) = {
                let mut inner = self.lock();
                (inner.random.u64(500..4000), inner.random.u8(..16))
            };
            sleep(Duration::from_millis(pause_ms)).await;
            let now = self.recorder.now_ms();
            let stale: Vec<InstanceId> = {
                let inner = self.lock();
                let unverified = inner.instances.iter().filter(|(_, row)| !row.verified);
                unverified
                    .filter(|(_, row)| row.since_ms + UNVERIFIED_MAX_MS < now)
                    .map(|(id, _)| id.clone())
                    .collect()
            };
            for instance in stale {
                self.delete(&instance, "it was never verified");
            }
            let Some(chute) = self.any_chute().filter(|_| self.recorder.faults_are_on()) else {
                continue;
            };
            match deed {
                0..=3 => self.publish(),
                4..=6 => self.update(&chute),
                7 => self.withdraw(&chute),
                8..=9 => self.offer_bounty(&chute),
                10..=12 => self.offer_job(&chute),
                13 => self.withdraw_job(),
                _ => {}
            }
        }
    }
}
