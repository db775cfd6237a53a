//! A member's host gets another address: `coordinator.advertise` changes in its file, and it is started again.

use coordinator::join::Admission;
use reqwest::Method;
use serde_json::{Value, json};

use super::cluster::{Host, three};
use super::until;

/// Name and address of each host, as one of them is told.
async fn addresses(host: &Host) -> Vec<String> {
    let hosts = host.ask(Method::GET, "/hosts", &Value::Null).await;
    let hosts = hosts.unwrap_or_default();
    let hosts = hosts.as_array().cloned().unwrap_or_default();
    let word = |host: &Value| format!("{} {}", host["name"], host["address"]).replace('"', "");
    hosts.iter().map(word).collect()
}

fn expected(hosts: &[&Host]) -> Vec<String> {
    let word = |host: &&Host| format!("{} {}", host.name(), host.door);
    hosts.iter().map(word).collect()
}

/// The leader, which `asked` knows, has heard from all three, and each has all that it wrote.
async fn all_follow(asked: &Host) {
    until("all follow", async || {
        let raft = asked.ask(Method::GET, "/v1/raft", &Value::Null).await.ok()?;
        let members = raft["members"].as_array()?;
        let follows = |member: &&Value| {
            let answers = member["answered_ago_ms"].as_u64().is_some_and(|ago| ago < 1_000);
            member["leads"] == true || answers
        };
        (members.iter().filter(follows).count() == 3).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_moves_is_found_by_members_and_hosts() {
    let [mut first, mut second, mut third] = three().await;
    // One that follows.
    third.stop().await;
    third.move_away();
    third.start();
    until("its address is known everywhere", async || {
        let wanted = expected(&[&first, &second, &third]);
        (addresses(&first).await == wanted && addresses(&third).await == wanted).then_some(())
    })
    .await;
    all_follow(&second).await;
    assert_eq!(
        first.voters().await,
        ["host-1", "host-2", "host-3"],
        "it was not replaced"
    );

    // The one that leads.
    assert_eq!(first.leader().await.as_deref(), Some("host-1"));
    first.stop().await;
    first.move_away();
    first.start();
    until("its address is known everywhere", async || {
        let wanted = expected(&[&first, &second, &third]);
        (addresses(&second).await == wanted && addresses(&first).await == wanted).then_some(())
    })
    .await;
    all_follow(&second).await;

    // Whoever is invited is told the new doors, and comes in by them.
    let token = second.invite(json!({})).await;
    let doors = [&first, &second, &third].map(|host| host.door.to_string());
    assert_eq!(token.doors, doors);
    let mut by_the_moved_one = token.clone();
    by_the_moved_one.doors = vec![third.door.to_string()];
    let fourth = Host::new(4);
    let granted = fourth.join(&by_the_moved_one).await.expect("it is invited");
    assert_eq!(granted.admission.doors, doors);

    // An address that another member has is refused, and nothing changes.
    second.stop().await;
    let (own, wrong) = (second.door, third.door.to_string());
    second.advertise = Some(wrong.clone());
    second.start();
    let told = coordinator::join::client::tell_address(&doors[2..], &second.identity(), &wrong).await;
    let refused = told.expect_err("host-3 is there").to_string();
    assert!(
        refused.contains("is the address of the member on host host-3"),
        "{refused}"
    );
    assert_eq!(addresses(&third).await[1], format!("host-2 {own}"));
    for host in [&mut first, &mut second, &mut third] {
        host.stop().await;
    }
}

/// All three get other addresses while none of them runs; those that `knows` names are told where the others are.
async fn all_move(knows: &[usize]) {
    let mut hosts = three().await;
    for host in &mut hosts {
        host.stop().await;
    }
    for host in &mut hosts {
        host.move_away();
    }
    let doors = hosts.each_ref().map(|host| host.door.to_string());
    for known in knows {
        let others = doors.iter().filter(|door| **door != doors[*known]);
        hosts[*known].members = others.cloned().collect();
    }
    for host in &mut hosts {
        host.start();
    }
    let [mut first, mut second, mut third] = hosts;
    let wanted = expected(&[&first, &second, &third]);
    for host in [&first, &second, &third] {
        until("its address is known everywhere", async || {
            (addresses(host).await == wanted).then_some(())
        })
        .await;
    }
    all_follow(&third).await;
    assert_eq!(second.voters().await, ["host-1", "host-2", "host-3"]);

    // What was recorded is all that they need from now on.
    for host in [&mut first, &mut second, &mut third] {
        host.stop().await;
        host.members.clear();
    }
    for host in [&mut first, &mut second, &mut third] {
        host.start();
    }
    all_follow(&third).await;
    for host in [&mut first, &mut second, &mut third] {
        host.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn members_that_all_move_at_once_find_each_other_by_the_configuration() {
    all_move(&[0, 1, 2]).await;
}

/// It tells the others where it is, and they tell it.
#[tokio::test(flavor = "multi_thread")]
async fn of_three_members_one_that_knows_where_the_others_are_is_enough() {
    all_move(&[1]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_only_member_moves_too() {
    let mut first = Host::new(1);
    first.found();
    first.start();
    first.invite(json!({})).await;
    first.stop().await;
    first.move_away();
    first.start();
    until("its address is known", async || {
        (addresses(&first).await == expected(&[&first])).then_some(())
    })
    .await;
    let token = first.invite(json!({ "eligible": true })).await;
    let mut second = Host::new(2);
    let granted = second.join(&token).await.expect("it is invited");
    assert_eq!(
        granted.admission.doors,
        [first.door, second.door].map(|door| door.to_string())
    );
    second.start();
    // Told by the leader over the new address: the log knows it too.
    until("it follows", async || second.leader().await).await;
    let kept = Admission::read(&second.identity())
        .expect("ours")
        .expect("it has joined");
    assert!(kept.opened);
    for host in [&mut second, &mut first] {
        host.stop().await;
    }
}
