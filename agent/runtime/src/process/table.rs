//! The kernel's process table, read from `/proc`: who is who, and who belongs to a workload.
//!
//! A process id alone names nobody, since numbers are used again: an [`Identity`] is the number and the
//! time of its start, valid within one boot. A process belongs to a workload when it carries the
//! workload's name in its environment, which every descendant inherits, or is in its leader's group.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout_at};

/// Variable that marks every process of a workload.
pub(crate) const MARKER: &str = "CHUTES_DEPLOYMENT_ID";
/// How long a killed process may take until it is killed again.
const KILL_PATIENCE: Duration = Duration::from_secs(1);

/// One process of this boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// Its number.
    pub(crate) pid: i32,
    /// When it started, in clock ticks since the boot.
    pub(crate) start_ticks: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    identity: Identity,
    group: i32,
    /// It has ended and waits for its parent to notice.
    zombie: bool,
}

/// Names this boot of the machine.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// The process that has this number now.
pub(crate) fn identify(pid: i32) -> io::Result<Option<Identity>> {
    Ok(entry(pid)?.map(|entry| entry.identity))
}

/// True while exactly this process runs.
pub(crate) fn is_running(identity: Identity) -> io::Result<bool> {
    Ok(entry(identity.pid)?.is_some_and(|entry| entry.identity == identity && !entry.zombie))
}

/// Completes when exactly this process has ended, whoever's child it is.
pub(crate) async fn ended(identity: Identity) -> io::Result<()> {
    let Some(handle) = open(identity)? else {
        return Ok(());
    };
    #[expect(
        deprecated,
        reason = "safe for an OwnedFd; its replacement is an unsafe function"
    )]
    let handle = AsyncFd::with_interest(handle, Interest::READABLE)?;
    handle.readable().await?.retain_ready();
    Ok(())
}

/// All running processes of a workload.
pub(crate) fn members(leader: Option<Identity>, marker: &str) -> io::Result<Vec<Identity>> {
    let wanted = format!("{MARKER}={marker}");
    let mut marked = Vec::new();
    let mut grouped = Vec::new();
    let mut group_is_ours = false;
    for item in std::fs::read_dir("/proc")? {
        let Some(pid) = item?.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let Some(entry) = entry(pid)? else { continue };
        let in_group = leader.is_some_and(|leader| leader.pid == entry.group);
        // The leader keeps its number while it is in the table, so that no other group can have it.
        group_is_ours |= leader == Some(entry.identity);
        if entry.zombie {
            continue;
        }
        if carries(pid, &wanted) {
            group_is_ours |= in_group;
            marked.push(entry.identity);
        } else if in_group {
            grouped.push(entry.identity);
        }
    }
    if group_is_ours {
        marked.append(&mut grouped);
    }
    Ok(marked)
}

/// Ends all processes of a workload: SIGTERM, after `grace` SIGKILL until none is left.
pub(crate) async fn end_all(leader: Option<Identity>, marker: &str, grace: Duration) -> io::Result<()> {
    let kill_at = Instant::now() + grace;
    let mut asked = BTreeSet::new();
    loop {
        let members = members(leader, marker)?;
        let Some(first) = members.first() else {
            return Ok(());
        };
        let kill = Instant::now() >= kill_at;
        for member in &members {
            if kill {
                send(*member, Signal::KILL)?;
            } else if asked.insert(*member) {
                send(*member, Signal::TERM)?;
            }
        }
        let until = if kill {
            Instant::now() + KILL_PATIENCE
        } else {
            kill_at
        };
        // Either it has ended or its time is over: the next round looks at all of them again.
        if let Ok(waited) = timeout_at(until, ended(*first)).await {
            waited?;
        }
    }
}

fn send(identity: Identity, signal: Signal) -> io::Result<()> {
    match open(identity)?.map(|handle| pidfd_send_signal(handle, signal)) {
        None | Some(Ok(()) | Err(rustix::io::Errno::SRCH)) => Ok(()),
        Some(Err(error)) => Err(error.into()),
    }
}

/// A handle that can never come to mean another process.
fn open(identity: Identity) -> io::Result<Option<OwnedFd>> {
    let Some(pid) = Pid::from_raw(identity.pid) else {
        return Ok(None);
    };
    let handle = match pidfd_open(pid, PidfdFlags::NONBLOCK) {
        Ok(handle) => handle,
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    Ok(is_running(identity)?.then_some(handle))
}

fn entry(pid: i32) -> io::Result<Option<Entry>> {
    match std::fs::read(format!("/proc/{pid}/stat")) {
        Ok(line) => Ok(parse(pid, &String::from_utf8_lossy(&line))),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The process ended between two looks at it.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}

/// proc(5), `/proc/pid/stat`: the name is in parentheses and may hold anything, so the fields are counted
/// from the last one: state, parent, group, and at place 20 the time of the start.
fn parse(pid: i32, line: &str) -> Option<Entry> {
    let fields: Vec<&str> = line.rsplit_once(')')?.1.split_whitespace().collect();
    Some(Entry {
        identity: Identity {
            pid,
            start_ticks: fields.get(19)?.parse().ok()?,
        },
        group: fields.get(2)?.parse().ok()?,
        zombie: matches!(*fields.first()?, "Z" | "X"),
    })
}

/// Other users' processes cannot be read and are not ours.
fn carries(pid: i32, wanted: &str) -> bool {
    std::fs::read(format!("/proc/{pid}/environ")).is_ok_and(|environment| {
        environment
            .split(|byte| *byte == 0)
            .any(|item| item == wanted.as_bytes())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_table_is_read_whatever_the_name() {
        let tail = "S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1 2 3";
        for name in ["sh", "a b", "x) Z 9 9 (y"] {
            let entry = parse(7, &format!("7 ({name}) {tail}")).expect("whole line");
            assert_eq!(
                (entry.identity.start_ticks, entry.group, entry.zombie),
                (987_654, 42, false)
            );
        }
        assert_eq!(parse(7, "7 (sh"), None);
        assert_eq!(parse(7, "7 (sh) S 1 2"), None);
    }

    #[test]
    fn this_process_is_found_and_others_are_not_taken_for_it() {
        let pid = i32::try_from(std::process::id()).expect("process ids are small");
        let own = identify(pid).expect("/proc is readable").expect("it runs");
        assert!(is_running(own).expect("/proc is readable"));
        let reused = Identity {
            start_ticks: own.start_ticks + 1,
            ..own
        };
        assert!(!is_running(reused).expect("/proc is readable"));
    }
}
