//! Event streams: lines `data: {json}`, in any pieces.

use anyhow::{Context, Result, bail};
use futures_util::StreamExt;
use reqwest::Response;
use serde_json::Value;

/// The longest line that is accepted, in bytes.
const LINE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// The frames of an answer, one by one.
pub(crate) struct Frames {
    pieces: std::pin::Pin<Box<dyn futures_util::Stream<Item = reqwest::Result<Vec<u8>>> + Send>>,
    buffer: Vec<u8>,
}

impl Frames {
    pub(crate) fn new(response: Response) -> Self {
        let pieces = response
            .bytes_stream()
            .map(|piece| piece.map(|bytes| bytes.to_vec()));
        Self {
            pieces: Box::pin(pieces),
            buffer: Vec::new(),
        }
    }

    /// The next frame; none at the end of the stream. Lines that are no data are passed over.
    pub(crate) async fn next(&mut self) -> Result<Option<Value>> {
        loop {
            while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                if let Some(frame) = parse(&line) {
                    return Ok(Some(frame));
                }
            }
            if self.buffer.len() > LINE_BYTES_MAX {
                bail!("a line of the stream is longer than {LINE_BYTES_MAX} bytes");
            }
            match self.pieces.next().await {
                Some(piece) => {
                    let piece = piece.map_err(reqwest::Error::without_url);
                    self.buffer.extend(piece.context("the stream was cut off")?);
                }
                None => return Ok(parse(&std::mem::take(&mut self.buffer))),
            }
        }
    }
}

fn parse(line: &[u8]) -> Option<Value> {
    let data = line.trim_ascii().strip_prefix(b"data:")?;
    serde_json::from_slice(data.trim_ascii()).ok()
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn only_data_lines_are_frames() {
        for (line, is_frame) in [
            ("data: {\"a\":1}\n", true),
            ("data:{\"a\":1}\r\n", true),
            ("data: {\"a\":\n", false),
            (": keep-alive\n", false),
            ("\n", false),
        ] {
            assert_eq!(parse(line.as_bytes()).is_some(), is_frame, "{line:?}");
        }
    }
}
