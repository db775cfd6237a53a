//! Pieces of answers as they are stored, each under its key.
//!
//! Form 1 is one answer under the name of its request. Form 2 is a piece: the answers that are neither of the two common
//! words, by request, in postcard, and then 25 bytes for each row: request and time, the highest byte first, and the word.

use std::collections::BTreeMap;

use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};

use super::{Answered, Answers, Row, Rows, Word};
use crate::state_machine::command::{Answer, RequestId};

/// A stored value, or how one of form 2 begins.
#[derive(Debug, Serialize, Deserialize)]
enum Stored {
    V1(Answered),
    V2(BTreeMap<RequestId, Answer>),
}

const ROW_BYTES: usize = 25;
const WORDS: [Word; 3] = [Word::Done, Word::Unchanged, Word::Other];

impl Row {
    fn stored(&self) -> [u8; ROW_BYTES] {
        let mut bytes = [0; ROW_BYTES];
        bytes[..16].copy_from_slice(&self.request);
        bytes[16..24].copy_from_slice(&self.at);
        bytes[24] = self.word as u8;
        bytes
    }

    fn read(bytes: &[u8; ROW_BYTES]) -> Option<Self> {
        let (request, rest) = bytes.split_first_chunk()?;
        let (at, rest) = rest.split_first_chunk()?;
        let word = *WORDS.get(usize::from(*rest.first()?))?;
        Some(Self {
            request: *request,
            at: *at,
            word,
        })
    }
}

impl Rows {
    fn encode(&self, piece: &[Row]) -> Vec<u8> {
        let others = piece.iter().filter(|row| row.word == Word::Other);
        let others = others.filter_map(|row| Some((row.request(), self.others.get(&row.request())?.clone())));
        let buffer = Vec::with_capacity(2 + piece.len() * ROW_BYTES);
        let stored = Stored::V2(others.collect());
        let mut bytes = postcard::to_extend(&stored, buffer).expect("plain data always encodes");
        bytes.extend(piece.iter().flat_map(Row::stored));
        bytes
    }

    /// True if a piece fits in between those that are there.
    fn has_room_for(&self, first: RequestId, piece: &[Row]) -> bool {
        let before = self.pieces.range(..first).next_back();
        let before = before.and_then(|(_, rows)| rows.last());
        let next = self.pieces.range(first..).next();
        before.is_none_or(|row| row.request() < first)
            && piece
                .last()
                .is_some_and(|row| next.is_none_or(|(next, _)| row.request() < *next))
            && piece.first().is_some_and(|row| first <= row.request())
            && piece.is_sorted_by(|row, next| row.request < next.request)
    }
}

impl Answers {
    /// The pieces that changed since the last call, by their keys, in their stored form: `None` for those that are gone.
    pub(crate) fn drain_changed(&mut self) -> impl Iterator<Item = (RequestId, Option<Vec<u8>>)> {
        let changed = std::mem::take(&mut self.rows.changed);
        changed.into_iter().map(|first| {
            let piece = self.rows.pieces.get(&first);
            (first, piece.map(|piece| self.rows.encode(piece)))
        })
    }

    /// Adds what was read from disk; `None` if it makes no sense. It does not count as changed, unless it is of form 1:
    /// that goes, and its piece is written.
    pub(crate) fn restore(&mut self, key: RequestId, value: &[u8]) -> Option<()> {
        let (stored, rest) = postcard::take_from_bytes(value).ok()?;
        let others: BTreeMap<RequestId, Answer> = match stored {
            Stored::V1(answered) => {
                self.rows.changed.insert(key);
                self.insert(key, answered);
                return rest.is_empty().then_some(());
            }
            Stored::V2(others) => others,
        };
        let (rows, []) = rest.as_chunks() else {
            return None;
        };
        let piece: Vec<Row> = rows.iter().map(Row::read).collect::<Option<_>>()?;
        let named = piece
            .iter()
            .filter(|row| row.word == Word::Other)
            .map(Row::request);
        if !self.rows.has_room_for(key, &piece) || !named.eq(others.keys().copied()) {
            return None;
        }
        for row in &piece {
            self.ages
                .insert(UnixMillis(u64::from_be_bytes(row.at)), row.request());
        }
        self.rows.len += piece.len();
        self.rows.others.extend(others);
        self.rows.pieces.insert(key, piece);
        Some(())
    }
}
