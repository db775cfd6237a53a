//! A queue of jobs for one file and the one who does them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{mpsc, watch};

use super::Writer;

/// Jobs that may wait for one file. A full queue makes the Raft tasks wait, which in turn fills the
/// proposer's queue, which answers "busy".
const QUEUE_JOBS_MAX: usize = 1024;
/// Jobs taken into one commit.
const BATCH_JOBS_MAX: usize = 512;

/// Does the jobs of one file, in order.
pub(crate) trait Worker: Send + 'static {
    type Job: Send + 'static;

    /// Does all of these jobs; the worker answers each through what the job carries.
    fn run(&mut self, jobs: &mut Vec<Self::Job>);

    /// Called once before an orderly end.
    fn finish(&mut self);

    /// Called when [`Worker::run`] panicked: nothing more will be done.
    fn panicked(&mut self);
}

/// The file is closed, or its worker is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the store is closed")]
pub(crate) struct Closed;

impl From<Closed> for std::io::Error {
    fn from(closed: Closed) -> Self {
        Self::other(closed)
    }
}

enum Message<J> {
    Job(J),
    Stop,
}

enum Kind<W: Worker> {
    Thread {
        queue: mpsc::Sender<Message<W::Job>>,
        ended: watch::Receiver<()>,
    },
    Inline(Arc<Mutex<Option<W>>>),
}

/// The way to one file's worker.
pub(crate) struct Lane<W: Worker>(Kind<W>);

impl<W: Worker> Clone for Lane<W> {
    fn clone(&self) -> Self {
        Self(match &self.0 {
            Kind::Thread { queue, ended } => Kind::Thread {
                queue: queue.clone(),
                ended: ended.clone(),
            },
            Kind::Inline(worker) => Kind::Inline(worker.clone()),
        })
    }
}

impl<W: Worker> std::fmt::Debug for Lane<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lane")
    }
}

impl<W: Worker> Lane<W> {
    /// Starts the worker. Its thread, if any, ends after [`Lane::stop`] or when all lanes are dropped.
    pub(crate) fn start(writer: Writer, name: &str, worker: W) -> std::io::Result<Self> {
        if writer == Writer::Inline {
            return Ok(Self(Kind::Inline(Arc::new(Mutex::new(Some(worker))))));
        }
        let (queue, jobs) = mpsc::channel(QUEUE_JOBS_MAX);
        let (end, ended) = watch::channel(());
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            serve(worker, jobs);
            // The file is closed now; whoever waits for `end` to go away may open it again.
            drop(end);
        })?;
        Ok(Self(Kind::Thread { queue, ended }))
    }

    /// Queues a job. Jobs of one caller are done in the order in which they were queued.
    pub(crate) async fn submit(&self, job: W::Job) -> Result<(), Closed> {
        match &self.0 {
            Kind::Thread { queue, .. } => queue.send(Message::Job(job)).await.map_err(|_| Closed),
            Kind::Inline(worker) => {
                let mut guard = worker.lock().unwrap_or_else(PoisonError::into_inner);
                let worker = guard.as_mut().ok_or(Closed)?;
                worker.run(&mut vec![job]);
                Ok(())
            }
        }
    }

    /// Does what is queued, closes the file, and returns when that is done.
    pub(crate) async fn stop(&self) {
        match &self.0 {
            Kind::Thread { queue, ended } => {
                // An error means that the worker has ended already.
                let _ = queue.send(Message::Stop).await;
                let mut ended = ended.clone();
                while ended.changed().await.is_ok() {}
            }
            Kind::Inline(worker) => {
                let worker = worker.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(mut worker) = worker {
                    worker.finish();
                }
            }
        }
    }
}

fn serve<W: Worker>(mut worker: W, mut queue: mpsc::Receiver<Message<W::Job>>) {
    let mut messages = Vec::new();
    let mut jobs = Vec::new();
    while queue.blocking_recv_many(&mut messages, BATCH_JOBS_MAX) > 0 {
        let mut stop = false;
        for message in messages.drain(..) {
            match message {
                Message::Job(job) if !stop => jobs.push(job),
                // Dropped unanswered: who queued it after the stop learns that the store is closed.
                Message::Job(_) => {}
                Message::Stop => stop = true,
            }
        }
        let done = catch_unwind(AssertUnwindSafe(|| worker.run(&mut jobs)));
        if done.is_err() {
            worker.panicked();
            return;
        }
        if stop {
            break;
        }
    }
    worker.finish();
}
