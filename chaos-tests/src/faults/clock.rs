//! A wall clock that is off, by `faketime`. Only the wall clock: what measures durations stays right.

use std::process::Command;

use anyhow::Context;

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
