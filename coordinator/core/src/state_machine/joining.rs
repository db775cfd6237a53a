//! Rules of founding, inviting, joining, removing and pinning.

use protocol::id::ServerId;
use protocol::time::UnixMillis;

use super::command::{Answer, Rejection, Reply};
use super::host::{
    Cluster, Entered, FIRST_MEMBER, HostRecord, Invite, InviteId, KeyHash, NewHost, Pin, Standing,
};
use super::state::State;
use super::table::Table;

/// Used and expired invitations are remembered so long, in ms: who comes late is told why.
const INVITE_MEMORY_MS: u64 = 24 * 60 * 60_000;

impl State {
    /// The cluster, once it is founded.
    #[must_use]
    pub fn cluster(&self) -> Option<&Cluster> {
        self.cluster.get(&0)
    }

    /// Hosts that were let in once, also those that were removed.
    #[must_use]
    pub fn hosts(&self) -> &Table<ServerId, HostRecord> {
        &self.hosts
    }

    /// Invitations that were given out.
    #[must_use]
    pub fn invites(&self) -> &Table<InviteId, Invite> {
        &self.invites
    }

    /// The invitation whose secret somebody has.
    ///
    /// # Errors
    /// It is not known, or has expired.
    pub fn invitation(
        &self,
        id: InviteId,
        secret_hash: &KeyHash,
        now: UnixMillis,
    ) -> Result<&Invite, Rejection> {
        let refused = |why: &str| Rejection::Invitation(why.to_owned());
        let invite = self.invites.get(&id);
        let invite = invite.filter(|invite| invite.secret_hash == *secret_hash);
        let invite = invite.ok_or_else(|| {
            refused("is not known here: it belongs to another cluster, or is a day old; ask for a new one")
        })?;
        if invite.expires_at <= now {
            return Err(refused(
                "has expired: ask for a new one with `chutes-miner host invite`",
            ));
        }
        Ok(invite)
    }

    /// The members that belong to us, by the order of their hosts; without those that a recovery gave up.
    pub fn members(&self) -> impl Iterator<Item = (u64, &HostRecord)> {
        let hosts = self.hosts.values().filter(|record| record.is_in());
        let members = hosts.filter_map(|record| Some((record.member?, record)));
        members.filter(|(member, _)| !self.is_given_up(*member))
    }

    /// The member with this id, if it belongs to us.
    #[must_use]
    pub fn member(&self, member: u64) -> Option<&HostRecord> {
        self.members()
            .find(|(id, _)| *id == member)
            .map(|(_, record)| record)
    }

    /// True if a key that was this host's is worthless now.
    #[must_use]
    pub fn is_removed(&self, server: &ServerId, key: &KeyHash) -> bool {
        self.hosts.get(server).is_some_and(|record| {
            record.former_keys.contains(key) || (record.host.key_hash == *key && !record.is_in())
        })
    }

    /// What is known of the owner of a key.
    #[must_use]
    pub fn standing(&self, key: &KeyHash) -> Standing<'_> {
        for record in self.hosts.values() {
            if record.host.key_hash == *key {
                return if record.is_in() {
                    Standing::In(record)
                } else {
                    Standing::Removed(record)
                };
            }
            if record.former_keys.contains(key) {
                return Standing::Removed(record);
            }
        }
        Standing::Unknown
    }

    /// Whether a host may enter that is known for sure, so that it needs nobody's invitation.
    #[must_use]
    pub fn entered(&self, host: &NewHost) -> Entered {
        let mut hosts = self.hosts.values().filter(|record| record.is_in());
        match self.hosts.get(&host.server).filter(|record| record.is_in()) {
            Some(record) if record.host.key_hash == host.key_hash => Entered::Before {
                member: record.member,
            },
            Some(_) => Entered::OtherKey,
            None => match hosts.find(|other| other.host.name == host.name) {
                Some(other) => Entered::NameTaken(other.host.server.clone()),
                None => Entered::NotYet,
            },
        }
    }

    pub(crate) fn found_cluster(
        &mut self,
        authority_pem: String,
        sealed_key: Vec<u8>,
        founder: NewHost,
    ) -> Answer {
        if self.cluster().is_some() {
            return Ok(Reply::Unchanged);
        }
        let now = self.settings.now;
        self.cluster.insert(
            0,
            Cluster {
                authority_pem,
                sealed_key,
                next_member: FIRST_MEMBER,
                founded_at: now,
            },
        );
        self.let_in(founder, true);
        Ok(Reply::Done)
    }

    pub(crate) fn invite_host(&mut self, id: InviteId, invite: Invite) -> Answer {
        if self.cluster().is_none() {
            return Err(Rejection::NotFounded);
        }
        if self.invites.contains_key(&id) {
            return Ok(Reply::Unchanged);
        }
        self.invites.insert(id, invite);
        Ok(Reply::Done)
    }

    pub(crate) fn join_host(&mut self, id: InviteId, secret_hash: &KeyHash, mut host: NewHost) -> Answer {
        let refused = |why: &str| Err(Rejection::Invitation(why.to_owned()));
        let invite = self.invitation(id, secret_hash, self.settings.now)?;
        let eligible = invite.eligible;
        if let Some(site) = &invite.site {
            host.site.clone_from(site);
        }
        match invite.used_by {
            Some(key) if key != host.key_hash => {
                return refused("was used by another host: each is good once, ask for a new one");
            }
            // It asks again: the answer was lost.
            Some(_) => {
                let record = self.hosts.get(&host.server);
                if let Some(record) = record.filter(|record| record.is_in() && record.host == host) {
                    return Ok(Reply::Joined {
                        member: record.member,
                    });
                }
            }
            None => {}
        }
        if let Some(record) = self.hosts.get(&host.server)
            && record.is_in()
        {
            return Err(Rejection::AlreadyJoined(host.server));
        }
        let has_the_name = |record: &HostRecord| record.is_in() && record.host.name == host.name;
        if self.hosts.values().any(has_the_name) {
            return Err(Rejection::NameTaken(host.name));
        }
        if !matches!(self.standing(&host.key_hash), Standing::Unknown) {
            return refused("cannot be used with a key that a host had before: make a new one");
        }
        if let Some(invite) = self.invites.get_mut(&id) {
            invite.used_by = Some(host.key_hash);
        }
        let member = self.let_in(host, eligible);
        Ok(Reply::Joined { member })
    }

    pub(crate) fn let_in(&mut self, host: NewHost, eligible: bool) -> Option<u64> {
        let member = if eligible { self.next_member() } else { None };
        let mut former_keys = Vec::new();
        if let Some(before) = self.hosts.remove(&host.server) {
            former_keys = before.former_keys;
            former_keys.push(before.host.key_hash);
        }
        let record = HostRecord {
            member,
            pin: Pin::Auto,
            joined_at: self.settings.now,
            revoked_at: None,
            former_keys,
            host,
        };
        self.trust_from_the_start(&record.host.server);
        self.hosts.insert(record.host.server.clone(), record);
        member
    }

    /// What a member without its store acknowledged before is lost with it: under its old id it could help to
    /// elect a leader that lacks acknowledged writes.
    pub(crate) fn rejoin_host(&mut self, server: &ServerId) -> Answer {
        let record = self.hosts.get(server).filter(|record| record.is_in());
        let record = record.ok_or_else(|| unknown(server))?;
        let Some(before) = record.member else {
            return Err(Rejection::NotEligible(server.clone()));
        };
        self.given_up.remove(&before);
        let member = self.next_member();
        if let Some(record) = self.hosts.get_mut(server) {
            record.member = member;
        }
        Ok(Reply::Joined { member })
    }

    fn next_member(&mut self) -> Option<u64> {
        let cluster = self.cluster.get_mut(&0)?;
        let member = cluster.next_member;
        cluster.next_member += 1;
        Some(member)
    }

    pub(crate) fn remove_host(&mut self, server: &ServerId) -> Answer {
        let now = self.settings.now;
        let record = self.hosts.get(server).ok_or_else(|| unknown(server))?;
        if !record.is_in() {
            return Ok(Reply::Unchanged);
        }
        let deployments = self.deployments_on(server).count();
        if deployments > 0 {
            return Err(Rejection::HostInUse {
                server: server.clone(),
                deployments: u64::try_from(deployments).unwrap_or(u64::MAX),
            });
        }
        let member = record.member;
        let is_other = |(_, other): (u64, &HostRecord)| other.host.server != *server;
        if member.is_some() && !self.members().any(is_other) {
            return Err(Rejection::LastMember(server.clone()));
        }
        if let Some(record) = self.hosts.get_mut(server) {
            record.revoked_at = Some(now);
        }
        if let Some(member) = member {
            self.given_up.remove(&member);
        }
        self.trusted.remove(server);
        Ok(Reply::Done)
    }

    pub(crate) fn pin_host(&mut self, server: &ServerId, pin: Pin) -> Answer {
        let record = self.hosts.get(server).filter(|record| record.is_in());
        let record = record.ok_or_else(|| unknown(server))?;
        if record.member.is_none() {
            return Err(Rejection::NotEligible(server.clone()));
        }
        if record.pin == pin {
            return Ok(Reply::Unchanged);
        }
        if let Some(record) = self.hosts.get_mut(server) {
            record.pin = pin;
        }
        Ok(Reply::Done)
    }

    /// A host has moved. Two members at one address would be taken for each other.
    pub(crate) fn record_address(&mut self, server: &ServerId, address: String) -> Answer {
        let record = self.hosts.get(server).filter(|record| record.is_in());
        let record = record.ok_or_else(|| unknown(server))?;
        if record.host.address == address {
            return Ok(Reply::Unchanged);
        }
        let has_it = |other: &&HostRecord| other.host.server != *server && other.host.address == address;
        let mut members = self.members().map(|(_, other)| other);
        if record.member.is_some()
            && let Some(other) = members.find(has_it)
        {
            let host = other.host.name.clone();
            return Err(Rejection::AddressTaken { address, host });
        }
        drop(members);
        if let Some(record) = self.hosts.get_mut(server) {
            record.host.address = address;
        }
        Ok(Reply::Done)
    }

    /// Invitations that nobody needs to be told about any more.
    pub(crate) fn old_invites(&self, now: UnixMillis) -> Vec<InviteId> {
        let old = |invite: &Invite| now.since(invite.expires_at) >= INVITE_MEMORY_MS;
        self.invites
            .iter()
            .filter(|(_, invite)| old(invite))
            .map(|(id, _)| *id)
            .collect()
    }
}

fn unknown(server: &ServerId) -> Rejection {
    Rejection::Unknown {
        kind: "host".to_owned(),
        name: server.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use protocol::hotkey::Hotkey;
    use protocol::report::HostFacts;

    use super::*;
    use crate::state_machine::command::Command;
    use crate::state_machine::server::{Enrolment, EnrolmentPhase, Server};
    use crate::state_machine::testing::{World, facts, found, host, id, join};

    impl World {
        fn record(&self, server: &str) -> &HostRecord {
            self.0.hosts().get(&id(server)).expect("it has joined")
        }
    }

    fn enrolment() -> Enrolment {
        Enrolment {
            validator: Hotkey::parse("5Dt7HZ7Zpw4DppPxFM7Ke3Cm7sDAWhsZXmM5ZAmE7dSVJbcQ").expect("a hotkey"),
            gpu_short_ref: "h100".to_owned(),
            hourly_cost_usd_micros: 1,
            seed: None,
            phase: EnrolmentPhase::Ready,
            added_at: UnixMillis(0),
            deadline: UnixMillis(0),
        }
    }

    fn joined(member: Option<u64>) -> Answer {
        Ok(Reply::Joined { member })
    }

    fn is_refused(answer: &Answer, why: &str) -> bool {
        matches!(answer, Err(rejection) if rejection.to_string().contains(why))
    }

    #[test]
    fn the_first_founder_is_the_first_member_and_the_only_founder() {
        let mut world = World::founded("founder");
        assert_eq!(world.at(2000, found("other", 2)), Ok(Reply::Unchanged));
        assert_eq!(world.record("founder").member, Some(FIRST_MEMBER));
        assert_eq!(world.0.hosts().len(), 1);
    }

    #[test]
    fn an_invitation_is_good_once_and_its_answer_may_be_repeated() {
        let mut world = World::founded("founder");
        world.invite(1, true);
        assert_eq!(world.at(3000, join(1, "b", 2)), joined(Some(2)));
        assert_eq!(
            world.at(3000, join(1, "b", 2)),
            joined(Some(2)),
            "the answer was lost"
        );
        assert!(is_refused(
            &world.at(3000, join(1, "c", 3)),
            "was used by another host"
        ));
        assert!(is_refused(&world.at(3000, join(9, "c", 3)), "is not known here"));
        world.invite(2, false);
        assert_eq!(world.at(3000, join(2, "c", 3)), joined(None), "an observer");
        world.invite(3, true);
        assert!(is_refused(&world.at(10_000, join(3, "d", 4)), "has expired"));
        let wrong = Command::JoinHost {
            id: InviteId(3),
            secret_hash: [8; 32],
            host: host("d", 4),
        };
        assert!(is_refused(&world.at(3000, wrong), "is not known here"));
    }

    #[test]
    fn names_ids_and_keys_belong_to_one_host() {
        let mut world = World::founded("founder");
        for invite in 1..=3 {
            world.invite(invite, true);
        }
        assert!(matches!(
            world.at(3000, join(1, "founder", 9)),
            Err(Rejection::AlreadyJoined(_))
        ));
        let mut namesake = host("b", 2);
        namesake.name = "founder".to_owned();
        let command = Command::JoinHost {
            id: InviteId(1),
            secret_hash: [7; 32],
            host: namesake,
        };
        assert!(matches!(world.at(3000, command), Err(Rejection::NameTaken(_))));
        assert!(is_refused(
            &world.at(3000, join(1, "b", 1)),
            "a key that a host had before"
        ));
        assert_eq!(
            world.at(3000, join(1, "b", 2)),
            joined(Some(2)),
            "nothing was used up by that"
        );
    }

    #[test]
    fn who_was_removed_comes_back_as_somebody_else() {
        let mut world = World::founded("founder");
        world.invite(1, true);
        world.invite(2, true);
        assert_eq!(world.at(3000, join(1, "b", 2)), joined(Some(2)));
        assert_eq!(
            world.at(4000, Command::RemoveHost { server: id("b") }),
            Ok(Reply::Done)
        );
        assert_eq!(
            world.at(4000, Command::RemoveHost { server: id("b") }),
            Ok(Reply::Unchanged)
        );
        assert!(matches!(world.0.standing(&[2; 32]), Standing::Removed(_)));
        assert!(world.0.member(2).is_none());
        assert!(is_refused(
            &world.at(5000, join(1, "b", 2)),
            "a key that a host had before"
        ));
        assert_eq!(
            world.at(5000, join(2, "b", 3)),
            joined(Some(3)),
            "an id of its own"
        );
        assert!(
            matches!(world.0.standing(&[2; 32]), Standing::Removed(_)),
            "the old disk stays out"
        );
        assert!(matches!(world.0.standing(&[3; 32]), Standing::In(_)));
        assert!(world.0.is_removed(&id("b"), &[2; 32]));
        assert!(!world.0.is_removed(&id("b"), &[3; 32]));
    }

    /// Found with machines: a node of a shared Kubernetes that was removed came back under another id, joined, and was
    /// refused for ever: as what it was before it still had the name.
    #[test]
    fn a_removed_host_may_come_back_under_another_id_with_its_name() {
        let mut world = World::founded("founder");
        world.take_in("b", 2, false);
        let says = |server: &str| {
            let name = "b".to_owned();
            let facts = HostFacts {
                name,
                ..facts(server)
            };
            Command::RecordHost { facts }
        };
        assert_eq!(world.at(3000, says("b")), Ok(Reply::Done));
        let remove = Command::RemoveHost { server: id("b") };
        world.at(4000, remove).expect("it has no work");
        let again = NewHost {
            name: "b".to_owned(),
            ..host("c", 3)
        };
        world.0.let_in(again, false);

        let works = |world: &mut World, enrolment| {
            let server = world.0.servers.get_mut(&id("b"));
            server.expect("it said so").enrolment = enrolment;
        };
        works(&mut world, Some(enrolment()));
        let refused = world.at(5000, says("c"));
        assert_eq!(refused, Err(Rejection::NameTaken("b".to_owned())));
        works(&mut world, None);
        assert_eq!(world.at(5000, says("c")), Ok(Reply::Done));
        let named = world.0.server_by_name_or_id("b");
        assert_eq!(named.map(Server::id), Some(&id("c")));
        let late = world.at(6000, says("b"));
        assert_eq!(late, Err(Rejection::NameTaken("b".to_owned())));
    }

    #[test]
    fn a_host_may_change_its_name_to_a_free_one_and_leaves_its_own_to_others() {
        let mut world = World::founded("founder");
        let mut says = |server: &str, name: &str| {
            let name = name.to_owned();
            let facts = HostFacts {
                name,
                ..facts(server)
            };
            world.at(3000, Command::RecordHost { facts })
        };
        let taken = |name: &str| Err(Rejection::NameTaken(name.to_owned()));
        assert_eq!(says("a", "one"), Ok(Reply::Done));
        assert_eq!(says("b", "two"), Ok(Reply::Done));
        assert_eq!(says("b", "one"), taken("one"));
        assert_eq!(says("b", "two"), Ok(Reply::Unchanged), "it keeps its own");
        assert_eq!(says("a", "three"), Ok(Reply::Done));
        assert_eq!(says("b", "one"), Ok(Reply::Done));
        assert_eq!(says("a", "one"), taken("one"));
        assert_eq!(says("c", "two"), Ok(Reply::Done));
    }

    #[test]
    fn a_host_that_is_known_for_sure_enters_once_under_its_name() {
        let mut world = World::founded("founder");
        world.invite(1, true);
        assert_eq!(world.at(3000, join(1, "b", 2)), joined(Some(2)));
        assert_eq!(world.0.entered(&host("c", 3)), Entered::NotYet);
        assert_eq!(
            world.0.entered(&host("b", 2)),
            Entered::Before { member: Some(2) },
            "the answer was lost"
        );
        assert_eq!(world.0.entered(&host("b", 3)), Entered::OtherKey);
        let mut again = host("c", 3);
        again.name = "b".to_owned();
        assert_eq!(world.0.entered(&again), Entered::NameTaken(id("b")));
        world
            .at(4000, Command::RemoveHost { server: id("b") })
            .expect("it goes");
        for host in [host("b", 2), host("b", 3), again] {
            assert_eq!(world.0.entered(&host), Entered::NotYet);
        }
    }

    #[test]
    fn a_host_that_moved_is_known_at_its_new_address_alone() {
        let mut world = World::founded("founder");
        world.take_in("b", 2, true);
        let moved = |server: &str, address: &str| Command::RecordAddress {
            server: id(server),
            address: address.to_owned(),
        };
        assert_eq!(world.at(3000, moved("b", "b:4433")), Ok(Reply::Unchanged));
        assert_eq!(world.at(3000, moved("b", "elsewhere:4433")), Ok(Reply::Done));
        assert_eq!(world.record("b").host.address, "elsewhere:4433");
        let taken = world.at(3000, moved("b", "founder:4433"));
        assert!(
            is_refused(
                &taken,
                "founder:4433 is the address of the member on host founder"
            ),
            "{taken:?}"
        );
        assert_eq!(world.record("b").host.address, "elsewhere:4433");
        assert!(is_refused(
            &world.at(3000, moved("c", "c:1")),
            "host c is not known"
        ));
        let remove = Command::RemoveHost { server: id("b") };
        world.at(4000, remove).expect("it has no work");
        assert!(is_refused(
            &world.at(4000, moved("b", "b:1")),
            "host b is not known"
        ));
    }

    #[test]
    fn the_last_member_stays_and_pins_are_for_members() {
        let mut world = World::founded("founder");
        let remove = Command::RemoveHost {
            server: id("founder"),
        };
        assert!(matches!(
            world.at(2000, remove.clone()),
            Err(Rejection::LastMember(_))
        ));
        world.invite(1, false);
        world.invite(2, true);
        assert_eq!(world.at(3000, join(1, "b", 2)), joined(None));
        let pin = |server, pin| Command::PinHost {
            server: id(server),
            pin,
        };
        assert!(matches!(
            world.at(3000, pin("b", Pin::Voter)),
            Err(Rejection::NotEligible(_))
        ));
        assert!(
            matches!(world.at(3000, remove.clone()), Err(Rejection::LastMember(_))),
            "an observer cannot lead"
        );
        assert_eq!(world.at(3000, join(2, "c", 3)), joined(Some(2)));
        assert_eq!(world.at(3000, pin("c", Pin::Voter)), Ok(Reply::Done));
        assert_eq!(world.at(3000, pin("c", Pin::Voter)), Ok(Reply::Unchanged));
        assert_eq!(world.at(3000, remove), Ok(Reply::Done));
    }

    #[test]
    fn a_member_that_lost_its_store_gets_another_id() {
        let mut world = World::founded("founder");
        world.invite(1, true);
        world.invite(2, false);
        assert_eq!(world.at(3000, join(1, "b", 2)), joined(Some(2)));
        assert_eq!(world.at(3000, join(2, "c", 3)), joined(None));
        let rejoin = |server| Command::RejoinHost { server: id(server) };
        assert_eq!(world.at(4000, rejoin("b")), joined(Some(3)));
        assert!(world.0.member(2).is_none(), "nobody is member 2 any more");
        assert_eq!(world.record("b").host.key_hash, [2; 32], "the key is the same");
        assert!(matches!(
            world.at(4000, rejoin("c")),
            Err(Rejection::NotEligible(_))
        ));
        assert!(matches!(
            world.at(4000, rejoin("d")),
            Err(Rejection::Unknown { .. })
        ));
    }

    #[test]
    fn old_invitations_are_forgotten() {
        let mut world = World::founded("founder");
        world.invite(1, true);
        world
            .at(10_000 + INVITE_MEMORY_MS - 1, Command::PassTime)
            .expect("it passes");
        assert_eq!(world.0.invites().len(), 1);
        world
            .at(10_000 + INVITE_MEMORY_MS, Command::PassTime)
            .expect("it passes");
        assert_eq!(world.0.invites().len(), 0);
    }

    #[test]
    fn words_for_pins_are_read_back() {
        for pin in [Pin::Auto, Pin::Voter, Pin::Never] {
            assert_eq!(Pin::parse(pin.as_str()), Some(pin));
        }
        assert_eq!(Pin::parse("always"), None);
    }
}
