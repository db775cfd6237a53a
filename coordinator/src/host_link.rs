//! The coordinator's end of the host link.
//!
//! ```text
//! host --Hello, Report--> session --> RecordHost, RecordWorkloads --> log
//! host <--Desired-------- session <-- the state's desired set of that server, whenever its fence rises
//! ```
//! A session is messages in and messages out; `quic.rs` carries them, a simulation carries them by hand.
//! [`Hub`] knows who is connected and what each host reported last: memory that a leader change may lose.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protocol::id::ServerId;
use protocol::report::WorkloadReport;
use protocol::time::UnixMillis;

pub mod headers;
pub mod quic;
pub mod session;

/// A host that is connected to this member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connected {
    /// Names the session; a newer one of the same host replaces it.
    pub session: u64,
    /// Since when.
    pub since: UnixMillis,
    /// What it reported last, and when.
    pub report: Option<(UnixMillis, WorkloadReport)>,
}

/// Who is connected to this member.
#[derive(Debug, Clone, Default)]
pub struct Hub {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    next_session: u64,
    hosts: BTreeMap<ServerId, Connected>,
    /// When a host was last heard.
    heard: BTreeMap<ServerId, UnixMillis>,
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A host has said who it is; the number of its session.
    #[must_use]
    pub fn join(&self, server: ServerId, now: UnixMillis) -> u64 {
        let mut inner = self.lock();
        inner.next_session += 1;
        let session = inner.next_session;
        inner.heard.insert(server.clone(), now);
        inner.hosts.insert(
            server,
            Connected {
                session,
                since: now,
                report: None,
            },
        );
        session
    }

    /// A host was heard.
    pub fn hear(&self, server: &ServerId, now: UnixMillis, report: Option<WorkloadReport>) {
        let mut inner = self.lock();
        inner.heard.insert(server.clone(), now);
        if let (Some(report), Some(host)) = (report, inner.hosts.get_mut(server)) {
            host.report = Some((now, report));
        }
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

    /// When a host was last heard by this member; none if never.
    #[must_use]
    pub fn heard_at(&self, server: &ServerId) -> Option<UnixMillis> {
        self.lock().heard.get(server).copied()
    }
}
