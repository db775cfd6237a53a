//! The director: faults of a moment and windows of trouble, at times drawn from the seed. What strikes single
//! calls and events is drawn where they happen.

use std::time::Duration;

use tokio::time::sleep;

use super::host::Host;
use super::member::{Member, Members};
use super::network::{Network, Place};
use super::recorder::Recorder;
use super::validator::Validator;

#[derive(Debug)]
pub(super) struct Director {
    pub(super) recorder: Recorder,
    pub(super) validator: Validator,
    pub(super) members: Members,
    pub(super) network: Network,
    pub(super) hosts: Vec<Host>,
    /// Stretches the pauses: in a calm world things live long enough to be missed.
    pub(super) calm: u64,
    pub(super) random: fastrand::Rng,
}

impl Director {
    /// Strikes until faults end.
    pub(super) async fn run(mut self) {
        // Let the cluster and the first deployments come up: trouble at rest finds little.
        sleep(Duration::from_secs(12)).await;
        while self.recorder.faults_are_on() {
            match self.random.u8(..10) {
                0..=2 => self.strike_a_member(),
                3..=4 => self.strike_the_network(),
                _ => self.strike(),
            }
            let pause = self.random.u64(1000..6500) * self.calm;
            sleep(Duration::from_millis(pause)).await;
        }
    }

    /// The leader in two of three cases, if there is one.
    fn any_member(&mut self) -> Member {
        let any = self.members.any(&mut self.random).clone();
        let leader = self.members.leader().cloned();
        leader.filter(|_| self.random.u8(..3) > 0).unwrap_or(any)
    }

    fn strike_a_member(&mut self) {
        let member = self.any_member();
        let me = member.number();
        let kind = if member.leads() { "leader" } else { "member" };
        match self.random.u8(..13) {
            0..=2 => {
                let what = if kind == "leader" {
                    "leader killed"
                } else {
                    "member killed"
                };
                self.recorder.fault(what, me);
                member.kill();
            }
            3..=4 => {
                let steps = self.random.u64(1..60);
                self.recorder
                    .fault("power lost in a write", format_args!("{kind} {me} {steps}"));
                member.fail_power_after(steps);
            }
            5 => {
                self.recorder
                    .fault("disk does not sync", format_args!("{kind} {me}"));
                member.fail_syncs();
            }
            6..=8 => {
                let ms = self.random.u64(500..20_000);
                self.recorder
                    .fault("member stands still", format_args!("{kind} {me} {ms}"));
                self.network.stand_still(me, ms);
            }
            9..=10 => member.kill_after_a_vote(),
            11 => self.set_a_clock_off(&member),
            _ => {
                self.recorder.fault("power lost everywhere", "");
                for member in self.members.all() {
                    member.kill();
                }
            }
        }
    }

    /// For a while, unless so many are off that more would not be outvoted. Three of four members vote.
    fn set_a_clock_off(&mut self, member: &Member) {
        let members = self.members.all();
        let off = members.iter().filter(|member| member.machine_clock().is_off());
        let outvoted_max = if members.len() < 5 { 1 } else { 2 };
        if member.machine_clock().is_off() || off.count() >= outvoted_max {
            return;
        }
        let minutes = self.random.i64(1..90);
        let ahead_ms = 60_000 * if self.random.bool() { minutes } else { -minutes };
        let ms = self.random.u64(5_000..60_000);
        let what = format_args!("{} {ahead_ms} {ms}", member.number());
        self.recorder.fault("member's clock jumps", what);
        let clock = member.machine_clock().clone();
        clock.set_ahead(ahead_ms);
        tokio::spawn(async move {
            sleep(Duration::from_millis(ms)).await;
            clock.set_ahead(0);
        });
    }

    fn strike_the_network(&mut self) {
        let ms = self.random.u64(1_000..15_000);
        let me = self.any_member().number();
        let mut others: Vec<u64> = self.members.all().iter().map(Member::number).collect();
        others.retain(|other| *other != me);
        self.random.shuffle(&mut others);
        let place = |members: &[u64]| -> Vec<Place> { members.iter().copied().map(Place::Member).collect() };
        let everywhere = [Place::Validator, Place::Hosts];
        let here = Place::Member(me);
        match self.random.u8(..14) {
            0..=1 => {
                self.recorder.fault("member alone", format_args!("{me} {ms}"));
                self.network.part(&[here], &place(&others), ms);
                if self.random.bool() {
                    self.network.part(&[here], &everywhere, ms);
                }
            }
            2..=3 => {
                let (few, many) = others.split_at(others.len().saturating_sub(1) / 2);
                self.recorder
                    .fault("member with a minority", format_args!("{me} {few:?} {ms}"));
                let minority: Vec<Place> = [here].into_iter().chain(place(few)).collect();
                self.network.part(&minority, &place(many), ms);
            }
            4..=5 => {
                let (these, those) = others.split_at(self.random.usize(..=others.len()));
                self.recorder
                    .fault("parted", format_args!("{these:?} {those:?} {ms}"));
                self.network.part(&place(these), &place(those), ms);
            }
            6..=7 => {
                let other = Place::Member(others[0]);
                self.recorder
                    .fault("cut one way", format_args!("{me} {} {ms}", others[0]));
                let (from, to) = if self.random.bool() {
                    (here, other)
                } else {
                    (other, here)
                };
                self.network.cut(from, to, ms);
            }
            8 => {
                self.recorder
                    .fault("cut one way from all", format_args!("{me} {ms}"));
                for other in place(&others) {
                    self.network.cut(other, here, ms);
                }
            }
            9 => {
                self.recorder
                    .fault("cut from the validator", format_args!("{me} {ms}"));
                self.network.part(&[here], &[Place::Validator], ms * 2);
            }
            10 => {
                self.recorder
                    .fault("cut from the hosts", format_args!("{me} {ms}"));
                self.network.part(&[here], &[Place::Hosts], ms * 2);
            }
            11..=12 => {
                let permille = self.random.u64(50..350);
                self.recorder
                    .fault("lossy network", format_args!("{permille} {ms}"));
                self.network.lose(permille, ms);
            }
            _ => {
                let more_ms = self.random.u64(10..120);
                self.recorder
                    .fault("slow network", format_args!("{more_ms} {ms}"));
                self.network.slow_down(more_ms, ms);
            }
        }
    }

    /// Hosts, validator, and what runs.
    fn strike(&mut self) {
        let now = self.recorder.now_ms();
        let host = self.hosts[self.random.usize(..self.hosts.len())].clone();
        let server = host.server().clone();
        match self.random.u8(..23) {
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
                let offset_ms = self.random.i64(-90_000..90_000);
                self.recorder
                    .fault("host clock jumps", format_args!("{server} {offset_ms}"));
                host.set_clock_off(offset_ms);
            }
            11..=13 => {
                if let Some(session) = &self.validator.lock().session {
                    self.recorder.fault("socket dropped", "");
                    session.kick.notify_one();
                }
            }
            14..=16 => {
                if let Some(instance) = self.validator.any_instance() {
                    self.recorder.fault("instance deleted", &instance);
                    self.validator.delete(&instance, "simulated");
                }
            }
            17..=18 => {
                let until = now + self.random.u64(20_000..100_000);
                self.recorder.fault("instances not listed", until);
                self.validator.lock().trouble.instances_unknown_until_ms = until;
            }
            19 => {
                let until = now + self.random.u64(5_000..60_000);
                self.recorder.fault("chutes not listed", until);
                self.validator.lock().trouble.chutes_unknown_until_ms = until;
            }
            20 => {
                let until = now + self.random.u64(2_000..12_000);
                self.recorder.fault("validator down", until);
                let mut inner = self.validator.lock();
                inner.trouble.rest_down_until_ms = until;
                inner.trouble.socket_down_until_ms = until;
            }
            21 => {
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
