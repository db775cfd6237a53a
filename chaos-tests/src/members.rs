//! Members of a cluster as real processes, and what must hold while their leader is killed or stopped, their links
//! are bad, or their disks slow.
//!
//! - `cluster.rs`: founds, joins, starts and ends the processes;
//! - `trial.rs`: writers and readers that run all the time, what they were promised, and what the ledger says;
//! - `leaders.rs`: `kill -9` of whoever leads, again and again;
//! - `pause.rs`: the leader stands still for a while and wakes;
//! - `links.rs`: all links between members are spoilt in one way after the other, by relays or by the kernel;
//! - `clocks.rs`: the leader's clock jumps by an hour;
//! - `elections.rs`: nothing but slow disks and a busy machine: nobody may lose the lead.

use std::path::PathBuf;

use anyhow::Context;
use serde_json::Value;

use crate::storm::cluster::agent_beside_us;

mod clocks;
pub(crate) mod cluster;
mod elections;
mod leaders;
mod links;
mod pause;
mod trial;

pub use clocks::Clocks;
pub use elections::Elections;
pub use leaders::Leaders;
pub use links::{Forward, Links};
pub use pause::Pause;

/// What all of them may be told.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Common {
    /// Where the moments come from; a random one when absent
    #[arg(long)]
    pub seed: Option<u64>,
    /// The chutes-agent executable; the one beside this program when absent
    #[arg(long)]
    pub agent: Option<PathBuf>,
}

/// What came of one of them.
#[derive(Debug)]
pub struct Outcome {
    /// All figures as one object.
    pub figures: Value,
    /// Why it is not good; empty if it is.
    pub reasons: Vec<String>,
}

impl From<crate::storm::Report> for Outcome {
    fn from(report: crate::storm::Report) -> Self {
        Self {
            figures: report.to_json(),
            reasons: report.reasons,
        }
    }
}

impl Common {
    pub(crate) fn seed(&self) -> u64 {
        self.seed.unwrap_or_else(|| fastrand::u64(..))
    }

    pub(crate) fn executable(&self) -> anyhow::Result<PathBuf> {
        match &self.agent {
            Some(path) => path.canonicalize().with_context(|| path.display().to_string()),
            None => agent_beside_us(),
        }
    }
}
