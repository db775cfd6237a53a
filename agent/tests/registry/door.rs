//! The registry door against a fake upstream: what goes up, what comes down, and what is refused.

use std::sync::Arc;

use crate::fake_upstream::{Door, FakeUpstream, NOW, Step, answer, client, raw, sha256, signed};
use agent::registry::metrics::Outcome;
use agent::registry::store;
use tokio::sync::Semaphore;

const MIB: u64 = 1024 * 1024;

fn store_in(directory: &tempfile::TempDir) -> Option<store::Config> {
    let directory = directory.path().join("blobs");
    Some(store::Config {
        directory,
        bytes_max: 100 * MIB,
        free_bytes_min: 0,
    })
}

async fn body_of(url: &str) -> (u16, String) {
    let response = client().get(url).send().await.expect("an answer");
    (response.status().as_u16(), response.text().await.expect("a body"))
}

fn assert_oci(body: &str, code: &str, word: &str) {
    let parsed: serde_json::Value = serde_json::from_str(body).expect("JSON");
    assert_eq!(parsed["errors"][0]["code"], code, "{body}");
    assert!(
        parsed["errors"][0]["message"]
            .as_str()
            .is_some_and(|text| text.contains(word)),
        "{body}"
    );
}

#[tokio::test]
async fn only_the_signed_headers_and_those_of_a_pull_go_upstream() {
    let upstream = FakeUpstream::start(|_| answer("200 OK", "Docker-Content-Digest: x\r\n", b"{}")).await;
    let door = Door::start(&[upstream.address], None).await;
    let response = client()
        .get(format!("{}/v2/user/name/manifests/latest?ns=x", door.base))
        .header("Authorization", "Basic c2VjcmV0")
        .header("X-Chutes-Hotkey", "forged")
        .header("x-chutes-purpose", "forged")
        .header("Cookie", "a=b")
        .header("Accept", "application/vnd.oci.image.index.v1+json")
        .header("Accept", "*/*")
        .header("Range", "bytes=1-")
        .send()
        .await
        .expect("an answer");
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["docker-content-digest"], "x");
    let head = upstream.heads().remove(0).to_lowercase();
    let mut lines: Vec<&str> = head.lines().filter(|line| !line.is_empty()).collect();
    assert_eq!(lines.remove(0), "get /v2/user/name/manifests/latest http/1.1");
    lines.retain(|line| !line.starts_with("user-agent: chutes-agent/"));
    lines.sort_unstable();
    let host = format!("host: {}", upstream.address);
    assert_eq!(
        lines,
        [
            "accept: */*",
            "accept: application/vnd.oci.image.index.v1+json",
            &host,
            "range: bytes=1-",
            "x-chutes-hotkey: miner",
            "x-chutes-nonce: 1735689600",
            "x-chutes-signature: ab12",
        ]
    );
}

#[tokio::test]
async fn the_host_chooses_the_validator() {
    let first = FakeUpstream::start(|_| answer("200 OK", "", b"first")).await;
    let second = FakeUpstream::start(|_| answer("200 OK", "", b"second")).await;
    let door = Door::start(&[first.address, second.address], None).await;
    let get = |host: String| {
        let request = client()
            .get(format!("{}/v2/a/manifests/x", door.base))
            .header("Host", host);
        async move {
            let response = request.send().await.expect("an answer");
            (response.status().as_u16(), response.text().await.expect("a body"))
        }
    };
    let label = |n: usize| door.validators[n].lower();
    for (host, expected) in [
        (format!("{}.localregistry.chutes.ai:30500", label(0)), "first"),
        (format!("{}.localregistry.chutes.ai:30500", label(1)), "second"),
        ("127.0.0.1:30500".to_owned(), "first"),
    ] {
        assert_eq!(get(host.clone()).await, (200, expected.to_owned()), "{host}");
    }
    let stranger = protocol::hotkey::Hotkey::from_public_key(&[9; 32]).lower();
    let (status, body) = get(format!("{stranger}.localregistry.chutes.ai:30500")).await;
    assert_eq!(status, 404);
    assert_oci(&body, "NAME_UNKNOWN", &stranger);
}

#[tokio::test]
async fn without_a_fresh_signature_nothing_is_asked() {
    let upstream = FakeUpstream::start(|_| answer("200 OK", "", b"{}")).await;
    let door = Door::start(&[upstream.address], None).await;
    door.credentials
        .replace(vec![signed(&door.validators[0], NOW)])
        .expect("valid headers");
    let (status, body) = body_of(&format!("{}/v2/a/manifests/x", door.base)).await;
    assert_eq!(status, 503);
    assert_oci(&body, "UNAVAILABLE", "coordinator");
    assert_eq!(upstream.heads().len(), 0);
    assert_eq!(door.metrics.requests(Outcome::NoSignature), 1);
}

#[tokio::test]
async fn other_methods_and_path_tricks_never_reach_the_upstream() {
    let upstream = FakeUpstream::start(|_| answer("200 OK", "", b"{}")).await;
    let door = Door::start(&[upstream.address], None).await;
    let long = format!("/v2/{}/manifests/x", "a/".repeat(4000));
    for (line, status) in [
        ("POST /v2/a/blobs/uploads/", "405"),
        ("PUT /v2/a/manifests/x", "405"),
        ("DELETE /v2/a/manifests/x", "405"),
        ("PATCH /v2/a/manifests/x", "405"),
        ("OPTIONS *", "405"),
        ("CONNECT registry.example:443", "405"),
        ("GET /", "404"),
        ("GET /v2/_catalog", "404"),
        ("GET /v2/../v2/a/manifests/x", "400"),
        ("GET /v2/%2e%2e/a/manifests/x", "400"),
        ("GET /v2/a%2f..%2fb/manifests/x", "400"),
        ("GET /v2/a//b/manifests/x", "400"),
        ("GET //v2/a/manifests/x", "404"),
        ("GET /v2/a/manifests/x%00", "400"),
        ("GET /v2/a/blobs/sha256:short", "400"),
        ("GET http://elsewhere.example/v2/a/manifests/x", "400"),
        (&format!("GET {long}"), "400"),
    ] {
        let request = format!("{line} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        let answer = raw(&door.base, request.as_bytes()).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{line:.80}: {answer}"
        );
        assert!(answer.contains(r#"{"errors":[{"code":"#), "{line:.80}: {answer}");
    }
    for request in [
        &b"GET /v2/a\0b/manifests/x HTTP/1.1\r\nHost: x\r\n\r\n"[..],
        b"GET /v2/a/manifests/x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /v2/a/manifests/x HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello",
    ] {
        let answer = raw(&door.base, request).await;
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 400 "),
            "{answer}"
        );
    }
    assert_eq!(upstream.heads().len(), 0);
}

#[tokio::test]
async fn upstream_down_is_503_and_its_401_is_passed_on() {
    let gone = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a free port");
    let address = gone.local_addr().expect("bound");
    drop(gone);
    let door = Door::start(&[address], None).await;
    let (status, body) = body_of(&format!("{}/v2/a/manifests/x", door.base)).await;
    assert_eq!(status, 503);
    assert_oci(&body, "UNAVAILABLE", "cannot be reached");

    let upstream = FakeUpstream::start(|_| answer("401 Unauthorized", "", b"no")).await;
    let door = Door::start(&[upstream.address], None).await;
    assert_eq!(
        body_of(&format!("{}/v2/a/manifests/x", door.base)).await,
        (401, "no".to_owned())
    );
    assert_eq!(door.metrics.requests(Outcome::UpstreamRefused), 1);
}

#[tokio::test]
async fn a_silent_upstream_is_503_and_a_stalled_body_is_cut() {
    let never = Arc::new(Semaphore::new(0));
    let gate = Arc::clone(&never);
    let upstream = FakeUpstream::start(move |head| {
        let wait = Step::Wait(Arc::clone(&gate));
        let head_only = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf".to_vec();
        if head.contains("silent") {
            vec![wait]
        } else {
            vec![Step::Send(head_only), wait]
        }
    })
    .await;
    let door = Door::start(&[upstream.address], None).await;
    let (status, body) = body_of(&format!("{}/v2/a/manifests/silent", door.base)).await;
    assert_eq!(status, 503);
    assert_oci(&body, "UNAVAILABLE", "in time");
    let response = client()
        .get(format!("{}/v2/a/manifests/stalled", door.base))
        .send()
        .await
        .expect("a head");
    assert_eq!(response.status(), 200);
    assert!(response.bytes().await.is_err(), "the connection must be cut");
}

#[tokio::test]
async fn head_and_range_pass() {
    let upstream = FakeUpstream::start(|head| match head.split(' ').next() {
        Some("HEAD") => {
            vec![Step::Send(
                b"HTTP/1.1 200 OK\r\nContent-Length: 12345\r\nContent-Type: x/y\r\n\r\n".to_vec(),
            )]
        }
        _ => answer("206 Partial Content", "Content-Range: bytes 2-4/9\r\n", b"234"),
    })
    .await;
    let door = Door::start(&[upstream.address], None).await;
    let head = client()
        .head(format!("{}/v2/a/manifests/x", door.base))
        .send()
        .await
        .expect("an answer");
    assert_eq!(
        (&head.headers()["content-length"], &head.headers()["content-type"]),
        (
            &"12345".parse().expect("a value"),
            &"x/y".parse().expect("a value")
        )
    );
    let blob = format!("{}/v2/a/blobs/{}", door.base, sha256(b"012345678"));
    let part = client()
        .get(blob)
        .header("Range", "bytes=2-4")
        .send()
        .await
        .expect("an answer");
    assert_eq!(part.status(), 206);
    assert_eq!(part.headers()["content-range"], "bytes 2-4/9");
    assert_eq!(part.text().await.expect("a body"), "234");
}

#[tokio::test]
async fn a_wrong_digest_is_never_delivered_whole_nor_kept() {
    let wrong: Vec<u8> = (0..3 * MIB).map(|n| n as u8).collect();
    let sent = wrong.clone();
    let upstream = FakeUpstream::start(move |_| answer("200 OK", "", &sent)).await;
    let directory = tempfile::tempdir().expect("a folder");
    for store in [None, store_in(&directory)] {
        let kept = store.is_some();
        let door = Door::start(&[upstream.address], store).await;
        let url = format!("{}/v2/a/blobs/{}", door.base, sha256(b"something else"));
        let before = upstream.heads().len();
        for round in 1..=2 {
            let response = client().get(&url).send().await.expect("a head");
            assert_eq!(response.status(), 200);
            assert!(response.bytes().await.is_err(), "store {kept}: cut off");
            assert_eq!(door.metrics.digest_mismatches.get(), round, "store {kept}");
        }
        assert_eq!(
            upstream.heads().len(),
            before + 2,
            "store {kept}: nothing was kept"
        );
        let url = format!("{}/v2/a/manifests/{}", door.base, sha256(b"something else"));
        let (status, body) = body_of(&url).await;
        assert_eq!(status, 502);
        assert_oci(&body, "DIGEST_INVALID", "manifest");
        door.stop().await;
    }
    let left = std::fs::read_dir(directory.path().join("blobs/sha256"))
        .expect("listed")
        .count();
    let incoming = std::fs::read_dir(directory.path().join("blobs/incoming"))
        .expect("listed")
        .count();
    assert_eq!((left, incoming), (0, 0));
}

#[tokio::test]
async fn a_truncated_blob_is_cut_off_and_not_kept() {
    let upstream = FakeUpstream::start(|_| {
        vec![
            Step::Send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this".to_vec()),
            Step::Close,
        ]
    })
    .await;
    let directory = tempfile::tempdir().expect("a folder");
    for store in [None, store_in(&directory)] {
        let door = Door::start(&[upstream.address], store).await;
        let url = format!("{}/v2/a/blobs/{}", door.base, sha256(b"whole"));
        let response = client().get(&url).send().await.expect("a head");
        assert!(response.bytes().await.is_err());
        door.stop().await;
    }
    assert_eq!(
        std::fs::read_dir(directory.path().join("blobs/sha256"))
            .expect("listed")
            .count(),
        0
    );
}

#[tokio::test]
async fn concurrent_pulls_of_one_blob_ask_the_upstream_once() {
    let blob: Vec<u8> = (0..8 * MIB + 17).map(|n| (n / 251) as u8).collect();
    let (name, sent) = (sha256(&blob), blob.clone());
    let gate = Arc::new(Semaphore::new(0));
    let wait = Arc::clone(&gate);
    let upstream = FakeUpstream::start(move |_| {
        let mut steps = answer("200 OK", "", &sent);
        let Some(Step::Send(whole)) = steps.pop() else {
            unreachable!("one piece")
        };
        let (front, rest) = whole.split_at(whole.len() / 2);
        vec![
            Step::Send(front.to_vec()),
            Step::Wait(Arc::clone(&wait)),
            Step::Send(rest.to_vec()),
        ]
    })
    .await;
    let directory = tempfile::tempdir().expect("a folder");
    let door = Door::start(&[upstream.address], store_in(&directory)).await;
    let url = format!("{}/v2/a/blobs/{name}", door.base);
    let mut responses = Vec::new();
    let client = client();
    for _ in 0..6 {
        responses.push(client.get(&url).send().await.expect("a head"));
    }
    let part = client
        .get(&url)
        .header("Range", "bytes=8388608-")
        .send()
        .await
        .expect("a head");
    assert_eq!(part.status(), 206);
    gate.add_permits(1);
    for response in responses {
        assert_eq!(response.content_length(), Some(blob.len() as u64));
        assert!(response.bytes().await.expect("whole") == blob);
    }
    assert!(part.bytes().await.expect("whole") == blob[8_388_608..]);
    assert_eq!(upstream.heads().len(), 1);
    assert_eq!(door.metrics.upstream_bytes.get(), blob.len() as u64);
    assert_eq!(door.metrics.requests(Outcome::Joined), 6);

    // Afterwards it comes from disk, also after a restart and with the upstream's signature gone.
    door.stop().await;
    let door = Door::start(&[upstream.address], store_in(&directory)).await;
    door.credentials
        .replace(vec![signed(&door.validators[0], NOW)])
        .expect("valid headers");
    let url = format!("{}/v2/other/name/blobs/{name}", door.base);
    let head = client.head(&url).send().await.expect("a head");
    assert_eq!(head.headers()["content-length"], blob.len().to_string().as_str());
    assert_eq!(head.headers()["docker-content-digest"], name.as_str());
    assert!(
        client
            .get(&url)
            .send()
            .await
            .expect("a head")
            .bytes()
            .await
            .expect("whole")
            == blob
    );
    let part = client
        .get(&url)
        .header("Range", "bytes=-10")
        .send()
        .await
        .expect("a head");
    assert_eq!(
        part.headers()["content-range"],
        format!("bytes {}-{}/{}", blob.len() - 10, blob.len() - 1, blob.len()).as_str()
    );
    assert!(part.bytes().await.expect("whole") == blob[blob.len() - 10..]);
    let beyond = client
        .get(&url)
        .header("Range", format!("bytes={}-", blob.len()))
        .send()
        .await
        .expect("a head");
    assert_eq!(beyond.status(), 416);
    assert_eq!(upstream.heads().len(), 1);
    door.stop().await;

    // A file that was damaged on disk is not served, but fetched again.
    let file = directory
        .path()
        .join("blobs/sha256")
        .join(name.trim_start_matches("sha256:"));
    let mut damaged = blob.clone();
    damaged[5] ^= 1;
    std::fs::write(&file, &damaged).expect("written");
    gate.add_permits(1);
    let door = Door::start(&[upstream.address], store_in(&directory)).await;
    let url = format!("{}/v2/a/blobs/{name}", door.base);
    assert!(
        client
            .get(&url)
            .send()
            .await
            .expect("a head")
            .bytes()
            .await
            .expect("whole")
            == blob
    );
    assert_eq!(upstream.heads().len(), 2);
    assert_eq!(door.metrics.digest_mismatches.get(), 1);
}

#[tokio::test]
async fn the_store_keeps_to_its_size() {
    let upstream = FakeUpstream::start(|head| {
        let seed = head
            .split("/v2/b")
            .nth(1)
            .and_then(|rest| rest.bytes().next())
            .expect("a name");
        answer("200 OK", "", &vec![seed; MIB as usize])
    })
    .await;
    let directory = tempfile::tempdir().expect("a folder");
    let config = store::Config {
        directory: directory.path().join("blobs"),
        bytes_max: 5 * MIB / 2,
        free_bytes_min: 0,
    };
    let door = Door::start(&[upstream.address], Some(config)).await;
    let get = |seed: u8| {
        let blob = vec![seed; MIB as usize];
        let url = format!("{}/v2/b{}/blobs/{}", door.base, seed as char, sha256(&blob));
        async move {
            let got = client()
                .get(url)
                .send()
                .await
                .expect("a head")
                .bytes()
                .await
                .expect("whole");
            assert!(got == blob);
        }
    };
    for (seed, asked) in [(b'1', 1), (b'2', 2), (b'1', 2), (b'3', 3), (b'1', 3), (b'2', 4)] {
        get(seed).await;
        assert_eq!(upstream.heads().len(), asked, "after {}", seed as char);
        assert!(door.metrics.stored_bytes.get() <= 5 * MIB as i64 / 2);
    }
}

#[tokio::test]
async fn a_blob_that_does_not_fit_is_passed_through() {
    let blob = vec![7; MIB as usize];
    let (name, sent) = (sha256(&blob), blob.clone());
    let upstream = FakeUpstream::start(move |_| answer("200 OK", "", &sent)).await;
    let directory = tempfile::tempdir().expect("a folder");
    for (bytes_max, free_bytes_min) in [(MIB - 1, 0), (100 * MIB, u64::MAX)] {
        let config = store::Config {
            directory: directory.path().join("blobs"),
            bytes_max,
            free_bytes_min,
        };
        let door = Door::start(&[upstream.address], Some(config)).await;
        let url = format!("{}/v2/a/blobs/{name}", door.base);
        assert!(
            client()
                .get(&url)
                .send()
                .await
                .expect("a head")
                .bytes()
                .await
                .expect("whole")
                == blob
        );
        assert_eq!(door.metrics.stored_bytes.get(), 0);
        door.stop().await;
    }
    assert_eq!(upstream.heads().len(), 2);
}

#[tokio::test]
async fn two_processes_never_share_a_store() {
    let directory = tempfile::tempdir().expect("a folder");
    let config = store_in(&directory).expect("a store");
    let first = store::Store::open(config.clone(), Arc::default()).expect("free");
    assert!(matches!(
        store::Store::open(config, Arc::default()),
        Err(store::Error::Locked(_))
    ));
    drop(first);
}

#[tokio::test]
async fn a_redirect_is_passed_on_untouched() {
    let upstream = FakeUpstream::start(|_| {
        answer(
            "307 Temporary Redirect",
            "Location: https://storage.example/x?signature=y\r\n",
            b"",
        )
    })
    .await;
    let directory = tempfile::tempdir().expect("a folder");
    for store in [None, store_in(&directory)] {
        let door = Door::start(&[upstream.address], store).await;
        let url = format!("{}/v2/a/blobs/{}", door.base, sha256(b"x"));
        let response = client().get(&url).send().await.expect("an answer");
        assert_eq!(response.status(), 307);
        assert_eq!(
            response.headers()["location"],
            "https://storage.example/x?signature=y"
        );
        door.stop().await;
    }
}
