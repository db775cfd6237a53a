//! What a container serves: the app's port (health, device challenges), the log server, and the ports of a
//! job, which answer the validator's test.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use protocol::gpu::DeviceInfo;
use protocol::hotkey::Hotkey;
use protocol::signing::{Purpose, Tail, check_request_to_miner};
use protocol::workload::{LOGGING_PORT, PRIMARY_PORT};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};

use crate::chute::Log;
use crate::chute::settings::Settings;
use crate::cipher;
use crate::clock;
use crate::identity::random_bytes;
use crate::jobs::port_answer;
use crate::state::PortMapping;

/// A container accepts nonces of this age, in seconds.
const NONCE_WINDOW_SECONDS: u64 = 540;

/// Switches that the launch flow turns while the doors are open.
#[derive(Debug, Clone)]
pub(crate) struct Doors {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    miner: Hotkey,
    validator: Hotkey,
    devices: Vec<DeviceInfo>,
    log: Arc<Log>,
    ready: AtomicBool,
    key: OnceLock<[u8; 16]>,
}

impl Doors {
    /// The app has started: its health check passes from now on.
    pub(crate) fn ready(&self) {
        self.shared.ready.store(true, Ordering::Release);
    }

    /// The key under which job ports answer; the first one stays.
    pub(crate) fn set_key(&self, key: [u8; 16]) {
        self.shared.key.get_or_init(|| key);
    }
}

/// Opens all ports and serves them until the process ends.
pub(crate) async fn open(settings: &Settings, log: Arc<Log>) -> std::io::Result<Doors> {
    let shared = Arc::new(Shared {
        miner: settings.miner.clone(),
        validator: settings.validator.clone(),
        devices: settings.devices.clone(),
        log,
        ready: AtomicBool::new(false),
        key: OnceLock::new(),
    });
    for mapping in &settings.ports {
        let address = (settings.bind.0, settings.listen_port(mapping));
        match (mapping.internal_port, mapping.proto.as_str()) {
            (PRIMARY_PORT, _) => serve(TcpListener::bind(address).await?, app(shared.clone())),
            (LOGGING_PORT, _) => serve(TcpListener::bind(address).await?, log_server(shared.clone())),
            (_, "udp") => {
                let socket = UdpSocket::bind(address).await?;
                tokio::spawn(answer_udp(socket, mapping.clone(), shared.clone()));
            }
            _ => {
                let listener = TcpListener::bind(address).await?;
                tokio::spawn(answer_tcp(listener, mapping.clone(), shared.clone()));
            }
        }
    }
    Ok(Doors { shared })
}

fn serve(listener: TcpListener, router: Router) {
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "a port of the chute failed");
        }
    });
}

fn app(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/_alive", get(alive))
        .route("/_device_challenge", get(device_challenge))
        .route("/_devices", get(devices))
        .route("/_metrics", get(async || "chute_up 1\n"))
        .with_state(shared)
}

fn log_server(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/_alive", get(async || Json(json!({"alive": true}))))
        .route("/logs", get(logs))
        .route("/logs/read/{name}", get(read_log))
        .with_state(shared)
}

async fn alive(State(shared): State<Arc<Shared>>) -> Response {
    if shared.ready.load(Ordering::Acquire) {
        Json(json!({"alive": true})).into_response()
    } else {
        StatusCode::SERVICE_UNAVAILABLE.into_response()
    }
}

fn authorised(shared: &Shared, headers: &HeaderMap) -> Result<(), Box<Response>> {
    check_request_to_miner(
        |name| headers.get(name).and_then(|value| value.to_str().ok()),
        &shared.miner,
        std::slice::from_ref(&shared.validator),
        clock::now(),
        NONCE_WINDOW_SECONDS,
        &Tail::Purpose(Purpose::Chutes),
    )
    .map(|_| ())
    .map_err(|refusal| {
        let body = Json(json!({"detail": refusal.to_string()}));
        Box::new((StatusCode::UNAUTHORIZED, body).into_response())
    })
}

async fn device_challenge(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<BTreeMap<String, String>>,
    headers: HeaderMap,
) -> Response {
    if let Err(refusal) = authorised(&shared, &headers) {
        return *refusal;
    }
    let challenge = query.get("challenge").map_or("", |text| text);
    match proof::device_challenge_answer(&shared.devices, challenge) {
        Ok(answer) => answer.into_response(),
        Err(error) => (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
    }
}

async fn devices(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    match authorised(&shared, &headers) {
        Ok(()) => Json(json!(shared.devices)).into_response(),
        Err(refusal) => *refusal,
    }
}

async fn logs(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    match authorised(&shared, &headers) {
        Ok(()) => {
            let size = shared.log.text().len();
            Json(json!({"logs": [{"name": "_chute.log", "path": "/tmp/_chute.log", "size": size}]}))
                .into_response()
        }
        Err(refusal) => *refusal,
    }
}

async fn read_log(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Response {
    match authorised(&shared, &headers) {
        Ok(()) if name == "_chute.log" => shared.log.text().into_response(),
        Ok(()) => StatusCode::NOT_FOUND.into_response(),
        Err(refusal) => *refusal,
    }
}

/// The sealed answer to the validator's test of a port; nothing before the key is known.
fn sealed_answer(shared: &Shared, mapping: &PortMapping) -> Option<String> {
    let key = shared.key.get()?;
    let iv = random_bytes();
    let sealed = cipher::encrypt(key, &iv, port_answer(mapping).as_bytes());
    Some(format!("{}|{}", hex::encode(iv), STANDARD.encode(sealed)))
}

async fn answer_tcp(listener: TcpListener, mapping: PortMapping, shared: Arc<Shared>) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let mut request = [0; 16];
        let exchange = async {
            let asked = stream.read(&mut request).await? > 0;
            if let (true, Some(answer)) = (asked, sealed_answer(&shared, &mapping)) {
                stream.write_all(answer.as_bytes()).await?;
            }
            stream.shutdown().await
        };
        let patience = std::time::Duration::from_secs(5);
        if !matches!(tokio::time::timeout(patience, exchange).await, Ok(Ok(()))) {
            tracing::debug!("a port test was broken off");
        }
    }
}

async fn answer_udp(socket: UdpSocket, mapping: PortMapping, shared: Arc<Shared>) {
    let mut request = [0; 16];
    while let Ok((_, peer)) = socket.recv_from(&mut request).await {
        if let Some(answer) = sealed_answer(&shared, &mapping)
            && let Err(error) = socket.send_to(answer.as_bytes(), peer).await
        {
            tracing::debug!(%error, "a port test was broken off");
        }
    }
}
