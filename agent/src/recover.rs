//! `recover`: the majority of the voters is lost for good, and this member goes on alone with what it has. A person
//! is told what that costs, and types the cluster's id.

use std::fmt::Write as _;
use std::io::Write as _;

use agent::config::checked::{certificates_folder, coordinator_folder, joining};
use agent::config::{self, Sources};
use agent::processes::Lock;
use anyhow::Context as _;
use coordinator::clock::{Clock as _, WallClock};
use coordinator::recovery::Survivor;

use crate::setup::{runtime, say};

/// Shows what this member knows, asks, and makes it the only member of its cluster.
///
/// # Errors
/// With a chain of reasons.
pub(crate) fn recover(sources: &Sources, cluster: Option<&str>) -> anyhow::Result<()> {
    let (written, _) = config::read(sources)?;
    let _lock = Lock::take(&written.data).context("stop the agent first")?;
    let (data, identity) = (
        coordinator_folder(&written.data),
        certificates_folder(&written.data),
    );
    let runtime = runtime()?;
    let survivor = runtime.block_on(Survivor::look(&data, &identity))?;
    let host = joining(&written).map_err(anyhow::Error::msg)?;
    say(&picture(&survivor))?;
    let typed = cluster.map_or_else(|| typed(&survivor), |cluster| Ok(cluster.to_owned()))?;
    runtime.block_on(survivor.go_alone(&typed, host.address, WallClock.now()))?;
    say(&format!(
        "member {} is the only member of {} now: start the agent. The others must not come back as they are: run \
         chutes-agent rejoin on each host that does, before its agent is started",
        survivor.member, survivor.cluster
    ))
}

/// What a person has to know before.
fn picture(survivor: &Survivor) -> String {
    let condition = &survivor.condition;
    let number = |value: Option<u64>| value.map_or_else(|| "none".to_owned(), |value| value.to_string());
    let (term, index) = (number(condition.last_term), number(condition.last_index));
    let mut text = format!(
        "member {} of the cluster {}\nlast log entry: term {term}, index {index}; last vote in term {}\n",
        survivor.member, survivor.cluster, condition.term
    );
    for (member, address) in &condition.addresses {
        let role = if condition.voters.contains(member) {
            "votes"
        } else {
            "has no vote"
        };
        let own = if *member == survivor.member {
            ", this one"
        } else {
            ""
        };
        // Writing to a text cannot fail.
        let _ = writeln!(text, "  member {member} at {address}: {role}{own}");
    }
    if !condition.voters.contains(&survivor.member) {
        text.push_str(
            "This member only follows: a voter that can be brought back has all that was acknowledged.\n",
        );
    }
    let _ = write!(
        text,
        "\nWhat may be lost: everything that was acknowledged after this entry, be it by operators, hosts or \
         validators.\nAsk the same of every other member that is left (this command changes nothing before the id is \
         typed), and go on with the one\nwhose last entry has the highest term and, in that term, the highest \
         index.\nIf a majority of the voters can be brought back, do that instead: nothing is lost then.\nFrom here \
         on the others are out: if they go on as they are, there are two clusters for one hotkey.\n"
    );
    text
}

fn typed(survivor: &Survivor) -> anyhow::Result<String> {
    let mut out = std::io::stdout();
    write!(out, "Type {} to go on with this member alone: ", survivor.cluster)?;
    out.flush()?;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    anyhow::ensure!(
        !line.trim().is_empty(),
        "nothing was typed, and nothing was changed: scripts give --cluster ID"
    );
    Ok(line.trim().to_owned())
}
