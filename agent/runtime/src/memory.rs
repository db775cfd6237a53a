//! A runtime that runs nothing, for tests and simulation: it keeps the rules of [`Runtime`] and lets its
//! owner decide when a workload gets on, ends, or cannot be observed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use protocol::id::{DeploymentId, GpuId};
use protocol::logs::{Log, LogQuery, WorkloadEvent};
use protocol::report::WorkloadStatus;
use protocol::workload::{Fence, WorkloadPhase, WorkloadSpec};
use tokio::sync::watch;

use crate::{Error, Observed, Runtime};

#[derive(Debug, Default)]
struct State {
    workloads: BTreeMap<DeploymentId, (Vec<GpuId>, WorkloadPhase)>,
    started: Vec<DeploymentId>,
    unreachable: bool,
}

/// The runtime. Clones share their workloads, as an agent that restarts finds them again.
#[derive(Debug, Clone)]
pub struct Memory {
    state: Arc<Mutex<State>>,
    changes: watch::Sender<u64>,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            state: Arc::default(),
            changes: watch::channel(0).0,
        }
    }
}

impl Memory {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, edit: impl FnOnce(&mut State)) {
        edit(&mut self.state());
        self.changes.send_modify(|count| *count += 1);
    }

    /// Brings a workload to a phase, if it exists.
    pub fn advance(&self, deployment: &DeploymentId, phase: WorkloadPhase) {
        self.change(|state| {
            if let Some((_, current)) = state.workloads.get_mut(deployment) {
                *current = phase;
            }
        });
    }

    /// Ends the stop of a workload: it is gone.
    pub fn remove(&self, deployment: &DeploymentId) {
        self.change(|state| {
            state.workloads.remove(deployment);
        });
    }

    /// Makes every call fail, as a broken runtime does, or work again.
    pub fn set_unreachable(&self, unreachable: bool) {
        self.change(|state| state.unreachable = unreachable);
    }

    /// What is known of a workload: nothing writes, and nothing is kept.
    fn known<T>(&self, deployment: &DeploymentId, known: T) -> Result<Option<T>, Error> {
        self.reachable()?;
        Ok(self.state().workloads.contains_key(deployment).then_some(known))
    }

    /// Every start so far, in order.
    #[must_use]
    pub fn started(&self) -> Vec<DeploymentId> {
        self.state().started.clone()
    }

    fn reachable(&self) -> Result<(), Error> {
        if self.state().unreachable {
            return Err(Error::Unknown("the runtime does not answer".to_owned()));
        }
        Ok(())
    }

    fn begin(&self, spec: &WorkloadSpec) -> Result<(), Error> {
        self.reachable()?;
        if !self.state().workloads.contains_key(&spec.deployment) {
            self.change(|state| {
                let entry = (spec.gpus.clone(), WorkloadPhase::Pending);
                state.workloads.insert(spec.deployment.clone(), entry);
                state.started.push(spec.deployment.clone());
            });
        }
        Ok(())
    }

    fn end(&self, deployment: &DeploymentId) -> Result<(), Error> {
        self.reachable()?;
        self.change(|state| match state.workloads.get_mut(deployment) {
            Some((_, phase @ (WorkloadPhase::Pulling { .. } | WorkloadPhase::Running { .. }))) => {
                *phase = WorkloadPhase::Stopping;
            }
            Some((_, WorkloadPhase::Stopping)) | None => {}
            Some((_, WorkloadPhase::Pending | WorkloadPhase::Ended { .. })) => {
                state.workloads.remove(deployment);
            }
        });
        Ok(())
    }

    fn list(&self) -> Result<Vec<Observed>, Error> {
        self.reachable()?;
        let state = self.state();
        let observed =
            |(deployment, (gpus, phase)): (&DeploymentId, &(Vec<GpuId>, WorkloadPhase))| Observed {
                status: WorkloadStatus {
                    deployment: deployment.clone(),
                    phase: phase.clone(),
                },
                gpus: gpus.clone(),
            };
        Ok(state.workloads.iter().map(observed).collect())
    }
}

impl Runtime for Memory {
    fn apply<'a>(&'a self, _fence: Fence, spec: &'a WorkloadSpec) -> BoxFuture<'a, Result<(), Error>> {
        std::future::ready(self.begin(spec)).boxed()
    }

    fn stop<'a>(&'a self, deployment: &'a DeploymentId) -> BoxFuture<'a, Result<(), Error>> {
        std::future::ready(self.end(deployment)).boxed()
    }

    fn observe(&self) -> BoxFuture<'_, Result<Vec<Observed>, Error>> {
        std::future::ready(self.list()).boxed()
    }

    fn log<'a>(&'a self, query: &'a LogQuery) -> BoxFuture<'a, Result<Option<Log>, Error>> {
        let nothing = Log {
            text: String::new(),
            next: None,
            gone: false,
        };
        std::future::ready(self.known(&query.deployment, nothing)).boxed()
    }

    fn events<'a>(
        &'a self,
        deployment: &'a DeploymentId,
    ) -> BoxFuture<'a, Result<Option<Vec<WorkloadEvent>>, Error>> {
        std::future::ready(self.known(deployment, Vec::new())).boxed()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}
