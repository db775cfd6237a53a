//! What happened: the trace with its hash, counts of faults and events, violations. And whether faults are
//! still on.
//!
//! What happens in one millisecond has no order: tokio's watch channels wake their receivers, such as the sessions of
//! several hosts, in a random one. So the hash is over the lines of each millisecond, sorted. The Raft library has
//! channels that keep to an order (`replica`'s `runtime`): whom an entry waits for depends on it.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sha2::{Digest, Sha256};
use tokio::time::Instant;

/// Shared by everything in a world; clones are the same one.
#[derive(Debug, Clone)]
pub(super) struct Recorder(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    began: Instant,
    faults_on: AtomicBool,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    keep: bool,
    hash: Sha256,
    /// The last millisecond, and its lines.
    at_ms: u64,
    instant: Vec<String>,
    lines: Vec<String>,
    faults: BTreeMap<&'static str, u64>,
    events: BTreeMap<&'static str, u64>,
    violations: Vec<String>,
    commands: u64,
}

/// What is left at the end.
pub(super) struct Recorded {
    pub(super) hash: String,
    pub(super) lines: Vec<String>,
    pub(super) faults: BTreeMap<&'static str, u64>,
    pub(super) events: BTreeMap<&'static str, u64>,
    pub(super) violations: Vec<String>,
    pub(super) commands: u64,
}

impl Inner {
    fn note(&mut self, at_ms: u64, line: String) {
        if at_ms != self.at_ms {
            self.end_instant();
            self.at_ms = at_ms;
        }
        if self.keep {
            self.lines.push(line.clone());
        }
        self.instant.push(line);
    }

    fn end_instant(&mut self) {
        self.instant.sort_unstable();
        for line in self.instant.drain(..) {
            self.hash.update(line.as_bytes());
            self.hash.update(b"\n");
        }
    }
}

impl Recorder {
    pub(super) fn new(keep: bool) -> Self {
        Self(Arc::new(Shared {
            began: Instant::now(),
            faults_on: AtomicBool::new(true),
            inner: Mutex::new(Inner {
                keep,
                ..Inner::default()
            }),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Virtual time since the beginning, in ms.
    pub(super) fn now_ms(&self) -> u64 {
        u64::try_from(self.0.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Adds a line to the trace.
    pub(super) fn note(&self, what: impl Display) {
        let at_ms = self.now_ms();
        let line = format!("{at_ms:>8} {what}");
        self.lock().note(at_ms, line);
    }

    /// Counts an injected fault and notes it.
    pub(super) fn fault(&self, kind: &'static str, detail: impl Display) {
        self.note(format_args!("FAULT {kind} {detail}"));
        *self.lock().faults.entry(kind).or_default() += 1;
    }

    /// Counts something that shows that the run was worth its time.
    pub(super) fn event(&self, kind: &'static str) {
        *self.lock().events.entry(kind).or_default() += 1;
    }

    pub(super) fn command(&self) {
        self.lock().commands += 1;
    }

    pub(super) fn commands(&self) -> u64 {
        self.lock().commands
    }

    /// Something does not hold.
    pub(super) fn violation(&self, what: impl Display) {
        self.note(format_args!("VIOLATION {what}"));
        let at = self.now_ms();
        let mut inner = self.lock();
        if inner.violations.len() < 20 {
            inner.violations.push(format!("at {at} ms: {what}"));
        }
    }

    pub(super) fn is_violated(&self) -> bool {
        !self.lock().violations.is_empty()
    }

    pub(super) fn faults_are_on(&self) -> bool {
        self.0.faults_on.load(Ordering::Relaxed)
    }

    pub(super) fn end_faults(&self) {
        self.note("faults end");
        self.0.faults_on.store(false, Ordering::Relaxed);
    }

    pub(super) fn finish(&self) -> Recorded {
        let mut inner = std::mem::take(&mut *self.lock());
        inner.end_instant();
        Recorded {
            hash: hex::encode(inner.hash.finalize()),
            lines: inner.lines,
            faults: inner.faults,
            events: inner.events,
            violations: inner.violations,
            commands: inner.commands,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    async fn hash(instants: &[&[&str]]) -> String {
        let recorder = Recorder::new(false);
        for lines in instants {
            lines.iter().for_each(|line| recorder.note(line));
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        recorder.finish().hash
    }

    #[tokio::test(start_paused = true)]
    async fn the_hash_knows_what_happened_and_when_but_no_order_within_a_millisecond() {
        let first = hash(&[&["a", "b"], &["c"]]).await;
        assert_eq!(hash(&[&["b", "a"], &["c"]]).await, first);
        for other in [&[&["a", "b"][..], &["d"]], &[&["a"][..], &["b", "c"]]] {
            assert_ne!(hash(other).await, first);
        }
    }
}
