//! The cluster begins: the first member founds it, the others are invited and join. That they become voters
//! is the leader's work.

use std::time::Duration;

use coordinator::clock::Clock;
use coordinator_core::state_machine::host::{Invite, InviteId, NewHost};
use coordinator_core::state_machine::{Command, Reply};
use protocol::id::ServerId;
use sha2::{Digest, Sha256};

use super::client::Client;
use super::clock::SimulatedClock;
use super::network::address_of;

/// Where members stand.
const SITES: [&str; 3] = ["north", "south", "west"];

fn host_of(member: u64) -> NewHost {
    let name = format!("member-{member}");
    let site = usize::try_from(member).unwrap_or_default() % SITES.len();
    NewHost {
        server: ServerId::parse(&name).expect("letters and digits"),
        key_hash: Sha256::digest(name.as_bytes()).into(),
        name,
        site: SITES[site].to_owned(),
        address: address_of(member),
    }
}

/// Founds, invites, lets in.
pub(super) async fn found(mut client: Client, clock: SimulatedClock, members: u64) {
    let founded = client
        .propose(Command::FoundCluster {
            authority_pem: "simulated".to_owned(),
            sealed_key: vec![1],
            founder: host_of(1),
        })
        .await;
    let mut answers = vec![(founded, Ok(Reply::Done))];
    for member in 2..=members {
        let id = InviteId(u128::from(member));
        let secret_hash = [7; 32];
        let invite = Invite {
            secret_hash,
            expires_at: clock.now() + Duration::from_secs(3600),
            eligible: true,
            site: None,
            used_by: None,
        };
        let invited = client.propose(Command::InviteHost { id, invite }).await;
        answers.push((invited, Ok(Reply::Done)));
        let host = host_of(member);
        let join = Command::JoinHost {
            id,
            secret_hash,
            host,
        };
        let joined = client.propose(join).await;
        answers.push((joined, Ok(Reply::Joined { member: Some(member) })));
    }
    for (answer, expected) in answers {
        if answer != expected {
            let what = format!("2: the cluster begins with {answer:?} instead of {expected:?}");
            client.recorder.violation(what);
        }
    }
}
