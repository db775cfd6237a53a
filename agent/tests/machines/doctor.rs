//! `chutes-agent doctor net`: another machine dials the UDP port, and a port that drops everything is named as blocked
//! UDP, told apart from one that nobody has. `doctor ready`: what does not answer is named.

use std::net::{SocketAddr, UdpSocket};

use serde_json::json;

use super::machine::{Machine, SEED, three, until};

/// A port that takes everything and answers nothing, as one does behind a firewall that drops.
fn dropping() -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    let address = socket.local_addr().expect("bound");
    (socket, address)
}

fn founded() -> Machine {
    let mut first = Machine::new(1, SEED);
    first.done(&["init"], "founded");
    first.start();
    first
}

async fn joined(first: &Machine, machine: &Machine, eligible: bool) {
    let token = first.invited(json!({ "eligible": eligible })).await;
    machine.done(&["join", &token], "joined the cluster");
}

/// Runs it; whether it found all ways open, and what it said.
fn net(machine: &Machine) -> (bool, String) {
    machine.command(&["doctor", "net"], "")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_members_port_that_drops_everything_is_named_as_blocked_udp() {
    let mut first = founded();
    let (silent, address) = dropping();
    let second = Machine::advertising(2, address);
    joined(&first, &second, true).await;
    let (good, said) = net(&second);
    let first_door = first.door;
    let out = format!("out  {first_door}: open");
    let inward = format!(
        "in   {address} from {first_door}: CLOSED (blocked UDP: neither an answer nor a refusal comes back"
    );
    assert!(!good && said.contains(&out) && said.contains(&inward), "{said}");
    assert!(
        said.contains("open that UDP port to this machine") && said.contains("1 ways are closed"),
        "{said}"
    );

    // The same port is closed and not blocked: nobody has it.
    drop(silent);
    let (good, said) = net(&second);
    let refused =
        format!("in   {address} from {first_door}: CLOSED (UDP gets there, and nobody listens on the port");
    assert!(!good && said.contains(&refused), "{said}");
    first.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn open_ways_are_open_and_a_blocked_way_out_is_named() {
    let mut first = founded();
    // A host without a vote needs no way in.
    let host = Machine::host(3);
    joined(&first, &host, false).await;
    let (good, said) = net(&host);
    assert!(good && said.contains("which is fine"), "{said}");

    let second = Machine::new(2, SEED);
    joined(&first, &second, true).await;
    // No agent runs on it: a listener stands in for it.
    let (good, said) = net(&second);
    let ways = [
        format!("out  {}: open", first.door),
        format!("in   {} from {}: open", second.door, first.door),
    ];
    assert!(good && ways.iter().all(|way| said.contains(way)), "{said}");

    // The member is gone, and its port drops everything; then nobody has it.
    first.kill().await;
    let silent = until("its port is free", async || UdpSocket::bind(first.door).ok()).await;
    let (good, said) = net(&host);
    let blocked = format!(
        "out  {}: CLOSED. blocked UDP: neither an answer nor a refusal comes back",
        first.door
    );
    assert!(!good && said.contains(&blocked), "{said}");
    assert!(
        said.contains("let UDP to that port through"),
        "the way out: {said}"
    );
    drop(silent);
    let (good, said) = net(&host);
    let nobody = format!(
        "out  {}: CLOSED. UDP gets there, and nobody listens on the port: no agent runs",
        first.door
    );
    assert!(!good && said.contains(&nobody), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_ready_on_a_host_is_named() {
    let [mut first, mut second, mut third] = three().await;
    let at_once = ["doctor", "ready", "--patience", "1s"];
    let ready = first.done(&["doctor", "ready"], "/ready: ready");
    assert!(!ready.contains("NOT"), "{ready}");
    first.kill().await;
    first.refused(&at_once, "/ready: NOT READY. Nothing listens there");
    // A member without a majority listens, and is not ready.
    second.kill().await;
    third.refused(&at_once, "/ready: NOT READY. It answers 503");
    third.kill().await;

    // A host without a vote: its GPU proof and the door for images.
    let host = Machine::host(3);
    let (good, said) = host.command(&at_once, "");
    for door in ["GPU proof http://", "images http://"] {
        assert!(!good && said.contains(door), "{said}");
    }
    assert!(said.contains("2 of what is to run here is not ready"), "{said}");
}
