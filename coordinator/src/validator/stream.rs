//! The line streams of `/miner/*/`: rows as `data: {json}` and a blank line, `data: NO_ITEMS` for an empty
//! set (`validator-protocol`, section 3.2).
//!
//! Pure: bytes in, a [`Listing`] out. An empty body cannot be told from a cut one, so it is *unknown*, and so
//! is a stream that ends in the middle of a line. Nothing may ever be deleted because of an unknown listing.

use serde::de::DeserializeOwned;

/// Longest line that is accepted, in bytes; rows carry source code and a readme.
pub const LINE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Longest stream that is accepted, in bytes.
pub const STREAM_BYTES_MAX: usize = 512 * 1024 * 1024;
/// The most rows that one listing may have.
pub const ROWS_MAX: usize = 1_000_000;

/// What a validator says of a set of things.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listing<T> {
    /// Nothing that can be relied on: an empty body, a cut stream. Keep what was known before.
    Unknown,
    /// The whole set, but for rows that could not be read.
    Known {
        /// The rows that could be read.
        rows: Vec<T>,
        /// Rows that were there and could not be read. While there are any, the absence of a thing from
        /// `rows` proves nothing.
        broken_rows: u64,
    },
}

impl<T> Listing<T> {
    /// The rows, if this is known to be the whole set: only then does absence mean absence.
    #[must_use]
    pub fn complete(&self) -> Option<&[T]> {
        match self {
            Self::Known { rows, broken_rows: 0 } => Some(rows),
            _ => None,
        }
    }

    /// The rows that could be read, complete or not.
    #[must_use]
    pub fn rows(&self) -> &[T] {
        match self {
            Self::Unknown => &[],
            Self::Known { rows, .. } => rows,
        }
    }
}

/// Why a stream is not read to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TooLarge {
    /// A line has more than [`LINE_BYTES_MAX`].
    #[error("a line has more than {LINE_BYTES_MAX} bytes")]
    Line,
    /// The stream has more than [`STREAM_BYTES_MAX`].
    #[error("the stream has more than {STREAM_BYTES_MAX} bytes")]
    Stream,
    /// There are more than [`ROWS_MAX`].
    #[error("the stream has more than {ROWS_MAX} rows")]
    Rows,
}

/// Puts a listing together from the pieces in which it arrives.
#[derive(Debug)]
pub struct Reader<T> {
    line: Vec<u8>,
    bytes: usize,
    rows: Vec<T>,
    broken_rows: u64,
    explicitly_none: bool,
}

impl<T> Default for Reader<T> {
    fn default() -> Self {
        Self {
            line: Vec::new(),
            bytes: 0,
            rows: Vec::new(),
            broken_rows: 0,
            explicitly_none: false,
        }
    }
}

impl<T: DeserializeOwned> Reader<T> {
    /// Takes the next piece of the body.
    ///
    /// # Errors
    /// [`TooLarge`]: the rest need not be read.
    pub fn push(&mut self, mut piece: &[u8]) -> Result<(), TooLarge> {
        self.bytes = self.bytes.saturating_add(piece.len());
        if self.bytes > STREAM_BYTES_MAX {
            return Err(TooLarge::Stream);
        }
        while let Some(end) = piece.iter().position(|b| *b == b'\n') {
            let (head, tail) = piece.split_at(end);
            piece = &tail[1..];
            self.extend_line(head)?;
            let line = std::mem::take(&mut self.line);
            self.take_line(&line)?;
            self.line = line;
            self.line.clear();
        }
        self.extend_line(piece)
    }

    fn extend_line(&mut self, part: &[u8]) -> Result<(), TooLarge> {
        if self.line.len() + part.len() > LINE_BYTES_MAX {
            return Err(TooLarge::Line);
        }
        self.line.extend_from_slice(part);
        Ok(())
    }

    fn take_line(&mut self, line: &[u8]) -> Result<(), TooLarge> {
        // Blank lines separate rows; other lines are comments or fields of no interest.
        let Some(data) = line.trim_ascii_end().strip_prefix(b"data: ") else {
            return Ok(());
        };
        if data == b"NO_ITEMS" {
            self.explicitly_none = true;
        } else if data.starts_with(b"{") {
            if self.rows.len() >= ROWS_MAX {
                return Err(TooLarge::Rows);
            }
            match serde_json::from_slice(data) {
                Ok(row) => self.rows.push(row),
                Err(error) => {
                    self.broken_rows += 1;
                    // The position, not the content: rows carry keys.
                    tracing::debug!(line = error.line(), column = error.column(), "unreadable row");
                }
            }
        } else {
            // Neither a row nor the marker: the set is larger than what we could read.
            self.broken_rows += 1;
        }
        Ok(())
    }

    /// The body has ended, and cleanly: the caller knows that the connection was not cut.
    #[must_use]
    pub fn finish(self) -> Listing<T> {
        let cut_in_a_line = !self.line.trim_ascii().is_empty();
        let nothing_seen = self.rows.is_empty() && self.broken_rows == 0 && !self.explicitly_none;
        // Rows and the marker together contradict each other.
        let contradiction = self.explicitly_none && !(self.rows.is_empty() && self.broken_rows == 0);
        if cut_in_a_line || nothing_seen || contradiction {
            return Listing::Unknown;
        }
        Listing::Known {
            rows: self.rows,
            broken_rows: self.broken_rows,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
    struct Row {
        id: u64,
    }

    fn read(body: &[u8], piece: usize) -> Result<Listing<Row>, TooLarge> {
        let mut reader = Reader::default();
        for chunk in body.chunks(piece.max(1)) {
            reader.push(chunk)?;
        }
        Ok(reader.finish())
    }

    fn known(ids: &[u64], broken_rows: u64) -> Listing<Row> {
        Listing::Known {
            rows: ids.iter().map(|id| Row { id: *id }).collect(),
            broken_rows,
        }
    }

    #[test]
    fn rows_markers_and_cuts_are_told_apart() {
        let rows: &[(&[u8], Listing<Row>)] = &[
            (b"data: {\"id\":1}\n\ndata: {\"id\":2}\n\n", known(&[1, 2], 0)),
            (b"data: {\"id\":1}\r\n\r\n", known(&[1], 0)),
            (b"data: {\"id\":1}\n", known(&[1], 0)),
            (b"data: NO_ITEMS\n", known(&[], 0)),
            (
                b": hello\nevent: x\ndata: {\"id\":1,\"more\":[{}]}\n\n",
                known(&[1], 0),
            ),
            (b"data: {\"id\":1}\n\ndata: {\"id\":\"two\"}\n\n", known(&[1], 1)),
            (b"data: {\"id\":18446744073709551615}\n\n", known(&[u64::MAX], 0)),
            (b"data: {\"id\":1e999}\n\ndata: {\"id\":3}\n\n", known(&[3], 1)),
            (b"data: {\"id\":\xff}\n\n", known(&[], 1)),
            (b"data: [1]\n\ndata: {\"id\":1}\n\n", known(&[1], 1)),
            // Unknown is not empty.
            (b"", Listing::Unknown),
            (b"\n\n", Listing::Unknown),
            (b"Internal Server Error", Listing::Unknown),
            (b"data: {\"id\":1}\n\ndata: {\"id\":2", Listing::Unknown),
            (b"data: {\"id\":1}\n\ndata: {\"id\":2}", Listing::Unknown),
            (b"data: NO_ITEMS", Listing::Unknown),
            (b"data: {\"id\":1}\n\ndata: NO_ITEMS\n", Listing::Unknown),
            (b"data: NO_ITEMSX\n", known(&[], 1)),
        ];
        for (body, expected) in rows {
            for piece in [1, 2, 7, usize::MAX] {
                let shown = String::from_utf8_lossy(body);
                assert_eq!(
                    read(body, piece).as_ref(),
                    Ok(expected),
                    "{shown} in pieces of {piece}"
                );
            }
        }
    }

    #[test]
    fn absence_counts_only_in_complete_listings() {
        assert_eq!(known(&[], 0).complete(), Some(&[][..]));
        assert_eq!(known(&[1], 1).complete(), None);
        assert_eq!(known(&[1], 1).rows().len(), 1);
        assert_eq!(Listing::<Row>::Unknown.complete(), None);
    }

    #[test]
    fn every_cut_of_a_stream_is_unknown_or_whole_rows() {
        let body = b"data: {\"id\":1}\n\ndata: {\"id\":2}\n\n";
        for end in 0..=body.len() {
            match read(&body[..end], 3).expect("short") {
                Listing::Unknown => {}
                Listing::Known { rows, broken_rows } => {
                    assert_eq!(broken_rows, 0);
                    assert!(body[..end].ends_with(b"\n"), "cut at {end}");
                    assert!((1..=2).contains(&rows.len()));
                }
            }
        }
    }

    #[test]
    fn lines_have_a_limit() {
        let mut line = b"data: {\"id\":1,\"code\":\"".to_vec();
        line.resize(LINE_BYTES_MAX - 2, b'x');
        line.extend_from_slice(b"\"}\n");
        assert_eq!(read(&line, 1 << 16), Ok(known(&[1], 0)), "as long as allowed");
        let endless = vec![b'x'; LINE_BYTES_MAX + 1];
        assert_eq!(read(&endless, 1 << 16), Err(TooLarge::Line));
    }
}
