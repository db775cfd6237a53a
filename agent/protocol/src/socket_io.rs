//! Socket.IO v5 packets inside Engine.IO v4 text frames, as far as the validators' sockets use them: one
//! websocket transport, JSON text packets. Pure: bytes in, packets out.
//!
//! ```text
//! 0{...}            Engine.IO open        2 / 3   ping from the server / pong from the client
//! 40   40{...}      Socket.IO connect     41      disconnect
//! 42["name",data]   event                 427[..] event that asks for acknowledgement 7
//! 437[...]          acknowledgement 7     44{...} connect refused
//! ```
//! Facts: `validator-protocol` section 2.2 and `rust-stack` section 4, both observed with python-socketio.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The largest frame that we accept from a server, in bytes. Fat events (a list of all chutes of an image)
/// stay far below; a frame of 32 MiB is an attack or a fault.
pub const FRAME_BYTES_MAX: usize = 8 * 1024 * 1024;

/// The handshake of Engine.IO. Unknown members are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Open {
    /// Session id of the transport.
    pub sid: String,
    /// Transports to upgrade to; empty on a websocket.
    #[serde(default)]
    pub upgrades: Vec<String>,
    /// How often the server pings, in ms.
    pub ping_interval: u64,
    /// How long an answer may take, in ms.
    pub ping_timeout: u64,
    /// Largest message that the server accepts, in bytes.
    #[serde(default)]
    pub max_payload: u64,
}

/// One packet of the default namespace.
#[derive(Debug, Clone, PartialEq)]
pub enum Packet {
    /// Engine.IO open.
    Open(Open),
    /// Engine.IO close.
    Close,
    /// Ping, with its payload (empty but for probes).
    Ping(String),
    /// Pong, with its payload.
    Pong(String),
    /// Connect to the namespace, or its confirmation by the server.
    Connect(Option<Value>),
    /// Leave the namespace.
    Disconnect,
    /// An event with its arguments.
    Event {
        /// Acknowledgement that the sender wants.
        ack: Option<u64>,
        /// Name of the event.
        name: String,
        /// Its arguments.
        args: Vec<Value>,
    },
    /// An acknowledgement.
    Ack {
        /// Which one.
        id: u64,
        /// Its arguments.
        args: Vec<Value>,
    },
    /// The namespace was refused.
    ConnectError(Option<Value>),
    /// Well-formed and of no interest here: another namespace, binary packets, upgrades, no-ops.
    Other(String),
}

/// Why a frame is no packet. The connection goes on; the frame is counted and dropped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidFrame {
    /// Nothing in it.
    #[error("empty frame")]
    Empty,
    /// More than [`FRAME_BYTES_MAX`].
    #[error("frame of {0} bytes, at most {FRAME_BYTES_MAX} are accepted")]
    TooLong(usize),
    /// A type that does not exist.
    #[error("unknown packet type {0:?}")]
    UnknownType(String),
    /// The JSON inside is cut, wrong or of another shape.
    #[error("malformed {0} packet")]
    Malformed(&'static str),
}

impl Packet {
    /// Parses one text frame.
    ///
    /// # Errors
    /// [`InvalidFrame`]; never panics, whatever the input.
    pub fn parse(frame: &str) -> Result<Self, InvalidFrame> {
        if frame.len() > FRAME_BYTES_MAX {
            return Err(InvalidFrame::TooLong(frame.len()));
        }
        let mut chars = frame.chars();
        let kind = chars.next().ok_or(InvalidFrame::Empty)?;
        let rest = chars.as_str();
        match kind {
            '0' => serde_json::from_str(rest)
                .map(Self::Open)
                .map_err(|_| InvalidFrame::Malformed("open")),
            '1' => Ok(Self::Close),
            '2' => Ok(Self::Ping(rest.to_owned())),
            '3' => Ok(Self::Pong(rest.to_owned())),
            '4' => Self::parse_message(rest),
            '5' | '6' => Ok(Self::Other(kind.to_string())),
            other => Err(InvalidFrame::UnknownType(other.to_string())),
        }
    }

    fn parse_message(rest: &str) -> Result<Self, InvalidFrame> {
        let mut chars = rest.chars();
        let kind = chars.next().ok_or(InvalidFrame::Malformed("message"))?;
        if !('0'..='6').contains(&kind) {
            return Err(InvalidFrame::UnknownType(format!("4{kind}")));
        }
        let rest = chars.as_str();
        let of_other_namespace = rest.starts_with('/') && !rest.starts_with("/,");
        if of_other_namespace || matches!(kind, '5' | '6') {
            return Ok(Self::Other(format!("4{kind}")));
        }
        let rest = rest.strip_prefix("/,").unwrap_or(rest);
        match kind {
            '0' => Ok(Self::Connect(optional_json(rest, "connect")?)),
            '1' => Ok(Self::Disconnect),
            '4' => Ok(Self::ConnectError(optional_json(rest, "connect error")?)),
            _ => {
                let label = if kind == '2' { "event" } else { "acknowledgement" };
                let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
                let (id, json) = rest.split_at(digits);
                let id = if id.is_empty() {
                    None
                } else {
                    Some(id.parse().map_err(|_| InvalidFrame::Malformed(label))?)
                };
                let mut args: Vec<Value> =
                    serde_json::from_str(json).map_err(|_| InvalidFrame::Malformed(label))?;
                if kind == '3' {
                    return id
                        .map(|id| Self::Ack { id, args })
                        .ok_or(InvalidFrame::Malformed(label));
                }
                match args.first() {
                    Some(Value::String(_)) => {
                        let Value::String(name) = args.remove(0) else {
                            unreachable!("matched above")
                        };
                        Ok(Self::Event { ack: id, name, args })
                    }
                    _ => Err(InvalidFrame::Malformed(label)),
                }
            }
        }
    }

    /// The text frame of this packet.
    #[must_use]
    pub fn to_frame(&self) -> String {
        let optional = |value: &Option<Value>| value.as_ref().map(Value::to_string).unwrap_or_default();
        match self {
            Self::Open(open) => format!("0{}", serde_json::to_string(open).unwrap_or_default()),
            Self::Close => "1".to_owned(),
            Self::Ping(payload) => format!("2{payload}"),
            Self::Pong(payload) => format!("3{payload}"),
            Self::Connect(auth) => format!("40{}", optional(auth)),
            Self::Disconnect => "41".to_owned(),
            Self::Event { ack, name, args } => {
                let mut all = vec![Value::String(name.clone())];
                all.extend(args.iter().cloned());
                format!(
                    "42{}{}",
                    ack.map(|id| id.to_string()).unwrap_or_default(),
                    Value::Array(all)
                )
            }
            Self::Ack { id, args } => format!("43{id}{}", Value::Array(args.clone())),
            Self::ConnectError(value) => format!("44{}", optional(value)),
            Self::Other(kind) => kind.clone(),
        }
    }

    /// An event without acknowledgement and with one argument.
    #[must_use]
    pub fn event(name: &str, arg: Value) -> Self {
        Self::Event {
            ack: None,
            name: name.to_owned(),
            args: vec![arg],
        }
    }
}

fn optional_json(text: &str, label: &'static str) -> Result<Option<Value>, InvalidFrame> {
    if text.is_empty() {
        return Ok(None);
    }
    serde_json::from_str(text)
        .map(Some)
        .map_err(|_| InvalidFrame::Malformed(label))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn frames_seen_on_the_wire_are_read_and_written() {
        let event = |ack, args: Vec<Value>| Packet::Event {
            ack,
            name: "hello".to_owned(),
            args,
        };
        let rows = [
            (
                r#"0{"sid":"PM","upgrades":[],"pingInterval":25000,"pingTimeout":20000,"maxPayload":1000000}"#,
                Packet::Open(Open {
                    sid: "PM".to_owned(),
                    upgrades: vec![],
                    ping_interval: 25_000,
                    ping_timeout: 20_000,
                    max_payload: 1_000_000,
                }),
            ),
            ("1", Packet::Close),
            ("2", Packet::Ping(String::new())),
            ("3probe", Packet::Pong("probe".to_owned())),
            ("40", Packet::Connect(None)),
            (
                r#"40{"sid":"kf5h"}"#,
                Packet::Connect(Some(json!({"sid": "kf5h"}))),
            ),
            ("41", Packet::Disconnect),
            (r#"42["hello",{"gpu":8}]"#, event(None, vec![json!({"gpu": 8})])),
            (r#"427["hello",1,2]"#, event(Some(7), vec![json!(1), json!(2)])),
            (
                r#"437["ok"]"#,
                Packet::Ack {
                    id: 7,
                    args: vec![json!("ok")],
                },
            ),
            (
                r#"44{"message":"nope"}"#,
                Packet::ConnectError(Some(json!({"message": "nope"}))),
            ),
        ];
        for (frame, packet) in rows {
            assert_eq!(Packet::parse(frame).as_ref(), Ok(&packet), "{frame}");
            assert_eq!(packet.to_frame(), frame);
        }
    }

    #[test]
    fn uninteresting_frames_are_told_from_broken_ones() {
        for frame in ["40/miner,{}", "42/miner,9[\"x\"]", "451-[\"bin\",{}]", "6", "5"] {
            assert!(matches!(Packet::parse(frame), Ok(Packet::Other(_))), "{frame}");
        }
        for frame in [
            "",
            "4",
            "7",
            "x",
            "47",
            "0",
            "0{",
            "42",
            "42{}",
            "42[]",
            "42[1]",
            "43[1]",
            "42[\"a\"",
            "42999999999999999999999[\"a\"]",
        ] {
            assert!(Packet::parse(frame).is_err(), "{frame:?}");
        }
    }

    #[test]
    fn every_cut_of_a_frame_is_an_error_or_a_packet_and_never_a_panic() {
        let frame = r#"4212["miner_broadcast",{"reason":"bounty_change","data":{"ü":[1,2,{"x":null}]}}]"#;
        for (end, _) in frame.char_indices() {
            let _ = Packet::parse(&frame[..end]);
        }
        assert!(matches!(
            Packet::parse(&"4".repeat(FRAME_BYTES_MAX + 1)),
            Err(InvalidFrame::TooLong(_))
        ));
    }

    #[test]
    fn seeds_of_64_bits_keep_every_bit() {
        let Ok(Packet::Event { args, .. }) = Packet::parse(r#"42["e",{"seed":9223372036854775807}]"#) else {
            panic!("a plain event");
        };
        assert_eq!(args[0]["seed"].as_u64(), Some(9_223_372_036_854_775_807));
    }
}
