//! The head of a proxy request: parsed from bytes. Pure.
//!
//! Only `CONNECT host:port HTTP/1.x` matters; headers are read past, since nothing in them can change the
//! decision. Bare line feeds, control characters and odd spaces are refused rather than interpreted.

/// The longest head that is read, in bytes.
pub const HEAD_BYTES_MAX: usize = 8 * 1024;

/// A request to open a tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connect {
    /// Host as written; brackets kept.
    pub host: String,
    /// Port.
    pub port: u16,
}

/// What the bytes so far are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parsed {
    /// More bytes are needed.
    Partial,
    /// A whole head of so many bytes; what follows belongs to the tunnel.
    Connect(Connect, usize),
    /// Another method, with its target.
    OtherMethod(String, String),
    /// Nothing that we understand.
    Bad(&'static str),
}

/// Parses the bytes received so far. `seen` bytes of them were looked at before.
#[must_use]
pub fn parse(bytes: &[u8], seen: usize) -> Parsed {
    // The end may straddle what was seen and what is new.
    let from = seen.saturating_sub(3);
    let end = bytes[from..]
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .map(|at| from + at + 4);
    let Some(end) = end else {
        return if bytes.len() >= HEAD_BYTES_MAX {
            Parsed::Bad("the head is too long")
        } else {
            Parsed::Partial
        };
    };
    if end > HEAD_BYTES_MAX {
        return Parsed::Bad("the head is too long");
    }
    let head = &bytes[..end - 4];
    let controls = |line: &[u8]| line.iter().any(|b| (*b < b' ' && *b != b'\t') || *b == 0x7f);
    let mut lines = head
        .split(|b| *b == b'\n')
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let line = lines.next().unwrap_or_default();
    if head
        .split(|b| *b == b'\n')
        .rev()
        .skip(1)
        .any(|line| !line.ends_with(b"\r"))
    {
        return Parsed::Bad("a line ends without a carriage return");
    }
    if controls(line) || lines.any(controls) {
        return Parsed::Bad("the head has control characters");
    }
    let Ok(line) = std::str::from_utf8(line) else {
        return Parsed::Bad("the request line is not UTF-8");
    };
    let parts: Vec<&str> = line.split(' ').collect();
    let [method, target, version] = parts[..] else {
        return Parsed::Bad("the request line is not \"CONNECT host:port HTTP/1.1\"");
    };
    if !matches!(version, "HTTP/1.1" | "HTTP/1.0") {
        return Parsed::Bad("only HTTP/1.1 and HTTP/1.0 are spoken here");
    }
    if method != "CONNECT" {
        let shorten = |text: &str| text.chars().take(64).collect();
        return Parsed::OtherMethod(shorten(method), shorten(target));
    }
    match target.rsplit_once(':') {
        // A colon in the host without brackets is left to the policy: it refuses addresses.
        Some((host, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => {
            match port.parse() {
                Ok(port) => Parsed::Connect(
                    Connect {
                        host: host.to_owned(),
                        port,
                    },
                    end,
                ),
                Err(_) => Parsed::Bad("the port is out of range"),
            }
        }
        _ => Parsed::Bad("the target has no port"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connect(host: &str, port: u16, end: usize) -> Parsed {
        Parsed::Connect(
            Connect {
                host: host.to_owned(),
                port,
            },
            end,
        )
    }

    #[test]
    fn heads_are_parsed_strictly() {
        let rows: [(&[u8], Parsed); 14] = [
            (b"CONNECT hf.co:443 HTTP/1.1\r\n\r\n", connect("hf.co", 443, 30)),
            (
                b"CONNECT hf.co:443 HTTP/1.0\r\nHost: x\r\n\r\nTLS",
                connect("hf.co", 443, 39),
            ),
            (b"CONNECT [::1]:443 HTTP/1.1\r\n\r\n", connect("[::1]", 443, 30)),
            (b"CONNECT ::1:443 HTTP/1.1\r\n\r\n", connect("::1", 443, 28)),
            (b"CONNECT hf.co:443 HTTP/1.1\r\n", Parsed::Partial),
            (
                b"CONNECT hf.co HTTP/1.1\r\n\r\n",
                Parsed::Bad("the target has no port"),
            ),
            (
                b"CONNECT hf.co: HTTP/1.1\r\n\r\n",
                Parsed::Bad("the target has no port"),
            ),
            (
                b"CONNECT hf.co:+443 HTTP/1.1\r\n\r\n",
                Parsed::Bad("the target has no port"),
            ),
            (
                b"CONNECT hf.co:65536 HTTP/1.1\r\n\r\n",
                Parsed::Bad("the port is out of range"),
            ),
            (
                b"CONNECT  hf.co:443 HTTP/1.1\r\n\r\n",
                Parsed::Bad("the request line is not \"CONNECT host:port HTTP/1.1\""),
            ),
            (
                b"CONNECT hf.co:443 HTTP/2\r\n\r\n",
                Parsed::Bad("only HTTP/1.1 and HTTP/1.0 are spoken here"),
            ),
            (
                b"CONNECT hf.co:443\0 HTTP/1.1\r\n\r\n",
                Parsed::Bad("the head has control characters"),
            ),
            (
                b"CONNECT hf.co:443 HTTP/1.1\nHost: x\r\n\r\n",
                Parsed::Bad("a line ends without a carriage return"),
            ),
            (
                b"GET http://hf.co/ HTTP/1.1\r\n\r\n",
                Parsed::OtherMethod("GET".to_owned(), "http://hf.co/".to_owned()),
            ),
        ];
        for (bytes, expected) in rows {
            assert_eq!(parse(bytes, 0), expected, "{}", String::from_utf8_lossy(bytes));
        }
        assert!(matches!(parse(&[b'x'; HEAD_BYTES_MAX], 0), Parsed::Bad(_)));
    }

    #[test]
    fn the_end_is_found_wherever_the_bytes_are_cut() {
        let whole = b"CONNECT hf.co:443 HTTP/1.1\r\nA: b\r\n\r\nrest";
        for cut in 0..whole.len() {
            let early = parse(&whole[..cut], 0);
            if early == Parsed::Partial {
                assert_eq!(parse(whole, cut), connect("hf.co", 443, 36), "cut at {cut}");
            }
        }
    }
}
