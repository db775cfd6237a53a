//! One child: it is started, waited for, started again after a pause that grows, and stopped.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocol::time::UnixMillis;
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;
use tokio::process::Command;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

use super::Part;
use coordinator::clock::Clock;

const BACKOFF_FIRST: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// A child that lived so long was a good one.
const GOOD_AFTER: Duration = Duration::from_secs(60);

/// What a child is made of.
#[derive(Debug)]
pub(super) struct Child {
    /// Which one.
    pub(super) part: Part,
    /// The agent itself.
    pub(super) executable: PathBuf,
    /// The settings in effect.
    pub(super) settings: PathBuf,
    /// Its standard input; nothing when absent. Stays open here.
    pub(super) stdin: Option<OwnedFd>,
}

/// How many ms mimalloc keeps pages that are free before the system has them back. By default a whole second: in a flood
/// of writes that is 4 MiB more for each member. An operator's own value stands.
const PURGE_DELAY: (&str, &str) = ("MIMALLOC_PURGE_DELAY", "50");

impl Child {
    fn spawn(&self) -> io::Result<tokio::process::Child> {
        let stdin = match &self.stdin {
            Some(end) => Stdio::from(end.try_clone()?),
            None => Stdio::null(),
        };
        Command::new(&self.executable)
            .arg(self.part.name())
            .arg("--settings")
            .arg(&self.settings)
            .arg("--supervisor")
            .arg(std::process::id().to_string())
            .env(
                PURGE_DELAY.0,
                std::env::var_os(PURGE_DELAY.0).unwrap_or(PURGE_DELAY.1.into()),
            )
            .stdin(stdin)
            .stdout(Stdio::null())
            // A terminal's interrupt is for the supervisor, which stops the children in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
    }
}

/// A child as the local door shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ChildStatus {
    /// Which one.
    pub name: &'static str,
    /// Its process while it runs.
    pub pid: Option<u32>,
    /// How often it was started again.
    pub restarts: u32,
    /// When it was started, or when it ended.
    pub since: UnixMillis,
    /// How it ended the last time.
    pub last_end: Option<String>,
}

/// All children, as seen from outside.
#[derive(Debug, Clone)]
pub struct Children {
    rows: Arc<Mutex<BTreeMap<Part, ChildStatus>>>,
    clock: Arc<dyn Clock>,
}

impl Children {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        Self {
            rows: Arc::default(),
            clock,
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Part, ChildStatus>> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What there is now, and when that was.
    #[must_use]
    pub fn look(&self) -> (UnixMillis, Vec<ChildStatus>) {
        (self.clock.now(), self.lock().values().cloned().collect())
    }

    fn started(&self, part: Part, pid: Option<u32>) {
        let since = self.clock.now();
        let mut rows = self.lock();
        let before = rows.get(&part).cloned();
        rows.insert(
            part,
            ChildStatus {
                name: part.name(),
                pid,
                restarts: before.as_ref().map_or(0, |row| row.restarts + 1),
                since,
                last_end: before.and_then(|row| row.last_end),
            },
        );
    }

    fn ended(&self, part: Part, how: String) {
        let since = self.clock.now();
        if let Some(row) = self.lock().get_mut(&part) {
            row.pid = None;
            row.since = since;
            row.last_end = Some(how);
        }
    }
}

/// Keeps a child running until `stop` holds a deadline; then asks it to stop, and kills it at the deadline.
pub(super) async fn keep(child: Child, children: Children, mut stop: watch::Receiver<Option<Instant>>) {
    let part = child.part;
    let mut backoff = BACKOFF_FIRST;
    loop {
        let started = Instant::now();
        match child.spawn() {
            Err(error) => tracing::error!(child = %part, %error, "cannot be started"),
            Ok(mut process) => {
                children.started(part, process.id());
                tracing::info!(child = %part, pid = process.id(), "started");
                tokio::select! {
                    ended = process.wait() => {
                        let how = describe(ended);
                        tracing::warn!(child = %part, how, "ended, will be started again");
                        children.ended(part, how);
                    }
                    deadline = asked(&mut stop) => {
                        let how = end(part, &mut process, deadline).await;
                        tracing::info!(child = %part, how, "stopped");
                        children.ended(part, how);
                        return;
                    }
                }
            }
        }
        if started.elapsed() >= GOOD_AFTER {
            backoff = BACKOFF_FIRST;
        }
        tokio::select! {
            () = sleep(backoff.mul_f64(0.5 + fastrand::f64() / 2.0)) => {}
            _ = asked(&mut stop) => return,
        }
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

/// The deadline, once there is one; a supervisor that is gone wants everything to end now.
async fn asked(stop: &mut watch::Receiver<Option<Instant>>) -> Instant {
    match stop.wait_for(Option::is_some).await {
        Ok(deadline) => deadline.unwrap_or_else(Instant::now),
        Err(_) => Instant::now(),
    }
}

async fn end(part: Part, process: &mut tokio::process::Child, deadline: Instant) -> String {
    if let Some(pid) = process.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
        // It may have ended by itself; its id is ours until it is waited for.
        let _ = kill_process(pid, Signal::TERM);
    }
    if let Ok(ended) = timeout_at(deadline, process.wait()).await {
        return describe(ended);
    }
    tracing::warn!(child = %part, "does not stop in time and is killed");
    match process.kill().await {
        Ok(()) => "killed".to_owned(),
        Err(error) => error.to_string(),
    }
}

fn describe(ended: io::Result<ExitStatus>) -> String {
    match ended {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    }
}
