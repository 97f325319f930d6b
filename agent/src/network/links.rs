//! The guest's network devices: which is which, their names, and what is taken from them again.

use std::fs;
use std::path::Path;

use futures::stream::TryStreamExt;
use rtnetlink::{Handle, LinkUnspec};

use super::plan::Interface;
use super::{NetworkError, Step};
use crate::uevent;

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: [u8; 6],
}

/// Finds the device of each interface, in their order; waits for those that are being attached.
pub(super) async fn find(wanted: &[Interface]) -> Result<Vec<Link>, NetworkError> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let class = Path::new("/sys/class/net");
    let mut missing = None;
    let found = uevent::until_found(|| match assign(&devices(class), wanted) {
        Ok(found) => Some(found),
        Err(interface) => {
            missing = Some(interface);
            None
        }
    })
    .await?;
    match (found, missing) {
        (Some(found), _) => Ok(found),
        (None, missing) => {
            let interface = missing.and_then(|n| wanted.get(n));
            Err(NetworkError::NoDevice {
                name: interface.map(|i| i.name.clone()).unwrap_or_default(),
                mac: interface
                    .map(|i| format!("{:02x?}", i.mac))
                    .unwrap_or_default(),
                position: interface.map(|i| i.position).unwrap_or_default(),
            })
        }
    }
}

/// The devices behind the guest's buses, in the order of their places on them. (Loopback, tunnels and
/// bridges have no device.)
fn devices(class: &Path) -> Vec<Link> {
    let mut all: Vec<_> = fs::read_dir(class)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let place = fs::canonicalize(entry.path().join("device")).ok()?;
            let read = |file: &str| fs::read_to_string(entry.path().join(file)).ok();
            let mut mac = [0; 6];
            let address = read("address")?;
            for (byte, part) in mac.iter_mut().zip(address.trim_end().split(':')) {
                *byte = u8::from_str_radix(part, 16).ok()?;
            }
            let link = Link {
                index: read("ifindex")?.trim_end().parse().ok()?,
                name: entry.file_name().into_string().ok()?,
                mac,
            };
            Some((place, link))
        })
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all.into_iter().map(|(_, link)| link).collect()
}

/// Which device each interface is: the one with its hardware address, else the one at its position,
/// unless that is another's. Err: the interface that has none.
fn assign(devices: &[Link], wanted: &[Interface]) -> Result<Vec<Link>, usize> {
    let by_mac = |i: &Interface| devices.iter().position(|d| d.mac == i.mac);
    let mut taken: Vec<usize> = wanted.iter().filter_map(by_mac).collect();
    let mut found = Vec::new();
    for (n, interface) in wanted.iter().enumerate() {
        let at = match by_mac(interface) {
            Some(at) => at,
            None if taken.contains(&interface.position) => return Err(n),
            None => {
                taken.push(interface.position);
                interface.position
            }
        };
        found.push(devices.get(at).cloned().ok_or(n)?);
    }
    Ok(found)
}

/// Gives the devices their wanted names. Names may be exchanged: what is in the way moves aside first.
pub(super) async fn rename(
    handle: &Handle,
    wanted: &[Interface],
    links: &[Link],
) -> Result<(), NetworkError> {
    let moving: Vec<_> = wanted
        .iter()
        .zip(links)
        .filter(|(interface, link)| interface.name != link.name)
        .collect();
    let in_the_way = |link: &Link| {
        moving
            .iter()
            .any(|(interface, _)| interface.name == link.name)
    };
    for (_, link) in moving.iter().filter(|(_, link)| in_the_way(link)) {
        set_name(handle, link.index, &format!("sealpod{}", link.index)).await?;
    }
    for (interface, link) in &moving {
        set_name(handle, link.index, &interface.name).await?;
    }
    Ok(())
}

async fn set_name(handle: &Handle, index: u32, name: &str) -> Result<(), NetworkError> {
    // A device that is up keeps its name on older kernels.
    let message = LinkUnspec::new_with_index(index).down().name(name).build();
    let change = handle.link().change(message).execute().await;
    change.step(|| format!("Name network device {index} {name}"))
}

/// Takes addresses and routes from an interface that is no longer wanted; one that is gone is fine.
pub(super) async fn retire(handle: &Handle, gone: &Interface) -> Result<(), NetworkError> {
    let devices = devices(Path::new("/sys/class/net"));
    let Some(link) = devices.iter().find(|d| d.mac == gone.mac) else {
        return Ok(());
    };
    let down = LinkUnspec::new_with_index(link.index).down().build();
    let change = handle.link().change(down).execute().await;
    change.step(|| format!("Take down interface {}", gone.name))?;
    flush(handle, link.index)
        .await
        .step(|| format!("Clear addresses of {}", gone.name))
}

/// Removes all addresses of a device.
pub(super) async fn flush(handle: &Handle, index: u32) -> Result<(), rtnetlink::Error> {
    let get = handle.address().get().set_link_index_filter(index);
    let all: Vec<_> = get.execute().try_collect().await?;
    for address in all {
        handle.address().del(address).execute().await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn link(index: u32, mac: u8) -> Link {
        Link {
            index,
            name: format!("eth{index}"),
            mac: [2, 0, 0, 0, 0, mac],
        }
    }

    fn interface(position: usize, mac: u8) -> Interface {
        Interface {
            mac: [2, 0, 0, 0, 0, mac],
            name: format!("net{position}"),
            mtu: 0,
            addresses: Vec::new(),
            position,
            noarp: false,
        }
    }

    #[test]
    fn hardware_addresses_decide_before_positions() {
        let devices = [link(2, 1), link(3, 2)];
        let found = assign(&devices, &[interface(0, 2), interface(1, 1)]);
        assert_eq!(found, Ok(vec![link(3, 2), link(2, 1)]));
        let found = assign(&devices, &[interface(0, 9), interface(1, 2)]);
        assert_eq!(found, Ok(vec![link(2, 1), link(3, 2)]));
    }

    #[test]
    fn a_device_is_given_once_and_a_missing_one_is_named() {
        let devices = [link(2, 1)];
        assert_eq!(
            assign(&devices, &[interface(1, 1), interface(0, 9)]),
            Err(1)
        );
        assert_eq!(
            assign(&devices, &[interface(0, 1), interface(1, 2)]),
            Err(1)
        );
    }

    #[test]
    fn devices_are_in_the_order_of_their_bus_addresses() {
        let dir = tempfile::tempdir().expect("folder");
        for (name, index, place) in [("eth0", 2, "0000:00:04.0"), ("eth1", 3, "0000:00:03.0")] {
            let device = dir.path().join("devices").join(place);
            let class = dir.path().join("net").join(name);
            fs::create_dir_all(&device).expect("folder");
            fs::create_dir_all(&class).expect("folder");
            symlink(&device, class.join("device")).expect("link");
            fs::write(class.join("address"), format!("02:00:00:00:00:0{index}\n")).expect("file");
            fs::write(class.join("ifindex"), format!("{index}\n")).expect("file");
        }
        fs::create_dir_all(dir.path().join("net/lo")).expect("folder");
        let names: Vec<_> = devices(&dir.path().join("net"))
            .into_iter()
            .map(|l| l.name)
            .collect();
        assert_eq!(names, ["eth1", "eth0"]);
    }
}
