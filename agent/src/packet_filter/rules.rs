//! The table as text for `nft`: pure.
//!
//! What begins at a pod is looked at twice when it is for this host: before addresses are translated, since a NodePort
//! is an address of the host then, and after that, since a ClusterIP may have become one (that of the API server has).
//! Answers to what the host or the outside began are let through by the direction of their connection, and not by its
//! age: what a pod had begun before the table was there ends.

use std::collections::BTreeSet;
use std::fmt;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::str::FromStr;

/// Its name; the family is `inet`.
pub const TABLE: &str = "chutes_agent";

/// The longest name of an interface.
const NAME_BYTES_MAX: usize = 15;

/// Where providers answer questions about a machine, its secrets among the answers: what is link-local (most of them),
/// Alibaba Cloud, Oracle Cloud, Azure, and over IPv6 AWS and Google Cloud.
const METADATA: [&str; 6] = [
    "169.254.0.0/16",
    "100.100.100.200",
    "192.0.0.192",
    "168.63.129.16",
    "fd00:ec2::254",
    "fd20:ce::254",
];

/// What is let through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// Interfaces on which packets of pods come in.
    pub interfaces: Vec<Pattern>,
    /// Networks of pods.
    pub networks: Vec<Network>,
    /// What pods reach on this host.
    pub doors: Vec<Door>,
    /// What pods do not reach around it, beside metadata services.
    pub refused: Vec<Network>,
}

/// The name of an interface, perhaps with any end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// Whether it means this interface.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        match self.0.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => name == self.0,
        }
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = text.strip_suffix('*').unwrap_or(text);
        let inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let pattern = Self(text.to_owned());
        if !(1..=NAME_BYTES_MAX).contains(&name.len()) || !name.chars().all(inside) {
            return Err(format!(
                "{text:?}: write the name of an interface, such as \"cni0\" or \"cali*\""
            ));
        }
        if pattern.matches("lo") {
            return Err(format!(
                "{text:?} is the host's own interface, on which no pod's packets come in"
            ));
        }
        Ok(pattern)
    }
}

/// Addresses that begin alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    first: IpAddr,
    bits: u8,
}

impl Network {
    fn is_ipv4(&self) -> bool {
        self.first.is_ipv4()
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?}: write a network, such as \"10.42.0.0/16\", or an address");
        let (address, bits) = text.split_once('/').map_or((text, None), |(a, b)| (a, Some(b)));
        let first: IpAddr = address.parse().map_err(|_| wrong())?;
        let (width, value) = match first {
            IpAddr::V4(address) => (32, u128::from(u32::from(address)) << 96),
            IpAddr::V6(address) => (128, u128::from(address)),
        };
        let bits = bits.map_or(Ok(width), str::parse).map_err(|_| wrong())?;
        if bits > width {
            return Err(wrong());
        }
        if value.checked_shl(bits.into()).unwrap_or(0) != 0 {
            return Err(format!(
                "{text:?}: the address goes on after the first {bits} bits, which must be all of it"
            ));
        }
        Ok(Self { first, bits })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first, self.bits)
    }
}

/// What speaks there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port that pods reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Door {
    /// What speaks there.
    pub protocol: Protocol,
    /// On which address; on all when absent.
    pub address: Option<IpAddr>,
    /// Which.
    pub port: u16,
}

impl FromStr for Door {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?}: write a protocol and a port, such as \"tcp/3128\" or \"udp/53\"");
        let (protocol, port) = text.split_once('/').ok_or_else(wrong)?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(wrong()),
        };
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(wrong)?;
        Ok(Self {
            protocol,
            address: None,
            port,
        })
    }
}

impl fmt::Display for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(IpAddr::V4(address)) => write!(f, "ip daddr {address} ")?,
            Some(IpAddr::V6(address)) => write!(f, "ip6 daddr {address} ")?,
            None => {}
        }
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        write!(f, "{protocol} dport {}", self.port)
    }
}

/// What removes the table, whether it is there or not.
#[must_use]
pub fn removal() -> String {
    format!("table inet {TABLE}\ndelete table inet {TABLE}\n")
}

impl Rules {
    /// The table, in the place of the one that is there; `trusted` are the addresses of pods that are not filtered.
    #[must_use]
    pub fn text(&self, trusted: &BTreeSet<IpAddr>) -> String {
        let mut text = format!("{}table inet {TABLE} {{\n", removal());
        let (trusted_4, trusted_6) = split(trusted.iter(), |it| it.is_ipv4());
        let (pods_4, pods_6) = split(self.networks.iter(), |it| it.is_ipv4());
        let metadata = METADATA.iter().filter_map(|text| text.parse().ok());
        let refused: Vec<Network> = metadata.chain(self.refused.iter().copied()).collect();
        let (refused_4, refused_6) = split(refused.iter(), |it| it.is_ipv4());
        for (name, kind, elements, ranges) in [
            ("trusted_ipv4", "ipv4_addr", trusted_4, false),
            ("trusted_ipv6", "ipv6_addr", trusted_6, false),
            ("pods_ipv4", "ipv4_addr", pods_4, true),
            ("pods_ipv6", "ipv6_addr", pods_6, true),
            ("refused_ipv4", "ipv4_addr", refused_4, true),
            ("refused_ipv6", "ipv6_addr", refused_6, true),
        ] {
            text += &set(name, kind, &elements, ranges);
        }
        for (chain, hook, begins) in [
            (
                "before_translation",
                "prerouting priority mangle",
                "fib daddr type local jump to_host",
            ),
            ("to_this_host", "input priority filter - 10", "jump to_host"),
        ] {
            let lines = [
                &format!("type filter hook {hook}; policy accept;"),
                "iifname \"lo\" accept",
                begins,
            ];
            text += &self::chain(chain, &lines);
        }
        text += &chain(
            "to_others",
            &[
                "type filter hook forward priority filter - 10; policy accept;",
                "ip daddr @refused_ipv4 jump to_refused",
                "ip6 daddr @refused_ipv6 jump to_refused",
            ],
        );
        text += &self.of_pods("to_host", "of_pod_to_host");
        text += &self.of_pods("to_refused", "of_pod_to_refused");
        // Neighbours find each other, or nothing gets anywhere over IPv6.
        let neighbours = "icmpv6 type { nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert } accept";
        let doors: Vec<String> = self.doors.iter().map(|door| format!("{door} accept")).collect();
        let doors = doors.iter().map(String::as_str);
        let known = [
            "ct direction reply accept",
            "ip saddr @trusted_ipv4 accept",
            "ip6 saddr @trusted_ipv6 accept",
        ];
        let end = "drop";
        let to_host: Vec<&str> = known
            .into_iter()
            .chain([neighbours])
            .chain(doors)
            .chain([end])
            .collect();
        text += &chain("of_pod_to_host", &to_host);
        let to_refused: Vec<&str> = known.into_iter().chain([end]).collect();
        text += &chain("of_pod_to_refused", &to_refused);
        text += "}\n";
        text
    }

    /// A chain that leaves what is of a pod to another one.
    fn of_pods(&self, name: &str, next: &str) -> String {
        let interfaces = self
            .interfaces
            .iter()
            .map(|it| format!("iifname \"{}\" goto {next}", it.0));
        let networks = ["ip saddr @pods_ipv4", "ip6 saddr @pods_ipv6"].map(|it| format!("{it} goto {next}"));
        let lines: Vec<String> = interfaces.chain(networks).collect();
        chain(name, &lines.iter().map(String::as_str).collect::<Vec<_>>())
    }
}

fn split<'a, T: fmt::Display + 'a>(
    all: impl Iterator<Item = &'a T>,
    is_ipv4: fn(&T) -> bool,
) -> (Vec<String>, Vec<String>) {
    let (four, six): (Vec<&T>, Vec<&T>) = all.partition(|it| is_ipv4(it));
    let texts = |these: Vec<&T>| these.into_iter().map(ToString::to_string).collect();
    (texts(four), texts(six))
}

fn set(name: &str, kind: &str, elements: &[String], ranges: bool) -> String {
    let mut text = format!("\tset {name} {{\n\t\ttype {kind}\n");
    if ranges {
        text += "\t\tflags interval\n\t\tauto-merge\n";
    }
    if !elements.is_empty() {
        let _ = writeln!(text, "\t\telements = {{ {} }}", elements.join(", "));
    }
    text + "\t}\n"
}

fn chain(name: &str, lines: &[&str]) -> String {
    let mut text = format!("\tchain {name} {{\n");
    for line in lines {
        let _ = writeln!(text, "\t\t{line}");
    }
    text + "\t}\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `UPDATE_SNAPSHOTS=1` writes it.
    fn check(name: &str, rules: &Rules, trusted: &[&str]) {
        let trusted = trusted.iter().map(|it| it.parse().expect("an address")).collect();
        let text = rules.text(&trusted);
        let path = format!("{}/src/packet_filter/{name}.nft", env!("CARGO_MANIFEST_DIR"));
        if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
            std::fs::write(&path, &text).expect("snapshots can be written");
        }
        let known = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            text == known,
            "{path} is out of date: look at what changes, and UPDATE_SNAPSHOTS=1\n{text}"
        );
    }

    fn read<T: FromStr<Err = String>>(texts: &[&str]) -> Vec<T> {
        texts
            .iter()
            .map(|text| text.parse().expect("well written"))
            .collect()
    }

    #[test]
    fn the_table_is_as_agreed() {
        let least = Rules {
            interfaces: read(&["cni0"]),
            networks: Vec::new(),
            doors: Vec::new(),
            refused: Vec::new(),
        };
        check("least", &least, &[]);
        let mut doors: Vec<Door> = read(&["udp/53", "tcp/53"]);
        let egress = |address: &str| Door {
            protocol: Protocol::Tcp,
            address: Some(address.parse().expect("an address")),
            port: 3128,
        };
        doors.extend([egress("10.42.0.1"), egress("fd00:42::1")]);
        let all = Rules {
            interfaces: read(&["cni0", "cali*"]),
            networks: read(&["10.42.0.0/16", "fd00:42::/48"]),
            doors,
            refused: read(&["192.0.2.0/24", "2001:db8::1"]),
        };
        check("all", &all, &["10.42.0.5", "10.42.0.6", "fd00:42::5"]);
    }

    #[test]
    fn networks_and_doors_are_read_and_nothing_else() {
        for (text, shown) in [
            ("10.42.0.0/16", "10.42.0.0/16"),
            ("192.0.2.1", "192.0.2.1/32"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("fd00:42::/48", "fd00:42::/48"),
            ("::1", "::1/128"),
        ] {
            assert_eq!(
                text.parse::<Network>().map(|it| it.to_string()).as_deref(),
                Ok(shown)
            );
        }
        for bad in [
            "",
            "10.42.0.0/",
            "10.42.0.0/33",
            "::/129",
            "10.42.0.1/16",
            "fd00::1/64",
            "a/8",
            "0.0.0.1/0",
        ] {
            assert!(bad.parse::<Network>().is_err(), "{bad}");
        }
        for bad in [
            "",
            "tcp",
            "tcp/",
            "tcp/0",
            "tcp/65536",
            "sctp/1",
            "TCP/1",
            "tcp/1;drop",
        ] {
            assert!(bad.parse::<Door>().is_err(), "{bad}");
        }
        for bad in ["", "*", "l*", "lo", "a b", "a\"", "a*b", "sixteen-letters-"] {
            assert!(bad.parse::<Pattern>().is_err(), "{bad}");
        }
        assert!(
            "cali*"
                .parse::<Pattern>()
                .is_ok_and(|it| it.matches("cali1") && !it.matches("eth0"))
        );
    }
}
