//! Messages of the host link: one connection from each host to a member of the coordinator.
//!
//! A host says [`FromHost::Hello`] first. Afterwards either side sends whenever it has something; nothing
//! waits for an answer, since the desired set and the report are both whole states that replace the last.
//! On the wire each message is a length (4 bytes, big endian) and postcard bytes of a [`Versioned`].

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::report::{HostFacts, WorkloadReport};
use crate::time::UnixMillis;
use crate::workload::{Fence, WorkloadSpec};

/// The longest message that either side accepts, in bytes: a desired set of 8 chutes with 150 kB of code.
pub const MESSAGE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Name of the protocol in the TLS handshake (ALPN).
pub const ALPN: &[u8] = b"chutes-host/1";

const LENGTH_BYTES: usize = 4;

/// Why bytes are no message. The connection cannot go on afterwards: its framing is lost.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The message, ours or theirs, is longer than the limit.
    #[error("a message of {bytes} bytes is longer than the {MESSAGE_BYTES_MAX} that are accepted")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// The bytes do not decode: a foreign sender, or a version that we do not know.
    #[error("a message does not decode: {0}")]
    Malformed(postcard::Error),
    /// Bytes are left over after the message.
    #[error("a message is followed by {bytes} bytes that do not belong to it")]
    Trailing {
        /// How many.
        bytes: usize,
    },
}

/// Length and bytes of a message in the newest form, ready to be written to the stream.
///
/// # Errors
/// [`FrameError::TooLong`] when the message is longer than the other side accepts.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let frame =
        postcard::to_extend(&Versioned::V1(message), vec![0; LENGTH_BYTES]).map_err(FrameError::Malformed)?;
    let bytes = frame.len() - LENGTH_BYTES;
    let length = u32::try_from(bytes).ok().filter(|_| bytes <= MESSAGE_BYTES_MAX);
    let Some(length) = length else {
        return Err(FrameError::TooLong { bytes });
    };
    let mut frame = frame;
    frame[..LENGTH_BYTES].copy_from_slice(&length.to_be_bytes());
    Ok(frame)
}

/// Cuts a stream of bytes into messages. It holds what has arrived and no more, so that a length alone
/// claims no memory.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
}

impl Decoder {
    /// Takes the next bytes of the stream, as they come. Call [`Self::take_next`] until it has no more, before
    /// the next bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, or nothing when more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError`]: the stream is of no more use.
    pub fn take_next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        let Some(length) = self.buffer.first_chunk::<LENGTH_BYTES>() else {
            return Ok(None);
        };
        let bytes = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if bytes > MESSAGE_BYTES_MAX {
            return Err(FrameError::TooLong { bytes });
        }
        let Some(message) = self.buffer.get(LENGTH_BYTES..LENGTH_BYTES + bytes) else {
            return Ok(None);
        };
        let (message, rest) =
            postcard::take_from_bytes::<Versioned<T>>(message).map_err(FrameError::Malformed)?;
        if !rest.is_empty() {
            return Err(FrameError::Trailing { bytes: rest.len() });
        }
        self.buffer.drain(..LENGTH_BYTES + bytes);
        Ok(Some(message.into_latest()))
    }
}

/// A message with the version of its form, so that old and new agents can talk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Versioned<T> {
    /// First form.
    V1(T),
}

impl<T> Versioned<T> {
    /// The message, brought to the newest form.
    pub fn into_latest(self) -> T {
        match self {
            Self::V1(message) => message,
        }
    }
}

/// From a host to the coordinator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromHost {
    /// Who is calling, and the highest fence that it has stored.
    Hello {
        /// The host.
        facts: HostFacts,
        /// Fence of the desired set on its disk.
        fence: Fence,
        /// Its wall clock, to be compared with the coordinator's.
        clock: UnixMillis,
    },
    /// The facts changed.
    Facts(HostFacts),
    /// All that runs on it.
    Report(WorkloadReport),
}

/// From the coordinator to a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHost {
    /// What should run, replacing any set of a lower fence.
    Desired {
        /// Orders this set.
        fence: Fence,
        /// All of it.
        workloads: Vec<WorkloadSpec>,
    },
    /// Signed headers for the registries, replacing the last ones.
    RegistryHeaders(Vec<RegistryHeaders>),
    /// `host:port` of all members' doors, to go to when this one dies.
    Doors(Vec<String>),
    /// Fingerprints of the authorities that the host should trust; the last one is to have signed its certificate.
    /// Sent only to a host that has not said yet that it does.
    Authorities(Vec<[u8; 32]>),
}

/// A short-lived signature for one validator's registry, made by a member that holds the seed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistryHeaders {
    /// The validator whose registry it is for.
    pub validator: crate::hotkey::Hotkey,
    /// Header names and values.
    pub headers: Vec<(String, String)>,
    /// Not to be used afterwards.
    pub expires_at: UnixMillis,
}

impl std::fmt::Debug for RegistryHeaders {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RegistryHeaders({} until {})", self.validator, self.expires_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{DeploymentId, ServerId};
    use crate::report::WorkloadStatus;
    use crate::workload::{PortMapping, PortProtocol, WorkloadPhase};

    fn report() -> FromHost {
        FromHost::Report(WorkloadReport {
            fence: Fence {
                incarnation: 1,
                revision: 7,
            },
            workloads: vec![WorkloadStatus {
                deployment: DeploymentId::parse("d1").expect("valid"),
                phase: WorkloadPhase::Running {
                    ports: vec![PortMapping {
                        internal: 8000,
                        external: 31000,
                        protocol: PortProtocol::Tcp,
                    }],
                    ready: true,
                },
            }],
        })
    }

    fn hello() -> FromHost {
        FromHost::Hello {
            facts: HostFacts {
                server: ServerId::parse("server-1").expect("valid"),
                name: "host-1".to_owned(),
                address: "127.0.1.1".to_owned(),
                proof_port: 30443,
                devices: Vec::new(),
                cpu_count: 8,
                memory_gb: 64,
                disk_free_gb: 100,
                agent_version: "0.1.0".to_owned(),
            },
            fence: Fence::default(),
            clock: UnixMillis(1_735_689_600_000),
        }
    }

    #[test]
    fn messages_survive_any_cut_of_the_stream() {
        let mut stream = encode(&hello()).expect("short");
        stream.extend(encode(&report()).expect("short"));
        for chunk in 1..stream.len() {
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            for part in stream.chunks(chunk) {
                decoder.push(part);
                while let Some(message) = decoder.take_next::<FromHost>().expect("whole stream") {
                    seen.push(message);
                }
            }
            assert_eq!(seen, [hello(), report()], "chunks of {chunk}");
        }
    }

    #[test]
    fn the_form_on_the_wire_is_fixed() {
        let frame = encode(&report()).expect("short");
        assert_eq!(
            hex::encode(frame),
            "00000011000201070102643102 01c03e98f20100 01".replace(' ', "")
        );
    }

    #[test]
    fn bad_frames_are_refused() {
        let check = |bytes: &[u8]| {
            let mut decoder = Decoder::default();
            decoder.push(bytes);
            decoder.take_next::<FromHost>()
        };
        assert_eq!(check(&[0, 0]), Ok(None));
        assert_eq!(check(&[0, 0, 0, 5, 0]), Ok(None));
        assert!(matches!(check(&[1, 0, 0, 1]), Err(FrameError::TooLong { .. })));
        assert!(matches!(check(&[0, 0, 0, 1, 9]), Err(FrameError::Malformed(_))));
        assert!(matches!(check(&[0, 0, 0, 0]), Err(FrameError::Malformed(_))));
        let mut longer = encode(&report()).expect("short");
        longer.push(0);
        longer[3] += 1;
        assert!(matches!(check(&longer), Err(FrameError::Trailing { bytes: 1 })));
    }

    #[test]
    fn a_message_beyond_the_limit_is_not_sent() {
        let long = "x".repeat(MESSAGE_BYTES_MAX);
        assert!(matches!(encode(&long), Err(FrameError::TooLong { .. })));
    }
}
