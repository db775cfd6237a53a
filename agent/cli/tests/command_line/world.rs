//! A miner and a validator that check every signature and answer from a table, and the command that asks them.

use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use protocol::hotkey::Signer;
use protocol::signing::{
    BoundRequest, MINER_NONCE_WINDOW_SECONDS, Purpose, Tail, VALIDATOR_NONCE_WINDOW_SECONDS,
    check_request_to_miner, check_request_to_validator,
};
use protocol::time::UnixMillis;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// Both APIs at one address. It answers from a table and remembers what was asked.
#[derive(Default)]
pub(crate) struct Fake {
    answers: Vec<(&'static str, u16, Vec<u8>)>,
    pub(crate) asked: Mutex<Vec<(String, Value)>>,
}

#[expect(clippy::disallowed_methods, reason = "the command signs with the wall clock")]
pub(crate) fn now() -> UnixMillis {
    let elapsed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    UnixMillis(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
}

async fn answer(State(fake): State<Arc<Fake>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let body = to_bytes(body, 1 << 20).await.expect("a small body");
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
    let header = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok());
    let signer = Signer::from_seed(&[1; 32]);
    let refusal = if path == "/config/kubeconfig" {
        let (miner, tail) = (signer.hotkey(), Tail::Purpose(Purpose::Registration));
        let allowed = [miner.clone()];
        check_request_to_miner(header, miner, &allowed, now(), MINER_NONCE_WINDOW_SECONDS, &tail).err()
    } else if header("authorization") == Some("jwt") {
        None
    } else if header("x-chutes-hotkey").is_some() {
        let purpose = if head.method == "DELETE" {
            Purpose::Nodes
        } else {
            Purpose::Miner
        };
        let tail = Tail::Purpose(purpose);
        check_request_to_validator(header, now(), VALIDATOR_NONCE_WINDOW_SECONDS, &tail).err()
    } else {
        let bound = BoundRequest {
            method: head.method.as_str(),
            path_and_query: path,
            body: &body,
        };
        bound
            .check(header, signer.hotkey(), now(), MINER_NONCE_WINDOW_SECONDS)
            .err()
    };
    if let Some(refusal) = refusal {
        let detail = json!({ "detail": refusal.to_string() }).to_string();
        return (axum::http::StatusCode::UNAUTHORIZED, detail).into_response();
    }
    let asked = format!("{} {path}", head.method);
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    fake.asked.lock().expect("no panic").push((asked.clone(), body));
    let unknown = (404, br#"{"detail":"no such thing"}"#.to_vec());
    let found = fake.answers.iter().find(|(route, ..)| *route == asked);
    let (status, bytes) = found.map_or(unknown, |(_, status, bytes)| (*status, bytes.clone()));
    Response::builder()
        .status(status)
        .body(Body::from(bytes))
        .expect("a response")
}

pub(crate) struct World {
    pub(crate) fake: Arc<Fake>,
    pub(crate) base: String,
    pub(crate) hotkey: std::path::PathBuf,
}

impl World {
    pub(crate) async fn new(name: &str, answers: &[(&'static str, u16, Value)]) -> Self {
        let bytes = |body: &Value| match body {
            Value::String(text) => text.clone().into_bytes(),
            other => other.to_string().into_bytes(),
        };
        let answers = answers.iter();
        let answers = answers.map(|(route, status, body)| (*route, *status, bytes(body)));
        Self::of_bytes(name, answers.collect()).await
    }

    pub(crate) async fn of_bytes(name: &str, answers: Vec<(&'static str, u16, Vec<u8>)>) -> Self {
        let fake = Arc::new(Fake {
            answers,
            asked: Mutex::default(),
        });
        let routes = Router::new().fallback(answer).with_state(Arc::clone(&fake));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a free port");
        let base = format!("http://{}", listener.local_addr().expect("bound"));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        let hotkey = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.json"));
        let file = json!({
            "ss58Address": Signer::from_seed(&[1; 32]).hotkey(),
            "secretSeed": format!("0x{}", "01".repeat(32)),
        });
        std::fs::write(&hotkey, file.to_string()).expect("write the key");
        set_mode(&hotkey, 0o600);
        Self { fake, base, hotkey }
    }

    pub(crate) async fn run(&self, arguments: &[&str]) -> Run {
        self.run_with_input(arguments, "").await
    }

    pub(crate) async fn run_with_input(&self, arguments: &[&str], input: &str) -> Run {
        let mut child = Command::new(env!("CARGO_BIN_EXE_chutes-miner"))
            .args(arguments)
            .env("HOTKEY", &self.hotkey)
            .env("MINER_API", &self.base)
            .env("VALIDATOR_API", &self.base)
            .env("NO_PROXY", "127.0.0.1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the command starts");
        let mut stdin = child.stdin.take().expect("piped");
        // It may end without reading.
        let _ = stdin.write_all(input.as_bytes()).await;
        drop(stdin);
        let Output {
            status,
            stdout,
            stderr,
        } = child.wait_with_output().await.expect("it ends");
        Run {
            code: status.code(),
            stdout: String::from_utf8(stdout).expect("UTF-8"),
            stderr: String::from_utf8(stderr).expect("UTF-8"),
        }
    }

    pub(crate) fn was_asked(&self, what: &str) -> bool {
        let asked = self.fake.asked.lock().expect("no panic");
        asked.iter().any(|(asked, _)| asked == what)
    }
}

pub(crate) fn set_mode(path: &std::path::Path, mode: u32) {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("chmod");
    }
}

#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Run {
    #[track_caller]
    pub(crate) fn ends(&self, code: i32, stdout: &str, stderr: &str) {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert!(self.stdout.contains(stdout), "{stdout:?} is not in {self:?}");
        assert!(self.stderr.contains(stderr), "{stderr:?} is not in {self:?}");
        assert!(!self.stderr.contains("panicked"), "{self:?}");
    }
}
