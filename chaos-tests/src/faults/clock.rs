//! A wall clock that is off, by `faketime`. Only the wall clock: what measures durations stays right.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

/// The wall clock of a machine, which can be set off while its programs run.
#[derive(Debug, Clone)]
pub struct MovableClock(PathBuf);

impl MovableClock {
    /// One that is right, as `file` says from now on.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn new(file: &Path) -> anyhow::Result<Self> {
        let clock = Self(file.to_owned());
        clock.set_off(0)?;
        Ok(clock)
    }

    /// Moves it; programs look once a second.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn set_off(&self, seconds: i64) -> anyhow::Result<()> {
        // Nobody must read half of it.
        let new = self.0.with_extension("new");
        std::fs::write(&new, format!("{seconds:+}s\n")).with_context(|| new.display().to_string())?;
        std::fs::rename(&new, &self.0).with_context(|| self.0.display().to_string())
    }

    /// Gives a command this clock, and all that it starts.
    ///
    /// # Errors
    /// `faketime` is missing.
    pub fn give_to(&self, command_line: &mut Command) -> anyhow::Result<()> {
        let output = Command::new("faketime").args(["-m", "-f", "+0s", "env"]).output();
        let output = output.context("faketime")?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let preload = said.lines().find_map(|line| line.strip_prefix("LD_PRELOAD="));
        command_line
            .env("LD_PRELOAD", preload.context("what faketime preloads")?)
            .env("FAKETIME_TIMESTAMP_FILE", &self.0)
            .env("FAKETIME_CACHE_DURATION", "1")
            .env("FAKETIME_DONT_RESET", "1")
            .env("NO_FAKE_STAT", "1")
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        Ok(())
    }
}

/// A command whose wall clock is off by so many seconds, and that of all that it starts.
#[must_use]
pub fn command(program: &str, offset_seconds: i64) -> Command {
    let mut command = Command::new("faketime");
    command
        .args([
            "--exclude-monotonic",
            "-f",
            &format!("{offset_seconds:+}s"),
            program,
        ])
        // Children get the offset too.
        .env("FAKETIME_DONT_RESET", "1");
    command
}

/// Whether the clock of a program can be changed here.
pub(super) fn probe() -> anyhow::Result<()> {
    let seconds = |mut command: Command| -> anyhow::Result<i64> {
        let output = command.arg("+%s").output().context("run")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.trim()
            .parse()
            .with_context(|| format!("a time instead of {text:?}"))
    };
    let right = seconds(Command::new("date")).context("date")?;
    let wrong = seconds(command("date", -7200)).context("faketime")?;
    anyhow::ensure!(
        (7100..7300).contains(&(right - wrong)),
        "the clock was off by {} s",
        right - wrong
    );
    Ok(())
}
