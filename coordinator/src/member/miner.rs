//! A member whose seed is not that of the cluster's miner: the hotkey was replaced, and this host has not got the new
//! seed yet, or has it already while the others have not asked for the change.
//!
//! It votes and keeps the log, so that hosts may be changed over one after the other. It does nothing in the miner's
//! name: it hands the lead to a member with the right seed, and its hosts go to such a one, since it cannot open what
//! the state holds for them.

use std::time::Duration;

use protocol::hotkey::Hotkey;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::member_link::Asking;
use crate::store::Store;

/// Between two looks at the clock.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Between two tries to hand over the lead.
const HAND_OVER_AGAIN: Duration = Duration::from_secs(1);

/// Returns once the cluster belongs to another miner than `own`.
pub(super) async fn replaced(store: &Store, own: &Hotkey) {
    let mut changes = store.changes();
    while store.other_miner(own).is_none() {
        changes.changed().await;
    }
}

/// Looks whether this member's seed is the right one.
#[derive(Debug)]
pub(super) struct Watch {
    /// Whose seed it is.
    pub(super) own: Hotkey,
    /// Whose it should be.
    pub(super) store: Store,
    /// Who else could lead.
    pub(super) asking: Asking,
}

impl Watch {
    /// Keeps `serving` right until cancelled: hosts are served while this member is in touch with a leader and has the
    /// right seed, and the right time or nobody else has it.
    pub(super) async fn keep(
        self,
        in_touch: watch::Receiver<bool>,
        serving: watch::Sender<bool>,
        cancel: CancellationToken,
    ) {
        let both = async {
            tokio::join!(tell(&self.store, &self.own, in_touch, serving), self.give_way());
        };
        cancel.run_until_cancelled(both).await;
    }

    async fn give_way(&self) {
        let mut changes = self.store.changes();
        let mut said = false;
        loop {
            let Some(miner) = self.store.other_miner(&self.own) else {
                said = false;
                changes.changed().await;
                continue;
            };
            if !std::mem::replace(&mut said, true) {
                tracing::error!(
                    %miner, own = %self.own,
                    "the cluster belongs to another miner than this host's seed: put that one's seed in place, set \
                     miner.hotkey, and restart the agent; until then this member only votes"
                );
            }
            if self.asking.replica.leads_now() {
                self.hand_over(&miner).await;
            }
            tokio::time::sleep(HAND_OVER_AGAIN).await;
        }
    }

    async fn hand_over(&self, miner: &Hotkey) {
        let voters = self.asking.replica.membership().voters;
        let hotkeys = self.asking.hotkeys().await;
        let able = |(member, hotkey): &(u64, Option<Hotkey>)| {
            voters.contains_key(member) && hotkey.as_ref() == Some(miner)
        };
        let Some((member, _)) = hotkeys.into_iter().find(able) else {
            return;
        };
        match self.asking.replica.transfer(Some(member)).await {
            Ok(()) => tracing::info!(member, "the lead goes to a member with the miner's seed"),
            Err(error) => tracing::info!(member, %error, "the lead was not handed over; it is tried again"),
        }
    }
}

/// Keeps `serving` right: in touch with a leader, the seed is the miner's, and no other
/// member signs with a better time.
async fn tell(
    store: &Store,
    own: &Hotkey,
    mut in_touch: watch::Receiver<bool>,
    serving: watch::Sender<bool>,
) {
    let mut changes = store.changes();
    loop {
        let is_able = store.other_miner(own).is_none() && store.clock().better().is_empty();
        let now = *in_touch.borrow_and_update() && is_able;
        serving.send_if_modified(|before| std::mem::replace(before, now) != now);
        tokio::select! {
            changed = in_touch.changed() => if changed.is_err() { return },
            () = changes.changed() => {}
            // Clocks are compared without a change of the state.
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use coordinator_core::state_machine::Command;
    use coordinator_core::state_machine::command::PayProfile;
    use protocol::hotkey::Signer;
    use protocol::time::UnixMillis;

    use super::*;
    use crate::clock::{AgreedClock, ManualClock};

    const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

    #[tokio::test]
    async fn hosts_are_served_in_touch_and_with_the_right_seed_and_time_only() {
        let machine = ManualClock::at(NOW);
        let clock = AgreedClock::new(1, Arc::new(machine.clone()));
        clock.set(NOW, []);
        let store = Store::in_memory(Arc::new(clock.clone()));
        let (own, other) = ([1; 32], [2; 32]);
        let hotkey = |seed| Signer::from_seed(seed).hotkey().clone();
        let (touch, in_touch) = watch::channel(true);
        let (serving, mut served) = watch::channel(true);
        let (told_by, own) = (store.clone(), hotkey(&own));
        tokio::spawn(async move { tell(&told_by, &own, in_touch, serving).await });
        let mut becomes = async |wanted: bool| {
            let waited = served.wait_for(|served| *served == wanted);
            let waited = tokio::time::timeout(Duration::from_secs(30), waited).await;
            waited.expect("in time").expect("it is told on");
        };
        touch.send_replace(false);
        becomes(false).await;
        touch.send_replace(true);
        becomes(true).await;
        machine.set(NOW + 3_600_000);
        clock.set(NOW, [(2, NOW)]);
        becomes(false).await;
        // The hosts have nowhere else to go.
        clock.set(NOW, []);
        becomes(true).await;
        machine.set(NOW);
        let configure = Command::Configure {
            miner: hotkey(&other),
            validators: BTreeSet::new(),
            pay_profile: PayProfile::Of2026,
        };
        store.propose(configure).await.expect("it is the first");
        becomes(false).await;
    }
}
