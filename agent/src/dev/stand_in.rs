//! The validator stand-in as a child process, and what it says of itself.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use protocol::hotkey::Hotkey;
use serde::Deserialize;
use serde_json::Value;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};
use validator_stand_in::ledger::Entry;
use validator_stand_in::scenario::{Goals, Scenario};
use validator_stand_in::sites::Site;

/// How long it may take to build the chutes' image and serve.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// What the stand-in says once it serves.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Description {
    #[serde(rename = "validator")]
    pub(super) hotkey: Hotkey,
    pub(super) api_url: String,
    pub(super) socket_url: String,
    pub(super) registry_url: String,
    pub(super) sites: Vec<Site>,
    pub(super) relaxed: Vec<String>,
}

/// The running stand-in.
#[derive(Debug)]
pub(super) struct StandIn {
    child: Child,
    data: PathBuf,
    scenario_file: Option<PathBuf>,
    scenario: Scenario,
    description: Description,
    http: reqwest::Client,
}

impl StandIn {
    /// Starts it on a free port, or on the port that it had before in the same folder.
    pub(super) async fn start(data: &Path, scenario_file: Option<&Path>) -> anyhow::Result<Self> {
        let scenario = match scenario_file {
            None => Scenario::development(),
            Some(path) => {
                let text =
                    std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
                Scenario::from_toml(&text).with_context(|| path.display().to_string())?
            }
        };
        let data = data.join("validator-stand-in");
        std::fs::create_dir_all(&data)?;
        let listen = match std::fs::read_to_string(data.join("address")) {
            Ok(address) => address.trim().to_owned(),
            Err(_) => "127.0.0.1:0".to_owned(),
        };
        let (child, description) = spawn(&data, scenario_file, &listen).await?;
        let address = description.api_url.trim_start_matches("http://");
        std::fs::write(data.join("address"), address)?;
        let http = reqwest::Client::builder()
            .no_proxy()
            .timeout(Duration::from_secs(10))
            .build()?;
        let scenario_file = scenario_file.map(Path::to_owned);
        Ok(Self {
            child,
            data,
            scenario_file,
            scenario,
            description,
            http,
        })
    }

    pub(super) fn validator(&self) -> &Hotkey {
        &self.description.hotkey
    }

    pub(super) fn description(&self) -> &Description {
        &self.description
    }

    pub(super) fn scenario(&self) -> &Scenario {
        &self.scenario
    }

    pub(super) fn goals(&self) -> &Goals {
        &self.scenario.goals
    }

    pub(super) fn goals_within(&self) -> Duration {
        Duration::from_secs(u64::from(self.goals().within_seconds.max(1)))
    }

    /// Ledger entries after this number.
    pub(super) async fn ledger(&self, after: u64) -> anyhow::Result<Vec<Entry>> {
        let url = format!("{}/_stand_in/ledger?after={after}", self.description.api_url);
        Ok(self
            .http
            .get(url)
            .send()
            .await?
            .error_for_status()?
            .json()
            .await?)
    }

    /// What the miner was paid.
    pub(super) async fn score(&self) -> anyhow::Result<Value> {
        let url = format!("{}/_stand_in/score", self.description.api_url);
        Ok(self
            .http
            .get(url)
            .send()
            .await?
            .error_for_status()?
            .json()
            .await?)
    }

    pub(super) async fn restart_if_dead(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            tracing::warn!(%status, "the validator stand-in ended; starting it again");
            let address = self.description.api_url.trim_start_matches("http://").to_owned();
            let (child, description) = spawn(&self.data, self.scenario_file.as_deref(), &address).await?;
            (self.child, self.description) = (child, description);
        }
        Ok(())
    }

    pub(super) async fn stop(mut self) {
        super::hosts::terminate(&mut self.child, Duration::from_secs(5)).await;
    }
}

async fn spawn(data: &Path, scenario: Option<&Path>, listen: &str) -> anyhow::Result<(Child, Description)> {
    let ready = data.join("ready.json");
    let _ = std::fs::remove_file(&ready);
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(data.join("log"))?;
    let mut command = Command::new(std::env::current_exe().context("find this executable")?);
    command
        .args(["validator-stand-in", "--listen", listen, "--data"])
        .arg(data);
    command.arg("--ready-file").arg(&ready);
    if let Some(scenario) = scenario {
        command.arg("--scenario").arg(scenario);
    }
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true);
    let mut child = command.spawn().context("start the validator stand-in")?;
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        if let Ok(text) = std::fs::read_to_string(&ready) {
            return Ok((
                child,
                serde_json::from_str(&text).context("read what the stand-in says")?,
            ));
        }
        if let Some(status) = child.try_wait()? {
            anyhow::bail!(
                "the validator stand-in ended with {status}; see {}",
                data.join("log").display()
            );
        }
        anyhow::ensure!(Instant::now() < deadline, "the validator stand-in does not serve");
        sleep(Duration::from_millis(50)).await;
    }
}
