//! Rules of replacing the miner's hotkey.
//!
//! What a validator knows of a miner, it knows of a hotkey: GPUs, instances, jobs. So nothing may be left there when
//! the hotkey goes, since nobody could take it away afterwards; it comes back under the new one by enrolling anew.
//! The authority's key is sealed with a miner's seed, so it comes along, sealed with the new one's.

use protocol::hotkey::Hotkey;

use super::command::{Answer, Rejection, Reply};
use super::state::State;

impl State {
    /// What must be gone before the hotkey may be replaced, each with the way there; empty if nothing is.
    #[must_use]
    pub fn in_the_way_of_another_hotkey(&self) -> Vec<String> {
        let mut found = Vec::new();
        let enrolled = self.servers.values().filter_map(|server| {
            let enrolment = server.enrolment.as_ref()?;
            Some((&server.facts.name, &enrolment.validator))
        });
        for (name, validator) in enrolled {
            found.push(format!(
                "server {name} works for the validator {validator}: `chutes-miner delete-node --name {name}`, and wait \
                 until it is gone"
            ));
        }
        if !self.deployments.is_empty() {
            let count = self.deployments.len();
            found.push(format!("{count} deployments are not gone yet: wait for them"));
        }
        if !self.strangers.is_empty() {
            let count = self.strangers.len();
            found.push(format!(
                "{count} instances at validators belong to no deployment: `chutes-miner diff` shows them; they are \
                 deleted within the deletion budget"
            ));
        }
        let waiting = self.outbox.len();
        if waiting > 0 {
            found.push(format!(
                "{waiting} changes wait to be told to validators: `chutes-miner status` shows them"
            ));
        }
        for id in self.workers.keys() {
            let name = self
                .servers
                .get(id)
                .map_or(id.as_str(), |server| &server.facts.name);
            found.push(format!(
                "the kubeconfig of worker {name} opens with the present hotkey only: `chutes-miner worker remove {name}`, \
                 and add it again afterwards"
            ));
        }
        if self.rotation().is_some() {
            found.push(
                "the cluster is changing over to another authority: `chutes-miner ca rotate --finish` comes first"
                    .to_owned(),
            );
        }
        found
    }

    pub(crate) fn replace_hotkey(&mut self, old: &Hotkey, new: Hotkey, sealed_key: Vec<u8>) -> Answer {
        let Some(miner) = self.settings.miner.clone() else {
            return Err(Rejection::NotFounded);
        };
        if miner == new {
            return Ok(Reply::Unchanged);
        }
        if miner != *old {
            return Err(Rejection::OtherMiner(miner));
        }
        let in_the_way = self.in_the_way_of_another_hotkey();
        if !in_the_way.is_empty() {
            return Err(Rejection::HotkeyInUse(in_the_way));
        }
        let Some(cluster) = self.cluster.get_mut(&0) else {
            return Err(Rejection::NotFounded);
        };
        cluster.sealed_key = sealed_key;
        self.settings_mut().miner = Some(new);
        Ok(Reply::Done)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use protocol::gpu::DeviceInfo;
    use protocol::hotkey::Signer;
    use protocol::id::{ChuteId, GpuId, InstanceId};
    use protocol::report::HostFacts;
    use protocol::time::UnixMillis;

    use super::*;
    use crate::state_machine::command::{Command, PayProfile};
    use crate::state_machine::effect::{EffectKind, Subject};
    use crate::state_machine::host::Rotation;
    use crate::state_machine::state::Stranger;
    use crate::state_machine::testing::{World, id};

    fn hotkey(seed: u8) -> Hotkey {
        Signer::from_seed(&[seed; 32]).hotkey().clone()
    }

    fn configure(miner: u8) -> Command {
        Command::Configure {
            miner: hotkey(miner),
            validators: BTreeSet::from([hotkey(9)]),
            pay_profile: PayProfile::Of2026,
        }
    }

    fn replace(old: u8, new: u8) -> Command {
        Command::ReplaceHotkey {
            old: hotkey(old),
            new: hotkey(new),
            sealed_key: vec![new],
        }
    }

    fn configured() -> World {
        let mut world = World::founded("a");
        assert_eq!(world.at(2_000, configure(1)), Ok(Reply::Done));
        world
    }

    #[test]
    fn the_new_hotkey_takes_over_with_the_authority_sealed_for_it() {
        let mut world = configured();
        assert_eq!(world.at(3_000, replace(1, 2)), Ok(Reply::Done));
        assert_eq!(world.0.settings().miner, Some(hotkey(2)));
        assert_eq!(world.0.cluster().map(|it| it.sealed_key.clone()), Some(vec![2]));
        assert_eq!(world.at(3_000, replace(1, 2)), Ok(Reply::Unchanged), "repeated");
        let late = world.at(3_000, replace(1, 3));
        assert_eq!(
            late,
            Err(Rejection::OtherMiner(hotkey(2))),
            "it is the old one's no more"
        );
        assert_eq!(world.0.cluster().map(|it| it.sealed_key.clone()), Some(vec![2]));
        assert_eq!(world.at(4_000, replace(2, 1)), Ok(Reply::Done), "and back");
    }

    /// A member that still runs with the old seed leads: what its configuration says is not written.
    #[test]
    fn a_configuration_of_another_miner_is_refused() {
        let mut world = configured();
        assert_eq!(world.at(3_000, replace(1, 2)), Ok(Reply::Done));
        assert_eq!(
            world.at(3_000, configure(1)),
            Err(Rejection::OtherMiner(hotkey(2)))
        );
        assert_eq!(world.at(3_000, configure(2)), Ok(Reply::Unchanged));
    }

    #[test]
    fn what_validators_know_under_the_old_hotkey_is_in_the_way() {
        let refused = |prepare: &dyn Fn(&mut World), why: &str| {
            let mut world = configured();
            prepare(&mut world);
            let answer = world.at(4_000, replace(1, 2));
            let Err(Rejection::HotkeyInUse(found)) = &answer else {
                panic!("{answer:?}");
            };
            assert!(
                found.iter().any(|it| it.contains(why)),
                "{why} is not in {found:?}"
            );
            assert_eq!(world.0.settings().miner, Some(hotkey(1)), "nothing changed");
        };
        refused(&enrol, "delete-node --name gpu-a");
        refused(&enrol, "wait to be told to validators");
        refused(
            &|world| {
                let subject = Subject::Instance(InstanceId::parse("i").expect("an id"));
                let kind = EffectKind::DeleteInstance {
                    chute: ChuteId::parse("c").expect("an id"),
                    instance: InstanceId::parse("i").expect("an id"),
                };
                world.0.push_effect(subject, hotkey(9), kind);
            },
            "1 changes wait",
        );
        refused(
            &|world| {
                let stranger = Stranger {
                    validator: hotkey(9),
                    chute: ChuteId::parse("c").expect("an id"),
                    config: None,
                    first_seen_at: UnixMillis(1),
                };
                let instance = InstanceId::parse("i").expect("an id");
                world.0.strangers.insert(instance, stranger);
            },
            "1 instances at validators",
        );
        refused(
            &|world| {
                let rotation = Rotation {
                    old: [1; 32],
                    new: [2; 32],
                    authority_pem: "new".to_owned(),
                    bridge_pem: "bridge".to_owned(),
                    sealed_key: vec![2],
                    begun_at: UnixMillis(3_000),
                };
                let begun = world.at(3_000, Command::RotateAuthority { rotation });
                begun.expect("founded");
            },
            "ca rotate --finish",
        );
    }

    #[test]
    fn before_the_cluster_is_founded_there_is_nothing_to_replace() {
        let mut world = World::empty();
        assert_eq!(world.at(1, replace(1, 2)), Err(Rejection::NotFounded));
    }

    fn device() -> DeviceInfo {
        DeviceInfo {
            uuid: GpuId::parse("0123456789abcdef0123456789abcdef").expect("an id"),
            name: "NVIDIA RTX A6000".to_owned(),
            memory: 48 << 30,
            processors: 84,
            clock_rate_khz: 1_800_000,
            max_threads_per_processor: 1536,
        }
    }

    /// A server with one GPU works for the validator.
    fn enrol(world: &mut World) {
        let facts = HostFacts {
            server: id("gpu-a"),
            name: "gpu-a".to_owned(),
            address: "203.0.113.1".to_owned(),
            proof_port: 30443,
            devices: vec![device()],
            cpu_count: 8,
            memory_gb: 64,
            disk_free_gb: 100,
            agent_version: "0.1.0".to_owned(),
        };
        world.at(2_500, Command::RecordHost { facts }).expect("a host");
        let command = Command::EnrolServer {
            server: id("gpu-a"),
            validator: hotkey(9),
            gpu_short_ref: "a6000".to_owned(),
            hourly_cost_usd_micros: 1,
        };
        world.at(2_600, command).expect("it has a GPU");
    }
}
