//! What to make of a call that failed.

use std::time::Duration;

use kube::Error;
use kube::runtime::utils::Backoff;

/// Why a call failed, and whether to try again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Trouble {
    /// The API server is down, slow or busy: this passes, whenever.
    Unreachable(String),
    /// It refused for a reason that may pass: a quota, a webhook, a namespace that is not there yet.
    Refused(String),
    /// It will never accept this.
    Invalid(String),
}

impl Trouble {
    pub(super) fn of(error: &Error) -> Self {
        let Error::Api(status) = error else {
            return Self::Unreachable(error.to_string());
        };
        let text = format!("{} ({} {})", status.message, status.code, status.reason);
        // An internal error to the API server, though it knows what is wrong: it passes when a Service goes.
        if status.code == 500 && status.message.contains("failed to allocate a nodePort") {
            return Self::Refused(format!("the cluster has no node port left: {text}"));
        }
        match status.code {
            400 | 422 => Self::Invalid(text),
            // 401: a token that has just expired is replaced in its file by the kubelet.
            401 | 408 | 410 | 429 | 500.. => Self::Unreachable(text),
            _ => Self::Refused(text),
        }
    }

    /// The same without a secret that the API server may have repeated.
    pub(super) fn without(self, secret: &str) -> Self {
        let clean = |why: String| why.replace(secret, "(secret)");
        match self {
            Self::Unreachable(why) => Self::Unreachable(clean(why)),
            Self::Refused(why) => Self::Refused(clean(why)),
            Self::Invalid(why) => Self::Invalid(clean(why)),
        }
    }
}

/// The object was replaced or changed since it was looked at.
pub(super) fn is_conflict(error: &Error) -> bool {
    matches!(error, Error::Api(status) if status.code == 409)
}

pub(super) fn is_missing(error: &Error) -> bool {
    matches!(error, Error::Api(status) if status.code == 404)
}

/// Growing pauses between tries, between calls as between watches: an API server that is back is soon noticed.
#[derive(Debug)]
pub(super) struct Pauses(Duration);

impl Pauses {
    const FIRST: Duration = Duration::from_millis(200);
    const LONGEST: Duration = Duration::from_secs(2);

    pub(super) fn new() -> Self {
        Self(Self::FIRST)
    }

    pub(super) async fn pause(&mut self) {
        if let Some(length) = self.next() {
            tokio::time::sleep(length).await;
        }
    }
}

impl Iterator for Pauses {
    type Item = Duration;

    /// Half to all of the present length; the next one is twice as long.
    fn next(&mut self) -> Option<Duration> {
        let length = self.0.mul_f64(0.5 + fastrand::f64() / 2.0);
        self.0 = (self.0 * 2).min(Self::LONGEST);
        Some(length)
    }
}

impl Backoff for Pauses {
    fn reset(&mut self) {
        *self = Self::new();
    }
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    #[test]
    fn a_secret_that_is_repeated_is_not_kept() {
        let trouble = Trouble::Invalid("env[3].value: Invalid value: \"ey.token\"".to_owned());
        let clean = Trouble::Invalid("env[3].value: Invalid value: \"(secret)\"".to_owned());
        assert_eq!(trouble.without("ey.token"), clean);
    }

    #[test]
    fn pauses_grow_to_two_seconds_and_begin_anew() {
        let mut pauses = Pauses::new();
        let lengths: Vec<Duration> = pauses.by_ref().take(20).collect();
        assert!(lengths[0] <= Pauses::FIRST && lengths[19] >= Pauses::LONGEST / 2);
        assert!(lengths.iter().all(|length| *length <= Pauses::LONGEST));
        pauses.reset();
        assert!(pauses.next() <= Some(Pauses::FIRST));
    }

    #[test]
    fn refusals_are_told_apart() {
        let of = |code: u16| {
            Trouble::of(&Error::Api(Box::new(
                Status::failure("why", "Word").with_code(code),
            )))
        };
        for code in [401, 408, 410, 429, 500, 503] {
            assert!(matches!(of(code), Trouble::Unreachable(_)), "{code}");
        }
        let full = Status::failure(
            "Internal error occurred: failed to allocate a nodePort: range is full",
            "InternalError",
        );
        let full = Trouble::of(&Error::Api(Box::new(full.with_code(500))));
        assert!(
            matches!(&full, Trouble::Refused(why) if why.contains("no node port left")),
            "{full:?}"
        );
        for code in [403, 404, 409] {
            assert!(matches!(of(code), Trouble::Refused(_)), "{code}");
        }
        for code in [400, 422] {
            assert_eq!(of(code), Trouble::Invalid(format!("why ({code} Word)")));
        }
    }
}
