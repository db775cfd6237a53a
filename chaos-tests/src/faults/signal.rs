//! A process that is stopped for a while, or killed, at once and without a word.

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};

fn send(pid: u32, signal: Signal) -> anyhow::Result<()> {
    let pid = Pid::from_raw(pid.cast_signed()).context("a process id")?;
    kill_process(pid, signal)
        .with_context(|| format!("signal {signal:?} to process {}", pid.as_raw_nonzero()))
}

/// A process that stands still until this is dropped. What it sent before is on its way; what is sent to it waits.
#[derive(Debug)]
pub struct Paused(u32);

impl Paused {
    /// Stops it (SIGSTOP).
    ///
    /// # Errors
    /// When there is no such process, or it is not ours.
    pub fn pause(pid: u32) -> anyhow::Result<Self> {
        send(pid, Signal::STOP)?;
        Ok(Self(pid))
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        // It may have been killed meanwhile.
        let _ = send(self.0, Signal::CONT);
    }
}

/// `kill -9`.
///
/// # Errors
/// When there is no such process, or it is not ours.
pub fn kill(pid: u32) -> anyhow::Result<()> {
    send(pid, Signal::KILL)
}
