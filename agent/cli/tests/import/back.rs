//! The way back: what our miner knows is written into the original's database, and the objects are released.

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::{Api, ResourceExt as _};
use runtime::manifest::NODE_LABEL;
use serde_json::{Value, json};
use tokio_postgres::{Client, SimpleQueryMessage};

use crate::control_plane::{ControlPlane, Space};
use crate::original::{self, SERVERS, deployments, server_name};
use crate::ours::Ours;
use crate::{Operator, objects, settled, uids, until};

/// All rows of a table as text, by their first column.
async fn rows(database: &Client, table: &str) -> Vec<String> {
    let query = format!("SELECT to_jsonb(t)::text FROM {table} t ORDER BY 1");
    let messages = database.simple_query(&query).await.expect("it is there");
    let rows = messages.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    });
    rows.collect()
}

async fn everything(database: &Client) -> Vec<Vec<String>> {
    let mut all = Vec::new();
    for table in ["servers", "chutes", "deployments", "gpus"] {
        all.push(rows(database, table).await);
    }
    all
}

/// `stopped` was taken over, and ended here since.
pub(crate) async fn goes_back(
    (plane, space): (&ControlPlane, &Space),
    (database, url): (&Client, &str),
    (operator, mut ours): (&Operator, Ours),
    stopped: &original::Deployment,
) {
    let kubeconfig = plane.kubeconfig();
    let kubeconfig = kubeconfig.to_string_lossy();
    let export = async |more: &[&str]| {
        let arguments = ["export", "--postgres", url, "--kubeconfig", &kubeconfig];
        operator.run(&[&arguments, more].concat()).await
    };
    let nodes: Api<Node> = Api::all(plane.client.clone());
    let how = PostParams::default();
    for server in 0..SERVERS {
        let node = json!({ "metadata": { "name": server_name(server) } });
        let node = serde_json::from_value(node).expect("a node");
        nodes.create(&how, &node).await.expect("the API server works");
    }
    export(&[]).await.ends(1, &["observe start comes first"]);
    ours.tell_validators().await;
    until("what was stopped is gone", async || {
        ours.store
            .read(|state| state.audits().contains_key(&stopped.id()))
    })
    .await;
    ours.observe(true).await;

    // What the original would not have without us: it lost a row, and a server with all that is on it.
    let lost = &deployments()[10];
    let lose = format!(
        "DELETE FROM deployments WHERE deployment_id = '{}'; DELETE FROM servers WHERE name = 'gpu-19'; \
         UPDATE servers SET seed = 1, locked = false WHERE name = 'gpu-03'",
        lost.id()
    );
    let complete = everything(database).await;
    database.batch_execute(&lose).await.expect("our own rows");
    let before = everything(database).await;
    let first = settled(space).await;
    let run = export(&["--output", "json"]).await;
    run.ends(0, &[]);
    assert_eq!(everything(database).await, before, "a dry run writes nothing");
    let changes = run.json();
    let of = |table: &str, what: &str| {
        let changes = changes["changes"].as_array().expect("a list").iter();
        let same = |change: &&Value| change["table"] == table && change["what"] == what;
        changes
            .filter(same)
            .map(|change| change["id"].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(of("servers", "insert").len(), 1, "{changes:#}");
    // Null is locked to the original.
    assert_eq!(
        of("servers", "update"),
        [json!("node-uid-3"), json!("node-uid-5")]
    );
    assert!(of("deployments", "insert").contains(&json!(lost.id())));
    assert_eq!(of("deployments", "insert").len(), 1 + 3, "{changes:#}");
    assert_eq!(of("deployments", "delete"), [json!(stopped.id())]);
    assert_eq!(of("gpus", "insert").len(), 8);

    export(&["--apply"])
        .await
        .ends(0, &["deployments", "export --release"]);
    compare(&complete, &everything(database).await, stopped);
    export(&["--apply"]).await.ends(0, &["Nothing changes"]);

    // The agents go, and only then their marks.
    let release = async |more: &[&str]| {
        let arguments = ["export", "--release", "--kubeconfig", &kubeconfig];
        operator.run(&[&arguments, more].concat()).await
    };
    let pods: Api<Pod> = Api::default_namespaced(plane.client.clone());
    let agent = json!({
        "metadata": { "name": "agent", "labels": { "app.kubernetes.io/name": "chutes-miner" } },
        "spec": { "containers": [{ "name": "agent", "image": "i" }], "nodeName": "gpu-00" },
    });
    plane.space("default").await;
    let agent = serde_json::from_value(agent).expect("a pod");
    pods.create(&how, &agent).await.expect("the API server works");
    release(&["--apply"])
        .await
        .ends(1, &["agents are running", "default/agent"]);
    let now = DeleteParams::default().grace_period(0);
    pods.delete("agent", &now).await.expect("it is there");
    ours.stop().await;
    release(&[]).await.ends(0, &["are to be released"]);
    assert_eq!(objects(space).await, first, "a dry run writes nothing");
    release(&["--apply"]).await.ends(0, &["were released"]);
    let last = settled(space).await;
    assert_eq!(uids(&last), uids(&first), "nothing went, nothing was made anew");
    let ours = ListParams::default().labels(NODE_LABEL);
    assert!(
        space
            .jobs()
            .list(&ours)
            .await
            .expect("it answers")
            .items
            .is_empty()
    );
    assert!(
        space
            .services()
            .list(&ours)
            .await
            .expect("it answers")
            .items
            .is_empty()
    );
    let jobs = space
        .jobs()
        .list(&ListParams::default())
        .await
        .expect("it answers");
    for job in jobs {
        let left = job
            .annotations()
            .keys()
            .find(|name| name.starts_with("chutes-agent/"));
        assert_eq!(left, None, "{}", job.name_any());
    }
    release(&["--apply"]).await.ends(0, &["0 objects were released"]);
}

/// The tables say what they said, but for what ended here, and for the server that is known by its node again.
fn compare(complete: &[Vec<String>], now: &[Vec<String>], stopped: &original::Deployment) {
    let parse = |tables: &[Vec<String>]| -> Vec<Vec<Value>> {
        let row = |row: &String| serde_json::from_str(row).expect("JSON");
        tables.iter().map(|rows| rows.iter().map(row).collect()).collect()
    };
    let (complete, now) = (parse(complete), parse(now));
    let find = |rows: &[Value], key: &str, id: &Value| rows.iter().find(|row| row[key] == *id).cloned();
    for (table, key, same) in [
        (0, "name", &["validator", "hourly_cost", "seed", "gpu_count"][..]),
        (
            1,
            "chute_id",
            &[
                "name",
                "image",
                "code",
                "filename",
                "ref_str",
                "version",
                "supported_gpus",
            ],
        ),
        (
            2,
            "deployment_id",
            &[
                "instance_id",
                "validator",
                "chute_id",
                "version",
                "active",
                "job_id",
                "config_id",
                "verified_at",
            ],
        ),
        (3, "gpu_id", &["validator", "model_short_ref", "verified"]),
    ] {
        for row in &complete[table] {
            let found = find(&now[table], key, &row[key]);
            if row["deployment_id"] == json!(stopped.id()) && table == 2 {
                assert_eq!(found, None, "it ended");
                continue;
            }
            let found = found.unwrap_or_else(|| panic!("{} is lost", row[key]));
            for column in same {
                assert_eq!(found[*column], row[*column], "{column} of {}", row[key]);
            }
            let holder = &row["deployment_id"];
            if table == 3 && *holder != json!(stopped.id()) {
                assert_eq!(found["deployment_id"], *holder, "holder of {}", row[key]);
            }
        }
    }
}
