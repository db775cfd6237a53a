//! The state at each log index, as a sum over its rows: every member that comes to an index must have the same.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};

use replica::RowChange;

/// A row's table and key.
type Name = (u8, Vec<u8>);

/// The rows of one member's state, and their sum.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Rows {
    rows: BTreeMap<Name, Vec<u8>>,
    sum: u64,
}

fn weight(name: &Name, value: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (name, value).hash(&mut hasher);
    hasher.finish()
}

impl Rows {
    pub(super) fn put(&mut self, name: Name, value: Vec<u8>) {
        self.sum = self.sum.wrapping_add(weight(&name, &value));
        if let Some(before) = self.rows.insert(name.clone(), value) {
            self.sum = self.sum.wrapping_sub(weight(&name, &before));
        }
    }

    pub(super) fn change(&mut self, changed: &[RowChange]) {
        for row in changed {
            let name = (row.table, row.key.clone());
            if let Some(value) = &row.value {
                self.put(name, value.clone());
            } else if let Some(before) = self.rows.remove(&name) {
                self.sum = self.sum.wrapping_sub(weight(&name, &before));
            }
        }
    }

    /// Table, key and value of each, ascending.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u8, Vec<u8>, Vec<u8>)> + '_ {
        let rows = self.rows.iter();
        rows.map(|((table, key), value)| (*table, key.clone(), value.clone()))
    }

    pub(super) fn sum(&self) -> u64 {
        self.sum
    }
}

/// What all members found so far; clones are the same one.
#[derive(Debug, Clone, Default)]
pub(super) struct Ledger(Arc<Mutex<BTreeMap<u64, (u64, u64)>>>);

impl Ledger {
    /// A member has come to this index; in words what another one found there, if that differs.
    pub(super) fn reached(&self, member: u64, index: u64, rows: &Rows) -> Option<String> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (first, sum) = *known.entry(index).or_insert((member, rows.sum()));
        (sum != rows.sum())
            .then(|| format!("11: at index {index} member {member} has another state than member {first}"))
    }
}
