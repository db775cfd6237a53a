//! An ordered table that remembers which of its rows changed, so that a member writes only those.

use std::collections::{BTreeMap, BTreeSet};

/// Rows by key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table<K, V> {
    rows: BTreeMap<K, V>,
    changed: BTreeSet<K>,
}

impl<K: Ord + Clone, V> Default for Table<K, V> {
    fn default() -> Self {
        Self {
            rows: BTreeMap::new(),
            changed: BTreeSet::new(),
        }
    }
}

impl<K: Ord + Clone, V> Table<K, V> {
    /// The row, if there is one.
    #[must_use]
    pub fn get(&self, key: &K) -> Option<&V> {
        self.rows.get(key)
    }

    /// The row to be changed; it counts as changed from here on.
    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        let row = self.rows.get_mut(key)?;
        self.changed.insert(key.clone());
        Some(row)
    }

    /// Puts a row in place, whatever was there.
    pub fn insert(&mut self, key: K, row: V) {
        self.changed.insert(key.clone());
        self.rows.insert(key, row);
    }

    /// Takes a row out.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        let row = self.rows.remove(key)?;
        self.changed.insert(key.clone());
        Some(row)
    }

    /// True if there is such a row.
    #[must_use]
    pub fn contains_key(&self, key: &K) -> bool {
        self.rows.contains_key(key)
    }

    /// All rows in key order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&K, &V)> {
        self.rows.iter()
    }

    /// All rows' values in key order.
    pub fn values(&self) -> impl DoubleEndedIterator<Item = &V> {
        self.rows.values()
    }

    /// All keys in order.
    pub fn keys(&self) -> impl DoubleEndedIterator<Item = &K> {
        self.rows.keys()
    }

    /// Rows from `first` on.
    pub fn range_from(&self, first: &K) -> impl Iterator<Item = (&K, &V)> {
        self.rows.range(first..)
    }

    /// How many rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// True if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The rows that changed since the last call: `None` for those that are gone.
    pub fn drain_changed(&mut self) -> impl Iterator<Item = (K, Option<&V>)> {
        let rows = &self.rows;
        std::mem::take(&mut self.changed).into_iter().map(move |key| {
            let row = rows.get(&key);
            (key, row)
        })
    }

    /// Puts a row that was read from disk in place; it does not count as changed.
    pub(crate) fn restore(&mut self, key: K, row: V) {
        self.rows.insert(key, row);
    }
}
