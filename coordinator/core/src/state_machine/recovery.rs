//! Rules of the recovery after the majority of the voters is lost for good.
//!
//! One member goes on with what it has. The others may have acknowledged more than that, so none of them comes
//! back with its store: each is given up under its member id until its host rejoins under another one.

use super::command::Reply;
use super::host::KeyHash;
use super::state::State;

impl State {
    /// True if a recovery gave this member id up: its store holds what never happened here.
    #[must_use]
    pub fn is_given_up(&self, member: u64) -> bool {
        self.given_up.contains_key(&member)
    }

    /// True if the owner of a key had this member id and has it no more. A member id that this member has not
    /// heard of yet is no former one.
    #[must_use]
    pub fn is_former_member(&self, key: &KeyHash, member: u64) -> bool {
        let issued = self.cluster().is_some_and(|cluster| member < cluster.next_member);
        let mut hosts = self.hosts().values();
        let record = hosts.find(|record| record.host.key_hash == *key);
        issued && record.is_some_and(|record| record.member != Some(member) || self.is_given_up(member))
    }

    /// `member` goes on alone. The incarnation rises above that of every state that the lost ones may still hold,
    /// by the time: two members that were both made to go on do not share one.
    pub(crate) fn recover(&mut self, member: u64) -> Reply {
        let settings = self.settings_mut();
        let now = settings.now;
        settings.incarnation = now.unix_seconds().max(settings.incarnation + 1);
        self.ask_for_reports();
        let hosts = self.hosts.values().filter(|record| record.is_in());
        let others: Vec<u64> = hosts
            .filter_map(|record| record.member)
            .filter(|other| *other != member)
            .collect();
        self.given_up.remove(&member);
        for other in others {
            self.given_up.insert(other, now);
        }
        Reply::Done
    }
}

#[cfg(test)]
mod tests {
    use protocol::report::WorkloadReport;
    use protocol::workload::Fence;

    use crate::state_machine::codec::Row;
    use crate::state_machine::command::Command;
    use crate::state_machine::host::Pin;
    use crate::state_machine::testing::{World, facts, id};
    use crate::state_machine::{Rejection, Reply};

    impl World {
        /// `a`, `b` and `c` are members 1, 2 and 3; `d` has no vote.
        fn of_three() -> Self {
            let mut world = Self::founded("a");
            for (key, server, eligible) in [(2, "b", true), (3, "c", true), (4, "d", false)] {
                world.take_in(server, key, eligible);
            }
            world
        }

        fn members(&self) -> Vec<u64> {
            self.0.members().map(|(member, _)| member).collect()
        }
    }

    #[test]
    fn the_others_are_given_up_until_they_rejoin() {
        let mut world = World::of_three();
        assert_eq!(world.members(), [1, 2, 3]);
        let before = world.0.settings().incarnation;
        assert_eq!(
            world.at(9_000_000, Command::Recover { member: 2 }),
            Ok(Reply::Done)
        );
        assert_eq!(world.0.settings().incarnation, 9_000, "by the time");
        assert!(world.0.settings().incarnation > before);
        assert_eq!(world.members(), [2]);
        assert!(world.0.is_given_up(1) && world.0.is_given_up(3) && !world.0.is_given_up(2));
        assert!(world.0.is_former_member(&[1; 32], 1), "with its old certificate");
        assert!(!world.0.is_former_member(&[2; 32], 2));
        let pin = world.at(
            9_000_000,
            Command::PinHost {
                server: id("a"),
                pin: Pin::Voter,
            },
        );
        assert_eq!(pin, Ok(Reply::Done), "it is eligible still");
        let last = world.at(9_000_000, Command::RemoveHost { server: id("b") });
        assert!(
            matches!(last, Err(Rejection::LastMember(_))),
            "the lost ones cannot lead: {last:?}"
        );
        let rejoined = world.at(9_000_000, Command::RejoinHost { server: id("a") });
        assert_eq!(rejoined, Ok(Reply::Joined { member: Some(4) }));
        assert_eq!(world.members(), [4, 2]);
        assert!(world.0.is_former_member(&[1; 32], 1) && !world.0.is_former_member(&[1; 32], 4));
        assert!(
            !world.0.is_former_member(&[1; 32], 5),
            "one that another member may have given out"
        );
        assert_eq!(
            world.at(9_000_000, Command::RemoveHost { server: id("c") }),
            Ok(Reply::Done)
        );
        assert!(!world.0.is_given_up(3), "it is out altogether");
    }

    /// It may have forgotten what was placed last, and took the GPUs that this holds for free.
    #[test]
    fn nothing_is_placed_before_hosts_report_anew() {
        let mut world = World::of_three();
        let incarnation = world.0.settings().incarnation;
        world
            .at(3_000, Command::RecordHost { facts: facts("d") })
            .expect("it has joined");
        let fence = Fence {
            incarnation,
            revision: 0,
        };
        let report = Command::RecordWorkloads {
            server: id("d"),
            report: WorkloadReport {
                fence,
                workloads: vec![],
            },
        };
        world.at(3_000, report).expect("it is known");
        assert_eq!(world.0.servers().get(&id("d")).unwrap().reported, Some(fence));
        world
            .at(9_000_000, Command::Recover { member: 2 })
            .expect("it goes on");
        assert_eq!(world.0.servers().get(&id("d")).unwrap().reported, None);
    }

    #[test]
    fn each_recovery_raises_the_incarnation_whatever_the_clock_says() {
        let mut world = World::of_three();
        world
            .at(9_000_000, Command::Recover { member: 2 })
            .expect("it goes on");
        world
            .at(1_000, Command::Recover { member: 2 })
            .expect("it goes on");
        assert_eq!(world.0.settings().incarnation, 9_001);
    }

    /// Rows of the table, which must be read for ever.
    #[test]
    fn rows_have_golden_bytes() {
        let mut world = World::of_three();
        world.0.drain_rows();
        world
            .at(9_000_000, Command::Recover { member: 2 })
            .expect("it goes on");
        let rows = world.0.drain_rows();
        let rows: Vec<&Row> = rows.iter().filter(|row| row.table == 17).collect();
        let bytes: Vec<(&[u8], Option<&[u8]>)> = rows
            .iter()
            .map(|row| (row.key.as_slice(), row.value.as_deref()))
            .collect();
        let at: &[u8] = &[0, 0xc0, 0xa8, 0xa5, 0x04];
        assert_eq!(bytes, [(&[0, 1][..], Some(at)), (&[0, 3], Some(at))]);
    }
}
