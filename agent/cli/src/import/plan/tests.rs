//! Tests of the plan.

use serde_json::from_value;

use super::*;

const DEPLOYMENT: &str = "dep-1";

fn id(number: u8) -> String {
    format!("{number:032x}")
}

/// One server with two GPUs and a deployment on the first of them.
fn rows() -> Rows {
    let gpu = |number, deployment: Option<&str>| {
        json!({
            "gpu_id": id(number), "server_id": "uid-1", "deployment_id": deployment, "model_short_ref": "h100_sxm",
            "verified": true,
        })
    };
    Rows {
        servers: vec![read(json!({
            "server_id": "uid-1", "name": "gpu-1", "ip_address": "192.0.2.1", "validator": "5F", "hourly_cost": 1.5, "seed": 9_007_199_254_740_993_i64,
        }))],
        gpus: vec![read(gpu(1, Some(DEPLOYMENT))), read(gpu(2, None))],
        chutes: vec![read(json!({
            "chute_id": "chute-1", "name": "acme/model", "image": "acme/model:2", "code": "x", "filename": "app.py",
            "ref_str": "app:chute", "version": "v2", "supported_gpus": ["h100_sxm"], "gpu_count": 1,
        }))],
        deployments: vec![read(json!({
            "deployment_id": DEPLOYMENT, "chute_id": "chute-1", "server_id": "uid-1", "version": "v1",
            "instance_id": "instance-1", "config_id": "config-1", "active": true, "stub": false,
            "created_at": "1970-01-01T00:00:01+00:00", "verified_at": "1970-01-01T00:00:02",
        }))],
    }
}

fn objects() -> Objects {
    let labels = json!({ "chutes/deployment-id": DEPLOYMENT, "chutes/chute": "true" });
    let name = |name: &str| json!({ "name": name, "uid": format!("uid of {name}"), "labels": labels });
    let image = "5f.localregistry.chutes.ai:30500/acme/model:1-patch";
    let pod = json!({ "nodeName": "gpu-1", "containers": [{ "name": "chute", "image": image }] });
    let ports = json!([{ "port": 8000, "nodePort": 31_000, "protocol": "TCP" }, { "port": 9, "nodePort": 31_001, "protocol": "UDP" }]);
    let status = json!({ "phase": "Running", "containerStatuses": [
        { "name": "chute", "ready": true, "image": "", "imageID": "", "restartCount": 0 },
    ] });
    Objects {
        jobs: vec![read(
            json!({ "metadata": name("chute-dep-1"), "spec": { "template": { "spec": pod } } }),
        )],
        services: vec![read(
            json!({ "metadata": name("chute-service-dep-1"), "spec": { "ports": ports } }),
        )],
        pods: vec![read(
            json!({ "metadata": name("chute-dep-1-abc"), "status": status }),
        )],
    }
}

fn read<T: serde::de::DeserializeOwned>(value: Value) -> T {
    from_value(value).expect("as it is written")
}

#[test]
fn a_server_becomes_a_request() {
    let plan = plan(&rows(), &objects());
    assert!(plan.left_out.is_empty() && plan.left_alone.is_empty(), "{plan:?}");
    let [server] = &plan.servers[..] else {
        panic!("{plan:?}")
    };
    assert_eq!(server.problems, Vec::<String>::new());
    let expected = json!({
        "server": {
            "name": "gpu-1", "ip_address": "192.0.2.1", "validator": "5F", "gpu_short_ref": "h100_sxm", "hourly_cost": 1.5,
            "seed": 9_007_199_254_740_993_u64, "locked": false,
            "gpus": [{ "gpu_id": id(1), "verified": true }, { "gpu_id": id(2), "verified": true }],
        },
        "deployments": [{
            "deployment_id": DEPLOYMENT, "chute_id": "chute-1", "version": "v1", "image": "acme/model:1-patch",
            "chutes_version": null, "gpus": [id(1)], "job_id": null, "config_id": "config-1",
            "instance_id": "instance-1", "active": true, "verified_at_ms": 2000, "activated_at_ms": null,
            "created_at_ms": 1000, "preemptible": true, "ready": true,
            "ports": [
                { "internal": 8000, "external": 31_000, "protocol": "tcp" },
                { "internal": 9, "external": 31_001, "protocol": "udp" },
            ],
            "chute": {
                "name": "acme/model", "image": "acme/model:2", "version": "v2", "chutes_version": null,
                "gpu_count": 1, "supported_gpus": ["h100_sxm"], "tee": false, "filename": "app.py",
                "ref_str": "app:chute", "code": "x",
            },
        }],
    });
    assert_eq!(server.request, expected);
}

#[test]
fn only_what_an_object_lacks_is_written() {
    let whole = plan(&rows(), &objects());
    let server = &whole.servers[0];
    let shown = |marks: &[Mark]| {
        marks
            .iter()
            .map(|mark| mark.object.to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(shown(&server.jobs), ["Job chute-dep-1"]);
    assert_eq!(
        shown(&server.others),
        ["Service chute-service-dep-1", "Pod chute-dep-1-abc"]
    );
    assert_eq!(
        shown(&server.seals),
        ["Service chute-service-dep-1", "Job chute-dep-1"]
    );
    let mut objects = objects();
    let write = |meta: &mut kube::core::ObjectMeta, mark: &Mark| {
        meta.labels.get_or_insert_default().extend(mark.labels.clone());
        meta.annotations
            .get_or_insert_default()
            .extend(mark.annotations.clone());
    };
    write(&mut objects.jobs[0].metadata, &server.jobs[0]);
    write(&mut objects.services[0].metadata, &server.others[0]);
    write(&mut objects.pods[0].metadata, &server.others[1]);
    let marked = plan(&rows(), &objects);
    assert!(marked.servers[0].jobs.is_empty() && marked.servers[0].others.is_empty());
    assert_eq!(marked.servers[0].seals, server.seals, "what broke off goes on");
    write(&mut objects.services[0].metadata, &server.seals[0]);
    write(&mut objects.jobs[0].metadata, &server.seals[1]);
    // Sealed, it is its agent's: what that one writes stays.
    let gpus = objects.jobs[0].annotations_mut().get_mut(GPUS_ANNOTATION);
    "another order".clone_into(gpus.expect("marked"));
    let sealed = plan(&rows(), &objects);
    assert!(sealed.servers[0].jobs.is_empty() && sealed.servers[0].seals.is_empty());
}

#[test]
fn what_does_not_agree_is_left_out_with_the_reason() {
    type Change = fn(&mut Rows, &mut Objects);
    let cases: &[(Change, &str)] = &[
        (
            |rows, objects| {
                rows.deployments[0].stub = Some(true);
                objects.jobs.clear();
            },
            "it is a stub",
        ),
        (|rows, _| rows.chutes.clear(), "its chute chute-1 has no row"),
        (|rows, _| rows.gpus[0].deployment_id = None, "it has no GPUs"),
        (
            |rows, _| rows.gpus[0].server_id = "uid-2".to_owned(),
            "is not of its server",
        ),
        (
            |rows, _| rows.deployments[0].version = "a b".to_owned(),
            "ChuteVersion",
        ),
        (
            |rows, _| rows.deployments[0].instance_id = Some(String::new()),
            "InstanceId",
        ),
        (
            |rows, _| rows.deployments[0].verified_at = Some("soon".to_owned()),
            "is no time",
        ),
        (|_, objects| objects.jobs.clear(), "it has no Job"),
        (
            |_, objects| objects.jobs[0].metadata.name = Some("other".to_owned()),
            "it has no Job",
        ),
        (|_, objects| objects.services.clear(), "it has no Service"),
        (
            |_, objects| {
                objects.jobs[0].metadata.deletion_timestamp = Some(read(json!("2026-01-01T00:00:00Z")))
            },
            "it is being removed",
        ),
        (
            |_, objects| {
                objects.jobs[0].spec = Some(read(
                    json!({ "template": { "spec": { "nodeName": "b", "containers": [] } } }),
                ))
            },
            "on the node \"b\"",
        ),
        (
            |_, objects| {
                objects.jobs[0].spec = Some(read(
                    json!({ "template": { "spec": { "nodeName": "gpu-1", "containers": [] } } }),
                ))
            },
            "has no container chute",
        ),
        (
            |_, objects| {
                _ = objects.services[0]
                    .labels_mut()
                    .insert(NODE_LABEL.to_owned(), "gpu-2".to_owned())
            },
            "belong to the agent of gpu-2",
        ),
        (
            |_, objects| objects.services[0].spec = Some(read(json!({ "ports": [{ "port": 8000 }] }))),
            "no node port for port 8000",
        ),
    ];
    for (change, word) in cases {
        let (mut rows, mut objects) = (rows(), objects());
        change(&mut rows, &mut objects);
        let plan = plan(&rows, &objects);
        // What has a Job holds GPUs that would count as free: the server has to wait.
        let has_job = objects
            .by_deployment()
            .get(DEPLOYMENT)
            .and_then(|found| found.job);
        let whys: Vec<&str> = if has_job.is_some_and(is_live) {
            plan.servers[0].problems.iter().map(String::as_str).collect()
        } else {
            plan.left_out.iter().map(|left| left.why.as_str()).collect()
        };
        assert!(whys.iter().any(|why| why.contains(word)), "{word}: {plan:?}");
        let deployments = plan.servers[0].request["deployments"].as_array();
        assert_eq!(deployments.map(Vec::len), Some(0), "{word}");
        assert!(
            plan.servers[0].jobs.is_empty() && plan.servers[0].seals.is_empty(),
            "{word}"
        );
    }
}

#[test]
fn a_stub_that_was_launched_is_taken_over() {
    let mut rows = rows();
    rows.deployments[0].stub = Some(true);
    let plan = plan(&rows, &objects());
    assert_eq!(plan.servers[0].problems, Vec::<String>::new());
    assert_eq!(plan.servers[0].jobs.len(), 1);
}

#[test]
fn a_job_that_no_row_knows_is_a_problem_of_its_server() {
    let mut objects = objects();
    let mut other = objects.jobs[0].clone();
    other.metadata.name = Some("chute-unknown".to_owned());
    other
        .labels_mut()
        .insert(DEPLOYMENT_LABEL.to_owned(), "unknown".to_owned());
    objects.jobs.push(other);
    let problems = |objects: &Objects| plan(&rows(), objects).servers[0].problems.clone();
    assert!(problems(&objects)[0].contains("the Job chute-unknown runs on it"));
    let ended = json!({ "conditions": [{ "type": "Failed", "status": "True" }] });
    objects.jobs[1].status = Some(read(ended));
    assert_eq!(problems(&objects), Vec::<String>::new(), "it holds nothing");
}

#[test]
fn a_server_that_cannot_be_taken_over_says_why() {
    type Change = fn(&mut Rows);
    let cases: &[(Change, &str)] = &[
        (
            |rows| rows.servers[0].name = "a".repeat(64),
            "cannot be the value of a label",
        ),
        (
            |rows| rows.servers[0].name = "-a".to_owned(),
            "cannot be the value of a label",
        ),
        (
            |rows| rows.gpus[1].model_short_ref = Some("a6000".to_owned()),
            "several models",
        ),
        (
            |rows| rows.gpus[1].model_short_ref = None,
            "several models or of none",
        ),
        (|rows| rows.gpus.clear(), "no GPU of it"),
        (|rows| rows.servers[0].hourly_cost = None, "no hourly cost"),
        (|rows| rows.servers[0].seed = Some(-1), "below zero"),
    ];
    for (change, word) in cases {
        let mut rows = rows();
        change(&mut rows);
        let plan = plan(&rows, &objects());
        let problems = &plan.servers[0].problems;
        assert!(
            problems.iter().any(|problem| problem.contains(word)),
            "{word}: {problems:?}"
        );
    }
    let (mut rows, objects) = (rows(), objects());
    rows.chutes[0].code = "x".repeat(BODY_BYTES_MAX);
    assert!(plan(&rows, &objects).servers[0].problems[0].contains("more than the 1048576 of a request"));
}

#[test]
fn what_nothing_belongs_to_is_named() {
    let (mut rows, objects) = (rows(), objects());
    rows.servers[0].server_id = "another".to_owned();
    rows.deployments[0].deployment_id = "dep-2".to_owned();
    let plan = plan(&rows, &objects);
    let left: Vec<&str> = plan.left_out.iter().map(|left| left.what.as_str()).collect();
    assert_eq!(
        left,
        [
            &format!("GPU {}", id(1)),
            &format!("GPU {}", id(2)),
            "deployment dep-2"
        ]
    );
    let alone = &plan.left_alone[0];
    assert_eq!(
        (alone.job.as_str(), alone.node.as_str()),
        ("chute-dep-1", "gpu-1")
    );
}

#[test]
fn an_image_is_named_without_its_registry() {
    for (image, expected) in [
        ("registry.chutes.ai/acme/model:1", "acme/model:1"),
        ("localhost:5000/acme/model:1", "acme/model:1"),
        ("acme/model:1", "acme/model:1"),
    ] {
        let pod = json!({ "containers": [{ "name": "chute", "image": image }] });
        let job = read(json!({ "metadata": {}, "spec": { "template": { "spec": pod } } }));
        assert_eq!(image_of(&job).as_deref(), Ok(expected));
    }
}
