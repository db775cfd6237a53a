//! What changes in a state that begins again from a snapshot, on a machine of its own.

use protocol::time::UnixMillis;

use super::command::Rejection;
use super::host::NewHost;
use super::state::State;

impl State {
    /// Makes this the state of a cluster whose members are all lost: `host` is its only member, under an id that
    /// nobody had. Returns that id.
    ///
    /// The incarnation rises, so that hosts take what is decided from now on for newer than all they have. The
    /// members of before are out: what is on their disks must not vote again, and they come back by invitation,
    /// as somebody else. Hosts that are no members stay. Invitations are void: one that is open here may have been
    /// used after the snapshot.
    ///
    /// What hosts reported before says nothing of what was placed after the snapshot: nothing is placed on a server
    /// before its first report under the new incarnation.
    ///
    /// Nobody knows which member ids were given out after the snapshot. So the count goes on at the new incarnation,
    /// which is never below the clock in seconds: no cluster has ever had so many members.
    ///
    /// # Errors
    /// [`Rejection::NotFounded`] when the snapshot is of a cluster that has no authority yet;
    /// [`Rejection::NameTaken`].
    pub fn restore(&mut self, host: NewHost, at: UnixMillis) -> Result<u64, Rejection> {
        if self.cluster().is_none() {
            return Err(Rejection::NotFounded);
        }
        let namesake = self.hosts.values().any(|record| {
            let other = record.host.server != host.server;
            other && record.is_in() && record.member.is_none() && record.host.name == host.name
        });
        if namesake {
            return Err(Rejection::NameTaken(host.name));
        }
        let settings = self.settings_mut();
        settings.now = settings.now.max(at);
        let now = settings.now;
        settings.incarnation = (settings.incarnation + 1).max(now.unix_seconds());
        let incarnation = settings.incarnation;
        if let Some(cluster) = self.cluster.get_mut(&0) {
            cluster.next_member = cluster.next_member.max(incarnation);
        }
        self.ask_for_reports();
        let invites: Vec<_> = self.invites.keys().copied().collect();
        for invite in invites {
            self.invites.remove(&invite);
        }
        let members = self.hosts.values();
        let members = members.filter(|record| record.is_in() && record.member.is_some());
        let members: Vec<_> = members.map(|record| record.host.server.clone()).collect();
        for member in members {
            if let Some(record) = self.hosts.get_mut(&member) {
                record.revoked_at = Some(now);
            }
        }
        let server = host.server.clone();
        let member = self.let_in(host, true).ok_or(Rejection::NotFounded)?;
        // Its certificate is of the cluster's authority, also in the middle of the change to another one.
        self.trusted.remove(&server);
        Ok(member)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state_machine::host::{InviteId, Rotation, Standing};
    use crate::state_machine::testing::{World, found, host, id, invite};
    use crate::state_machine::{Faults, invariant};

    /// A cluster of the member `old`, and the host `gpu-a`.
    fn founded() -> State {
        let mut world = World::empty();
        world.at(5_000_000, found("old", 1)).expect("an empty state");
        let mut state = world.0;
        state.let_in(host("gpu-a", 2), false);
        state.drain_rows();
        state
    }

    #[test]
    fn the_members_of_before_are_out_and_the_incarnation_rises() {
        let mut state = founded();
        state.settings_mut().incarnation = 7_000;
        state.invites.insert(InviteId(1), invite(true));
        let member = state.restore(host("new", 3), UnixMillis(6_000_000));
        assert_eq!(member, Ok(7_001), "no id that was given out after the snapshot");
        assert_eq!(state.settings().incarnation, 7_001, "above the clock too");
        assert_eq!(state.invites().len(), 0, "it may have been used meanwhile");
        assert!(matches!(state.standing(&[1; 32]), Standing::Removed(_)));
        assert!(matches!(state.standing(&[2; 32]), Standing::In(_)));
        assert!(state.member(1).is_none() && state.member(7_001).is_some());
        assert_eq!(invariant::violations(&state), Vec::<String>::new());
        let rows: Vec<u8> = state.drain_rows().into_iter().map(|row| row.table).collect();
        assert_eq!(
            rows,
            [1, 14, 14, 15, 16],
            "settings, two hosts, the invitation, the cluster"
        );
    }

    #[test]
    fn the_same_machine_may_begin_again_with_a_new_key() {
        let mut state = founded();
        assert_eq!(state.restore(host("old", 3), UnixMillis(1)), Ok(5_000));
        assert!(matches!(state.standing(&[1; 32]), Standing::Removed(_)));
        assert_eq!(
            state.settings().now,
            UnixMillis(5_000_000),
            "time never runs backwards"
        );
    }

    #[test]
    fn a_change_of_the_authority_goes_on() {
        let mut state = founded();
        let rotation = Rotation {
            old: [1; 32],
            new: [2; 32],
            authority_pem: "new".to_owned(),
            bridge_pem: "bridge".to_owned(),
            sealed_key: vec![2],
            begun_at: UnixMillis(1),
        };
        state.rotate_authority(rotation).expect("founded");
        state
            .restore(host("new", 3), UnixMillis(6_000_000))
            .expect("a good host");
        assert_eq!(
            state.authorities_to_tell(&id("new")),
            Some(vec![[1; 32], [2; 32]]),
            "its certificate is of the old one"
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let mut empty = State::new(Faults::none());
        assert_eq!(
            empty.restore(host("new", 3), UnixMillis(1)),
            Err(Rejection::NotFounded)
        );
        let mut namesake = host("new", 3);
        namesake.name = "gpu-a".to_owned();
        assert!(matches!(
            founded().restore(namesake, UnixMillis(1)),
            Err(Rejection::NameTaken(_))
        ));
    }
}
