//! Answers to requests, in little room: a flood of writes leaves half a million of them. In memory as on the disk many
//! stand in one piece, and a piece is written as a whole: a row for each would cost more than all else that a write does.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use protocol::time::UnixMillis;
use serde::{Deserialize, Serialize};

use self::ages::Ages;
use super::command::{Answer, Reply, RequestId};

mod ages;
mod stored;

/// What a request was answered with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answered {
    /// When.
    pub at: UnixMillis,
    /// How.
    pub answer: Answer,
}

/// Rows of a piece at most.
const ROWS_MAX: usize = 128;
/// A piece grows by so many rows, not to twice its size.
const ROWS_MORE: usize = 16;

/// Nearly all answers are one of two words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    Done,
    Unchanged,
    /// It is in [`Rows::others`].
    Other,
}

/// 25 bytes, since bytes leave no gaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Row {
    request: [u8; 16],
    at: [u8; 8],
    word: Word,
}

impl Row {
    fn request(&self) -> RequestId {
        RequestId(u128::from_be_bytes(self.request))
    }

    fn at(&self) -> UnixMillis {
        UnixMillis(u64::from_be_bytes(self.at))
    }
}

/// Rows in the order of their requests, in pieces: a map of single rows takes three times the room.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rows {
    /// None is empty. All rows of a piece are at or behind its key, and before the next one's.
    pieces: BTreeMap<RequestId, Vec<Row>>,
    others: BTreeMap<RequestId, Answer>,
    len: usize,
    /// Keys of pieces that are no longer what the disk has, or are gone.
    changed: BTreeSet<RequestId>,
}

impl Rows {
    fn get(&self, request: RequestId) -> Option<Answered> {
        let (_, piece) = self.pieces.range(..=request).next_back()?;
        let row = piece.get(place(piece, request).ok()?)?;
        let answer = match row.word {
            Word::Done => Ok(Reply::Done),
            Word::Unchanged => Ok(Reply::Unchanged),
            Word::Other => self.others.get(&request)?.clone(),
        };
        Some(Answered { at: row.at(), answer })
    }

    /// Puts a row in place, of which there is none yet.
    fn put(&mut self, request: RequestId, answered: Answered) {
        let word = match answered.answer {
            Ok(Reply::Done) => Word::Done,
            Ok(Reply::Unchanged) => Word::Unchanged,
            other => {
                self.others.insert(request, other);
                Word::Other
            }
        };
        let row = Row {
            request: request.0.to_be_bytes(),
            at: answered.at.0.to_be_bytes(),
            word,
        };
        self.len += 1;
        let Some((first, piece)) = self.pieces.range_mut(..=request).next_back() else {
            self.begin(request, vec![row]);
            return;
        };
        let place = place(piece, request).unwrap_or_else(|place| place);
        if piece.len() < ROWS_MAX {
            if piece.len() == piece.capacity() {
                piece.reserve_exact(ROWS_MORE);
            }
            piece.insert(place, row);
            self.changed.insert(*first);
            return;
        }
        // Behind all others it begins a new piece: what comes in order fills the pieces.
        if place == ROWS_MAX {
            self.begin(request, vec![row]);
            return;
        }
        self.changed.insert(*first);
        let mut behind = piece.split_off(ROWS_MAX / 2);
        piece.shrink_to(ROWS_MAX / 2 + ROWS_MORE);
        match place.checked_sub(piece.len()) {
            Some(place) => behind.insert(place, row),
            None => piece.insert(place, row),
        }
        if let Some(first) = behind.first().map(Row::request) {
            self.begin(first, behind);
        }
    }

    fn begin(&mut self, first: RequestId, piece: Vec<Row>) {
        self.changed.insert(first);
        self.pieces.insert(first, piece);
    }

    fn remove(&mut self, request: RequestId) {
        let Some((first, piece)) = self.pieces.range_mut(..=request).next_back() else {
            return;
        };
        let Ok(place) = place(piece, request) else {
            return;
        };
        if piece.remove(place).word == Word::Other {
            self.others.remove(&request);
        }
        let first = *first;
        self.changed.insert(first);
        if piece.is_empty() {
            self.pieces.remove(&first);
        }
        self.len -= 1;
    }

    /// When requests were answered, of those in this range.
    pub(crate) fn times(
        &self,
        range: RangeInclusive<RequestId>,
    ) -> impl Iterator<Item = (UnixMillis, RequestId)> {
        let (start, end) = range.into_inner();
        let piece = self.pieces.range(..=start).next_back();
        let first = piece.map_or(start, |(first, _)| *first);
        let pieces = self.pieces.range(first..=end).flat_map(|(_, piece)| piece);
        pieces
            .map(|row| (row.at(), row.request()))
            .filter(move |(_, request)| (start..=end).contains(request))
    }

    fn all(&self) -> impl Iterator<Item = &Row> {
        self.pieces.values().flatten()
    }

    fn are_in_order(&self) -> bool {
        let requests = || self.all().map(|row| row.request);
        let mut pieces = self.pieces.iter();
        self.len == self.all().count()
            && requests().zip(requests().skip(1)).all(|(one, next)| one < next)
            && pieces.all(|(first, piece)| piece.first().is_some_and(|row| *first <= row.request()))
    }
}

fn place(piece: &[Row], request: RequestId) -> Result<usize, usize> {
    let request = request.0.to_be_bytes();
    piece.binary_search_by(|row| row.request.cmp(&request))
}

/// Equal when the same is known, in whatever pieces.
impl PartialEq for Rows {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && self.others == other.others && self.all().eq(other.all())
    }
}

/// Answers by request. Like a [`super::table::Table`], it remembers what changed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Answers {
    rows: Rows,
    ages: Ages,
}

impl Answers {
    pub(crate) fn get(&self, request: RequestId) -> Option<Answered> {
        self.rows.get(request)
    }

    pub(crate) fn len(&self) -> usize {
        self.rows.len
    }

    /// Adds the answer to a request that has none yet.
    pub(crate) fn insert(&mut self, request: RequestId, answered: Answered) {
        self.ages.insert(answered.at, request);
        self.rows.put(request, answered);
    }

    /// Forgets the oldest answer, if it was given `age_ms` ago or earlier; says whether it was.
    pub(crate) fn forget_oldest(&mut self, now: UnixMillis, age_ms: u64) -> bool {
        let oldest = self.ages.first(&self.rows);
        let Some((_, request)) = oldest.filter(|(at, _)| now.since(*at) >= age_ms) else {
            return false;
        };
        self.ages.pop_first();
        self.rows.remove(request);
        true
    }

    /// True if the rows are in order, and what is derived from them is what they say.
    pub(crate) fn are_consistent(&self) -> bool {
        self.ages.are_of(&self.rows) && self.rows.are_in_order()
    }
}

/// Equal when the same is known, however much of it is in order already.
impl PartialEq for Answers {
    fn eq(&self, other: &Self) -> bool {
        self.rows == other.rows
    }
}

impl Eq for Answers {}
