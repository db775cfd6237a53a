//! Acknowledged writes: bans of chutes that nothing here can run, each time with a higher number in the
//! reason. A write without an answer is sent again under the same signature, as its sender must; one with an answer
//! must be there for ever.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::doors::Doors;

/// Between two writes, and before a repetition.
const PAUSE: Duration = Duration::from_millis(100);
/// A miner that takes no write for so long is not recovering.
const SILENCE_MAX: Duration = Duration::from_secs(90);
/// A signature is good for half a minute.
const SIGNATURE_MAX: Duration = Duration::from_secs(25);
/// So many acknowledgements are remembered with their times.
const TIMES_MAX: usize = 4096;
const REASON: &str = "storm write ";

/// What was promised for one chute.
#[derive(Debug, Clone)]
struct Promise {
    chute: String,
    sent: u64,
    acknowledged: u64,
    /// The first write whose signature was given up: it may still come, at any time, and undo later ones.
    in_doubt: Option<u64>,
}

impl Promise {
    /// What whoever reads from now on must find at least.
    fn floor(&self) -> u64 {
        self.acknowledged.min(self.in_doubt.unwrap_or(u64::MAX))
    }
}

#[derive(Debug, Default)]
struct Books {
    promises: Vec<Promise>,
    acknowledged: u64,
    /// When the newest were sent for the first time, and acknowledged.
    times: VecDeque<(Instant, Instant)>,
    repeated: u64,
    lost: BTreeSet<String>,
    trouble: Option<String>,
}

/// All promises; clones share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Promises(Arc<Mutex<Books>>);

impl Promises {
    pub(crate) fn new(chutes: Vec<String>) -> Self {
        let promise = |chute| Promise {
            chute,
            sent: 0,
            acknowledged: 0,
            in_doubt: None,
        };
        let promises = chutes.into_iter().map(promise).collect();
        Self(Arc::new(Mutex::new(Books {
            promises,
            ..Books::default()
        })))
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a state that is read from now on must have at least, for each chute.
    pub(crate) fn acknowledged_now(&self) -> Vec<u64> {
        self.books().promises.iter().map(Promise::floor).collect()
    }

    /// Checks a state that was read after [`Self::acknowledged_now`] gave `floors`.
    pub(crate) fn check(&self, floors: &[u64], state: &Value) {
        let mut books = self.books();
        let mut lost = Vec::new();
        for (promise, floor) in books.promises.iter().zip(floors) {
            let rows = state["chutes"].as_array().into_iter().flatten();
            let reason = rows
                .filter(|row| row["chute_id"] == promise.chute.as_str())
                .find_map(|row| row["ban_reason"].as_str());
            let number = reason.and_then(|text| text.strip_prefix(REASON)?.parse::<u64>().ok());
            let fine = match number {
                Some(number) => (*floor..=promise.sent).contains(&number),
                None => *floor == 0,
            };
            if !fine {
                lost.push(format!(
                    "write {floor} of chute {} was acknowledged, then {reason:?} was read",
                    promise.chute
                ));
            }
        }
        books.lost.extend(lost);
    }

    pub(crate) fn acknowledged(&self) -> u64 {
        self.books().acknowledged
    }

    pub(crate) fn repeated(&self) -> u64 {
        self.books().repeated
    }

    /// When the first write that was sent after a moment was acknowledged.
    pub(crate) fn first_after(&self, moment: Instant) -> Option<Instant> {
        let books = self.books();
        let sent_after = books.times.iter().filter(|(sent, _)| *sent >= moment);
        sent_after.map(|(_, acknowledged)| *acknowledged).min()
    }

    /// What was lost, in words.
    pub(crate) fn lost(&self) -> Vec<String> {
        self.books().lost.iter().cloned().collect()
    }

    /// Why writing had to be given up.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.books().trouble.clone()
    }
}

/// Several writers, each beginning at another member, until told to stop.
pub(crate) async fn keep_writing(doors: Doors, promises: Promises, writers: usize, stop: CancellationToken) {
    let mut tasks = JoinSet::new();
    for writer in 0..writers {
        let (doors, promises, stop) = (doors.beginning_with(writer), promises.clone(), stop.clone());
        tasks.spawn(write_as(writer, writers, doors, promises, stop));
    }
    while tasks.join_next().await.is_some() {}
}

/// One writer, with the chutes of its own; what is out when it is told to stop is still repeated until answered.
async fn write_as(writer: usize, writers: usize, doors: Doors, promises: Promises, stop: CancellationToken) {
    let own: Vec<usize> = (0..promises.books().promises.len())
        .filter(|which| which % writers == writer)
        .collect();
    for (number, which) in (1..).zip(own.iter().copied().cycle()) {
        if stop.is_cancelled() {
            return;
        }
        let chute = {
            let promise = &mut promises.books().promises[which];
            promise.sent = number;
            promise.chute.clone()
        };
        let body = json!({ "chute_id": chute, "reason": format!("{REASON}{number}") }).to_string();
        let sign = || doors.sign(Method::POST, "/v1/bans", body.clone().into_bytes());
        let began = Instant::now();
        let (mut signed, mut signed_at) = (sign(), began);
        while let Err(error) = doors.send(&signed).await {
            promises.books().repeated += 1;
            if began.elapsed() > SILENCE_MAX {
                let why = format!("no write was taken for {SILENCE_MAX:?}: {error:#}");
                promises.books().trouble = Some(why);
                return;
            }
            sleep(PAUSE).await;
            if signed_at.elapsed() > SIGNATURE_MAX {
                promises.books().promises[which].in_doubt.get_or_insert(number);
                (signed, signed_at) = (sign(), Instant::now());
            }
        }
        {
            let mut books = promises.books();
            books.acknowledged += 1;
            books.promises[which].acknowledged = number;
            books.times.push_back((began, Instant::now()));
            if books.times.len() > TIMES_MAX {
                books.times.pop_front();
            }
        }
        sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_or_missing_reason_is_a_lost_write_and_a_newer_one_in_doubt_is_not() {
        let state = |reason: Value| json!({"chutes": [{"chute_id": "c", "ban_reason": reason}]});
        let promises = Promises::new(vec!["c".to_owned()]);
        promises.check(&[0], &state(Value::Null));
        {
            let promise = &mut promises.books().promises[0];
            (promise.sent, promise.acknowledged) = (9, 8);
        }
        let floors = promises.acknowledged_now();
        promises.check(&floors, &state(json!("storm write 8")));
        promises.check(&floors, &state(json!("storm write 9")));
        assert!(promises.lost().is_empty());
        for bad in [json!("storm write 7"), json!("storm write 10"), Value::Null] {
            let before = promises.lost().len();
            promises.check(&floors, &state(bad.clone()));
            assert_eq!(promises.lost().len(), before + 1, "{bad}");
        }
    }
}
