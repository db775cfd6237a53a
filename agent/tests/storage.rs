//! What the real processes do about storage that is of no use: cut off, of a newer release, on a full disk.
//! They name the file and the way back, wait longer and longer between two starts, and work again once the
//! cause is gone.

#[path = "processes/running.rs"]
mod running;
#[path = "processes/signed.rs"]
mod signed;

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use protocol::hotkey::Signer;
use redb::{Database, TableDefinition};
use reqwest::Method;
use running::{Agent, HOTKEY, PATIENCE, SEED, prepare, send};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::time::timeout;

/// Nobody listens there.
const NO_VALIDATOR: &str = "127.0.0.1:9";
/// How often a member is killed in the hope that its files are full.
const LIVES_MAX: u32 = 4;
/// What a member says whose disk is full.
const ONLY_READ: &str = "the disk is full: this member can only be read locally until there is room";
/// Writes that a full disk takes at most before it refuses one: files have some room of their own.
const WRITES_MAX: usize = 20_000;
/// A version that this release cannot know.
const FAR_VERSION: &[u8] = &[200];

/// Seconds of the day at which a line was logged.
fn logged_at(line: &Value) -> f64 {
    let time = line["timestamp"].as_str().and_then(|text| text.split_once('T'));
    let (_, time) = time.expect("each line has a time");
    let parts = time.trim_end_matches('Z').split(':');
    parts.fold(0.0, |sum, part| {
        sum * 60.0 + part.parse::<f64>().expect("a number")
    })
}

async fn stop(agent: Agent) -> Vec<String> {
    agent.signal(Signal::TERM);
    let (status, seen) = agent.all_gone().await;
    assert!(status.success(), "{status}: {seen:#?}");
    assert!(!seen.iter().any(|line| line.contains(SEED)), "the seed is logged");
    seen
}

/// What a process says when it cannot go on.
async fn complaint(agent: &mut Agent, process: &str) -> String {
    let line = agent.line(process, "cannot go on").await;
    line["error"].as_str().expect("with a reason").to_owned()
}

fn cut_off(file: &Path) {
    let length = std::fs::metadata(file).expect("it exists").len();
    let opened = std::fs::File::options().write(true).open(file).expect("ours");
    opened.set_len(length / 2).expect("ours");
}

fn put(file: &Path, table: &str, key: &str, value: &[u8]) {
    let database = Database::open(file).expect("it is whole");
    let transaction = database.begin_write().expect("the disk is fine");
    let table: TableDefinition<'_, &str, &[u8]> = TableDefinition::new(table);
    let mut opened = transaction.open_table(table).expect("of this kind");
    opened.insert(key, value).expect("the disk is fine");
    drop(opened);
    transaction.commit().expect("the disk is fine");
}

#[tokio::test]
async fn cut_off_and_newer_stores_are_named_with_the_way_back_and_not_tried_in_a_tight_loop() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    prepare(folder.path(), NO_VALIDATOR);
    let data = folder.path().join("data");
    let mut agent = Agent::start(folder.path());
    assert_eq!(agent.line("signer", "signer ready").await["hotkey"], HOTKEY);
    agent.line("coordinator", "this member leads").await;
    let host_store = data.join("agent.redb");
    timeout(PATIENCE, async {
        while !host_store.exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("the host makes it");
    stop(agent).await;

    type Harm = fn(&Path);
    let newer_value: Harm = |file| put(file, "values", "desired", FAR_VERSION);
    let newer_format: Harm = |file| put(file, "meta", "format", FAR_VERSION);
    for (file, process, way_back, harm, what) in [
        (
            "agent.redb",
            "host",
            "To go on without it",
            cut_off as Harm,
            "damaged",
        ),
        ("agent.redb", "host", "To go on without it", newer_value, "newer"),
        (
            "coordinator/raft/raft-log.redb",
            "coordinator",
            "The way back",
            cut_off,
            "damaged",
        ),
        (
            "coordinator/raft/raft-log.redb",
            "coordinator",
            "The way back",
            newer_format,
            "newer",
        ),
        (
            "coordinator/raft/state.redb",
            "coordinator",
            "The way back",
            cut_off,
            "damaged",
        ),
        (
            "coordinator/raft/state.redb",
            "coordinator",
            "The way back",
            newer_format,
            "newer",
        ),
    ] {
        let file = data.join(file);
        let whole = std::fs::read(&file).expect("it is there");
        harm(&file);
        let mut agent = Agent::start(folder.path());
        let mut starts = Vec::new();
        while starts.len() < 3 {
            let line = agent.line("agent", "started").await;
            if line["child"] == process {
                starts.push(logged_at(&line));
            } else {
                assert!(starts.len() < 2, "{} was started again, too", line["child"]);
            }
        }
        let said = complaint(&mut agent, process).await;
        for part in [&file.display().to_string(), way_back, what] {
            assert!(said.contains(part), "{part} is not in: {said}");
        }
        let seen = stop(agent).await;
        let gaps: Vec<f64> = starts
            .windows(2)
            .map(|pair| (pair[1] - pair[0]).rem_euclid(86_400.0))
            .collect();
        assert!(gaps[0] >= 0.4 && gaps[1] >= 0.9, "{gaps:?}: {seen:#?}");
        std::fs::write(&file, whole).expect("ours");
    }

    let mut agent = Agent::start(folder.path());
    agent.line("coordinator", "this member leads").await;
    let seen = stop(agent).await;
    assert!(
        !seen.iter().any(|line| line.contains("cannot go on")),
        "{seen:#?}"
    );
}

/// A file system of 16 MiB, for as long as this lives.
struct SmallDisk {
    folder: PathBuf,
}

impl SmallDisk {
    fn mount(folder: &Path) -> Result<Self, String> {
        std::fs::create_dir(folder).map_err(|error| error.to_string())?;
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", "size=16m,mode=700", "tmpfs"])
            .arg(folder);
        let output = mount.output().map_err(|error| error.to_string())?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        Ok(Self {
            folder: folder.to_owned(),
        })
    }

    fn filler(&self) -> PathBuf {
        self.folder.join("filler")
    }

    /// Takes all room but this.
    fn fill(&self, but_bytes: usize) {
        let mut file = std::fs::File::create(self.filler()).expect("there is room for a name");
        let error = loop {
            if let Err(error) = file.write_all(&[1; 4096]) {
                break error;
            }
        };
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
        let length = file.metadata().expect("it exists").len();
        let but = u64::try_from(but_bytes).expect("a small number");
        file.set_len(length.checked_sub(but).expect("the disk is larger"))
            .expect("smaller");
    }

    fn free(&self) {
        std::fs::remove_file(self.filler()).expect("it is there");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.folder).status();
    }
}

fn small_disk(folder: &Path) -> Option<SmallDisk> {
    match SmallDisk::mount(folder) {
        Ok(disk) => Some(disk),
        Err(error) => {
            let required = std::env::var_os("REQUIRE_PEERS").is_some();
            assert!(!required, "a small disk is required, which takes root: {error}");
            eprintln!("NOT TESTED: a full disk, since no small one can be mounted: {error}");
            None
        }
    }
}

/// An operator at the management API of a member.
struct Operator {
    http: reqwest::Client,
    key: Signer,
    api: SocketAddr,
}

impl Operator {
    /// Writes the configuration of an agent, and knows where its API will be.
    fn of(folder: &Path) -> Self {
        // Fails when one is installed already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        prepare(folder, NO_VALIDATOR);
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let api = free.local_addr().expect("bound");
        let file = folder.join("config.toml");
        let config = std::fs::read_to_string(&file).expect("ours");
        let listen = format!("api_listen = \"{api}\"");
        std::fs::write(&file, config.replace("api_listen = \"127.0.0.1:0\"", &listen)).expect("ours");
        Self {
            http: reqwest::Client::builder().no_proxy().build().expect("a client"),
            key: Signer::from_seed_hex(SEED).expect("a seed"),
            api,
        }
    }

    /// Status and answer of a request; `local` asks for what the member has applied, fresh or not.
    async fn ask(&self, method: Method, path: &str, body: Value, local: bool) -> (u16, bool, Value) {
        let request = signed::signed(&self.http, &self.key, self.api, method, path, &body);
        let request = if local {
            request.header("X-Chutes-Read", "local")
        } else {
            request
        };
        let answer = request.timeout(PATIENCE).send().await.expect("it answers");
        let is_local = answer
            .headers()
            .get("x-chutes-read")
            .is_some_and(|how| how == "local");
        let status = answer.status().as_u16();
        (status, is_local, answer.json().await.expect("JSON"))
    }

    async fn invite(&self) -> (u16, bool, Value) {
        self.ask(Method::POST, "/hosts/invites", json!({}), false).await
    }

    /// Checks that what was acknowledged can be read, locally, and that nothing else can be done.
    async fn reads_all_and_no_more(&self, acknowledged: &Value) {
        let read = async {
            while self.state(true).await.2["now"] != acknowledged["now"] {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let read = timeout(PATIENCE, read).await;
        read.expect("what was acknowledged can be read");
        assert_eq!(self.invite().await.0, 503);
        assert_eq!(self.state(false).await.0, 503);
        for path in ["/v1/state", "/v1/status", "/hosts", "/servers/", "/v1/raft"] {
            let (status, is_local, answer) = self.ask(Method::GET, path, Value::Null, true).await;
            assert!(status == 200 && is_local, "{path}: {status} {answer}");
        }
        let (_, _, raft) = self.ask(Method::GET, "/v1/raft", Value::Null, true).await;
        assert_eq!(raft["members"][0]["role"], "voter", "{raft}");
    }

    async fn state(&self, local: bool) -> (u16, bool, Value) {
        self.ask(Method::GET, "/v1/state", Value::Null, local).await
    }
}

#[tokio::test]
async fn a_member_whose_disk_is_full_can_be_read_and_leads_again_when_there_is_room() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("data");
    let Some(disk) = small_disk(&data) else { return };
    let operator = Operator::of(folder.path());
    let mut agent = Agent::start(folder.path());
    let mut running = agent.started("coordinator").await;
    agent.line("coordinator", "the cluster is founded").await;
    let (status, _, invited) = operator.invite().await;
    assert_eq!(status, 200, "{invited}");
    let (status, is_local, before) = operator.state(false).await;
    assert!(status == 200 && !is_local, "{before}");
    disk.fill(0);
    let mut writes = 0;
    while operator.invite().await.0 == 200 {
        writes += 1;
        assert!(writes < WRITES_MAX, "the disk does not get full");
    }
    let said = agent.line("coordinator", ONLY_READ).await;
    let reason = said["reason"].as_str().expect("with a reason");
    assert!(reason.contains(&data.display().to_string()), "{reason}");

    // Nothing is acknowledged, nothing is said to be fresh, and what it has can be read.
    let (_, _, stale) = operator.state(true).await;
    operator.reads_all_and_no_more(&stale).await;
    assert_eq!(stale["miner"], before["miner"]);
    let (status, _, refused) = operator
        .ask(Method::POST, "/hosts/invites", json!({}), true)
        .await;
    assert_eq!(status, 503, "a write is not content with less: {refused}");

    // Started on the full disk it is the same, whether its files have some room of their own or not.
    for _ in 0..LIVES_MAX {
        send(running, Signal::KILL);
        running = agent.started("coordinator").await;
        agent.line("coordinator", ONLY_READ).await;
        operator.reads_all_and_no_more(&stale).await;
    }

    disk.free();
    agent.line("coordinator", "this member leads").await;
    let (status, is_local, after) = operator.state(false).await;
    assert!(status == 200 && !is_local, "{after}");
    let (status, _, invited) = operator.invite().await;
    assert_eq!(status, 200, "{invited}");
    stop(agent).await;
}

/// A file system that keeps what is written into `lower` on a small disk: there it takes room even to open a file for
/// writing, as with the layers of a container.
struct Layers<'a> {
    folder: PathBuf,
    disk: &'a SmallDisk,
}

impl<'a> Layers<'a> {
    fn mount(folder: &Path, lower: &Path, disk: &'a SmallDisk) -> Self {
        let (upper, work) = (disk.folder.join("upper"), disk.folder.join("work"));
        for made in [folder, &upper, &work] {
            std::fs::create_dir(made).expect("there is room for a name");
        }
        let parts = [("lowerdir", lower), ("upperdir", &upper), ("workdir", &work)];
        let options = parts.map(|(what, path)| format!("{what}={}", path.display()));
        let mut mount = Command::new("mount");
        mount.args(["-t", "overlay", "overlay", "-o", &options.join(",")]);
        let output = mount.arg(folder).output().expect("it can be run");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        Self {
            folder: folder.to_owned(),
            disk,
        }
    }
}

impl Drop for Layers<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.folder).status();
    }
}

#[tokio::test]
async fn a_member_that_cannot_open_its_files_on_a_full_disk_can_be_read_and_starts_when_there_is_room() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let Some(disk) = small_disk(&folder.path().join("disk")) else {
        return;
    };
    let operator = Operator::of(folder.path());
    let mut agent = Agent::start(folder.path());
    agent.line("coordinator", "the cluster is founded").await;
    assert_eq!(operator.invite().await.0, 200);
    let (_, _, before) = operator.state(false).await;
    stop(agent).await;

    let (member, lower) = (
        folder.path().join("data/coordinator"),
        folder.path().join("lower"),
    );
    std::fs::rename(&member, &lower).expect("nobody uses it");
    let layers = Layers::mount(&member, &lower, &disk);
    layers.disk.fill(0);
    let mut agent = Agent::start(folder.path());
    let said = agent.line("coordinator", ONLY_READ).await;
    let reason = said["reason"].as_str().expect("with a reason");
    assert!(reason.contains("raft-log.redb: No space left"), "{reason}");
    operator.reads_all_and_no_more(&before).await;

    layers.disk.free();
    agent.line("coordinator", "this member leads").await;
    assert_eq!(operator.invite().await.0, 200);
    stop(agent).await;
}

#[tokio::test]
async fn on_a_full_disk_the_file_is_named_and_space_is_all_that_is_needed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("data");
    let Some(disk) = small_disk(&data) else { return };
    prepare(folder.path(), NO_VALIDATOR);
    let path = data.display().to_string();

    // Full from the start: there is room for settings, not for a database.
    disk.fill(24 * 1024);
    let mut agent = Agent::start(folder.path());
    // Which of them gets the little room that is left is chance; what gets none says so.
    let full = |line: &str| line.contains(&path) && line.contains("No space left on device");
    let (mut host, mut coordinator) = (false, false);
    timeout(PATIENCE, async {
        while !(host && coordinator) {
            let line = agent.next().await.expect("it runs on");
            let value: Value = serde_json::from_str(&line).unwrap_or_default();
            match value["process"].as_str() {
                Some("host") => host |= full(&line),
                Some("coordinator") => coordinator |= full(&line),
                _ => {}
            }
        }
    })
    .await
    .expect("host and coordinator say so");
    disk.free();
    agent.line("coordinator", "this member leads").await;
    let link = agent.line("host", "host link").await;
    assert_eq!(
        link["level"], "WARN",
        "nobody answers where it looks for the coordinator, but it runs: {link}"
    );
    stop(agent).await;

    // Full in the middle of it: nothing is acknowledged, and the process does not stay as one that never will.
    let mut agent = Agent::start(folder.path());
    let mut running = agent.started("coordinator").await;
    agent.line("coordinator", "this member leads").await;
    disk.fill(0);
    send(running, Signal::KILL);
    // The files have some room of their own, which a few more lives may not use up: then it goes on, and may.
    let (mut complaints, mut lives) = (0, 0);
    while complaints < 2 && lives < LIVES_MAX {
        let line = agent.next().await.expect("it runs on");
        let line: Value = serde_json::from_str(&line).unwrap_or_default();
        if line["message"] == "started" && line["child"] == "coordinator" {
            running = i32::try_from(line["pid"].as_i64().expect("a number")).expect("a process id");
        }
        match (line["process"].as_str(), line["message"].as_str()) {
            (Some("coordinator"), Some("this member leads")) => {
                send(running, Signal::KILL);
                lives += 1;
            }
            (Some("coordinator"), Some("cannot go on")) => {
                let said = line["error"].as_str().expect("with a reason");
                assert!(
                    said.contains(&path) && said.contains("No space left on device"),
                    "{said}"
                );
                complaints += 1;
            }
            // It was full in the middle of it, and waits.
            (Some("coordinator"), Some(ONLY_READ)) => break,
            _ => {}
        }
    }
    disk.free();
    agent.started("coordinator").await;
    agent.line("coordinator", "this member leads").await;
    let seen = stop(agent).await;
    let last = |text: &str| seen.iter().rposition(|line| line.contains(text));
    assert!(last("this member leads\"") > last("cannot go on"), "{seen:#?}");
}
