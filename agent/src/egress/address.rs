//! Classes of IP addresses. Pure.
//!
//! Egress dials only what is [`Class::Public`]. The ranges are those of the IANA special-purpose registries
//! (RFC 6890 and its updates) and the metadata services that clouds document. Addresses that carry an IPv4
//! address inside are judged by what they carry, or refused where nobody needs them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use prometheus_client::encoding::EncodeLabelValue;

/// What an address is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Class {
    /// Anything on the internet.
    Public,
    /// "This host": 0.0.0.0/8 and ::.
    Unspecified,
    /// 127.0.0.0/8 and ::1.
    Loopback,
    /// RFC 1918, unique local and site-local addresses.
    Private,
    /// 169.254.0.0/16 and fe80::/10.
    LinkLocal,
    /// 100.64.0.0/10: shared by a provider's customers.
    Shared,
    /// A cloud's metadata or credential service.
    Metadata,
    /// 224.0.0.0/4 and ff00::/8.
    Multicast,
    /// Examples in documents.
    Documentation,
    /// Benchmarks between devices.
    Benchmarking,
    /// Tunnels that lead wherever someone else says: 6to4, Teredo, IPv4-compatible.
    Transition,
    /// Everything that is not given out.
    Reserved,
    /// This host's own address.
    Own,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Public => "public",
            Self::Unspecified => "unspecified",
            Self::Loopback => "loopback",
            Self::Private => "private",
            Self::LinkLocal => "link-local",
            Self::Shared => "shared (CGNAT)",
            Self::Metadata => "cloud metadata",
            Self::Multicast => "multicast",
            Self::Documentation => "documentation",
            Self::Benchmarking => "benchmarking",
            Self::Transition => "transition tunnel",
            Self::Reserved => "reserved",
            Self::Own => "own",
        })
    }
}

/// Metadata services of clouds: AWS and most others, AWS containers (three), Alibaba, Azure, Oracle.
const METADATA_V4: [Ipv4Addr; 7] = [
    Ipv4Addr::new(169, 254, 169, 254),
    Ipv4Addr::new(169, 254, 169, 253),
    Ipv4Addr::new(169, 254, 170, 2),
    Ipv4Addr::new(169, 254, 170, 23),
    Ipv4Addr::new(100, 100, 100, 200),
    Ipv4Addr::new(168, 63, 129, 16),
    Ipv4Addr::new(192, 0, 0, 192),
];
/// Their IPv6 counterparts: AWS (two), Google.
const METADATA_V6: [Ipv6Addr; 3] = [
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23),
    Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254),
];

/// The class of an address, by its range alone.
#[must_use]
pub fn classify(address: IpAddr) -> Class {
    match address {
        IpAddr::V4(address) => classify_v4(address),
        IpAddr::V6(address) => classify_v6(address),
    }
}

fn classify_v4(address: Ipv4Addr) -> Class {
    if METADATA_V4.contains(&address) {
        return Class::Metadata;
    }
    match address.octets() {
        [0, ..] => Class::Unspecified,
        [10, ..] | [192, 168, ..] | [172, 16..=31, ..] => Class::Private,
        [127, ..] => Class::Loopback,
        [169, 254, ..] => Class::LinkLocal,
        [100, 64..=127, ..] => Class::Shared,
        [192, 0, 2, _] | [198, 51, 100, _] | [203, 0, 113, _] => Class::Documentation,
        [192, 0, 0, _] => Class::Reserved,
        [192, 88, 99, _] => Class::Transition,
        [198, 18..=19, ..] => Class::Benchmarking,
        [224..=239, ..] => Class::Multicast,
        [240..=255, ..] => Class::Reserved,
        _ => Class::Public,
    }
}

fn classify_v6(address: Ipv6Addr) -> Class {
    if METADATA_V6.contains(&address) {
        return Class::Metadata;
    }
    let s = address.segments();
    let embedded = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        classify_v4(Ipv4Addr::new(a, b, c, d))
    };
    match s {
        [0, 0, 0, 0, 0, 0, 0, 0] => Class::Unspecified,
        [0, 0, 0, 0, 0, 0, 0, 1] => Class::Loopback,
        // IPv4-mapped: the socket would speak IPv4 to what is inside.
        [0, 0, 0, 0, 0, 0xffff, high, low] => embedded(high, low),
        // NAT64's well-known prefix: a translator speaks IPv4 to what is inside.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => embedded(high, low),
        [0x64, 0xff9b, 1, ..] => Class::Private,
        [0, 0, 0, 0, 0, 0, ..] | [0, 0, 0, 0, 0xffff, 0, ..] => Class::Transition,
        [0x2002, ..] | [0x2001, 0, ..] => Class::Transition,
        [0x2001, 0xdb8, ..] | [0x3fff, 0..=0xfff, ..] => Class::Documentation,
        [0x2001, 2, 0, ..] => Class::Benchmarking,
        [0x2001, 0..=0x1ff, ..] => Class::Reserved,
        [0xfc00..=0xfdff, ..] | [0xfec0..=0xfeff, ..] => Class::Private,
        [0xfe80..=0xfebf, ..] => Class::LinkLocal,
        [0xff00..=0xffff, ..] => Class::Multicast,
        // ISATAP hides an IPv4 address in its last 32 bits, under any prefix.
        [0x2000..=0x3fff, _, _, _, 0 | 0x200, 0x5efe, ..] => Class::Transition,
        [0x2000..=0x3fff, ..] => Class::Public,
        _ => Class::Reserved,
    }
}

/// An address that may be dialled: made by [`check`] alone, so that nothing unchecked reaches a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Checked(SocketAddr);

impl Checked {
    /// The address.
    #[must_use]
    pub fn socket_addr(self) -> SocketAddr {
        self.0
    }
}

/// Lets an address pass if it is public and not among `own`, this host's known addresses.
///
/// # Errors
/// Its class, when that is not [`Class::Public`].
pub fn check(address: IpAddr, port: u16, own: &[IpAddr]) -> Result<Checked, Class> {
    let address = address.to_canonical();
    match classify(address) {
        Class::Public if own.iter().any(|known| known.to_canonical() == address) => Err(Class::Own),
        Class::Public => Ok(Checked(SocketAddr::new(address, port))),
        class => Err(class),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_has_its_ranges() {
        for (text, expected) in [
            ("8.8.8.8", Class::Public),
            ("1.1.1.1", Class::Public),
            ("172.15.255.255", Class::Public),
            ("172.32.0.0", Class::Public),
            ("100.63.255.255", Class::Public),
            ("100.128.0.0", Class::Public),
            ("192.0.1.1", Class::Public),
            ("223.255.255.255", Class::Public),
            ("0.0.0.0", Class::Unspecified),
            ("0.1.2.3", Class::Unspecified),
            ("10.0.0.1", Class::Private),
            ("10.255.255.255", Class::Private),
            ("172.16.0.1", Class::Private),
            ("172.31.255.255", Class::Private),
            ("192.168.1.1", Class::Private),
            ("127.0.0.1", Class::Loopback),
            ("127.255.255.254", Class::Loopback),
            ("169.254.0.1", Class::LinkLocal),
            ("169.254.169.254", Class::Metadata),
            ("169.254.170.2", Class::Metadata),
            ("100.100.100.200", Class::Metadata),
            ("168.63.129.16", Class::Metadata),
            ("192.0.0.192", Class::Metadata),
            ("100.64.0.1", Class::Shared),
            ("100.127.255.255", Class::Shared),
            ("192.0.0.1", Class::Reserved),
            ("192.0.2.1", Class::Documentation),
            ("198.51.100.7", Class::Documentation),
            ("203.0.113.9", Class::Documentation),
            ("192.88.99.1", Class::Transition),
            ("198.18.0.1", Class::Benchmarking),
            ("198.19.255.255", Class::Benchmarking),
            ("224.0.0.1", Class::Multicast),
            ("239.255.255.255", Class::Multicast),
            ("240.0.0.1", Class::Reserved),
            ("255.255.255.255", Class::Reserved),
            ("2606:4700::1111", Class::Public),
            ("2a00:1450::1", Class::Public),
            ("2001:4860:4860::8888", Class::Public),
            ("::", Class::Unspecified),
            ("::1", Class::Loopback),
            ("::2", Class::Transition),
            ("::7f00:1", Class::Transition),
            ("::ffff:127.0.0.1", Class::Loopback),
            ("::ffff:10.0.0.1", Class::Private),
            ("::ffff:169.254.169.254", Class::Metadata),
            ("::ffff:8.8.8.8", Class::Public),
            ("::ffff:0:127.0.0.1", Class::Transition),
            ("64:ff9b::7f00:1", Class::Loopback),
            ("64:ff9b::a9fe:a9fe", Class::Metadata),
            ("64:ff9b::808:808", Class::Public),
            ("64:ff9b:1::808:808", Class::Private),
            ("2002:7f00:1::", Class::Transition),
            ("2002:808:808::", Class::Transition),
            ("2001::1", Class::Transition),
            ("2001:2::1", Class::Benchmarking),
            ("2001:20::1", Class::Reserved),
            ("2001:db8::1", Class::Documentation),
            ("3fff::1", Class::Documentation),
            ("2a00:1450::5efe:7f00:1", Class::Transition),
            ("fc00::1", Class::Private),
            ("fd12:3456::1", Class::Private),
            ("fec0::1", Class::Private),
            ("fd00:ec2::254", Class::Metadata),
            ("fe80::1", Class::LinkLocal),
            ("ff02::1", Class::Multicast),
            ("100::1", Class::Reserved),
            ("5f00::1", Class::Reserved),
            ("4000::1", Class::Reserved),
            ("f000::1", Class::Reserved),
        ] {
            let address: IpAddr = text.parse().expect("an address");
            assert_eq!(classify(address), expected, "{text}");
        }
    }

    #[test]
    fn own_addresses_are_refused_in_either_spelling() {
        let own = ["8.8.4.4".parse().expect("an address")];
        for text in ["8.8.4.4", "::ffff:8.8.4.4"] {
            assert_eq!(
                check(text.parse().expect("an address"), 443, &own),
                Err(Class::Own),
                "{text}"
            );
        }
        let other = check("::ffff:8.8.8.8".parse().expect("an address"), 443, &own);
        assert_eq!(
            other.map(Checked::socket_addr),
            Ok("8.8.8.8:443".parse().expect("an address"))
        );
    }
}
