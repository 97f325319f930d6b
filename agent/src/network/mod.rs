//! The guest's network, by rtnetlink: interfaces found, named, addressed and brought up, then routes and
//! neighbours. Repeating a set-up changes only what differs, so that connections live through it.

mod links;
mod plan;

pub use plan::{Plan, PlanError};

use std::net::IpAddr;

use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags};
use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteMetric, RouteScope};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};

use crate::uevent;
use links::Link;
use plan::{Interface, Neighbour, Route};

/// Index of the loopback interface in a network namespace.
const LOOPBACK: u32 = 1;

/// A network that could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// What was asked for cannot be meant.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// No socket to the kernel.
    #[error("Netlink: {0}")]
    Socket(#[from] std::io::Error),
    /// The kernel refused a step.
    #[error("{what}: {source}")]
    Step {
        /// Which.
        what: String,
        /// Why.
        source: rtnetlink::Error,
    },
    /// No such device in the guest.
    #[error(
        "Interface {name}: no network device with hardware address {mac} or at position {position} \
         appeared within {} s",
        uevent::TIMEOUT.as_secs()
    )]
    NoDevice {
        /// Wanted name.
        name: String,
        /// Wanted address.
        mac: String,
        /// Wanted position.
        position: usize,
    },
    /// A route or neighbour names an interface that is not there.
    #[error("{what} names the interface {name:?}, which is not one of the network's")]
    NoInterface {
        /// What does.
        what: &'static str,
        /// The name.
        name: String,
    },
}

trait Step<T> {
    fn step(self, what: impl FnOnce() -> String) -> Result<T, NetworkError>;
}

impl<T> Step<T> for Result<T, rtnetlink::Error> {
    fn step(self, what: impl FnOnce() -> String) -> Result<T, NetworkError> {
        self.map_err(|source| NetworkError::Step {
            what: what(),
            source,
        })
    }
}

/// The network as it was last set up.
#[derive(Debug, Default)]
pub struct Network {
    now: Plan,
}

impl Network {
    /// Brings the loopback interface up and makes the network be `plan`.
    ///
    /// # Errors
    /// [`NetworkError`]; what was done before the failing step stays, and a repetition goes on from
    /// there.
    pub async fn configure(&mut self, plan: Plan) -> Result<(), NetworkError> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        let connection = tokio::spawn(connection);
        let done = self.apply(&handle, plan).await;
        connection.abort();
        done
    }

    async fn apply(&mut self, handle: &Handle, plan: Plan) -> Result<(), NetworkError> {
        let up = LinkUnspec::new_with_index(LOOPBACK).up().build();
        let change = handle.link().change(up).execute().await;
        change.step(|| "Bring up the loopback interface".into())?;

        let before = std::mem::take(&mut self.now);
        let links = links::find(&plan.interfaces).await?;
        for gone in &before.interfaces {
            if !plan.interfaces.iter().any(|i| i.mac == gone.mac) {
                links::retire(handle, gone).await?;
            }
        }
        let changed: Vec<bool> = plan
            .interfaces
            .iter()
            .map(|interface| !before.interfaces.contains(interface))
            .collect();
        links::rename(handle, &plan.interfaces, &links).await?;
        for ((interface, link), changed) in plan.interfaces.iter().zip(&links).zip(&changed) {
            if *changed {
                self::interface(handle, interface, link).await?;
            }
        }
        let index = |what, name: &str| {
            let at = plan.interfaces.iter().position(|i| i.name == name);
            at.map(|at| links[at].index)
                .ok_or_else(|| NetworkError::NoInterface {
                    what,
                    name: name.into(),
                })
        };
        for old in before.routes.iter().filter(|r| !plan.routes.contains(r)) {
            if let Ok(index) = index("route", &old.interface) {
                // It may have gone with its interface's addresses.
                let _ = handle.route().del(route(old, index)).execute().await;
            }
        }
        for new in &plan.routes {
            let message = route(new, index("A route", &new.interface)?);
            let add = handle.route().add(message).replace().execute().await;
            add.step(|| format!("Add route {new:?}"))?;
        }
        for new in &plan.neighbours {
            let index = index("A neighbour", &new.interface)?;
            neighbour(handle, new, index).await?;
        }
        self.now = plan;
        Ok(())
    }
}

/// Makes an interface be as wanted, from whatever it is.
async fn interface(handle: &Handle, wanted: &Interface, link: &Link) -> Result<(), NetworkError> {
    let name = &wanted.name;
    let mut message = LinkUnspec::new_with_index(link.index).down();
    if link.mac != wanted.mac {
        message = message.address(wanted.mac.to_vec());
    }
    if wanted.mtu != 0 {
        message = message.mtu(wanted.mtu);
    }
    if wanted.noarp {
        message = message.arp(false);
    }
    let change = handle.link().change(message.build()).execute().await;
    change.step(|| format!("Set up interface {name} (mtu {})", wanted.mtu))?;
    links::flush(handle, link.index)
        .await
        .step(|| format!("Clear addresses of {name}"))?;
    for (address, prefix) in &wanted.addresses {
        let mut add = handle
            .address()
            .add(link.index, *address, *prefix)
            .replace();
        if address.is_ipv6() {
            // Usable at once: the address was the pod's before it was the guest's.
            let message = add.message_mut();
            message.header.flags |= AddressHeaderFlags::Nodad;
            message
                .attributes
                .push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        let add = add.execute().await;
        add.step(|| format!("Add address {address}/{prefix} to {name}"))?;
    }
    let up = LinkUnspec::new_with_index(link.index).up().build();
    let change = handle.link().change(up).execute().await;
    change.step(|| format!("Bring up interface {name}"))
}

fn route(route: &Route, index: u32) -> RouteMessage {
    let mut message = RouteMessageBuilder::<IpAddr>::new().output_interface(index);
    message = message.scope(RouteScope::from(route.scope));
    if route.metric != 0 {
        message = message.priority(route.metric);
    }
    if route.onlink {
        message = message.onlink();
    }
    let mut message = message.build();
    let (destination, prefix) = route.destination;
    message.header.address_family = match destination {
        IpAddr::V4(_) => rtnetlink::packet_route::AddressFamily::Inet,
        IpAddr::V6(_) => rtnetlink::packet_route::AddressFamily::Inet6,
    };
    message.header.destination_prefix_length = prefix;
    let attributes = &mut message.attributes;
    if prefix != 0 {
        attributes.push(RouteAttribute::Destination(destination.into()));
    }
    attributes.extend(match (destination, route.gateway) {
        (_, None) => None,
        // RFC 5549: an IPv4 route over an IPv6 gateway.
        (IpAddr::V4(_), Some(IpAddr::V6(gateway))) => Some(RouteAttribute::Via(
            rtnetlink::packet_route::route::RouteVia::Inet6(gateway),
        )),
        (_, Some(gateway)) => Some(RouteAttribute::Gateway(gateway.into())),
    });
    attributes.extend(route.source.map(|s| RouteAttribute::PrefSource(s.into())));
    if route.mtu != 0 {
        attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]));
    }
    message
}

async fn neighbour(handle: &Handle, new: &Neighbour, index: u32) -> Result<(), NetworkError> {
    let add = handle
        .neighbours()
        .add(index, new.address)
        .link_layer_address(&new.mac);
    let state = match NeighbourState::from(new.state) {
        NeighbourState::None => NeighbourState::Permanent,
        state => state,
    };
    let add = add.state(state).replace().execute().await;
    add.step(|| format!("Add neighbour {}", new.address))
}
