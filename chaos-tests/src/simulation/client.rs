//! A client of the cluster: it writes through any member under a request id that it repeats until there is an
//! answer, through another member if need be, and sometimes once more; and it reads.

use std::time::Duration;

use coordinator::store::{Error, Store};
use coordinator_core::state_machine::command::RequestId;
use coordinator_core::state_machine::host::{Invite, InviteId};
use coordinator_core::state_machine::{Command, Rejection, Reply};
use tokio::time::sleep;

use super::member::Members;
use super::recorder::Recorder;
use super::watched::Oracle;

type Answer = Result<Reply, Rejection>;

/// A signature is shown again within this time: it is remembered longer.
const REPLAYED_WITHIN_MS: u64 = 45_000;

/// A client; the source of its randomness is its own.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) members: Members,
    pub(super) recorder: Recorder,
    pub(super) random: fastrand::Rng,
}

impl Client {
    /// The store of some member that is up and knows, or knew, of a leader.
    pub(super) fn store(&mut self) -> Option<Store> {
        let member = self.members.any(&mut self.random);
        member.store().filter(|_| member.knows_a_leader())
    }

    /// The answer to a command, in the end.
    pub(super) async fn propose(&mut self, command: Command) -> Answer {
        let request = RequestId(self.random.u128(..));
        self.propose_as(request, None, command).await
    }

    async fn propose_as(&mut self, request: RequestId, guard: Option<[u8; 32]>, command: Command) -> Answer {
        let mut tries = 0;
        loop {
            tries += 1;
            let Some(store) = self.store() else {
                sleep(Duration::from_millis(50)).await;
                continue;
            };
            match once(&store, request, guard, &command).await {
                Ok(answer) => {
                    if tries > 1 {
                        self.recorder.event("writes repeated after an unknown outcome");
                    }
                    if self.random.u8(..4) == 0 {
                        self.repeat(request, guard, &command, &answer).await;
                    }
                    return answer;
                }
                Err(why) => {
                    self.recorder.note(format_args!("client: no answer: {why}"));
                    sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }

    /// The same write again: the same answer, and no second deed.
    async fn repeat(
        &mut self,
        request: RequestId,
        guard: Option<[u8; 32]>,
        command: &Command,
        first: &Answer,
    ) {
        let Some(store) = self.store() else { return };
        if let Ok(again) = once(&store, request, guard, command).await
            && again != *first
        {
            self.recorder.violation(format_args!(
                "2: a repeated write is answered {again:?}, first {first:?}"
            ));
        }
    }

    fn guard(&mut self) -> [u8; 32] {
        std::array::from_fn(|_| self.random.u8(..))
    }

    /// A harmless write: each makes a row of its own.
    fn invitation(&mut self, store: &Store) -> Command {
        let invite = Invite {
            secret_hash: self.guard(),
            expires_at: store.clock().now() + Duration::from_secs(600),
            eligible: false,
            site: None,
            used_by: None,
        };
        let id = InviteId(self.random.u128(..));
        Command::InviteHost { id, invite }
    }

    /// Writes until faults end, each time with a signature; some of the signatures are stolen and shown again.
    pub(super) async fn write(mut self) {
        let mut stolen = None;
        while self.recorder.faults_are_on() {
            let pause = self.random.u64(150..700);
            sleep(Duration::from_millis(pause)).await;
            let Some(store) = self.store() else { continue };
            let (guard, now) = (self.guard(), self.recorder.now_ms());
            let command = self.invitation(&store);
            let request = RequestId(self.random.u128(..));
            if self.propose_as(request, Some(guard), command).await.is_ok() && self.random.u8(..4) == 0 {
                stolen = Some((guard, now));
            }
            if let Some((guard, at)) = stolen.take_if(|_| self.random.u8(..4) == 0)
                && self.recorder.now_ms() < at + REPLAYED_WITHIN_MS
            {
                self.replay(&store, guard).await;
            }
        }
    }

    /// Somebody shows a used signature for a write of their own.
    async fn replay(&mut self, store: &Store, guard: [u8; 32]) {
        let command = self.invitation(store);
        let request = RequestId(self.random.u128(..));
        if let Ok(answer) = once(store, request, Some(guard), &command).await {
            self.recorder.event("signatures shown again");
            if answer != Err(Rejection::Replayed) {
                self.recorder
                    .violation(format_args!("a used signature is good once more: {answer:?}"));
            }
        }
    }

    /// Reads for ever: what was acknowledged before a read began must be seen.
    pub(super) async fn read(mut self, oracle: Oracle) {
        loop {
            let pause = self.random.u64(50..1500);
            sleep(Duration::from_millis(pause)).await;
            if !self.recorder.faults_are_on() {
                sleep(Duration::from_secs(20)).await;
            }
            let Some((machine, replica)) = self.members.any(&mut self.random).inside() else {
                continue;
            };
            let before = oracle.len();
            if replica.linearizable().await.is_ok() {
                self.recorder.event("linearizable reads");
                oracle.check_read(&machine, &self.recorder, before);
            }
        }
    }
}

async fn once(
    store: &Store,
    request: RequestId,
    guard: Option<[u8; 32]>,
    command: &Command,
) -> Result<Answer, String> {
    match store.propose_as(request, guard, command.clone()).await {
        Ok(reply) => Ok(Ok(reply)),
        Err(Error::Rejected(rejection)) => Ok(Err(rejection)),
        Err(Error::Unavailable(why) | Error::OutcomeUnknown(why)) => Err(why),
    }
}
