//! The majority is lost for good: a survivor goes on alone, the others come back as new members.

use coordinator::join::wire::Question;
use coordinator::join::{admission, client};
use coordinator::recovery::{Error, Survivor};
use reqwest::Method;
use serde_json::{Value, json};

use super::cluster::{Host, copy, three};
use super::until;

async fn look(host: &Host) -> Result<Survivor, Error> {
    Survivor::look(&host.folder.path().join("coordinator"), &host.identity()).await
}

async fn incarnation(host: &Host) -> u64 {
    until("an incarnation", async || {
        let state = host.ask(Method::GET, "/v1/state", &Value::Null).await.ok()?;
        state["incarnation"].as_u64()
    })
    .await
}

/// Name and role of each host, as one of them is told.
async fn roles(host: &Host) -> Vec<String> {
    let hosts = host.ask(Method::GET, "/hosts", &Value::Null).await;
    let hosts = hosts.unwrap_or_default();
    let hosts = hosts.as_array().cloned().unwrap_or_default();
    let word = |host: &Value| format!("{} {}", host["name"], host["role"]).replace('"', "");
    hosts.iter().map(word).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_survivor_goes_on_alone_and_the_others_come_back_as_new_members() {
    let [mut first, mut second, mut third] = three().await;
    let before = incarnation(&third).await;
    for host in [&mut first, &mut second, &mut third] {
        host.stop().await;
    }
    let survivor = look(&third).await.expect("it has a copy");
    assert_eq!(survivor.member, 3);
    assert!(survivor.condition.voters.iter().eq(&[1, 2, 3]));
    let again = look(&third).await.expect("looking changes nothing");
    assert_eq!(again.condition, survivor.condition);
    let now = coordinator::clock::Clock::now(&coordinator::clock::WallClock);
    let mistyped = survivor.go_alone("test", third.door.to_string(), now).await;
    assert!(
        matches!(mistyped, Err(Error::OtherCluster { .. })),
        "{mistyped:?}"
    );
    let again = look(&third).await.expect("nothing was changed");
    assert_eq!(again.condition, survivor.condition);
    let (cluster, door) = (&survivor.cluster, third.door.to_string());
    let gone_on = survivor.go_alone(cluster, door, now).await;
    gone_on.expect("nobody else has the store");
    let once_more = look(&third).await;
    assert!(matches!(once_more, Err(Error::IsAlone)), "{once_more:?}");

    third.start();
    assert!(incarnation(&third).await > before, "hosts follow the new state");
    until("it leads alone", async || {
        (roles(&third).await == ["host-1 lost", "host-2 lost", "host-3 voter"]).then_some(())
    })
    .await;
    let invited = third.ask(Method::POST, "/hosts/invites", &json!({})).await;
    assert!(invited.is_ok(), "it writes: {invited:?}");

    // One of the old majority is back on its old disk: it is turned away, and disturbs nobody.
    let term = async |host: &Host| {
        let raft = host.ask(Method::GET, "/v1/raft", &Value::Null).await.ok()?;
        raft["term"].as_u64()
    };
    let before = until("a term", async || term(&third).await).await;
    first.start();
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert_eq!(term(&third).await, Some(before), "no election because of it");
    assert_eq!(first.leader().await, None, "it leads nobody and follows nobody");
    first.stop().await;

    // It rejoins: another member id, and an empty store.
    let doors = [third.door.to_string()];
    let answer = client::ask_as_host(&doors, &first.identity(), &Question::Rejoin).await;
    let granted = client::granted(answer.expect("it answers")).expect("it is known");
    assert_eq!(granted.admission.member, Some(4));
    std::fs::remove_dir_all(first.folder.path().join("coordinator")).expect("it is there");
    admission::keep(&first.identity(), &granted).expect("ours");
    first.start();
    until("it has learned everything and follows", async || {
        let now = roles(&first).await;
        (now == ["host-1 learner", "host-2 lost", "host-3 voter"]).then_some(())
    })
    .await;
    for host in [&mut first, &mut third] {
        host.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_nothing_to_go_on_with_is_refused() {
    let mut first = Host::new(1);
    let nobody = look(&first).await;
    assert!(matches!(nobody, Err(Error::NotJoined)), "{nobody:?}");
    first.found();
    let founded = look(&first).await;
    assert!(matches!(founded, Err(Error::Empty)), "{founded:?}");
    first.start();
    let observer = Host::new(2);
    let token = first.invite(json!({})).await;
    observer.join(&token).await.expect("it is invited");
    let without = look(&observer).await;
    assert!(matches!(without, Err(Error::NotAMember)), "{without:?}");

    // One eligible host more: it follows without a vote, with a full copy.
    let mut learner = Host::new(3);
    let token = first.invite(json!({ "eligible": true })).await;
    learner.join(&token).await.expect("it is invited");
    learner.start();
    until("it follows", async || {
        (roles(&learner).await == ["host-1 voter", "host-2 observer", "host-3 learner"]).then_some(())
    })
    .await;
    learner.stop().await;
    first.stop().await;
    let alone = look(&first).await;
    assert!(matches!(alone, Err(Error::IsAlone)), "{alone:?}");

    let lost = tempfile::tempdir().expect("a folder");
    copy(first.folder.path(), lost.path());
    std::fs::remove_dir_all(lost.path().join("coordinator/raft")).expect("it is there");
    let lost = Survivor::look(&lost.path().join("coordinator"), &lost.path().join("host")).await;
    assert!(
        matches!(lost, Err(Error::StoreLost { member: 1, .. })),
        "{lost:?}"
    );

    let survivor = look(&learner).await.expect("it has a copy");
    assert!(survivor.condition.voters.iter().eq(&[1]), "it has no vote");
    let now = coordinator::clock::Clock::now(&coordinator::clock::WallClock);
    let (cluster, door) = (&survivor.cluster, learner.door.to_string());
    let gone_on = survivor.go_alone(cluster, door, now).await;
    gone_on.expect("a learner can go on");
    learner.start();
    until("it votes", async || {
        (roles(&learner).await == ["host-1 lost", "host-2 observer", "host-3 voter"]).then_some(())
    })
    .await;
    learner.stop().await;
}
