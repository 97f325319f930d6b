//! The pod's network: what CNI made in the pod's network namespace is given to the guest.
//!
//! ```text
//!   pod's network namespace on the host                              guest
//!   ┌──────────────────────────────────────────────┐
//!   │ eth0 (veth, macvlan, …)          sealtap0    │
//!   │  ingress qdisc ── mirred ──▶ egress ─────────┼──▶ virtio-net: eth0
//!   │  egress ◀────── mirred ── ingress qdisc ◀────┼──  same MAC, addresses, routes
//!   └──────────────────────────────────────────────┘
//! ```
//!
//! [`PodNetwork`] owns the taps and mirrors of one pod; only its pod's task may use it.
//!
//! Docker, nerdctl and `ctr run --cni` make the interface after the VM was made and before the
//! container starts. So a pod without an interface gets a *spare* tap, connected to nothing, and
//! [`PodNetwork::update`] joins it to the interface when there is one.

mod bpf;
mod mirror;
mod netns;
pub mod portforward;
mod scan;
mod tap;

use std::{
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
};

use rtnetlink::{Handle, LinkUnspec};
use sealpod_protocol::agent;

use self::tap::Tap;
pub use self::{
    netns::{NetnsError, PodNetns},
    scan::{Link, Snapshot},
};
use crate::ledger::{EntryId, Ledger, LedgerError, Resource};

/// Interfaces that a pod may have.
pub const MAX_INTERFACES: usize = 8;
/// Index of `lo` in every network namespace.
const LOOPBACK: u32 = 1;

/// Why a pod's network cannot be given to its guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// No netlink socket.
    #[error("No netlink socket in the pod's network namespace")]
    Socket(#[source] io::Error),
    /// The kernel refused.
    #[error("The kernel refused {doing}")]
    Netlink {
        /// What was being done.
        doing: &'static str,
        /// Its answer.
        source: rtnetlink::Error,
    },
    /// An interface that a VM cannot have.
    #[error(
        "Interface {name} (kind `{kind}`) cannot be given to a VM: {why}; allowed are Ethernet interfaces such as veth, macvlan, ipvlan (L2), vlan and physical ones"
    )]
    Unsupported {
        /// In the namespace.
        name: String,
        /// Kernel's name of its driver.
        kind: String,
        /// What is in the way.
        why: &'static str,
    },
    /// Too many interfaces.
    #[error("The pod's network namespace has {0} interfaces; at most {MAX_INTERFACES} are allowed")]
    TooMany(usize),
    /// No tap.
    #[error("A tap device cannot be made from {}", tap::TUN_DEVICE)]
    Tap(#[source] io::Error),
    /// No mirror.
    #[error("Interface {name} cannot be mirrored: the kernel refused when {doing}")]
    Mirror {
        /// In the namespace.
        name: String,
        /// The step.
        doing: &'static str,
        /// The kernel's answer.
        source: rtnetlink::Error,
    },
    /// Nothing is mirrored that is not written down first.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// The VM's end of one NIC.
#[derive(Debug)]
pub struct TapNic {
    /// Open tap; frames carry a virtio-net header.
    pub tap: OwnedFd,
    /// Hardware address that the NIC starts with.
    pub mac: [u8; 6],
    /// Bytes; none for a spare, whose interface is not known yet.
    pub mtu: Option<u32>,
}

/// What changed in the namespace.
#[derive(Debug, Default)]
pub struct Update {
    /// NICs that the VM must add, before `network` is sent.
    pub added: Vec<TapNic>,
    /// For the agent, where it differs from what was given before.
    pub network: Option<agent::Network>,
}

/// One NIC of the guest; its place in the list is its position there.
#[derive(Debug)]
struct Nic {
    tap: u32,
    link: Option<u32>,
    /// Of the interface's ingress qdisc; none where the namespace goes with the pod.
    entry: Option<EntryId>,
}

impl Nic {
    fn spare(tap: &Tap) -> Self {
        Self {
            tap: tap.index,
            link: None,
            entry: None,
        }
    }
}

/// The network of one pod.
#[derive(Debug)]
pub struct PodNetwork {
    netns: PodNetns,
    netlink: Handle,
    ledger: Ledger,
    nics: Vec<Nic>,
    given: agent::Network,
}

impl PodNetwork {
    /// Makes ready, and sets the namespace's loopback up. No interface is touched yet.
    ///
    /// # Errors
    /// [`Error::Netns`], [`Error::Socket`], [`Error::Netlink`].
    pub async fn new(netns: PodNetns, ledger: Ledger) -> Result<Self, Error> {
        let netlink = netlink(&netns).await?;
        Ok(Self {
            netns,
            netlink,
            ledger,
            nics: Vec::new(),
            given: agent::Network::new(),
        })
    }

    /// The namespace.
    #[must_use]
    pub fn netns(&self) -> &PodNetns {
        &self.netns
    }

    /// Mirrors every interface of the namespace and returns the NICs that the VM is made with, in
    /// the order of their position; one spare where there is no interface.
    ///
    /// # Errors
    /// See [`Error`]. What was mirrored before the error is taken off by [`PodNetwork::detach`].
    pub async fn attach(&mut self) -> Result<Vec<TapNic>, Error> {
        let mut added = self.update().await?.added;
        if added.is_empty() && self.nics.is_empty() {
            let tap = self.tap().await?;
            self.nics.push(Nic::spare(&tap));
            added.push(TapNic {
                tap: tap.fd,
                mac: random_mac().map_err(Error::Tap)?,
                mtu: None,
            });
        }
        Ok(added)
    }

    /// For the agent: what the guest's network should be, as of the last [`PodNetwork::attach`] or
    /// [`PodNetwork::update`].
    #[must_use]
    pub fn to_proto(&self) -> agent::Network {
        self.given.clone()
    }

    /// Looks at the namespace again: mirrors interfaces that are new, through spare taps as long as
    /// there are any, and forgets those that are gone.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn update(&mut self) -> Result<Update, Error> {
        let ours: Vec<u32> = self.nics.iter().map(|n| n.tap).collect();
        let snapshot = scan::snapshot(&self.netlink, &ours).await?;
        if snapshot.links.len() > MAX_INTERFACES {
            return Err(Error::TooMany(snapshot.links.len()));
        }
        for nic in &mut self.nics {
            let gone = |index| !snapshot.links.iter().any(|l| l.index == index);
            if nic.link.is_some_and(gone) {
                mirror::disconnect(&self.netlink, nic.tap).await?;
                nic.link = None;
                release(&self.ledger, nic.entry.take())?;
            }
        }
        let mut added = Vec::new();
        for link in &snapshot.links {
            if !self.nics.iter().any(|n| n.link == Some(link.index)) {
                added.extend(self.mirror(link).await?);
            }
        }
        let network = self.describe(snapshot);
        let changed = network != self.given;
        self.given = network.clone();
        Ok(Update {
            added,
            network: changed.then_some(network),
        })
    }

    /// Takes the mirrors off the interfaces, so that the namespace is as CNI made it. Idempotent.
    /// The taps go when the VM's descriptors are closed.
    ///
    /// # Errors
    /// [`Error::Netlink`] or [`Error::Ledger`], after everything was tried.
    pub async fn detach(&mut self) -> Result<(), Error> {
        let mut result = Ok(());
        for nic in self.nics.drain(..) {
            let Some(link) = nic.link else { continue };
            let done = match mirror::disconnect(&self.netlink, link).await {
                Ok(()) => release(&self.ledger, nic.entry),
                failed => failed,
            };
            result = result.and(done);
        }
        result
    }

    /// Mirrors one interface; returns the VM's end where no spare tap could take it.
    async fn mirror(&mut self, link: &Link) -> Result<Option<TapNic>, Error> {
        let spare = self.nics.iter().position(|n| n.link.is_none());
        let (place, fd) = match spare {
            Some(place) => (place, None),
            None => {
                let tap = self.tap().await?;
                self.nics.push(Nic::spare(&tap));
                (self.nics.len() - 1, Some(tap.fd))
            }
        };
        let entry = match self.netns.given_path() {
            Some(netns) => Some(self.ledger.record(Resource::Qdisc {
                netns: netns.into(),
                ifname: link.name.clone(),
            })?),
            None => None,
        };
        let nic = &mut self.nics[place];
        if let Err(e) = mirror::connect(&self.netlink, link, nic.tap).await {
            // Nothing was taken; what is on the interface now is somebody else's.
            release(&self.ledger, entry)?;
            return Err(e);
        }
        (nic.link, nic.entry) = (Some(link.index), entry);
        Ok(fd.map(|tap| TapNic {
            tap,
            mac: link.mac,
            mtu: Some(link.mtu),
        }))
    }

    async fn tap(&self) -> Result<Tap, Error> {
        self.netns.run(Tap::create).await?.map_err(Error::Tap)
    }

    fn describe(&self, snapshot: Snapshot) -> agent::Network {
        let interface = |link: Link| {
            let position = self.nics.iter().position(|n| n.link == Some(link.index));
            agent::Interface {
                hardware_address: mac_text(link.mac),
                name: link.name,
                mtu: link.mtu,
                addresses: link.addresses,
                // At most MAX_INTERFACES.
                position: position.unwrap_or_default() as u32,
                noarp: link.noarp,
                ..Default::default()
            }
        };
        agent::Network {
            interfaces: snapshot.links.into_iter().map(interface).collect(),
            routes: snapshot.routes,
            neighbours: snapshot.neighbours,
            ..Default::default()
        }
    }
}

/// Tries everything that a pod's network needs, on two taps in a namespace made for it; gives back
/// that namespace.
///
/// # Errors
/// See [`Error`]: what this host does not have.
pub(crate) async fn try_mirror() -> Result<PodNetns, Error> {
    let netns = PodNetns::create().await?;
    let netlink = netlink(&netns).await?;
    let tap = || async { netns.run(Tap::create).await?.map_err(Error::Tap) };
    let (outside, inside) = (tap().await?, tap().await?);
    let link = Link {
        index: outside.index,
        name: "trial".into(),
        kind: "tun".into(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        noarp: false,
        addresses: Vec::new(),
    };
    mirror::connect(&netlink, &link, inside.index).await?;
    Ok(netns)
}

/// A netlink socket of the namespace, which stays the namespace's; its loopback is set up.
async fn netlink(netns: &PodNetns) -> Result<Handle, Error> {
    let runtime = tokio::runtime::Handle::current();
    let (connection, netlink, _) = netns
        .run(move || {
            let _in_runtime = runtime.enter();
            rtnetlink::new_connection()
        })
        .await?
        .map_err(Error::Socket)?;
    tokio::spawn(connection);
    let up = LinkUnspec::new_with_index(LOOPBACK).up().build();
    netlink
        .link()
        .set(up)
        .execute()
        .await
        .map_err(|source| Error::Netlink {
            doing: "setting lo up",
            source,
        })?;
    Ok(netlink)
}

fn release(ledger: &Ledger, entry: Option<EntryId>) -> Result<(), Error> {
    Ok(entry.map_or(Ok(()), |e| ledger.release(e))?)
}

/// `aa:bb:cc:dd:ee:ff`.
#[must_use]
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}

/// A random unicast address of the locally administered range.
fn random_mac() -> io::Result<[u8; 6]> {
    let mut mac = [0; 6];
    File::open("/dev/urandom")?.read_exact(&mut mac)?;
    mac[0] = mac[0] & 0xfc | 0x02;
    Ok(mac)
}
