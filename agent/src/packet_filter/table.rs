//! The program `nft`: what it is given is done as a whole, or not at all.

use std::io;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::time::timeout;

const TIME_MAX: Duration = Duration::from_secs(10);

/// Why it did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not there.
    #[error("{program} cannot be run ({source}): install nftables, or set packet_filter.enabled = false")]
    Program {
        /// Which.
        program: String,
        /// Why not.
        source: io::Error,
    },
    /// It must not.
    #[error(
        "this process may not change packet rules: it needs the right NET_ADMIN, which the chart gives with \
         packetFilter.enabled=true. Without it, set packet_filter.enabled = false"
    )]
    NotPermitted,
    /// It said no.
    #[error("nft refuses the packet filter: {0}")]
    Refused(String),
    /// It hangs.
    #[error("nft does not end within {TIME_MAX:?}")]
    Slow,
}

/// The program.
#[derive(Debug, Clone)]
pub struct Table {
    program: PathBuf,
}

impl Default for Table {
    fn default() -> Self {
        Self {
            program: PathBuf::from("nft"),
        }
    }
}

impl Table {
    /// With this program.
    #[must_use]
    pub fn with_program(program: PathBuf) -> Self {
        Self { program }
    }

    /// Does all that a text says, or nothing.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn load(&self, text: &str) -> Result<(), Error> {
        let output = self.run(text).await?;
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            Ok(())
        } else if said.contains("Operation not permitted") {
            Err(Error::NotPermitted)
        } else {
            Err(Error::Refused(said.trim().to_owned()))
        }
    }

    async fn run(&self, text: &str) -> Result<Output, Error> {
        let failed = |source| Error::Program {
            program: self.program.display().to_string(),
            source,
        };
        let mut child = Command::new(&self.program)
            .args(["--file", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // What it says is understood here.
            .env("LC_ALL", "C")
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let input = child.stdin.take();
        let whole = async move {
            if let Some(mut input) = input {
                // One that ends early says why.
                let _ = input.write_all(text.as_bytes()).await;
            }
            child.wait_with_output().await
        };
        timeout(TIME_MAX, whole)
            .await
            .map_err(|_| Error::Slow)?
            .map_err(failed)
    }
}
