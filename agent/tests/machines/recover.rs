//! The majority of the voters is gone for good: `chutes-agent recover` on a machine that is left says what may be lost,
//! and changes nothing before the cluster's id is typed.

use reqwest::Method;
use serde_json::{Value, json};

use super::machine::{Machine, three, until};

async fn cluster_id(machine: &Machine) -> String {
    let status = machine.ask(Method::GET, "/v1/status", &Value::Null).await;
    let id = status.expect("it answers")["cluster"]["id"].clone();
    id.as_str().expect("an id").to_owned()
}

/// Name and role of each host, as one of them is told.
async fn roles(machine: &Machine) -> Vec<String> {
    let hosts = machine.ask(Method::GET, "/hosts", &Value::Null).await;
    let hosts = hosts.unwrap_or_default();
    let hosts = hosts.as_array().cloned().unwrap_or_default();
    let word = |host: &Value| format!("{} {}", host["name"], host["role"]).replace('"', "");
    hosts.iter().map(word).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn recover_says_what_may_be_lost_and_goes_on_once_the_clusters_id_is_typed() {
    let [mut first, mut second, mut third] = three().await;
    // It answers once it has all that was acknowledged, its own vote included.
    let id = cluster_id(&third).await;
    third.refused(&["recover"], "stop the agent first");
    for machine in [&mut first, &mut second, &mut third] {
        machine.kill().await;
    }

    // What it says, whatever is answered.
    let door = |machine: &Machine| machine.door.to_string();
    for (input, why) in [
        (
            "",
            "nothing was typed, and nothing was changed: scripts give --cluster ID",
        ),
        ("yes\n", "not \"yes\": nothing was changed"),
        ("miner\n", "not \"miner\": nothing was changed"),
    ] {
        let (good, said) = third.command(&["recover"], input);
        assert!(!good, "{input:?}: {said}");
        for wanted in [
            format!("member 3 of the cluster {id}"),
            format!("member 1 at {}: votes", door(&first)),
            format!("member 3 at {}: votes, this one", door(&third)),
            "last log entry: term ".to_owned(),
            "What may be lost: everything that was acknowledged after this entry".to_owned(),
            "If a majority of the voters can be brought back, do that instead".to_owned(),
            format!("Type {id} to go on with this member alone: "),
            why.to_owned(),
        ] {
            assert!(said.contains(&wanted), "{wanted:?} is not in {said}");
        }
    }
    third.refused(&["recover", "--cluster", "miner-00000000"], "nothing was changed");

    // Typed as it is.
    let (good, said) = third.command(&["recover"], &format!("{id}\n"));
    let done = format!("member 3 is the only member of {id} now: start the agent");
    assert!(good && said.contains(&done), "{said}");
    third.refused(&["recover", "--cluster", &id], "is the only voter");
    third.start();
    until("it leads alone, and writes", async || {
        let alone = roles(&third).await == ["host-1 lost", "host-2 lost", "host-3 voter"];
        let invited = third.ask(Method::POST, "/hosts/invites", &json!({})).await;
        (alone && invited.is_ok()).then_some(())
    })
    .await;

    // Another one comes back, as another member.
    second.done(&["rejoin"], "comes back as member 4");
    second.start();
    until("it has learned everything and follows", async || {
        let now = roles(&second).await;
        (now == ["host-1 lost", "host-2 learner", "host-3 voter"]).then_some(())
    })
    .await;
    second.kill().await;
    third.kill().await;

    // By a flag, on a machine that only follows.
    let (good, said) = second.command(&["recover", "--cluster", &id], "");
    assert!(good && !said.contains("Type "), "{said}");
    for wanted in ["This member only follows", "member 4 is the only member"] {
        assert!(said.contains(wanted), "{wanted:?} is not in {said}");
    }
}
