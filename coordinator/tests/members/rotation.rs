//! Another authority, while the members work on: hosts change over, those that were away follow, the old one is
//! dropped.

use coordinator::identity::Identity;
use coordinator::join::client;
use coordinator::join::wire::Question;
use reqwest::Method;
use serde_json::{Value, json};

use super::cluster::{Host, copy, three};
use super::until;

/// Name and certificate of each host, as one of them is told.
async fn certificates(host: &Host) -> Vec<String> {
    let status = host.ask(Method::GET, "/v1/ca", &Value::Null).await;
    let status = status.unwrap_or_default();
    let hosts = status["hosts"].as_array().cloned().unwrap_or_default();
    let word = |host: &Value| {
        let late = if host["trusts_old"] == true { " late" } else { "" };
        format!("{} {}{late}", host["host"], host["certificate"]).replace('"', "")
    };
    hosts.iter().map(word).collect()
}

async fn term(host: &Host) -> Option<u64> {
    let raft = host.ask(Method::GET, "/v1/raft", &Value::Null).await.ok()?;
    raft["term"].as_u64()
}

fn trusted(host: &Host) -> Vec<[u8; 32]> {
    Identity::of_host(&host.identity()).expect("its own").trusted()
}

/// A host without a vote says what it carries.
async fn changes_over(host: &Host, wanted: &[[u8; 32]]) {
    let changed = client::change_over(&host.identity(), wanted).await;
    changed.expect("it is connected");
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_change_over_to_another_authority_and_nobody_is_locked_out() {
    let [mut first, mut second, mut third] = three().await;
    let observer = Host::new(4);
    let token = first.invite(json!({})).await;
    observer.join(&token).await.expect("it is invited");
    let old_token = first.invite(json!({})).await;
    let old = trusted(&first);
    assert_eq!(old, [old_token.authority]);
    third.stop().await;
    let before = until("a term", async || term(&first).await).await;

    let none = first.ask(Method::POST, "/v1/ca/finish", &Value::Null).await;
    assert!(matches!(none, Err((409, _))), "{none:?}");
    // Asked of a member that does not lead.
    let begun = second.ask(Method::POST, "/v1/ca/rotate", &Value::Null).await;
    let begun = begun.expect("it answers");
    assert_eq!(begun["authority"], hex::encode(old[0]));
    let again = first.ask(Method::POST, "/v1/ca/rotate", &Value::Null).await;
    assert!(matches!(again, Err((409, _))), "{again:?}");
    until("two members have changed over", async || {
        let now = certificates(&first).await;
        (now == ["host-1 new", "host-2 new", "host-3 old", "host-4 old"]).then_some(())
    })
    .await;
    let [_, new] = trusted(&first)[..] else {
        panic!("both are trusted")
    };
    assert_eq!(begun["next"], hex::encode(new));
    assert_eq!(trusted(&second), [old[0], new]);

    // A member that was away trusts only the old one, and is shown certificates of the new one.
    third.start();
    until("it has learned of it and followed", async || {
        let now = certificates(&third).await;
        (now == ["host-1 new", "host-2 new", "host-3 new", "host-4 old"]).then_some(())
    })
    .await;
    assert_eq!(term(&first).await, Some(before), "no lead was lost over it");
    let refused = first.ask(Method::POST, "/v1/ca/finish", &Value::Null).await;
    let (status, reason) = refused.expect_err("one host has not changed over");
    assert!(
        status == 409 && reason.contains("host-4") && !reason.contains("host-3"),
        "{reason}"
    );

    // Who was invited before comes in, and who is invited now knows only the new one.
    let fifth = Host::new(5);
    fifth.join(&old_token).await.expect("the old token is good");
    assert_eq!(trusted(&fifth), [old[0], new]);
    let token = second.invite(json!({})).await;
    assert_eq!(token.authority, new);
    let sixth = Host::new(6);
    sixth.join(&token).await.expect("the new token is good");

    let kept = tempfile::tempdir().expect("a folder");
    copy(&observer.identity(), kept.path());
    changes_over(&observer, &[old[0], new]).await;
    changes_over(&observer, &[old[0], new]).await;
    let finished = third.ask(Method::POST, "/v1/ca/finish", &Value::Null).await;
    assert_eq!(finished.expect("all have")["authority"], hex::encode(new));
    until("the members have forgotten the old one", async || {
        let of_members = [&first, &second, &third].map(trusted);
        of_members.iter().all(|trusted| *trusted == [new]).then_some(())
    })
    .await;
    for host in [&observer, &fifth, &sixth] {
        changes_over(host, &[new]).await;
        assert_eq!(trusted(host), [new]);
    }
    until("nobody is told any more", async || {
        let now = certificates(&first).await;
        (now.len() == 6 && now.iter().all(|host| host.ends_with(" current"))).then_some(())
    })
    .await;

    // A certificate of the old one opens no door any more.
    let doors = [first.door.to_string()];
    let refused = client::ask_as_host(&doors, kept.path(), &Question::Renew).await;
    assert!(refused.is_err(), "{refused:?}");
    assert_eq!(term(&first).await, Some(before), "no lead was lost over it");

    // With the new ones everybody finds everybody again.
    second.stop().await;
    second.start();
    until("it is told who leads", async || second.leader().await).await;
    for host in [&mut first, &mut second, &mut third] {
        host.stop().await;
    }
}
