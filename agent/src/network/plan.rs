//! The network as the shim asks for it, checked. Translation only.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sealpod_protocol::agent;

/// Longest interface name, bytes (IFNAMSIZ less its NUL).
const NAME_MAX: usize = 15;
/// Most interfaces, and most addresses, routes or neighbours in all.
const LIST_MAX: usize = 1024;

/// A network that cannot be meant.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    /// A value of the wrong form.
    #[error("{what} {value:?}: expected {expected}")]
    Value {
        /// Which field.
        what: &'static str,
        /// As given.
        value: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// Two interfaces that cannot both be.
    #[error("Two interfaces have the {what} {value:?}")]
    Twice {
        /// Which field.
        what: &'static str,
        /// As given.
        value: String,
    },
    /// Too many.
    #[error("More than {LIST_MAX} {0}")]
    TooMany(&'static str),
}

/// An address and the length of its network's prefix.
pub(super) type Cidr = (IpAddr, u8);

/// The whole network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Interfaces, with different names and hardware addresses.
    pub interfaces: Vec<Interface>,
    /// Routes: those without a gateway first, which the others may need.
    pub routes: Vec<Route>,
    /// Neighbours.
    pub neighbours: Vec<Neighbour>,
}

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Hardware address, as wanted.
    pub mac: [u8; 6],
    /// Name, as wanted.
    pub name: String,
    /// 0: left alone.
    pub mtu: u32,
    /// Its addresses.
    pub addresses: Vec<Cidr>,
    /// Which of the guest's interfaces it is, when none has the hardware address yet.
    pub position: usize,
    /// Without address resolution.
    pub noarp: bool,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Where to.
    pub destination: Cidr,
    /// Over whom; none: directly.
    pub gateway: Option<IpAddr>,
    /// Name of its interface.
    pub interface: String,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// RT_SCOPE_*.
    pub scope: u8,
    /// 0: none.
    pub metric: u32,
    /// The gateway is reached directly whatever the addresses say.
    pub onlink: bool,
    /// 0: none.
    pub mtu: u32,
}

/// A neighbour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Its address.
    pub address: IpAddr,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Name of the interface that leads to it.
    pub interface: String,
    /// NUD_*.
    pub state: u16,
}

fn bad(what: &'static str, value: &str, expected: &'static str) -> PlanError {
    PlanError::Value {
        what,
        value: value.chars().take(64).collect(),
        expected,
    }
}

fn mac(text: &str) -> Result<[u8; 6], PlanError> {
    let bad = || bad("Hardware address", text, "aa:bb:cc:dd:ee:ff");
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let hex = |p: &&str| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit());
        let part = parts.next().filter(hex).ok_or_else(bad)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
    }
    match parts.next() {
        None => Ok(mac),
        Some(_) => Err(bad()),
    }
}

fn ip(what: &'static str, text: &str) -> Result<IpAddr, PlanError> {
    text.parse()
        .map_err(|_| bad(what, text, "an IPv4 or IPv6 address"))
}

fn optional_ip(what: &'static str, text: &str) -> Result<Option<IpAddr>, PlanError> {
    (!text.is_empty()).then(|| ip(what, text)).transpose()
}

fn cidr(what: &'static str, text: &str) -> Result<Cidr, PlanError> {
    let bad = || bad(what, text, "address/prefix length");
    let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
    let address: IpAddr = address.parse().map_err(|_| bad())?;
    let prefix: u8 = prefix.parse().map_err(|_| bad())?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    if prefix > most {
        return Err(bad());
    }
    Ok((address, prefix))
}

fn name(text: &str) -> Result<String, PlanError> {
    let good = |b: u8| b.is_ascii_graphic() && !matches!(b, b'/' | b':');
    if text.is_empty()
        || text.len() > NAME_MAX
        || !text.bytes().all(good)
        || matches!(text, "." | ".." | "lo")
    {
        return Err(bad(
            "Interface name",
            text,
            "1 to 15 printable bytes without / and :, not lo",
        ));
    }
    Ok(text.into())
}

impl TryFrom<&agent::Network> for Plan {
    type Error = PlanError;

    fn try_from(network: &agent::Network) -> Result<Self, PlanError> {
        for (what, count) in [
            ("interfaces", network.interfaces.len()),
            ("routes", network.routes.len()),
            ("neighbours", network.neighbours.len()),
        ] {
            if count > LIST_MAX {
                return Err(PlanError::TooMany(what));
            }
        }
        let interfaces: Vec<_> = network
            .interfaces
            .iter()
            .map(interface)
            .collect::<Result<_, _>>()?;
        for (n, one) in interfaces.iter().enumerate() {
            for other in &interfaces[..n] {
                let (what, value) = match () {
                    () if one.name == other.name => ("name", one.name.clone()),
                    () if one.mac == other.mac => ("hardware address", format!("{:02x?}", one.mac)),
                    () if one.position == other.position => ("position", one.position.to_string()),
                    () => continue,
                };
                return Err(PlanError::Twice { what, value });
            }
        }
        let mut routes: Vec<_> = network.routes.iter().map(route).collect::<Result<_, _>>()?;
        routes.sort_by_key(|route| route.gateway.is_some());
        Ok(Self {
            interfaces,
            routes,
            neighbours: network
                .neighbours
                .iter()
                .map(neighbour)
                .collect::<Result<_, _>>()?,
        })
    }
}

fn interface(i: &agent::Interface) -> Result<Interface, PlanError> {
    if i.addresses.len() > LIST_MAX {
        return Err(PlanError::TooMany("addresses"));
    }
    Ok(Interface {
        mac: mac(&i.hardware_address)?,
        name: name(&i.name)?,
        mtu: i.mtu,
        addresses: i
            .addresses
            .iter()
            .map(|a| cidr("Address", a))
            .collect::<Result<_, _>>()?,
        position: i.position as usize,
        noarp: i.noarp,
    })
}

fn route(r: &agent::Route) -> Result<Route, PlanError> {
    let gateway = optional_ip("Gateway", &r.gateway)?;
    let destination = match r.destination.as_str() {
        "" => match gateway {
            Some(IpAddr::V6(_)) => (Ipv6Addr::UNSPECIFIED.into(), 0),
            _ => (Ipv4Addr::UNSPECIFIED.into(), 0),
        },
        text => cidr("Route destination", text)?,
    };
    let scope =
        u8::try_from(r.scope).map_err(|_| bad("Route scope", &r.scope.to_string(), "0 to 255"))?;
    Ok(Route {
        destination,
        gateway,
        interface: name(&r.interface)?,
        source: optional_ip("Route source", &r.source)?,
        scope,
        metric: r.metric,
        onlink: r.onlink,
        mtu: r.mtu,
    })
}

fn neighbour(n: &agent::Neighbour) -> Result<Neighbour, PlanError> {
    Ok(Neighbour {
        address: ip("Neighbour", &n.address)?,
        mac: mac(&n.hardware_address)?,
        interface: name(&n.interface)?,
        state: u16::try_from(n.state)
            .map_err(|_| bad("Neighbour state", &n.state.to_string(), "NUD_*"))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(name: &str, mac: &str, address: &str) -> agent::Network {
        let mut network = agent::Network::new();
        network.interfaces.push(agent::Interface {
            name: name.into(),
            hardware_address: mac.into(),
            addresses: vec![address.into()],
            mtu: 1450,
            ..Default::default()
        });
        network
    }

    #[test]
    fn gateways_come_after_the_routes_that_lead_to_them() {
        let mut network = network("eth0", "02:00:00:00:00:01", "10.88.0.5/16");
        for (destination, gateway) in [
            ("0.0.0.0/0", "10.88.0.1"),
            ("10.88.0.1/32", ""),
            ("::/0", "fe80::1"),
        ] {
            network.routes.push(agent::Route {
                destination: destination.into(),
                gateway: gateway.into(),
                interface: "eth0".into(),
                ..Default::default()
            });
        }
        let plan = Plan::try_from(&network).expect("valid");
        assert_eq!(
            plan.routes[0].destination,
            (Ipv4Addr::new(10, 88, 0, 1).into(), 32)
        );
        assert!(plan.routes[1..].iter().all(|r| r.gateway.is_some()));
        assert_eq!(plan.interfaces[0].mac, [2, 0, 0, 0, 0, 1]);
    }

    #[test]
    fn values_that_are_none_are_refused_by_name() {
        let good = ("eth0", "02:00:00:00:00:01", "10.0.0.1/8");
        for (name, mac, address) in [
            ("", good.1, good.2),
            ("lo", good.1, good.2),
            ("a/b", good.1, good.2),
            ("sixteen-bytes-xx", good.1, good.2),
            (good.0, "02:00:00:00:00", good.2),
            (good.0, "02:00:00:00:00:01:02", good.2),
            (good.0, "02:00:00:00:00:+1", good.2),
            (good.0, good.1, "10.0.0.1"),
            (good.0, good.1, "10.0.0.1/33"),
            (good.0, good.1, "::1/129"),
            (good.0, good.1, "x/8"),
        ] {
            let error = Plan::try_from(&network(name, mac, address)).expect_err("refused");
            assert!(matches!(error, PlanError::Value { .. }), "{error}");
        }
    }

    #[test]
    fn two_interfaces_of_one_name_are_refused() {
        let mut twice = network("eth0", "02:00:00:00:00:01", "10.0.0.1/8");
        let mut second = twice.interfaces[0].clone();
        second.hardware_address = "02:00:00:00:00:02".into();
        twice.interfaces.push(second);
        let error = Plan::try_from(&twice).expect_err("refused");
        assert_eq!(error.to_string(), "Two interfaces have the name \"eth0\"");
    }
}
