//! The chute stand-in: plays the container of a chute. It reads the arguments and variables that a real
//! container gets, claims its launch config, proves its software GPUs, activates, serves health and logs,
//! tries the sites that its code names, and works on its job if it has one.
//!
//! ```text
//!  settings --> claim --> proof --> PUT --> ports open --> activate --> serve (or job, then end)
//! ```
//! Reading order: `settings`, `launch` (the calls to the validator), `doors` (what it serves), `egress`.

mod doors;
mod egress;
mod launch;
mod settings;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::sync::{Arc, Mutex};

use anyhow::Context;

use crate::command::{install_provider, until_asked_to_stop};
use settings::{Flow, Settings};

/// Lines of log that are kept.
const LOG_LINES_MAX: usize = 1_000;

/// What a container says, for its log server and its standard error.
#[derive(Debug, Default)]
pub(crate) struct Log(Mutex<Vec<String>>);

impl Log {
    pub(crate) fn say(&self, line: String) {
        // Whoever reads it may have gone.
        let _ = writeln!(std::io::stderr(), "{line}");
        let mut lines = self.0.lock().expect("no holder of the lock panics");
        if lines.len() < LOG_LINES_MAX {
            lines.push(line);
        }
    }

    pub(crate) fn text(&self) -> String {
        let lines = self.0.lock().expect("no holder of the lock panics");
        lines.iter().map(|line| format!("{line}\n")).collect()
    }
}

/// Plays a container until SIGTERM or the end of its job. `arguments` begin with the program's name, as in
/// `chutes run app:chute --port 8000 --miner-ss58 M --validator-ss58 V`.
///
/// # Errors
/// With a chain of reasons, when the arguments are wrong or the validator refuses; a container that fails
/// ends with a non-zero status.
pub async fn run(arguments: Vec<String>, environment: BTreeMap<String, String>) -> anyhow::Result<()> {
    install_provider();
    tokio::select! {
        stopped = until_asked_to_stop() => stopped.context("wait for signals"),
        ended = play(&arguments, &environment) => ended,
    }
}

async fn play(arguments: &[String], environment: &BTreeMap<String, String>) -> anyhow::Result<()> {
    let settings = Settings::read(arguments, environment)?;
    let log = Arc::new(Log::default());
    log.say(format!(
        "{} on {} GPU(s)",
        settings.ref_str,
        settings.devices.len()
    ));
    let doors = doors::open(&settings, log.clone()).await.context("open ports")?;
    match &settings.flow {
        Flow::Legacy { seed } => {
            log.say(format!("no launch config, seed {seed}"));
            doors.ready();
        }
        Flow::LaunchConfig(token) => {
            let launched = launch::claim_and_prove(&settings, token, &log, &doors).await?;
            doors.ready();
            launch::activate(token, &launched.activation_url, &log).await?;
            let probes = egress::probes(&settings.code);
            egress::try_all(&settings, Some(token), &probes, &log).await;
            if let Some(job) = &launched.job {
                return launch::work(job, &log).await;
            }
        }
    }
    std::future::pending().await
}
