//! What processes used: time and pages of memory from `/proc`, calls of fsync and fdatasync from `perf`; and how fast the
//! disk is.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Linux counts processes' time in hundredths of a second, whatever its own clock does.
const TICKS_PER_SECOND: f64 = 100.0;
/// Bytes of a page of x86-64, the one architecture that agents run on.
const PAGE: u64 = 4096;
const TMPFS: i64 = 0x0102_1994;
const DISK_WRITES: u32 = 300;
/// Bytes of each of them: about a group of commands.
const DISK_WRITE_BYTES: usize = 4096;

/// User and system time that processes have used so far.
pub(crate) fn time(processes: impl Iterator<Item = u32>) -> Duration {
    processes.map(|process| cpu(process).unwrap_or_default()).sum()
}

/// The fields of `/proc/PID/stat` behind the name, which may have blanks in it.
fn stat(process: u32) -> Option<Vec<String>> {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(") ")?;
    Some(rest.split(' ').map(str::to_owned).collect())
}

fn cpu(process: u32) -> Option<Duration> {
    let fields = stat(process)?;
    let ticks = |place: usize| fields.get(place)?.parse::<u32>().ok();
    Some(Duration::from_secs_f64(
        f64::from(ticks(11)? + ticks(12)?) / TICKS_PER_SECOND,
    ))
}

/// What the processes of one member hold in memory, in KiB: all pages, and each page once, however many of them share it.
pub(crate) fn resident_kib(processes: &[u32]) -> anyhow::Result<(u64, u64)> {
    let mut pages = Vec::new();
    for process in processes {
        add_pages(*process, &mut pages).with_context(|| format!("the pages of process {process}"))?;
    }
    let kib = |count: usize| count as u64 * (PAGE / 1024);
    let all = pages.len();
    pages.sort_unstable();
    pages.dedup();
    Ok((kib(all), kib(pages.len())))
}

/// Adds the numbers of the page frames that a process has mapped.
fn add_pages(process: u32, pages: &mut Vec<u64>) -> anyhow::Result<()> {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let page_map = File::open(format!("/proc/{process}/pagemap"))?;
    for line in std::fs::read_to_string(format!("/proc/{process}/maps"))?.lines() {
        let (range, _) = line.split_once(' ').context("a mapping without a range")?;
        let (first, end) = range.split_once('-').context("a range without an end")?;
        let first = u64::from_str_radix(first, 16)? / PAGE;
        let end = u64::from_str_radix(end, 16)? / PAGE;
        let mut entries = vec![0; usize::try_from(end - first)? * 8];
        // The kernel's own pages at the end of the address space are in no page map.
        let Ok(read) = page_map.read_at(&mut entries, first * 8) else {
            continue;
        };
        for entry in entries[..read].chunks_exact(8) {
            let entry = u64::from_ne_bytes(entry.try_into()?);
            if entry & PRESENT != 0 {
                anyhow::ensure!(entry & FRAME != 0, "only root sees which pages are shared");
                pages.push(entry & FRAME);
            }
        }
    }
    Ok(())
}

/// A process and all that it has started.
pub(crate) fn family(process: u32) -> Vec<u32> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let parent = pid.and_then(|pid| stat(pid)?.get(1)?.parse().ok());
        if let (Some(pid), Some(parent)) = (pid, parent) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = vec![process];
    let mut next = 0;
    while let Some(process) = found.get(next) {
        found.extend(children.remove(process).unwrap_or_default());
        next += 1;
    }
    found
}

/// Refuses a folder in memory: fsync costs nothing there.
pub(crate) fn refuse_memory(folder: &Path) -> anyhow::Result<()> {
    let existing = folder
        .ancestors()
        .find(|folder| folder.exists())
        .unwrap_or(Path::new("/"));
    let kind = rustix::fs::statfs(existing)?.f_type;
    anyhow::ensure!(
        kind != TMPFS,
        "{} is in memory: name a folder on a disk",
        folder.display()
    );
    Ok(())
}

/// How long an append of some KiB takes to reach the disk, in ms.
pub(crate) fn disk_latency(folder: &Path) -> anyhow::Result<Value> {
    let path = folder.join("disk");
    let mut file = File::create(&path)?;
    let mut times = Vec::new();
    for _ in 0..DISK_WRITES {
        let began = Instant::now();
        file.write_all(&[7; DISK_WRITE_BYTES])?;
        file.sync_data()?;
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    std::fs::remove_file(&path)?;
    times.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| times[(times.len() as f64 * share) as usize];
    Ok(json!({ "p50": at(0.5), "p99": at(0.99) }))
}

/// `perf`, which counts the calls of processes with all their threads in the kernel, and so does not slow them down.
pub(crate) struct Counter {
    child: Child,
    /// What it has counted.
    sum: JoinHandle<u64>,
}

impl Counter {
    const EVENTS: &str = "syscalls:sys_enter_fsync,syscalls:sys_enter_fdatasync";

    pub(crate) async fn attach(processes: impl Iterator<Item = u32>) -> anyhow::Result<Self> {
        let processes: Vec<String> = processes.map(|process| process.to_string()).collect();
        let mut command = Command::new("perf");
        // A line for each event every 100 ms: the first one says that it counts.
        command.args(["stat", "-x", ",", "-I", "100", "-e", Self::EVENTS, "-p"]);
        command.arg(processes.join(","));
        command.stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command
            .spawn()
            .context("start perf, of Debian's package linux-perf")?;
        let stderr = child.stderr.take().context("its standard error")?;
        let mut lines = BufReader::new(stderr).lines();
        let first = lines.next_line().await?.context("perf ended")?;
        anyhow::ensure!(first.contains("sys_enter"), "perf: {first}");
        let sum = tokio::spawn(async move {
            let (mut sum, mut line) = (0, Some(first));
            while let Some(text) = line {
                // It says `<not counted>` where there was none.
                sum += text
                    .split(',')
                    .nth(1)
                    .map_or(0, |count| count.trim().parse().unwrap_or(0));
                line = lines.next_line().await.ok().flatten();
            }
            sum
        });
        Ok(Self { child, sum })
    }

    /// Lets the processes go; how many calls there were.
    pub(crate) async fn calls(mut self) -> anyhow::Result<u64> {
        let pid = self.child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        kill_process(pid.context("perf has ended")?, Signal::INT)?;
        self.child.wait().await?;
        Ok(self.sum.await?)
    }
}

/// Ends a process in order, or at once if it does not.
pub(crate) async fn terminate(child: &mut Child) {
    if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
        // It may have ended already.
        let _ = kill_process(pid, Signal::TERM);
    }
    if tokio::time::timeout(Duration::from_secs(20), child.wait())
        .await
        .is_err()
    {
        let _ = child.kill().await;
    }
}
