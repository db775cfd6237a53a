//! Secrets that are planted by real commands and requests are in no file of the data folder, in no snapshot, at no
//! bucket and in no line that was logged or traced: not raw, not in hexadecimal, not in base64.

use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use coordinator::api::{Alone, Config, Connection, Deps, Limits, Peer, ReplicatedCluster, router};
use coordinator::backup::Keeper;
use coordinator::clock::AgreedClock;
use coordinator::executor::Validators;
use coordinator::host_link::Hub;
use coordinator::identity::{Authority, CA_KEY};
use coordinator::join::Token;
use coordinator::leader::{Listings, Scheduling};
use coordinator::membership::HandOver;
use coordinator::signer::{LocalSigner, SealedKind};
use coordinator_core::state_machine::Command;
use coordinator_core::state_machine::effect::{EffectKind, EffectOutcome};
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use protocol::hotkey::Signer;
use protocol::id::ConfigId;
use protocol::signing::BoundRequest;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::fmt::MakeWriter;

use super::bucket::{key_file, place};
use super::member::{CLUSTER, Member, START, host, key, seed, server};
use super::store_of_objects::{SECRET_KEY, serve};

/// All that is traced in this process, from here on.
#[derive(Clone, Default)]
struct Traced(Arc<Mutex<Vec<u8>>>);

impl Write for Traced {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Traced {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// The forms in which bytes may show up. In base64 they depend on what stands before them, so three are tried, less
/// the digits that neighbours have a part in.
fn forms(secret: &[u8]) -> Vec<Vec<u8>> {
    let mut forms = vec![
        secret.to_vec(),
        hex::encode(secret).into_bytes(),
        hex::encode_upper(secret).into_bytes(),
    ];
    for engine in [STANDARD_NO_PAD, URL_SAFE_NO_PAD] {
        for shift in 0..3 {
            let digits = engine.encode([vec![0; shift], secret.to_vec()].concat());
            let first = (shift * 8).div_ceil(6);
            let whole = (shift + secret.len()) * 8 / 6;
            forms.push(digits.as_bytes()[first..whole].to_vec());
        }
    }
    // As a list of numbers, which is how bytes are printed by `Debug`.
    let numbers: Vec<String> = secret.iter().map(u8::to_string).collect();
    forms.push(numbers.join(", ").into_bytes());
    forms
}

fn holds(bytes: &[u8], form: &[u8]) -> bool {
    bytes.windows(form.len()).any(|window| window == form)
}

/// Every file below a folder.
fn files(folder: &Path, found: &mut Vec<(String, Vec<u8>)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else {
            found.push((path.display().to_string(), std::fs::read(&path).unwrap()));
        }
    }
}

/// The management API of a member, asked by the miner.
struct Api(axum::Router, u128);

impl Api {
    async fn ask(&mut self, path: &str, body: &str) -> Vec<u8> {
        self.1 += 1;
        let bound = BoundRequest {
            method: "POST",
            path_and_query: path,
            body: body.as_bytes(),
        };
        let mut request = Request::builder().method("POST").uri(path);
        for (name, value) in bound.sign(&Signer::from_seed(&[0x5e; 32]), START, self.1) {
            request = request.header(name, value);
        }
        let peer = Peer(SocketAddr::from(([127, 0, 0, 1], 4)));
        let request = request.extension(peer).extension(Connection::default());
        let request = request.body(Body::from(body.to_owned())).unwrap();
        let Ok(answer) = TowerToHyperService::new(self.0.clone()).call(request).await;
        assert_eq!(answer.status(), StatusCode::OK, "{path}");
        to_bytes(answer.into_body(), usize::MAX).await.unwrap().to_vec()
    }
}

fn api(member: &Member, keeper: &Keeper) -> Api {
    let config = Config {
        miner: seed().hotkey().clone(),
        member: "1".to_owned(),
        allow_plain_legacy_writes: false,
        limits: Limits::default(),
    };
    let deps = Deps {
        supported_gpus: Arc::new(Validators::new()),
        hosts: Arc::new(Hub::default()),
        validator_listing: Arc::new(Listings::default()),
        scheduling: Scheduling::default(),
        cluster: Arc::new(ReplicatedCluster::new(
            CLUSTER.to_owned(),
            member.replica.clone(),
            HandOver::channel().0,
            AgreedClock::new(1, Arc::clone(member.store.clock())),
        )),
        backup: keeper.door(),
        others: Arc::new(Alone),
        signer: Arc::new(LocalSigner::new(seed(), Arc::clone(member.store.clock()))),
        workers: None,
    };
    Api(router(config, member.store.clone(), deps), 0)
}

/// A deployment whose launch token has come.
async fn launch(member: &Member, token: &[u8]) {
    for mut command in super::golden::a_deployment() {
        // The miner whose seed is looked for, and who asks the API.
        if let Command::Configure { miner, .. } = &mut command {
            miner.clone_from(seed().hotkey());
        }
        member.propose(command).await;
        let ready: Vec<_> = member.machine.read(|state| {
            let ready = state.outbox().ready();
            ready.map(|effect| (effect.id, effect.kind.clone())).collect()
        });
        for (effect, kind) in ready {
            let outcome = match kind {
                EffectKind::FetchLaunchConfig { .. } => EffectOutcome::LaunchConfig {
                    config: ConfigId::parse("config-1").unwrap(),
                    sealed_token: seed().seal(SealedKind::LaunchToken, token).unwrap(),
                },
                kind => super::golden::good_end(&kind).expect("an enrolment"),
            };
            member.propose(Command::FinishEffect { effect, outcome }).await;
        }
    }
}

#[tokio::test]
async fn no_secret_is_in_a_file_a_snapshot_or_a_trace() {
    let traced = Traced::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false);
    let subscriber = subscriber.with_writer(traced.clone()).finish();
    tracing::subscriber::set_global_default(subscriber).expect("the only one of this process");

    let folder = tempfile::tempdir().unwrap();
    let keys = tempfile::tempdir().unwrap();
    let member = Member::open(folder.path(), 1).await.unwrap();
    let token = b"planted.launch.token.0123456789";
    let authority = Authority::found(keys.path()).unwrap();
    let authority_key = std::fs::read_to_string(keys.path().join(CA_KEY)).unwrap();
    let sealed_key = seed().seal(SealedKind::ClusterCaKey, authority_key.as_bytes());
    member
        .propose(Command::FoundCluster {
            authority_pem: authority.certificate_pem().to_owned(),
            sealed_key: sealed_key.unwrap(),
            founder: host("planted-host", 1),
        })
        .await;
    launch(&member, token).await;
    let kubeconfig = b"planted.token.of.a.kubeconfig";
    let sealed_kubeconfig = seed().seal(SealedKind::Kubeconfig, kubeconfig).unwrap();
    let facts = super::golden::facts("tee-1");
    member
        .propose(Command::AddWorker {
            facts,
            sealed_kubeconfig,
        })
        .await;
    let (address, objects) = serve().await;
    let settings = member.settings(place(address, key_file(keys.path(), SECRET_KEY)), 3);
    let keeper = Keeper::new(member.snapshots(), Some(settings));
    let mut api = api(&member, &keeper);
    let invited = api.ask("/hosts/invites", "{\"eligible\":true}").await;
    let invited: serde_json::Value = serde_json::from_slice(&invited).unwrap();
    let invitation: Token = invited["token"].as_str().unwrap().parse().unwrap();
    let (signer, credentials) = (seed(), credentials(&keys));
    tracing::info!(?invitation, ?signer, ?credentials, operator = ?key(), "what is printed of those that hold secrets");
    let saved = api.ask("/v1/snapshots", "{}").await;
    let stop = CancellationToken::new();
    let mut reports = keeper.reports().follow();
    let task = tokio::spawn(keeper.run(stop.clone()));
    let report = reports
        .wait_for(|report| report.last.is_some() || report.failure.is_some())
        .await
        .unwrap()
        .clone();
    assert_eq!(report.failure, None);
    stop.cancel();
    task.await.unwrap();
    member
        .propose(Command::LockServer {
            server: server("gpu-a"),
            locked: true,
        })
        .await;
    member.replica.clone().shutdown().await;

    let mut places = vec![("the saved snapshot".to_owned(), saved)];
    places.extend(objects.stored.lock().unwrap().clone());
    files(folder.path(), &mut places);
    let lines = traced.0.lock().unwrap().clone();
    assert!(holds(&lines, b"a snapshot was put away"), "tracing is captured");
    places.push(("what was traced".to_owned(), lines));
    // Without the marks and the ends of its lines, with which it may be printed otherwise.
    let authority_key = authority_key.lines().nth(1).unwrap();
    let authority_bytes = STANDARD_NO_PAD.decode(authority_key).unwrap();
    let secrets: [(&str, &[u8]); 8] = [
        ("the seed", &[0x5e; 32]),
        ("the launch token", token),
        ("the kubeconfig", kubeconfig),
        ("the authority's key", authority_key.as_bytes()),
        ("the authority's key", &authority_bytes),
        ("the bucket's key", SECRET_KEY.as_bytes()),
        ("the invitation", &invitation.secret),
        ("the operator's key", &[3; 32]),
    ];
    for (what, secret) in secrets {
        for form in forms(secret) {
            for (place, bytes) in &places {
                let shown = String::from_utf8_lossy(&form);
                assert!(!holds(bytes, &form), "{what} is in {place} as {shown:?}");
            }
        }
    }
    // What is no secret is found: the search works, and only the snapshots are unreadable as a whole.
    let public = b"planted-host";
    let holding = places
        .iter()
        .filter(|(_, bytes)| holds(bytes, public))
        .map(|(place, _)| place.as_str());
    let holding: Vec<&str> = holding.collect();
    assert!(
        holding.iter().any(|place| place.ends_with("state.redb")),
        "{holding:?}"
    );
    assert!(
        holding.iter().any(|place| place.ends_with("state.snapshot")),
        "{holding:?}"
    );
    assert!(
        !holding
            .iter()
            .any(|place| place.contains("saved") || place.contains("chutes-snapshot")),
        "{holding:?}"
    );
}

fn credentials(keys: &tempfile::TempDir) -> coordinator::backup::Credentials {
    let text = std::fs::read_to_string(keys.path().join("bucket.keys")).unwrap();
    coordinator::backup::Credentials::parse(&text).unwrap()
}

#[test]
fn the_search_finds_every_form() {
    let secret = b"planted secret 123";
    let forms_of_it = forms(secret);
    for prefix in ["", "x", "xy"] {
        let text = [prefix.as_bytes(), secret, b"zz"].concat();
        for written in [
            text.clone(),
            hex::encode(&text).into_bytes(),
            STANDARD_NO_PAD.encode(&text).into_bytes(),
            URL_SAFE_NO_PAD.encode(&text).into_bytes(),
            format!("{text:?}").into_bytes(),
        ] {
            let found = forms_of_it.iter().any(|form| holds(&written, form));
            assert!(found, "{}", String::from_utf8_lossy(&written));
        }
    }
}
