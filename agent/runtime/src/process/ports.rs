//! Picks the external ports of a workload: free ones of the configured range, none given out twice.
//!
//! There is no address translation as on Kubernetes: the chute itself binds the external port. The range
//! lies below the kernel's ephemeral ports, so that no outgoing connection takes one in the meantime.

use std::collections::BTreeSet;
use std::net::{IpAddr, TcpListener, UdpSocket};
use std::ops::RangeInclusive;

use protocol::workload::{Port, PortMapping, PortProtocol};

/// Finds an external port for each wanted one, or nothing when the range has no more.
pub(crate) fn choose(
    range: RangeInclusive<u16>,
    host: IpAddr,
    wanted: &[Port],
    taken: &BTreeSet<u16>,
) -> Option<Vec<PortMapping>> {
    let mut candidates = range.filter(|port| !taken.contains(port));
    let mapping = |port: &Port| {
        let external = candidates.find(|external| is_free(host, *external, port.protocol))?;
        Some(PortMapping {
            internal: port.internal,
            external,
            protocol: port.protocol,
        })
    };
    wanted.iter().map(mapping).collect()
}

fn is_free(host: IpAddr, port: u16, protocol: PortProtocol) -> bool {
    match protocol {
        PortProtocol::Tcp | PortProtocol::Http => TcpListener::bind((host, port)).is_ok(),
        PortProtocol::Udp => UdpSocket::bind((host, port)).is_ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn used_and_promised_ports_are_passed_over() {
        let host = IpAddr::V4(Ipv4Addr::new(127, 0, 77, 1));
        let tcp = |internal| Port {
            internal,
            protocol: PortProtocol::Tcp,
        };
        let _used = TcpListener::bind((host, 31_500)).expect("nobody else uses this address");
        let taken = BTreeSet::from([31_501]);
        let externals = |range, wanted: &[Port]| {
            choose(range, host, wanted, &taken)
                .map(|list| list.iter().map(|port| port.external).collect::<Vec<_>>())
        };
        assert_eq!(
            externals(31_500..=31_504, &[tcp(8000), tcp(8001)]),
            Some(vec![31_502, 31_503])
        );
        assert_eq!(externals(31_500..=31_502, &[tcp(8000), tcp(8001)]), None);
        assert_eq!(externals(31_500..=31_501, &[]), Some(Vec::new()));
    }
}
