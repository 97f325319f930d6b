//! Devices that come and go while QEMU runs, each on a PCIe root port of its own. Files and taps are
//! opened here and handed over as descriptors: QEMU's jail has no path to them.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::broadcast::error::RecvError;

use super::qmp::Qmp;
use super::{Disk, Nic, SERIAL_MAX, VmError, args};

/// How long the guest may take to let go of a device. PCIe gives people 5 s to press the button
/// again; then the driver has to finish its writes.
const REMOVE_PATIENCE: Duration = Duration::from_secs(30);

/// The ports, and what is on each.
#[derive(Debug)]
pub(super) struct Ports(Mutex<Vec<Option<String>>>);

/// A port that is taken for a device, until that is there or has failed.
pub(super) struct Taken<'a> {
    ports: &'a Ports,
    pub(super) index: usize,
    pub(super) keep: bool,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if !self.keep {
            self.ports.lock()[self.index] = None;
        }
    }
}

impl Ports {
    pub(super) fn new(count: u32) -> Self {
        Self(Mutex::new((0..count).map(|_| None).collect()))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<String>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn take(&self, id: &str) -> Result<Taken<'_>, VmError> {
        let mut ports = self.lock();
        if ports.iter().flatten().any(|other| other == id) {
            return Err(VmError::Config {
                what: "Device",
                value: id.into(),
                allowed: "it is there already".into(),
            });
        }
        let Some(index) = ports.iter().position(Option::is_none) else {
            let ports = ports.len();
            return Err(VmError::NoPort { ports });
        };
        ports[index] = Some(id.into());
        let keep = false;
        Ok(Taken {
            ports: self,
            index,
            keep,
        })
    }

    pub(super) fn release(&self, id: &str) {
        for port in self.lock().iter_mut().filter(|p| p.as_deref() == Some(id)) {
            *port = None;
        }
    }

    pub(super) fn holds(&self, id: &str) -> bool {
        self.lock().iter().flatten().any(|other| other == id)
    }
}

/// A device's name in QEMU; a serial is part of it, so it must be checked first.
pub(super) fn disk_id(serial: &str) -> String {
    format!("disk-{serial}")
}

pub(super) fn check_serial(serial: &str) -> Result<(), VmError> {
    let ok = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
    if (1..=SERIAL_MAX).contains(&serial.len()) && serial.bytes().all(ok) {
        return Ok(());
    }
    Err(VmError::Config {
        what: "Disk serial",
        value: serial.chars().take(64).collect(),
        allowed: format!("1 to {SERIAL_MAX} of [A-Za-z0-9_-] are allowed"),
    })
}

/// Opens a disk for the VMM; says whether it is a block device.
pub(super) fn open(disk: &Disk) -> Result<(File, bool), VmError> {
    let host = |source| VmError::Host {
        action: "open disk",
        path: disk.path.clone(),
        source,
    };
    // O_NONBLOCK: a FIFO or a drive without a medium must not hang the shim.
    let file = OpenOptions::new()
        .read(true)
        .write(!disk.readonly)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(&disk.path)
        .map_err(host)?;
    let kind = file.metadata().map_err(host)?.file_type();
    if kind.is_block_device() || kind.is_file() {
        return Ok((file, kind.is_block_device()));
    }
    Err(VmError::Config {
        what: "Disk",
        value: disk.path.display().to_string(),
        allowed: "a block device or a regular file is needed".into(),
    })
}

pub(super) async fn add_disk(qmp: &Qmp, ports: &Ports, disk: &Disk) -> Result<(), VmError> {
    check_serial(&disk.serial)?;
    let id = disk_id(&disk.serial);
    let mut port = ports.take(&id)?;
    let (file, block_device) = open(disk)?;
    let driver = if block_device { "host_device" } else { "file" };
    let added = qmp
        .execute_with_fd("add-fd", json!({}), file.as_fd())
        .await?;
    let set = added.get("fdset-id").and_then(Value::as_u64).unwrap_or(0);
    let result = attach_disk(qmp, disk, driver, set, &id, port.index).await;
    // Once opened through the set QEMU has its own copy; else the set goes with this.
    let _ = qmp.execute("remove-fd", json!({"fdset-id": set})).await;
    port.keep = result.is_ok();
    result
}

async fn attach_disk(
    qmp: &Qmp,
    disk: &Disk,
    driver: &str,
    set: u64,
    id: &str,
    port: usize,
) -> Result<(), VmError> {
    let node = json!({
        "driver": driver,
        "node-name": id,
        "filename": format!("/dev/fdset/{set}"),
        "read-only": disk.readonly,
        "discard": "unmap",
    });
    qmp.execute("blockdev-add", node).await?;
    let device = json!({
        "driver": "virtio-blk-pci",
        "id": id,
        "drive": id,
        "serial": disk.serial,
        "bus": args::port(port),
        "disable-legacy": "on",
        // A volume may be shared by pods on one node; who may is the cluster's business.
        "share-rw": true,
    });
    let added = qmp.execute("device_add", device).await;
    if added.is_err() {
        let _ = qmp.execute("blockdev-del", json!({"node-name": id})).await;
    }
    added.map(drop)
}

pub(super) async fn remove_disk(qmp: &Qmp, ports: &Ports, serial: &str) -> Result<(), VmError> {
    check_serial(serial)?;
    let id = disk_id(serial);
    remove(qmp, ports, &id, serial).await?;
    let node = json!({"node-name": id});
    qmp.execute("blockdev-del", node).await.map(drop)
}

/// Takes the device `id` of QEMU from the guest; people know it as `name`.
pub(super) async fn remove(qmp: &Qmp, ports: &Ports, id: &str, name: &str) -> Result<(), VmError> {
    if !ports.holds(id) {
        return Err(VmError::NoDevice(name.into()));
    }
    let mut events = qmp.events();
    match qmp.execute("device_del", json!({"id": id})).await {
        // The guest has powered its slot down.
        Err(VmError::NoDevice(_)) => {
            ports.release(id);
            return Ok(());
        }
        other => other.map(drop)?,
    }
    let deleted = async {
        loop {
            match events.recv().await {
                Ok(e) if e.name == "DEVICE_DELETED" && e.subject == id => return Ok(()),
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return Err(VmError::Ended),
            }
        }
    };
    match tokio::time::timeout(REMOVE_PATIENCE, deleted).await {
        Ok(done) => done?,
        Err(_) => {
            return Err(VmError::Silent {
                command: format!("let go of {name}"),
                seconds: REMOVE_PATIENCE.as_secs(),
            });
        }
    }
    ports.release(id);
    Ok(())
}

/// A network device's name.
pub(super) fn nic_id(mac: [u8; 6]) -> String {
    format!("nic-{}", args::mac_text(mac).replace(':', ""))
}

pub(super) async fn add_nic(qmp: &Qmp, ports: &Ports, nic: Nic) -> Result<(), VmError> {
    let mac = args::mac_text(nic.mac);
    let id = nic_id(nic.mac);
    let mut port = ports.take(&id)?;
    let name = json!({"fdname": id});
    qmp.execute_with_fd("getfd", name.clone(), nic.tap.as_fd())
        .await?;
    let net = json!({"type": "tap", "id": id, "fd": id});
    if let Err(e) = qmp.execute("netdev_add", net).await {
        let _ = qmp.execute("closefd", name).await;
        return Err(e);
    }
    let device = json!({
        "driver": "virtio-net-pci",
        "id": id,
        "netdev": id,
        "mac": mac,
        "host_mtu": nic.mtu,
        "bus": args::port(port.index),
        "disable-legacy": "on",
        "romfile": "",
    });
    let added = qmp.execute("device_add", device).await;
    if added.is_err() {
        let _ = qmp.execute("netdev_del", json!({"id": id})).await;
    }
    port.keep = added.is_ok();
    added.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_run_out_and_come_back() {
        let ports = Ports::new(2);
        ports.take("a").unwrap().keep = true;
        drop(ports.take("b").unwrap());
        ports.take("c").unwrap().keep = true;
        assert!(matches!(ports.take("d"), Err(VmError::NoPort { ports: 2 })));
        assert!(matches!(ports.take("a"), Err(VmError::Config { .. })));
        ports.release("a");
        assert!(ports.take("d").is_ok());
        assert!(!ports.holds("d") && ports.holds("c"));
        assert!(Ports::new(0).take("a").is_err());
    }

    #[test]
    fn serials_that_the_guest_could_not_find_are_refused() {
        for bad in ["", "a b", "a,b", "ü", &"x".repeat(SERIAL_MAX + 1)] {
            assert!(check_serial(bad).is_err(), "{bad:?}");
        }
        assert!(check_serial("sp-0123456789abcdef0").is_ok());
    }
}
