//! What is in a pod's network namespace: interfaces, addresses, routes, neighbours, as CNI (or
//! Docker, or `ctr --cni`) left them. Reads only.

use std::{collections::HashMap, net::IpAddr};

use futures_util::TryStreamExt;
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::{
        address::{AddressAttribute, AddressFlags, AddressMessage},
        link::{LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
        route::{
            RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
            RouteProtocol, RouteType, RouteVia,
        },
    },
};
use sealpod_protocol::agent;
use tracing::warn;

use super::Error;

/// `NUD_PERMANENT` of linux/neighbour.h.
const NUD_PERMANENT: u32 = 0x80;
/// `RT_SCOPE_LINK` of linux/rtnetlink.h.
const SCOPE_LINK: u32 = 253;

/// An interface that the guest gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// In the namespace.
    pub index: u32,
    /// In the namespace, and wanted in the guest.
    pub name: String,
    /// What made it: `veth`, `macvlan`, …; empty for a physical device.
    pub kind: String,
    /// Hardware address, unicast.
    pub mac: [u8; 6],
    /// Bytes.
    pub mtu: u32,
    /// The interface does not use ARP.
    pub noarp: bool,
    /// CIDR.
    pub addresses: Vec<String>,
}

/// A namespace at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    /// In order of their index, which is the order in which they were made.
    pub links: Vec<Link>,
    /// Of the main table, those that the kernel does not make by itself from the addresses.
    pub routes: Vec<agent::Route>,
    /// Permanent entries.
    pub neighbours: Vec<agent::Neighbour>,
}

/// Reads the namespace that `netlink` belongs to, without the interfaces in `ignore` (our taps).
///
/// # Errors
/// [`Error::Unsupported`] for an interface that is up and cannot be given to a VM;
/// [`Error::Netlink`].
pub(super) async fn snapshot(netlink: &Handle, ignore: &[u32]) -> Result<Snapshot, Error> {
    let failed = |source| Error::Netlink {
        doing: "reading the pod's network",
        source,
    };
    let messages: Vec<LinkMessage> = netlink
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(failed)?;
    let mut links = Vec::new();
    for message in messages {
        if !ignore.contains(&message.header.index) {
            links.extend(link(message)?);
        }
    }
    links.sort_by_key(|l| l.index);
    if links.is_empty() {
        return Ok(Snapshot::default());
    }

    let mut routes = Vec::new();
    let addresses: Vec<AddressMessage> = netlink
        .address()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(failed)?;
    for message in addresses {
        if let Some(link) = links.iter_mut().find(|l| l.index == message.header.index) {
            let (address, peer) = address(&message);
            link.addresses.extend(address);
            routes.extend(peer.map(|destination| agent::Route {
                destination,
                interface: link.name.clone(),
                scope: SCOPE_LINK,
                ..Default::default()
            }));
        }
    }

    let names: HashMap<u32, String> = links.iter().map(|l| (l.index, l.name.clone())).collect();
    for family in [
        RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
        RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
    ] {
        let messages: Vec<RouteMessage> = netlink
            .route()
            .get(family)
            .execute()
            .try_collect()
            .await
            .map_err(failed)?;
        routes.extend(messages.iter().filter_map(|m| route(m, &names)));
    }

    let messages: Vec<NeighbourMessage> = netlink
        .neighbours()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(failed)?;
    let neighbours = messages
        .iter()
        .filter_map(|m| neighbour(m, &names))
        .collect();
    Ok(Snapshot {
        links,
        routes,
        neighbours,
    })
}

/// An interface that the guest gets; none for one that is down, is loopback, or is a port of another
/// one (a bridge's, a bond's), which then stands for it.
fn link(message: LinkMessage) -> Result<Option<Link>, Error> {
    let header = message.header;
    let (mut name, mut kind, mut mac, mut mtu) = (String::new(), String::new(), Vec::new(), 1500);
    let (mut is_port, mut lower, mut lower_elsewhere) = (false, false, false);
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(v) => name = v,
            LinkAttribute::Address(v) => mac = v,
            LinkAttribute::Mtu(v) => mtu = v,
            LinkAttribute::Controller(_) => is_port = true,
            LinkAttribute::Link(v) => lower = v != 0 && v != header.index,
            LinkAttribute::LinkNetNsId(_) => lower_elsewhere = true,
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Kind(v) = info {
                        kind = v.to_string();
                    }
                }
            }
            _ => {}
        }
    }
    if is_port
        || !header.flags.contains(LinkFlags::Up)
        || header.flags.contains(LinkFlags::Loopback)
    {
        return Ok(None);
    }
    let refuse = |why| {
        Err(Error::Unsupported {
            name: name.clone(),
            kind: kind.clone(),
            why,
        })
    };
    if header.link_layer_type != LinkLayerType::Ether {
        return refuse("it does not carry Ethernet frames");
    }
    if kind == "tun" {
        return refuse("it is a tap, whose far end is a program and not a network");
    }
    if lower && !lower_elsewhere && kind != "veth" {
        return refuse("it is stacked on an interface of the same namespace");
    }
    let mac: [u8; 6] = match <[u8; 6]>::try_from(mac) {
        Ok(mac) if mac != [0; 6] && mac[0] & 1 == 0 => mac,
        _ => return refuse("it has no unicast hardware address"),
    };
    Ok(Some(Link {
        index: header.index,
        name,
        kind,
        mac,
        mtu,
        noarp: header.flags.contains(LinkFlags::Noarp),
        addresses: Vec::new(),
    }))
}

/// The address as CIDR, and the far end's where it is a point-to-point address. Nothing for
/// addresses that the guest's kernel finds by itself: link-local ones and those from router
/// advertisements.
fn address(message: &AddressMessage) -> (Option<String>, Option<String>) {
    let (mut address, mut local, mut permanent) = (None, None, true);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(a) => address = Some(*a),
            AddressAttribute::Local(a) => local = Some(*a),
            AddressAttribute::Flags(f) => permanent = f.contains(AddressFlags::Permanent),
            _ => {}
        }
    }
    let prefix = message.header.prefix_len;
    let own = local.or(address);
    let link_local = matches!(own, Some(IpAddr::V6(a)) if a.is_unicast_link_local());
    match (own, address) {
        _ if link_local => (None, None),
        // A lease that some DHCP client in the namespace renews is IPv4, and is kept.
        (Some(IpAddr::V6(_)), _) if !permanent => (None, None),
        (Some(own), Some(peer)) if own != peer => {
            let host = if own.is_ipv4() { 32 } else { 128 };
            let network = mask(peer, prefix);
            (
                Some(format!("{own}/{host}")),
                Some(format!("{network}/{prefix}")),
            )
        }
        (Some(own), _) => (Some(format!("{own}/{prefix}")), None),
        (None, _) => (None, None),
    }
}

/// `address` with everything after its first `prefix` bits cleared.
fn mask(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(a) => {
            let keep = u32::MAX.checked_shl(32 - u32::from(prefix.min(32)));
            (a.to_bits() & keep.unwrap_or(0)).to_be_bytes().into()
        }
        IpAddr::V6(a) => {
            let keep = u128::MAX.checked_shl(128 - u32::from(prefix.min(128)));
            (a.to_bits() & keep.unwrap_or(0)).to_be_bytes().into()
        }
    }
}

fn route(message: &RouteMessage, names: &HashMap<u32, String>) -> Option<agent::Route> {
    let header = &message.header;
    let by_kernel = matches!(header.protocol, RouteProtocol::Kernel | RouteProtocol::Ra);
    if by_kernel || header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let mut table = u32::from(header.table);
    let mut route = agent::Route {
        scope: u8::from(header.scope).into(),
        onlink: header.flags.contains(RouteFlags::Onlink),
        ..Default::default()
    };
    let mut oif = None;
    let mut next_hops = 0;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(v) => table = *v,
            RouteAttribute::Destination(a) => route.destination = text(a)?,
            RouteAttribute::Gateway(a) => route.gateway = text(a)?,
            RouteAttribute::Via(RouteVia::Inet(a)) => route.gateway = a.to_string(),
            RouteAttribute::Via(RouteVia::Inet6(a)) => route.gateway = a.to_string(),
            RouteAttribute::PrefSource(a) => route.source = text(a)?,
            RouteAttribute::Oif(v) => oif = Some(*v),
            RouteAttribute::Priority(v) => route.metric = *v,
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    if let RouteMetric::Mtu(v) = metric {
                        route.mtu = *v;
                    }
                }
            }
            RouteAttribute::MultiPath(hops) => {
                next_hops = hops.len();
                let first = hops.first()?;
                oif = Some(first.interface_index);
                for attribute in &first.attributes {
                    if let RouteAttribute::Gateway(a) = attribute {
                        route.gateway = text(a)?;
                    }
                }
            }
            _ => {}
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) {
        return None;
    }
    if route.destination.is_empty() {
        let v6 = u8::from(header.address_family) == libc::AF_INET6 as u8;
        route.destination = if v6 { "::" } else { "0.0.0.0" }.into();
    }
    route.destination = format!("{}/{}", route.destination, header.destination_prefix_length);
    if header.kind != RouteType::Unicast {
        if !matches!(header.kind, RouteType::Multicast | RouteType::Local) {
            warn!(destination = route.destination, kind = ?header.kind,
                "The guest does not get a route of this kind");
        }
        return None;
    }
    if next_hops > 1 {
        warn!(
            destination = route.destination,
            next_hops, "The guest gets only the first next hop of a multipath route"
        );
    }
    route.interface = names.get(&oif?)?.clone();
    Some(route)
}

fn text(address: &RouteAddress) -> Option<String> {
    match address {
        RouteAddress::Inet(a) => Some(a.to_string()),
        RouteAddress::Inet6(a) => Some(a.to_string()),
        _ => None,
    }
}

fn neighbour(message: &NeighbourMessage, names: &HashMap<u32, String>) -> Option<agent::Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut neighbour = agent::Neighbour {
        interface: names.get(&message.header.ifindex)?.clone(),
        state: NUD_PERMANENT,
        ..Default::default()
    };
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(a)) => {
                neighbour.address = a.to_string();
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(a)) => {
                neighbour.address = a.to_string();
            }
            NeighbourAttribute::LinkLayerAddress(v) => {
                neighbour.hardware_address = super::mac_text(v.as_slice().try_into().ok()?);
            }
            _ => {}
        }
    }
    let complete = !neighbour.address.is_empty() && !neighbour.hardware_address.is_empty();
    complete.then_some(neighbour)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn far_end_of_a_point_to_point_address_becomes_a_route() {
        let mut message = AddressMessage::default();
        message.header.prefix_len = 24;
        message.attributes = vec![
            AddressAttribute::Address("10.1.2.9".parse().expect("ip")),
            AddressAttribute::Local("10.9.9.9".parse().expect("ip")),
        ];
        let both = (Some("10.9.9.9/32".into()), Some("10.1.2.0/24".into()));
        assert_eq!(address(&message), both);
    }

    #[test]
    fn masks_at_both_ends_of_the_range() {
        let v4 = |p| mask("10.1.2.3".parse().expect("ip"), p).to_string();
        assert_eq!([v4(0), v4(8), v4(32)], ["0.0.0.0", "10.0.0.0", "10.1.2.3"]);
        let v6 = |p| mask("fd00::1".parse().expect("ip"), p).to_string();
        assert_eq!([v6(0), v6(16), v6(128)], ["::", "fd00::", "fd00::1"]);
    }
}
