//! Nodes with GPUs, as kubelets register them. All are this machine: each has a loopback address of its own.

use std::net::Ipv4Addr;

use anyhow::Context;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;

/// Nodes of one cluster at most.
pub(super) const NODES_MAX: usize = 10_000;

/// What a node is called.
pub(super) fn name(number: usize) -> String {
    format!("gpu-{number}")
}

/// A network that nobody uses now. Clusters on one machine have networks of their own.
pub(super) fn free_network() -> anyhow::Result<u8> {
    let mut networks: Vec<u8> = (80..=126).collect();
    fastrand::shuffle(&mut networks);
    let free = |network: &u8| {
        let door = address(*network, 1).map(|address| (address, super::API_PORT));
        door.is_ok_and(|door| std::net::TcpListener::bind(door).is_ok())
    };
    let found = networks.into_iter().find(free);
    found.context("all networks from 127.80 to 127.126 are in use")
}

/// The address of a node of the cluster with this network.
pub(super) fn address(network: u8, number: usize) -> anyhow::Result<Ipv4Addr> {
    let number = u16::try_from(number)?;
    let [high, low] = number.to_be_bytes();
    Ok(Ipv4Addr::new(127, network, high, low))
}

/// Registers nodes 1 to `count`, each with so many GPUs; the first `members` may be members of the coordinator.
pub(super) async fn register(
    client: &Client,
    network: u8,
    (count, members): (usize, usize),
    gpus: usize,
) -> anyhow::Result<()> {
    let nodes: Api<Node> = Api::all(client.clone());
    for number in 1..=count {
        let (name, address) = (name(number), address(network, number)?);
        let mut labels = json!({ "kubernetes.io/hostname": name, "nvidia.com/gpu.present": "true" });
        if number <= members {
            labels[super::MEMBER_LABEL] = json!("true");
        }
        let node = json!({ "metadata": { "name": name, "labels": labels } });
        let node = serde_json::from_value(node)?;
        let created = nodes.create(&PostParams::default(), &node).await;
        created.with_context(|| format!("node {name}"))?;
        let size = json!({ "cpu": "64", "memory": "512Gi", "pods": "110", "ephemeral-storage": "2Ti",
            "nvidia.com/gpu": gpus.to_string() });
        let status = json!({ "status": {
            "addresses": [{ "type": "InternalIP", "address": address }, { "type": "Hostname", "address": name }],
            "capacity": size, "allocatable": size,
        } });
        let (how, status) = (PatchParams::default(), Patch::Merge(status));
        let patched = nodes.patch_status(&name, &how, &status).await;
        patched.with_context(|| format!("status of node {name}"))?;
        // A new node is not ready, until somebody looks: no controller of nodes runs here.
        let ready = Patch::Merge(json!({ "spec": { "taints": null } }));
        let patched = nodes.patch(&name, &how, &ready).await;
        patched.with_context(|| format!("taints of node {name}"))?;
    }
    Ok(())
}
