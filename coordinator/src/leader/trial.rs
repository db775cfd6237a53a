//! What this leader would do if the cluster did not observe: the core's trial, with what was read from validators last.

use std::sync::Arc;

use coordinator_core::state_machine::State;
use coordinator_core::state_machine::adoption::Adoption;
use coordinator_core::trial::{Listed, Means, Trial, trial};
use protocol::hotkey::Hotkey;
use protocol::time::UnixMillis;
use tokio::time::Instant;

use super::schedule::{Scheduling, market_of};
use crate::validator::intake;
use crate::validator::inventory::Observation;

/// The last look at a validator; none before the first.
pub type Look = (Hotkey, Option<Arc<Observation>>);

impl Scheduling {
    /// What would be done with this state, with servers that count as taken over, and these looks at the validators.
    #[must_use]
    pub fn trial(
        &self,
        state: &State,
        at: UnixMillis,
        miner: &Hotkey,
        adoptions: Vec<Adoption>,
        looks: &[Look],
    ) -> Trial {
        let read: Vec<_> = looks.iter().filter_map(|(_, look)| look.clone()).collect();
        let market = market_of(&read);
        let take_in: Vec<_> = looks
            .iter()
            .map(|(_, look)| {
                move |state: &State| {
                    look.as_ref()
                        .map(|look| intake::of_observation(state, miner, look))
                        .unwrap_or_default()
                }
            })
            .collect();
        let listed = looks.iter().zip(&take_in);
        let listed = listed.map(|((validator, look), commands)| Listed {
            validator: validator.clone(),
            observation: look.as_ref().map(|look| intake::core_observation(look)),
            commands,
        });
        let began = Instant::now();
        let means = Means {
            at,
            adoptions,
            listed: listed.collect(),
            market: &market,
            strategy: self.strategy(),
            clock_ms: &|| u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        };
        trial(state, means)
    }
}
