//! `[attestation]`: who appraises pods, by which policies, and the devices that are released only to
//! pods that were affirmed.

use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
};

use sealpod_attestation::evidence::Tee;
use serde::{Deserialize, Serialize};

use super::Complaint;

/// The policy that a pod gets that names none.
pub const DEFAULT_POLICY: &str = "default";
/// Longest life of a token, seconds: no lease lasts longer.
const LEASE_MAX: u32 = 300;

/// `[attestation]`. Empty paths and texts stand for what is said at each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Attestation {
    /// URL of the verifier; empty: the shim is the verifier itself.
    pub verifier: String,
    /// What a remote verifier is known by, a file: its token key (JWK) and certificate (PEM).
    pub verifier_trust: PathBuf,
    /// Whom tokens are for.
    pub audience: String,
    /// Folder of the shim's own verifier: its signing key and the audit logs.
    pub state_dir: PathBuf,
    /// File of trust anchors; empty: the manufacturers'.
    pub anchors: PathBuf,
    /// Folder of collateral; empty: none.
    pub collateral: PathBuf,
    /// Folder of a simulator's authority: pods on nodes without a TEE get simulated evidence. Empty: none.
    pub simulator: PathBuf,
    /// The TEE that it simulates.
    pub simulator_tee: Tee,
    /// A defect that all simulated evidence gets, for tests; empty: none.
    pub simulator_defect: String,
    /// A lease is renewed after half of this, seconds.
    pub lease_seconds: u32,
    /// By name.
    pub policies: BTreeMap<String, Policy>,
    /// By CDI name, `vendor/class=name`.
    pub devices: BTreeMap<String, Device>,
}

/// `[attestation.policies.<name>]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// File with rules in Rego; empty: the built-in ones.
    pub rego: PathBuf,
    /// File of reference values; empty: none.
    pub reference_values: PathBuf,
    /// What becomes of a pod whose lease is not renewed.
    pub on_loss: OnLoss,
}

/// What becomes of a pod that is no longer affirmed. Its devices are taken away in any case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnLoss {
    /// It ends.
    #[default]
    Kill,
    /// Its containers stand still, for someone to look at.
    Freeze,
}

/// `[attestation.devices."<name>"]`: a device of this host that is given to affirmed pods.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Device {
    /// A PCI function, by VFIO.
    Vfio {
        /// `dddd:bb:dd.f`.
        address: String,
    },
    /// An NVMe disk that QEMU emulates, in place of a GPU where there is none.
    StandIn {
        /// File with its content; the guest may only read it. Absolute.
        path: PathBuf,
    },
    /// What a specification of the Container Device Interface names: in the VM from its start, and withheld
    /// there until the pod is affirmed.
    Cdi {
        /// The specification, JSON or YAML. Absolute.
        spec: PathBuf,
    },
}

impl Default for Attestation {
    fn default() -> Self {
        Self {
            verifier: String::new(),
            verifier_trust: PathBuf::new(),
            audience: "sealpod".into(),
            state_dir: "/var/lib/sealpod".into(),
            anchors: PathBuf::new(),
            collateral: PathBuf::new(),
            simulator: PathBuf::new(),
            simulator_tee: Tee::Snp,
            simulator_defect: String::new(),
            lease_seconds: LEASE_MAX,
            policies: BTreeMap::new(),
            devices: BTreeMap::new(),
        }
    }
}

impl Attestation {
    /// Whether any pod of this node can be attested.
    #[must_use]
    pub fn is_configured(&self) -> bool {
        !self.policies.is_empty() || !self.devices.is_empty()
    }

    pub(super) fn check_values(&self) -> Result<(), Complaint> {
        if !self.state_dir.is_absolute() {
            return Err(("attestation.state_dir", "an absolute path".into()));
        }
        if self.audience.is_empty() || self.audience.len() > 256 {
            return Err(("attestation.audience", "1 to 256 bytes".into()));
        }
        if !(2..=LEASE_MAX).contains(&self.lease_seconds) {
            return Err(("attestation.lease_seconds", format!("2 to {LEASE_MAX}")));
        }
        for (key, path) in [
            ("attestation.anchors", &self.anchors),
            ("attestation.collateral", &self.collateral),
            ("attestation.simulator", &self.simulator),
            ("attestation.verifier_trust", &self.verifier_trust),
        ] {
            optional(key, path)?;
        }
        for policy in self.policies.values() {
            optional("attestation.policies.*.rego", &policy.rego)?;
            let values = &policy.reference_values;
            optional("attestation.policies.*.reference_values", values)?;
        }
        for (name, device) in &self.devices {
            if device_id(name).is_none() {
                let allowed =
                    "names like vendor.com/class=name, the last part 1 to 20 of A-Z a-z 0-9 _ -";
                return Err(("attestation.devices", allowed.into()));
            }
            match device {
                Device::StandIn { path } | Device::Cdi { spec: path } if path.is_absolute() => {}
                Device::Cdi { .. } => {
                    return Err(("attestation.devices.*.spec", "an absolute path".into()));
                }
                Device::StandIn { .. } => {
                    return Err(("attestation.devices.*.path", "an absolute path".into()));
                }
                Device::Vfio { address } if is_pci_address(address) => {}
                Device::Vfio { .. } => {
                    let allowed = "a PCI address like 0000:65:00.0";
                    return Err(("attestation.devices.*.address", allowed.into()));
                }
            }
        }
        Ok(())
    }

    pub(super) fn check_together(&self) -> Result<(), Complaint> {
        if !self.simulator.as_os_str().is_empty()
            && self.anchors.as_os_str().is_empty()
            && self.verifier.is_empty()
        {
            let allowed = "a file, because attestation.simulator is set: no manufacturer's anchor \
                accepts what a simulator says";
            return Err(("attestation.anchors", allowed.into()));
        }
        if !self.verifier.is_empty() && self.verifier_trust.as_os_str().is_empty() {
            let allowed = "a file, because attestation.verifier is set";
            return Err(("attestation.verifier_trust", allowed.into()));
        }
        Ok(())
    }
}

pub(super) fn optional(key: &'static str, path: &Path) -> Result<(), Complaint> {
    let plain = path
        .components()
        .all(|c| !matches!(c, Component::ParentDir));
    if path.as_os_str().is_empty() || (path.is_absolute() && plain) {
        return Ok(());
    }
    Err((key, "empty, or an absolute path without `..`".into()))
}

/// By what the guest knows the device of this CDI name: its last part.
#[must_use]
pub fn device_id(name: &str) -> Option<&str> {
    let (kind, id) = name.split_once('=')?;
    let (vendor, class) = kind.split_once('/')?;
    let word = |text: &str, most: usize, more: &[u8]| {
        let ok = |b: u8| b.is_ascii_alphanumeric() || more.contains(&b);
        (1..=most).contains(&text.len()) && text.bytes().all(ok)
    };
    let ok = word(vendor, 63, b".-_") && word(class, 63, b"-_") && word(id, 20, b"-_");
    ok.then_some(id)
}

/// Whether this is a PCI function's full address.
#[must_use]
pub fn is_pci_address(text: &str) -> bool {
    let shape = b"hhhh:hh:hh.o";
    text.len() == shape.len()
        && text.bytes().zip(shape).all(|(b, s)| match s {
            b'h' => b.is_ascii_digit() || (b'a'..=b'f').contains(&b),
            b'o' => (b'0'..=b'7').contains(&b),
            s => b == *s,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_are_cdi_names_and_their_last_part_is_the_id() {
        assert_eq!(device_id("sealpod.io/stand-in=gpu0"), Some("gpu0"));
        for bad in [
            "gpu0",
            "sealpod.io/gpu",
            "sealpod.io=gpu0",
            "/gpu=a",
            "v/c=",
            "v/c=a b",
            "v/c=../x",
            "v/c=abcdefghijklmnopqrstu",
        ] {
            assert_eq!(device_id(bad), None, "{bad}");
        }
    }

    #[test]
    fn pci_addresses_are_whole() {
        assert!(is_pci_address("0000:65:00.0"));
        for bad in [
            "65:00.0",
            "0000:65:00.8",
            "0000:65:00.0 ",
            "../0:65:00.0",
            "0000:6G:00.0",
        ] {
            assert!(!is_pci_address(bad), "{bad}");
        }
    }
}
