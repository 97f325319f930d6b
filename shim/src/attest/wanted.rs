//! Which devices a container asks for: by CDI name in an annotation, or by the VFIO nodes that a device
//! plugin put into its specification. Changes the specification only: a VFIO node means nothing to a guest.

use std::{
    fs,
    path::{Path, PathBuf},
};

use oci_spec::runtime::Spec;

use crate::{
    annotations::{self, Wishes},
    config::{Attestation, Device, device_id},
    spec,
};

/// Where VFIO has its nodes.
const VFIO: &str = "/dev/vfio";
/// The node that every user of VFIO groups opens; no device.
const CONTROL: &str = "/dev/vfio/vfio";

/// A device that a container asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// By what the guest and the token know it.
    pub id: String,
    /// In the container.
    pub path: PathBuf,
    /// Of the host.
    pub device: Device,
}

/// A device that cannot be given.
#[derive(Debug, thiserror::Error)]
pub enum WantedError {
    /// Not in the configuration.
    #[error("Device {name:?} is not one of [attestation.devices], which has: {known}")]
    Unknown {
        /// Its CDI name.
        name: String,
        /// All others.
        known: String,
    },
    /// No device of this host.
    #[error("Device {node:?} of the specification is no VFIO device of this host: {reason}")]
    Vfio {
        /// Its node.
        node: PathBuf,
        /// Why not.
        reason: String,
    },
    /// Two of one name.
    #[error("Device {0:?} is asked for twice")]
    Twice(String),
    /// An annotation.
    #[error(transparent)]
    Annotation(#[from] annotations::AnnotationError),
}

/// Takes the devices out of `spec`, which belongs to a container of a pod with this configuration.
///
/// # Errors
/// [`WantedError`], naming the device.
pub(crate) fn take(
    spec: &mut Spec,
    allow: &[annotations::Name],
    config: &Attestation,
) -> Result<Vec<Wanted>, WantedError> {
    let Wishes { devices, .. } = annotations::read(&spec::annotations(spec), allow)?;
    let mut all = Vec::new();
    for name in devices {
        let (Some(device), Some(id)) = (config.devices.get(&name), device_id(&name)) else {
            let known: Vec<_> = config.devices.keys().map(String::as_str).collect();
            let known = if known.is_empty() {
                "none".into()
            } else {
                known.join(", ")
            };
            return Err(WantedError::Unknown { name, known });
        };
        all.push(Wanted {
            id: id.into(),
            path: Path::new("/dev").join(id),
            device: device.clone(),
        });
    }
    for node in take_vfio_nodes(spec) {
        let wrong = |reason: String| WantedError::Vfio {
            node: node.clone(),
            reason,
        };
        let address = address(Path::new("/sys"), &node).map_err(wrong)?;
        all.push(Wanted {
            id: address.replace([':', '.'], "-"),
            path: node,
            device: Device::Vfio { address },
        });
    }
    for (at, one) in all.iter().enumerate() {
        if all[..at].iter().any(|other| other.id == one.id) {
            return Err(WantedError::Twice(one.id.clone()));
        }
    }
    Ok(all)
}

/// Removes the nodes below `/dev/vfio` and returns those that are devices.
fn take_vfio_nodes(spec: &mut Spec) -> Vec<PathBuf> {
    let Some(linux) = spec.linux_mut() else {
        return Vec::new();
    };
    let Some(devices) = linux.devices().clone() else {
        return Vec::new();
    };
    let (vfio, others): (Vec<_>, Vec<_>) = devices
        .into_iter()
        .partition(|d| d.path().starts_with(VFIO));
    linux.set_devices(Some(others));
    let nodes = vfio.into_iter().map(|d| d.path().clone());
    nodes.filter(|p| p != Path::new(CONTROL)).collect()
}

/// PCI address of the function behind a VFIO node: a group's, which must have one function alone, or a
/// function's own.
fn address(sys: &Path, node: &Path) -> Result<String, String> {
    let name = node.file_name().unwrap_or_default();
    let own = node.parent() == Some(&Path::new(VFIO).join("devices"));
    let folder = if own {
        sys.join("class/vfio-dev").join(name).join("device")
    } else {
        sys.join("kernel/iommu_groups").join(name).join("devices")
    };
    let found: Vec<PathBuf> = if own {
        vec![fs::canonicalize(&folder).map_err(|e| format!("{}: {e}", folder.display()))?]
    } else {
        let entries = fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        entries.flatten().map(|e| e.path()).collect()
    };
    match found.as_slice() {
        [one] => {
            let name = one.file_name().unwrap_or_default().to_string_lossy();
            if crate::config::is_pci_address(&name) {
                return Ok(name.into_owned());
            }
            Err(format!("{name} is no PCI function"))
        }
        many => Err(format!("its group has {} functions, not one", many.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::annotations::Name;

    fn spec(annotations: &str, devices: &str) -> Spec {
        let json = format!(
            r#"{{"ociVersion":"1.0.2","annotations":{annotations},"linux":{{"devices":[{devices}]}}}}"#
        );
        serde_json::from_str(&json).expect("spec")
    }

    #[test]
    fn a_device_has_to_be_in_the_configuration() {
        let mut config = Attestation::default();
        let name = r#"{"io.sealpod.attestation.devices":"sealpod.io/stand-in=gpu0"}"#;
        let e = take(&mut spec(name, ""), &Name::ALL, &config).expect_err("unknown");
        assert!(e.to_string().contains("which has: none"), "{e}");
        let path = PathBuf::from("/content");
        let device = Device::StandIn { path };
        config
            .devices
            .insert("sealpod.io/stand-in=gpu0".into(), device.clone());
        let wanted = take(&mut spec(name, ""), &Name::ALL, &config).expect("wanted");
        assert_eq!(
            wanted,
            [Wanted {
                id: "gpu0".into(),
                path: "/dev/gpu0".into(),
                device
            }]
        );
        let e = take(&mut spec(name, ""), &[], &config).expect_err("not allowed");
        assert!(e.to_string().contains("not allowed"), "{e}");
    }

    #[test]
    fn vfio_nodes_leave_the_specification_and_must_be_devices_of_this_host() {
        let nodes = r#"{"path":"/dev/vfio/vfio","type":"c","major":10,"minor":196},
            {"path":"/dev/null","type":"c","major":1,"minor":3}"#;
        let mut control = spec("{}", nodes);
        let wanted = take(&mut control, &[], &Attestation::default()).expect("wanted");
        assert!(wanted.is_empty());
        let left = control.linux().as_ref().and_then(|l| l.devices().clone());
        assert_eq!(left.map(|d| d.len()), Some(1));
        let group = r#"{"path":"/dev/vfio/99999","type":"c","major":10,"minor":196}"#;
        let e = take(&mut spec("{}", group), &[], &Attestation::default()).expect_err("group");
        assert!(e.to_string().contains("/dev/vfio/99999"), "{e}");
    }

    #[test]
    fn a_group_of_one_function_is_that_function() {
        let dir = tempfile::tempdir().expect("folder");
        let group = dir.path().join("kernel/iommu_groups/7/devices");
        fs::create_dir_all(group.join("0000:65:00.0")).expect("folder");
        let node = Path::new("/dev/vfio/7");
        assert_eq!(address(dir.path(), node).as_deref(), Ok("0000:65:00.0"));
        fs::create_dir_all(group.join("0000:65:00.1")).expect("folder");
        let e = address(dir.path(), node).expect_err("two");
        assert!(e.contains("2 functions"), "{e}");
    }
}
