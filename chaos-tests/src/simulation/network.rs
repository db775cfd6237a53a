//! The network between members, and theirs to hosts and to the validator: seeded delay and loss, cuts in one
//! direction or both, members that stand still.
//!
//! A member that *stands still* sends nothing and gets nothing for a while, and then everything that waited for
//! it at once. Its tasks and timers go on, which a stopped process's would not.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use coordinator::member_link::{Answering, Carry};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use replica::{Replica, Transport, Unreachable};
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::recorder::Recorder;

/// A leader may be this late in noticing that it leads no more.
const LATE_MAX: Duration = Duration::from_millis(20);
/// What is under way for longer is lost.
const CARRIED_MAX: Duration = Duration::from_secs(60);
/// How often what waits looks again whether it may go on.
const LOOK_EVERY: Duration = Duration::from_millis(25);

/// One end of a way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    Member(u64),
    /// All hosts.
    Hosts,
    Validator,
}

/// Shared by everything in a world; clones are the same one.
#[derive(Debug, Clone)]
pub(super) struct Network(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    recorder: Recorder,
    seed: u64,
    inner: Mutex<Inner>,
}

/// What answers at a member.
#[derive(Debug, Clone)]
pub(super) struct Door {
    pub(super) replica: Replica,
    pub(super) answering: Answering,
}

#[derive(Debug, Default)]
struct Inner {
    members: BTreeMap<u64, Door>,
    /// From, to, and until when nothing passes.
    cut: BTreeMap<(Place, Place), u64>,
    still: BTreeMap<u64, u64>,
    /// Of a thousand messages between members so many are lost, until then.
    lossy: (u64, u64),
    /// So many milliseconds more, one way, until then.
    slow: (u64, u64),
    /// A source for each direction, so that one link's traffic does not change another's luck.
    random: BTreeMap<(u64, u64), fastrand::Rng>,
    /// The highest term in which each member has given an answer.
    terms: BTreeMap<u64, u64>,
    /// Who led in which term.
    leaders: BTreeMap<u64, u64>,
    /// Members that die as soon as they have answered in a higher term than this.
    doomed: BTreeMap<u64, (u64, Arc<Notify>)>,
}

/// What becomes of one call.
struct Luck {
    there: Duration,
    back: Duration,
    lost_there: bool,
    lost_back: bool,
}

impl Network {
    pub(super) fn new(recorder: Recorder, seed: u64) -> Self {
        let inner = Mutex::default();
        Self(Arc::new(Shared {
            recorder,
            seed,
            inner,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        self.0.recorder.now_ms()
    }

    /// Nothing passes from one place to the other for so long.
    pub(super) fn cut(&self, from: Place, to: Place, ms: u64) {
        let until = self.now() + ms;
        let mut inner = self.lock();
        let known = inner.cut.entry((from, to)).or_default();
        *known = until.max(*known);
    }

    /// Nothing passes between these and those for so long.
    pub(super) fn part(&self, these: &[Place], those: &[Place], ms: u64) {
        for one in these {
            for other in those {
                self.cut(*one, *other, ms);
                self.cut(*other, *one, ms);
            }
        }
    }

    pub(super) fn stand_still(&self, member: u64, ms: u64) {
        let until = self.now() + ms;
        self.lock().still.insert(member, until);
    }

    pub(super) fn lose(&self, permille: u64, ms: u64) {
        self.lock().lossy = (permille, self.now() + ms);
    }

    pub(super) fn slow_down(&self, more_ms: u64, ms: u64) {
        self.lock().slow = (more_ms, self.now() + ms);
    }

    /// The member is killed as soon as it has answered in a higher term: after its next vote.
    pub(super) fn kill_after_a_vote(&self, member: u64, killed: Arc<Notify>) {
        let mut inner = self.lock();
        let term = inner.terms.get(&member).copied().unwrap_or_default();
        inner.doomed.insert(member, (term, killed));
    }

    /// Everything works from now on.
    pub(super) fn heal(&self) {
        let mut inner = self.lock();
        inner.cut.clear();
        inner.still.clear();
        inner.doomed.clear();
        (inner.lossy, inner.slow) = ((0, 0), (0, 0));
    }

    /// Whether anything passes from one place to the other.
    pub(super) fn passes(&self, from: Place, to: Place) -> bool {
        let now = self.now();
        let inner = self.lock();
        let still = |place: &Place| match place {
            Place::Member(member) => inner.still.get(member).is_some_and(|until| *until > now),
            Place::Hosts | Place::Validator => false,
        };
        let cut = inner.cut.get(&(from, to)).is_some_and(|until| *until > now);
        !cut && !still(&from) && !still(&to)
    }

    fn is_still(&self, member: u64) -> bool {
        self.lock()
            .still
            .get(&member)
            .is_some_and(|until| *until > self.now())
    }

    /// Waits until something passes, but not longer than that; whether it does.
    pub(super) async fn until_it_passes(&self, from: Place, to: Place, within: Duration) -> bool {
        let end = Instant::now() + within;
        while !self.passes(from, to) {
            if Instant::now() >= end {
                return false;
            }
            sleep(LOOK_EVERY).await;
        }
        true
    }

    pub(super) fn join(&self, member: u64, door: Door) {
        let term = door.replica.metrics().term;
        let before = {
            let mut inner = self.lock();
            inner.members.insert(member, door);
            inner.terms.get(&member).copied().unwrap_or_default()
        };
        if term < before {
            self.0.recorder.violation(format_args!(
                "2: member {member} has forgotten its vote: it answered in term {before} and is back in {term}"
            ));
        }
    }

    pub(super) fn leave(&self, member: u64) {
        self.lock().members.remove(&member);
    }

    fn answered(&self, member: u64, replica: &Replica) {
        if !replica.health().borrow().is_well() {
            // It could not write its vote and has promised nothing.
            return;
        }
        let term = replica.metrics().term;
        let mut inner = self.lock();
        let known = inner.terms.entry(member).or_default();
        *known = term.max(*known);
        if inner
            .doomed
            .get(&member)
            .is_some_and(|(before, _)| term > *before)
            && let Some((_, killed)) = inner.doomed.remove(&member)
        {
            drop(inner);
            self.0.recorder.fault("member killed after a vote", member);
            killed.notify_one();
        }
    }

    /// A member leads in this term; no other may.
    pub(super) fn leads_in(&self, member: u64, term: u64) {
        let first = *self.lock().leaders.entry(term).or_insert(member);
        if first != member {
            self.0.recorder.violation(format_args!(
                "2: members {first} and {member} both led in term {term}"
            ));
        }
    }

    /// Terms in which somebody led.
    pub(super) fn elections(&self) -> u64 {
        self.lock().leaders.len() as u64
    }

    /// Members that lead at this moment, as each of them sees it.
    pub(super) fn leading(&self) -> Vec<u64> {
        let inner = self.lock();
        let leading = inner.members.iter().filter(|(_, door)| door.replica.leads_now());
        leading.map(|(member, _)| *member).collect()
    }

    /// No two members lead at one moment.
    pub(super) fn check_leaders(&self) {
        let leading = self.leading();
        if leading.len() > 1 {
            let what = format!("5: members {leading:?} lead at the same time");
            self.0.recorder.violation(what);
        }
    }

    /// What only a leader does is done by one.
    pub(super) fn check_acts(&self, member: u64, what: &str) {
        let Some(door) = self.lock().members.get(&member).cloned() else {
            return;
        };
        let leadership = door.replica.leadership().borrow().clone();
        if !leadership.leads && leadership.since.elapsed() > LATE_MAX {
            self.0.recorder.violation(format_args!(
                "5: member {member} acts at the validator ({what}) although it leads no more"
            ));
        }
    }

    fn luck(&self, from: u64, to: u64) -> Luck {
        let (now, faults_on) = (self.now(), self.0.recorder.faults_are_on());
        let mut inner = self.lock();
        let (more_ms, slow_until) = inner.slow;
        let (permille, lossy_until) = inner.lossy;
        let more_ms = if slow_until > now { more_ms } else { 0 };
        let permille = if lossy_until > now {
            permille
        } else {
            u64::from(faults_on)
        };
        let seed = self.0.seed ^ (from << 32 | to).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let random = inner
            .random
            .entry((from, to))
            .or_insert_with(|| fastrand::Rng::with_seed(seed));
        let mut way = || Duration::from_millis(random.u64(1..4) + more_ms * random.u64(50..151) / 100);
        let (there, back) = (way(), way());
        Luck {
            there,
            back,
            lost_there: random.u64(..1000) < permille,
            lost_back: random.u64(..1000) < permille,
        }
    }

    async fn carry(&self, from: u64, to: u64, message: Message) -> Option<Vec<u8>> {
        let luck = self.luck(from, to);
        let (here, there) = (Place::Member(from), Place::Member(to));
        sleep(luck.there).await;
        while self.is_still(from) || self.is_still(to) {
            sleep(LOOK_EVERY).await;
        }
        if luck.lost_there || !self.passes(here, there) {
            return None;
        }
        let Door { replica, answering } = self.lock().members.get(&to).cloned()?;
        let answer = match message {
            Message::ToReplica(request) => {
                let answer = replica.answer(from, &request).await.ok()?;
                self.answered(to, &replica);
                answer
            }
            Message::ToMember(question) => answering.answer(from, question).await.ok()?,
        };
        sleep(luck.back).await;
        while self.is_still(from) || self.is_still(to) {
            sleep(LOOK_EVERY).await;
        }
        (!luck.lost_back && self.passes(there, here)).then_some(answer)
    }
}

/// What one member asks another.
enum Message {
    ToReplica(Vec<u8>),
    ToMember(Vec<u8>),
}

/// One member's end, for one of its lives.
#[derive(Debug, Clone)]
pub(super) struct End {
    pub(super) member: u64,
    pub(super) network: Network,
    /// False after its death: what its tasks still say reaches nobody.
    pub(super) alive: Arc<AtomicBool>,
}

impl End {
    /// The answer, or nothing when the time is over: a lost message is noticed only by the silence.
    async fn ask(&self, member: u64, address: &str, message: Message, within: Duration) -> Option<Vec<u8>> {
        debug_assert_eq!(address, address_of(member));
        let began = Instant::now();
        if self.alive.load(Ordering::Relaxed) {
            let (network, from) = (self.network.clone(), self.member);
            let (answer, answered) = oneshot::channel();
            // What has arrived is done to its end, also when the caller has given up.
            tokio::spawn(async move {
                let carried = timeout(CARRIED_MAX, network.carry(from, member, message)).await;
                if let Ok(Some(bytes)) = carried {
                    let _ = answer.send(bytes);
                }
            });
            if let Ok(Ok(bytes)) = timeout(within, answered).await {
                return Some(bytes);
            }
        }
        sleep_until(began + within).await;
        None
    }
}

impl Transport for End {
    fn call<'a>(
        &'a self,
        member: u64,
        address: &'a str,
        request: Vec<u8>,
        within: Duration,
    ) -> BoxFuture<'a, Result<Vec<u8>, Unreachable>> {
        async move {
            let answer = self
                .ask(member, address, Message::ToReplica(request), within)
                .await;
            answer.ok_or_else(|| Unreachable {
                reason: "no answer".to_owned(),
            })
        }
        .boxed()
    }
}

impl Carry for End {
    fn ask<'a>(
        &'a self,
        member: u64,
        address: &'a str,
        question: Vec<u8>,
        within: Duration,
    ) -> BoxFuture<'a, Result<Vec<u8>, String>> {
        async move {
            let answer = Self::ask(self, member, address, Message::ToMember(question), within).await;
            answer.ok_or_else(|| "no answer".to_owned())
        }
        .boxed()
    }
}

/// Where a member is reached.
pub(super) fn address_of(member: u64) -> String {
    format!("member:{member}")
}
