//! Acknowledged writes: bans of chutes that nothing here can run, each time with a higher number in the
//! reason. A write without an answer is sent again, as its sender must; one with an answer must be there for
//! ever.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::doors::Doors;

/// Between two writes, and before a repetition.
const PAUSE: Duration = Duration::from_millis(100);
/// A miner that takes no write for so long is not recovering.
const SILENCE_MAX: Duration = Duration::from_secs(90);
const REASON: &str = "storm write ";

/// What was promised for one chute.
#[derive(Debug, Clone)]
struct Promise {
    chute: String,
    sent: u64,
    acknowledged: u64,
}

#[derive(Debug, Default)]
struct Books {
    promises: Vec<Promise>,
    acknowledged: u64,
    repeated: u64,
    lost: BTreeSet<String>,
    trouble: Option<String>,
}

/// All promises; clones share them.
#[derive(Debug, Clone, Default)]
pub(super) struct Promises(Arc<Mutex<Books>>);

impl Promises {
    pub(super) fn new(chutes: Vec<String>) -> Self {
        let promise = |chute| Promise {
            chute,
            sent: 0,
            acknowledged: 0,
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
    pub(super) fn acknowledged_now(&self) -> Vec<u64> {
        self.books().promises.iter().map(|p| p.acknowledged).collect()
    }

    /// Checks a state that was read after [`Self::acknowledged_now`] gave `floors`.
    pub(super) fn check(&self, floors: &[u64], state: &Value) {
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

    pub(super) fn acknowledged(&self) -> u64 {
        self.books().acknowledged
    }

    pub(super) fn repeated(&self) -> u64 {
        self.books().repeated
    }

    /// What was lost, in words.
    pub(super) fn lost(&self) -> Vec<String> {
        self.books().lost.iter().cloned().collect()
    }

    /// Why writing had to be given up.
    pub(super) fn trouble(&self) -> Option<String> {
        self.books().trouble.clone()
    }
}

/// Writes until it is told to stop; what is out then is still repeated until it is answered.
pub(super) async fn keep_writing(doors: Doors, promises: Promises, stop: CancellationToken) {
    let count = promises.books().promises.len();
    for number in 1.. {
        if stop.is_cancelled() || count == 0 {
            return;
        }
        let which = usize::try_from(number).unwrap_or_default() % count;
        let chute = {
            let promise = &mut promises.books().promises[which];
            promise.sent = number;
            promise.chute.clone()
        };
        let body = json!({ "chute_id": chute, "reason": format!("{REASON}{number}") });
        let began = Instant::now();
        while let Err(error) = doors.write("/v1/bans", &body).await {
            promises.books().repeated += 1;
            if began.elapsed() > SILENCE_MAX {
                let why = format!("no write was taken for {SILENCE_MAX:?}: {error:#}");
                promises.books().trouble = Some(why);
                return;
            }
            sleep(PAUSE).await;
        }
        {
            let mut books = promises.books();
            books.acknowledged += 1;
            books.promises[which].acknowledged = number;
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
