//! The effects that wait to be done, and which of them may be done now.

use std::collections::{BTreeMap, BTreeSet};

use super::effect::{Effect, EffectId, Subject};
use super::table::Table;

/// Pending effects. The order of a subject is the order of the ids.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outbox {
    pub(crate) pending: Table<EffectId, Effect>,
    by_subject: BTreeMap<Subject, BTreeSet<EffectId>>,
}

impl Outbox {
    /// Adds an effect behind those of its subject.
    pub(crate) fn push(&mut self, effect: Effect) {
        self.by_subject
            .entry(effect.subject.clone())
            .or_default()
            .insert(effect.id);
        self.pending.insert(effect.id, effect);
    }

    /// Puts an effect that was read from disk in place. Rows come in the order of their bytes, which is not that of ids.
    pub(crate) fn restore(&mut self, effect: Effect) {
        self.by_subject
            .entry(effect.subject.clone())
            .or_default()
            .insert(effect.id);
        self.pending.restore(effect.id, effect);
    }

    /// Takes an effect out.
    pub(crate) fn remove(&mut self, id: EffectId) -> Option<Effect> {
        let effect = self.pending.remove(&id)?;
        if let Some(ids) = self.by_subject.get_mut(&effect.subject) {
            ids.remove(&id);
            if ids.is_empty() {
                self.by_subject.remove(&effect.subject);
            }
        }
        Some(effect)
    }

    /// The effect, if it is pending.
    #[must_use]
    pub fn get(&self, id: EffectId) -> Option<&Effect> {
        self.pending.get(&id)
    }

    /// All pending effects in order of their ids.
    pub fn iter(&self) -> impl Iterator<Item = &Effect> {
        self.pending.values()
    }

    /// Pending effects of one subject, oldest first.
    pub fn of_subject(&self, subject: &Subject) -> impl Iterator<Item = &Effect> {
        self.by_subject
            .get(subject)
            .into_iter()
            .flatten()
            .filter_map(|id| self.pending.get(id))
    }

    /// Those that may be done now: the oldest of each subject.
    pub fn ready(&self) -> impl Iterator<Item = &Effect> {
        self.by_subject
            .values()
            .filter_map(|ids| ids.first())
            .filter_map(|id| self.pending.get(id))
    }

    /// True if no older effect of its subject is pending.
    #[must_use]
    pub fn is_ready(&self, effect: &Effect) -> bool {
        self.by_subject.get(&effect.subject).and_then(|ids| ids.first()) == Some(&effect.id)
    }

    /// How many wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pending.len()
    }

    /// True if none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }
}
