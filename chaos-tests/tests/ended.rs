//! Whatever ends `chaos-tests` from outside, nothing of what it has started goes on, and no network namespace is left.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use chaos_tests::faults::probe;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

const PATIENCE: Duration = Duration::from_secs(240);
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Whether what this test needs is here; CI needs all of it.
fn is_missing(what: &str, reason: Option<String>) -> bool {
    let Some(reason) = reason else { return false };
    let required = std::env::var_os("REQUIRE_PEERS").is_some_and(|value| value == "1");
    assert!(!required, "{what}: {reason}");
    eprintln!("NOT TESTED: {what}: {reason}");
    true
}

/// Command line and environment of each process that names a folder.
fn processes_of(folder: &Path) -> Vec<(i32, String)> {
    let entries = std::fs::read_dir("/proc").expect("/proc").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let mut found = Vec::new();
    for pid in pids {
        // One that has ended says nothing.
        let texts = ["cmdline", "environ"].map(|file| std::fs::read(format!("/proc/{pid}/{file}")));
        let texts = texts.map(|text| String::from_utf8_lossy(&text.unwrap_or_default()).replace('\0', " "));
        let [line, environment] = &texts;
        if [line, environment]
            .iter()
            .any(|text| text.contains(&*folder.to_string_lossy()))
        {
            found.push((pid, texts.join(" ")));
        }
    }
    found
}

/// Network namespaces of a program, by their names.
fn namespaces_of(program: u32) -> Vec<String> {
    let listed = std::process::Command::new("ip").args(["netns", "list"]).output();
    let listed = String::from_utf8_lossy(&listed.expect("ip").stdout).into_owned();
    let ours = |name: &&str| name.starts_with(&format!("chaos{program}x"));
    listed.lines().filter(ours).map(str::to_owned).collect()
}

/// Starts it with everything below a folder of its own.
fn start(folder: &Path, arguments: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_chaos-tests"));
    command.args(arguments).env("TMPDIR", folder).kill_on_drop(true);
    let said = std::fs::File::create(folder.join("said")).expect("a file");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said);
    command.spawn().expect("the program starts")
}

/// Waits until this holds of the processes that name a folder. Those are killed when it does not.
async fn until(what: &str, folder: &Path, holds: impl Fn(&[(i32, String)]) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = processes_of(folder);
        if holds(&found) {
            return;
        }
        if Instant::now() >= deadline {
            for pid in found.iter().filter_map(|(pid, _)| Pid::from_raw(*pid)) {
                // It may have ended.
                let _ = kill_process(pid, Signal::KILL);
            }
            let said = std::fs::read_to_string(folder.join("said")).unwrap_or_default();
            panic!("{what}: {found:#?} {said}");
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Ends it once each of these texts is in what says of a process, and sees that nothing goes on.
async fn end(program: &mut Child, folder: &Path, running: &[&str], how: Signal) {
    let shows = |found: &[(i32, String)]| {
        let mut all = running.iter();
        all.all(|text| found.iter().any(|(_, shown)| shown.contains(text)))
    };
    until("it has started everything", folder, shows).await;
    let pid = program.id().expect("it runs").cast_signed();
    kill_process(Pid::from_raw(pid).expect("a process id"), how).expect("it runs");
    let ended = program.wait().await.expect("it ends");
    assert!(!ended.success());
    until("all of it ends", folder, <[_]>::is_empty).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_members_in_namespaces_goes_on() {
    let tool = "network namespaces with nftables";
    let tried = probe().into_iter().find(|(name, _)| *name == tool);
    if is_missing(tool, tried.and_then(|(_, tried)| tried.err())) {
        return;
    }
    for how in [Signal::TERM, Signal::KILL] {
        let folder = tempfile::tempdir().expect("a folder");
        let mut program = start(folder.path(), &["links", "--namespaces"]);
        let started = program.id().expect("it runs");
        let running = ["validator-stand-in", "host-5", "forward", "CHUTES_CODE_FILE"];
        end(&mut program, folder.path(), &running, how).await;
        let deadline = Instant::now() + PATIENCE;
        while !namespaces_of(started).is_empty() {
            assert!(Instant::now() < deadline, "{:?}", namespaces_of(started));
            sleep(LOOK_EVERY).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_fleet_on_kubernetes_goes_on() {
    let variable = kubernetes_control_plane::FOLDER_VARIABLE;
    let reason = std::env::var_os(variable)
        .is_none()
        .then(|| format!("{variable} is not set"));
    if is_missing("a control plane", reason) {
        return;
    }
    for how in [Signal::TERM, Signal::KILL] {
        let folder = tempfile::tempdir().expect("a folder");
        let mut program = start(folder.path(), &["kubernetes", "--nodes", "2", "--gpus", "2"]);
        let running = [
            "etcd",
            "kube-apiserver",
            "kwok",
            " coordinator ",
            "CHUTES_CODE_FILE",
        ];
        end(&mut program, folder.path(), &running, how).await;
    }
}
