//! Rules of changing over to another authority.
//!
//! ```text
//! RotateAuthority    new certificates are signed by the new one; both are trusted; the bridge lets those that
//!                    know only the old one follow
//! RecordAuthorities  each host, once it carries the new certificate and trusts both
//! FinishRotation     when all do: the new one takes the old one's place, and hosts are told to trust it alone
//! ```

use protocol::id::ServerId;

use super::command::{Answer, Rejection, Reply};
use super::host::{HostRecord, KeyHash, Rotation};
use super::state::State;

impl State {
    /// The authority that takes the place of the cluster's, while hosts change over to it.
    #[must_use]
    pub fn rotation(&self) -> Option<&Rotation> {
        self.rotation.get(&0)
    }

    /// What a host has said that it trusts; none if it knows the cluster's authority only.
    #[must_use]
    pub fn trusted_by(&self, server: &ServerId) -> Option<&[KeyHash]> {
        self.trusted.get(server).map(Vec::as_slice)
    }

    /// What a host should trust, if it has not said yet that it does; the last one is to sign its certificate.
    #[must_use]
    pub fn authorities_to_tell(&self, server: &ServerId) -> Option<Vec<KeyHash>> {
        let said = self.trusted_by(server);
        match self.rotation() {
            Some(rotation) => {
                let both = [rotation.old, rotation.new];
                (said != Some(&both[..])).then(|| both.to_vec())
            }
            // It changed over, and the old authority was dropped since.
            None => said.and_then(<[KeyHash]>::last).map(|new| vec![*new]),
        }
    }

    /// Hosts that do not carry a certificate of the new authority yet.
    pub fn not_changed_over(&self) -> impl Iterator<Item = &HostRecord> {
        let hosts = self.hosts().values().filter(|record| record.is_in());
        hosts.filter(|record| self.has_to_change_over(record))
    }

    fn has_to_change_over(&self, record: &HostRecord) -> bool {
        let said = self.trusted_by(&record.host.server);
        self.rotation()
            .is_some_and(|rotation| said != Some(&[rotation.old, rotation.new][..]))
    }

    /// Certificate of the authority that every member can show a chain to: the one that invitations name.
    #[must_use]
    pub fn inviting_authority(&self) -> Option<&str> {
        let cluster = self.cluster()?;
        let mut members = self.members();
        let all_changed = !members.any(|(_, record)| self.has_to_change_over(record));
        let next = self.rotation().filter(|_| all_changed);
        Some(next.map_or(cluster.authority_pem.as_str(), |rotation| {
            rotation.authority_pem.as_str()
        }))
    }

    /// A host that joins meanwhile is given both, and a certificate of the new one.
    pub(crate) fn trust_from_the_start(&mut self, server: &ServerId) {
        match self.rotation() {
            Some(rotation) => {
                let both = vec![rotation.old, rotation.new];
                self.trusted.insert(server.clone(), both);
            }
            None => {
                self.trusted.remove(server);
            }
        }
    }

    pub(crate) fn rotate_authority(&mut self, rotation: Rotation) -> Answer {
        if self.cluster().is_none() {
            return Err(Rejection::NotFounded);
        }
        if self.rotation().is_some() {
            return Err(Rejection::RotationUnderWay);
        }
        self.rotation.insert(0, rotation);
        Ok(Reply::Done)
    }

    pub(crate) fn record_authorities(&mut self, server: ServerId, trusted: Vec<KeyHash>) -> Answer {
        if !self.hosts().get(&server).is_some_and(HostRecord::is_in) {
            let (kind, name) = ("host".to_owned(), server.to_string());
            return Err(Rejection::Unknown { kind, name });
        }
        if self.trusted.get(&server) == Some(&trusted) {
            return Ok(Reply::Unchanged);
        }
        if self.rotation().is_none() && trusted.len() == 1 {
            self.trusted.remove(&server);
        } else {
            self.trusted.insert(server, trusted);
        }
        Ok(Reply::Done)
    }

    pub(crate) fn finish_rotation(&mut self, new: &KeyHash) -> Answer {
        if self.rotation().is_none_or(|rotation| rotation.new != *new) {
            return Err(Rejection::NoRotation);
        }
        let old: Vec<String> = self
            .not_changed_over()
            .map(|record| record.host.name.clone())
            .collect();
        if !old.is_empty() {
            return Err(Rejection::OldCertificates(old));
        }
        if let (Some(rotation), Some(cluster)) = (self.rotation.remove(&0), self.cluster.get_mut(&0)) {
            cluster.authority_pem = rotation.authority_pem;
            cluster.sealed_key = rotation.sealed_key;
        }
        Ok(Reply::Done)
    }
}

#[cfg(test)]
mod tests {
    use protocol::time::UnixMillis;

    use crate::state_machine::codec::Row;
    use crate::state_machine::command::{Answer, Command};
    use crate::state_machine::host::{KeyHash, Rotation};
    use crate::state_machine::testing::{World, id};
    use crate::state_machine::{Faults, Rejection, Reply, State};

    const OLD: KeyHash = [1; 32];
    const NEW: KeyHash = [2; 32];

    fn rotation() -> Rotation {
        Rotation {
            old: OLD,
            new: NEW,
            authority_pem: "new".to_owned(),
            bridge_pem: "bridge".to_owned(),
            sealed_key: vec![2],
            begun_at: UnixMillis(3_000),
        }
    }

    impl World {
        fn apply(&mut self, command: Command) -> Answer {
            self.at(2_000, command)
        }

        fn say(&mut self, server: &str, trusted: &[KeyHash]) -> Answer {
            self.apply(Command::RecordAuthorities {
                server: id(server),
                trusted: trusted.to_vec(),
            })
        }

        fn told(&self, server: &str) -> Option<Vec<KeyHash>> {
            self.0.authorities_to_tell(&id(server))
        }
    }

    #[test]
    fn the_old_authority_is_dropped_when_nobody_needs_it() {
        let mut world = World::founded("a");
        world.take_in("b", 2, false);
        assert_eq!(world.told("a"), None);
        let finish = Command::FinishRotation { new: NEW };
        assert_eq!(world.apply(finish.clone()), Err(Rejection::NoRotation));
        let rotate = Command::RotateAuthority { rotation: rotation() };
        assert_eq!(world.apply(rotate.clone()), Ok(Reply::Done));
        assert_eq!(world.apply(rotate), Err(Rejection::RotationUnderWay));
        world.take_in("c", 3, false);
        assert_eq!(world.told("c"), None, "it was given both when it joined");
        assert_eq!(world.told("a"), Some(vec![OLD, NEW]));
        assert_eq!(world.0.inviting_authority(), Some("certificate"));
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(
            world.apply(finish.clone()),
            Err(Rejection::OldCertificates(names(&["a", "b"])))
        );
        assert_eq!(world.say("a", &[OLD, NEW]), Ok(Reply::Done));
        assert_eq!(world.say("a", &[OLD, NEW]), Ok(Reply::Unchanged));
        assert_eq!(world.told("a"), None);
        assert_eq!(
            world.0.inviting_authority(),
            Some("new"),
            "all members show the new one"
        );
        assert_eq!(
            world.apply(finish.clone()),
            Err(Rejection::OldCertificates(names(&["b"])))
        );
        let remove = Command::RemoveHost { server: id("b") };
        assert_eq!(world.apply(remove), Ok(Reply::Done));
        let other = Command::FinishRotation { new: [9; 32] };
        assert_eq!(world.apply(other), Err(Rejection::NoRotation));
        assert_eq!(world.apply(finish), Ok(Reply::Done));
        let cluster = world.0.cluster().expect("founded");
        assert_eq!(
            (cluster.authority_pem.as_str(), cluster.sealed_key.as_slice()),
            ("new", &[2][..])
        );

        // The old one is to be forgotten too.
        assert_eq!(world.told("a"), Some(vec![NEW]));
        assert_eq!(world.say("a", &[NEW]), Ok(Reply::Done));
        assert_eq!(world.told("a"), None);
        assert_eq!(world.0.trusted_by(&id("a")), None, "no row is left of it");
        assert_eq!(world.told("c"), Some(vec![NEW]));
        assert!(matches!(world.say("d", &[NEW]), Err(Rejection::Unknown { .. })));
    }

    #[test]
    fn who_missed_the_end_of_one_change_takes_part_in_the_next() {
        let mut world = World::founded("a");
        world
            .apply(Command::RotateAuthority { rotation: rotation() })
            .expect("the first");
        world.say("a", &[OLD, NEW]).expect("it is in");
        world
            .apply(Command::FinishRotation { new: NEW })
            .expect("all have");
        let next = Rotation {
            old: NEW,
            new: [3; 32],
            ..rotation()
        };
        world
            .apply(Command::RotateAuthority { rotation: next })
            .expect("the second");
        assert_eq!(world.told("a"), Some(vec![NEW, [3; 32]]));
        world.say("a", &[NEW]).expect("it was late");
        assert_eq!(world.told("a"), Some(vec![NEW, [3; 32]]));
    }

    /// Rows of both tables, which must be read for ever.
    #[test]
    fn rows_have_golden_bytes() {
        let mut world = World::founded("a");
        world.0.drain_rows();
        world
            .apply(Command::RotateAuthority { rotation: rotation() })
            .expect("the first");
        world.say("a", &[OLD, NEW]).expect("it is in");
        let rows = world.0.drain_rows();
        let of = |table: u8| -> Vec<&Row> { rows.iter().filter(|row| row.table == table).collect() };
        let (old, new) = ([1; 32], [2; 32]);
        let begun: &[u8] = &[0xb8, 0x17];
        let rotation = [&[0][..], &old, &new, b"\x03new", b"\x06bridge", &[1, 2], begun].concat();
        let [row] = of(18)[..] else { panic!("{rows:?}") };
        assert_eq!(
            (&row.key[..], row.value.as_deref()),
            (&[0, 0][..], Some(&rotation[..]))
        );
        let trusted = [&[0, 2][..], &old, &new].concat();
        let [row] = of(19)[..] else { panic!("{rows:?}") };
        assert_eq!(
            (&row.key[..], row.value.as_deref()),
            (&b"\x00\x01a"[..], Some(&trusted[..]))
        );
        let mut stored = rows.iter().map(|row| {
            (
                row.table,
                row.key.clone(),
                row.value.clone().expect("nothing went"),
            )
        });
        let read = State::from_rows(&mut stored, Faults::none()).expect("good rows");
        assert_eq!(read.rotation(), world.0.rotation());
        assert_eq!(read.trusted_by(&id("a")), Some(&[OLD, NEW][..]));
    }
}
