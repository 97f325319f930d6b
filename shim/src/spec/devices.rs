//! Devices of a specification: the guest has its own character devices; block devices of the host are
//! attached to the VM.

use std::{
    fs,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Spec};

use super::Error;

/// A block device of the host that the container gets at `path`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockDevice {
    /// The host's node.
    pub host: PathBuf,
    /// In the container.
    pub path: PathBuf,
    /// Whether the device rules forbid writing.
    pub readonly: bool,
    /// Mode bits, owner and group of the node in the container.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Takes the block devices out of `spec` and returns them, with whether the container may use every
/// device there is (privileged): then its list is the host's, and what the guest lacks is left out.
pub(super) fn take(spec: &mut Spec) -> Result<(Vec<BlockDevice>, bool), Error> {
    let Some(linux) = spec.linux_mut() else {
        return Ok((Vec::new(), false));
    };
    let rules = linux
        .resources()
        .as_ref()
        .and_then(|r| r.devices().clone())
        .unwrap_or_default();
    let everything = rules.iter().any(|r| {
        let any_kind = matches!(r.typ(), None | Some(LinuxDeviceType::A));
        let any_number = |n: Option<i64>| n.is_none_or(|n| n < 0);
        r.allow() && any_kind && any_number(r.major()) && any_number(r.minor())
    });
    let devices = linux.devices().clone().unwrap_or_default();
    let (block, other): (Vec<_>, Vec<_>) = devices
        .into_iter()
        .partition(|d| d.typ() == LinuxDeviceType::B);
    linux.set_devices(Some(other));
    if everything {
        return Ok((Vec::new(), true));
    }
    let writable = |d: &LinuxDevice| {
        let mine = |r: &&oci_spec::runtime::LinuxDeviceCgroup| {
            r.major() == Some(d.major()) && r.minor() == Some(d.minor()) && r.allow()
        };
        let rule = rules.iter().rfind(mine);
        rule.and_then(|r| r.access().clone())
            .is_none_or(|a| a.contains('w'))
    };
    let block = block
        .into_iter()
        .map(|d| {
            Ok(BlockDevice {
                host: host_node(&d)?,
                readonly: !writable(&d),
                mode: d.file_mode().unwrap_or(0o660),
                uid: d.uid().unwrap_or(0),
                gid: d.gid().unwrap_or(0),
                path: d.path().clone(),
            })
        })
        .collect::<Result<_, Error>>()?;
    Ok((block, false))
}

/// The node of the host that has the numbers of `device`.
fn host_node(device: &LinuxDevice) -> Result<PathBuf, Error> {
    let numbers = format!("{}:{}", device.major(), device.minor());
    let missing = |why: String| Error::Value {
        field: format!("linux.devices[{:?}]", device.path()),
        found: format!("block device {numbers}"),
        allowed: format!("a block device of this host ({why})"),
    };
    let uevent = Path::new("/sys/dev/block").join(&numbers).join("uevent");
    let text = fs::read_to_string(uevent).map_err(|e| missing(e.to_string()))?;
    let name = text.lines().find_map(|l| l.strip_prefix("DEVNAME="));
    let name = name.ok_or_else(|| missing("the kernel has no name for it".into()))?;
    Ok(Path::new("/dev").join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: &str) -> Spec {
        serde_json::from_str(json).expect("spec")
    }

    #[test]
    fn a_block_device_that_the_host_lacks_is_named() {
        let mut s = spec(
            r#"{"ociVersion":"1.0.2","linux":{"devices":[{"path":"/dev/xvda","type":"b","major":999,"minor":7}]}}"#,
        );
        let e = take(&mut s).expect_err("missing").to_string();
        assert!(e.contains("999:7") && e.contains("/dev/xvda"), "{e}");
    }

    #[test]
    fn a_privileged_container_keeps_no_block_devices_of_the_host() {
        let mut s = spec(
            r#"{"ociVersion":"1.0.2","linux":{"devices":[{"path":"/dev/vda","type":"b","major":999,"minor":7},
               {"path":"/dev/null","type":"c","major":1,"minor":3}],
               "resources":{"devices":[{"allow":true,"access":"rwm"}]}}}"#,
        );
        let (block, everything) = take(&mut s).expect("take");
        assert!(block.is_empty() && everything);
        let left = s
            .linux()
            .clone()
            .and_then(|l| l.devices().clone())
            .expect("devices");
        assert_eq!(left.len(), 1);
    }
}
