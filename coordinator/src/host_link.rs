//! The coordinator's end of the host link.
//!
//! ```text
//! host --Hello, Report--> session --> RecordHost, RecordWorkloads --> log
//! host <--Desired-------- session <-- the state's desired set of that server, whenever its fence rises
//! ```
//! A session is messages in and messages out; `quic.rs` carries them, a simulation carries them by hand.
//! Questions about a workload ([`AskHost`]) go to the host on streams of their own.
//! [`Hub`] knows who is connected and what each host reported last, here and, on the leader, at other members:
//! memory that a leader change may lose.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use protocol::id::ServerId;
use protocol::logs::{HostAnswer, HostQuestion};
use protocol::report::WorkloadReport;
use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

pub mod headers;
pub mod quic;
pub mod session;

/// A host that is connected to this member.
#[derive(Debug, Clone)]
pub struct Connected {
    /// Names the session; a newer one of the same host replaces it.
    pub session: u64,
    /// Since when.
    pub since: UnixMillis,
    /// What it reported last, and when.
    pub report: Option<(UnixMillis, WorkloadReport)>,
    /// Number of the news that its last report was.
    news: u64,
    /// The way to ask it.
    way: Option<Arc<dyn AskHost>>,
}

/// Asks a connected host about one of its workloads.
pub trait AskHost: std::fmt::Debug + Send + Sync {
    /// Asks; gives up after `within`.
    fn ask(&self, question: HostQuestion, within: Duration)
    -> BoxFuture<'static, Result<HostAnswer, String>>;
}

/// A host as the member that it is connected to tells the leader of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heard {
    /// Which.
    pub server: ServerId,
    /// What it reported last, if that is news for the leader.
    pub report: Option<WorkloadReport>,
}

/// Who is connected to this member.
#[derive(Debug, Clone, Default)]
pub struct Hub {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    next_session: u64,
    /// Number of the newest report.
    news: u64,
    hosts: BTreeMap<ServerId, Connected>,
    /// What other members told.
    elsewhere: BTreeMap<u64, Elsewhere>,
    /// When a host was last heard: not by a clock that may jump.
    heard: BTreeMap<ServerId, Instant>,
}

/// The hosts that are connected to another member.
#[derive(Debug)]
struct Elsewhere {
    told_at: Instant,
    hosts: BTreeMap<ServerId, Option<(UnixMillis, WorkloadReport)>>,
}

/// What another member told is forgotten when it tells nothing for so long.
const TOLD_MEMORY: Duration = Duration::from_secs(10);

impl Hub {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A host has said who it is; the number of its session.
    #[must_use]
    pub fn join(&self, server: ServerId, now: UnixMillis, way: Option<Arc<dyn AskHost>>) -> u64 {
        let mut inner = self.lock();
        inner.next_session += 1;
        let session = inner.next_session;
        inner.heard.insert(server.clone(), Instant::now());
        inner.hosts.insert(
            server,
            Connected {
                session,
                since: now,
                report: None,
                news: 0,
                way,
            },
        );
        session
    }

    /// A host was heard.
    pub fn hear(&self, server: &ServerId, now: UnixMillis, report: Option<WorkloadReport>) {
        let mut inner = self.lock();
        inner.heard.insert(server.clone(), Instant::now());
        let news = inner.news + 1;
        let Some((report, host)) = report.zip(inner.hosts.get_mut(server)) else {
            return;
        };
        let differs = host.report.as_ref().is_none_or(|(_, last)| *last != report);
        host.report = Some((now, report));
        if differs {
            host.news = news;
            inner.news = news;
        }
    }

    /// Everybody who is connected here, with the reports that came after `known`; and the number to ask with the
    /// next time.
    #[must_use]
    pub fn heard_since(&self, known: u64) -> (Vec<Heard>, u64) {
        let inner = self.lock();
        let heard = |(server, host): (&ServerId, &Connected)| Heard {
            server: server.clone(),
            report: host
                .report
                .as_ref()
                .filter(|_| host.news > known)
                .map(|(_, report)| report.clone()),
        };
        (inner.hosts.iter().map(heard).collect(), inner.news)
    }

    /// These hosts are connected to another member.
    pub fn hear_of(&self, member: u64, hosts: Vec<Heard>, now: UnixMillis) {
        let mut inner = self.lock();
        let mut before = inner
            .elsewhere
            .remove(&member)
            .map_or_else(BTreeMap::new, |it| it.hosts);
        let mut connected = BTreeMap::new();
        for Heard { server, report } in hosts {
            inner.heard.insert(server.clone(), Instant::now());
            let known = before.remove(&server).flatten();
            connected.insert(server, report.map(|report| (now, report)).or(known));
        }
        let told = Elsewhere {
            told_at: Instant::now(),
            hosts: connected,
        };
        inner.elsewhere.insert(member, told);
        let is_recent = |it: &Elsewhere| it.told_at.elapsed() < TOLD_MEMORY;
        inner.elsewhere.retain(|_, told| is_recent(told));
    }

    /// A session has ended; nothing happens if a newer one has replaced it.
    pub fn leave(&self, server: &ServerId, session: u64) {
        let mut inner = self.lock();
        if inner
            .hosts
            .get(server)
            .is_some_and(|host| host.session == session)
        {
            inner.hosts.remove(server);
        }
    }

    /// True if this session is the host's present one.
    #[must_use]
    pub fn is_current(&self, server: &ServerId, session: u64) -> bool {
        self.lock()
            .hosts
            .get(server)
            .is_some_and(|host| host.session == session)
    }

    /// A connected host.
    #[must_use]
    pub fn host(&self, server: &ServerId) -> Option<Connected> {
        self.lock().hosts.get(server).cloned()
    }

    /// Asks a host about a workload; none if it is not connected to this member.
    #[must_use]
    pub fn ask(
        &self,
        server: &ServerId,
        question: HostQuestion,
        within: Duration,
    ) -> Option<BoxFuture<'static, Result<HostAnswer, String>>> {
        let way = self.lock().hosts.get(server)?.way.clone()?;
        Some(way.ask(question, within))
    }

    /// What a host reported last, to this member or, as far as this one was told, to another.
    #[must_use]
    pub fn last_report(&self, server: &ServerId) -> Option<(UnixMillis, WorkloadReport)> {
        let inner = self.lock();
        match inner.hosts.get(server) {
            Some(host) => host.report.clone(),
            None => {
                let told = inner.elsewhere.values().filter_map(|told| told.hosts.get(server));
                told.flatten().max_by_key(|(at, _)| *at).cloned()
            }
        }
    }

    /// When a host was last heard, as far as this member knows; none if never.
    #[must_use]
    pub fn heard_at(&self, server: &ServerId) -> Option<Instant> {
        self.lock().heard.get(server).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::workload::Fence;

    fn report(revision: u64) -> WorkloadReport {
        WorkloadReport {
            fence: Fence {
                incarnation: 1,
                revision,
            },
            workloads: Vec::new(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_leader_is_told_who_is_connected_and_of_reports_only_the_news() {
        let (hub, leader) = (Hub::default(), Hub::default());
        let server = ServerId::parse("a").expect("valid");
        let session = hub.join(server.clone(), UnixMillis(1), None);
        hub.hear(&server, UnixMillis(2), Some(report(1)));
        let (heard, known) = hub.heard_since(0);
        assert_eq!(heard[0].report, Some(report(1)));
        leader.hear_of(2, heard, UnixMillis(3));
        hub.hear(&server, UnixMillis(4), Some(report(1)));
        let (heard, known) = hub.heard_since(known);
        assert_eq!((heard.len(), &heard[0].report), (1, &None), "the same again");
        leader.hear_of(2, heard, UnixMillis(5));
        assert_eq!(leader.heard_at(&server), Some(Instant::now()));
        assert_eq!(leader.last_report(&server), Some((UnixMillis(3), report(1))));
        hub.hear(&server, UnixMillis(6), Some(report(2)));
        assert_eq!(hub.heard_since(known).0[0].report, Some(report(2)));
        hub.leave(&server, session);
        let (heard, _) = hub.heard_since(known);
        assert!(heard.is_empty());
        leader.hear_of(2, heard, UnixMillis(7));
        assert_eq!(leader.last_report(&server), None, "it is connected nowhere");
    }
}
