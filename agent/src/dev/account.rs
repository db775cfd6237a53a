//! What a person sees while a development cluster runs: one line for each thing that happens, and the
//! result at the end.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use serde_json::Value;
use tokio::time::Instant;

use super::Options;
use super::stand_in::StandIn;
use super::verdict::{Look, Verdict};

/// The steps of a launch, in the order in which they usually come, with the member that has their time.
const STEPS: [(&str, &str); 5] = [
    ("requested", "created_at"),
    ("running", "running_at"),
    ("claimed", "claimed_at"),
    ("verified", "verified_at"),
    ("active", "active_at"),
];

/// Prints the account; to standard error when standard output is for the result alone.
#[derive(Debug)]
pub(super) struct Account {
    json: bool,
    began: Instant,
    seen: BTreeMap<String, String>,
}

impl Account {
    pub(super) fn new(json: bool) -> Self {
        Self {
            json,
            began: Instant::now(),
            seen: BTreeMap::new(),
        }
    }

    fn line(&self, text: &str) {
        // A reader that went away is no reason to stop.
        let _ = if self.json {
            writeln!(std::io::stderr(), "{text}")
        } else {
            writeln!(std::io::stdout(), "{text}")
        };
    }

    fn event(&self, who: &str, text: &str) {
        let seconds = self.began.elapsed().as_secs_f64();
        self.line(&format!("{seconds:7.1} s  {who:<16} {text}"));
    }

    pub(super) fn heading(&self, options: &Options, data: &Path) {
        self.line(&format!(
            "development cluster of {} host(s) in {}",
            options.hosts,
            data.display()
        ));
        self.line("simulated here: the validator, the chutes and the GPUs; everything else is what runs in production");
    }

    pub(super) fn stand_in(&self, stand_in: &StandIn) {
        let description = stand_in.description();
        self.line(&format!(
            "validator stand-in {} at {}",
            description.hotkey, description.api_url
        ));
        for relaxed in &description.relaxed {
            self.line(&format!("  relaxed: {relaxed}"));
        }
    }

    pub(super) fn note(&mut self, who: &str, text: &str) {
        if self
            .seen
            .insert(format!("note {who}"), text.to_owned())
            .as_deref()
            != Some(text)
        {
            self.event(who, text);
        }
    }

    pub(super) fn killed(&self, host: &str) {
        self.event(host, "it leads, and its agent is killed");
    }

    pub(super) fn restarted(&self, host: &str, status: &str) {
        self.event(
            host,
            &format!("its agent ended ({status}); started again on the same data"),
        );
    }

    /// One line for each deployment whose timeline has grown.
    pub(super) fn progress(&mut self, look: &Look) {
        for deployment in look.deployments() {
            let Some(id) = deployment["deployment_id"].as_str() else {
                continue;
            };
            let line = timeline(deployment, look.event_at(deployment));
            if self.seen.get(id) != Some(&line) {
                let name = deployment["chute_name"].as_str().unwrap_or(id);
                self.event(name, &line);
                self.seen.insert(id.to_owned(), line);
            }
        }
        for violation in &look.violations {
            self.note("INVARIANT", violation);
        }
    }

    pub(super) fn result(&self, verdict: &Verdict) -> std::io::Result<()> {
        let mut out = std::io::stdout();
        if self.json {
            return writeln!(out, "{}", verdict.to_json());
        }
        writeln!(out)?;
        if let Value::Object(members) = verdict.to_json() {
            for (name, value) in members {
                writeln!(out, "{name:>22}  {value}")?;
            }
        }
        for reason in &verdict.reasons {
            writeln!(out, "not met: {reason}")?;
        }
        Ok(())
    }
}

/// `event, requested +0.1 s, running +1.2 s, ... [phase]`, from the event on, or else from the request on.
fn timeline(deployment: &Value, event_at: Option<u64>) -> String {
    let start = event_at
        .or_else(|| deployment["created_at"].as_u64())
        .unwrap_or_default();
    let mut parts: Vec<String> = event_at.iter().map(|_| "event".to_owned()).collect();
    for (name, member) in STEPS {
        if let Some(at) = deployment[member].as_u64() {
            let after_ms = u32::try_from(at.saturating_sub(start)).unwrap_or(u32::MAX);
            parts.push(format!("{name} +{:.1} s", f64::from(after_ms) / 1000.0));
        }
    }
    let phase = deployment["phase"].as_str().unwrap_or("?");
    match deployment["stop_reason"].as_str() {
        Some(reason) => format!("{} [{phase}: {reason}]", parts.join(", ")),
        None => format!("{} [{phase}]", parts.join(", ")),
    }
}
