//! Every REST call that a miner makes, as a trait, so that the real client and a model share it
//! (`validator-protocol`, section 3.4). `http.rs` is the real one.

use std::fmt;
use std::time::Duration;

use futures_util::future::BoxFuture;
use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, ChuteVersion, GpuId, InstanceId, JobId, ServerId};
use tokio::time::{Instant, sleep};

use super::rows::{
    ActiveInstanceRow, Advertised, BountyRow, ChuteRow, ImageRow, InstanceRow, JobRow, LaunchConfig,
    MetricRow, NewServer, NodeAdvertisement, NodeRow, RollingUpdateRow, SupportedGpu, UtilizationRow,
    VerificationStatus,
};
use super::stream::Listing;
use super::{Error, Result};

/// A call under way.
pub type Call<'a, T> = BoxFuture<'a, Result<T>>;

/// How a deletion ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deletion {
    /// It was there and is gone.
    Deleted,
    /// It was not there, or is not ours (404): nothing is left to do.
    AlreadyGone,
}

/// GPU types by short reference, in order.
pub type SupportedGpus = std::collections::BTreeMap<String, SupportedGpu>;

/// A validator's REST interface. Failures are [`Error`]; refusals keep their status. Nothing here repeats a
/// call that changes something: the executor does.
pub trait ValidatorApi: fmt::Debug + Send + Sync {
    /// Which validator this is.
    fn hotkey(&self) -> &Hotkey;

    /// Their clock minus ours in ms, from the last answer. `None` before the first.
    fn clock_offset_ms(&self) -> Option<i64>;

    /// `GET /ping`.
    fn ping(&self) -> Call<'_, ()>;

    /// All chutes.
    fn chutes(&self) -> Call<'_, Listing<ChuteRow>>;
    /// All images.
    fn images(&self) -> Call<'_, Listing<ImageRow>>;
    /// Our GPUs.
    fn nodes(&self) -> Call<'_, Listing<NodeRow>>;
    /// Our instances; the only stream that can say that there are none.
    fn instances(&self) -> Call<'_, Listing<InstanceRow>>;
    /// Jobs without instance, finished ones included.
    fn jobs(&self) -> Call<'_, Listing<JobRow>>;
    /// Use of chutes in the last hour.
    fn metrics(&self) -> Call<'_, Listing<MetricRow>>;
    /// Everybody's active instances (2026); 404 elsewhere.
    fn active_instances(&self) -> Call<'_, Listing<ActiveInstanceRow>>;
    /// Load and targets of chutes.
    fn utilization(&self) -> Call<'_, Listing<UtilizationRow>>;
    /// Redeploys under way.
    fn rolling_updates(&self) -> Call<'_, Listing<RollingUpdateRow>>;
    /// Open bounties.
    fn bounties(&self) -> Call<'_, Listing<BountyRow>>;
    /// GPU types that the validator takes.
    fn supported_gpus(&self) -> Call<'_, SupportedGpus>;

    /// One version of a chute. `None`: unknown, or no longer the current version.
    fn chute<'a>(&'a self, chute: &'a ChuteId, version: &'a ChuteVersion) -> Call<'a, Option<ChuteRow>>;

    /// Advertises GPUs of one server. Not idempotent: 409 if any is known already, also as ours.
    fn advertise<'a>(&'a self, server: &'a ServerId, gpus: &'a [NodeAdvertisement]) -> Call<'a, Advertised>;
    /// How far a verification is. See also [`await_verification`].
    /// `POST /servers/`: a sealed worker, whose GPUs the validator takes by what its attestation says; verified at once.
    /// 409 if it has it already.
    fn add_server<'a>(&'a self, server: &'a NewServer) -> Call<'a, ()>;
    /// `DELETE /servers/{id}`: the worker with all its GPUs.
    fn delete_server<'a>(&'a self, server: &'a ServerId) -> Call<'a, Deletion>;
    fn verification_status<'a>(&'a self, task_id: &'a str) -> Call<'a, VerificationStatus>;
    /// Takes a GPU out of the validator's inventory. Its instances must be deleted first.
    fn delete_node<'a>(&'a self, gpu: &'a GpuId) -> Call<'a, Deletion>;

    /// Asks for a launch config. 423: no room; 403: not for us; 404: unknown; 409: try again.
    fn launch_config<'a>(&'a self, chute: &'a ChuteId, job: Option<&'a JobId>) -> Call<'a, LaunchConfig>;
    /// Deletes an instance of ours.
    fn delete_instance<'a>(&'a self, chute: &'a ChuteId, instance: &'a InstanceId) -> Call<'a, Deletion>;
    /// Gives a job back.
    fn release_job<'a>(&'a self, job: &'a JobId) -> Call<'a, Deletion>;

    /// Announces an instance, for chutes before 0.3.0.
    fn announce_instance<'a>(
        &'a self,
        chute: &'a ChuteId,
        gpus: &'a [GpuId],
        host: &'a str,
        port: u16,
    ) -> Call<'a, InstanceRow>;
    /// Says that an announced instance is ready. To be repeated until `verified` is true, at most five times
    /// in ten minutes.
    fn activate_instance<'a>(&'a self, chute: &'a ChuteId, instance: &'a InstanceId)
    -> Call<'a, InstanceRow>;

    /// Uploads an audit report that was committed on chain in `block`.
    fn upload_audit<'a>(&'a self, report: &'a [u8], block: u64) -> Call<'a, ()>;
}

/// How a verification ended for us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verification {
    /// All GPUs are verified.
    Verified,
    /// They are not, with the reason.
    Failed(String),
    /// Undecided at our deadline. The validator forgets tasks after an hour and then says "pending" for ever.
    TimedOut,
}

/// Polls a verification until it is decided or `deadline` has passed. Lost polls are repeated.
///
/// # Errors
/// A refusal or malformed answer that will not get better.
pub async fn await_verification(
    api: &dyn ValidatorApi,
    task_id: &str,
    every: Duration,
    deadline: Duration,
) -> Result<Verification> {
    let end = Instant::now() + deadline;
    loop {
        match api.verification_status(task_id).await {
            Ok(VerificationStatus::Verified) => return Ok(Verification::Verified),
            Ok(VerificationStatus::Failed(why)) => return Ok(Verification::Failed(why)),
            Ok(VerificationStatus::Pending) => {}
            Err(error) if Error::is_transient(&error) => {
                tracing::debug!(%error, "verification status not read");
            }
            Err(error) => return Err(error),
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Verification::TimedOut);
        }
        sleep(every.min(left)).await;
    }
}
