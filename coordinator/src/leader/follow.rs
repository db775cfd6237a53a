//! What one validator says: events as they come, listings every so often and whenever an event may have
//! been missed.

use std::sync::Arc;
use std::time::Duration;

use coordinator_core::state_machine::Command;
use protocol::hotkey::Hotkey;
use protocol::id::{ChuteId, ChuteVersion};
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use super::{Listings, Triggers};
use crate::store::{Error, Store};
use crate::validator::event::Event;
use crate::validator::inventory::Observation;
use crate::validator::{SocketEvent, ValidatorApi, intake, inventory};

/// Tries for a definition that an event names, before the next listing has to bring it.
const DEFINITION_TRIES: u32 = 3;
/// What has been received when the lead is given up may take so long to be recorded.
const DRAIN_MAX: Duration = Duration::from_secs(2);
/// Between two such tries.
const DEFINITION_PAUSE: Duration = Duration::from_millis(500);

#[derive(Debug, Clone)]
pub(super) struct Follower {
    pub(super) store: Store,
    pub(super) miner: Hotkey,
    pub(super) api: Arc<dyn ValidatorApi>,
    pub(super) listings: Listings,
    pub(super) look: Arc<Notify>,
    pub(super) triggers: Triggers,
    pub(super) observe_every: Duration,
}

impl Follower {
    /// Takes events in until cancelled, and then those that the socket has received until it ended: nobody gets them once
    /// more.
    pub(super) async fn take_events(self, events: mpsc::Receiver<SocketEvent>, cancel: CancellationToken) {
        let late = async {
            cancel.cancelled().await;
            tokio::time::sleep(DRAIN_MAX).await;
        };
        tokio::select! {
            biased;
            () = self.take_all(events) => {}
            () = late => {
                tracing::warn!(validator = %self.api.hotkey(), "not all events were recorded; the next listing brings the rest");
            }
        }
        cancel.cancelled().await;
    }

    async fn take_all(&self, mut events: mpsc::Receiver<SocketEvent>) {
        while let Some(event) = events.recv().await {
            match event {
                SocketEvent::Event(event) => self.take(&event).await,
                SocketEvent::RestObservationDue => self.look.notify_one(),
                SocketEvent::Connected => tracing::info!(validator = %self.api.hotkey(), "socket connected"),
                SocketEvent::Authenticated => {
                    tracing::info!(validator = %self.api.hotkey(), "socket authenticated");
                }
                SocketEvent::AuthFailed(reason) => {
                    tracing::error!(validator = %self.api.hotkey(), reason, "the validator refused our signature");
                }
                SocketEvent::Disconnected(_) => {}
            }
        }
    }

    async fn take(&self, event: &Event) {
        let validator = self.api.hotkey();
        tracing::debug!(%validator, ?event, "event");
        let intake = intake::of_event(validator, &self.miner, event);
        if let Some((chute, version)) = &intake.fetch {
            self.record_definition(chute, version).await;
        }
        for command in intake.commands {
            self.propose(command).await;
        }
        self.triggers.of_event(validator, event, &self.store);
    }

    /// Fetches and records the definition that an event names. If that fails, a listing brings it.
    async fn record_definition(&self, chute: &ChuteId, version: &ChuteVersion) {
        for _ in 0..DEFINITION_TRIES {
            match self.api.chute(chute, version).await {
                Ok(Some(row)) => {
                    self.propose(intake::record_chute(self.api.hotkey(), &row)).await;
                    return;
                }
                // The event may be ahead of the API's other replica, or of a later version.
                Ok(None) => break,
                Err(error) if error.is_transient() => {
                    tracing::warn!(%chute, %error, "definition not read");
                    tokio::time::sleep(DEFINITION_PAUSE).await;
                }
                Err(error) => {
                    tracing::warn!(%chute, %error, "definition not read");
                    break;
                }
            }
        }
        self.look.notify_one();
    }

    /// Proposes what came from outside. It is not repeated: the next listing says it again.
    async fn propose(&self, command: Command) {
        match self.store.propose(command).await {
            Ok(_) => {}
            Err(Error::Rejected(rejection)) => tracing::debug!(%rejection, "not recorded"),
            Err(error) => {
                tracing::warn!(%error, "not recorded; the next listing brings it");
                self.look.notify_one();
            }
        }
    }

    /// Lists everything now, then periodically and whenever asked.
    pub(super) async fn look_again_and_again(self, cancel: CancellationToken) {
        loop {
            if cancel.run_until_cancelled(self.look_once()).await.is_none() {
                return;
            }
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                () = self.look.notified() => {}
                () = tokio::time::sleep(self.observe_every) => {}
            }
        }
    }

    async fn look_once(&self) {
        let observed = list(self.api.as_ref(), &self.store, &self.listings).await;
        let commands = self
            .store
            .read(|state| intake::of_observation(state, &self.miner, &observed));
        let anything = !commands.is_empty();
        for command in commands {
            match self.store.propose(command).await {
                Ok(_) => {}
                Err(Error::Rejected(rejection)) => tracing::debug!(%rejection, "not recorded"),
                Err(error) => tracing::warn!(%error, "a listing was not recorded; the next one brings it"),
            }
        }
        if anything {
            self.triggers.tick();
        }
    }
}

/// Lists everything that a validator knows of us; the listing is kept for whoever compares.
async fn list(api: &dyn ValidatorApi, store: &Store, listings: &Listings) -> Arc<Observation> {
    let observed = inventory::observe(api, store.clock().as_ref()).await;
    for (resource, why) in observed.unknown() {
        tracing::debug!(validator = %api.hotkey(), resource, why, "not listed");
    }
    listings.put(observed)
}

/// Lists again and again, and draws no conclusion.
pub(super) async fn only_list(
    api: Arc<dyn ValidatorApi>,
    store: Store,
    listings: Listings,
    every: Duration,
    cancel: CancellationToken,
) {
    let listing = async {
        loop {
            list(api.as_ref(), &store, &listings).await;
            tokio::time::sleep(every).await;
        }
    };
    cancel.run_until_cancelled(listing).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::WallClock;
    use crate::signer::key::{Key, Seed};
    use crate::signer::{LocalSigner, Sign};
    use crate::store::{BoxFuture, Log, Machine};
    use crate::validator::directory::ValidatorSettings;
    use crate::validator::http::Limits;
    use crate::validator::{Client, Directory};
    use coordinator_core::state_machine::Faults;
    use protocol::hotkey::Signer;
    use protocol::id::InstanceId;
    use tokio::time::{Instant, timeout};

    /// A log without a majority.
    #[derive(Debug)]
    struct Silent;

    impl Log for Silent {
        fn propose(&self, _: Vec<u8>) -> BoxFuture<'_, Result<Vec<u8>, Error>> {
            Box::pin(std::future::pending())
        }

        fn linearizable(&self) -> BoxFuture<'_, Result<(), Error>> {
            Box::pin(std::future::pending())
        }

        fn leads_now(&self) -> bool {
            true
        }
    }

    #[tokio::test]
    async fn an_event_that_cannot_be_recorded_holds_up_the_end_of_leading_for_a_moment_only() {
        let clock = Arc::new(WallClock);
        let store = Store::new(Machine::new(Faults::none()), Arc::new(Silent), clock.clone(), 1);
        let settings = ValidatorSettings {
            hotkey: Signer::from_seed(&[2; 32]).hotkey().to_string(),
            api: "http://127.0.0.1:9".to_owned(),
            socket: "ws://127.0.0.1:9".to_owned(),
            registry: "127.0.0.1:9".to_owned(),
        };
        let directory = Directory::check(&[settings]).expect("good settings");
        let signer: Arc<dyn Sign> = Arc::new(LocalSigner::new(Key::new(&Seed::new([1; 32])), clock.clone()));
        let api = Client::new(
            directory.iter().next().expect("one"),
            Arc::clone(&signer),
            clock,
            Limits::default(),
            Arc::new(|| true),
            fastrand::Rng::with_seed(1),
        );
        let follower = Follower {
            store,
            miner: signer.hotkey().clone(),
            api: Arc::new(api.expect("a client")),
            listings: Listings::default(),
            look: Arc::new(Notify::new()),
            triggers: Triggers::channel().0,
            observe_every: Duration::from_secs(60),
        };
        let (socket, events) = mpsc::channel(8);
        let event = Event::InstanceVerified {
            instance: InstanceId::parse("i1").expect("an id"),
        };
        socket.try_send(SocketEvent::Event(event)).expect("there is room");
        let cancel = CancellationToken::new();
        cancel.cancel();
        let began = Instant::now();
        let taken = timeout(2 * DRAIN_MAX, follower.take_events(events, cancel)).await;
        taken.expect("it ends");
        assert!(began.elapsed() >= DRAIN_MAX, "{:?}", began.elapsed());
    }
}
