//! For unit tests of the cluster's own rules: hosts by short names, and a state whose invariants hold after every
//! command.

mod answers;
mod restarting;
mod taking_over;

use protocol::id::ServerId;
use protocol::report::HostFacts;
use protocol::time::UnixMillis;

use super::command::{Answer, Command, Proposal, RequestId};
use super::host::{Invite, InviteId, NewHost};
use super::state::{Faults, State};
use super::{apply, invariant};

/// What every invitation's secret is hashed to.
const SECRET_HASH: [u8; 32] = [7; 32];

/// A state with the number of its last request.
pub(super) struct World(pub(super) State, u128);

impl World {
    pub(super) fn empty() -> Self {
        Self(State::new(Faults::none()), 0)
    }

    /// A cluster of one host, with key 1.
    pub(super) fn founded(founder: &str) -> Self {
        let mut world = Self::empty();
        world.at(1_000, found(founder, 1)).expect("it is the first");
        world
    }

    pub(super) fn at(&mut self, at: u64, command: Command) -> Answer {
        self.1 += 1;
        let proposal = Proposal {
            request: RequestId(self.1),
            at: UnixMillis(at),
            guard: None,
            command,
        };
        let answer = apply(&mut self.0, proposal);
        assert_eq!(invariant::violations(&self.0), Vec::<String>::new());
        answer
    }

    pub(super) fn invite(&mut self, id: u128, eligible: bool) {
        let (id, invite) = (InviteId(id), invite(eligible));
        let invited = self.at(2_000, Command::InviteHost { id, invite });
        invited.expect("the cluster is founded");
    }

    /// Invites a host, which joins.
    pub(super) fn take_in(&mut self, server: &str, key: u8, eligible: bool) {
        let invitation = key.into();
        self.invite(invitation, eligible);
        let joined = self.at(2_000, join(invitation, server, key));
        joined.expect("it is invited");
    }
}

pub(super) fn id(server: &str) -> ServerId {
    ServerId::parse(server).expect("a good id")
}

pub(super) fn host(server: &str, key: u8) -> NewHost {
    NewHost {
        server: id(server),
        name: server.to_owned(),
        site: String::new(),
        address: format!("{server}:4433"),
        key_hash: [key; 32],
    }
}

/// What it says of itself once it has joined.
pub(super) fn facts(server: &str) -> HostFacts {
    HostFacts {
        server: id(server),
        name: server.to_owned(),
        address: "203.0.113.1".to_owned(),
        proof_port: 1,
        devices: vec![],
        cpu_count: 32,
        memory_gb: 256,
        disk_free_gb: 500,
        agent_version: "0.1.0".to_owned(),
    }
}

/// Good until 10 s after the epoch.
pub(super) fn invite(eligible: bool) -> Invite {
    Invite {
        secret_hash: SECRET_HASH,
        expires_at: UnixMillis(10_000),
        eligible,
        site: None,
        used_by: None,
    }
}

pub(super) fn found(server: &str, key: u8) -> Command {
    Command::FoundCluster {
        authority_pem: "certificate".to_owned(),
        sealed_key: vec![1],
        founder: host(server, key),
    }
}

pub(super) fn join(invitation: u128, server: &str, key: u8) -> Command {
    Command::JoinHost {
        id: InviteId(invitation),
        secret_hash: SECRET_HASH,
        host: host(server, key),
    }
}
