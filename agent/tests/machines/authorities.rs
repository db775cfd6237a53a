//! Another authority for the certificates, as a host without a vote sees it: it is told over its link, changes over,
//! says so, and forgets the old one when that is dropped.

use std::path::Path;

use coordinator::identity::Identity;
use reqwest::Method;
use serde_json::{Value, json};

use super::machine::{Machine, SEED, until};

fn trusted(folder: &Path) -> Vec<String> {
    let identity = Identity::of_host(folder).expect("its own");
    identity
        .trusted()
        .iter()
        .map(|hash| hash.iter().map(|byte| format!("{byte:02x}")).collect())
        .collect()
}

/// Waits until the member says this of the certificates of both hosts.
async fn certificates(member: &Machine, wanted: [&str; 2]) {
    until(&format!("certificates: {wanted:?}"), async || {
        let status = member.ask(Method::GET, "/v1/ca", &Value::Null).await.ok()?;
        let of = |host: usize| {
            let row = &status["hosts"][host];
            let late = if row["trusts_old"] == true { " late" } else { "" };
            format!("{}{late}", row["certificate"].as_str().unwrap_or_default())
        };
        ([of(0), of(1)] == wanted).then_some(())
    })
    .await;
}

async fn rotate(member: &Machine, route: &str) -> Value {
    let answer = member.ask(Method::POST, route, &Value::Null).await;
    answer.unwrap_or_else(|why| panic!("{route}: {why}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_changes_over_to_another_authority_and_forgets_the_old_one() {
    let mut member = Machine::new(1, SEED);
    member.done(&["init"], "founded");
    member.start();
    let mut host = Machine::host(2);
    let token = member.invited(json!({})).await;
    host.done(&["join", &token], "as a host without a vote");
    host.start();
    let folder = host.data().join("host");
    let connected = async |member: &Machine| {
        until("the host is connected", async || {
            let hosts = member.ask(Method::GET, "/hosts", &Value::Null).await.ok()?;
            (hosts[1]["connected"] == true).then_some(())
        })
        .await;
    };
    connected(&member).await;
    let [old] = &trusted(&folder)[..] else {
        panic!("one authority")
    };

    // While it is connected.
    let begun = rotate(&member, "/v1/ca/rotate").await;
    let new = begun["next"].as_str().expect("a new one").to_owned();
    assert_eq!(begun["authority"], json!(old));
    certificates(&member, ["new", "new"]).await;
    assert_eq!(trusted(&folder), [old.clone(), new.clone()]);
    rotate(&member, "/v1/ca/finish").await;
    certificates(&member, ["current", "current"]).await;
    assert_eq!(trusted(&folder), std::slice::from_ref(&new));

    // While it is away: it trusts the one before, and the member shows a certificate of the next.
    host.kill().await;
    let begun = rotate(&member, "/v1/ca/rotate").await;
    let next = begun["next"].as_str().expect("a new one").to_owned();
    certificates(&member, ["new", "old"]).await;
    let refused = member.ask(Method::POST, "/v1/ca/finish", &Value::Null).await;
    let why = refused.expect_err("one host has not changed over");
    assert!(why.contains("host-2"), "{why}");
    host.start();
    certificates(&member, ["new", "new"]).await;
    assert_eq!(trusted(&folder), [new, next.clone()]);
    rotate(&member, "/v1/ca/finish").await;
    certificates(&member, ["current", "current"]).await;
    assert_eq!(trusted(&folder), [next]);

    // What both carry is good for connections that are made anew.
    member.kill().await;
    member.start();
    connected(&member).await;
    for machine in [&mut host, &mut member] {
        machine.kill().await;
    }
}
