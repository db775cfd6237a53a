//! The thread seam of the proof: backends block for seconds, the async executor must not.
//!
//! Proofs and decryption run on one thread, one at a time; device challenges on a second, so that they are
//! answered while a proof runs. Whoever waits too long, or finds too many waiting, is told so. The last proof
//! is kept: asking again for the same seed and iteration count costs nothing.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proof::WorkProduct;
use protocol::gpu::DeviceInfo;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

use crate::gpu::prover::{Error, Prover};

/// Limits of the worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How long a proof may wait for the one in front of it.
    pub wait_max: Duration,
    /// How many may wait.
    pub waiting_max: usize,
    /// How long the work itself may take.
    pub work_max: Duration,
    /// How long an answer to a device challenge may take, waiting included.
    pub answer_max: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            wait_max: Duration::from_secs(30),
            waiting_max: 4,
            // The longest estimate of a validator is 300 s, and it gives up after 2.5 times that.
            work_max: Duration::from_secs(750),
            answer_max: Duration::from_secs(10),
        }
    }
}

/// A ciphertext for the device at a place.
pub type Ciphertext = (usize, Vec<u8>);

/// What one request for a proof gives: a work product for each device, a text for each ciphertext.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProofAnswer {
    /// In the order of the devices.
    pub products: Arc<Vec<WorkProduct>>,
    /// In the order of the ciphertexts.
    pub texts: Vec<String>,
    /// False if the proof was still there from before.
    pub worked: bool,
}

/// The prover behind its threads.
#[derive(Debug)]
pub struct Worker {
    prover: Arc<dyn Prover>,
    last: Arc<Mutex<Option<LastProof>>>,
    proofs: Lane,
    challenges: Lane,
    limits: Limits,
}

#[derive(Debug)]
struct LastProof {
    seed: u64,
    iterations: u32,
    products: Arc<Vec<WorkProduct>>,
}

impl Worker {
    /// Starts the threads; they end when the worker is dropped.
    #[must_use]
    pub fn start(prover: Arc<dyn Prover>, limits: Limits) -> Self {
        Self {
            prover,
            last: Arc::default(),
            proofs: Lane::start(limits.waiting_max),
            // Challenges take milliseconds: a few more may wait.
            challenges: Lane::start(limits.waiting_max.saturating_mul(8)),
            limits,
        }
    }

    /// The devices.
    #[must_use]
    pub fn devices(&self) -> &[DeviceInfo] {
        self.prover.devices()
    }

    /// Answers a device challenge.
    ///
    /// # Errors
    /// As [`Prover::answer`], and [`Error::Busy`], [`Error::TimedOut`], [`Error::Crashed`].
    pub async fn answer(&self, challenge: String) -> Result<String, Error> {
        let prover = Arc::clone(&self.prover);
        let answer_max = self.limits.answer_max;
        let work = move || prover.answer(&challenge);
        self.challenges.run(answer_max, answer_max, work).await
    }

    /// Proves and decrypts. Any ciphertext that cannot be decrypted fails the whole call, as a validator
    /// expects.
    ///
    /// # Errors
    /// As [`Prover::prove`] and [`Prover::decrypt`], and [`Error::Busy`], [`Error::TimedOut`],
    /// [`Error::Crashed`].
    pub async fn prove(
        &self,
        seed: u64,
        iterations: u32,
        ciphertexts: Vec<Ciphertext>,
    ) -> Result<ProofAnswer, Error> {
        let (prover, last) = (Arc::clone(&self.prover), Arc::clone(&self.last));
        let work = move || {
            let (products, worked) = products(prover.as_ref(), &last, seed, iterations)?;
            let texts = ciphertexts
                .iter()
                .map(|(device, blob)| prover.decrypt(seed, iterations, *device, blob))
                .collect::<Result<_, _>>()?;
            Ok(ProofAnswer {
                products,
                texts,
                worked,
            })
        };
        self.proofs
            .run(self.limits.wait_max, self.limits.work_max, work)
            .await
    }
}

/// The work products for a seed, from the last proof or by doing the work.
fn products(
    prover: &dyn Prover,
    last: &Mutex<Option<LastProof>>,
    seed: u64,
    iterations: u32,
) -> Result<(Arc<Vec<WorkProduct>>, bool), Error> {
    let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(last) = last
        .as_ref()
        .filter(|l| (l.seed, l.iterations) == (seed, iterations))
    {
        return Ok((Arc::clone(&last.products), false));
    }
    // Whatever becomes of it, the backend no longer holds the proof before.
    *last = None;
    let products = prover.prove(seed, iterations)?;
    if products.len() != prover.devices().len() {
        return Err(Error::Backend("it proved another number of devices".to_owned()));
    }
    let products = Arc::new(products);
    *last = Some(LastProof {
        seed,
        iterations,
        products: Arc::clone(&products),
    });
    Ok((products, true))
}

type Job = Box<dyn FnOnce() + Send>;

/// One thread that does one thing at a time, and those who wait for it.
struct Lane {
    jobs: SyncSender<Job>,
    turn: Arc<Semaphore>,
    waiting: Semaphore,
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane")
            .field("idle", &(self.turn.available_permits() == 1))
            .finish_non_exhaustive()
    }
}

impl Lane {
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the thread seam of the blocking proof backends"
    )]
    fn start(waiting_max: usize) -> Self {
        let (jobs, queue) = sync_channel::<Job>(1);
        std::thread::spawn(move || {
            while let Ok(job) = queue.recv() {
                job();
            }
        });
        Self {
            jobs,
            turn: Arc::new(Semaphore::new(1)),
            // One more than may wait: whoever gets the turn at once passes through here too.
            waiting: Semaphore::new(waiting_max.saturating_add(1).min(Semaphore::MAX_PERMITS)),
        }
    }

    async fn run<T: Send + 'static>(
        &self,
        wait_max: Duration,
        work_max: Duration,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let place = self.waiting.try_acquire().map_err(|_| Error::Busy)?;
        let turn = timeout(wait_max, Arc::clone(&self.turn).acquire_owned())
            .await
            .map_err(|_| Error::Busy)?
            .map_err(|_| Error::Stopped)?;
        drop(place);
        let (reply, answer) = oneshot::channel();
        let job = move || {
            let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or(Err(Error::Crashed));
            // The turn belongs to the work, not to who asked: it stays taken when the asker has gone.
            drop(turn);
            drop(reply.send(result));
        };
        // One turn and one place in the queue: there is always room.
        self.jobs.try_send(Box::new(job)).map_err(|_| Error::Stopped)?;
        timeout(work_max, answer)
            .await
            .map_err(|_| Error::TimedOut)?
            .map_err(|_| Error::Stopped)?
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::Receiver;

    use super::*;

    /// A prover whose proofs end when the test says so.
    #[derive(Debug)]
    struct Held {
        devices: Vec<DeviceInfo>,
        go: Mutex<Receiver<Result<(), &'static str>>>,
        proofs: AtomicUsize,
    }

    impl Prover for Held {
        fn devices(&self) -> &[DeviceInfo] {
            &self.devices
        }
        fn answer(&self, challenge: &str) -> Result<String, Error> {
            Ok(challenge.to_owned())
        }
        fn prove(&self, _seed: u64, iterations: u32) -> Result<Vec<WorkProduct>, Error> {
            self.proofs.fetch_add(1, Ordering::SeqCst);
            let go = self.go.lock().expect("not poisoned: panics come after it").recv();
            if let Ok(Err(reason)) = go {
                std::panic::resume_unwind(Box::new(reason));
            }
            Ok(vec![WorkProduct {
                intermediate_hashes: vec![],
                num_matrices: 1,
                total_iterations: iterations,
            }])
        }
        fn decrypt(&self, _: u64, _: u32, _: usize, blob: &[u8]) -> Result<String, Error> {
            String::from_utf8(blob.to_vec()).map_err(|_| Error::BadCiphertext)
        }
    }

    fn held(limits: Limits) -> (SyncSender<Result<(), &'static str>>, Arc<Held>, Arc<Worker>) {
        let (go, receiver) = sync_channel(8);
        let prover = Arc::new(Held {
            devices: vec![proof::software_device(crate::gpu::cpu::software_gpu_id(
                "held", 0,
            ))],
            go: Mutex::new(receiver),
            proofs: AtomicUsize::new(0),
        });
        let worker = Worker::start(Arc::clone(&prover) as Arc<dyn Prover>, limits);
        (go, prover, Arc::new(worker))
    }

    const SHORT: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn a_second_proof_waits_and_then_is_told_that_the_gpus_are_busy() {
        let (go, prover, worker) = held(Limits {
            wait_max: SHORT,
            waiting_max: 1,
            ..Limits::default()
        });
        let first = tokio::spawn({
            let worker = Arc::clone(&worker);
            async move { worker.prove(1, 1, vec![]).await }
        });
        while prover.proofs.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(worker.prove(2, 1, vec![]).await, Err(Error::Busy));
        assert_eq!(
            worker.answer("challenge".to_owned()).await.as_deref(),
            Ok("challenge"),
            "challenges do not wait for proofs"
        );
        go.send(Ok(())).expect("the prover listens");
        assert!(first.await.expect("no panic").is_ok());
        go.send(Ok(())).expect("the prover listens");
        assert!(worker.prove(2, 1, vec![]).await.is_ok(), "free again");
    }

    #[tokio::test]
    async fn work_goes_on_when_the_asker_gives_up() {
        let (go, prover, worker) = held(Limits {
            wait_max: SHORT,
            work_max: SHORT,
            ..Limits::default()
        });
        assert_eq!(worker.prove(1, 1, vec![]).await, Err(Error::TimedOut));
        assert_eq!(worker.prove(1, 1, vec![]).await, Err(Error::Busy));
        go.send(Ok(())).expect("the prover listens");
        // The finished proof is there for whoever asks next.
        let mut answer = worker.prove(1, 1, vec![]).await;
        while matches!(answer, Err(Error::Busy | Error::TimedOut)) {
            answer = worker.prove(1, 1, vec![]).await;
        }
        assert!(!answer.expect("proved").worked);
        assert_eq!(prover.proofs.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn the_last_proof_is_kept_by_seed_and_iterations() {
        let (go, prover, worker) = held(Limits::default());
        for _ in 0..4 {
            go.send(Ok(())).expect("the prover listens");
        }
        let mut expected = 0;
        for (seed, iterations, works) in [
            (1, 1, true),
            (1, 1, false),
            (1, 2, true),
            (2, 2, true),
            (1, 1, true),
        ] {
            let answer = worker.prove(seed, iterations, vec![(0, b"text".to_vec())]).await;
            let answer = answer.expect("proved");
            expected += usize::from(works);
            assert_eq!(answer.worked, works);
            assert_eq!(prover.proofs.load(Ordering::SeqCst), expected);
            assert_eq!(answer.products[0].total_iterations, iterations);
            assert_eq!(answer.texts, ["text"]);
        }
        let bad = worker.prove(1, 1, vec![(0, vec![0xff])]).await;
        assert_eq!(bad, Err(Error::BadCiphertext));
    }

    #[tokio::test]
    async fn a_crash_is_an_error_and_the_next_proof_works() {
        let (go, _, worker) = held(Limits::default());
        go.send(Err("planted")).expect("the prover listens");
        assert_eq!(worker.prove(1, 1, vec![]).await, Err(Error::Crashed));
        drop(go);
        assert!(worker.prove(1, 1, vec![]).await.is_ok_and(|answer| answer.worked));
    }
}
