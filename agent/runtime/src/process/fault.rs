//! Planted faults: an agent that dies at a certain step of a workload's life. For tests only; they are
//! passed to the constructor and never read from a configuration.

use std::sync::Arc;

use tokio::sync::Notify;

/// Steps of a workload's life between which an agent may die.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The folder and the code are there.
    FolderMade,
    /// The intention to start is on disk.
    StartingRecorded,
    /// The process waits at the gate.
    ProcessGated,
    /// The process is on disk and still waits.
    StartedRecorded,
    /// The word to go on was said.
    Released,
    /// The end is on disk.
    EndRecorded,
    /// All processes have ended after a stop.
    ProcessesEnded,
    /// The folder is gone.
    FolderRemoved,
}

/// What goes wrong.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    halt: Option<(Step, Arc<Notify>)>,
}

impl Faults {
    /// Nothing goes wrong.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// A workload's life stands still for ever when it reaches the step, as that of a dead agent; the
    /// notification is sent then.
    #[must_use]
    pub fn halt_at(step: Step) -> (Self, Arc<Notify>) {
        let halted = Arc::new(Notify::new());
        let halt = Some((step, Arc::clone(&halted)));
        (Self { halt }, halted)
    }

    pub(crate) async fn reach(&self, step: Step) {
        if let Some((at, halted)) = &self.halt
            && *at == step
        {
            halted.notify_one();
            std::future::pending::<()>().await;
        }
    }
}
