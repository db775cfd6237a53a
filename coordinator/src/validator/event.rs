//! What a validator broadcasts over its websocket: the envelope of `miner_broadcast`, read tolerantly.
//!
//! Pure. Unknown reasons, extra members and unknown envelope members are fine; a missing or malformed member
//! that the event cannot do without is an error, which the socket counts and drops. Events are hints: what
//! is lost here comes back with the next listing. The catalogue is `validator-protocol` section 2.6.

use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, ChuteVersion, ConfigId, GpuId, InstanceId, JobId};
use serde_json::{Map, Value};

/// Name of the Socket.IO event that carries the envelope.
pub const EVENT_NAME: &str = "miner_broadcast";
/// Disk of a job whose offer does not say it, in GB (offers after a release do not).
pub const JOB_DISK_GB_DEFAULT: u32 = 10;
/// Longest text that is kept of a member that is only shown to people, in characters.
const TEXT_CHARS_MAX: usize = 500;
/// Longest list that is read from an event.
const LIST_MAX: usize = 10_000;

/// Something that a validator says has happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// One of our GPUs passed verification.
    GpuVerified {
        /// Which.
        gpu: GpuId,
    },
    /// A chute is new.
    ChuteCreated {
        /// Which.
        chute: ChuteId,
        /// Its version.
        version: ChuteVersion,
        /// It has no routes: it is run for jobs alone.
        job_only: bool,
    },
    /// A chute was published again.
    ChuteUpdated {
        /// Which.
        chute: ChuteId,
        /// Its new version.
        version: ChuteVersion,
        /// It has no routes: it is run for jobs alone.
        job_only: bool,
    },
    /// A chute is gone.
    ChuteDeleted {
        /// Which.
        chute: ChuteId,
        /// Its last version, if told.
        version: Option<ChuteVersion>,
    },
    /// A chute without instance is wanted.
    BountyChange {
        /// Which.
        chute: ChuteId,
        /// The bounty, in the validator's points.
        bounty: u64,
    },
    /// An image's build ended, perhaps in failure.
    ImageCreated {
        /// Which.
        image: String,
    },
    /// The chutes library in an image was renewed; versions of chutes do not change with it.
    ImageUpdated {
        /// Which.
        image: String,
        /// `user/name:tag-patch`.
        name: Option<String>,
        /// New patch.
        patch_version: Option<String>,
        /// New version of the chutes library.
        chutes_version: Option<String>,
        /// The chutes made of it.
        chutes: Vec<ChuteId>,
    },
    /// An image is gone.
    ImageDeleted {
        /// Which.
        image: String,
    },
    /// It is this instance's turn to be made again.
    RollingUpdate {
        /// Its chute.
        chute: ChuteId,
        /// The instance.
        instance: InstanceId,
        /// What runs now.
        old_version: Option<ChuteVersion>,
        /// What should run. May equal the old one: then only the image changed.
        new_version: ChuteVersion,
        /// Why, for people.
        cause: Option<String>,
    },
    /// A launch config was claimed.
    InstanceCreated {
        /// The new instance.
        instance: InstanceId,
        /// Its chute.
        chute: ChuteId,
        /// The launch config that was claimed.
        config: Option<ConfigId>,
    },
    /// An instance passed its challenge.
    InstanceVerified {
        /// Which.
        instance: InstanceId,
    },
    /// An instance gets traffic.
    InstanceActivated {
        /// Which.
        instance: InstanceId,
        /// Its chute.
        chute: Option<ChuteId>,
        /// Its launch config.
        config: Option<ConfigId>,
    },
    /// An instance was deleted, by the validator or by us.
    InstanceDeleted {
        /// Which.
        instance: InstanceId,
        /// Its chute.
        chute: Option<ChuteId>,
        /// Its launch config; legacy instances have none.
        config: Option<ConfigId>,
        /// The cause, for people: nothing else tells it.
        message: Option<String>,
    },
    /// A job is on offer.
    JobCreated {
        /// Which.
        job: JobId,
        /// The chute that does it.
        chute: ChuteId,
        /// The chute's image.
        image: Option<String>,
        /// Method to run.
        method: String,
        /// GPUs that it needs.
        gpu_count: u32,
        /// Weight of its time, in thousandths.
        compute_multiplier_milli: Option<u64>,
        /// Hotkeys that have tried already.
        excluded: Vec<Hotkey>,
        /// Disk that it needs.
        disk_gb: u32,
    },
    /// A job is withdrawn.
    JobDeleted {
        /// Which.
        job: JobId,
        /// The instance that ran it.
        instance: Option<InstanceId>,
    },
    /// Meant for another miner: broadcasts reach every socket.
    ForOtherMiner(String),
    /// A reason that this version does not know.
    Unknown(String),
}

impl Event {
    /// Name for logs and counts.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::GpuVerified { .. } => "gpu_verified",
            Self::ChuteCreated { .. } => "chute_created",
            Self::ChuteUpdated { .. } => "chute_updated",
            Self::ChuteDeleted { .. } => "chute_deleted",
            Self::BountyChange { .. } => "bounty_change",
            Self::ImageCreated { .. } => "image_created",
            Self::ImageUpdated { .. } => "image_updated",
            Self::ImageDeleted { .. } => "image_deleted",
            Self::RollingUpdate { .. } => "rolling_update",
            Self::InstanceCreated { .. } => "instance_created",
            Self::InstanceVerified { .. } => "instance_verified",
            Self::InstanceActivated { .. } => "instance_activated",
            Self::InstanceDeleted { .. } => "instance_deleted",
            Self::JobCreated { .. } => "job_created",
            Self::JobDeleted { .. } => "job_deleted",
            Self::ForOtherMiner(_) => "for_other_miner",
            Self::Unknown(_) => "unknown",
        }
    }
}

/// Why a broadcast is no event.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidEvent {
    /// The envelope is not an object with `reason` and `data`.
    #[error("the envelope has no {0}")]
    Envelope(&'static str),
    /// A member that the event needs is missing or unusable.
    #[error("{reason}: {member:?} is missing or malformed")]
    Member {
        /// The event's reason.
        reason: String,
        /// Which member.
        member: &'static str,
    },
}

/// Reads the argument of a `miner_broadcast` event. `miner` is our hotkey.
///
/// # Errors
/// [`InvalidEvent`]; never panics, whatever the input.
pub fn parse(envelope: &Value, miner: &Hotkey) -> Result<Event, InvalidEvent> {
    let reason = envelope
        .get("reason")
        .and_then(Value::as_str)
        .ok_or(InvalidEvent::Envelope("reason"))?;
    let read = reader(reason);
    let Some(read) = read else {
        return Ok(Event::Unknown(shortened(reason)));
    };
    let data = envelope
        .get("data")
        .and_then(Value::as_object)
        .ok_or(InvalidEvent::Envelope("data"))?;
    let addressee = data.get("miner_hotkey").and_then(Value::as_str);
    if addressee.is_some_and(|other| other != miner.as_str()) {
        return Ok(Event::ForOtherMiner(reason.to_owned()));
    }
    let message = envelope.get("message").and_then(Value::as_str).map(shortened);
    read(&Data(data), message).map_err(|member| InvalidEvent::Member {
        reason: reason.to_owned(),
        member,
    })
}

type Reader = fn(&Data<'_>, Option<String>) -> Result<Event, &'static str>;

fn reader(reason: &str) -> Option<Reader> {
    let reader: Reader = match reason {
        "gpu_verified" => |data, _| {
            let gpu = data
                .text("gpu_id")
                .and_then(|id| GpuId::from_device_uuid(id).ok());
            Ok(Event::GpuVerified {
                gpu: gpu.ok_or("gpu_id")?,
            })
        },
        "chute_created" => |data, _| {
            Ok(Event::ChuteCreated {
                chute: data.id("chute_id", ChuteId::parse)?,
                version: data.id("version", ChuteVersion::parse)?,
                job_only: data.flag("job_only"),
            })
        },
        "chute_updated" => |data, _| {
            Ok(Event::ChuteUpdated {
                chute: data.id("chute_id", ChuteId::parse)?,
                version: data.id("version", ChuteVersion::parse)?,
                job_only: data.flag("job_only"),
            })
        },
        "chute_deleted" => |data, _| {
            Ok(Event::ChuteDeleted {
                chute: data.id("chute_id", ChuteId::parse)?,
                version: data.maybe_id("version", ChuteVersion::parse),
            })
        },
        "bounty_change" => |data, _| {
            Ok(Event::BountyChange {
                chute: data.id("chute_id", ChuteId::parse)?,
                bounty: data.whole("bounty").ok_or("bounty")?,
            })
        },
        "image_created" => |data, _| {
            Ok(Event::ImageCreated {
                image: data.image("image_id")?,
            })
        },
        "image_updated" => |data, _| {
            Ok(Event::ImageUpdated {
                image: data.image("image_id")?,
                name: data.shown("image").or_else(|| data.shown("short_tag")),
                patch_version: data.shown("patch_version"),
                chutes_version: data.shown("chutes_version"),
                chutes: data.list("chute_ids", |text| ChuteId::parse(text).ok()),
            })
        },
        "image_deleted" => |data, _| {
            Ok(Event::ImageDeleted {
                image: data.image("image_id")?,
            })
        },
        "rolling_update" => |data, _| {
            Ok(Event::RollingUpdate {
                chute: data.id("chute_id", ChuteId::parse)?,
                instance: data.id("instance_id", InstanceId::parse)?,
                old_version: data.maybe_id("old_version", ChuteVersion::parse),
                new_version: data.id("new_version", ChuteVersion::parse)?,
                cause: data.shown("reason"),
            })
        },
        "instance_created" => |data, _| {
            Ok(Event::InstanceCreated {
                instance: data.id("instance_id", InstanceId::parse)?,
                chute: data.id("chute_id", ChuteId::parse)?,
                config: data.maybe_id("config_id", ConfigId::parse),
            })
        },
        "instance_verified" => |data, _| {
            Ok(Event::InstanceVerified {
                instance: data.id("instance_id", InstanceId::parse)?,
            })
        },
        "instance_activated" => |data, _| {
            Ok(Event::InstanceActivated {
                instance: data.id("instance_id", InstanceId::parse)?,
                chute: data.maybe_id("chute_id", ChuteId::parse),
                config: data.maybe_id("config_id", ConfigId::parse),
            })
        },
        "instance_deleted" => |data, message| {
            Ok(Event::InstanceDeleted {
                instance: data.id("instance_id", InstanceId::parse)?,
                chute: data.maybe_id("chute_id", ChuteId::parse),
                config: data.maybe_id("config_id", ConfigId::parse),
                message,
            })
        },
        "job_created" => |data, _| {
            let mut excluded = data.list("exclude", |text| Hotkey::parse(text).ok());
            // Validators say `exclude`, the original miner looks for `excluded`.
            excluded.extend(data.list("excluded", |text| Hotkey::parse(text).ok()));
            excluded.sort();
            excluded.dedup();
            let small = |member, default| match data.0.get(member) {
                None | Some(Value::Null) => Ok(default),
                Some(_) => data
                    .whole(member)
                    .and_then(|n| u32::try_from(n).ok())
                    .ok_or(member),
            };
            Ok(Event::JobCreated {
                job: data.id("job_id", JobId::parse)?,
                chute: data.id("chute_id", ChuteId::parse)?,
                image: data.image("image_id").ok(),
                method: data.shown("method").ok_or("method")?,
                gpu_count: small("gpu_count", 1)?,
                compute_multiplier_milli: data.milli("compute_multiplier"),
                excluded,
                disk_gb: small("disk_gb", JOB_DISK_GB_DEFAULT)?,
            })
        },
        "job_deleted" => |data, _| {
            Ok(Event::JobDeleted {
                job: data.id("job_id", JobId::parse)?,
                instance: data.maybe_id("instance_id", InstanceId::parse),
            })
        },
        _ => return None,
    };
    Some(reader)
}

/// The `data` of an envelope, with the questions that events ask of it.
struct Data<'a>(&'a Map<String, Value>);

impl Data<'_> {
    fn text(&self, member: &str) -> Option<&str> {
        self.0.get(member).and_then(Value::as_str)
    }

    fn shown(&self, member: &str) -> Option<String> {
        self.text(member).map(shortened)
    }

    fn id<T, E>(&self, member: &'static str, parse: fn(&str) -> Result<T, E>) -> Result<T, &'static str> {
        self.maybe_id(member, parse).ok_or(member)
    }

    fn maybe_id<T, E>(&self, member: &str, parse: fn(&str) -> Result<T, E>) -> Option<T> {
        self.text(member).and_then(|text| parse(text).ok())
    }

    /// Images have no identifier type of their own; any identifier's rules are the rules.
    fn image(&self, member: &'static str) -> Result<String, &'static str> {
        self.id(member, ChuteId::parse).map(|id| id.as_str().to_owned())
    }

    fn flag(&self, member: &str) -> bool {
        self.0.get(member).and_then(Value::as_bool).unwrap_or(false)
    }

    /// A whole number, also when written as `7.0`; not negative, not absurd.
    fn whole(&self, member: &str) -> Option<u64> {
        let value = self.0.get(member)?;
        value.as_u64().or_else(|| {
            let float = value.as_f64().filter(|f| f.fract() == 0.0)?;
            float_to_u64(float)
        })
    }

    fn milli(&self, member: &str) -> Option<u64> {
        float_to_u64((self.0.get(member)?.as_f64()? * 1000.0).round())
    }

    fn list<T>(&self, member: &str, parse: fn(&str) -> Option<T>) -> Vec<T> {
        let items = self.0.get(member).and_then(Value::as_array);
        items
            .into_iter()
            .flatten()
            .take(LIST_MAX)
            .filter_map(Value::as_str)
            .filter_map(parse)
            .collect()
    }
}

/// A float that is a number of things: not negative, not infinite, below 2^53.
pub(super) fn float_to_u64(float: f64) -> Option<u64> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the range is checked"
    )]
    (0.0..9_007_199_254_740_992.0)
        .contains(&float)
        .then_some(float as u64)
}

/// Cuts a text for people, and takes out what would break a line of a log.
pub(super) fn shortened(text: &str) -> String {
    text.chars()
        .take(TEXT_CHARS_MAX)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const M: &str = "5CcyqxXnJucaCnQQvvUg5EPzj1uoNAxACZvzArHw5aVDvgNH";
    const V: &str = "5CfCr47V5Dte6bwxNBE8K9oNnQd9fiay6aDEEkgYtFv7w4Fq";

    fn read(json: &str) -> Result<Event, InvalidEvent> {
        parse(
            &serde_json::from_str(json).expect("test data"),
            &Hotkey::parse(M).expect("test data"),
        )
    }

    fn chute(text: &str) -> ChuteId {
        ChuteId::parse(text).expect("test data")
    }

    fn version(text: &str) -> ChuteVersion {
        ChuteVersion::parse(text).expect("test data")
    }

    fn instance(text: &str) -> InstanceId {
        InstanceId::parse(text).expect("test data")
    }

    fn config(text: &str) -> Option<ConfigId> {
        Some(ConfigId::parse(text).expect("test data"))
    }

    /// One golden message for each reason, with the members that validators send.
    #[test]
    fn every_reason_of_the_catalogue_is_read() {
        let (m, v) = (M, V);
        let rows = [
            (
                format!(
                    r#"{{"reason":"gpu_verified","data":{{"gpu_id":"aabbccdd00112233445566778899eeff","miner_hotkey":"{m}"}},"filter_recipients":["{m}"]}}"#
                ),
                Event::GpuVerified {
                    gpu: GpuId::from_device_uuid("aabbccdd00112233445566778899eeff").expect("test data"),
                },
            ),
            (
                r#"{"reason":"chute_created","message":"A new chute!","data":{"chute_id":"c1","version":"v1","job_only":true}}"#.to_owned(),
                Event::ChuteCreated { chute: chute("c1"), version: version("v1"), job_only: true },
            ),
            (
                r#"{"reason":"chute_updated","data":{"chute_id":"c1","version":"v2","job_only":false}}"#.to_owned(),
                Event::ChuteUpdated { chute: chute("c1"), version: version("v2"), job_only: false },
            ),
            (
                r#"{"reason":"chute_deleted","data":{"chute_id":"c1","version":"v2"}}"#.to_owned(),
                Event::ChuteDeleted { chute: chute("c1"), version: Some(version("v2")) },
            ),
            (
                r#"{"reason":"bounty_change","data":{"chute_id":"c1","bounty":400,"urgency":"cold","bounty_boost":1.5}}"#.to_owned(),
                Event::BountyChange { chute: chute("c1"), bounty: 400 },
            ),
            (
                r#"{"reason":"image_created","data":{"image_id":"i1"}}"#.to_owned(),
                Event::ImageCreated { image: "i1".to_owned() },
            ),
            (
                r#"{"reason":"image_updated","data":{"image_id":"i1","short_tag":"acme/img:1-ab","patch_version":"ab","chutes_version":"0.3.41","chute_ids":["c1","c2"],"image":"acme/img:1-ab"}}"#.to_owned(),
                Event::ImageUpdated {
                    image: "i1".to_owned(),
                    name: Some("acme/img:1-ab".to_owned()),
                    patch_version: Some("ab".to_owned()),
                    chutes_version: Some("0.3.41".to_owned()),
                    chutes: vec![chute("c1"), chute("c2")],
                },
            ),
            (
                r#"{"reason":"image_deleted","data":{"image_id":"i1"}}"#.to_owned(),
                Event::ImageDeleted { image: "i1".to_owned() },
            ),
            (
                format!(
                    r#"{{"reason":"rolling_update","data":{{"chute_id":"c1","instance_id":"n1","miner_hotkey":"{m}","old_version":"v1","new_version":"v2","reason":"code change"}},"filter_recipients":["{m}"]}}"#
                ),
                Event::RollingUpdate {
                    chute: chute("c1"),
                    instance: instance("n1"),
                    old_version: Some(version("v1")),
                    new_version: version("v2"),
                    cause: Some("code change".to_owned()),
                },
            ),
            (
                format!(
                    r#"{{"reason":"instance_created","message":"Miner has claimed","data":{{"chute_id":"c1","gpu_count":1,"gpu_model_name":"h200","miner_hotkey":"{m}","instance_id":"n1","config_id":"l1"}}}}"#
                ),
                Event::InstanceCreated { instance: instance("n1"), chute: chute("c1"), config: config("l1") },
            ),
            (
                format!(r#"{{"reason":"instance_verified","data":{{"instance_id":"n1","miner_hotkey":"{m}"}}}}"#),
                Event::InstanceVerified { instance: instance("n1") },
            ),
            (
                format!(
                    r#"{{"reason":"instance_activated","data":{{"chute_id":"c1","miner_hotkey":"{m}","instance_id":"n1","config_id":"l1"}}}}"#
                ),
                Event::InstanceActivated {
                    instance: instance("n1"),
                    chute: Some(chute("c1")),
                    config: config("l1"),
                },
            ),
            (
                format!(
                    r#"{{"reason":"instance_deleted","message":"too many failures","data":{{"chute_id":"c1","miner_hotkey":"{m}","instance_id":"n1","config_id":null}}}}"#
                ),
                Event::InstanceDeleted {
                    instance: instance("n1"),
                    chute: Some(chute("c1")),
                    config: None,
                    message: Some("too many failures".to_owned()),
                },
            ),
            (
                format!(
                    r#"{{"reason":"job_created","data":{{"job_id":"j1","method":"train","chute_id":"c1","image_id":"i1","gpu_count":2,"compute_multiplier":1.0286,"exclude":["{v}"],"disk_gb":50}}}}"#
                ),
                Event::JobCreated {
                    job: JobId::parse("j1").expect("test data"),
                    chute: chute("c1"),
                    image: Some("i1".to_owned()),
                    method: "train".to_owned(),
                    gpu_count: 2,
                    compute_multiplier_milli: Some(1029),
                    excluded: vec![Hotkey::parse(v).expect("test data")],
                    disk_gb: 50,
                },
            ),
            (
                r#"{"reason":"job_deleted","data":{"instance_id":null,"job_id":"j1"}}"#.to_owned(),
                Event::JobDeleted { job: JobId::parse("j1").expect("test data"), instance: None },
            ),
            (
                format!(r#"{{"reason":"instance_deleted","data":{{"miner_hotkey":"{v}","instance_id":"n9"}}}}"#),
                Event::ForOtherMiner("instance_deleted".to_owned()),
            ),
            (
                r#"{"reason":"moon_phase","data":7}"#.to_owned(),
                Event::Unknown("moon_phase".to_owned()),
            ),
        ];
        for (json, event) in rows {
            assert_eq!(read(&json), Ok(event), "{json}");
        }
    }

    #[test]
    fn job_offers_after_a_release_lack_the_disk_and_both_spellings_of_excluded_count() {
        let event = read(&format!(
            r#"{{"reason":"job_created","data":{{"job_id":"j1","method":"m","chute_id":"c1","gpu_count":1.0,"exclude":["{V}","junk",7],"excluded":["{M}","{V}"]}}}}"#
        ));
        let Ok(Event::JobCreated {
            excluded,
            disk_gb,
            gpu_count,
            ..
        }) = event
        else {
            panic!("{event:?}");
        };
        assert_eq!((disk_gb, gpu_count, excluded.len()), (JOB_DISK_GB_DEFAULT, 1, 2));
    }

    #[test]
    fn bad_input_is_an_error_and_never_a_panic() {
        let member = |json: &str| match read(json) {
            Err(InvalidEvent::Member { member, .. }) => member,
            Err(InvalidEvent::Envelope(member)) => member,
            Ok(event) => panic!("{json} was read as {event:?}"),
        };
        for (json, missing) in [
            ("null", "reason"),
            ("7", "reason"),
            ("[]", "reason"),
            (r#"{"data":{}}"#, "reason"),
            (r#"{"reason":7,"data":{}}"#, "reason"),
            (r#"{"reason":"chute_created"}"#, "data"),
            (r#"{"reason":"chute_created","data":null}"#, "data"),
            (r#"{"reason":"chute_created","data":[]}"#, "data"),
            (r#"{"reason":"chute_created","data":{}}"#, "chute_id"),
            (
                r#"{"reason":"chute_created","data":{"chute_id":"c1"}}"#,
                "version",
            ),
            (
                r#"{"reason":"chute_created","data":{"chute_id":7,"version":"v"}}"#,
                "chute_id",
            ),
            (
                r#"{"reason":"chute_created","data":{"chute_id":"../etc","version":"v"}}"#,
                "chute_id",
            ),
            (
                r#"{"reason":"chute_created","data":{"chute_id":"","version":"v"}}"#,
                "chute_id",
            ),
            (r#"{"reason":"bounty_change","data":{"chute_id":"c1"}}"#, "bounty"),
            (
                r#"{"reason":"bounty_change","data":{"chute_id":"c1","bounty":-1}}"#,
                "bounty",
            ),
            (
                r#"{"reason":"bounty_change","data":{"chute_id":"c1","bounty":1e300}}"#,
                "bounty",
            ),
            (
                r#"{"reason":"bounty_change","data":{"chute_id":"c1","bounty":"9"}}"#,
                "bounty",
            ),
            (r#"{"reason":"gpu_verified","data":{"gpu_id":"short"}}"#, "gpu_id"),
            (
                r#"{"reason":"instance_verified","data":{"instance_id":{}}}"#,
                "instance_id",
            ),
            (
                r#"{"reason":"job_created","data":{"job_id":"j","chute_id":"c"}}"#,
                "method",
            ),
            (
                r#"{"reason":"job_created","data":{"job_id":"j","chute_id":"c","method":"m","disk_gb":99999999999}}"#,
                "disk_gb",
            ),
            (
                r#"{"reason":"job_created","data":{"job_id":"j","chute_id":"c","method":"m","gpu_count":1.5}}"#,
                "gpu_count",
            ),
            (
                r#"{"reason":"rolling_update","data":{"chute_id":"c","instance_id":"n","old_version":"v"}}"#,
                "new_version",
            ),
        ] {
            assert_eq!(member(json), missing, "{json}");
        }
        let long = json!({"reason": "x\n".repeat(100_000), "data": {}});
        let event = parse(&long, &Hotkey::parse(M).expect("test data"));
        assert!(
            matches!(event, Ok(Event::Unknown(text)) if text.len() <= TEXT_CHARS_MAX && !text.contains('\n'))
        );
    }

    /// Random damage to a good message: any outcome, no panic.
    #[test]
    fn damaged_messages_never_panic() {
        let good = format!(
            r#"{{"reason":"job_created","data":{{"job_id":"j1","method":"train","chute_id":"c1","gpu_count":2,"compute_multiplier":1.5,"exclude":["{V}"],"disk_gb":50,"miner_hotkey":"{M}"}}}}"#
        );
        let mut rng = fastrand::Rng::with_seed(11);
        let miner = Hotkey::parse(M).expect("test data");
        let mut parsed = 0;
        for _ in 0..5_000 {
            let mut bytes = good.clone().into_bytes();
            for _ in 0..rng.usize(1..4) {
                let at = rng.usize(..bytes.len());
                bytes[at] = rng.u8(32..127);
            }
            if let Ok(value) = serde_json::from_slice(&bytes) {
                let _ = parse(&value, &miner);
                parsed += 1;
            }
        }
        assert!(
            parsed > 100,
            "the damage must leave some messages readable: {parsed}"
        );
    }
}
