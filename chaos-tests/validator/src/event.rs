//! Events of the websocket (`validator-protocol`, sections 2.5 and 2.6), and what each must lead to at a
//! miner: the ledger carries that, so that a supervisor can tell a lost event from a handled one.

use protocol::hotkey::Hotkey;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::state::{Chute, Image, Instance, Job, Node};

/// What must be true at the miner, some time after an event, whether it came by socket or was found by REST.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequiredEffect {
    /// The GPU counts as verified.
    GpuVerified,
    /// The chute, in this version, is in the catalogue.
    ChuteKnown,
    /// The chute is not in the catalogue and nothing of it runs.
    ChuteGone,
    /// The bounty was seen, or is gone by now.
    BountyKnown,
    /// No lasting effect is asked for.
    Nothing,
    /// The instance is gone or going.
    InstanceReplaced,
    /// A deployment carries the instance and its config, or is gone.
    InstanceKnown,
    /// The deployment counts as verified, or is gone.
    InstanceVerified,
    /// The deployment counts as active, or is gone.
    InstanceActive,
    /// No deployment carries the instance.
    InstanceGone,
    /// The job was offered to the scheduler, or is gone by now.
    JobKnown,
    /// Nothing runs for the job.
    JobGone,
}

/// One event with its recipients.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Which event.
    pub reason: String,
    /// Its data.
    pub data: Value,
    /// Text for people.
    pub message: Option<String>,
    /// Who gets it; everybody when absent.
    pub recipients: Option<Vec<Hotkey>>,
    /// What it must lead to.
    pub effect: RequiredEffect,
}

impl Event {
    fn to_all(reason: &str, data: Value, effect: RequiredEffect) -> Self {
        Self {
            reason: reason.to_owned(),
            data,
            message: None,
            recipients: None,
            effect,
        }
    }

    fn to_owner(reason: &str, owner: &Hotkey, data: Value, effect: RequiredEffect) -> Self {
        Self {
            recipients: Some(vec![owner.clone()]),
            ..Self::to_all(reason, data, effect)
        }
    }

    fn saying(mut self, message: String) -> Self {
        self.message = Some(message);
        self
    }

    /// The argument of `miner_broadcast`.
    #[must_use]
    pub fn envelope(&self) -> Value {
        let mut envelope = json!({"reason": self.reason, "data": self.data});
        if let Some(message) = &self.message {
            envelope["message"] = json!(message);
        }
        if let Some(recipients) = &self.recipients {
            envelope["filter_recipients"] = json!(recipients);
        }
        envelope
    }

    pub(crate) fn gpu_verified(node: &Node) -> Self {
        let data = json!({"gpu_id": node.device.uuid, "miner_hotkey": node.hotkey});
        Self::to_owner("gpu_verified", &node.hotkey, data, RequiredEffect::GpuVerified)
    }

    pub(crate) fn chute_created(chute: &Chute) -> Self {
        Self::to_all("chute_created", chute_data(chute), RequiredEffect::ChuteKnown)
    }

    pub(crate) fn chute_updated(chute: &Chute) -> Self {
        Self::to_all("chute_updated", chute_data(chute), RequiredEffect::ChuteKnown)
    }

    pub(crate) fn chute_deleted(chute: &Chute) -> Self {
        let data = json!({"chute_id": chute.id, "version": chute.version});
        Self::to_all("chute_deleted", data, RequiredEffect::ChuteGone)
    }

    pub(crate) fn bounty_change(chute: &Chute, amount: u64) -> Self {
        let data = json!({"chute_id": chute.id, "bounty": amount});
        Self::to_all("bounty_change", data, RequiredEffect::BountyKnown)
    }

    pub(crate) fn image_created(image: &Image) -> Self {
        let data = json!({"image_id": image.id});
        Self::to_all("image_created", data, RequiredEffect::Nothing)
    }

    pub(crate) fn image_updated(image: &Image, chutes: &[&Chute]) -> Self {
        let text = image.reference();
        let data = json!({
            "image_id": image.id,
            "short_tag": text,
            "patch_version": image.patch_version,
            "chutes_version": image.chutes_version,
            "chute_ids": chutes.iter().map(|chute| &chute.id).collect::<Vec<_>>(),
            "image": text,
        });
        Self::to_all("image_updated", data, RequiredEffect::Nothing)
    }

    pub(crate) fn image_deleted(image: &Image) -> Self {
        let data = json!({"image_id": image.id});
        Self::to_all("image_deleted", data, RequiredEffect::Nothing)
    }

    pub(crate) fn rolling_update(instance: &Instance, old: &str, new: &str, why: &str) -> Self {
        let data = json!({
            "chute_id": instance.chute,
            "instance_id": instance.id,
            "miner_hotkey": instance.hotkey,
            "old_version": old,
            "new_version": new,
            "reason": why,
        });
        Self::to_owner(
            "rolling_update",
            &instance.hotkey,
            data,
            RequiredEffect::InstanceReplaced,
        )
    }

    pub(crate) fn instance_created(instance: &Instance, gpu_model: &str) -> Self {
        let data = json!({
            "chute_id": instance.chute,
            "gpu_count": instance.gpus.len(),
            "gpu_model_name": gpu_model,
            "miner_hotkey": instance.hotkey,
            "instance_id": instance.id,
            "config_id": instance.config,
        });
        let message = format!(
            "Miner {} claimed {} GPU(s) for chute {}",
            instance.hotkey,
            instance.gpus.len(),
            instance.chute
        );
        Self::to_owner(
            "instance_created",
            &instance.hotkey,
            data,
            RequiredEffect::InstanceKnown,
        )
        .saying(message)
    }

    pub(crate) fn instance_verified(instance: &Instance) -> Self {
        let data = json!({"instance_id": instance.id, "miner_hotkey": instance.hotkey});
        Self::to_owner(
            "instance_verified",
            &instance.hotkey,
            data,
            RequiredEffect::InstanceVerified,
        )
    }

    pub(crate) fn instance_activated(instance: &Instance) -> Self {
        let message = format!("Miner {} activated instance {}", instance.hotkey, instance.id);
        Self::to_owner(
            "instance_activated",
            &instance.hotkey,
            instance_data(instance),
            RequiredEffect::InstanceActive,
        )
        .saying(message)
    }

    pub(crate) fn instance_deleted(instance: &Instance, why: &str) -> Self {
        Self::to_owner(
            "instance_deleted",
            &instance.hotkey,
            instance_data(instance),
            RequiredEffect::InstanceGone,
        )
        .saying(why.to_owned())
    }

    /// `again`: after a release the real validator leaves `disk_gb` out.
    pub(crate) fn job_created(job: &Job, chute: &Chute, again: bool) -> Self {
        let mut data = json!({
            "job_id": job.id,
            "method": job.method,
            "chute_id": job.chute,
            "image_id": chute.image,
            "gpu_count": chute.spec.gpu_count,
            "compute_multiplier": job.compute_multiplier,
            "exclude": job.tried_by,
        });
        if !again {
            data["disk_gb"] = json!(job.disk_gb);
        }
        Self::to_all("job_created", data, RequiredEffect::JobKnown)
    }

    pub(crate) fn job_deleted(job: &Job) -> Self {
        let data = json!({"instance_id": job.instance, "job_id": job.id});
        Self::to_all("job_deleted", data, RequiredEffect::JobGone)
    }
}

fn chute_data(chute: &Chute) -> Value {
    json!({"chute_id": chute.id, "version": chute.version, "job_only": chute.spec.job_only()})
}

fn instance_data(instance: &Instance) -> Value {
    json!({
        "chute_id": instance.chute,
        "miner_hotkey": instance.hotkey,
        "instance_id": instance.id,
        "config_id": instance.config,
    })
}
