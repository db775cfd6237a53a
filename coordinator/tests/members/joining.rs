//! The life of members: in, out, back, and what is refused on the way in.

use coordinator::join::wire::Question;
use coordinator::join::{Admission, admission, client};
use coordinator::member::Error;
use protocol::hotkey::Signer;
use reqwest::Method;
use serde_json::{Value, json};

use super::cluster::{Host, copy, three};
use super::until;

#[tokio::test(flavor = "multi_thread")]
async fn three_members_share_the_state_and_hand_over_the_lead() {
    let [mut first, second, third] = three().await;
    // A write through a member that does not lead, read through another one.
    let leader = first.leader().await.expect("somebody leads");
    assert_eq!(leader, "host-1", "the founder leads until it stops");
    let invited = second.ask(Method::POST, "/hosts/invites", &json!({})).await;
    assert!(invited.is_ok(), "{invited:?}");
    let hosts = third
        .ask(Method::GET, "/hosts", &Value::Null)
        .await
        .expect("it answers");
    assert_eq!(hosts.as_array().map(Vec::len), Some(3), "{hosts}");
    let sites = third
        .ask(Method::GET, "/v1/raft", &Value::Null)
        .await
        .expect("it answers");
    assert_eq!(
        sites["sites"].as_array().map(Vec::len),
        Some(3),
        "as the leader sees it: {sites}"
    );

    // Handing over by hand, asked of a member that does not lead.
    let moved = third
        .ask(Method::POST, "/v1/raft/transfer", &json!({ "to": "host-2" }))
        .await;
    assert_eq!(moved.expect("it is handed over")["host"], "host-2");

    // The authority's key is in the state only.
    assert!(!first.identity().join("ca.key").exists());

    // An orderly stop of the leader, and its return.
    let mut second = second;
    second.stop().await;
    let leader = until("another one leads", async || first.leader().await).await;
    assert_ne!(leader, "host-2");
    second.start();
    until("it is told who leads", async || second.leader().await).await;
    for host in [&mut first, &mut second] {
        host.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn invitations_are_checked_and_every_refusal_says_why() {
    let mut first = Host::new(1);
    first.found();
    first.start();
    let other = Host::new(2);
    let ask =
        async |join| client::join(&first.invite(json!({})).await, &Question::Join(Box::new(join))).await;
    let refused = async |wanted: &str, answer: Result<_, client::Error>| {
        let error = answer
            .err()
            .unwrap_or_else(|| panic!("not refused: {wanted}"))
            .to_string();
        assert!(error.contains(wanted), "{wanted} is not in: {error}");
    };

    let token = first.invite(json!({ "ttl": 1 })).await;
    tokio::time::sleep(std::time::Duration::from_millis(1_100)).await;
    refused("has expired", other.join(&token).await).await;

    let token = first.invite(json!({})).await;
    let mut wish = other.wish(&token);
    wish.clock = protocol::time::UnixMillis(wish.clock.0 - 3_600_000);
    refused(
        "clock is 36",
        client::join(&token, &Question::Join(Box::new(wish))).await,
    )
    .await;

    let mut wish = other.wish(&token);
    wish.hotkey = Some(Signer::from_seed(&[9; 32]).hotkey().clone());
    refused(
        "one cluster is one hotkey",
        client::join(&token, &Question::Join(Box::new(wish))).await,
    )
    .await;

    let eligible = first.invite(json!({ "eligible": true })).await;
    let mut wish = other.wish(&eligible);
    wish.hotkey = None;
    refused(
        "needs the miner's seed",
        client::join(&eligible, &Question::Join(Box::new(wish))).await,
    )
    .await;

    let mut namesake = other.wish(&token);
    namesake.name = "host-1".to_owned();
    refused(
        "belongs to another host",
        client::join(&token, &Question::Join(Box::new(namesake))).await,
    )
    .await;

    let mut forged = token.clone();
    forged.secret = [9; 32];
    refused("not known here", other.join(&forged).await).await;

    let mut foreign = token.clone();
    foreign.authority = [9; 32];
    refused("another cluster than the invitation", other.join(&foreign).await).await;

    let mut nowhere = token.clone();
    nowhere.doors = vec!["127.0.0.1:9".to_owned()];
    refused("is UDP open", other.join(&nowhere).await).await;

    other.join(&token).await.expect("after all that it is still good");
    let third = Host::new(3);
    refused("was used by another host", third.join(&token).await).await;
    let mut odd = third.wish(&token);
    odd.address = "x".repeat(300);
    refused("no word of at most", ask(odd).await).await;

    // Two clusters do not mix: a member of another one is refused by its certificate.
    let stranger = Host::new(4);
    stranger.found();
    let admission = Admission::read(&stranger.identity())
        .expect("ours")
        .expect("it has founded");
    let doors = [first.door.to_string()];
    let answer = client::ask_as_host(&doors, &stranger.identity(), &Question::Renew).await;
    refused("no member could be asked", answer.and_then(client::granted)).await;
    assert!(
        admission::found(
            &stranger.identity(),
            "again",
            &stranger.server(),
            "a:1",
            Default::default()
        )
        .expect("ours")
        .is_none()
    );
    assert_eq!(
        Admission::read(&stranger.identity()).expect("ours"),
        Some(admission)
    );
    first.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_lost_its_store_comes_back_as_another_one() {
    let [mut first, mut second, mut third] = three().await;
    third.stop().await;
    std::fs::remove_dir_all(third.raft_folder()).expect("it is there");
    let error = third.refused().await;
    assert!(matches!(error, Error::StoreLost { member: 3, .. }), "{error}");
    assert!(error.to_string().contains("chutes-agent rejoin"), "{error}");

    let doors = [first.door.to_string()];
    let answer = client::ask_as_host(&doors, &third.identity(), &Question::Rejoin).await;
    let granted = client::granted(answer.expect("it answers")).expect("it is known");
    assert_eq!(granted.admission.member, Some(4), "an id that nobody had");
    admission::keep(&third.identity(), &granted).expect("ours");
    third.start();
    until("it votes again, and its old self does not", async || {
        let raft = first.ask(Method::GET, "/v1/raft", &Value::Null).await.ok()?;
        let members: Vec<u64> = raft["members"]
            .as_array()?
            .iter()
            .filter(|member| member["role"] == "voter")
            .filter_map(|member| member["member"].as_u64())
            .collect();
        (members == [1, 2, 4]).then_some(())
    })
    .await;
    for host in [&mut first, &mut second, &mut third] {
        host.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disk_of_a_removed_member_stays_out() {
    let [mut first, mut second, mut third] = three().await;
    let fourth = {
        let mut fourth = Host::new(4);
        let token = first.invite(json!({ "eligible": true })).await;
        fourth.join(&token).await.expect("invited");
        fourth.start();
        fourth
    };
    third.stop().await;
    let old = tempfile::tempdir().expect("a folder");
    copy(third.folder.path(), old.path());
    let removed = first.ask(Method::DELETE, "/hosts/host-3", &Value::Null).await;
    assert!(removed.is_ok(), "{removed:?}");
    until("another one votes in its place", async || {
        (first.voters().await == ["host-1", "host-2", "host-4"]).then_some(())
    })
    .await;
    let term = async |host: &Host| {
        let raft = host.ask(Method::GET, "/v1/raft", &Value::Null).await.ok()?;
        raft["term"].as_u64()
    };
    let before = until("a term", async || term(&first).await).await;

    // It is started on its old disk: it is refused, and disturbs nobody.
    third.start();
    let doors = [first.door.to_string()];
    for question in [Question::Renew, Question::Rejoin] {
        let error = client::ask_as_host(&doors, &third.identity(), &question)
            .await
            .err()
            .map(|error| error.to_string());
        let error = error.expect("it is turned away");
        assert!(error.contains("removed from the cluster"), "{error}");
    }
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert_eq!(term(&first).await, Some(before), "no election because of it");
    let mut fourth = fourth;
    for host in [&mut first, &mut second, &mut third, &mut fourth] {
        host.stop().await;
    }
}
