//! The director: faults of a moment and windows of trouble, at times drawn from the seed. What strikes single
//! calls and events is drawn where they happen.

use std::time::Duration;

use tokio::time::sleep;

use super::host::Host;
use super::member::Member;
use super::recorder::Recorder;
use super::validator::Validator;

#[derive(Debug)]
pub(super) struct Director {
    pub(super) recorder: Recorder,
    pub(super) validator: Validator,
    pub(super) member: Member,
    pub(super) hosts: Vec<Host>,
    /// Stretches the pauses: in a calm world things live long enough to be missed.
    pub(super) calm: u64,
    pub(super) random: fastrand::Rng,
}

impl Director {
    /// Strikes for so many seconds.
    pub(super) async fn run(mut self, seconds: u64) {
        let end_ms = seconds * 1000;
        // Let the first deployments come up: trouble at rest finds little.
        sleep(Duration::from_secs(6)).await;
        while self.recorder.now_ms() < end_ms {
            self.strike();
            let pause = self.random.u64(1000..6500) * self.calm;
            sleep(Duration::from_millis(pause)).await;
        }
    }

    fn strike(&mut self) {
        let now = self.recorder.now_ms();
        let host = self.hosts[self.random.usize(..self.hosts.len())].clone();
        let server = host.server().clone();
        match self.random.u8(..26) {
            0..=3 => {
                self.recorder.fault("host link cut", &server);
                host.cut();
            }
            4..=5 => {
                let ms = self.random.u64(1000..20_000);
                self.recorder.fault("host paused", format_args!("{server} {ms}"));
                host.pause(ms);
            }
            6..=8 => {
                if let Some(deployment) = host.crash_one() {
                    self.recorder.fault("workload crashed", deployment);
                }
            }
            9..=10 => {
                self.recorder.fault("member killed", "");
                self.member.kill();
            }
            11 => {
                let steps = self.random.u64(1..60);
                self.recorder.fault("power lost in a write", steps);
                self.member.fail_power_after(steps);
            }
            12..=13 => {
                let offset_ms = self.random.i64(-90_000..90_000);
                self.recorder
                    .fault("host clock jumps", format_args!("{server} {offset_ms}"));
                host.set_clock_off(offset_ms);
            }
            14..=16 => {
                if let Some(session) = &self.validator.lock().session {
                    self.recorder.fault("socket dropped", "");
                    session.kick.notify_one();
                }
            }
            17..=19 => {
                if let Some(instance) = self.validator.any_instance() {
                    self.recorder.fault("instance deleted", &instance);
                    self.validator.delete(&instance, "simulated");
                }
            }
            20..=21 => {
                let until = now + self.random.u64(20_000..100_000);
                self.recorder.fault("instances not listed", until);
                self.validator.lock().trouble.instances_unknown_until_ms = until;
            }
            22 => {
                let until = now + self.random.u64(5_000..60_000);
                self.recorder.fault("chutes not listed", until);
                self.validator.lock().trouble.chutes_unknown_until_ms = until;
            }
            23 => {
                let until = now + self.random.u64(2_000..12_000);
                self.recorder.fault("validator down", until);
                let mut inner = self.validator.lock();
                inner.trouble.rest_down_until_ms = until;
                inner.trouble.socket_down_until_ms = until;
            }
            24 => {
                let until = now + self.random.u64(5_000..20_000);
                self.recorder.fault("signatures refused", until);
                self.validator.lock().trouble.auth_fails_until_ms = until;
            }
            _ => {
                let until = now + self.random.u64(5_000..20_000);
                self.recorder.fault("validator full", until);
                self.validator.lock().trouble.full_until_ms = until;
            }
        }
    }
}
