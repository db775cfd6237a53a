//! The validator model: what it publishes, grants and keeps. REST is in `api.rs`, the socket in `socket.rs`.
//!
//! It is strict where it matters: a second claim with one launch config, a second claim for one job, and an
//! activation after its instance's deletion are violations.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use coordinator::validator::rows::ChuteRow;
use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, ChuteVersion, ConfigId, DeploymentId, GpuId, InstanceId, JobId, ServerId};
use protocol::socket_io::Packet;
use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc};
use tokio::time::sleep;

use super::network::{Network, Place};
use super::recorder::Recorder;

/// A launch config.
#[derive(Debug)]
pub(super) struct Config {
    pub(super) chute: ChuteId,
    pub(super) version: ChuteVersion,
    pub(super) job: Option<JobId>,
    pub(super) token: String,
    claimed_by: Option<DeploymentId>,
}

impl Config {
    pub(super) fn new(chute: ChuteId, version: ChuteVersion, job: Option<JobId>, token: String) -> Self {
        Self {
            chute,
            version,
            job,
            token,
            claimed_by: None,
        }
    }
}

/// An instance of ours.
#[derive(Debug, Clone)]
pub(super) struct Instance {
    pub(super) chute: ChuteId,
    pub(super) version: ChuteVersion,
    pub(super) config: Option<ConfigId>,
    pub(super) verified: bool,
    pub(super) active: bool,
    pub(super) since_ms: u64,
}

/// A job on offer.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) chute: ChuteId,
    /// Granted to us once; never again.
    pub(super) tried: bool,
    pub(super) over: bool,
    claimed: bool,
}

impl Job {
    pub(super) fn new(chute: ChuteId) -> Self {
        Self {
            chute,
            tried: false,
            over: false,
            claimed: false,
        }
    }
}

/// A GPU that was announced to it.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) server: ServerId,
    pub(super) seed: u64,
    pub(super) verified: bool,
}

/// A verification under way.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) gpus: Vec<GpuId>,
    pub(super) ready_at_ms: u64,
}

/// A connected socket.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) number: u64,
    pub(super) out: mpsc::Sender<Packet>,
    pub(super) kick: Arc<Notify>,
}

/// Windows of trouble, as virtual times at which they end.
#[derive(Debug, Default)]
pub(super) struct Trouble {
    pub(super) rest_down_until_ms: u64,
    pub(super) instances_unknown_until_ms: u64,
    pub(super) chutes_unknown_until_ms: u64,
    pub(super) socket_down_until_ms: u64,
    pub(super) auth_fails_until_ms: u64,
    pub(super) full_until_ms: u64,
    /// A listing that lied was told; another one would be no single mistake any more.
    pub(super) lied: bool,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) random: fastrand::Rng,
    pub(super) chutes: BTreeMap<ChuteId, ChuteRow>,
    pub(super) bounties: BTreeMap<ChuteId, u64>,
    pub(super) configs: BTreeMap<ConfigId, Config>,
    pub(super) instances: BTreeMap<InstanceId, Instance>,
    pub(super) jobs: BTreeMap<JobId, Job>,
    pub(super) nodes: BTreeMap<GpuId, Node>,
    pub(super) tasks: BTreeMap<String, Task>,
    pub(super) deletions_asked: BTreeSet<InstanceId>,
    pub(super) session: Option<Session>,
    /// Sockets that are open and authenticated, and whose they are.
    pub(super) authenticated: BTreeMap<u64, u64>,
    sessions: u64,
    /// Whether targeted events reach the hotkey: the closing of any of its sessions ends that.
    pub(super) targeted: bool,
    pub(super) trouble: Trouble,
    next: u64,
}

impl Inner {
    /// A fresh name.
    pub(super) fn name(&mut self, prefix: &str) -> String {
        self.next += 1;
        format!("{prefix}-{}", self.next)
    }

    /// The number of a new session.
    pub(super) fn next_session(&mut self) -> u64 {
        self.sessions += 1;
        self.sessions
    }

    /// True once in `of` times, while faults are on.
    pub(super) fn one_in(&mut self, of: u32, recorder: &Recorder) -> bool {
        let hit = self.random.u32(..of) == 0;
        hit && recorder.faults_are_on()
    }
}

/// The model; clones are the same one.
#[derive(Debug, Clone)]
pub(super) struct Validator {
    pub(super) hotkey: Hotkey,
    pub(super) miner: Hotkey,
    pub(super) recorder: Recorder,
    /// From where it is seen.
    pub(super) seen_by: Option<(u64, Network)>,
    inner: Arc<Mutex<Inner>>,
}

impl Validator {
    pub(super) fn new(hotkey: Hotkey, miner: Hotkey, recorder: Recorder, random: fastrand::Rng) -> Self {
        let inner = Inner {
            random,
            chutes: BTreeMap::new(),
            bounties: BTreeMap::new(),
            configs: BTreeMap::new(),
            instances: BTreeMap::new(),
            jobs: BTreeMap::new(),
            nodes: BTreeMap::new(),
            tasks: BTreeMap::new(),
            deletions_asked: BTreeSet::new(),
            session: None,
            authenticated: BTreeMap::new(),
            sessions: 0,
            targeted: false,
            trouble: Trouble::default(),
            next: 0,
        };
        Self {
            hotkey,
            miner,
            recorder,
            seen_by: None,
            inner: Arc::new(Mutex::new(inner)),
        }
    }

    /// The same validator at the other end of a member's network.
    pub(super) fn seen_by(&self, member: u64, network: Network) -> Self {
        let seen_by = Some((member, network));
        Self {
            seen_by,
            ..self.clone()
        }
    }

    /// Waits until the way to the member that looks is open; false if that takes too long.
    pub(super) async fn is_reached(&self, within: Duration) -> bool {
        let Some((member, network)) = &self.seen_by else {
            return true;
        };
        let member = Place::Member(*member);
        network.until_it_passes(member, Place::Validator, within).await
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if it lists this instance.
    pub(super) fn has(&self, instance: &InstanceId) -> bool {
        self.lock().instances.contains_key(instance)
    }

    /// Of the members with an authenticated socket, at most one may take itself for the leader.
    pub(super) fn check_sockets(&self, network: &Network) {
        let owners: BTreeSet<u64> = self.lock().authenticated.values().copied().collect();
        let leading = network.leading();
        let both: Vec<u64> = owners
            .into_iter()
            .filter(|owner| leading.contains(owner))
            .collect();
        if both.len() > 1 {
            let what = format!("5: members {both:?} act on the socket at the same time");
            self.recorder.violation(what);
        }
    }

    pub(super) fn end_trouble(&self) {
        self.lock().trouble = Trouble::default();
    }

    /// A workload claims its launch config.
    pub(super) fn claim(
        &self,
        config_id: &ConfigId,
        token: &str,
        deployment: &DeploymentId,
    ) -> Result<InstanceId, &'static str> {
        let mut inner = self.lock();
        let instance = InstanceId::parse(&inner.name("instance")).expect("letters and digits");
        let Some(config) = inner.configs.get_mut(config_id) else {
            self.recorder.violation(format_args!(
                "{deployment} claims {config_id}, which was never granted"
            ));
            return Err("unknown launch config");
        };
        if config.token != token {
            self.recorder.violation(format_args!(
                "{deployment} claims {config_id} with another's token"
            ));
            return Err("wrong token");
        }
        if let Some(first) = config.claimed_by.replace(deployment.clone()) {
            self.recorder.violation(format_args!(
                "4: {config_id} is used by {first} and again by {deployment}"
            ));
            return Err("launch config was used");
        }
        let (chute, version, job) = (config.chute.clone(), config.version.clone(), config.job.clone());
        if let Some(job_id) = job {
            let job = inner.jobs.get_mut(&job_id).ok_or("the job is gone")?;
            if job.over {
                return Err("the job was withdrawn");
            }
            if std::mem::replace(&mut job.claimed, true) {
                self.recorder
                    .violation(format_args!("4: job {job_id} is claimed twice"));
            }
        }
        if inner.chutes.get(&chute).is_none_or(|row| row.version != version) {
            return Err("the chute has changed");
        }
        let row = Instance {
            chute: chute.clone(),
            version,
            config: Some(config_id.clone()),
            verified: false,
            active: false,
            since_ms: self.recorder.now_ms(),
        };
        inner.instances.insert(instance.clone(), row);
        drop(inner);
        self.recorder.note(format_args!(
            "validator: {deployment} claims {config_id} as {instance}"
        ));
        let data =
            json!({"chute_id": chute, "instance_id": instance, "config_id": config_id, "gpu_count": 1});
        self.emit("instance_created", data, true);
        Ok(instance)
    }

    /// A workload has proved its GPUs.
    pub(super) fn verify(&self, instance: &InstanceId) -> Result<(), &'static str> {
        let mut inner = self.lock();
        inner
            .instances
            .get_mut(instance)
            .ok_or("no such instance")?
            .verified = true;
        drop(inner);
        self.emit("instance_verified", json!({"instance_id": instance}), true);
        Ok(())
    }

    /// A workload is ready for requests.
    pub(super) fn activate(&self, instance: &InstanceId) -> Result<(), &'static str> {
        let mut inner = self.lock();
        let row = inner.instances.get_mut(instance).ok_or("no such instance")?;
        row.active = true;
        let data = json!({"instance_id": instance, "chute_id": row.chute, "config_id": row.config});
        drop(inner);
        self.recorder.event("activations");
        self.emit("instance_activated", data, true);
        Ok(())
    }

    /// Deletes an instance and says so; false if there is none.
    pub(super) fn delete(&self, instance: &InstanceId, why: &str) -> bool {
        let removed = self.lock().instances.remove(instance);
        let Some(row) = removed else { return false };
        self.recorder
            .note(format_args!("validator: deletes {instance}: {why}"));
        let data =
            json!({"instance_id": instance, "chute_id": row.chute, "config_id": row.config, "why": why});
        self.emit("instance_deleted", data, true);
        true
    }

    /// Broadcasts an event, which may be lost, repeated, late and so out of order.
    pub(super) fn emit(&self, reason: &'static str, mut data: Value, targeted: bool) {
        if targeted {
            data["miner_hotkey"] = json!(self.miner.as_str());
        }
        let packet = Packet::event("miner_broadcast", json!({"reason": reason, "data": data}));
        let delays: Vec<u64> = {
            let mut inner = self.lock();
            let (lost, twice, late) = (
                inner.one_in(8, &self.recorder),
                inner.one_in(10, &self.recorder),
                inner.one_in(6, &self.recorder),
            );
            if lost {
                self.recorder.fault("event lost", reason);
                return;
            }
            let mut delays = vec![inner.random.u64(1..150)];
            if twice {
                self.recorder.fault("event repeated", reason);
                delays.push(inner.random.u64(1..4000));
            }
            if late {
                self.recorder.fault("event late", reason);
                delays[0] += inner.random.u64(500..8000);
            }
            delays
        };
        for delay_ms in delays {
            let (validator, packet) = (self.clone(), packet.clone());
            tokio::spawn(async move {
                sleep(Duration::from_millis(delay_ms)).await;
                let inner = validator.lock();
                if let Some(session) = inner.session.as_ref().filter(|_| inner.targeted || !targeted) {
                    // A session that does not keep up loses events, as over a real socket.
                    let _ = session.out.try_send(packet);
                }
            });
        }
    }
}
