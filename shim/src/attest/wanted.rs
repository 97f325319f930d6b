//! Which devices a container asks for: by CDI name in an annotation, or by the VFIO nodes that a device
//! plugin put into its specification. Changes the specification only: a VFIO node means nothing to a guest.

use std::{
    fs,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use oci_spec::runtime::Spec;

use super::cdi::{self, CdiError};
use crate::{
    annotations::{self, Wishes},
    config::{Attestation, Device, device_id},
    spec,
};

/// Where VFIO has its nodes.
const VFIO: &str = "/dev/vfio";
/// The node that every user of VFIO groups opens; no device.
pub(super) const CONTROL: &str = "/dev/vfio/vfio";

/// A device that a container asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// By what the guest and the token know it.
    pub id: String,
    /// In the container.
    pub path: PathBuf,
    /// Of the host.
    pub device: Given,
    /// In the VM from its start, and withheld there.
    pub cold: bool,
}

/// What of the host a VM is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Given {
    /// A PCI function, by VFIO.
    Function {
        /// `dddd:bb:dd.f`.
        address: String,
    },
    /// A file or block device that the VMM makes a disk of, for reading.
    Disk {
        /// Which.
        path: PathBuf,
    },
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
    /// Its CDI specification.
    #[error("Device {name:?}")]
    Cdi {
        /// Its name.
        name: String,
        /// What is wrong with it.
        source: CdiError,
    },
    /// A node of which a VM cannot be given anything.
    #[error(
        "Device {name:?} is made of {node:?}, which is neither a VFIO node nor a disk: a VM cannot be given it"
    )]
    Node {
        /// Its name.
        name: String,
        /// The node of the host.
        node: PathBuf,
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
        let (one, env) = named(name, config)?;
        all.push(one);
        add_env(spec, env);
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
            device: Given::Function { address },
            cold: false,
        });
    }
    for (at, one) in all.iter().enumerate() {
        if all[..at].iter().any(|other| other.id == one.id) {
            return Err(WantedError::Twice(one.id.clone()));
        }
    }
    Ok(all)
}

/// The device of this name, and the variables that come with it.
fn named(name: String, config: &Attestation) -> Result<(Wanted, Vec<String>), WantedError> {
    let (Some(device), Some(id)) = (config.devices.get(&name), device_id(&name)) else {
        let known: Vec<_> = config.devices.keys().map(String::as_str).collect();
        let known = if known.is_empty() {
            "none".into()
        } else {
            known.join(", ")
        };
        return Err(WantedError::Unknown { name, known });
    };
    let hot = |device| Wanted {
        id: id.into(),
        path: Path::new("/dev").join(id),
        device,
        cold: false,
    };
    Ok(match device {
        Device::Vfio { address } => {
            let address = address.clone();
            (hot(Given::Function { address }), Vec::new())
        }
        Device::StandIn { path } => (hot(Given::Disk { path: path.clone() }), Vec::new()),
        Device::Cdi { spec } => {
            let found = cdi::read(spec, &name).map_err(|source| WantedError::Cdi {
                name: name.clone(),
                source,
            })?;
            let one = Wanted {
                id: id.into(),
                device: given(&name, &found.host)?,
                path: found.path,
                cold: true,
            };
            (one, found.env)
        }
    })
}

/// What a VM is given of a node of the host.
fn given(name: &str, node: &Path) -> Result<Given, WantedError> {
    if node.starts_with(VFIO) {
        let wrong = |reason| WantedError::Vfio {
            node: node.into(),
            reason,
        };
        let address = address(Path::new("/sys"), node).map_err(wrong)?;
        return Ok(Given::Function { address });
    }
    let kind = fs::metadata(node).map(|m| m.file_type());
    if kind.is_ok_and(|k| k.is_file() || k.is_block_device()) {
        let path = node.into();
        return Ok(Given::Disk { path });
    }
    Err(WantedError::Node {
        name: name.into(),
        node: node.into(),
    })
}

/// Those of these devices that are in a VM from its start.
///
/// # Errors
/// [`WantedError`], naming the device.
pub(crate) fn cold(names: &[String], config: &Attestation) -> Result<Vec<Wanted>, WantedError> {
    let all = names.iter().map(|name| named(name.clone(), config));
    let all: Vec<_> = all.collect::<Result<_, _>>()?;
    Ok(all.into_iter().map(|(w, _)| w).filter(|w| w.cold).collect())
}

/// Sets variables of a container's process; it is made after the token only.
fn add_env(spec: &mut Spec, env: Vec<String>) {
    let Some(process) = spec.process_mut() else {
        return;
    };
    let mut all = process.env().clone().unwrap_or_default();
    for one in env {
        let name = one.split('=').next().unwrap_or_default();
        let sets = |v: &String| v.split('=').next() == Some(name);
        all.retain(|v| !sets(v));
        all.push(one);
    }
    process.set_env(Some(all));
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
        let device = Device::StandIn { path: path.clone() };
        config
            .devices
            .insert("sealpod.io/stand-in=gpu0".into(), device);
        let wanted = take(&mut spec(name, ""), &Name::ALL, &config).expect("wanted");
        assert_eq!(
            wanted,
            [Wanted {
                id: "gpu0".into(),
                path: "/dev/gpu0".into(),
                device: Given::Disk { path },
                cold: false,
            }]
        );
        let e = take(&mut spec(name, ""), &[], &config).expect_err("not allowed");
        assert!(e.to_string().contains("not allowed"), "{e}");
    }

    #[test]
    fn a_cdi_device_brings_its_node_and_variables_and_is_there_from_the_start() {
        let dir = tempfile::tempdir().expect("folder");
        let at = |name: &str| dir.path().join(name);
        fs::write(at("content"), "x").expect("file");
        let node = |host: &Path| {
            let text = format!(
                r#"{{"cdiVersion":"0.6.0","kind":"sealpod.io/gpu","devices":[{{"name":"0","containerEdits":{{
                "env":["GPU=0","PATH=/gpu"],"deviceNodes":[{{"path":"/dev/gpu","hostPath":"{}"}}]}}}}]}}"#,
                host.display()
            );
            fs::write(at("cdi.json"), text).expect("file");
        };
        node(&at("content"));
        let mut config = Attestation::default();
        let device = Device::Cdi {
            spec: at("cdi.json"),
        };
        config.devices.insert("sealpod.io/gpu=0".into(), device);
        let wish = r#"{"io.sealpod.attestation.devices":"sealpod.io/gpu=0"}"#;
        let mut asks = spec(wish, "");
        let process =
            r#"{"cwd":"/","args":["x"],"env":["PATH=/bin","A=b"],"user":{"uid":0,"gid":0}}"#;
        asks.set_process(serde_json::from_str(process).expect("process"));
        let wanted = take(&mut asks, &Name::ALL, &config).expect("wanted");
        let expected = Wanted {
            id: "0".into(),
            path: "/dev/gpu".into(),
            device: Given::Disk {
                path: at("content"),
            },
            cold: true,
        };
        assert_eq!(wanted, [expected]);
        let env = asks.process().as_ref().and_then(|p| p.env().clone());
        assert_eq!(env.expect("env"), ["A=b", "GPU=0", "PATH=/gpu"]);
        let names = ["sealpod.io/gpu=0".to_owned()];
        assert_eq!(cold(&names, &config).expect("cold"), wanted);
        // A driver's node means nothing to a VM.
        node(Path::new("/dev/null"));
        let e = cold(&names, &config).expect_err("no disk").to_string();
        assert!(e.contains("/dev/null"), "{e}");
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
