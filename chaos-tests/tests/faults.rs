//! The fault tools do what they say. Those that need root and a program of the system are left out without
//! them, with a word; where all peers are required (`REQUIRE_PEERS=1`) that is a failure.

use std::process::Command;
use std::time::Duration;

use chaos_tests::faults::fsync::Fsync;
use chaos_tests::faults::gate::Gate;
use chaos_tests::faults::network::Network;
use chaos_tests::faults::probe;
use chaos_tests::faults::relay::{Direction, Quality, Relay};
use chaos_tests::faults::{clock, disk::SmallDisk, signal};
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout};

/// Whether the tool called this works here.
fn works(tool: &str) -> bool {
    let tried = probe().into_iter().find(|(name, _)| *name == tool);
    let (_, result) = tried.expect("a tool of that name");
    match result {
        Ok(()) => true,
        Err(reason) => {
            let required = std::env::var_os("REQUIRE_PEERS").is_some_and(|value| value == "1");
            assert!(!required, "{tool}: {reason}");
            eprintln!("NOT TESTED: {tool}: {reason}");
            false
        }
    }
}

/// A socket that answers everything with the same, and a client that speaks to it through a relay.
async fn through_a_relay(seed: u64) -> (Relay, UdpSocket) {
    let echo = UdpSocket::bind("127.0.0.1:0").await.expect("a free port");
    let to = echo.local_addr().expect("bound");
    let relay = Relay::start(to, seed).await.expect("a free port");
    tokio::spawn(async move {
        let mut buffer = [0; 2048];
        while let Ok((bytes, from)) = echo.recv_from(&mut buffer).await {
            let _ = echo.send_to(&buffer[..bytes], from).await;
        }
    });
    let client = UdpSocket::bind("127.0.0.1:0").await.expect("a free port");
    client.connect(relay.address()).await.expect("an address");
    (relay, client)
}

async fn answer(client: &UdpSocket, question: &[u8], within: Duration) -> Option<Vec<u8>> {
    client.send(question).await.expect("sent");
    let mut buffer = [0; 2048];
    let bytes = timeout(within, client.recv(&mut buffer)).await.ok()?;
    let bytes = bytes.expect("received");
    Some(buffer[..bytes].to_vec())
}

const SOON: Duration = Duration::from_secs(10);
const NEVER: Duration = Duration::from_millis(200);

#[tokio::test]
async fn a_relay_passes_delays_and_cuts_each_way() {
    let (relay, client) = through_a_relay(1).await;
    assert_eq!(answer(&client, b"one", SOON).await.as_deref(), Some(&b"one"[..]));

    relay.set_both(Quality {
        delay: Duration::from_millis(50),
        ..Quality::default()
    });
    let began = Instant::now();
    assert_eq!(answer(&client, b"two", SOON).await.as_deref(), Some(&b"two"[..]));
    assert!(
        began.elapsed() >= Duration::from_millis(100),
        "{:?}",
        began.elapsed()
    );

    let before = relay.counts();
    relay.set_both(Quality::default());
    relay.set(Direction::Back, Quality::CUT);
    assert_eq!(answer(&client, b"three", NEVER).await, None);
    let after = relay.counts();
    assert_eq!(
        (after.passed - before.passed, after.lost - before.lost),
        (1, 1),
        "it arrived, its answer did not"
    );

    relay.set_both(Quality::default());
    assert_eq!(
        answer(&client, b"four", SOON).await.as_deref(),
        Some(&b"four"[..])
    );
}

#[tokio::test]
async fn a_relay_changes_the_ports_that_the_target_sees() {
    let target = UdpSocket::bind("127.0.0.1:0").await.expect("a free port");
    let to = target.local_addr().expect("bound");
    let relay = Relay::start(to, 3).await.expect("a free port");
    let client = UdpSocket::bind("127.0.0.1:0").await.expect("a free port");
    client.connect(relay.address()).await.expect("an address");
    let seen = async || {
        client.send(b"here").await.expect("sent");
        let received = timeout(SOON, target.recv_from(&mut [0; 64])).await;
        received.expect("in time").expect("received").1
    };
    let before = seen().await;
    assert_eq!(seen().await, before);
    relay.change_ports();
    let after = seen().await;
    assert_ne!(after, before);
    target.send_to(b"old", before).await.expect("sent");
    target.send_to(b"new", after).await.expect("sent");
    let mut buffer = [0; 64];
    let received = timeout(SOON, client.recv(&mut buffer)).await;
    let bytes = received.expect("in time").expect("received");
    assert_eq!(&buffer[..bytes], b"new");
}

#[tokio::test]
async fn a_relay_loses_the_part_that_it_was_told() {
    let (relay, client) = through_a_relay(2).await;
    relay.set(
        Direction::There,
        Quality {
            loss: 0.3,
            ..Quality::default()
        },
    );
    for number in 0..1_000_u32 {
        client.send(&number.to_be_bytes()).await.unwrap();
        // As fast as the relay reads, so that the system's buffer loses none.
        while relay.counts().passed + relay.counts().lost < u64::from(number) {
            tokio::task::yield_now().await;
        }
    }
    let lost = relay.counts().lost;
    assert!((200..400).contains(&lost), "{lost} of 1000");
}

#[test]
fn hosts_of_a_network_hear_each_other_until_they_are_cut_off() {
    if !works("network namespaces with nftables") {
        return;
    }
    let network = Network::create(3).unwrap();
    let hears = |from, to| network.hears(from, to).unwrap();
    assert!(hears(1, 2) && hears(2, 3));
    network.isolate(&[1]).unwrap();
    assert!(!hears(1, 2) && !hears(3, 1) && hears(2, 3));
    network.heal().unwrap();
    assert!(hears(1, 2));
    network.cut_one_way(2, 1).unwrap();
    assert!(!hears(1, 2), "the answer is lost");
    network.heal().unwrap();
    network.cut(&[(3, 1), (3, 2)]).unwrap();
    assert!(hears(1, 2) && !hears(1, 3) && !hears(2, 3));
    network.heal().unwrap();
    network.cut_service(2, 80, 1).unwrap();
    assert!(hears(1, 2), "only the service is cut off");
    drop(Network::of_another(network.name().to_owned(), 3));
    assert!(network.hears(1, 2).is_err(), "whoever knows it deletes it");
    let before = std::fs::read_to_string("/proc/net/route").unwrap();
    drop(network);
    assert_eq!(
        std::fs::read_to_string("/proc/net/route").unwrap(),
        before,
        "this host's routes are as they were"
    );
}

#[test]
fn fsync_is_counted_slowed_and_failed() {
    if !works("a preloaded fsync") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let fsync = Fsync::prepare(folder.path()).unwrap();
    let sync = || {
        let mut command = Command::new("sync");
        command.arg(folder.path());
        fsync.preload(&mut command);
        command.output().unwrap().status.success()
    };
    assert!(sync());
    assert_eq!(fsync.calls().unwrap(), 1);
    fsync.delay(Duration::from_millis(100)).unwrap();
    let began = Instant::now();
    assert!(sync());
    assert!(began.elapsed() >= Duration::from_millis(100));
    fsync.delay(Duration::ZERO).unwrap();
    fsync.fail(5).unwrap();
    assert!(!sync());
    fsync.fail(0).unwrap();
    assert!(sync());
    assert_eq!(fsync.calls().unwrap(), 4);
}

#[test]
fn a_small_disk_is_full_and_has_room_again() {
    if !works("loop mounts") {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let disk = SmallDisk::mount(place.path(), 8).unwrap();
    let file = disk.folder().join("file");
    std::fs::write(&file, vec![1; 100_000]).unwrap();
    let filling = disk.fill().unwrap();
    let error = std::fs::write(disk.folder().join("more"), vec![1; 100_000]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    assert_eq!(std::fs::read(&file).unwrap().len(), 100_000);
    std::fs::remove_file(filling).unwrap();
    std::fs::write(disk.folder().join("more"), vec![1; 100_000]).unwrap();
}

#[test]
fn a_clock_is_off_for_a_process_and_its_children() {
    if !works("faketime") {
        return;
    }
    let mut shell = clock::command("sh", 3600);
    let output = shell.args(["-c", "date +%s"]).output().unwrap();
    let there: i64 = String::from_utf8_lossy(&output.stdout).trim().parse().unwrap();
    let output = Command::new("date").arg("+%s").output().unwrap();
    let here: i64 = String::from_utf8_lossy(&output.stdout).trim().parse().unwrap();
    assert!((3590..3610).contains(&(there - here)), "{}", there - here);
}

#[test]
fn a_paused_process_stands_still_and_goes_on() {
    let state = |pid: u32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        text.rsplit_once(") ").unwrap().1.chars().next().unwrap()
    };
    let mut child = Command::new("sleep").arg("60").spawn().unwrap();
    let paused = signal::Paused::pause(child.id()).unwrap();
    // The signal is delivered when the process next runs.
    while state(child.id()) != 'T' {
        std::thread::yield_now();
    }
    drop(paused);
    while state(child.id()) == 'T' {
        std::thread::yield_now();
    }
    signal::kill(child.id()).unwrap();
    assert!(!child.wait().unwrap().success());
    assert!(signal::kill(child.id()).is_err(), "it is gone");
}

#[tokio::test]
async fn a_relay_treats_clients_at_one_address_apart() {
    let (relay, client) = through_a_relay(3).await;
    let own = client.local_addr().expect("bound").ip();
    relay.set_for([127, 77, 0, 1].into(), Direction::There, Quality::CUT);
    assert!(answer(&client, b"another", SOON).await.is_some());
    relay.set_for(own, Direction::There, Quality::CUT);
    assert!(answer(&client, b"lost", NEVER).await.is_none());
    relay.heal();
    assert!(answer(&client, b"healed", SOON).await.is_some());
}

#[tokio::test]
async fn a_gate_that_is_cut_keeps_what_it_is_given_until_it_is_healed() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let echo = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a free port");
    let gate = Gate::start(echo.local_addr().expect("bound"))
        .await
        .expect("a free port");
    tokio::spawn(async move {
        let (mut stream, _) = echo.accept().await.expect("a client");
        let (mut from, mut to) = stream.split();
        let _ = tokio::io::copy(&mut from, &mut to).await;
    });
    let mut client = tokio::net::TcpStream::connect(gate.address())
        .await
        .expect("it listens");
    let mut byte = [0];
    client.write_all(b"1").await.expect("sent");
    client.read_exact(&mut byte).await.expect("answered");
    gate.cut(true);
    client.write_all(b"2").await.expect("sent");
    assert!(timeout(NEVER, client.read_exact(&mut byte)).await.is_err());
    gate.cut(false);
    let answered = timeout(SOON, client.read_exact(&mut byte)).await;
    answered.expect("in time").expect("answered");
    assert_eq!(&byte, b"2");
}
