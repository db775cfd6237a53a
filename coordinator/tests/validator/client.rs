//! The REST client against a scripted validator on a loopback port: what it sends and signs, what it makes of
//! good, odd and bad answers, and what it repeats.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, Method, Response, StatusCode, Uri};
use axum::{Router, serve};
use coordinator::clock::{Clock, WallClock};
use coordinator::signer::key::{Key, Seed};
use coordinator::signer::{self, LocalSigner, MessageKind, SealedKind, Sign};
use coordinator::validator::client::{Deletion, Verification, await_verification};
use coordinator::validator::directory::{Directory, ValidatorSettings};
use coordinator::validator::http::Limits;
use coordinator::validator::inventory::Observed;
use coordinator::validator::rows::{NewServer, NodeAdvertisement, VerificationStatus};
use coordinator::validator::{Client, Error, LeadsNow, Listing, ValidatorApi, observe};
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use protocol::gpu::DeviceInfo;
use protocol::hotkey::{Hotkey, Signer};
use protocol::id::{ChuteId, ChuteVersion, GpuId, InstanceId, JobId, ServerId};
use protocol::signing::{Headers, Purpose, Tail, check_request_to_validator};
use protocol::time::UnixMillis;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

#[derive(Debug, Clone)]
struct Request {
    method: Method,
    uri: String,
    headers: HeaderMap,
    body: Bytes,
}

impl Request {
    fn signed_for(&self, tail: &Tail<'_>) -> bool {
        let header = |name: &str| self.headers.get(name).and_then(|value| value.to_str().ok());
        let signer = check_request_to_validator(header, WallClock.now(), 600, tail);
        signer.as_ref() == Ok(Signer::from_seed(&[1; 32]).hotkey())
    }
}

type Script = dyn Fn(&Request, usize) -> Response<Body> + Send + Sync;

struct Validator {
    port: u16,
    client: Client,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl Validator {
    fn seen(&self) -> Vec<Request> {
        self.seen.lock().expect("no panic while recording").clone()
    }
}

fn limits() -> Limits {
    Limits {
        pause: Duration::from_millis(1),
        body_bytes: 100_000,
        ..Limits::default()
    }
}

fn local_signer() -> LocalSigner {
    LocalSigner::new(Key::new(&Seed::new([1; 32])), Arc::new(WallClock))
}

fn client_of(port: u16) -> Client {
    client_while(port, Arc::new(local_signer()), Arc::new(|| true))
}

fn client_while(port: u16, signer: Arc<dyn Sign>, leads_now: LeadsNow) -> Client {
    let address = format!("http://127.0.0.1:{port}");
    let settings = ValidatorSettings {
        hotkey: Signer::from_seed(&[2; 32]).hotkey().to_string(),
        socket: address.replace("http", "ws"),
        registry: address.clone(),
        api: address,
    };
    let directory = Directory::check(&[settings]).expect("loopback");
    let validator = directory.iter().next().expect("one").clone();
    let rng = fastrand::Rng::with_seed(1);
    Client::new(&validator, signer, Arc::new(WallClock), limits(), leads_now, rng).expect("TLS is set up")
}

/// A validator that answers by a script; the script gets the number of requests before this one.
async fn validator(script: impl Fn(&Request, usize) -> Response<Body> + Send + Sync + 'static) -> Validator {
    let seen: Arc<Mutex<Vec<Request>>> = Arc::default();
    let (record, script): (_, Arc<Script>) = (Arc::clone(&seen), Arc::new(script));
    let answer = async move |method: Method, uri: Uri, headers: HeaderMap, body: Bytes| {
        let request = Request {
            method,
            uri: uri.to_string(),
            headers,
            body,
        };
        let before = {
            let mut seen = record.lock().expect("no panic while recording");
            seen.push(request.clone());
            seen.len() - 1
        };
        script(&request, before)
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move { serve(listener, Router::new().fallback(answer)).await });
    Validator {
        port,
        client: client_of(port),
        seen,
    }
}

fn answer(status: u16, body: impl Into<Body>) -> Response<Body> {
    let mut response = Response::new(body.into());
    *response.status_mut() = StatusCode::from_u16(status).expect("a status");
    response
}

fn chute() -> ChuteId {
    ChuteId::parse("c1").expect("test data")
}

fn instance() -> InstanceId {
    InstanceId::parse("n1").expect("test data")
}

#[tokio::test]
async fn streams_are_signed_and_unknown_is_not_empty() {
    let two = "data: {\"instance_id\":\"n1\",\"chute_id\":\"c1\"}\n\ndata: {\"instance_id\":\"n2\",\"chute_id\":\"c1\"}\n\n";
    let broken = "data: {\"instance_id\":\"n1\",\"chute_id\":\"c1\"}\n\ndata: {\"chute_id\":7}\n\n";
    for (body, expected) in [
        (two, Some((2, 0))),
        (broken, Some((1, 1))),
        ("data: NO_ITEMS\n", Some((0, 0))),
        ("", None),
        ("data: {\"instance_id\"", None),
    ] {
        let validator = validator(move |_, _| answer(200, body)).await;
        let listing = validator.client.instances().await.expect("an answer");
        let got = match &listing {
            Listing::Unknown => None,
            Listing::Known { rows, broken_rows } => Some((rows.len(), *broken_rows)),
        };
        assert_eq!(got, expected, "{body:?}");
        let seen = validator.seen();
        assert_eq!(seen[0].uri, "/miner/instances/?explicit_null=True");
        assert!(seen[0].signed_for(&Tail::Purpose(Purpose::Miner)));
    }
}

#[tokio::test]
async fn a_stream_that_breaks_off_is_unknown() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let client = client_of(listener.local_addr().expect("bound").port());
    let cut = async {
        let (mut stream, _) = listener.accept().await.expect("it connects");
        let mut request = [0; 4096];
        assert!(stream.read(&mut request).await.expect("a request") > 0);
        let row = "data: {\"chute_id\":\"c1\",\"version\":\"v1\"}\n\n";
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        let piece = format!("{head}{:x}\r\n{row}\r\n", row.len());
        // Whole rows, but the final chunk never comes.
        stream.write_all(piece.as_bytes()).await.expect("it reads");
    };
    let (listing, ()) = tokio::join!(client.chutes(), cut);
    assert_eq!(listing, Ok(Listing::Unknown));
}

#[tokio::test]
async fn reads_are_repeated_a_few_times_and_writes_never() {
    let flaky = validator(|_, before| match before {
        0 | 1 => answer(503, "busy"),
        _ => answer(200, "[]"),
    })
    .await;
    let bounties = flaky.client.bounties().await.expect("the third try");
    assert_eq!(bounties.complete(), Some(&[][..]), "an empty array is empty");
    assert_eq!(flaky.seen().len(), 3);
    let down = validator(|_, _| answer(503, "busy")).await;
    let api = &down.client;
    assert_eq!(api.utilization().await.expect_err("down").status(), Some(503));
    assert_eq!(down.seen().len(), 3);
    assert!(api.chutes().await.is_err());
    assert_eq!(down.seen().len(), 6);
    // These change something there, or count as an attempt.
    assert!(api.launch_config(&chute(), None).await.is_err());
    assert!(api.delete_instance(&chute(), &instance()).await.is_err());
    assert!(api.activate_instance(&chute(), &instance()).await.is_err());
    assert!(api.upload_audit(b"{}", 7).await.is_err());
    assert_eq!(down.seen().len(), 10);
}

/// Signs, and stands still meanwhile for so long that another member leads afterwards.
#[derive(Debug)]
struct SlowSigner {
    inner: LocalSigner,
    leads: Arc<AtomicBool>,
}

impl Sign for SlowSigner {
    fn hotkey(&self) -> &Hotkey {
        self.inner.hotkey()
    }

    fn to_validator(&self, kind: MessageKind) -> BoxFuture<'_, signer::Result<Headers>> {
        self.leads.store(false, Ordering::Relaxed);
        self.inner.to_validator(kind)
    }

    fn seal<'a>(&'a self, kind: SealedKind, plaintext: &'a [u8]) -> BoxFuture<'a, signer::Result<Vec<u8>>> {
        self.inner.seal(kind, plaintext)
    }

    fn unseal<'a>(&'a self, kind: SealedKind, sealed: &'a [u8]) -> BoxFuture<'a, signer::Result<Vec<u8>>> {
        self.inner.unseal(kind, sealed)
    }
}

/// A leader that was paused still told validators what it had begun to when it woke, before it heard that another one
/// led.
#[tokio::test]
async fn a_member_that_leads_no_more_writes_nothing() {
    let there = validator(|_, _| answer(200, "[]")).await;
    let leads = Arc::new(AtomicBool::new(true));
    let signer = SlowSigner {
        inner: local_signer(),
        leads: Arc::clone(&leads),
    };
    let asked = Arc::clone(&leads);
    let leads_now = Arc::new(move || asked.load(Ordering::Relaxed));
    let api = client_while(there.port, Arc::new(signer), leads_now);
    let server = ServerId::parse("s1").expect("test data");
    let gpu = GpuId::parse("g1").expect("test data");
    let (chute, instance, job) = (chute(), instance(), JobId::parse("j1").expect("test data"));
    let worker = new_server(Vec::new());
    let writes = [
        api.launch_config(&chute, None).map(|done| done.map(drop)).boxed(),
        api.delete_instance(&chute, &instance)
            .map(|done| done.map(drop))
            .boxed(),
        api.release_job(&job).map(|done| done.map(drop)).boxed(),
        api.announce_instance(&chute, &[], "192.0.2.1", 1)
            .map(|done| done.map(drop))
            .boxed(),
        api.activate_instance(&chute, &instance)
            .map(|done| done.map(drop))
            .boxed(),
        api.advertise(&server, &[]).map(|done| done.map(drop)).boxed(),
        api.delete_node(&gpu).map(|done| done.map(drop)).boxed(),
        api.add_server(&worker).boxed(),
        api.delete_server(&server).map(|done| done.map(drop)).boxed(),
        api.upload_audit(b"{}", 7),
    ];
    for (number, write) in writes.into_iter().enumerate() {
        leads.store(true, Ordering::Relaxed);
        assert_eq!(write.await, Err(Error::NotLeading), "write {number}");
    }
    assert_eq!(there.seen().len(), 0, "nothing was sent");
    // Whoever leads not may look.
    api.bounties().await.expect("a read");
    assert_eq!(there.seen().len(), 1);
}

#[tokio::test]
async fn refusals_keep_their_status_and_reason() {
    for (status, body, detail) in [
        (401, r#"{"detail":"nonce"}"#, "nonce"),
        (403, r#"{"detail":"blacklisted"}"#, "blacklisted"),
        (404, "not\nhere\u{7}", "not here"),
        (409, r#"{"detail":[{"loc":["body"]}]}"#, r#"[{"loc":["body"]}]"#),
        (423, r#"{"detail":"at capacity"}"#, "at capacity"),
        (429, "", ""),
        (302, "", ""),
    ] {
        let validator = validator(move |_, _| {
            let mut answer = answer(status, body);
            answer
                .headers_mut()
                .insert("location", "http://127.0.0.1:1/".parse().expect("a value"));
            answer
        })
        .await;
        let error = validator
            .client
            .launch_config(&chute(), None)
            .await
            .expect_err("refused");
        let expected = Error::Refused {
            status,
            detail: detail.to_owned(),
        };
        assert_eq!(error, expected);
        assert_eq!(validator.seen().len(), 1, "nothing is followed or repeated");
    }
    let port = {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        listener.local_addr().expect("bound").port()
    };
    let error = client_of(port).ping().await.expect_err("nobody is there");
    assert!(
        matches!(&error, Error::Unreachable(_)) && error.is_transient(),
        "{error}"
    );
}

#[tokio::test]
async fn a_launch_config_is_asked_for_and_its_token_hidden() {
    let validator = validator(|_, _| answer(200, r#"{"token":"ey.J.x","config_id":"l1"}"#)).await;
    let job = JobId::parse("j1").expect("test data");
    let config = validator
        .client
        .launch_config(&chute(), Some(&job))
        .await
        .expect("granted");
    assert_eq!((config.token.reveal(), config.config.as_str()), ("ey.J.x", "l1"));
    assert!(!format!("{config:?}").contains("ey.J.x"));
    let seen = validator.seen();
    assert_eq!(seen[0].uri, "/instances/launch_config?chute_id=c1&job_id=j1");
    assert!(seen[0].signed_for(&Tail::Purpose(Purpose::Launch)));
}

#[tokio::test]
async fn malformed_answers_are_errors_that_repeat_no_content() {
    for body in [
        "",
        "{",
        "[]",
        r#"{"token":7}"#,
        r#"{"token":"secret"}"#,
        r#"{"token":"secret","config_id":"a/b"}"#,
    ] {
        let validator = validator(move |_, _| answer(200, body)).await;
        let error = validator
            .client
            .launch_config(&chute(), None)
            .await
            .expect_err("malformed");
        assert!(matches!(&error, Error::Protocol(_)), "{body}: {error}");
        assert!(!error.to_string().contains("secret"), "{error}");
    }
    let large = validator(|_, _| answer(200, vec![b' '; 200_000])).await;
    assert_eq!(large.client.bounties().await, Err(Error::TooLarge(100_000)));
}

#[tokio::test]
async fn deletions_are_done_when_nothing_is_there() {
    let gpu = GpuId::from_device_uuid(&"ab".repeat(16)).expect("test data");
    let job = JobId::parse("j1").expect("test data");
    for (status, expected) in [(200, Deletion::Deleted), (404, Deletion::AlreadyGone)] {
        let validator = validator(move |_, _| answer(status, "null")).await;
        let api = &validator.client;
        assert_eq!(api.delete_instance(&chute(), &instance()).await, Ok(expected));
        assert_eq!(api.delete_node(&gpu).await, Ok(expected));
        assert_eq!(api.release_job(&job).await, Ok(expected));
        let seen = validator.seen();
        let purposes = [Purpose::Instances, Purpose::Nodes, Purpose::Miner];
        let paths = [
            "/instances/c1/n1".to_owned(),
            format!("/nodes/{gpu}"),
            "/miner/jobs/j1".to_owned(),
        ];
        for ((request, purpose), path) in seen.iter().zip(purposes).zip(paths) {
            assert_eq!((&request.method, &request.uri), (&Method::DELETE, &path));
            assert!(request.signed_for(&Tail::Purpose(purpose)), "{path}");
        }
    }
    let refused = validator(|_, _| answer(401, r#"{"detail":"no"}"#)).await;
    assert!(
        refused
            .client
            .delete_node(&gpu)
            .await
            .expect_err("refused")
            .is_forbidden()
    );
}

#[tokio::test]
async fn gpus_are_advertised_with_a_signed_body_and_polled_until_decided() {
    let gpu = GpuId::from_device_uuid(&"ab".repeat(16)).expect("test data");
    let advertisement = NodeAdvertisement {
        device: DeviceInfo {
            uuid: gpu.clone(),
            name: "NVIDIA H100 80GB HBM3".to_owned(),
            memory: 85_031_714_816,
            processors: 132,
            clock_rate_khz: 1_980_000,
            max_threads_per_processor: 2048,
        },
        device_index: 0,
        gpu_identifier: "h100_sxm".to_owned(),
        verification_host: "203.0.113.7".to_owned(),
        verification_port: 30443,
    };
    let validator = validator(|request, before| match (request.method.as_str(), before) {
        ("POST", _) => answer(
            202,
            format!(
                r#"{{"nodes":[{{"uuid":"{}","seed":9223372036854775807,"_gpu_specs":{{}}}}],"task_id":"5X::7"}}"#,
                "ab".repeat(16)
            ),
        ),
        (_, 1) => answer(200, r#"{"status":"pending"}"#),
        // A poll that is lost does not end the waiting.
        (_, 2..=4) => answer(503, ""),
        (_, 5) => answer(200, r#"{"status":"failed","detail":"too fast"}"#),
        (_, 6) => answer(200, r#"{"status":"error","error":{"code":1}}"#),
        (_, 7) => answer(200, r#"{"status":"verified"}"#),
        _ => answer(200, r#"{"status":"pending"}"#),
    })
    .await;
    let api = &validator.client;
    let server = ServerId::parse("s1").expect("test data");
    let advertised = api.advertise(&server, &[advertisement]).await.expect("accepted");
    assert_eq!(advertised.task_id, "5X::7");
    assert_eq!(advertised.nodes[0].seed, Some(9_223_372_036_854_775_807));
    let post = &validator.seen()[0];
    assert_eq!(post.uri, "/nodes/");
    assert!(post.signed_for(&Tail::Body(&post.body)));
    assert_eq!(post.headers["content-type"], "application/json");
    let body: serde_json::Value = serde_json::from_slice(&post.body).expect("JSON");
    assert_eq!(body["server_id"], "s1");
    assert_eq!(body["nodes"][0]["uuid"], gpu.as_str());
    assert_eq!(body["nodes"][0]["gpu_identifier"], "h100_sxm");
    let (quick, long) = (Duration::from_millis(1), Duration::from_secs(30));
    let failed = await_verification(api, "5X::7", quick, long)
        .await
        .expect("decided");
    assert_eq!(failed, Verification::Failed("too fast".to_owned()));
    let error = api.verification_status("5X::7").await.expect("an answer");
    assert_eq!(error, VerificationStatus::Failed(r#"{"code":1}"#.to_owned()));
    let verified = await_verification(api, "5X::7", quick, long)
        .await
        .expect("decided");
    assert_eq!(verified, Verification::Verified);
    let forgotten = await_verification(api, "5X::7", quick, Duration::from_millis(20)).await;
    assert_eq!(forgotten, Ok(Verification::TimedOut));
    let poll = &validator.seen()[1];
    assert_eq!(poll.uri, "/nodes/verification_status?task_id=5X%3A%3A7");
    assert!(poll.signed_for(&Tail::Purpose(Purpose::Graval)));
}

fn new_server(gpus: Vec<NodeAdvertisement>) -> NewServer {
    NewServer {
        host: "192.0.2.7".to_owned(),
        id: ServerId::parse("6f1c2a9e-0000-4000-8000-000000000001").expect("test data"),
        name: "tee-1".to_owned(),
        gpus,
    }
}

#[tokio::test]
async fn a_sealed_worker_is_announced_with_a_signed_body_and_deleted_as_a_whole() {
    let validator = validator(|request, _| match request.method.as_str() {
        "POST" => answer(201, r#"{"server_id":"6f1c"}"#),
        _ => answer(404, r#"{"detail":"Server not found"}"#),
    })
    .await;
    let device = |processors| DeviceInfo {
        uuid: GpuId::parse("0123456789abcdef0123456789abcdef").expect("test data"),
        name: "NVIDIA H200".to_owned(),
        memory: 150_754_820_096,
        processors,
        clock_rate_khz: 1_980_000,
        max_threads_per_processor: processors * 16,
    };
    let gpu = |processors, device_index| NodeAdvertisement {
        device: device(processors),
        device_index,
        gpu_identifier: "h200".to_owned(),
        verification_host: "192.0.2.7".to_owned(),
        verification_port: 30443,
    };
    // The second one's attestation leaves out what may be left out.
    let server = new_server(vec![gpu(132, 0), gpu(0, 1)]);
    validator.client.add_server(&server).await.expect("taken");
    let deleted = validator.client.delete_server(&server.id).await;
    assert_eq!(deleted, Ok(Deletion::AlreadyGone));
    let seen = validator.seen();
    assert_eq!(
        (seen[0].method.as_str(), seen[0].uri.as_str()),
        ("POST", "/servers/")
    );
    assert!(seen[0].signed_for(&Tail::Body(&seen[0].body)));
    let row = |index: u32| {
        json!({
            "uuid": "0123456789abcdef0123456789abcdef", "name": "NVIDIA H200", "memory": 150_754_820_096_u64,
            "clock_rate": 1_980_000.0, "device_index": index, "gpu_identifier": "h200",
            "verification_host": "192.0.2.7", "verification_port": 30443,
        })
    };
    let mut whole = row(0);
    whole["processors"] = json!(132);
    whole["max_threads_per_processor"] = json!(2112);
    let expected = json!({
        "host": "192.0.2.7", "id": "6f1c2a9e-0000-4000-8000-000000000001", "name": "tee-1", "gpus": [whole, row(1)],
    });
    let sent: Value = serde_json::from_slice(&seen[0].body).expect("JSON");
    assert_eq!(sent, expected);
    assert_eq!(
        (seen[1].method.as_str(), seen[1].uri.as_str()),
        ("DELETE", "/servers/6f1c2a9e-0000-4000-8000-000000000001")
    );
    assert!(seen[1].signed_for(&Tail::Purpose(Purpose::Tee)));
}

#[tokio::test]
async fn the_flow_before_launch_configs_signs_its_bodies() {
    let row = r#"{"instance_id":"n1","chute_id":"c1","verified":false}"#;
    let validator = validator(move |request, _| match request.method {
        Method::POST => answer(202, row),
        _ => answer(200, row.replace("false", "true")),
    })
    .await;
    let api = &validator.client;
    let gpu = GpuId::from_device_uuid(&"ab".repeat(16)).expect("test data");
    let announced = api
        .announce_instance(&chute(), &[gpu], "203.0.113.7", 31_000)
        .await
        .expect("accepted");
    assert!(!announced.verified);
    assert!(
        api.activate_instance(&chute(), &instance())
            .await
            .expect("accepted")
            .verified
    );
    api.upload_audit(br#"{"miner_hotkey":"x"}"#, 4711)
        .await
        .expect("accepted");
    let seen = validator.seen();
    let routes: Vec<_> = seen
        .iter()
        .map(|request| format!("{} {}", request.method, request.uri))
        .collect();
    assert_eq!(
        routes,
        [
            "POST /instances/c1/",
            "PATCH /instances/c1/n1",
            "POST /audit/miner_data"
        ]
    );
    assert!(
        seen.iter()
            .all(|request| request.signed_for(&Tail::Body(&request.body)))
    );
    assert_eq!(
        seen[0].body,
        format!(
            r#"{{"host":"203.0.113.7","node_ids":["{}"],"port":31000}}"#,
            "ab".repeat(16)
        )
    );
    assert_eq!(seen[1].body, r#"{"active":true}"#);
    assert_eq!(seen[2].headers["x-chutes-block"], "4711");
}

#[tokio::test]
async fn single_chutes_gpu_types_and_the_clock_are_read() {
    let validator = validator(|request, _| {
        let mut answer = match request.uri.as_str() {
            "/miner/chutes/c1/v1" => answer(200, r#"{"chute_id":"c1","version":"v1","image":"a/b:c"}"#),
            "/nodes/supported" => answer(
                200,
                r#"{"h200":{"memory":140,"hourly_rate":2.3,"x":null},"l4":{}}"#,
            ),
            "/ping" => answer(200, r#"{"message":"pong"}"#),
            _ => answer(404, r#"{"detail":"no longer current"}"#),
        };
        let date = "Wed, 01 Jan 2025 00:00:00 GMT".parse().expect("a value");
        answer.headers_mut().insert("date", date);
        answer
    })
    .await;
    let api = &validator.client;
    assert_eq!(api.clock_offset_ms(), None);
    let version = |text| ChuteVersion::parse(text).expect("test data");
    let current = api
        .chute(&chute(), &version("v1"))
        .await
        .expect("an answer")
        .expect("current");
    assert_eq!(current.image, "a/b:c");
    assert_eq!(api.chute(&chute(), &version("v0")).await, Ok(None));
    let gpus = api.supported_gpus().await.expect("an answer");
    assert_eq!(gpus["h200"].hourly_rate_usd_micros, Some(2_300_000));
    assert_eq!(gpus.keys().collect::<Vec<_>>(), ["h200", "l4"]);
    api.ping().await.expect("an answer");
    let offset = api.clock_offset_ms().expect("measured");
    let expected = UnixMillis(1_735_689_600_000).0 as i64 - WallClock.now().0 as i64;
    assert!((offset - expected).abs() < 60_000, "{offset} {expected}");
}

#[tokio::test]
async fn one_look_has_each_resource_known_or_unknown_for_itself() {
    let validator = validator(|request, _| {
        let path = request.uri.split('?').next().unwrap_or_default();
        match path {
            "/miner/chutes/" => answer(200, "data: {\"chute_id\":\"c1\",\"version\":\"v1\"}\n\n"),
            "/miner/instances/" => answer(200, "data: NO_ITEMS\n"),
            "/miner/images/" => answer(200, ""),
            "/miner/nodes/" => answer(401, r#"{"detail":"who are you"}"#),
            "/miner/jobs/" => answer(
                200,
                "data: {\"job_id\":\"j1\",\"chute_id\":\"c1\"}\n\ndata: {\"job_id\":1}\n\n",
            ),
            "/miner/metrics/" => answer(500, ""),
            "/chutes/utilization" => answer(200, r#"[{"chute_id":"c1","scalable":true},{"x":1}]"#),
            "/chutes/rolling_updates" => answer(200, r#"[{"chute_id":"c1","permitted":"{\"5A\":1}"}]"#),
            "/bounties/" => answer(200, "not json"),
            _ => answer(404, ""),
        }
    })
    .await;
    let seen = observe(&validator.client, &WallClock).await;
    assert_eq!(seen.chutes.complete().map(|(_, rows)| rows.len()), Some(1));
    assert_eq!(seen.instances.complete().map(|(_, rows)| rows.len()), Some(0));
    assert!(matches!(&seen.nodes, Observed::Unknown { why } if why.contains("who are you")));
    assert_eq!((seen.jobs.complete(), seen.jobs.rows().len()), (None, 1));
    assert!(matches!(seen.utilization, Observed::Known { broken_rows: 1, .. }));
    assert_eq!(seen.rolling_updates.rows()[0].permitted["5A"], 1);
    let unknown: Vec<&str> = seen.unknown().into_iter().map(|(name, _)| name).collect();
    assert_eq!(
        unknown,
        ["images", "nodes", "bounties", "metrics", "active_instances"]
    );
}
