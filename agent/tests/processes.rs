//! The supervisor with its real processes: children that die are started again, signer and coordinator
//! survive each other, one agent a data folder, and nothing is left behind.

#[path = "processes/running.rs"]
mod running;

use std::path::Path;

use rustix::process::Signal;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio::time::timeout;

use running::{Agent, HOTKEY, PATIENCE, SEED, prepare, send};

async fn status(folder: &Path) -> Value {
    // Another test may have installed it; any is fine.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder()
        .unix_socket(folder.join("data/run/agent.sock"))
        .no_proxy()
        .build()
        .expect("a client");
    let answer = client
        .get("http://localhost/status")
        .send()
        .await
        .expect("the door is open");
    answer.json().await.expect("JSON")
}

/// A validator that notes each signed request's time (in its nonce) and serves nobody.
async fn deaf_validator() -> (String, mpsc::Receiver<u64>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound").to_string();
    let (nonces, received) = mpsc::channel(64);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let nonces = nonces.clone();
            tokio::spawn(async move {
                let mut head = vec![0; 8192];
                let length = stream.read(&mut head).await.unwrap_or(0);
                let head = String::from_utf8_lossy(&head[..length]).to_ascii_lowercase();
                let value = |name: &str| {
                    let mut lines = head.lines().filter_map(|line| line.strip_prefix(name));
                    lines.next().map(|value| value.trim().to_owned())
                };
                if let (Some(nonce), Some(signature)) =
                    (value("x-chutes-nonce:"), value("x-chutes-signature:"))
                    && signature.len() == 128
                    && let Ok(nonce) = nonce.parse()
                {
                    let _ = nonces.try_send(nonce);
                }
                let answer =
                    "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
                let _ = stream.write_all(answer.as_bytes()).await;
            });
        }
    });
    (address, received)
}

/// Waits for a request signed in a later second than this time in ms.
async fn signed_after(nonces: &mut mpsc::Receiver<u64>, after_ms: u64) {
    let wanted = async {
        while let Some(nonce) = nonces.recv().await {
            if nonce > after_ms / 1000 {
                return;
            }
        }
        panic!("the validator is gone");
    };
    timeout(PATIENCE, wanted).await.expect("the coordinator signs");
}

#[tokio::test]
async fn signer_and_coordinator_survive_each_other_and_a_stop_ends_all() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (validator, mut nonces) = deaf_validator().await;
    prepare(folder.path(), &validator);
    let mut agent = Agent::start(folder.path());
    let signer = agent.started("signer").await;
    let coordinator = agent.started("coordinator").await;
    agent.line("coordinator", "this member leads").await;
    signed_after(&mut nonces, 0).await;

    send(signer, Signal::KILL);
    let second_signer = agent.started("signer").await;
    let ready = agent.line("signer", "signer ready").await;
    assert_eq!(ready["hotkey"], HOTKEY);
    let now = status(folder.path()).await;
    let child = |now: &Value, name: &str| {
        let children = now["children"].as_array().expect("a list");
        children
            .iter()
            .find(|child| child["name"] == name)
            .expect("listed")
            .clone()
    };
    let since = child(&now, "signer")["since"].as_u64().expect("a time");
    assert_eq!(child(&now, "signer")["restarts"], 1);
    assert_eq!(child(&now, "signer")["pid"], second_signer);
    assert_eq!(child(&now, "signer")["last_end"], "signal: 9 (SIGKILL)");
    assert_eq!(
        child(&now, "coordinator")["pid"],
        coordinator,
        "it did not have to restart"
    );
    assert_eq!(now["stale"], true);
    signed_after(&mut nonces, since).await;

    send(coordinator, Signal::KILL);
    agent.started("coordinator").await;
    agent.line("coordinator", "this member leads").await;
    let now = status(folder.path()).await;
    let since = child(&now, "coordinator")["since"].as_u64().expect("a time");
    signed_after(&mut nonces, since).await;

    agent.signal(Signal::TERM);
    let (status, seen) = agent.all_gone().await;
    assert!(status.success(), "{status}: {seen:#?}");
    let stopped = |child: &str| {
        let named = format!("\"child\":\"{child}\"");
        let place = seen
            .iter()
            .position(|line| line.contains("\"stopped\"") && line.contains(&named));
        place.unwrap_or_else(|| panic!("{child} was not stopped: {seen:#?}"))
    };
    for later in ["host", "proof", "data"] {
        assert!(stopped("coordinator") < stopped(later) && stopped(later) < stopped("signer"));
    }
    assert!(!seen.iter().any(|line| line.contains(SEED)), "the seed is logged");
    let left = folder.path().join("data/run/agent.sock");
    assert!(!left.exists(), "the local door is closed");
}

#[tokio::test]
async fn one_agent_a_folder_and_no_child_outlives_its_supervisor() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().expect("a temporary folder");
    prepare(folder.path(), "127.0.0.1:9");
    let mut agent = Agent::start(folder.path());
    let proof = {
        let proof = agent.started("proof").await;
        agent.started("host").await;
        proof
    };
    let data = folder.path().join("data");
    for (path, mode) in [
        ("", 0o700),
        ("run", 0o700),
        ("run/agent.sock", 0o600),
        ("run/config.toml", 0o600),
    ] {
        let found = std::fs::metadata(data.join(path))
            .expect("made at the start")
            .permissions()
            .mode();
        assert_eq!(found & 0o777, mode, "{path}");
    }

    let second = Agent::start(folder.path());
    let pid = agent.process.id().expect("it runs");
    let (refused, seen) = second.all_gone().await;
    let said = seen.join("\n");
    assert!(
        !refused.success() && said.contains(&data.display().to_string()),
        "{said}"
    );
    assert!(said.contains(&format!("process {pid}")), "{said}");

    // A child started by hand, or whose supervisor died before it looked, does not stay.
    let stray = Command::new(env!("CARGO_BIN_EXE_chutes-agent"))
        .args(["proof", "--supervisor", "1999999", "--settings"])
        .arg(data.join("run/config.toml"))
        .output();
    let stray = stray.await.expect("the program runs");
    let said = String::from_utf8_lossy(&stray.stderr).into_owned();
    assert!(
        !stray.status.success() && said.contains("the supervisor is gone"),
        "{said}"
    );

    // Killed in the middle of its life, a child is started again; then the supervisor dies at once.
    send(proof, Signal::KILL);
    agent.started("proof").await;
    agent.signal(Signal::KILL);
    let (killed, _) = agent.all_gone().await;
    assert!(!killed.success());

    let mut again = Agent::start(folder.path());
    again.started("host").await;
    again.line("coordinator", "this member leads").await;
    again.signal(Signal::INT);
    let (status, seen) = again.all_gone().await;
    assert!(status.success(), "{status}: {seen:#?}");
}
