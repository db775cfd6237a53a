//! The signer process: what it signs and refuses, its limits, its seed file, and that callers survive its
//! death. The process itself is this test program, started again as its own child.

use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use agent::signer::{Config, Desk, Error, Limits, Rate, read_seed, run_on_stdin};
use coordinator::clock::{Clock, WallClock};
use coordinator::signer::key::{Key, Seed};
use coordinator::signer::wire::{Answer, Ask, KindCount, decode, encode};
use coordinator::signer::{self, BodyRoute, MessageKind, Patience, SealedKind, Sign, SignerClient};
use protocol::signing::{Purpose, Tail, check_request_to_validator};
use protocol::time::UnixMillis;

const M: &str = "5CcyqxXnJucaCnQQvvUg5EPzj1uoNAxACZvzArHw5aVDvgNH";
const SEED_FILE: &str = "SIGNER_TEST_SEED_FILE";

/// The body of the child process: the signer on standard input. Without the variable this is no child.
#[test]
fn signer_child() {
    let Some(seed_file) = std::env::var_os(SEED_FILE) else {
        return;
    };
    let config = Config {
        seed_file: seed_file.into(),
        become_user: None,
    };
    panic!("the signer ended: {:?}", run_on_stdin(&config, &WallClock));
}

fn start_signer(end: &UnixDatagram, seed_file: &Path) -> Child {
    let end = OwnedFd::from(end.try_clone().expect("a descriptor is free"));
    Command::new(std::env::current_exe().expect("we run from a file"))
        .args(["--exact", "signer_child", "--nocapture", "--test-threads=1"])
        .env(SEED_FILE, seed_file)
        .stdin(Stdio::from(end))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the test program starts again")
}

fn seed_file(folder: &Path, content: &str, mode: u32) -> PathBuf {
    let path = folder.join("seed");
    // An old one may be read-only.
    let _ = std::fs::remove_file(&path);
    std::fs::write(&path, content).expect("the folder is writable");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("our own file");
    path
}

fn patience() -> Patience {
    Patience {
        one_try: Duration::from_millis(200),
        in_all: Duration::from_secs(20),
    }
}

async fn check_one(client: &SignerClient) {
    let headers = client
        .to_validator(MessageKind::MinerRead)
        .await
        .expect("a signature");
    let find = |name: &str| headers.iter().find(|(n, _)| n == &name).map(|(_, v)| v.as_str());
    let tail = Tail::Purpose(Purpose::Miner);
    let signer = check_request_to_validator(find, WallClock.now(), 600, &tail).expect("a good signature");
    assert_eq!(signer.as_str(), M);
}

#[tokio::test]
async fn requests_survive_a_signer_that_is_killed_and_started_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let seed = seed_file(folder.path(), &"01".repeat(32), 0o600);
    // The supervisor keeps both ends.
    let (ours, theirs) = UnixDatagram::pair().expect("a socket pair");
    let mut child = start_signer(&theirs, &seed);
    let fd = OwnedFd::from(ours.try_clone().expect("a descriptor is free"));
    let client = SignerClient::connect(fd, 1_000, patience())
        .await
        .expect("the signer answers");
    assert_eq!(client.hotkey().as_str(), M);
    check_one(&client).await;
    let sealed = client
        .seal(SealedKind::LaunchToken, b"token")
        .await
        .expect("sealed");
    for _ in 0..3 {
        child.kill().expect("our child");
        child.wait().expect("our child");
        // Asked while nobody is there; answered by the next one.
        let asked = check_one(&client);
        let restarted = async { child = start_signer(&theirs, &seed) };
        tokio::join!(asked, restarted);
    }
    assert_eq!(
        client.unseal(SealedKind::LaunchToken, &sealed).await,
        Ok(b"token".to_vec())
    );
    let wrong = client.unseal(SealedKind::Kubeconfig, &sealed).await;
    assert_eq!(wrong, Err(signer::Error::NotOpened("kubeconfig")));
    let counts = client.counts().await.expect("counts");
    assert!(
        counts
            .iter()
            .any(|count| count.kind == "sealing" && count.granted == 2),
        "{counts:?}"
    );
    confined(child.id());
    child.kill().expect("our child");
    child.wait().expect("our child");
}

/// What the system says of a running signer.
fn confined(process: u32) {
    // Here other threads belong to the test harness; the signer's own has given up what it can.
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).expect("it runs");
    let confined = threads.filter_map(|thread| {
        let status = std::fs::read_to_string(thread.ok()?.path().join("status")).ok()?;
        status.contains("NoNewPrivs:\t1").then_some(())
    });
    assert_eq!(confined.count(), 1);
    let limits = std::fs::read_to_string(format!("/proc/{process}/limits")).expect("it runs");
    for limit in ["Max open files", "Max processes", "Max core file size"] {
        let line = limits
            .lines()
            .find(|line| line.starts_with(limit))
            .expect("every system has it");
        let values: Vec<&str> = line[limit.len()..].split_whitespace().take(2).collect();
        assert_eq!(values, ["0", "0"], "{line}");
    }
}

#[tokio::test]
async fn without_a_signer_the_caller_is_told_in_bounded_time() {
    let (ours, theirs) = UnixDatagram::pair().expect("a socket pair");
    let short = Patience {
        one_try: Duration::from_millis(20),
        in_all: Duration::from_millis(100),
    };
    let silent = SignerClient::connect(ours.into(), 0, short)
        .await
        .expect_err("nobody answers");
    assert!(silent.is_transient(), "{silent}");
    drop(theirs);
    let (ours, theirs) = UnixDatagram::pair().expect("a socket pair");
    drop(theirs);
    let closed = SignerClient::connect(ours.into(), 0, short)
        .await
        .expect_err("nobody is there");
    assert!(closed.is_transient(), "{closed}");
}

#[tokio::test]
async fn late_and_foreign_answers_are_skipped() {
    let (ours, theirs) = UnixDatagram::pair().expect("a socket pair");
    theirs.set_nonblocking(true).expect("a socket option");
    let theirs = tokio::net::UnixDatagram::from_std(theirs).expect("a socket");
    let late = encode(5, &Answer::Hotkey("x".to_owned())).expect("short");
    for stale in [late, vec![1], vec![9; 30]] {
        theirs.send(&stale).await.expect("the other end is open");
    }
    let answer = async {
        let mut buffer = [0; 1024];
        let length = theirs.recv(&mut buffer).await.expect("a request");
        let (id, _) = decode::<Ask>(&buffer[..length]).expect("our own format");
        let answer = encode(id, &Answer::Hotkey(M.to_owned())).expect("short");
        theirs.send(&answer).await.expect("the other end is open");
    };
    let (client, ()) = tokio::join!(SignerClient::connect(ours.into(), 77, patience()), answer);
    assert_eq!(client.expect("the right answer was there").hotkey().as_str(), M);
}

fn desk(limits: Limits) -> Desk {
    Desk::new(Key::new(&Seed::new([1; 32])), limits)
}

const NOW: UnixMillis = UnixMillis(1_735_689_600_000);

fn ask(desk: &mut Desk, ask: &Ask, now: UnixMillis) -> Answer {
    let answer = desk
        .answer(&encode(3, ask).expect("short"), now)
        .expect("it has an id");
    let (id, answer) = decode(&answer).expect("our own format");
    assert_eq!(id, 3);
    answer
}

fn counts(desk: &mut Desk) -> Vec<KindCount> {
    match ask(desk, &Ask::Counts, NOW) {
        Answer::Counts(counts) => counts,
        other => panic!("counts were asked for, not {other:?}"),
    }
}

#[test]
fn unknown_kinds_and_versions_are_refused_and_counted() {
    let mut desk = desk(Limits::default());
    let good = encode(3, &Ask::Sign(MessageKind::SocketAuth)).expect("short");
    let mut unknown_kind = good.clone();
    *unknown_kind.last_mut().expect("not empty") = 100;
    let mut unknown_version = good.clone();
    unknown_version[0] = 9;
    let mut trailing = good.clone();
    trailing.push(1);
    for datagram in [unknown_kind, unknown_version, trailing, good[..9].to_vec()] {
        let answer = desk.answer(&datagram, NOW).expect("it has an id");
        assert!(
            matches!(decode(&answer), Ok((3, Answer::Refused(_)))),
            "{datagram:?}"
        );
    }
    assert_eq!(desk.answer(&good[..5], NOW), None);
    assert_eq!(desk.answer(&[], NOW), None);
    let expected = KindCount {
        kind: "unreadable".to_owned(),
        granted: 0,
        limited: 6,
    };
    assert_eq!(counts(&mut desk), [expected]);
}

#[test]
fn each_kind_has_its_own_limit_that_time_refills() {
    let rate = Rate {
        burst: 3,
        per_minute: 60,
    };
    let mut desk = desk(Limits::all(rate));
    let granted = |desk: &mut Desk, kind, now: UnixMillis| {
        let answers: Vec<Answer> = (0..5).map(|_| ask(desk, &Ask::Sign(kind), now)).collect();
        let own_clock =
            |answer: &&Answer| matches!(answer, Answer::Signed(s) if s.nonce == now.unix_seconds());
        let granted = answers.iter().filter(own_clock).count();
        let limited = answers
            .iter()
            .filter(|answer| matches!(answer, Answer::Limited(_)))
            .count();
        assert_eq!(granted + limited, 5, "{answers:?}");
        granted
    };
    assert_eq!(granted(&mut desk, MessageKind::LaunchConfig, NOW), 3);
    assert_eq!(
        granted(&mut desk, MessageKind::SocketAuth, NOW),
        3,
        "kinds do not share"
    );
    let body = |route| MessageKind::Body {
        route,
        sha256: [1; 32],
    };
    assert_eq!(granted(&mut desk, body(BodyRoute::AdvertiseNodes), NOW), 3);
    assert_eq!(
        granted(&mut desk, body(BodyRoute::UploadAudit), NOW),
        3,
        "nor do routes"
    );
    assert_eq!(
        granted(&mut desk, MessageKind::LaunchConfig, NOW + 2_000),
        2,
        "one a second"
    );
    assert_eq!(
        granted(&mut desk, MessageKind::LaunchConfig, NOW),
        0,
        "a clock set back gives nothing"
    );
    assert_eq!(
        granted(&mut desk, MessageKind::LaunchConfig, NOW + 3_600_000),
        3,
        "at most the burst"
    );
    let seal = Ask::Seal(SealedKind::PullSecret, b"x".to_vec());
    let sealed = (0..5)
        .filter(|_| matches!(ask(&mut desk, &seal, NOW), Answer::Bytes(_)))
        .count();
    assert_eq!(sealed, 3);
    let counts = counts(&mut desk);
    let launch = counts
        .iter()
        .find(|count| count.kind == "launch_config")
        .expect("it was asked for");
    assert_eq!((launch.granted, launch.limited), (8, 12));
}

#[test]
fn slow_rates_refill_between_quick_requests() {
    let rate = Rate {
        burst: 1,
        per_minute: 1,
    };
    let mut desk = desk(Limits::all(rate));
    let mut granted = 0;
    for ms in (0..=120_000).step_by(10) {
        let answer = ask(&mut desk, &Ask::Sign(MessageKind::DeleteNode), NOW + ms);
        granted += usize::from(matches!(answer, Answer::Signed(_)));
    }
    assert_eq!(granted, 3, "one at once and one a minute");
}

#[test]
fn seed_files_must_belong_to_their_owner_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let hex = "01".repeat(32);
    for mode in [0o600, 0o400] {
        let key = Key::new(&read_seed(&seed_file(folder.path(), &hex, mode)).expect("a good file"));
        assert_eq!(key.hotkey().as_str(), M);
    }
    for mode in [0o644, 0o640, 0o604, 0o660, 0o700] {
        let error = read_seed(&seed_file(folder.path(), &hex, mode)).expect_err("others may have access");
        assert!(
            matches!(error, Error::OpenToOthers { mode: m, .. } if m == mode),
            "{error}"
        );
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }
    let wallet = format!(r#"{{"ss58Address":"{M}","secretSeed":"0x{hex}"}}"#);
    assert!(read_seed(&seed_file(folder.path(), &wallet, 0o600)).is_ok());
    let error = read_seed(&seed_file(folder.path(), &hex[..60], 0o600)).expect_err("too short");
    assert!(
        matches!(error, Error::Seed { .. }) && !error.to_string().contains("0101"),
        "{error}"
    );
    let large = "0".repeat(20_000);
    let error = read_seed(&seed_file(folder.path(), &large, 0o600)).expect_err("too large");
    assert!(matches!(error, Error::NotAFile(_)), "{error}");
    assert!(matches!(read_seed(folder.path()), Err(Error::NotAFile(_))));
    assert!(matches!(
        read_seed(&folder.path().join("none")),
        Err(Error::Read { .. })
    ));
}
