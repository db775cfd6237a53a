//! What `/proc` says: which processes belong to a development cluster, and which chute each one runs.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// The variable that the process runtime gives to each chute.
const DEPLOYMENT_VARIABLE: &str = "CHUTES_DEPLOYMENT_ID";
/// The variable whose value lies below the data folder that the chute belongs to.
const CODE_VARIABLE: &str = "CHUTES_CODE_FILE";
/// Clock ticks in a second, as Linux counts them for programs.
const TICKS: u64 = 100;

/// A process that lives; one that has ended and was not waited for counts as gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    pub(crate) parent: i32,
    /// Since boot, in ticks: with the pid it names one process for ever.
    pub(crate) started: u64,
    pub(crate) arguments: Vec<String>,
    /// The deployment, if it is a chute.
    pub(crate) deployment: Option<String>,
    /// Where its code lies, if it is a chute.
    pub(crate) code: Option<String>,
}

/// What `/proc` says of a process after its name, from its state on.
fn stat(pid: i32) -> Option<Vec<String>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything.
    let rest = stat.rsplit_once(") ")?.1.split(' ');
    Some(rest.map(str::to_owned).collect())
}

impl Process {
    /// Reads one; nothing if there is no such process any more.
    pub(crate) fn read(pid: i32) -> Option<Self> {
        let folder = format!("/proc/{pid}");
        let rest = stat(pid)?;
        if matches!(rest[0].as_str(), "Z" | "X") {
            return None;
        }
        let texts = |file: &str| {
            let bytes = std::fs::read(format!("{folder}/{file}")).unwrap_or_default();
            let parts = bytes.split(|byte| *byte == 0);
            parts
                .map(|part| String::from_utf8_lossy(part).into_owned())
                .collect::<Vec<_>>()
        };
        let variables = texts("environ");
        let variable = |name: &str| {
            let mut values = variables
                .iter()
                .filter_map(|text| text.strip_prefix(name)?.strip_prefix('='));
            values.next().map(str::to_owned)
        };
        Some(Self {
            pid,
            parent: rest.get(1)?.parse().ok()?,
            started: rest.get(19)?.parse().ok()?,
            arguments: texts("cmdline"),
            deployment: variable(DEPLOYMENT_VARIABLE),
            code: variable(CODE_VARIABLE),
        })
    }

    /// All that live.
    pub(crate) fn all() -> Vec<Self> {
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter_map(Self::read).collect()
    }

    /// Whether it is still the same process.
    pub(crate) fn lives(&self) -> bool {
        Self::read(self.pid).is_some_and(|now| now.started == self.started)
    }

    /// User and system time so far; nothing once it is gone.
    pub(crate) fn cpu(&self) -> Duration {
        let used = stat(self.pid).and_then(|rest| {
            let ticks = |at: usize| rest.get(at)?.parse::<u64>().ok();
            Some(ticks(11)? + ticks(12)?)
        });
        Duration::from_millis(used.unwrap_or(0) * 1000 / TICKS)
    }

    /// The subcommand of an agent's process.
    pub(crate) fn subcommand(&self) -> &str {
        self.arguments.get(1).map_or("", String::as_str)
    }

    pub(crate) fn is_chute_of(&self, data: &Path) -> bool {
        self.code
            .as_deref()
            .is_some_and(|code| Path::new(code).starts_with(data))
    }
}

/// The chutes of a data folder: the processes of each deployment that were not started by another one of the
/// same deployment. More than one of them is one chute twice.
pub(crate) fn chutes<'a>(processes: &'a [Process], data: &Path) -> BTreeMap<&'a str, Vec<&'a Process>> {
    let mut found: BTreeMap<&str, Vec<&Process>> = BTreeMap::new();
    let deployment_of: BTreeMap<i32, &Option<String>> =
        processes.iter().map(|p| (p.pid, &p.deployment)).collect();
    for process in processes.iter().filter(|process| process.is_chute_of(data)) {
        let Some(deployment) = process.deployment.as_deref() else {
            continue;
        };
        let of_parent = deployment_of.get(&process.parent).copied();
        if of_parent != Some(&process.deployment) {
            found.entry(deployment).or_default().push(process);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chute(pid: i32, parent: i32, deployment: &str) -> Process {
        Process {
            pid,
            parent,
            started: 1,
            arguments: Vec::new(),
            deployment: Some(deployment.to_owned()),
            code: Some(format!("/data/host-1/workloads/{deployment}/app.py")),
        }
    }

    #[test]
    fn children_of_a_chute_are_no_second_chute_and_other_folders_are_not_ours() {
        let processes = [
            chute(10, 1, "a"),
            chute(11, 10, "a"),
            chute(20, 1, "b"),
            chute(21, 1, "b"),
        ];
        let found = chutes(&processes, Path::new("/data"));
        let count = |name: &str| found.get(name).map_or(0, Vec::len);
        assert_eq!((count("a"), count("b")), (1, 2));
        assert!(chutes(&processes, Path::new("/dat")).is_empty());
    }

    #[test]
    fn a_process_reads_itself() {
        let pid = std::process::id().cast_signed();
        let own = Process::read(pid).expect("we live");
        assert!(own.lives() && own.started > 0 && own.deployment.is_none());
        assert!(Process::all().iter().any(|process| process.pid == pid));
    }
}
