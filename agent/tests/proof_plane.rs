//! The GPU proof process from outside: a verification as a validator does it, golden answers, and a table of
//! requests that must be turned away. All over loopback, with a clock that the test sets.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use agent::gpu::api::{BODY_BYTES_MAX, DevicesAnswer, ProveAnswer};
use agent::gpu::worker::Limits;
use agent::proof_plane::{Backend, Config, Error, Plane, run};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use coordinator::clock::Clock;
use proof::Profile;
use protocol::hotkey::{Hotkey, Signer};
use protocol::signing::{Headers, Purpose, Tail, headers_to_miner};
use protocol::time::UnixMillis;
use reqwest::{Client, Method, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::{CancellationToken, DropGuard};

const NOW: UnixMillis = UnixMillis(1_735_689_600_000);
const GRAVAL: Tail<'_> = Tail::Purpose(Purpose::Graval);

#[derive(Debug)]
struct SetClock(AtomicU64);

impl Clock for SetClock {
    fn now(&self) -> UnixMillis {
        UnixMillis(self.0.load(Ordering::SeqCst))
    }
}

/// A running proof process with its miner and two validators.
struct Bench {
    address: SocketAddr,
    http: Client,
    miner: Signer,
    validator: Signer,
    second: Signer,
    clock: Arc<SetClock>,
    folder: tempfile::TempDir,
    served: tokio::task::JoinHandle<()>,
    stop: DropGuard,
}

fn config(folder: &tempfile::TempDir, miner: &Hotkey, apis: &[(&Hotkey, &str)]) -> Config {
    Config {
        listen: ([127, 0, 0, 1], 0).into(),
        socket: folder.path().join("run/proof.sock"),
        miner: miner.clone(),
        validators: apis
            .iter()
            .map(|(hotkey, api)| ((*hotkey).clone(), api.parse().expect("a good address")))
            .collect(),
        backend: Backend::Cpu {
            count: 8,
            uuid_seed: "host-1".to_owned(),
        },
        profile: Profile::DEVELOPMENT,
        limits: Limits::default(),
    }
}

async fn bench_with(api: &str, whitelist: bool) -> Bench {
    drop(rustls::crypto::ring::default_provider().install_default());
    let [miner, validator, second] = [1, 2, 3].map(|byte| Signer::from_seed(&[byte; 32]));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let apis = [(validator.hotkey(), api), (second.hotkey(), "http://127.0.0.1:9")];
    let apis = if whitelist { &apis[..] } else { &[] };
    let clock = Arc::new(SetClock(AtomicU64::new(NOW.0)));
    let config = config(&folder, miner.hotkey(), apis);
    let plane = Plane::bind(config, Arc::clone(&clock) as Arc<dyn Clock>)
        .await
        .expect("free doors");
    let shutdown = CancellationToken::new();
    Bench {
        address: plane.address(),
        http: Client::builder().no_proxy().build().expect("a client"),
        miner,
        validator,
        second,
        clock,
        folder,
        served: tokio::spawn(plane.serve(shutdown.clone())),
        stop: shutdown.drop_guard(),
    }
}

async fn bench() -> Bench {
    bench_with("http://127.0.0.1:9", true).await
}

impl Bench {
    fn signed(&self, by: &Signer, tail: &Tail<'_>) -> Headers {
        headers_to_miner(by, self.miner.hotkey(), self.clock.now(), tail)
    }

    async fn send(&self, method: Method, path: &str, headers: &Headers, body: &[u8]) -> (StatusCode, String) {
        let mut request = self
            .http
            .request(method, format!("http://{}{path}", self.address));
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let response = request.body(body.to_vec()).send().await.expect("an answer");
        let status = response.status();
        (status, response.text().await.expect("a whole answer"))
    }

    async fn get(&self, path: &str, headers: &Headers) -> (StatusCode, String) {
        self.send(Method::GET, path, headers, b"").await
    }

    async fn post_signed(&self, path: &str, body: &[u8]) -> (StatusCode, String) {
        let headers = self.signed(&self.validator, &Tail::Body(body));
        self.send(Method::POST, path, &headers, body).await
    }

    async fn devices(&self) -> DevicesAnswer {
        let headers = self.signed(&self.miner, &GRAVAL);
        let (status, text) = self.get("/devices", &headers).await;
        assert_eq!(status, StatusCode::OK, "{text}");
        serde_json::from_str(&text).expect("devices")
    }

    /// A request over the Unix socket; the whole answer as text.
    async fn local(&self, path: &str) -> String {
        let socket = self.folder.path().join("run/proof.sock");
        let mut stream = tokio::net::UnixStream::connect(socket).await.expect("a door");
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("an open door");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("a whole answer");
        answer
    }
}

fn detail(text: &str) -> String {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|_| panic!("not JSON: {text}"));
    value["detail"].as_str().expect("a detail").to_owned()
}

/// Section 5.3 of the protocol reference, step by step.
#[tokio::test]
async fn a_whole_verification_succeeds() {
    let bench = bench().await;
    assert_eq!(
        bench.get("/ping", &vec![]).await,
        (StatusCode::OK, "pong".to_owned())
    );
    let devices = bench.devices().await.devices;
    assert_eq!(devices.len(), 8);

    for number in 0..20_u8 {
        let challenge = format!("{number:02x}{}", "9c".repeat(31));
        let headers = bench.signed(&bench.validator, &GRAVAL);
        let (status, answer) = bench.get(&format!("/info?challenge={challenge}"), &headers).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        assert!(proof::verify_device_challenge(&devices, &challenge, &answer));
    }

    // A seed that a double cannot hold.
    let (seed, iterations, secret) = (u64::MAX - 2, 2, "decrypt me please: 5e0c");
    let ciphertext: BTreeMap<_, _> = devices
        .iter()
        .map(|device| {
            let iv = [9; 16];
            let blob = proof::encrypt(device, secret, seed, iterations, iv, &Profile::DEVELOPMENT);
            (device.uuid.to_string(), BASE64.encode(blob))
        })
        .collect();
    let body = json!({"seed": seed, "iterations": iterations, "ciphertext": ciphertext}).to_string();
    let (status, text) = bench.post_signed("/prove", body.as_bytes()).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let answer: ProveAnswer = serde_json::from_str(&text).expect("the answer's shape");
    assert_eq!(answer.seed, seed);
    assert_eq!(answer.devices, devices);
    assert_eq!((answer.proof.len(), answer.plaintext.len()), (8, 8));
    for (place, device) in devices.iter().enumerate() {
        assert_eq!(answer.plaintext[&device.uuid], secret);
        let proved = &answer.proof[&device.uuid];
        assert_eq!((proved.device_id, &proved.device_uuid), (place, &device.uuid));
        assert!(proof::check(
            device,
            seed,
            &proved.work_product,
            5,
            &Profile::DEVELOPMENT
        ));
    }
    let metrics = bench.local("/metrics").await;
    for line in [
        r#"proof_requests_total{route="/info",status="200"} 20"#,
        r#"proof_requests_total{route="/prove",status="200"} 1"#,
        "proof_duration_seconds_count 1",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
}

#[tokio::test]
async fn answers_have_their_golden_form() {
    let bench = bench().await;
    let headers = bench.signed(&bench.miner, &GRAVAL);
    let (_, text) = bench.get("/devices", &headers).await;
    let start = r#"{"devices":[{"uuid":"0f3fccb9c44cb3aa3e726a9cf9f8ff25","name":"Software GPU","memory":17179869184,"processors":8,"clock_rate":1500000.0,"max_threads_per_processor":1024},{"uuid":"#;
    assert!(text.starts_with(start), "{text}");
    let local = bench.local("/devices").await;
    assert!(
        local.starts_with("HTTP/1.1 200 ") && local.ends_with(&text),
        "{local}"
    );

    let (status, text) = bench
        .post_signed("/prove", br#"{"seed":18446744073709551615}"#)
        .await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let mut answer: Value = serde_json::from_str(&text).expect("JSON");
    assert!(
        text.contains(r#""seed":18446744073709551615"#),
        "all 64 bits: {text}"
    );
    assert_eq!(answer["plaintext"], json!({}));
    assert_eq!(answer["devices"].as_array().map(Vec::len), Some(8));
    let first = answer["proof"]["0f3fccb9c44cb3aa3e726a9cf9f8ff25"].take();
    let hashes = first["work_product"]["intermediate_hashes"].clone();
    assert_eq!(hashes.as_array().map(Vec::len), Some(8));
    assert_eq!(
        first,
        json!({
            "device_id": 0,
            "device_uuid": "0f3fccb9c44cb3aa3e726a9cf9f8ff25",
            "device_name": "Software GPU",
            "work_product": {"intermediate_hashes": hashes, "num_matrices": 8, "total_iterations": 1},
        })
    );
    assert_eq!(
        hashes[0],
        "3c2e4f112f98cb6376d58fec13fc1b8f5ee448d55287f650df9e29508db4fb26"
    );
    let members: Vec<_> = answer.as_object().expect("an object").keys().collect();
    assert_eq!(members, ["devices", "plaintext", "proof", "seed"]);
}

#[tokio::test]
async fn wrongly_signed_requests_are_refused() {
    let bench = bench().await;
    let stranger = Signer::from_seed(&[9; 32]);
    let info = format!("/info?challenge={}", "ab".repeat(32));
    let body = br#"{"seed":1}"#;
    let good = |tail: &Tail<'_>| bench.signed(&bench.validator, tail);
    let at = |ms: i64, tail: &Tail<'_>| {
        let now = UnixMillis(NOW.0.checked_add_signed(ms).expect("near"));
        headers_to_miner(&bench.validator, bench.miner.hotkey(), now, tail)
    };
    let without = |missing: usize| {
        let mut headers = good(&GRAVAL);
        headers.remove(missing);
        headers
    };
    let with = |place: usize, value: &str| {
        let mut headers = good(&GRAVAL);
        headers[place].1 = value.to_owned();
        headers
    };
    let other_miner = headers_to_miner(&bench.validator, stranger.hotkey(), NOW, &GRAVAL);
    let body_tail = Tail::Body(body);
    let other_body = Tail::Body(br#"{"seed":2}"#);
    let get = |headers| (Method::GET, info.as_str(), headers, &b""[..]);
    let prove = |headers| (Method::POST, "/prove", headers, &body[..]);
    let devices = |headers| (Method::GET, "/devices", headers, &b""[..]);
    let rows = [
        (get(vec![]), "missing header X-Chutes-Miner"),
        (get(without(0)), "missing header X-Chutes-Miner"),
        (get(without(1)), "missing header X-Chutes-Validator"),
        (get(without(2)), "missing header X-Chutes-Nonce"),
        (get(without(3)), "missing header X-Chutes-Signature"),
        (get(with(3, "")), "missing header X-Chutes-Signature"),
        (get(other_miner), "is not this miner"),
        (get(bench.signed(&stranger, &GRAVAL)), "signer is not allowed"),
        (get(bench.signed(&bench.miner, &GRAVAL)), "signer is not allowed"),
        (get(with(2, "12345678x")), "not a whole number"),
        (get(with(2, "1735689599")), "does not match"),
        (get(with(3, "zz")), "not 128 hexadecimal digits"),
        (get(with(3, &"0".repeat(128))), "does not match"),
        (get(at(-30_000, &GRAVAL)), "30 s away"),
        (get(at(30_000, &GRAVAL)), "30 s away"),
        (get(at(600_000, &GRAVAL)), "600 s away"),
        (get(good(&body_tail)), "does not match"),
        (get(good(&Tail::Purpose(Purpose::Miner))), "does not match"),
        (devices(good(&GRAVAL)), "signer is not allowed"),
        (devices(bench.signed(&bench.miner, &body_tail)), "does not match"),
        (prove(vec![]), "missing header"),
        (prove(good(&GRAVAL)), "does not match"),
        (prove(good(&other_body)), "does not match"),
        (prove(good(&Tail::Body(b""))), "does not match"),
        (
            prove(bench.signed(&stranger, &body_tail)),
            "signer is not allowed",
        ),
        (
            prove(bench.signed(&bench.miner, &body_tail)),
            "signer is not allowed",
        ),
        (prove(at(-31_000, &body_tail)), "31 s away"),
    ];
    for (number, ((method, path, headers, body), reason)) in rows.iter().enumerate() {
        let (status, text) = bench.send(method.clone(), path, headers, body).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "row {number}: {text}");
        assert!(
            detail(&text).contains(reason),
            "row {number}: {text} instead of {reason}"
        );
    }
    // Just inside the window, both ways, and by the second validator: accepted.
    for headers in [
        at(-29_000, &GRAVAL),
        at(29_000, &GRAVAL),
        bench.signed(&bench.second, &GRAVAL),
    ] {
        assert_eq!(bench.get(&info, &headers).await.0, StatusCode::OK);
    }
}

#[tokio::test]
async fn nobody_is_let_in_without_a_configured_validator() {
    let bench = bench_with("http://127.0.0.1:9", false).await;
    let headers = bench.signed(&bench.validator, &GRAVAL);
    let path = format!("/info?challenge={}", "ab".repeat(32));
    assert_eq!(bench.get(&path, &headers).await.0, StatusCode::UNAUTHORIZED);
    let (status, _) = bench.post_signed("/prove", br#"{"seed":1}"#).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    let (status, _) = bench.post_signed("/remote_token", br#"{"token_url":"x"}"#).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn a_captured_signature_repeats_its_own_request_only() {
    let bench = bench().await;
    let body = br#"{"seed":1,"token_url":"http://127.0.0.1:1/"}"#;
    let headers = bench.signed(&bench.validator, &Tail::Body(body));
    let send = async |path, body: &[u8]| bench.send(Method::POST, path, &headers, body).await;
    let (status, first) = send("/prove", body).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(
        send("/prove", body).await,
        (StatusCode::OK, first),
        "the identical request"
    );
    let (status, text) = send("/prove", br#"{"seed":2}"#).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED, "{text}");
    let (status, text) = send("/remote_token", body).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED, "{text}");
    assert!(
        detail(&text).contains("already used for another request"),
        "{text}"
    );

    // The word `graval` binds nothing: a read must not become a fetch.
    let headers = bench.signed(&bench.validator, &GRAVAL);
    for challenge in ["ab", "cd"] {
        let path = format!("/info?challenge={}", challenge.repeat(32));
        assert_eq!(
            bench.get(&path, &headers).await.0,
            StatusCode::OK,
            "reads may share one"
        );
    }
    let (status, text) = bench.send(Method::POST, "/remote_token", &headers, body).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    assert!(
        detail(&text).contains("already used for another request"),
        "{text}"
    );

    // Upper-case digits are the same signature.
    let mut upper = headers.clone();
    upper[3].1 = upper[3].1.to_uppercase();
    let (status, _) = bench.send(Method::POST, "/remote_token", &upper, body).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);

    bench.clock.0.store(NOW.0 + 30_000, Ordering::SeqCst);
    let path = format!("/info?challenge={}", "ab".repeat(32));
    assert_eq!(
        bench.get(&path, &headers).await.0,
        StatusCode::UNAUTHORIZED,
        "and it expires"
    );
}

#[tokio::test]
async fn bad_input_is_named_and_never_an_internal_error() {
    let bench = bench().await;
    let uuid = bench.devices().await.devices[0].uuid.to_string();
    let with_ciphertext = |key: &str, value: &str| {
        json!({"seed": 1, "ciphertext": {key: value}})
            .to_string()
            .into_bytes()
    };
    let other_seed = proof::encrypt(
        &bench.devices().await.devices[0],
        "text",
        2,
        1,
        [1; 16],
        &Profile::DEVELOPMENT,
    );
    let unprocessable = [
        (b"".to_vec(), "body"),
        (b"null".to_vec(), "body"),
        (b"[]".to_vec(), "body"),
        (b"{\"seed\":1".to_vec(), "body"),
        (b"\xff\xfe".to_vec(), "body"),
        (b"{}".to_vec(), "missing field `seed`"),
        (br#"{"seed":-1}"#.to_vec(), "integer `-1`"),
        (br#"{"seed":"1"}"#.to_vec(), "invalid type"),
        (br#"{"seed":1.5}"#.to_vec(), "invalid type"),
        (br#"{"seed":18446744073709551616}"#.to_vec(), "invalid type"),
        (br#"{"seed":null}"#.to_vec(), "invalid type"),
        (
            br#"{"seed":1,"iterations":0}"#.to_vec(),
            "iterations must be 1 to 10",
        ),
        (
            br#"{"seed":1,"iterations":11}"#.to_vec(),
            "iterations must be 1 to 10",
        ),
        (br#"{"seed":1,"iterations":-1}"#.to_vec(), "body"),
        (br#"{"seed":1,"ciphertext":[]}"#.to_vec(), "invalid type"),
        (br#"{"seed":1,"ciphertext":{"x":1}}"#.to_vec(), "invalid type"),
        (with_ciphertext("nonsense", "AAAA"), "no such GPU"),
        (with_ciphertext(&"00".repeat(16), "AAAA"), "no such GPU"),
        (with_ciphertext(&uuid.to_uppercase(), "AAAA"), "no such GPU"),
        (with_ciphertext(&uuid, "***"), "not base64"),
        (with_ciphertext(&uuid, ""), "was not made for this GPU"),
        (
            with_ciphertext(&uuid, &BASE64.encode([0; 40])),
            "was not made for this GPU",
        ),
        (
            with_ciphertext(&uuid, &BASE64.encode(&other_seed)),
            "was not made for this GPU",
        ),
        (with_ciphertext(&uuid, &BASE64.encode([0; 5000])), "too long"),
    ];
    for (body, reason) in unprocessable {
        let (status, text) = bench.post_signed("/prove", &body).await;
        let shown = String::from_utf8_lossy(&body);
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{shown:.80}: {text}");
        assert!(
            detail(&text).contains(reason),
            "{shown:.80}: {text} instead of {reason}"
        );
    }
    let deep = "[".repeat(20_000);
    let (status, _) = bench.post_signed("/prove", deep.as_bytes()).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    let (status, text) = bench.post_signed("/prove", &vec![b' '; BODY_BYTES_MAX + 1]).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{text}");
    let (status, _) = bench
        .post_signed("/remote_token", &vec![b' '; BODY_BYTES_MAX + 1])
        .await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);

    let headers = bench.signed(&bench.validator, &GRAVAL);
    for query in [
        "",
        "?challenge=",
        "?challenge=00",
        "?other=1",
        "?challenge=%ff",
        "?challenge=zz",
    ] {
        let (status, text) = bench.get(&format!("/info{query}"), &headers).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{query}: {text}");
    }
    for (method, path, expected) in [
        (Method::POST, "/info", StatusCode::METHOD_NOT_ALLOWED),
        (Method::GET, "/prove", StatusCode::METHOD_NOT_ALLOWED),
        (Method::DELETE, "/devices", StatusCode::METHOD_NOT_ALLOWED),
        (Method::GET, "/", StatusCode::NOT_FOUND),
        (Method::GET, "/metrics", StatusCode::NOT_FOUND),
        (Method::GET, "/devices/..", StatusCode::NOT_FOUND),
    ] {
        let (status, text) = bench.send(method, path, &vec![], b"").await;
        assert_eq!(status, expected, "{path}");
        assert!(!detail(&text).is_empty());
    }
    // Still well after all that.
    let (status, _) = bench.post_signed("/prove", br#"{"seed":1,"more":[1]}"#).await;
    assert_eq!(status, StatusCode::OK, "unknown members are ignored");
}

#[tokio::test]
async fn a_burst_of_requests_is_limited() {
    let bench = bench().await;
    let mut limited = 0;
    for _ in 0..1000 {
        let (status, text) = bench.get("/ping", &vec![]).await;
        match status {
            StatusCode::OK => assert_eq!(text, "pong"),
            StatusCode::TOO_MANY_REQUESTS => limited += 1,
            other => panic!("{other}: {text}"),
        }
        if limited > 0 {
            return;
        }
    }
    panic!("1000 requests at once were all answered");
}

#[tokio::test]
async fn one_address_cannot_take_all_connections() {
    let bench = bench().await;
    let mut open = Vec::new();
    // Fewer than the door has in all: the limit of one address is met first.
    for _ in 0..100 {
        let mut stream = tokio::net::TcpStream::connect(bench.address)
            .await
            .expect("a door");
        // A closed connection may refuse the request already, or end before an answer.
        let request = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n";
        let mut answer = [0; 12];
        let served = stream.write_all(request).await.is_ok() && stream.read_exact(&mut answer).await.is_ok();
        if !served {
            break;
        }
        assert_eq!(&answer, b"HTTP/1.1 200");
        open.push(stream);
    }
    assert_eq!(open.len(), 32);
    let other = tokio::net::TcpSocket::new_v4().expect("a socket");
    other
        .bind(([127, 0, 0, 2], 0).into())
        .expect("all of 127/8 is loopback");
    let mut stream = other.connect(bench.address).await.expect("a door");
    let request = b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    stream.write_all(request).await.expect("an open door");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    assert!(answer.ends_with("pong"), "another address is served: {answer}");
}

/// A validator's API as far as `/remote_token` needs it.
async fn token_api() -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let address = listener.local_addr().expect("bound");
    let routes = axum::Router::new()
        .route("/good", axum::routing::get(async || r#"{"token":"a-token"}"#))
        .route("/long", axum::routing::get(async || "x".repeat(1 << 20)))
        .route("/none", axum::routing::get(async || "{}"))
        .route(
            "/away",
            axum::routing::get(async || axum::response::Redirect::to("/good")),
        );
    tokio::spawn(async move { axum::serve(listener, routes).await });
    format!("http://{address}")
}

#[tokio::test]
async fn remote_tokens_come_from_the_asking_validators_api_only() {
    let api = token_api().await;
    let elsewhere = token_api().await;
    let bench = bench_with(&api, true).await;
    let ask = |url: String| json!({"token_url": url}).to_string().into_bytes();
    for (url, expected) in [
        (format!("{api}/good"), StatusCode::OK),
        (format!("{api}/long"), StatusCode::BAD_GATEWAY),
        (format!("{api}/none"), StatusCode::BAD_GATEWAY),
        (format!("{api}/away"), StatusCode::BAD_GATEWAY),
        (format!("{api}/missing"), StatusCode::BAD_GATEWAY),
        (format!("{elsewhere}/good"), StatusCode::UNPROCESSABLE_ENTITY),
        (
            "file:///etc/hostname".to_owned(),
            StatusCode::UNPROCESSABLE_ENTITY,
        ),
        (String::new(), StatusCode::UNPROCESSABLE_ENTITY),
    ] {
        let body = ask(url.clone());
        for tail in [Tail::Body(&body), GRAVAL] {
            let headers = bench.signed(&bench.validator, &tail);
            let (status, text) = bench.send(Method::POST, "/remote_token", &headers, &body).await;
            assert_eq!(status, expected, "{url}: {text}");
            if status == StatusCode::OK {
                assert_eq!(text, "a-token");
            }
        }
    }
    // The second validator has another API.
    let body = ask(format!("{api}/good"));
    let headers = bench.signed(&bench.second, &Tail::Body(&body));
    let (status, _) = bench.send(Method::POST, "/remote_token", &headers, &body).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    let (status, _) = bench.post_signed("/remote_token", br#"{"token_url":1}"#).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
}

#[tokio::test]
async fn the_local_door_is_private_and_survives_a_restart() {
    let bench = bench().await;
    let socket = bench.folder.path().join("run/proof.sock");
    let mode = |path: &std::path::Path| {
        let meta = std::fs::metadata(path).expect("it is there");
        meta.permissions().mode() & 0o777
    };
    assert_eq!(
        (mode(&socket), mode(socket.parent().expect("a folder"))),
        (0o600, 0o700)
    );
    assert!(bench.local("/prove").await.starts_with("HTTP/1.1 404 "));
    let Bench {
        served,
        stop,
        folder,
        miner,
        ..
    } = bench;
    drop(stop);
    served.await.expect("a clean end");
    assert!(socket.exists(), "what a killed process leaves behind, too");
    let again = Plane::bind(
        config(&folder, miner.hotkey(), &[]),
        Arc::new(SetClock(AtomicU64::new(0))),
    );
    assert!(again.await.is_ok());
}

#[tokio::test]
async fn impossible_configurations_do_not_start() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let miner = Signer::from_seed(&[1; 32]);
    let good = config(&folder, miner.hotkey(), &[]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let rows: [(Config, &str); 3] = [
        (
            Config {
                profile: Profile::STANDARD,
                ..good.clone()
            },
            "CPU backend: profile standard",
        ),
        (
            Config {
                listen: taken.local_addr().expect("bound"),
                ..good.clone()
            },
            "listen on 127.0.0.1",
        ),
        (
            Config {
                socket: "/proc/nowhere/proof.sock".into(),
                ..good.clone()
            },
            "listen on /proc/nowhere",
        ),
    ];
    for (config, reason) in rows {
        let error = run(config, CancellationToken::new()).await.expect_err(reason);
        assert!(error.to_string().starts_with(reason), "{error}");
    }
    let cuda = Config {
        backend: Backend::Cuda,
        ..good
    };
    // A machine with cards starts; one without says what is missing.
    let stopped = CancellationToken::new();
    stopped.cancel();
    match run(cuda, stopped).await {
        Ok(()) => {}
        Err(error @ Error::Cuda(_)) => assert!(error.to_string().starts_with("CUDA backend: "), "{error}"),
        Err(other) => panic!("{other}"),
    }
}
