//! Rules of finalizing an upgrade: nobody may be left behind who could not read what is written afterwards.

use std::collections::{BTreeMap, BTreeSet};

use protocol::id::ServerId;

use super::command::{Answer, Rejection, Reply};
use super::format::{FIRST, Finalized, known_by};
use super::state::State;

/// A host and the program that it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostVersion {
    /// Its name.
    pub name: String,
    /// As it reported it; none if it never did.
    pub version: Option<String>,
}

impl HostVersion {
    /// The newest format that it knows for sure.
    #[must_use]
    pub fn knows(&self) -> Option<u32> {
        self.version.as_deref().map(known_by)
    }
}

impl State {
    /// What the operator finalized last, if anything.
    #[must_use]
    pub fn finalized(&self) -> Option<&Finalized> {
        self.format.get(&0)
    }

    /// The format in which rows and commands may be written.
    #[must_use]
    pub fn format(&self) -> u32 {
        self.finalized().map_or(FIRST, |finalized| finalized.format)
    }

    /// What each host of the cluster runs.
    #[must_use]
    pub fn versions(&self) -> BTreeMap<ServerId, HostVersion> {
        let mut versions = BTreeMap::new();
        for (id, server) in self.servers.iter() {
            // A server that was removed as a host is none of ours any more, and a worker runs no program of ours.
            if self.workers.contains_key(id) {
                continue;
            }
            if self.hosts.get(id).is_none_or(super::host::HostRecord::is_in) {
                let version = HostVersion {
                    name: server.facts.name.clone(),
                    version: Some(server.facts.agent_version.clone()),
                };
                versions.insert(id.clone(), version);
            }
        }
        for (id, record) in self.hosts.iter().filter(|(_, record)| record.is_in()) {
            versions.entry(id.clone()).or_insert_with(|| HostVersion {
                name: record.host.name.clone(),
                version: None,
            });
        }
        versions
    }

    pub(crate) fn finalize_format(
        &mut self,
        format: u32,
        program: String,
        vouched: &BTreeSet<ServerId>,
    ) -> Answer {
        let present = self.format();
        if format == present {
            return Ok(Reply::Unchanged);
        }
        if format < present {
            return Err(Rejection::FormatIsNewer { present, format });
        }
        for (id, host) in self.versions() {
            let why = match (host.knows(), host.version) {
                (Some(known), Some(version)) if known < format => format!(
                    "runs version {version}, which knows formats up to {known}, not {format}: upgrade it first"
                ),
                (None, _) if !vouched.contains(&id) => {
                    "never said which version it runs: start its agent, remove it, \
                     or vouch for it if it only keeps the state"
                        .to_owned()
                }
                _ => continue,
            };
            return Err(Rejection::HostBehind { host: host.name, why });
        }
        let at = self.settings.now;
        self.format.insert(0, Finalized { format, program, at });
        Ok(Reply::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state_machine::Faults;
    use crate::state_machine::codec::Row;
    use crate::state_machine::command::Command;
    use crate::state_machine::testing::{World, facts, found, host, id};
    use protocol::report::HostFacts;
    use protocol::time::UnixMillis;

    impl World {
        fn reports(&mut self, host: &str, version: &str) {
            let facts = HostFacts {
                agent_version: version.to_owned(),
                ..facts(host)
            };
            self.at(1_000, Command::RecordHost { facts })
                .expect("a host may report");
        }

        fn finalize(&mut self, format: u32, vouched: &[&str]) -> Answer {
            self.at(
                1_000,
                Command::FinalizeFormat {
                    format,
                    program: "0.9.0".to_owned(),
                    vouched: vouched.iter().map(|host| id(host)).collect(),
                },
            )
        }
    }

    fn refused(answer: &Answer, what: &str) -> bool {
        answer
            .as_ref()
            .is_err_and(|rejection| rejection.to_string().contains(what))
    }

    #[test]
    fn an_upgrade_is_finalized_when_every_host_knows_the_format() {
        let mut world = World::empty();
        world.at(1_000, found("keeper", 1)).expect("it is the first");
        world.reports("gpu-a", "0.8.0");
        world.reports("gpu-b", "0.9.0+format.2");
        assert_eq!(world.finalize(1, &[]), Ok(Reply::Unchanged));
        assert!(refused(
            &world.finalize(2, &["keeper", "gpu-a"]),
            "gpu-a runs version 0.8.0"
        ));
        world.reports("gpu-a", "0.9.0+format.2");
        assert!(refused(&world.finalize(2, &[]), "keeper never said"));
        assert_eq!(world.finalize(2, &["keeper"]), Ok(Reply::Done));
        assert_eq!(world.0.format(), 2);
        assert_eq!(world.finalize(2, &[]), Ok(Reply::Unchanged));
        assert!(refused(&world.finalize(1, &[]), "format 2"));
    }

    #[test]
    fn a_host_that_was_removed_holds_nobody_up() {
        let mut world = World::empty();
        world.reports("gpu-a", "0.8.0");
        world.0.hosts.insert(
            id("gpu-a"),
            crate::state_machine::host::HostRecord {
                host: host("gpu-a", 2),
                member: None,
                pin: crate::state_machine::host::Pin::Auto,
                joined_at: UnixMillis(1),
                revoked_at: Some(UnixMillis(2)),
                former_keys: vec![],
            },
        );
        assert_eq!(world.finalize(2, &[]), Ok(Reply::Done));
    }

    /// What this program does with the data of a program that comes after it.
    #[test]
    fn data_of_a_format_that_is_too_new_is_refused_with_both_versions() {
        let mut world = World::empty();
        world.reports("gpu-a", "9.9.9+format.99");
        assert_eq!(world.finalize(99, &[]), Ok(Reply::Done));
        let rows = world.0.drain_rows().into_iter();
        let mut rows: Vec<_> = rows.filter_map(row_with_value).collect();
        rows.sort();
        // A row of a form that nobody knows yet, as the newer program may well have written.
        rows.push((2, vec![9], vec![9]));
        let refused = State::from_rows(&mut rows.into_iter(), Faults::none());
        let text = refused.expect_err("it is too new").to_string();
        for part in [
            "format 99",
            "0.9.0",
            crate::state_machine::format::PROGRAM,
            "snapshot",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(world.0.too_new().is_some());
    }

    fn row_with_value(row: Row) -> Option<(u8, Vec<u8>, Vec<u8>)> {
        Some((row.table, row.key, row.value?))
    }
}
