//! Servers of another miner, taken over at any moment.

use coordinator_core::state_machine::Command;
use coordinator_core::state_machine::adoption::{AdoptedDeployment, Adoption};
use coordinator_core::state_machine::chute::{ChuteCode, ChuteDefinition};
use coordinator_core::state_machine::deployment::Facts;
use protocol::id::{ChuteVersion, ConfigId, DeploymentId, GpuId, InstanceId, ServerId};

use super::{Step, World};

impl World {
    /// Another miner's record of a server, with mistakes in it now and then.
    pub(super) fn take_over(&mut self, server: ServerId) -> Step {
        self.send(Command::SetObserving { observing: true })?;
        let facts = self
            .state
            .servers()
            .get(&server)
            .map(|server| server.facts.clone());
        let mut gpus: Vec<GpuId> = facts
            .iter()
            .flat_map(|facts| facts.devices.iter().map(|device| device.uuid.clone()))
            .collect();
        self.random.shuffle(&mut gpus);
        let listed = gpus.iter().map(|gpu| (gpu.clone(), true)).collect();
        let sloppy = self.random.u8(..8) == 0;
        let rows = self.state.gpus();
        gpus.retain(|gpu| sloppy || rows.get(gpu).is_none_or(|gpu| gpu.holder.is_none()));
        let chutes: Vec<ChuteDefinition> = self
            .state
            .chutes()
            .values()
            .map(|chute| chute.definition.clone())
            .collect();
        let mut deployments = vec![];
        while let Some(chute) = self
            .pick(&chutes)
            .filter(|_| !gpus.is_empty() && self.random.u8(..4) > 0)
        {
            let taken = self.random.usize(usize::from(!sloppy)..=gpus.len().min(2));
            let running_at = self.random.bool().then_some(self.now);
            let active_at = running_at.filter(|_| self.random.bool());
            let name = self.name("adopted");
            deployments.push(AdoptedDeployment {
                id: DeploymentId::parse(&name).unwrap(),
                version: ChuteVersion::parse(&format!("v{}", self.random.u8(..3))).unwrap(),
                image: chute.image.clone(),
                chutes_version: chute.chutes_version.clone(),
                gpus: gpus.drain(..taken).collect(),
                job: None,
                config: Some(ConfigId::parse(&format!("config-of-{name}")).unwrap()),
                instance: Some(InstanceId::parse(&format!("instance-of-{name}")).unwrap()),
                preemptible: chute.preemptible,
                facts: Facts {
                    running_at,
                    claimed_at: Some(self.now),
                    verified_at: active_at,
                    active_at,
                    ..Facts::default()
                },
                ports: vec![],
                created_at: Some(self.now),
                code: ChuteCode {
                    filename: "app.py".to_owned(),
                    code: "print()".to_owned(),
                    ref_str: "app:chute".to_owned(),
                },
                chute,
            });
        }
        let adoption = Adoption {
            server,
            validator: self.key.clone(),
            gpu_short_ref: "a6000".to_owned(),
            hourly_cost_usd_micros: 300_000,
            seed: Some(self.random.u64(..)),
            locked: self.random.u8(..8) == 0,
            gpus: listed,
            deployments,
        };
        self.send(Command::AdoptServer(adoption))?;
        self.send(Command::SetObserving { observing: false })
    }
}
