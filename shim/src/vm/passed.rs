//! Devices that the host gate releases to a running VM and takes away again: VFIO functions, and the
//! NVMe disk that stands in for one. QEMU gets descriptors; its jail has no path to a device.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use serde_json::{Value, json};

use super::hotplug::{Ports, check_serial, remove};
use super::qmp::Qmp;
use super::{Passed, VmError, args};

/// Name of the iommufd object, one for all functions.
const IOMMUFD: &str = "iommufd0";

fn name(id: &str) -> String {
    format!("passed-{id}")
}

/// Adds a device. Returns when QEMU has it; the guest sees it a moment later.
pub(super) async fn add(qmp: &Qmp, ports: &Ports, device: &Passed) -> Result<(), VmError> {
    check_serial(device.id())?;
    let name = name(device.id());
    let mut port = ports.take(&name)?;
    let result = match device {
        Passed::StandIn { path, id } => add_stand_in(qmp, path, id, &name, port.index).await,
        Passed::Vfio { cdev, .. } => add_vfio(qmp, cdev, &name, port.index).await,
    };
    port.keep = result.is_ok();
    result
}

/// Takes a device away. Returns when the guest has let go of it.
pub(super) async fn take(qmp: &Qmp, ports: &Ports, id: &str) -> Result<(), VmError> {
    check_serial(id)?;
    let name = name(id);
    remove(qmp, ports, &name, id).await?;
    // A VFIO function has no such node.
    let _ = qmp
        .execute("blockdev-del", json!({"node-name": name}))
        .await;
    Ok(())
}

fn open(path: &Path, write: bool) -> Result<File, VmError> {
    OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(|source| VmError::Host {
            action: "open device",
            path: path.into(),
            source,
        })
}

async fn add_stand_in(
    qmp: &Qmp,
    path: &Path,
    serial: &str,
    name: &str,
    port: usize,
) -> Result<(), VmError> {
    let file = open(path, false)?;
    let block_device = file
        .metadata()
        .is_ok_and(|m| m.file_type().is_block_device());
    let driver = if block_device { "host_device" } else { "file" };
    let added = qmp.execute_with_fd("add-fd", json!({}), file.as_fd());
    let added = added.await?;
    let set = added.get("fdset-id").and_then(Value::as_u64).unwrap_or(0);
    let attached = async {
        let node = json!({
            "driver": driver,
            "node-name": name,
            "filename": format!("/dev/fdset/{set}"),
            "read-only": true,
        });
        qmp.execute("blockdev-add", node).await?;
        let device = json!({
            "driver": "nvme",
            "id": name,
            "drive": name,
            "serial": serial,
            "bus": args::port(port),
        });
        let added = qmp.execute("device_add", device).await;
        if added.is_err() {
            let _ = qmp
                .execute("blockdev-del", json!({"node-name": name}))
                .await;
        }
        added.map(drop)
    };
    let attached = attached.await;
    // Once opened through the set QEMU has its own copy; else the set goes with this.
    let _ = qmp.execute("remove-fd", json!({"fdset-id": set})).await;
    attached
}

async fn add_vfio(qmp: &Qmp, cdev: &Path, name: &str, port: usize) -> Result<(), VmError> {
    let iommu = open(Path::new("/dev/iommu"), true)?;
    let device = open(cdev, true)?;
    let give = |fdname: String, file: File| async move {
        qmp.execute_with_fd("getfd", json!({"fdname": fdname}), file.as_fd())
            .await
    };
    let object = json!({"qom-type": "iommufd", "id": IOMMUFD, "fd": IOMMUFD});
    let known = qmp.execute("qom-list", json!({"path": "/objects"})).await?;
    let known = known.as_array().is_some_and(|all| {
        all.iter()
            .any(|o| o.get("name").and_then(Value::as_str) == Some(IOMMUFD))
    });
    if !known {
        give(IOMMUFD.into(), iommu).await?;
        qmp.execute("object-add", object).await?;
    }
    give(name.to_owned(), device).await?;
    let device = json!({
        "driver": "vfio-pci",
        "id": name,
        "fd": name,
        "iommufd": IOMMUFD,
        "bus": args::port(port),
    });
    let added = qmp.execute("device_add", device).await;
    if added.is_err() {
        let _ = qmp.execute("closefd", json!({"fdname": name})).await;
    }
    added.map(drop)
}
