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

#[cfg(test)]
mod tests {
    use protocol::hotkey::Signer;
    use protocol::id::{ChuteId, ConfigId, GpuId, InstanceId, JobId};
    use protocol::time::UnixMillis;

    use super::*;
    use crate::scenario::ChuteSpec;

    fn hotkey() -> Hotkey {
        Signer::from_seed(&[1; 32]).hotkey().clone()
    }

    fn chute() -> Chute {
        Chute {
            id: ChuteId::parse("c").expect("valid"),
            version: "v".to_owned(),
            image: "i".to_owned(),
            code: String::new(),
            chutes_version: None,
            supported_gpus: vec![],
            compute_multiplier: 0.5,
            spec: ChuteSpec::default(),
            demand: None,
            created_at: UnixMillis(0),
            updated_at: UnixMillis(0),
        }
    }

    fn image() -> Image {
        Image {
            id: "i".to_owned(),
            username: "acme".to_owned(),
            name: "app".to_owned(),
            tag: "1.0".to_owned(),
            patch_version: "ab12cd34ef56".to_owned(),
            chutes_version: Some("0.3.41".to_owned()),
            created_at: UnixMillis(0),
        }
    }

    fn instance(config: Option<&str>) -> Instance {
        let json = json!({
            "id": "n", "chute": "c", "version": "v", "image": "i", "chutes_version": null,
            "hotkey": hotkey(), "host": "h", "port": 1, "gpus": ["g"], "config": config, "job": null,
            "created_at": 0, "deadline_at": null, "verified_at": null, "activated_at": null,
            "stop_billing_at": null, "seed": 1, "symmetric_key": "", "response_plaintext": "",
            "port_mappings": [], "multiplier": 1.0, "target_multiplier": 1.0, "hourly_rate": 1.0,
            "public": true, "verification_error": null, "legacy_attempts": [],
        });
        let instance: Instance = serde_json::from_value(json).expect("an instance");
        assert_eq!(instance.id, InstanceId::parse("n").expect("valid"));
        assert_eq!(
            instance.config,
            config.map(|c| ConfigId::parse(c).expect("valid"))
        );
        instance
    }

    fn job() -> Job {
        Job {
            id: JobId::parse("j").expect("valid"),
            chute: ChuteId::parse("c").expect("valid"),
            version: "v".to_owned(),
            method: "train".to_owned(),
            disk_gb: 20,
            work_ms: 0,
            compute_multiplier: 0.5,
            created_at: UnixMillis(0),
            started_at: None,
            finished_at: None,
            instance: None,
            hotkey: None,
            tried_by: vec![hotkey()],
            status: String::new(),
            result: Value::Null,
            error_detail: None,
            output_files: vec![],
            miner_terminated: false,
        }
    }

    fn node() -> Node {
        Node {
            device: proof::software_device(GpuId::from_device_uuid(&"ab".repeat(16)).expect("32 digits")),
            hotkey: hotkey(),
            gpu_identifier: "software".to_owned(),
            device_index: 0,
            server_id: None,
            seed: 1,
            verification_host: "h".to_owned(),
            verification_port: 80,
            verification_error: None,
            created_at: UnixMillis(0),
            verified_at: None,
            attested: false,
        }
    }

    /// The bytes on the wire of every event; `M` stands for the miner's address.
    #[test]
    fn every_event_is_written_as_it_always_was() {
        let with_config = instance(Some("f"));
        let rows = [
            (Event::gpu_verified(&node()), GPU_VERIFIED),
            (Event::chute_created(&chute()), CHUTE_CREATED),
            (Event::chute_updated(&chute()), CHUTE_UPDATED),
            (Event::chute_deleted(&chute()), CHUTE_DELETED),
            (Event::bounty_change(&chute(), 100), BOUNTY_CHANGE),
            (Event::image_created(&image()), IMAGE_CREATED),
            (Event::image_updated(&image(), &[&chute()]), IMAGE_UPDATED),
            (Event::image_deleted(&image()), IMAGE_DELETED),
            (
                Event::rolling_update(&with_config, "v", "w", "code change"),
                ROLLING_UPDATE,
            ),
            (
                Event::instance_created(&with_config, "h100_sxm"),
                INSTANCE_CREATED,
            ),
            (Event::instance_verified(&with_config), INSTANCE_VERIFIED),
            (Event::instance_activated(&with_config), INSTANCE_ACTIVATED),
            (Event::instance_deleted(&instance(None), "why"), INSTANCE_DELETED),
            (Event::job_created(&job(), &chute(), false), JOB_CREATED),
            (Event::job_created(&job(), &chute(), true), JOB_CREATED_AGAIN),
            (Event::job_deleted(&job()), JOB_DELETED),
        ];
        for (event, golden) in rows {
            let written = event.envelope().to_string().replace(hotkey().as_str(), "M");
            assert_eq!(written, golden);
        }
    }

    const GPU_VERIFIED: &str = r#"{"data":{"gpu_id":"abababababababababababababababab","miner_hotkey":"M"},"filter_recipients":["M"],"reason":"gpu_verified"}"#;
    const CHUTE_CREATED: &str =
        r#"{"data":{"chute_id":"c","job_only":false,"version":"v"},"reason":"chute_created"}"#;
    const CHUTE_UPDATED: &str =
        r#"{"data":{"chute_id":"c","job_only":false,"version":"v"},"reason":"chute_updated"}"#;
    const CHUTE_DELETED: &str = r#"{"data":{"chute_id":"c","version":"v"},"reason":"chute_deleted"}"#;
    const BOUNTY_CHANGE: &str = r#"{"data":{"bounty":100,"chute_id":"c"},"reason":"bounty_change"}"#;
    const IMAGE_CREATED: &str = r#"{"data":{"image_id":"i"},"reason":"image_created"}"#;
    const IMAGE_UPDATED: &str = r#"{"data":{"chute_ids":["c"],"chutes_version":"0.3.41","image":"acme/app:1.0-ab12cd34ef56","image_id":"i","patch_version":"ab12cd34ef56","short_tag":"acme/app:1.0-ab12cd34ef56"},"reason":"image_updated"}"#;
    const IMAGE_DELETED: &str = r#"{"data":{"image_id":"i"},"reason":"image_deleted"}"#;
    const ROLLING_UPDATE: &str = r#"{"data":{"chute_id":"c","instance_id":"n","miner_hotkey":"M","new_version":"w","old_version":"v","reason":"code change"},"filter_recipients":["M"],"reason":"rolling_update"}"#;
    const INSTANCE_CREATED: &str = r#"{"data":{"chute_id":"c","config_id":"f","gpu_count":1,"gpu_model_name":"h100_sxm","instance_id":"n","miner_hotkey":"M"},"filter_recipients":["M"],"message":"Miner M claimed 1 GPU(s) for chute c","reason":"instance_created"}"#;
    const INSTANCE_VERIFIED: &str = r#"{"data":{"instance_id":"n","miner_hotkey":"M"},"filter_recipients":["M"],"reason":"instance_verified"}"#;
    const INSTANCE_ACTIVATED: &str = r#"{"data":{"chute_id":"c","config_id":"f","instance_id":"n","miner_hotkey":"M"},"filter_recipients":["M"],"message":"Miner M activated instance n","reason":"instance_activated"}"#;
    const INSTANCE_DELETED: &str = r#"{"data":{"chute_id":"c","config_id":null,"instance_id":"n","miner_hotkey":"M"},"filter_recipients":["M"],"message":"why","reason":"instance_deleted"}"#;
    const JOB_CREATED: &str = r#"{"data":{"chute_id":"c","compute_multiplier":0.5,"disk_gb":20,"exclude":["M"],"gpu_count":1,"image_id":"i","job_id":"j","method":"train"},"reason":"job_created"}"#;
    const JOB_CREATED_AGAIN: &str = r#"{"data":{"chute_id":"c","compute_multiplier":0.5,"exclude":["M"],"gpu_count":1,"image_id":"i","job_id":"j","method":"train"},"reason":"job_created"}"#;
    const JOB_DELETED: &str = r#"{"data":{"instance_id":null,"job_id":"j"},"reason":"job_deleted"}"#;
}
