//! `chutes-miner import` from a real PostgreSQL and a real Kubernetes API server into our own store and API: an original
//! miner with 20 servers goes over, and no chute ends.

mod back;
#[path = "../../../runtime/tests/runtime/control_plane.rs"]
#[expect(dead_code, reason = "the runtime's own tests use the rest of it")]
mod control_plane;
mod original;
mod ours;
mod postgres;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use coordinator_core::state_machine::State;
use coordinator_core::state_machine::deployment::Phase;
use kube::ResourceExt as _;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use protocol::hotkey::Signer;
use protocol::id::{DeploymentId, GpuId};
use protocol::time::UnixMillis;
use runtime::manifest::{FENCE_ANNOTATION, NODE_LABEL, fence_of, gpus_of, job_name, ports_of};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;
use tokio::time::sleep;

use control_plane::{ControlPlane, Space};
use original::{CREATED_AT_MS, ROWLESS, SERVERS, Stage, VERIFIED_AT_MS, deployments, server_name};
use ours::{Ours, server_id};
use postgres::Postgres;

const PATIENCE: Duration = Duration::from_secs(120);
/// Longer than an agent takes to act on what it sees.
const A_WHILE: Duration = Duration::from_secs(2);

/// What the command line needs.
struct Operator {
    folder: TempDir,
    kubeconfig: PathBuf,
    base: String,
}

#[derive(Debug)]
struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Run {
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    #[track_caller]
    fn ends(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        for word in words {
            assert!(
                self.stdout.contains(word) || self.stderr.contains(word),
                "{word:?}: {self:?}"
            );
        }
    }
}

impl Operator {
    fn new(kubeconfig: PathBuf, base: &str) -> Self {
        let folder = tempfile::tempdir().expect("temporary folders can be made");
        let file = json!({
            "ss58Address": Signer::from_seed(&[1; 32]).hotkey(),
            "secretSeed": format!("0x{}", "01".repeat(32)),
        });
        let hotkey = folder.path().join("hotkey.json");
        std::fs::write(&hotkey, file.to_string()).expect("writable");
        std::fs::set_permissions(&hotkey, std::fs::Permissions::from_mode(0o600)).expect("ours");
        Self {
            folder,
            kubeconfig,
            base: base.to_owned(),
        }
    }

    async fn run(&self, arguments: &[&str]) -> Run {
        let command = Command::new(env!("CARGO_BIN_EXE_chutes-miner"))
            .args(arguments)
            .env("HOTKEY", self.folder.path().join("hotkey.json"))
            .env("MINER_API", &self.base)
            .env("NO_PROXY", "127.0.0.1")
            .env_remove("POSTGRESQL")
            .stdin(Stdio::null())
            .output();
        let output = command.await.expect("the command starts");
        let run = Run {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).expect("UTF-8"),
            stderr: String::from_utf8(output.stderr).expect("UTF-8"),
        };
        for text in [&run.stdout, &run.stderr] {
            let shown = text.contains(postgres::PASSWORD) || text.contains(postgres::PASSWORD_IN_URL);
            assert!(!shown, "the password is shown: {run:?}");
        }
        run
    }

    async fn import(&self, url: &str, more: &[&str]) -> Run {
        let kubeconfig = self.kubeconfig.to_string_lossy();
        let arguments = ["import", "--postgres", url, "--kubeconfig", &kubeconfig];
        self.run(&[&arguments, more].concat()).await
    }

    async fn import_json(&self, url: &str, more: &[&str]) -> (Option<i32>, Value) {
        let run = self.import(url, &[&["--output", "json"], more].concat()).await;
        (run.code, run.json())
    }
}

/// Uid and version of every object, by kind and name.
type Objects = BTreeMap<String, (String, String)>;

async fn objects(space: &Space) -> Objects {
    fn noted<K: kube::Resource>(kind: &str, list: Vec<K>) -> Objects {
        let note = |object: &K| {
            let meta = object.meta();
            let (uid, version) = (meta.uid.clone(), meta.resource_version.clone());
            let name = meta.name.clone().expect("named");
            (
                format!("{kind} {name}"),
                (uid.expect("it has one"), version.expect("it has one")),
            )
        };
        list.iter().map(note).collect()
    }
    let all = ListParams::default();
    let works = "the API server works";
    let mut found = noted("Job", space.jobs().list(&all).await.expect(works).items);
    found.extend(noted(
        "Service",
        space.services().list(&all).await.expect(works).items,
    ));
    found.extend(noted("Pod", space.pods().list(&all).await.expect(works).items));
    found
}

/// The objects, once nobody writes to them any more.
async fn settled(space: &Space) -> Objects {
    let settled = async {
        let mut before = objects(space).await;
        loop {
            sleep(A_WHILE).await;
            let now = objects(space).await;
            if now == before {
                return now;
            }
            before = now;
        }
    };
    tokio::time::timeout(PATIENCE, settled)
        .await
        .expect("the controllers come to an end")
}

fn uids(objects: &Objects) -> BTreeMap<&str, &str> {
    objects
        .iter()
        .map(|(name, (uid, _))| (name.as_str(), uid.as_str()))
        .collect()
}

/// No object went or was made anew.
#[track_caller]
fn same_objects(now: &Objects, first: &Objects) {
    let (now, first) = (uids(now), uids(first));
    let gone: Vec<_> = first
        .iter()
        .filter(|(name, uid)| now.get(*name) != Some(uid))
        .collect();
    let new: Vec<_> = now
        .iter()
        .filter(|(name, uid)| first.get(*name) != Some(uid))
        .collect();
    assert!(
        gone.is_empty() && new.is_empty(),
        "gone: {gone:#?}, new: {new:#?}"
    );
}

async fn until(what: &str, mut look: impl AsyncFnMut() -> bool) {
    let found = async {
        while !look().await {
            sleep(Duration::from_millis(200)).await;
        }
    };
    let found = tokio::time::timeout(PATIENCE, found).await;
    found.unwrap_or_else(|_| panic!("not in time: {what}"));
}

/// The state is what the database has, for all that could be taken over.
fn compare(state: &State) {
    for server in 0..SERVERS {
        let row = state.servers().get(&server_id(server)).expect("it has joined");
        let terms = row
            .ready_enrolment()
            .unwrap_or_else(|| panic!("{server} is not taken over"));
        assert_eq!(terms.validator, original::validator());
        let seed = original::seed(server).map(|seed| u64::try_from(seed).expect("positive"));
        assert_eq!(terms.seed, seed, "{server}");
        assert_eq!(terms.hourly_cost_usd_micros, original::cost_micros(server));
        assert_eq!(row.locked, original::is_locked(server), "{server}");
        for number in 0..8 {
            let id = GpuId::parse(&original::gpu(server, number)).expect("valid");
            let gpu = state.gpus().get(&id).expect("taken over");
            assert_eq!((&gpu.server, gpu.short_ref.as_str()), (row.id(), "h100_sxm"));
            assert_eq!(gpu.verified_at.is_some(), original::is_verified(server, number));
            let holds = |it: &original::Deployment| it.is_taken_over() && it.gpus().contains(&id.to_string());
            let holder = deployments().into_iter().find(holds).map(|it| it.id());
            assert_eq!(gpu.holder, holder, "{id}");
        }
    }
    assert_eq!(state.gpus().len(), SERVERS * 8);
    let there: Vec<_> = deployments()
        .into_iter()
        .filter(|it| it.is_taken_over())
        .collect();
    assert_eq!(state.deployments().len(), there.len());
    for expected in there {
        let row = state.deployments().get(&expected.id()).expect("taken over");
        let gpus: Vec<String> = row.gpus.iter().map(ToString::to_string).collect();
        assert_eq!(gpus, expected.gpus());
        assert_eq!(row.server, server_id(expected.server()));
        assert_eq!(row.chute.chute.as_str(), expected.chute());
        assert_eq!(row.version.as_str(), expected.version());
        assert_eq!(row.image, expected.image());
        assert_eq!(row.config.as_ref().map(ToString::to_string), expected.config());
        assert_eq!(
            row.instance.as_ref().map(ToString::to_string),
            expected.instance()
        );
        assert_eq!(row.job.as_ref().map(ToString::to_string), expected.job());
        assert_eq!(row.created_at, UnixMillis(CREATED_AT_MS));
        let verified_at = expected.is_verified().then_some(UnixMillis(VERIFIED_AT_MS));
        assert_eq!(row.facts.verified_at, verified_at, "{}", expected.number);
        assert_eq!(
            row.facts.active_at.is_some(),
            expected.is_active(),
            "{}",
            expected.number
        );
        assert_eq!(
            row.phase == Phase::Serving,
            expected.stage == Stage::Serving,
            "{row:?}"
        );
        assert!(
            !row.ports.is_empty() || expected.stage == Stage::Starting,
            "{row:?}"
        );
    }
}

/// The Jobs bear the marks that a runtime reads.
async fn compare_marks(space: &Space) {
    for expected in deployments().into_iter().filter(|it| it.is_taken_over()) {
        let job = space
            .jobs()
            .get(&job_name(&expected.id()))
            .await
            .expect("it is there");
        assert_eq!(job.labels()[NODE_LABEL], server_name(expected.server()));
        assert!(fence_of(&job).is_some());
        let gpus: Vec<String> = gpus_of(&job)
            .expect("marked")
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(gpus, expected.gpus());
        let ports = ports_of(&job).expect("marked");
        assert_eq!(
            ports.len(),
            if expected.number == 20 {
                4
            } else {
                1 + usize::from(expected.number == 1)
            }
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_miner_goes_over_and_no_chute_ends() {
    let (Some(programs), Some(database_programs)) = (control_plane::programs(), postgres::programs()) else {
        return;
    };
    let database_server = Postgres::start(&database_programs).await;
    let database = database_server.database("chutes").await;
    original::write_rows(&database).await;
    let url = database_server.url("chutes");
    let plane = ControlPlane::start(programs).await;
    let space = plane.namespace("chutes").await;
    original::make_objects(&plane, &space).await;
    let mut ours = Ours::start().await;
    let operator = Operator::new(plane.kubeconfig(), &ours.base);
    let first = settled(&space).await;

    // No agent is there yet: that is said of each server.
    let (code, answer) = operator.import_json(&url, &[]).await;
    assert_eq!(code, Some(1));
    let problems = |answer: &Value| -> Vec<String> {
        let servers = answer["servers"].as_array().expect("a list").iter();
        servers
            .flat_map(|server| server["problems"].as_array().expect("a list"))
            .map(ToString::to_string)
            .collect()
    };
    assert_eq!(problems(&answer).len(), SERVERS);
    assert!(problems(&answer)[0].contains("no host with the name gpu-00 has joined"));

    // One that acts takes nothing over.
    ours.join_all(&space).await;
    operator
        .import(&url, &["--apply"])
        .await
        .ends(1, &["the cluster acts", "not done"]);
    assert_eq!(settled(&space).await, first, "nothing is marked");

    ours.observe(true).await;
    let (code, dry) = operator.import_json(&url, &[]).await;
    assert_eq!((code, problems(&dry).len()), (Some(1), 1));
    assert!(problems(&dry)[0].contains(ROWLESS), "{dry:#}");
    assert_eq!(dry["left_alone"], json!([format!("chute-{ROWLESS}")]));
    let foreground = DeleteParams::foreground();
    let rowless = format!("chute-{ROWLESS}");
    space
        .jobs()
        .delete(&rowless, &foreground)
        .await
        .expect("it is there");
    until("the Job without a row is gone", async || {
        let job = space.jobs().get_opt(&rowless).await;
        job.expect("the API server works").is_none()
    })
    .await;
    let first = settled(&space).await;
    let before = first.clone();
    let (code, dry) = operator.import_json(&url, &[]).await;
    assert_eq!((code, problems(&dry)), (Some(0), Vec::new()));
    assert_eq!(settled(&space).await, before, "a dry run writes nothing");
    assert!(ours.store.read(|state| state.deployments().is_empty()));
    let left_out: Vec<String> = dry["left_out"]
        .as_array()
        .expect("a list")
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(left_out.len(), 2, "{left_out:?}");
    assert!(
        left_out[0].contains("it is a stub") && left_out[1].contains("it has no Job"),
        "{left_out:?}"
    );
    assert_eq!(dry["left_alone"], json!([]));

    // What it would do if it had taken them over: on a copy.
    let (code, dry) = operator.import_json(&url, &["--observe"]).await;
    let tried = &dry["trial"];
    assert_eq!((code, &tried["stopped"]), (Some(0), &json!([])), "{dry:#}");
    let there = deployments().iter().filter(|it| it.is_taken_over()).count();
    assert_eq!(tried["go_on"], json!(there), "{tried:#}");
    let placed = &tried["placed"][0];
    assert_eq!(placed["chute_name"], ours::NEW_CHUTE, "{tried:#}");
    assert_eq!(placed["gpus"].as_array().map(Vec::len), Some(1), "{tried:#}");
    let run = operator.import(&url, &["--observe"]).await;
    let words = [
        "Would be placed",
        ours::NEW_CHUTE,
        "! the instances at validator",
        "Nothing was done",
    ];
    run.ends(0, &words);
    assert_eq!(settled(&space).await, before, "nothing is marked");
    assert!(ours.store.read(|state| state.deployments().is_empty()));

    // First one server alone, then all.
    let run = operator.import(&url, &["--server", "gpu-03", "--apply"]).await;
    run.ends(0, &["gpu-03", "locked"]);
    assert!(!run.stdout.contains("gpu-04"), "{run:?}");
    let (code, answer) = operator.import_json(&url, &["--apply"]).await;
    assert_eq!((code, problems(&answer)), (Some(0), Vec::new()), "{answer:#}");
    let applied = answer["servers"].as_array().expect("a list").iter();
    assert_eq!(
        applied.filter(|server| server["applied"] == true).count(),
        SERVERS - 1
    );
    sleep(A_WHILE).await;
    ours.store.read(compare);
    compare_marks(&space).await;
    let after = settled(&space).await;
    same_objects(&after, &first);

    // Again: nothing changes.
    let run = operator.import(&url, &["--apply"]).await;
    run.ends(0, &["nothing changes"]);
    assert_eq!(run.stdout.matches("nothing changes").count(), SERVERS, "{run:?}");
    assert_eq!(settled(&space).await, after, "nothing is written twice");

    // From now on it acts: all goes on, and what is stopped ends.
    ours.observe(false).await;
    sleep(A_WHILE).await;
    ours.store.read(compare);
    same_objects(&objects(&space).await, &first);
    operator
        .import(&url, &["--apply"])
        .await
        .ends(0, &["nothing changes"]);
    let stopped = &deployments()[4];
    let run = operator
        .run(&["purge-deployment", "--deployment-id", stopped.id().as_str()])
        .await;
    run.ends(0, &[]);
    until("the Job of what was stopped goes", async || {
        let job = space.jobs().get_opt(&job_name(&stopped.id())).await;
        job.expect("the API server works").is_none()
    })
    .await;
    until("its Service and its pod go", async || {
        objects(&space).await.len() == first.len() - 3
    })
    .await;
    let last = objects(&space).await;
    assert!(
        uids(&last)
            .iter()
            .all(|(name, uid)| uids(&first).get(name) == Some(uid)),
        "{last:?}"
    );
    refuse_another_uid(&space, &deployments()[5].id()).await;

    let back = back::goes_back((&plane, &space), (&database, &url), (&operator, ours), stopped);
    Box::pin(back).await;
    plane.stop().await;
}

/// What keeps an import from marking an object that came in the place of another.
async fn refuse_another_uid(space: &Space, deployment: &DeploymentId) {
    let patch = json!({ "metadata": { "uid": "another", "annotations": { FENCE_ANNOTATION: "9/9" } } });
    let (jobs, name, how) = (space.jobs(), job_name(deployment), PatchParams::default());
    let patched = jobs.patch_metadata(&name, &how, &Patch::Merge(patch)).await;
    let Err(kube::Error::Api(refused)) = patched else {
        panic!("it is written to another object");
    };
    assert!(matches!(refused.code, 409 | 422), "{refused:?}");
}

fn nowhere(folder: &Path) -> PathBuf {
    let path = folder.join("kubeconfig");
    let text = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "none",
        "clusters": [{ "name": "none", "cluster": { "server": "https://127.0.0.1:1" } }],
        "users": [{ "name": "none", "user": { "token": "none" } }],
        "contexts": [{ "name": "none", "context": { "cluster": "none", "user": "none" } }],
    });
    std::fs::write(&path, text.to_string()).expect("writable");
    path
}

#[tokio::test]
async fn a_database_that_does_not_answer_is_named_with_the_way_out() {
    let Some(programs) = postgres::programs() else {
        return;
    };
    let server = Postgres::start(&programs).await;
    let folder = tempfile::tempdir().expect("temporary folders can be made");
    let operator = Operator::new(nowhere(folder.path()), "http://127.0.0.1:1");
    let database = server.database("chutes").await;
    let url = server.url("chutes");
    for (url, words) in [
        (
            url.replace(postgres::PASSWORD_IN_URL, "guess"),
            ["postgres-secret", "password authentication failed"],
        ),
        (
            server.url("postgres"),
            ["the table servers", "is this the original miner's database?"],
        ),
        (
            server.url("none"),
            ["\"none\" does not exist", "is called chutes"],
        ),
        (
            format!("{url}?sslmode=require"),
            ["sslmode=disable", "kubectl port-forward"],
        ),
        (
            "postgresql://chutes:x@127.0.0.1:1/chutes".to_owned(),
            ["127.0.0.1 port 1", "port-forward"],
        ),
        ("http://x".to_owned(), ["--postgres is no URL", "PASSWORD"]),
        // All is well there; the cluster is not.
        (
            url.replace("postgresql://", "postgresql+asyncpg://"),
            ["cannot list the Jobs", "--kubeconfig"],
        ),
    ] {
        operator.import(&url, &[]).await.ends(1, &words);
    }
    database
        .batch_execute("ALTER TABLE gpus DROP COLUMN server_id")
        .await
        .expect("it is ours");
    database
        .batch_execute(
            "INSERT INTO gpus (gpu_id, validator, device_info, model_short_ref) VALUES ('a', 'b', '{}', 'c')",
        )
        .await
        .expect("a row");
    operator
        .import(&url, &[])
        .await
        .ends(1, &["table gpus", "missing field `server_id`"]);
    demand_encryption(&server, &operator, &url).await;
}

/// A database that lets nobody in without TLS.
async fn demand_encryption(server: &Postgres, operator: &Operator, url: &str) {
    let client = server.client("postgres").await;
    let row = client.simple_query("SHOW hba_file").await.expect("it says");
    let path = row.iter().find_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    });
    let rule = "hostnossl all all all reject\n";
    std::fs::write(path.expect("a path"), rule).expect("writable by its user or by root");
    client
        .batch_execute("SELECT pg_reload_conf()")
        .await
        .expect("it may");
    until("the rule holds", async || {
        let run = operator.import(url, &[]).await;
        run.stderr.contains("pg_hba.conf")
    })
    .await;
    operator
        .import(url, &[])
        .await
        .ends(1, &["it demands TLS", "kubectl port-forward"]);
}
