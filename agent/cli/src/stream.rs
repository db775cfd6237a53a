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

    /// The next frame that is JSON; none at the end of the stream.
    pub(crate) async fn next(&mut self) -> Result<Option<Value>> {
        while let Some(data) = self.next_data().await? {
            if let Ok(frame) = serde_json::from_str(&data) {
                return Ok(Some(frame));
            }
        }
        Ok(None)
    }

    /// The next data as they are; none at the end of the stream. Other lines are passed over.
    pub(crate) async fn next_data(&mut self) -> Result<Option<String>> {
        loop {
            while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                if let Some(data) = data_of(&line) {
                    return Ok(Some(data));
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
                None => return Ok(data_of(&std::mem::take(&mut self.buffer))),
            }
        }
    }
}

fn data_of(line: &[u8]) -> Option<String> {
    let data = line.trim_ascii().strip_prefix(b"data:")?;
    Some(String::from_utf8_lossy(data.trim_ascii()).into_owned())
}

#[cfg(test)]
mod tests {
    use super::data_of;

    #[test]
    fn only_data_lines_count() {
        for (line, data) in [
            ("data: {\"a\":1}\n", Some("{\"a\":1}")),
            ("data:{\"a\":1}\r\n", Some("{\"a\":1}")),
            ("data: .\n", Some(".")),
            (": keep-alive\n", None),
            ("\n", None),
        ] {
            assert_eq!(data_of(line.as_bytes()).as_deref(), data, "{line:?}");
        }
    }
}
