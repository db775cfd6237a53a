//! The operator: enrols the hosts, then locks, bans, stops and removes.

use std::time::Duration;

use coordinator_core::state_machine::chute::ChuteKey;
use coordinator_core::state_machine::command::Allowance;
use coordinator_core::state_machine::deployment::{Phase, StopReason};
use coordinator_core::state_machine::{Command, Rejection};
use protocol::hotkey::Hotkey;
use protocol::id::{DeploymentId, ServerId};
use tokio::time::sleep;

use super::client::Client;

#[derive(Debug)]
pub(super) struct Operator {
    pub(super) client: Client,
    pub(super) validator: Hotkey,
    pub(super) servers: Vec<ServerId>,
    /// Stretches its pauses.
    pub(super) calm: u64,
}

impl Operator {
    /// Operates until faults end; then frees what it has locked.
    pub(super) async fn run(mut self) {
        for server in self.servers.clone() {
            while !self.enrol(server.clone()).await {
                sleep(Duration::from_millis(300)).await;
            }
        }
        while self.client.recorder.faults_are_on() {
            let pause = self.client.random.u64(1500..8000) * self.calm;
            sleep(Duration::from_millis(pause)).await;
            self.act().await;
        }
        for server in self.servers.clone() {
            self.order(Command::LockServer {
                server,
                locked: false,
            })
            .await;
        }
    }

    /// False while the server is not known.
    async fn enrol(&mut self, server: ServerId) -> bool {
        let command = Command::EnrolServer {
            server,
            validator: self.validator.clone(),
            gpu_short_ref: "a6000".to_owned(),
            hourly_cost_usd_micros: 300_000,
        };
        !matches!(self.client.propose(command).await, Err(Rejection::Unknown { .. }))
    }

    async fn act(&mut self) {
        let server = self.servers[self.client.random.usize(..self.servers.len())].clone();
        let Some(store) = self.client.store() else { return };
        match self.client.random.u8(..14) {
            0..=1 => {
                let locked = self.client.random.bool();
                self.order(Command::LockServer { server, locked }).await;
            }
            2 => {
                let jobs = self.client.random.bool();
                self.order(Command::RemoveServer { server, jobs }).await;
            }
            3..=4 => {
                let chutes: Vec<ChuteKey> = store.read(|state| state.chutes().keys().cloned().collect());
                if chutes.is_empty() {
                    return;
                }
                let chute = chutes[self.client.random.usize(..chutes.len())].clone();
                let reason = (self.client.random.u8(..3) == 0).then(|| "simulated".to_owned());
                self.order(Command::BanChute { chute, reason }).await;
            }
            5 => self.stop_one_that_is_asked_for().await,
            6..=9 => {
                let all: Vec<DeploymentId> =
                    store.read(|state| state.deployments().keys().cloned().collect());
                if all.is_empty() {
                    return;
                }
                let deployments = vec![all[self.client.random.usize(..all.len())].clone()];
                let allowance = Allowance {
                    loss: true,
                    jobs: self.client.random.bool(),
                    budgeted: false,
                };
                let reason = StopReason::Operator("simulated".to_owned());
                self.order(Command::StopDeployments {
                    deployments,
                    reason,
                    allowance,
                })
                .await;
            }
            _ => {
                self.enrol(server).await;
            }
        }
    }

    /// Waits for a deployment whose launch config is on its way, and stops it.
    async fn stop_one_that_is_asked_for(&mut self) {
        for _ in 0..200 {
            sleep(Duration::from_millis(50)).await;
            let Some(store) = self.client.store() else { return };
            let requested = store.read(|state| {
                let mut all = state.deployments().values();
                all.find(|d| d.phase == Phase::Requested).map(|d| d.id.clone())
            });
            let Some(id) = requested else { continue };
            let reason = StopReason::Operator("simulated, while it is asked for".to_owned());
            let allowance = Allowance {
                loss: true,
                jobs: true,
                budgeted: false,
            };
            self.order(Command::StopDeployments {
                deployments: vec![id],
                reason,
                allowance,
            })
            .await;
            return;
        }
    }

    /// Proposes what may well be refused.
    async fn order(&mut self, command: Command) {
        if let Err(rejection) = self.client.propose(command).await {
            self.client
                .recorder
                .note(format_args!("operator: refused: {rejection}"));
        }
    }
}
