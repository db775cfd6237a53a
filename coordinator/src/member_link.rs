//! What members ask each other besides Raft, over the same connections.
//!
//! - Every member tells the leader which hosts are connected to it and what they reported (`Heard`): the leader
//!   judges who is silent, and none of it goes through the log. The answer also shows the member that it is in touch
//!   with a leader; a member that is not turns its hosts away, since it could tell them nothing new.
//! - A request to the management API that only the leader can answer is passed on to it (`Request`).
//! - Whose seed a member runs with (`Hotkey`): while the miner's hotkey is replaced they differ.
//! - What a member's clock says (`Time`), which the members compare (`clock/agreed.rs`).
//! - A question to a host that is connected to another member is asked through that one (`Host`).
//!
//! Frames are postcard with the version in front, as on the host link.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesOrdered, FuturesUnordered};
use protocol::hotkey::Hotkey;
use protocol::id::ServerId;
use protocol::link::Versioned;
use protocol::logs::{HostAnswer, HostQuestion};
use replica::Replica;
use replica::quic::Peers;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

use crate::clock::{AgreedClock, Clock as _, Comparison, Reading};
use crate::host_link::{Heard, Hub};
use crate::store::Store;

/// Between two of `Heard`.
const TELL_EVERY: Duration = Duration::from_secs(2);
/// How long the leader may take to answer that.
const TELL_MAX: Duration = Duration::from_secs(2);
/// How long a member may take to say whose seed it has.
const HOTKEY_MAX: Duration = Duration::from_secs(2);
/// Between two comparisons of the clocks, once the time is known, and before.
const COMPARE_EVERY: Duration = Duration::from_secs(10);
const COMPARE_FIRST: Duration = Duration::from_millis(100);
/// How long a member may take to say what its clock says.
const TIME_MAX: Duration = Duration::from_secs(1);
/// How long a host may take with a question that another member asks through this one.
const HOST_ANSWER_MAX: Duration = Duration::from_secs(10);
/// A member that was not in touch with a leader for so long turns its hosts away.
const CUT_OFF_AFTER: Duration = Duration::from_secs(10);

/// A request to the management API whose signature the asking member has checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// `GET` and so on.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// The body.
    pub body: Vec<u8>,
    /// The hash of the signature, which the command that it authorises carries.
    pub guard: Option<[u8; 32]>,
    /// Whether the signature binds the whole request.
    pub is_bound: bool,
}

/// Its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Response {
    /// HTTP status.
    pub status: u16,
    /// JSON.
    pub body: Vec<u8>,
}

#[derive(Debug, Serialize, Deserialize)]
enum Question {
    Heard(Vec<Heard>),
    Request(Request),
    Host(ServerId, HostQuestion),
    Hotkey,
    Time,
}

#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Heard,
    Response(Response),
    Host(HostAnswer),
    Hotkey(Hotkey),
    Time(Reading),
}

/// Answers a request of the management API on the leader.
pub type AnswerRequest = dyn Fn(Request) -> BoxFuture<'static, Response> + Send + Sync;

/// The answering side.
#[derive(Clone)]
pub struct Answering {
    /// Where what others hear is kept.
    pub hub: Hub,
    /// Tells whether this member leads.
    pub replica: Replica,
    /// The time.
    pub clock: AgreedClock,
    /// Whose seed this member's signer holds.
    pub hotkey: Hotkey,
    /// The management API.
    pub requests: Arc<AnswerRequest>,
}

impl std::fmt::Debug for Answering {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answering").finish_non_exhaustive()
    }
}

fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, String> {
    postcard::to_stdvec(&Versioned::V1(message)).map_err(|error| error.to_string())
}

fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, String> {
    let read = postcard::from_bytes::<Versioned<T>>(bytes);
    read.map(Versioned::into_latest)
        .map_err(|error| error.to_string())
}

impl Answering {
    /// Answers one question of a member.
    ///
    /// # Errors
    /// For the asking member, in words.
    pub async fn answer(self, from: u64, question: Vec<u8>) -> Result<Vec<u8>, String> {
        match decode(&question)? {
            Question::Host(server, question) => {
                let asked = self.hub.ask(&server, question, HOST_ANSWER_MAX);
                let asked = asked.ok_or_else(|| "the host is not connected to this member".to_owned())?;
                encode(&Answer::Host(asked.await?))
            }
            Question::Hotkey => encode(&Answer::Hotkey(self.hotkey)),
            Question::Time => encode(&Answer::Time(self.clock.reading())),
            Question::Heard(_) | Question::Request(_) if !self.replica.leads_now() => {
                Err("this member does not lead".to_owned())
            }
            Question::Heard(hosts) => {
                self.hub.hear_of(from, hosts, self.clock.now());
                encode(&Answer::Heard)
            }
            Question::Request(request) => encode(&Answer::Response((self.requests)(request).await)),
        }
    }
}

/// Carries a question to another member and its answer back: QUIC, or a simulation's network.
pub trait Carry: std::fmt::Debug + Send + Sync {
    /// Asks `member` at `address`; gives up after `within`.
    fn ask<'a>(
        &'a self,
        member: u64,
        address: &'a str,
        question: Vec<u8>,
        within: Duration,
    ) -> BoxFuture<'a, Result<Vec<u8>, String>>;
}

impl Carry for Peers {
    fn ask<'a>(
        &'a self,
        member: u64,
        address: &'a str,
        question: Vec<u8>,
        within: Duration,
    ) -> BoxFuture<'a, Result<Vec<u8>, String>> {
        Box::pin(async move {
            let answer = Self::ask(self, member, address, question, within).await;
            answer.map_err(|error| error.to_string())
        })
    }
}

/// The asking side.
#[derive(Debug, Clone)]
pub struct Asking {
    /// The connections.
    pub peers: Arc<dyn Carry>,
    /// Tells who leads, and where that is.
    pub replica: Replica,
}

impl Asking {
    /// Another member that leads, with its address.
    #[must_use]
    pub fn leader(&self) -> Option<(u64, String)> {
        let leader = self.replica.leadership().borrow().leader?;
        if leader == self.replica.member() {
            return None;
        }
        let address = self.replica.membership().address(leader)?.to_owned();
        Some((leader, address))
    }

    fn leader_and_term(&self) -> Option<(u64, u64)> {
        let now = self.replica.leadership();
        let now = now.borrow();
        now.leader.map(|leader| (leader, now.term))
    }

    async fn ask(&self, question: &Question, within: Duration) -> Result<Answer, String> {
        let (leader, address) = self.leader().ok_or_else(|| "no other member leads".to_owned())?;
        let answer = self.peers.ask(leader, &address, encode(question)?, within).await;
        decode(&answer?)
    }

    /// Passes a request on to the leader.
    ///
    /// # Errors
    /// Nobody leads, or the leader did not answer; the request may have been carried out.
    pub async fn pass_on(&self, request: Request, within: Duration) -> Result<Response, String> {
        match self.ask(&Question::Request(request), within).await? {
            Answer::Response(response) => Ok(response),
            _ => Err("the leader answered another question".to_owned()),
        }
    }

    /// Asks a host through whichever other member it is connected to.
    ///
    /// # Errors
    /// No member that can be reached is connected to it, or it did not answer.
    pub async fn ask_host(
        &self,
        server: &ServerId,
        question: &HostQuestion,
        within: Duration,
    ) -> Result<HostAnswer, String> {
        let question = encode(&Question::Host(server.clone(), question.clone()))?;
        let membership = self.replica.membership();
        let members = membership.voters.iter().chain(&membership.learners);
        let others = members.filter(|(member, _)| **member != self.replica.member());
        let mut asked: FuturesUnordered<_> = others
            .map(|(member, address)| {
                let question = question.clone();
                async move {
                    let answer = self.peers.ask(*member, address, question, within).await?;
                    match decode(&answer)? {
                        Answer::Host(answer) => Ok(answer),
                        _ => Err("a member answered another question".to_owned()),
                    }
                }
            })
            .collect();
        let mut why = Vec::new();
        while let Some(answer) = asked.next().await {
            match answer {
                Ok(answer) => return Ok(answer),
                Err(error) => why.push(error),
            }
        }
        Err(why.join("; "))
    }

    async fn hotkey_of(&self, member: u64, address: &str) -> Option<Hotkey> {
        let question = encode(&Question::Hotkey).ok()?;
        let answer = self.peers.ask(member, address, question, HOTKEY_MAX).await.ok()?;
        match decode(&answer).ok()? {
            Answer::Hotkey(hotkey) => Some(hotkey),
            _ => None,
        }
    }

    async fn time_of(&self, member: u64, address: &str) -> Option<(u64, Reading, Instant)> {
        let question = encode(&Question::Time).ok()?;
        let asked = Instant::now();
        let answer = self.peers.ask(member, address, question, TIME_MAX).await.ok()?;
        match decode(&answer).ok()? {
            // After a standstill of this process it may be of long ago.
            Answer::Time(reading) if asked.elapsed() <= TIME_MAX => {
                Some((member, reading, asked + asked.elapsed() / 2))
            }
            _ => None,
        }
    }

    /// Compares this member's clock with those of the voters; nothing changes while too few of them answer.
    async fn compare_clocks_once(&self, clock: &AgreedClock, store: &Store) {
        let own = self.replica.member();
        let voters = self.replica.membership().voters;
        let others = voters.iter().filter(|(member, _)| **member != own);
        let asked: FuturesOrdered<_> = others
            .map(|(member, address)| self.time_of(*member, address))
            .collect();
        let answered: Vec<_> = asked.filter_map(std::future::ready).collect().await;
        let readings = answered
            .iter()
            .map(|(_, reading, then)| reading.after(then.elapsed()));
        let readings: Vec<Reading> = readings.collect();
        let comparison = Comparison {
            voters: voters.len(),
            own: clock.reading(),
            votes: voters.contains_key(&own),
            others: &readings,
            recorded: store.read(|state| state.settings().now),
        };
        let Some(time) = comparison.time() else { return };
        let members = answered.iter().map(|(member, ..)| *member);
        clock.set(time, members.zip(readings.iter().map(|reading| reading.machine)));
    }

    /// Keeps `clock` right until cancelled.
    pub async fn compare_clocks(self, clock: AgreedClock, store: Store, cancel: CancellationToken) {
        let compare = async {
            loop {
                self.compare_clocks_once(&clock, &store).await;
                let pause = if clock.is_settled() {
                    COMPARE_EVERY
                } else {
                    COMPARE_FIRST
                };
                sleep(pause).await;
            }
        };
        cancel.run_until_cancelled(compare).await;
    }

    /// Whose seed each other member runs with; none for those that did not answer.
    pub async fn hotkeys(&self) -> BTreeMap<u64, Option<Hotkey>> {
        let membership = self.replica.membership();
        let members = membership.voters.iter().chain(&membership.learners);
        let others = members.filter(|(member, _)| **member != self.replica.member());
        let asked: FuturesUnordered<_> = others
            .map(|(member, address)| async move { (*member, self.hotkey_of(*member, address).await) })
            .collect();
        asked.collect().await
    }

    /// Tells the leader what `hub` hears, until cancelled, and keeps `in_touch` right.
    pub async fn tell(self, hub: Hub, in_touch: watch::Sender<bool>, cancel: CancellationToken) {
        let mut ticks = interval(TELL_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut told = (None, 0);
        let mut touched = Instant::now();
        while cancel.run_until_cancelled(ticks.tick()).await.is_some() {
            if self.replica.leads_now() {
                touched = Instant::now();
            } else {
                // Another leader knows nothing of what its predecessor was told, nor does the same one once it was
                // started anew: that is another term.
                let leader = self.leader_and_term();
                let known = if told.0 == leader { told.1 } else { 0 };
                let (hosts, news) = hub.heard_since(known);
                match self.ask(&Question::Heard(hosts), TELL_MAX).await {
                    Ok(_) => {
                        told = (leader, news);
                        touched = Instant::now();
                    }
                    Err(error) => tracing::debug!(error, "the leader was not told who is connected"),
                }
            }
            let now = touched.elapsed() < CUT_OFF_AFTER;
            in_touch.send_if_modified(|before| std::mem::replace(before, now) != now);
        }
    }
}
