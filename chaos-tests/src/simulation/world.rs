//! A world from a seed: the member, its hosts, the validator, the operator and the faults; then healing.

use std::sync::Arc;
use std::time::Duration;

use coordinator::signer::{Key, LocalSigner, Seed, Sign};
use coordinator::validator::directory::ValidatorSettings;
use coordinator::validator::{Directory, ValidatorApi};
use coordinator_core::state_machine::command::PayProfile;
use tokio::time::sleep;

use super::clock::SimulatedClock;
use super::disk::Disks;
use super::fault::Director;
use super::host::Host;
use super::liveness::unrest;
use super::member::{Member, Parts};
use super::operator::Operator;
use super::recorder::Recorder;
use super::socket::ModelDial;
use super::validator::Validator;
use super::watched::Oracle;
use super::{Options, Report};

/// Healing may take so long: the patience with a launched deployment (120 min), which is the longest of all
/// phases, and time to clean up after it. Both matter when an instance was claimed and deleted unheard.
const HEALING_SECONDS: u64 = 135 * 60;
/// Between two looks whether it is at rest.
const LOOK_EVERY: Duration = Duration::from_secs(3);

pub(super) async fn run(options: Options) -> Report {
    let mut random = fastrand::Rng::with_seed(options.seed);
    let recorder = Recorder::new(options.keep_trace);
    let clock = Arc::new(SimulatedClock::new());
    let signer = |byte: u8, random: fastrand::Rng| {
        let key = Key::for_simulation(&Seed::new([byte; 32]), random);
        Arc::new(LocalSigner::new(key, clock.clone()))
    };
    let miner = signer(1, random.fork());
    let validator_key = signer(2, random.fork());
    let validator = Validator::new(
        validator_key.hotkey().clone(),
        miner.hotkey().clone(),
        recorder.clone(),
        random.fork(),
    );
    // Loopback, since there is no TLS; nothing is ever dialled but the model.
    let settings = ValidatorSettings {
        hotkey: validator.hotkey.to_string(),
        api: "http://127.0.0.1:1".to_owned(),
        socket: "ws://127.0.0.1:2".to_owned(),
        registry: "127.0.0.1:3".to_owned(),
    };
    let directory = Directory::check(&[settings]).expect("a good configuration");
    let api: Arc<dyn ValidatorApi> = Arc::new(validator.clone());
    let oracle = Oracle::default();
    let parts = Parts {
        recorder: recorder.clone(),
        clock: Arc::clone(&clock),
        signer: miner,
        directory,
        validators: Arc::new([(validator.hotkey.clone(), api)].into_iter().collect()),
        dial: Arc::new(ModelDial {
            validator: validator.clone(),
            clock: Arc::clone(&clock),
        }),
        validator: validator.clone(),
        planted: options.planted,
        pay_profile: if random.bool() {
            PayProfile::Of2026
        } else {
            PayProfile::Of2025September
        },
        disks: Disks::new(random.u64(..)),
        oracle: oracle.clone(),
    };
    let member = Member::new(parts, random.fork());
    let hosts: Vec<Host> = (1..=random.u8(2..4))
        .map(|number| {
            let gpu_count = random.u8(1..5);
            let (recorder, validator, clock) = (recorder.clone(), validator.clone(), Arc::clone(&clock));
            Host::new(number, gpu_count, recorder, validator, clock, random.fork())
        })
        .collect();
    tokio::spawn(member.clone().run());
    for host in &hosts {
        tokio::spawn(host.clone().run(member.clone()));
    }
    tokio::spawn(validator.clone().trade());
    let calm = [1, 1, 2, 5][random.usize(..4)];
    let operator = Operator {
        member: member.clone(),
        recorder: recorder.clone(),
        validator: validator.hotkey.clone(),
        servers: hosts.iter().map(|host| host.server().clone()).collect(),
        calm,
        random: random.fork(),
    };
    tokio::spawn(operator.run());
    let director = Director {
        recorder: recorder.clone(),
        validator: validator.clone(),
        member: member.clone(),
        hosts: hosts.clone(),
        calm,
        random: random.fork(),
    };
    tokio::spawn(director.run(options.seconds));

    while recorder.now_ms() < options.seconds * 1000 && !recorder.is_violated() {
        sleep(Duration::from_millis(500)).await;
    }
    if !recorder.is_violated() {
        heal(&recorder, &validator, &member, &hosts).await;
    }
    if !recorder.is_violated() {
        // Whatever was acknowledged until now must be there once more.
        member.kill();
        sleep(Duration::from_secs(20)).await;
        if member.store().is_none() {
            recorder.violation("the member did not come back");
        }
    }
    let virtual_ms = recorder.now_ms();
    let acknowledged = u64::try_from(oracle.len()).unwrap_or(u64::MAX);
    let recorded = recorder.finish();
    Report {
        seed: options.seed,
        virtual_ms,
        faults: recorded.faults,
        commands: recorded.commands,
        acknowledged,
        events: recorded.events,
        violations: recorded.violations,
        trace_hash: recorded.hash,
        trace: recorded.lines,
    }
}

async fn heal(recorder: &Recorder, validator: &Validator, member: &Member, hosts: &[Host]) {
    recorder.end_faults();
    validator.end_trouble();
    for host in hosts.iter().filter(|host| host.clock_is_off()) {
        host.set_clock_off(0);
    }
    let end_ms = recorder.now_ms() + HEALING_SECONDS * 1000;
    let mut calm = 0;
    loop {
        sleep(LOOK_EVERY).await;
        if recorder.is_violated() {
            return;
        }
        let found = member.store().map(|store| unrest(&store, hosts, validator));
        let found = found.unwrap_or_else(|| vec!["the member is down".to_owned()]);
        calm = if found.is_empty() { calm + 1 } else { 0 };
        if calm >= 2 {
            recorder.note("at rest");
            return;
        }
        if recorder.now_ms() >= end_ms {
            recorder.violation(format_args!(
                "10: not at rest after {HEALING_SECONDS} s: {found:?}"
            ));
            return;
        }
    }
}
