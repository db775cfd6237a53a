//! The vocabulary of the log. A command is the only way to change anything.

use std::collections::BTreeSet;

use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, ChuteVersion, ConfigId, DeploymentId, GpuId, InstanceId, JobId, ServerId};
use protocol::report::{HostFacts, WorkloadReport};
use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};

use super::adoption::Adoption;
use super::chute::{ChuteCode, ChuteDefinition, ChuteKey};
use super::deployment::{Phase, StopReason};
use super::effect::{EffectId, EffectOutcome};
use super::format::FIRST;
use super::host::{Invite, InviteId, KeyHash, NewHost, Pin, Rotation};

/// Names a write, so that a repeated one is not applied twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RequestId(pub u128);

impl RequestId {
    /// A name that nobody else gives. It is random but for the time, in steps of 128 ms, which stands first in the
    /// number as well as in its stored form (7 bits a byte, the lowest first): names that are given together lie
    /// side by side in memory and on the disk, and are forgotten together.
    #[must_use]
    pub fn new(at: UnixMillis, random: u128) -> Self {
        const TIME_BITS: u32 = 28;
        let time = u128::from(at.0 >> 7) & ((1 << TIME_BITS) - 1);
        let lowest_first = (0..4).fold(0_u128, |bits, digit| (bits << 7) | (time >> (7 * digit) & 0x7f));
        let random = random << (2 * TIME_BITS) >> TIME_BITS;
        Self(time << (u128::BITS - TIME_BITS) | random | lowest_first)
    }
}

/// A command with what `apply` may not find out by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal {
    /// Names this write. The answer to it is remembered for [`REQUEST_MEMORY_MS`], in a flood of writes for
    /// [`REQUEST_MEMORY_LEAST_MS`].
    pub request: RequestId,
    /// The proposer's clock. The state keeps the largest that it has seen.
    pub at: UnixMillis,
    /// Hash of the signature that authorises it, when it came from the management API: a captured
    /// signature is good for one command only.
    pub guard: Option<[u8; 32]>,
    /// What to change.
    pub command: Command,
}

/// How long the answer to a request is remembered, in ms.
pub const REQUEST_MEMORY_MS: u64 = 10 * 60_000;
/// More answers than this are remembered for [`REQUEST_MEMORY_LEAST_MS`] only: a flood of writes must not fill the
/// memory of every member.
pub const ANSWERS_MAX: usize = 1 << 17;
/// How long each answer is remembered at least, in ms: longer than a proposer waits for one.
pub const REQUEST_MEMORY_LEAST_MS: u64 = 15_000;
/// How long a used signature is remembered, in ms: longer than any nonce is accepted.
pub const GUARD_MEMORY_MS: u64 = 2 * 60_000;

/// Which rules of pay protect running instances (`scheduling`, sections 5.9 and 9).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PayProfile {
    /// 60 min from verification.
    Of2025September,
    /// 63 min from activation.
    #[default]
    Of2026,
}

/// What a deletion needs beyond the ordinary rules.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allowance {
    /// Un-vested pay may be lost, private chutes may be stopped.
    pub loss: bool,
    /// Jobs may be stopped.
    pub jobs: bool,
    /// It counts against the deletion budget of the window.
    pub budgeted: bool,
}

/// An instance of ours as the validator lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedInstance {
    /// Its name.
    pub instance: InstanceId,
    /// What it runs.
    pub chute: ChuteId,
    /// Its launch config, if it has one.
    pub config: Option<ConfigId>,
    /// It gets requests.
    pub active: bool,
    /// It was verified.
    pub verified: bool,
}

/// A listing from outside. Unknown is not empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Listing<T> {
    /// It failed, was cut, or came back without any row where that proves nothing.
    Unknown,
    /// All there is.
    Known(T),
}

/// One periodic look at everything that a validator lists, reduced to what can differ from the record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observation {
    /// Whose listing.
    pub validator: Hotkey,
    /// When the first byte was asked for: it says nothing of what came later.
    pub read_at: UnixMillis,
    /// Chutes with their current versions.
    pub chutes: Listing<Vec<(ChuteId, ChuteVersion)>>,
    /// Our instances.
    pub instances: Listing<Vec<ListedInstance>>,
    /// Our GPUs, and whether they are verified.
    pub gpus: Listing<Vec<(GpuId, bool)>>,
}

/// A placement that a strategy wants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// Chosen by the proposer.
    pub deployment: DeploymentId,
    /// What.
    pub chute: ChuteKey,
    /// In which version.
    pub version: ChuteVersion,
    /// Where.
    pub server: ServerId,
    /// On which GPUs.
    pub gpus: Vec<GpuId>,
    /// Who must go for it.
    pub victims: Vec<DeploymentId>,
    /// For which job.
    pub job: Option<JobId>,
    /// Why, for people.
    pub reason: String,
}

/// Everything that can be written to the log. New ones go to the end: the position is the stored form.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Who we are, for whom we work, under which rules of pay.
    Configure {
        /// Us.
        miner: Hotkey,
        /// For whom.
        validators: BTreeSet<Hotkey>,
        /// Which rules.
        pay_profile: PayProfile,
    },

    /// A host joined or changed.
    RecordHost {
        /// What it says.
        facts: HostFacts,
    },
    /// A host went silent, came back, or must not be used.
    RecordHostCondition {
        /// Which.
        server: ServerId,
        /// It is heard.
        reachable: bool,
        /// Why it gets no new work.
        quarantine: Option<String>,
    },
    /// What runs on a server.
    RecordWorkloads {
        /// Which server.
        server: ServerId,
        /// All of it.
        report: WorkloadReport,
    },

    /// The operator wants a server to work for a validator.
    EnrolServer {
        /// Which.
        server: ServerId,
        /// For whom.
        validator: Hotkey,
        /// GPU type in the validator's words.
        gpu_short_ref: String,
        /// Cost of one GPU for an hour, in millionths of a dollar.
        hourly_cost_usd_micros: u64,
    },
    /// The operator wants no new work on it, or lifts that.
    LockServer {
        /// Which.
        server: ServerId,
        /// Locked or not.
        locked: bool,
    },
    /// The operator takes a server away.
    RemoveServer {
        /// Which.
        server: ServerId,
        /// Even if it runs jobs.
        jobs: bool,
    },
    /// Takes deployments down.
    StopDeployments {
        /// Which.
        deployments: Vec<DeploymentId>,
        /// Why.
        reason: StopReason,
        /// Beyond the ordinary rules.
        allowance: Allowance,
    },
    /// The operator never wants a chute, or lifts that.
    BanChute {
        /// Which.
        chute: ChuteKey,
        /// Why; none lifts the ban.
        reason: Option<String>,
    },

    /// A chute as its validator publishes it now.
    RecordChute {
        /// Its definition.
        definition: ChuteDefinition,
        /// Code of the definition's version.
        code: ChuteCode,
    },
    /// The validator deleted a chute.
    RecordChuteDeleted {
        /// Which.
        chute: ChuteKey,
    },
    /// A chute's image was patched.
    RecordImage {
        /// Whose.
        chute: ChuteKey,
        /// `user/name:tag`.
        image: String,
        /// Library in it.
        chutes_version: Option<String>,
    },
    /// A bounty is open.
    RecordBounty {
        /// For what.
        chute: ChuteKey,
        /// How much.
        amount: u64,
    },
    /// A bounty is over.
    RecordBountyOver {
        /// For what.
        chute: ChuteKey,
    },
    /// A job is on offer.
    RecordJobOffer {
        /// Which.
        job: JobId,
        /// What it runs.
        chute: ChuteKey,
        /// GPUs that it needs.
        gpu_count: u32,
        /// Disk that it needs, in GB.
        disk_gb: u32,
        /// We may not take it.
        excluded: bool,
    },
    /// A job was withdrawn.
    RecordJobDeleted {
        /// Which.
        job: JobId,
    },
    /// A GPU was verified.
    RecordGpuVerified {
        /// Which.
        gpu: GpuId,
    },
    /// A launch config was claimed.
    RecordInstanceCreated {
        /// At which validator.
        validator: Hotkey,
        /// What it runs.
        chute: ChuteId,
        /// Its launch config.
        config: Option<ConfigId>,
        /// Its name.
        instance: InstanceId,
    },
    /// An instance was verified.
    RecordInstanceVerified {
        /// Which.
        instance: InstanceId,
    },
    /// An instance gets requests.
    RecordInstanceActivated {
        /// Its launch config.
        config: Option<ConfigId>,
        /// Its name.
        instance: InstanceId,
    },
    /// An instance was deleted.
    RecordInstanceDeleted {
        /// Its launch config.
        config: Option<ConfigId>,
        /// Its name.
        instance: InstanceId,
        /// What the validator said.
        cause: String,
    },
    /// It is an instance's turn to be replaced.
    RecordRollingUpdate {
        /// Which.
        instance: InstanceId,
        /// By which version.
        version: ChuteVersion,
    },
    /// A periodic listing.
    Observe(Observation),

    /// A strategy places a chute.
    PlaceDeployment(Placement),
    /// An effect ended.
    FinishEffect {
        /// Which.
        effect: EffectId,
        /// How.
        outcome: EffectOutcome,
    },
    /// Time passed: deadlines are due, old memories go.
    PassTime,

    /// The first host founds the cluster. Only the first one counts.
    FoundCluster {
        /// Certificate of its authority, as PEM.
        authority_pem: String,
        /// The authority's private key, sealed.
        sealed_key: Vec<u8>,
        /// The first host, which becomes the first member.
        founder: NewHost,
    },
    /// A host may come.
    InviteHost {
        /// Which invitation.
        id: InviteId,
        /// What it is good for.
        invite: Invite,
    },
    /// A host comes.
    JoinHost {
        /// With which invitation.
        id: InviteId,
        /// SHA-256 of the invitation's secret.
        secret_hash: KeyHash,
        /// Who it is.
        host: NewHost,
    },
    /// A host goes, and its certificate is worthless from now on.
    RemoveHost {
        /// Which.
        server: ServerId,
    },
    /// Whether a member should vote.
    PinHost {
        /// Which.
        server: ServerId,
        /// What the operator wants.
        pin: Pin,
    },
    /// A member that has lost its store comes back, under another member id.
    RejoinHost {
        /// Which.
        server: ServerId,
    },
    /// The operator is done with an upgrade: what came with it may be written, and the program before is refused.
    FinalizeFormat {
        /// Which format.
        format: u32,
        /// Version of the program that it came with.
        program: String,
        /// Hosts that report no version, and that the operator has looked after.
        vouched: BTreeSet<ServerId>,
    },
    /// The majority of the voters is lost for good, and this member goes on with what it has.
    Recover {
        /// Its member id; all others are given up.
        member: u64,
    },
    /// The cluster changes over to another authority.
    RotateAuthority {
        /// The new one, beside the old one.
        rotation: Rotation,
    },
    /// A host has said which authorities it trusts.
    RecordAuthorities {
        /// Which host.
        server: ServerId,
        /// Fingerprints of the authorities; the last one has signed its certificate.
        trusted: Vec<KeyHash>,
    },
    /// The old authority is dropped.
    FinishRotation {
        /// Fingerprint of the new one.
        new: KeyHash,
    },
    /// From now on the cluster only watches, or acts again.
    SetObserving {
        /// It only watches.
        observing: bool,
    },
    /// A server with what runs on it is taken over from another miner.
    AdoptServer(Adoption),
    /// The miner has another hotkey from now on.
    ReplaceHotkey {
        /// The one that it has.
        old: Hotkey,
        /// The one that it gets.
        new: Hotkey,
        /// The key of the cluster's authority, sealed with the seed of the new one.
        sealed_key: Vec<u8>,
    },
    /// A host is to be found elsewhere from now on.
    RecordAddress {
        /// Which.
        server: ServerId,
        /// `host:port` of its QUIC door.
        address: String,
    },
    /// A sealed worker is driven from now on, or with another kubeconfig.
    AddWorker {
        /// What is known of it.
        facts: HostFacts,
        /// The kubeconfig of its cluster, sealed.
        sealed_kubeconfig: Vec<u8>,
    },
    /// A sealed worker is driven no more.
    RemoveWorker {
        /// Which.
        server: ServerId,
    },
}

impl Command {
    /// The format that must be finalized before this may be written. New commands, and new forms of old ones,
    /// name theirs here.
    #[must_use]
    pub fn format(&self) -> u32 {
        FIRST
    }
}

/// The answer to an accepted command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Something changed.
    Done,
    /// All was so already.
    Unchanged,
    /// These deployments are being stopped.
    Stopping(Vec<DeploymentId>),
    /// The host belongs to us.
    Joined {
        /// Its member id, if it is eligible.
        member: Option<u64>,
    },
}

/// A rule said no; nothing changed. The same on every member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Rejection {
    /// No such thing.
    #[error("{kind} {name} is not known")]
    Unknown {
        /// What kind of thing.
        kind: String,
        /// Its name.
        name: String,
    },
    /// The validator is not configured.
    #[error("validator {0} is not configured")]
    UnknownValidator(Hotkey),
    /// The signature authorised a command before.
    #[error("this signature was used before")]
    Replayed,
    /// Another host has the name.
    #[error("the name {0} belongs to another host")]
    NameTaken(String),
    /// The server works for a validator already.
    #[error("Server with name={0} is already provisioned!")]
    AlreadyEnrolled(String),
    /// It has none.
    #[error("server {0} reports no GPUs")]
    NoGpus(String),
    /// Some of its GPUs belong to another server.
    #[error("GPU {0} belongs to another server")]
    GpuElsewhere(GpuId),
    /// It may not be stopped without permission.
    #[error("deployment {deployment} is protected: {why}")]
    Protected {
        /// Which.
        deployment: DeploymentId,
        /// Why.
        why: String,
    },
    /// Too much would be deleted in one window.
    #[error("deletion budget: {used} of {limit} used in this window")]
    BudgetSpent {
        /// Deleted in this window.
        used: u32,
        /// Allowed.
        limit: u32,
    },
    /// A placement against the rules.
    #[error("placement refused: {0}")]
    Placement(String),
    /// An older effect of the same subject is still pending.
    #[error("effect {0} is not the oldest of its subject")]
    OutOfOrder(EffectId),
    /// The phase does not allow it.
    #[error("deployment {deployment} is {phase:?}")]
    WrongPhase {
        /// Which.
        deployment: DeploymentId,
        /// Where it is.
        phase: Phase,
    },
    /// There is no cluster yet.
    #[error("the cluster is not founded yet: try again in a moment")]
    NotFounded,
    /// An invitation that is not good.
    #[error("the invitation {0}")]
    Invitation(String),
    /// The host belongs to us already.
    #[error("host {0} has joined already: remove it first with `chutes-miner host remove`")]
    AlreadyJoined(ServerId),
    /// The host has work.
    #[error("host {server} has {deployments} deployments: `chutes-miner delete-node` drains it first")]
    HostInUse {
        /// Which.
        server: ServerId,
        /// How many.
        deployments: u64,
    },
    /// Nobody would be left to lead.
    #[error("host {0} is the only member: invite another eligible host first")]
    LastMember(ServerId),
    /// Only eligible hosts can vote.
    #[error("host {0} is not eligible: it has no seed")]
    NotEligible(ServerId),
    /// A host could not read what would be written.
    #[error("host {host} {why}")]
    HostBehind {
        /// Which.
        host: String,
        /// What of it.
        why: String,
    },
    /// There is no way back to an older format.
    #[error("the data has format {present}: it cannot go back to format {format}")]
    FormatIsNewer {
        /// What it has.
        present: u32,
        /// What was asked for.
        format: u32,
    },
    /// It came with an upgrade that is not finalized.
    #[error(
        "this needs format {needed}, the data has format {present}: `chutes-miner upgrade finalize` comes first"
    )]
    NotFinalized {
        /// What it needs.
        needed: u32,
        /// What the data has.
        present: u32,
    },
    /// One at a time.
    #[error("the cluster is changing over to another authority already: `chutes-miner ca status`")]
    RotationUnderWay,
    /// Nothing to finish.
    #[error("the cluster is not changing over to another authority")]
    NoRotation,
    /// They would be locked out.
    #[error(
        "still with a certificate of the old authority: {}; each changes over when it is connected, or is removed with \
         `chutes-miner host remove`", .0.join(", ")
    )]
    OldCertificates(Vec<String>),
    /// Acting and taking over at once would end what is taken over.
    #[error("the cluster acts: only one that observes takes servers over, see `chutes-miner observe`")]
    NotObserving,
    /// What cannot be taken over.
    #[error("{}", .0.join("; "))]
    Adoption(Vec<String>),
    /// One cluster is one hotkey.
    #[error("this cluster belongs to the miner {0}: one cluster is one hotkey")]
    OtherMiner(Hotkey),
    /// Something of the old hotkey would be left to nobody.
    #[error("the hotkey cannot be replaced yet: {}", .0.join("; "))]
    HotkeyInUse(Vec<String>),
    /// Members that look for the one would find the other.
    #[error("{address} is the address of the member on host {host}: correct coordinator.advertise of either")]
    AddressTaken {
        /// Which address.
        address: String,
        /// Whose it is.
        host: String,
    },
    /// A validator counts on it.
    #[error("worker {0} works for a validator: `chutes-miner delete-node --name {0}` comes first")]
    WorkerInUse(String),
}

/// What a proposal is answered with.
pub type Answer = Result<Reply, Rejection>;
