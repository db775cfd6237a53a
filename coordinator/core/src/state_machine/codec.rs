//! Versioned bytes of proposals, answers and rows.
//!
//! Every stored value begins with the number of its form, so that old forms can be read for ever; golden
//! bytes of each form stay in the tests. The body is postcard: positional, so a changed struct is a new
//! form. A command that a member cannot read must stop it rather than let it diverge.

use protocol::id::{DeploymentId, GpuId, InstanceId, JobId, ServerId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::chute::{ChuteKey, VersionKey};
use super::command::{Answer, Proposal};
use super::effect::{Effect, EffectId};
use super::format::{Finalized, NEWEST, PROGRAM};
use super::host::InviteId;
use super::state::{Faults, State};

/// The forms of a stored value. New forms go to the end and keep the old ones readable.
#[derive(Debug, Serialize, Deserialize)]
enum Stored<T> {
    V1(T),
}

/// Why stored bytes cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// One value.
    #[error("cannot read a stored {what}: it is damaged or was written by a newer version")]
    Value {
        /// What it should be.
        what: &'static str,
    },
    /// All of it: the upgrade to a newer program was finalized.
    #[error(
        "the data has format {}, finalized with version {} of this program; this is version {PROGRAM}, which reads up \
         to format {NEWEST}. The way out: start version {} or a newer one; or begin in an empty folder with a snapshot \
         that was taken before the upgrade was finalized",
        .0.format, .0.program, .0.program
    )]
    TooNew(Finalized),
}

/// A row to be written or, without a value, to be deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Which table.
    pub table: u8,
    /// Its key.
    pub key: Vec<u8>,
    /// Its value; none deletes it.
    pub value: Option<Vec<u8>>,
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_stdvec(&Stored::V1(value)).expect("plain data always encodes")
}

fn decode<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, Unreadable> {
    match postcard::take_from_bytes::<Stored<T>>(bytes) {
        Ok((Stored::V1(value), [])) => Ok(value),
        _ => Err(Unreadable::Value { what }),
    }
}

/// Bytes of a proposal, for the log.
#[must_use]
pub fn encode_proposal(proposal: &Proposal) -> Vec<u8> {
    // Most fit, so that the buffer does not grow step by step.
    let buffer = Vec::with_capacity(512);
    postcard::to_extend(&Stored::V1(proposal), buffer).expect("plain data always encodes")
}

/// A proposal from the log.
///
/// # Errors
/// [`Unreadable`].
pub fn decode_proposal(bytes: &[u8]) -> Result<Proposal, Unreadable> {
    decode("proposal", bytes)
}

/// Bytes of an answer, for the proposer.
#[must_use]
pub fn encode_answer(answer: &Answer) -> Vec<u8> {
    encode(answer)
}

/// An answer from a member.
///
/// # Errors
/// [`Unreadable`].
pub fn decode_answer(bytes: &[u8]) -> Result<Answer, Unreadable> {
    decode("answer", bytes)
}

/// Calls `$each!(number, field, key type)` for every table; the one list of tables.
macro_rules! tables {
    ($each:ident) => {
        // First of all, see the room of formats.
        $each!(0, format, u8);
        $each!(2, servers, ServerId);
        $each!(3, gpus, GpuId);
        $each!(4, chutes, ChuteKey);
        $each!(5, codes, VersionKey);
        $each!(6, bounties, ChuteKey);
        $each!(7, jobs, JobId);
        $each!(8, deployments, DeploymentId);
        $each!(9, audits, DeploymentId);
        $each!(10, strangers, InstanceId);
        $each!(13, guards, [u8; 32]);
        $each!(14, hosts, ServerId);
        $each!(15, invites, InviteId);
        $each!(16, cluster, u8);
        $each!(17, given_up, u64);
        $each!(18, rotation, u8);
        $each!(19, trusted, ServerId);
        $each!(20, observing, u8);
        $each!(21, workers, ServerId);
    };
}

/// The word for a table, by its number.
#[must_use]
pub fn table_name(table: u8) -> &'static str {
    macro_rules! name {
        ($number:literal, $field:ident, $key:ty) => {
            if table == $number {
                return stringify!($field);
            }
        };
    }
    tables!(name);
    match table {
        SETTINGS => "settings",
        OUTBOX => "outbox",
        ANSWERS => "answers",
        _ => "unknown",
    }
}

const SETTINGS: u8 = 1;
const OUTBOX: u8 = 11;
const ANSWERS: u8 = 12;

fn drain<K: Serialize, V: Serialize>(
    table: u8,
    changed: impl Iterator<Item = (K, Option<V>)>,
    rows: &mut Vec<Row>,
) {
    rows.extend(changed.map(|(key, row)| Row {
        table,
        key: encode(&key),
        value: row.as_ref().map(encode),
    }));
}

impl State {
    /// The rows that changed since the last call, in a fixed order.
    pub fn drain_rows(&mut self) -> Vec<Row> {
        let mut rows = Vec::new();
        if std::mem::take(&mut self.settings_changed) {
            rows.push(Row {
                table: SETTINGS,
                key: Vec::new(),
                value: Some(encode(&self.settings)),
            });
        }
        macro_rules! drain_table {
            ($number:literal, $field:ident, $key:ty) => {
                drain($number, self.$field.drain_changed(), &mut rows);
            };
        }
        tables!(drain_table);
        drain(OUTBOX, self.outbox.pending.drain_changed(), &mut rows);
        rows.extend(self.answers.drain_changed().map(|(first, value)| Row {
            table: ANSWERS,
            key: encode(&first),
            value,
        }));
        rows
    }

    /// True if [`State::drain_rows`] would return any row.
    pub(crate) fn has_changes(&mut self) -> bool {
        !self.drain_rows().is_empty()
    }

    pub(crate) fn clear_changes(&mut self) {
        let _ = self.drain_rows();
    }

    /// A state from all its rows.
    ///
    /// # Errors
    /// [`Unreadable`] when a row is damaged or was written by a newer version.
    pub fn from_rows(
        rows: &mut dyn Iterator<Item = (u8, Vec<u8>, Vec<u8>)>,
        faults: Faults,
    ) -> Result<Self, Unreadable> {
        let mut state = Self::new(faults);
        for (table, key, value) in rows {
            state.restore_row(table, &key, &value)?;
            if let Some(finalized) = state.too_new() {
                return Err(Unreadable::TooNew(finalized.clone()));
            }
        }
        state.rebuild_index();
        Ok(state)
    }

    /// What was finalized, if this program is too old for it: it must not go on.
    #[must_use]
    pub fn too_new(&self) -> Option<&Finalized> {
        self.finalized().filter(|finalized| finalized.format > NEWEST)
    }

    fn restore_row(&mut self, table: u8, key: &[u8], value: &[u8]) -> Result<(), Unreadable> {
        macro_rules! restore_table {
            ($number:literal, $field:ident, $key:ty) => {
                if table == $number {
                    let key: $key = decode(stringify!($field), key)?;
                    self.$field.restore(key, decode(stringify!($field), value)?);
                    return Ok(());
                }
            };
        }
        tables!(restore_table);
        match table {
            SETTINGS => self.settings = decode("settings", value)?,
            OUTBOX => {
                let _: EffectId = decode("outbox", key)?;
                self.outbox.restore(decode::<Effect>("outbox", value)?);
            }
            ANSWERS => {
                let restored = self.answers.restore(decode("answers", key)?, value);
                restored.ok_or(Unreadable::Value { what: "answers" })?;
            }
            _ => {
                return Err(Unreadable::Value {
                    what: "row of an unknown table",
                });
            }
        }
        Ok(())
    }
}
