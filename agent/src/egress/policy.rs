//! Which names and ports a chute may reach. Pure.
//!
//! The policy is compiled once: an entry with a leading dot means the domain and all below it, one without
//! means exactly that name. Every [`Decision`] has a [`Reason`]. In `report` mode a name that is not listed
//! passes and is reported; nothing else is loosened by it: ports, IP literals and the classes of addresses
//! are judged as ever.

use std::collections::BTreeSet;
use std::fmt;

use prometheus_client::encoding::EncodeLabelValue;
use serde::{Deserialize, Serialize};

use crate::egress::address::Class;

/// The longest host in a request that is looked at, in bytes.
pub const HOST_BYTES_MAX: usize = 255;

/// The allow-list that we ship: what the original's proxy listed and what could match, without package
/// indexes (a running chute installs nothing) and without entries that another entry covers.
pub const DEFAULT_ALLOWED: [&str; 52] = [
    ".chutes.ai",
    ".chutes.dev",
    ".huggingface.co",
    ".huggingface.net",
    ".hf.space",
    ".hf.co",
    ".civitai.com",
    ".modelscope.cn",
    ".weights.ggmlv3.model",
    ".weights.gguf.model",
    ".pytorch.org",
    ".torchvision.org",
    ".tensorflow.org",
    ".tfhub.dev",
    ".nvidia.github.io",
    ".ngc.nvidia.com",
    ".developer.nvidia.com",
    ".github.com",
    ".githubusercontent.com",
    ".gitlab.com",
    ".anaconda.org",
    ".anaconda.com",
    ".cloudfront.net",
    ".fastly.net",
    ".akamai.net",
    ".cloudflare.com",
    ".jsdelivr.net",
    ".unpkg.com",
    ".googleusercontent.com",
    ".storage.googleapis.com",
    ".bunny.net",
    ".b-cdn.net",
    ".bunnycdn.com",
    ".bunnystatic.com",
    ".bunnyway.net",
    ".cloudflarestorage.com",
    ".s3.amazonaws.com",
    ".azureedge.net",
    ".blob.core.windows.net",
    ".openai.com",
    ".anthropic.com",
    ".cohere.ai",
    ".stability.ai",
    ".wandb.ai",
    ".mlflow.org",
    ".tensorboard.dev",
    ".neptune.ai",
    ".arxiv.org",
    ".paperswithcode.com",
    ".research.google.com",
    ".research.facebook.com",
    ".microsoft.com",
];

/// What a name that is not listed means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// It is refused.
    #[default]
    Enforce,
    /// It passes and is reported.
    Report,
}

/// Why an entry of the allow-list is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidEntry {
    /// A pattern.
    #[error("{0:?}: patterns are not understood; write \".example.com\" for a domain and all below it")]
    Pattern(String),
    /// Not a name.
    #[error("{0:?} is not a host name with at least two labels, with or without a leading dot")]
    Name(String),
}

/// Why a request is let through or refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Reason {
    /// The name is on the list.
    Listed,
    /// The name belongs to a configured validator.
    Validator,
    /// The name is not on the list, and the policy only reports.
    ReportedOnly,
    /// The name is not on the list.
    NotListed,
    /// An address instead of a name, in whatever spelling.
    IpLiteral,
    /// Not a host name.
    InvalidName,
    /// A port that is not allowed.
    Port,
    /// Another method than CONNECT.
    Method,
    /// Not a request that we understand, too large or too slow.
    BadRequest,
    /// Too many connections.
    Busy,
    /// The name could not be resolved.
    NotResolved,
    /// The name resolves to an address that is never dialled.
    Address,
    /// No checked address could be connected.
    Unreachable,
}

impl Reason {
    /// The word for headers, logs and scripts.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Listed => "listed",
            Self::Validator => "validator",
            Self::ReportedOnly => "reported-only",
            Self::NotListed => "not-listed",
            Self::IpLiteral => "ip-literal",
            Self::InvalidName => "invalid-name",
            Self::Port => "port",
            Self::Method => "method",
            Self::BadRequest => "bad-request",
            Self::Busy => "busy",
            Self::NotResolved => "not-resolved",
            Self::Address => "address",
            Self::Unreachable => "unreachable",
        }
    }
}

/// What the policy says about one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// May go on (its addresses are still to be checked).
    pub allowed: bool,
    /// Why.
    pub reason: Reason,
    /// For people.
    pub detail: String,
}

impl Decision {
    /// A refusal.
    #[must_use]
    pub fn deny(reason: Reason, detail: impl Into<String>) -> Self {
        Self {
            allowed: false,
            reason,
            detail: detail.into(),
        }
    }

    /// A refusal for the address that a name resolved to.
    #[must_use]
    pub fn deny_address(name: &Name, address: std::net::IpAddr, class: Class) -> Self {
        Self::deny(
            Reason::Address,
            format!("{name} resolves to {address}: {class} addresses are never reached"),
        )
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.allowed { "allowed" } else { "denied" };
        write!(f, "{verdict} ({}): {}", self.reason.as_str(), self.detail)
    }
}

/// A host name in lower case without a trailing dot: at least two labels of letters, digits, `-` and `_`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name(String);

impl Name {
    /// Reads the host of a request.
    ///
    /// # Errors
    /// [`Reason::IpLiteral`] for addresses in every spelling that some resolver understands (dotted,
    /// decimal, octal, hexadecimal, short, IPv6), [`Reason::InvalidName`] for what is no host name.
    pub fn parse(host: &str) -> Result<Self, Reason> {
        if host.is_empty() || host.len() > HOST_BYTES_MAX {
            return Err(Reason::InvalidName);
        }
        if host.starts_with('[') || host.contains(':') {
            return Err(Reason::IpLiteral);
        }
        let bare = host.strip_suffix('.').unwrap_or(host);
        let mut labels = 0;
        for label in bare.split('.') {
            let word = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
            let fits = !label.is_empty() && label.len() <= 63 && label.bytes().all(word);
            if !fits || label.starts_with('-') || label.ends_with('-') {
                // A dotted address with an odd end is still an address to some.
                let numeric = bare.bytes().any(|b| b.is_ascii_digit())
                    && bare.bytes().all(|b| b.is_ascii_digit() || b == b'.');
                return Err(if numeric {
                    Reason::IpLiteral
                } else {
                    Reason::InvalidName
                });
            }
            labels += 1;
        }
        // The rule of the URL standard: a host whose last label is a number is an IPv4 address.
        let last = bare.rsplit('.').next().unwrap_or_default();
        if is_number(last) {
            return Err(Reason::IpLiteral);
        }
        if labels < 2 || bare.len() > 253 {
            return Err(Reason::InvalidName);
        }
        Ok(Self(bare.to_ascii_lowercase()))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_number(label: &str) -> bool {
    if label.bytes().all(|b| b.is_ascii_digit()) {
        return true;
    }
    let hex = label.strip_prefix("0x").or_else(|| label.strip_prefix("0X"));
    hex.is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// The compiled policy.
#[derive(Debug, Clone)]
pub struct Policy {
    mode: Mode,
    ports: BTreeSet<u16>,
    domains: BTreeSet<String>,
    exact: BTreeSet<String>,
    validators: BTreeSet<String>,
}

impl Policy {
    /// Compiles the allow-list. `validators` are hosts that are always allowed: API, socket and registry of
    /// the configured validators. A host of theirs that is no name (loopback in development) is left out.
    ///
    /// # Errors
    /// [`InvalidEntry`].
    pub fn compile<'a>(
        mode: Mode,
        ports: impl IntoIterator<Item = u16>,
        allowed: impl IntoIterator<Item = &'a str>,
        validators: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, InvalidEntry> {
        let (mut domains, mut exact) = (BTreeSet::new(), BTreeSet::new());
        for entry in allowed {
            if entry.contains('*') {
                return Err(InvalidEntry::Pattern(entry.to_owned()));
            }
            let bare = entry.strip_prefix('.').unwrap_or(entry);
            let name = Name::parse(bare).map_err(|_| InvalidEntry::Name(entry.to_owned()))?;
            if bare.len() < entry.len() {
                domains.insert(name.0)
            } else {
                exact.insert(name.0)
            };
        }
        let validators = validators
            .into_iter()
            .filter_map(|host| Name::parse(host).ok())
            .map(|name| name.0);
        Ok(Self {
            mode,
            ports: ports.into_iter().collect(),
            domains,
            exact,
            validators: validators.collect(),
        })
    }

    /// Decides on a host and port as the client wrote them; the checked name comes back if it may go on.
    ///
    /// # Errors
    /// The [`Decision`] that refuses.
    pub fn decide(&self, host: &str, port: u16) -> Result<(Name, Decision), Decision> {
        let name = Name::parse(host).map_err(|reason| {
            let what = match reason {
                Reason::IpLiteral => "is an address; chutes reach names only",
                _ => "is not a host name",
            };
            Decision::deny(
                reason,
                format!("{:?} {what}", host.chars().take(64).collect::<String>()),
            )
        })?;
        if !self.ports.contains(&port) {
            return Err(Decision::deny(
                Reason::Port,
                format!("port {port} of {name} is not allowed"),
            ));
        }
        let allow = |reason, detail: String| Decision {
            allowed: true,
            reason,
            detail,
        };
        if self.validators.contains(name.as_str()) {
            let decision = allow(
                Reason::Validator,
                format!("{name} belongs to a configured validator"),
            );
            return Ok((name, decision));
        }
        if let Some(entry) = self.matching(&name) {
            let decision = allow(Reason::Listed, format!("{name} is on the list as {entry}"));
            return Ok((name, decision));
        }
        match self.mode {
            Mode::Report => {
                let decision = allow(
                    Reason::ReportedOnly,
                    format!("{name} is not on the list; only reported"),
                );
                Ok((name, decision))
            }
            Mode::Enforce => Err(Decision::deny(
                Reason::NotListed,
                format!("{name} is not on the list"),
            )),
        }
    }

    /// The entry that covers a name, as written in the list.
    fn matching(&self, name: &Name) -> Option<String> {
        if self.exact.contains(name.as_str()) {
            return Some(name.0.clone());
        }
        let mut suffix = name.as_str();
        loop {
            if self.domains.contains(suffix) {
                return Some(format!(".{suffix}"));
            }
            suffix = suffix.split_once('.')?.1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shipped(mode: Mode) -> Policy {
        Policy::compile(mode, [443], DEFAULT_ALLOWED, ["api.private.example", "127.0.1.1"]).expect("valid")
    }

    fn check(policy: &Policy, host: &str, port: u16, expected: Reason) {
        let reason = match policy.decide(host, port) {
            Ok((_, decision)) => {
                assert!(decision.allowed, "{host}");
                decision.reason
            }
            Err(decision) => {
                assert!(!decision.allowed, "{host}");
                decision.reason
            }
        };
        assert_eq!(reason, expected, "{host:?}:{port}");
    }

    /// The rows that were measured on the original's proxy, and the tricks against it.
    #[test]
    fn names_match_on_label_boundaries() {
        let policy = shipped(Mode::Enforce);
        for host in [
            "huggingface.co",
            "HuggingFace.CO",
            "huggingface.co.",
            "cdn.huggingface.co",
            "x.hf.co",
            "cas.xethub.hf.co",
            "nx.s3.amazonaws.com",
            "evil.cloudfront.net",
            "api.chutes.ai",
            "_dmarc.hf.co",
            "xn--bcher-kva.hf.co",
        ] {
            check(&policy, host, 443, Reason::Listed);
        }
        check(&policy, "api.private.example", 443, Reason::Validator);
        for host in [
            "nx.s3.us-east-1.amazonaws.com",
            "s3-us-west-2.amazonaws.com",
            "x.amazonaws.com",
            "www.googleapis.com",
            "notchutes.ai",
            "huggingface.co.example",
            "nope.example",
            "replicate.com",
            "x.api.private.example",
            "xn--hggingface-9db.co",
        ] {
            check(&policy, host, 443, Reason::NotListed);
        }
        for port in [80, 8443, 22, 0, 65535] {
            check(&policy, "huggingface.co", port, Reason::Port);
        }
    }

    #[test]
    fn addresses_are_refused_in_every_spelling() {
        for mode in [Mode::Enforce, Mode::Report] {
            let policy = shipped(mode);
            for host in [
                "127.0.0.1",
                "127.0.0.1.",
                "8.8.8.8",
                "2130706433",
                "0x7f000001",
                "0X7F000001",
                "0x7f.0.0.1",
                "0x7f.0x0.0x0.0x1",
                "0177.0.0.1",
                "017700000001",
                "127.1",
                "127.0.1",
                "127.0.0.0x1",
                "0x",
                "0",
                "1.2.3.4.5",
                "999.999.999.999",
                "127..0.1",
                "127.0.0.1..",
                "huggingface.co.1",
                "[::1]",
                "::1",
                "[::ffff:127.0.0.1]",
                "::ffff:7f00:1",
                "[fe80::1%25eth0]",
                "fe80::1%eth0",
                "[2606:4700::1111]",
                "[huggingface.co]",
            ] {
                check(&policy, host, 443, Reason::IpLiteral);
            }
            for host in [
                "",
                ".",
                "..",
                "localhost",
                "hf",
                ".hf.co",
                "hf..co",
                "hf.co..",
                " hf.co",
                "hf.co ",
                "hf.co\t",
                "hf.co\0.example.com",
                "user@hf.co",
                "user%40hf.co",
                "hf.co/",
                "hf.co#",
                "hf.co\\x",
                "-x.hf.co",
                "x-.hf.co",
                "①②⑦.⓪.⓪.①",
                "１２７.0.0.1",
                "hf。co",
                "h\u{fb00}.co",
            ] {
                check(&policy, host, 443, Reason::InvalidName);
            }
            check(
                &policy,
                &format!("{}.hf.co", "x".repeat(64)),
                443,
                Reason::InvalidName,
            );
            check(
                &policy,
                &format!("{}hf.co", "x.".repeat(130)),
                443,
                Reason::InvalidName,
            );
        }
    }

    #[test]
    fn report_mode_loosens_the_list_only() {
        let policy = shipped(Mode::Report);
        check(&policy, "nope.example", 443, Reason::ReportedOnly);
        check(&policy, "hf.co", 443, Reason::Listed);
        check(&policy, "nope.example", 80, Reason::Port);
        check(&policy, "10.0.0.1", 443, Reason::IpLiteral);
    }

    #[test]
    fn entries_that_could_never_match_are_refused() {
        for bad in ["*.s3.amazonaws.com", ".s3.*.amazonaws.com"] {
            assert!(matches!(
                Policy::compile(Mode::Enforce, [443], [bad], []),
                Err(InvalidEntry::Pattern(_))
            ));
        }
        for bad in [
            "",
            ".",
            "com",
            ".com",
            "10.0.0.1",
            "https://hf.co",
            "hf.co:443",
            "..hf.co",
        ] {
            assert!(
                matches!(
                    Policy::compile(Mode::Enforce, [443], [bad], []),
                    Err(InvalidEntry::Name(_))
                ),
                "{bad}"
            );
        }
        let exact = Policy::compile(Mode::Enforce, [443], ["only.example.com"], []).expect("valid");
        check(&exact, "only.example.com", 443, Reason::Listed);
        check(&exact, "x.only.example.com", 443, Reason::NotListed);
        check(&exact, "example.com", 443, Reason::NotListed);
    }
}
