//! The part of a kubelet that the API server asks for output: HTTPS on loopback. What its containers wrote is said by
//! the test.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use rustls::pki_types::PrivateKeyDer;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

type Written = Arc<Mutex<BTreeMap<String, String>>>;

/// A node with a kubelet that knows what containers wrote, and nothing else.
pub(crate) struct Kubelet {
    written: Written,
    serving: JoinHandle<()>,
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Kubelet {
    /// Registers a node, and serves it.
    pub(crate) async fn start(client: &Client, node: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("loopback has ports");
        let port = listener.local_addr().expect("it is bound").port();
        let nodes: Api<Node> = Api::all(client.clone());
        let object = json!({ "metadata": { "name": node } });
        let object = serde_json::from_value(object).expect("a node");
        nodes
            .create(&PostParams::default(), &object)
            .await
            .expect("the API server works");
        let status = json!({ "status": {
            "addresses": [{ "type": "InternalIP", "address": "127.0.0.1" }],
            "daemonEndpoints": { "kubeletEndpoint": { "Port": port } },
        } });
        nodes
            .patch_status(node, &PatchParams::default(), &Patch::Merge(&status))
            .await
            .expect("the API server works");
        let certificate =
            rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("it can be made");
        let key = PrivateKeyDer::try_from(certificate.signing_key.serialize_der()).expect("a key");
        let config = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.cert.der().clone()], key)
            .expect("a good certificate");
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let written = Written::default();
        let answers = Arc::clone(&written);
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer(acceptor.clone(), stream, Arc::clone(&answers)));
            }
        });
        Self { written, serving }
    }

    /// What a pod's container has written, each line with its time.
    pub(crate) fn write(&self, pod: &str, container: &str, lines: &str) {
        let name = format!("{pod}/{container}");
        self.written
            .lock()
            .expect("no panics")
            .insert(name, lines.to_owned());
    }
}

/// One request on one connection: `GET /containerLogs/NAMESPACE/POD/CONTAINER?...`.
async fn answer(acceptor: TlsAcceptor, stream: TcpStream, written: Written) {
    let Ok(mut stream) = acceptor.accept(stream).await else {
        return;
    };
    let (mut head, mut chunk) = (Vec::new(), [0; 4096]);
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        match stream.read(&mut chunk).await {
            Ok(read) if read > 0 => head.extend_from_slice(&chunk[..read]),
            _ => return,
        }
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let target = head.split(' ').nth(1).expect("a request line");
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let name: Vec<&str> = path.rsplitn(3, '/').collect();
    assert!(query.contains("timestamps=true"), "{target}");
    let name = format!("{}/{}", name[1], name[0]);
    let text = written.lock().expect("no panics").get(&name).cloned();
    let status = if text.is_some() { "200 OK" } else { "404 Not Found" };
    let value = |key: &str| query.split('&').find_map(|part| part.strip_prefix(key));
    let text = text.unwrap_or_default();
    let mut lines: Vec<&str> = text.split_inclusive('\n').collect();
    // Whole seconds, the one that is named included.
    if let Some(since) = value("sinceTime=") {
        let since: Timestamp = since.replace("%3A", ":").parse().expect("a time");
        let is_later = |line: &&str| {
            let time = line.split(' ').next().expect("a time");
            time.parse::<Timestamp>().expect("a time") >= since
        };
        lines.retain(is_later);
    }
    if let Some(tail) = value("tailLines=") {
        let tail: usize = tail.parse().expect("a number");
        lines.drain(..lines.len().saturating_sub(tail));
    }
    let text = lines.concat();
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}",
        text.len()
    );
    // Whoever asked may have gone.
    let _ = stream.write_all(answer.as_bytes()).await;
    let _ = stream.shutdown().await;
}
