//! The wire between an interface of the pod's namespace and a tap: on each side an ingress qdisc
//! whose only filter matches every frame and sends it out of the other side. Frames are taken
//! before the namespace's own stack sees them, so it answers nothing in the guest's place.
//!
//! The filter is u32 with an empty match: the oldest classifier, present where flower and matchall
//! are not.

use rtnetlink::{Handle, LinkUnspec};

use super::{Error, scan::Link};

/// `TC_H_CLSACT | TC_H_MIN_INGRESS` of linux/pkt_sched.h, the ingress hook.
const INGRESS: u32 = 0xffff_fff2;
/// `ETH_P_ALL` in network byte order, as filters carry it.
const EVERY_PROTOCOL: u16 = (libc::ETH_P_ALL as u16).to_be();

/// Joins `link` and the tap with index `tap`: MTU, up, mirrored both ways. On an error both are as
/// they were, except that the tap may be up.
pub(super) async fn connect(netlink: &Handle, link: &Link, tap: u32) -> Result<(), Error> {
    // The tap's filter first: once the tap is up, whatever arrives on it is taken.
    let mut done = steal(netlink, tap, link.index, &link.name).await;
    if done.is_ok() {
        done = set_up(netlink, link, tap).await;
        if done.is_ok() {
            done = steal(netlink, link.index, tap, &link.name).await;
        }
        if done.is_err() {
            // The first error says what is wrong.
            let _ = disconnect(netlink, tap).await;
        }
    }
    done
}

/// The tap: MTU and up. The interface: lets multicast through.
async fn set_up(netlink: &Handle, link: &Link, tap: u32) -> Result<(), Error> {
    let failed = |doing| refused(&link.name, doing);
    let up = LinkUnspec::new_with_index(tap).mtu(link.mtu).up().build();
    netlink
        .link()
        .set(up)
        .execute()
        .await
        .map_err(failed("the tap was set up"))?;
    if link.kind == "macvlan" {
        // A macvlan passes on only the multicast groups that the namespace's own stack has joined;
        // the guest joins its own.
        let all = LinkUnspec::new_with_index(link.index)
            .allmulticast(true)
            .build();
        netlink
            .link()
            .set(all)
            .execute()
            .await
            .map_err(failed("multicast was let through"))?;
    }
    Ok(())
}

/// Sends everything that arrives on the interface `from` out of `to`. On an error nothing of it is
/// left, and an ingress qdisc of somebody else is untouched.
async fn steal(netlink: &Handle, from: u32, to: u32, name: &str) -> Result<(), Error> {
    add_qdisc(netlink, from)
        .await
        .map_err(refused(name, "an ingress qdisc was added"))?;
    let done = redirect(netlink, from, to).await;
    if done.is_err() {
        let _ = disconnect(netlink, from).await;
    }
    done.map_err(refused(name, "a filter was added"))
}

fn refused(name: &str, doing: &'static str) -> impl FnOnce(rtnetlink::Error) -> Error {
    let name = name.to_owned();
    move |source| Error::Mirror {
        name,
        doing,
        source,
    }
}

/// Takes the mirror off the interface with this index. Idempotent: an interface or qdisc that is
/// gone is what was wanted.
pub(super) async fn disconnect(netlink: &Handle, index: u32) -> Result<(), Error> {
    let mut request = netlink.qdisc().del(index.cast_signed());
    let message = request.message_mut();
    message.header.parent = rtnetlink::packet_route::tc::TcHandle::INGRESS;
    message.header.handle = rtnetlink::packet_route::tc::TcHandle::from(0xffff_0000);
    match request.execute().await {
        Err(e) if !is_gone(&e) => Err(Error::Netlink {
            doing: "removing an ingress qdisc",
            source: e,
        }),
        _ => Ok(()),
    }
}

async fn add_qdisc(netlink: &Handle, index: u32) -> Result<(), rtnetlink::Error> {
    let mut qdisc = netlink.qdisc();
    qdisc.add(index.cast_signed()).ingress().execute().await
}

async fn redirect(netlink: &Handle, from: u32, to: u32) -> Result<(), rtnetlink::Error> {
    let mut filter = netlink.traffic_filter(from.cast_signed());
    let filter = filter.add().parent(INGRESS).protocol(EVERY_PROTOCOL);
    filter.redirect(to)?.execute().await
}

/// The kernel's ways to say that an interface, or a qdisc of it, is not there.
fn is_gone(error: &rtnetlink::Error) -> bool {
    let rtnetlink::Error::NetlinkError(message) = error else {
        return false;
    };
    matches!(
        message.to_io().raw_os_error(),
        Some(libc::ENODEV | libc::ENOENT | libc::EINVAL)
    )
}
