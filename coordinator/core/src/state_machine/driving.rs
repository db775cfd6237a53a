//! Rules of sealed workers, which are driven from elsewhere: how one comes, and how it goes.

use protocol::id::ServerId;
use protocol::report::HostFacts;

use super::command::{Answer, Rejection, Reply};
use super::state::State;
use super::worker::Worker;

impl State {
    /// Adds a worker, or gives one that is known another kubeconfig and other facts.
    pub(crate) fn add_worker(&mut self, facts: HostFacts, sealed_kubeconfig: Vec<u8>) -> Answer {
        let id = facts.server.clone();
        let known = self.workers.contains_key(&id);
        if !known && (self.servers.contains_key(&id) || self.hosts.contains_key(&id)) {
            return Err(Rejection::AlreadyJoined(id));
        }
        let added_at = self.settings.now;
        self.record_host(facts)?;
        let worker = Worker {
            sealed_kubeconfig,
            added_at,
        };
        self.workers.insert(id, worker);
        Ok(Reply::Done)
    }

    /// Forgets a worker that does nothing for anybody any more.
    pub(crate) fn remove_worker(&mut self, id: &ServerId) -> Answer {
        if !self.workers.contains_key(id) {
            return Err(Rejection::Unknown {
                kind: "worker".to_owned(),
                name: id.to_string(),
            });
        }
        if let Some(server) = self.servers.get(id)
            && server.enrolment.is_some()
        {
            return Err(Rejection::WorkerInUse(server.facts.name.clone()));
        }
        self.workers.remove(id);
        self.forget_server(id);
        Ok(Reply::Done)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use protocol::gpu::DeviceInfo;
    use protocol::hotkey::Signer;
    use protocol::id::GpuId;
    use protocol::time::UnixMillis;

    use super::*;
    use crate::state_machine::command::{Command, PayProfile};
    use crate::state_machine::effect::EffectOutcome;
    use crate::state_machine::testing::{self, World, id};

    fn facts(server: &str, name: &str) -> HostFacts {
        let device = |number: u8| DeviceInfo {
            uuid: GpuId::parse(&format!("{number:032x}")).expect("32 digits"),
            name: "NVIDIA H200".to_owned(),
            memory: 1,
            processors: 1,
            clock_rate_khz: 1,
            max_threads_per_processor: 1,
        };
        HostFacts {
            name: name.to_owned(),
            devices: vec![device(1), device(2)],
            ..testing::facts(server)
        }
    }

    fn add(server: &str, name: &str, key: u8) -> Command {
        Command::AddWorker {
            facts: facts(server, name),
            sealed_kubeconfig: vec![key],
        }
    }

    #[test]
    fn a_worker_gets_another_kubeconfig_and_nobody_gets_its_name_or_its_id() {
        let mut world = World::founded("a");
        assert_eq!(world.at(2_000, add("w-1", "tee-1", 1)), Ok(Reply::Done));
        assert_eq!(world.at(3_000, add("w-1", "tee-1", 2)), Ok(Reply::Done));
        let kept = world.0.workers().get(&id("w-1")).expect("it was added");
        assert_eq!(
            (&kept.sealed_kubeconfig, kept.added_at),
            (&vec![2], UnixMillis(3_000))
        );
        assert_eq!(
            world.at(4_000, add("w-2", "tee-1", 3)),
            Err(Rejection::NameTaken("tee-1".to_owned()))
        );
        assert!(!world.0.workers().contains_key(&id("w-2")));
        let facts = facts("h-1", "host");
        world
            .at(5_000, Command::RecordHost { facts })
            .expect("it is let in");
        assert_eq!(
            world.at(6_000, add("h-1", "host", 4)),
            Err(Rejection::AlreadyJoined(id("h-1"))),
            "it has an agent"
        );
        assert_eq!(
            world.at(6_000, add("a", "tee-2", 4)),
            Err(Rejection::AlreadyJoined(id("a"))),
            "it is a host, though it has not reported yet"
        );
    }

    #[test]
    fn a_worker_goes_when_nobody_has_a_use_for_it() {
        let mut world = World::founded("a");
        let validator = Signer::from_seed(&[9; 32]).hotkey().clone();
        let configure = Command::Configure {
            miner: Signer::from_seed(&[1; 32]).hotkey().clone(),
            validators: BTreeSet::from([validator.clone()]),
            pay_profile: PayProfile::Of2026,
        };
        world.at(2_000, configure).expect("it is the first");
        let remove = || Command::RemoveWorker { server: id("w-1") };
        assert!(matches!(
            world.at(2_000, remove()),
            Err(Rejection::Unknown { .. })
        ));
        world.at(2_000, add("w-1", "tee-1", 1)).expect("it is new");
        let enrol = Command::EnrolServer {
            server: id("w-1"),
            validator,
            gpu_short_ref: "h200".to_owned(),
            hourly_cost_usd_micros: 1,
        };
        world.at(3_000, enrol).expect("it has GPUs");
        let in_use = Err(Rejection::WorkerInUse("tee-1".to_owned()));
        assert_eq!(world.at(3_000, remove()), in_use);
        let in_the_way = world.0.in_the_way_of_another_hotkey();
        assert!(
            in_the_way.iter().any(|why| why.contains("worker remove tee-1")),
            "{in_the_way:?}"
        );
        let leave = Command::RemoveServer {
            server: id("w-1"),
            jobs: false,
        };
        world.at(4_000, leave).expect("it may leave");
        loop {
            let effect = world.0.outbox().iter().next().map(|effect| effect.id);
            let Some(effect) = effect else { break };
            let outcome = EffectOutcome::Done;
            let finished = world.at(5_000, Command::FinishEffect { effect, outcome });
            finished.expect("it is the oldest");
        }
        assert_eq!(world.at(6_000, remove()), Ok(Reply::Done));
        assert!(world.0.servers().is_empty() && world.0.workers().is_empty());
    }
}
