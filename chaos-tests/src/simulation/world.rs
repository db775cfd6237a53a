//! A world from a seed: members, hosts, the validator, clients, the operator and the faults; then healing.

use std::sync::Arc;
use std::time::Duration;

use coordinator::signer::{Key, LocalSigner, Seed, Sign};
use coordinator::validator::Directory;
use coordinator::validator::directory::ValidatorSettings;
use coordinator_core::state_machine::command::PayProfile;
use tokio::time::sleep;

use super::client::Client;
use super::clock::SimulatedClock;
use super::fault::Director;
use super::founding::found;
use super::host::Host;
use super::ledger::Ledger;
use super::liveness::{differences, unrest};
use super::member::{Member, Members, Parts};
use super::network::Network;
use super::operator::Operator;
use super::recorder::Recorder;
use super::validator::Validator;
use super::watched::Oracle;
use super::{Options, Report};

/// Healing may take so long: the patience with a launched deployment (120 min), which is the longest of all
/// phases, and time to clean up after it. Both matter when an instance was claimed and deleted unheard.
const HEALING_SECONDS: u64 = 135 * 60;
/// Between two looks whether it is at rest.
const LOOK_EVERY: Duration = Duration::from_secs(3);
/// After a loss of power everywhere, all members are back and agree within so many seconds.
const BACK_SECONDS: u64 = 60;

/// Faults go on until so many commands are applied.
const COMMANDS_MIN: u64 = 500;

struct World {
    recorder: Recorder,
    network: Network,
    validator: Validator,
    members: Members,
    hosts: Vec<Host>,
    oracle: Oracle,
}

pub(super) async fn run(options: Options) -> Report {
    let world = World::begin(options);
    let recorder = &world.recorder;
    let is_short = || recorder.now_ms() < options.seconds * 1000 || recorder.commands() < COMMANDS_MIN;
    while is_short() && !recorder.is_violated() {
        sleep(Duration::from_millis(500)).await;
    }
    world.end_faults();
    world.rest(HEALING_SECONDS).await;
    if !recorder.is_violated() {
        // Whatever was acknowledged until now must be there once more, on every member.
        for member in world.members.all() {
            member.kill();
        }
        world.agree(BACK_SECONDS).await;
        world.rest(HEALING_SECONDS).await;
        for (machine, _) in world.members.all().iter().filter_map(Member::inside) {
            world.oracle.check(&machine, recorder);
        }
    }
    world.report(options.seed)
}

impl World {
    fn begin(options: Options) -> Self {
        let mut random = fastrand::Rng::with_seed(options.seed);
        let recorder = Recorder::new(options.keep_trace);
        let clock = Arc::new(SimulatedClock::new());
        let network = Network::new(recorder.clone(), random.u64(..));
        let signer = |byte: u8, random: fastrand::Rng| {
            let key = Key::for_simulation(&Seed::new([byte; 32]), random);
            Arc::new(LocalSigner::new(key, clock.clone()))
        };
        let miner = signer(1, random.fork());
        let validator_hotkey = signer(2, random.fork()).hotkey().clone();
        let validator = Validator::new(
            validator_hotkey,
            miner.hotkey().clone(),
            recorder.clone(),
            random.fork(),
        );
        let oracle = Oracle::default();
        let parts = Arc::new(Parts {
            recorder: recorder.clone(),
            clock: Arc::clone(&clock),
            signer: miner,
            directory: directory(&validator),
            validator: validator.clone(),
            network: network.clone(),
            planted: options.planted,
            pay_profile: if random.bool() {
                PayProfile::Of2026
            } else {
                PayProfile::Of2025September
            },
            oracle: oracle.clone(),
            ledger: Ledger::default(),
        });
        let count = [3, 3, 3, 4, 5][random.usize(..5)];
        let members = (1..=count).map(|number| Member::new(number, Arc::clone(&parts), random.fork()));
        let members = Members(members.collect());
        let hosts: Vec<Host> = (1..=random.u8(2..4))
            .map(|number| {
                let gpu_count = random.u8(1..5);
                let (recorder, validator, clock) = (recorder.clone(), validator.clone(), Arc::clone(&clock));
                let unchecked = options.planted.revision_not_checked;
                Host::new(
                    number,
                    gpu_count,
                    recorder,
                    validator,
                    clock,
                    random.fork(),
                    unchecked,
                )
            })
            .collect();
        let world = Self {
            recorder,
            network,
            validator,
            members,
            hosts,
            oracle,
        };
        world.start(*clock, &mut random);
        world
    }

    fn start(&self, clock: SimulatedClock, random: &mut fastrand::Rng) {
        for member in self.members.all() {
            tokio::spawn(member.clone().run());
        }
        for host in &self.hosts {
            let (members, network) = (self.members.clone(), self.network.clone());
            tokio::spawn(host.clone().run(members, network));
        }
        tokio::spawn(self.validator.clone().trade());
        let mut client = || Client {
            members: self.members.clone(),
            recorder: self.recorder.clone(),
            random: random.fork(),
        };
        let count = self.members.all().len() as u64;
        let mut founder = client();
        // Nobody else knows of the cluster yet.
        founder.members = self.members.founder();
        tokio::spawn(found(founder, clock, count));
        for _ in 0..2 {
            tokio::spawn(client().write());
        }
        tokio::spawn(client().read(self.oracle.clone()));
        tokio::spawn(client().read(self.oracle.clone()));
        let client = client();
        let calm = [1, 1, 2, 3][random.usize(..4)];
        let operator = Operator {
            client,
            validator: self.validator.hotkey.clone(),
            servers: self.hosts.iter().map(|host| host.server().clone()).collect(),
            calm,
        };
        tokio::spawn(operator.run());
        let director = Director {
            recorder: self.recorder.clone(),
            validator: self.validator.clone(),
            members: self.members.clone(),
            network: self.network.clone(),
            hosts: self.hosts.clone(),
            calm,
            random: random.fork(),
        };
        tokio::spawn(director.run());
    }

    fn end_faults(&self) {
        self.recorder.end_faults();
        self.network.heal();
        self.validator.end_trouble();
        for member in self.members.all() {
            member.machine_clock().set_ahead(0);
        }
        for host in self.hosts.iter().filter(|host| host.clock_is_off()) {
            host.set_clock_off(0);
        }
    }

    /// Waits until all members are there and the same. What runs may change meanwhile: a job that ends makes room.
    async fn agree(&self, seconds: u64) {
        self.wait("of one mind", seconds, 1, || differences(&self.members))
            .await;
    }

    /// Waits until all is at rest.
    async fn rest(&self, seconds: u64) {
        let unrest = || unrest(&self.members, &self.hosts, &self.validator);
        self.wait("at rest", seconds, 2, unrest).await;
    }

    /// Waits until so many looks in a row find nothing; that they do not in time is a violation.
    async fn wait(&self, what: &str, seconds: u64, looks: u32, look: impl Fn() -> Vec<String>) {
        let recorder = &self.recorder;
        let end_ms = recorder.now_ms() + seconds * 1000;
        let mut calm = 0;
        while !recorder.is_violated() {
            sleep(LOOK_EVERY).await;
            let found = look();
            calm = if found.is_empty() { calm + 1 } else { 0 };
            if calm >= looks {
                recorder.note(what);
                return;
            }
            if recorder.now_ms() >= end_ms {
                recorder.violation(format_args!("10: not {what} after {seconds} s: {found:?}"));
            }
        }
    }

    fn report(&self, seed: u64) -> Report {
        let virtual_ms = self.recorder.now_ms();
        let acknowledged = u64::try_from(self.oracle.len()).unwrap_or(u64::MAX);
        let recorded = self.recorder.finish();
        let mut events = recorded.events;
        events.insert("elections", self.network.elections());
        Report {
            seed,
            members: self.members.all().len(),
            virtual_ms,
            faults: recorded.faults,
            commands: recorded.commands,
            acknowledged,
            events,
            violations: recorded.violations,
            trace_hash: recorded.hash,
            trace: recorded.lines,
        }
    }
}

/// Loopback, since there is no TLS; nothing is ever dialled but the model.
fn directory(validator: &Validator) -> Directory {
    let settings = ValidatorSettings {
        hotkey: validator.hotkey.to_string(),
        api: "http://127.0.0.1:1".to_owned(),
        socket: "ws://127.0.0.1:2".to_owned(),
        registry: "127.0.0.1:3".to_owned(),
    };
    Directory::check(&[settings]).expect("a good configuration")
}
