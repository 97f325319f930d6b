//! What a pod may decide about its VM through annotations, behind the node's allow-list.
//!
//! | name in the allow-list | annotation | Kata's name for it | value |
//! |---|---|---|---|
//! | `vcpus` | `io.sealpod.vcpus` | `…hypervisor.default_vcpus` | vCPUs, at least |
//! | `memory_mib` | `io.sealpod.memory_mib` | `…hypervisor.default_memory` | MiB for the workload, at least |
//! | `kernel_params` | `io.sealpod.kernel_params` | `…hypervisor.kernel_params` | words, appended |
//! | `attestation.policy` | `io.sealpod.attestation.policy` | | policy that the pod has to pass |
//! | `attestation.devices` | `io.sealpod.attestation.devices` | | CDI names, with commas between them |
//! | `init_data` | `io.sealpod.init_data` | `…hypervisor.cc_init_data` | base64 of gzip of the init-data |
//! | `confidential` | `io.sealpod.confidential` | `…hypervisor.confidential_guest` | `snp`, `tdx`, `auto`; Kata's: `true` |
//!
//! (`…` is `io.katacontainers.config`.) An annotation of either family that is not in this table, or
//! that the node does not allow, is an error: what is asked for is never left out silently.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::{
    config::{Confidential, check_kernel_param, device_id},
    vm::{MEMORY_MAX_MIB, VCPUS_MAX},
};

/// Every annotation with this prefix is ours.
const PREFIX: &str = "io.sealpod.";
/// Every annotation with this prefix configures a Kata sandbox.
const KATA_PREFIX: &str = "io.katacontainers.config.";
/// Longest value, bytes.
const VALUE_MAX: usize = 4096;
/// Longest init-data as an annotation, bytes: Kubernetes takes 256 KiB of annotations in all.
const INIT_DATA_MAX: usize = 256 << 10;

/// An annotation, as the allow-list spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Name {
    /// Least number of vCPUs.
    #[serde(rename = "vcpus")]
    Vcpus,
    /// Least memory for the workload, MiB.
    #[serde(rename = "memory_mib")]
    MemoryMib,
    /// More words for the guest kernel's command line.
    #[serde(rename = "kernel_params")]
    KernelParams,
    /// The policy that the pod has to pass.
    #[serde(rename = "attestation.policy")]
    AttestationPolicy,
    /// Devices that are released to it once it has.
    #[serde(rename = "attestation.devices")]
    AttestationDevices,
    /// What its evidence binds.
    #[serde(rename = "init_data")]
    InitData,
    /// Its memory is kept from the host.
    #[serde(rename = "confidential")]
    Confidential,
}

impl Name {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Vcpus,
        Self::MemoryMib,
        Self::KernelParams,
        Self::AttestationPolicy,
        Self::AttestationDevices,
        Self::InitData,
        Self::Confidential,
    ];

    /// As the allow-list spells it, which is the annotation without its prefix.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Vcpus => "vcpus",
            Self::MemoryMib => "memory_mib",
            Self::KernelParams => "kernel_params",
            Self::AttestationPolicy => "attestation.policy",
            Self::AttestationDevices => "attestation.devices",
            Self::InitData => "init_data",
            Self::Confidential => "confidential",
        }
    }

    fn of(annotation: &str) -> Option<Self> {
        if let Some(ours) = annotation.strip_prefix(PREFIX) {
            return Self::ALL.into_iter().find(|n| n.as_str() == ours);
        }
        match annotation.strip_prefix(KATA_PREFIX)? {
            "hypervisor.default_vcpus" => Some(Self::Vcpus),
            "hypervisor.default_memory" => Some(Self::MemoryMib),
            "hypervisor.kernel_params" => Some(Self::KernelParams),
            "hypervisor.cc_init_data" => Some(Self::InitData),
            "hypervisor.confidential_guest" => Some(Self::Confidential),
            _ => None,
        }
    }
}

/// What a pod asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wishes {
    /// Least number of vCPUs.
    pub vcpus: Option<u32>,
    /// Least memory for the workload, MiB.
    pub memory_mib: Option<u64>,
    /// More words for the guest kernel's command line.
    pub kernel_params: Vec<String>,
    /// Name of the policy that the pod has to pass.
    pub policy: Option<String>,
    /// CDI names of devices.
    pub devices: Vec<String>,
    /// Init-data, raw.
    pub init_data: Option<Vec<u8>>,
    /// How its memory is kept from the host; never less than what the node wants.
    pub confidential: Option<Confidential>,
}

/// An annotation that cannot be granted.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    /// Not in the table.
    #[error("Annotation {annotation} is not known; known are {}", known())]
    Unknown {
        /// Its key.
        annotation: String,
    },
    /// Not in the allow-list.
    #[error("Annotation {annotation} is not allowed on this node; allowed are: {allowed}")]
    NotAllowed {
        /// Its key.
        annotation: String,
        /// The allow-list.
        allowed: String,
    },
    /// A wrong value.
    #[error("Annotation {annotation} has a value that is not allowed; allowed is {allowed}")]
    Value {
        /// Its key.
        annotation: String,
        /// In words.
        allowed: String,
    },
    /// Two annotations for the same thing.
    #[error("Annotation {annotation} says again what another one says already; give one of them")]
    Twice {
        /// The later one's key, in alphabetical order.
        annotation: String,
    },
}

fn known() -> String {
    Name::ALL
        .map(|n| format!("{PREFIX}{}", n.as_str()))
        .join(", ")
}

/// Reads the annotations of a pod's sandbox (or of a container that is a pod of its own).
///
/// # Errors
/// [`AnnotationError`], naming the annotation.
pub fn read(
    annotations: &HashMap<String, String>,
    allow: &[Name],
) -> Result<Wishes, AnnotationError> {
    let mut wishes = Wishes::default();
    let mut seen = Vec::new();
    let mut sorted: Vec<_> = annotations
        .iter()
        .filter(|(k, _)| k.starts_with(PREFIX) || k.starts_with(KATA_PREFIX))
        .collect();
    sorted.sort();
    for (key, value) in sorted {
        let annotation = || key.chars().take(128).collect::<String>();
        let name = Name::of(key).ok_or_else(|| AnnotationError::Unknown {
            annotation: annotation(),
        })?;
        if !allow.contains(&name) {
            let allowed: Vec<_> = allow.iter().map(|n| n.as_str()).collect();
            return Err(AnnotationError::NotAllowed {
                annotation: annotation(),
                allowed: if allowed.is_empty() {
                    "none".into()
                } else {
                    allowed.join(", ")
                },
            });
        }
        if seen.contains(&name) {
            return Err(AnnotationError::Twice {
                annotation: annotation(),
            });
        }
        seen.push(name);
        set(&mut wishes, name, value).map_err(|allowed| AnnotationError::Value {
            annotation: annotation(),
            allowed,
        })?;
    }
    Ok(wishes)
}

/// Takes one value over; an error is what is allowed, in words.
fn set(wishes: &mut Wishes, name: Name, value: &str) -> Result<(), String> {
    let most = match name {
        Name::InitData => INIT_DATA_MAX,
        _ => VALUE_MAX,
    };
    if value.len() > most {
        return Err(format!("at most {most} bytes"));
    }
    let number = |least: u64, most: u64| match value.parse::<u64>() {
        Ok(n) if (least..=most).contains(&n) => Ok(n),
        _ => Err(format!("a number from {least} to {most}")),
    };
    match name {
        // In range, so nothing is cut off.
        Name::Vcpus => wishes.vcpus = Some(number(1, VCPUS_MAX.into())? as u32),
        Name::MemoryMib => wishes.memory_mib = Some(number(16, MEMORY_MAX_MIB)?),
        Name::KernelParams => {
            for word in value.split_ascii_whitespace() {
                check_kernel_param(word)?;
                wishes.kernel_params.push(word.into());
            }
        }
        Name::AttestationPolicy => {
            if !sealpod_protocol::valid_id(value) {
                return Err("the name of a policy: 1 to 128 of A-Z a-z 0-9 _ . -".into());
            }
            wishes.policy = Some(value.into());
        }
        Name::AttestationDevices => {
            for name in value.split(',').map(str::trim) {
                if device_id(name).is_none() || wishes.devices.iter().any(|d| d == name) {
                    let allowed =
                        "different CDI names (vendor.com/class=name), commas between them";
                    return Err(allowed.into());
                }
                wishes.devices.push(name.into());
            }
        }
        Name::InitData => wishes.init_data = Some(init_data(value)?),
        Name::Confidential => {
            wishes.confidential = match value {
                "snp" => Some(Confidential::Snp),
                "tdx" => Some(Confidential::Tdx),
                "auto" | "true" => Some(Confidential::Auto),
                // No wish, which is not a wish for less.
                "false" => None,
                _ => return Err("snp, tdx, auto, true or false".into()),
            }
        }
    }
    Ok(())
}

/// Base64 of gzip, as Kata has it.
fn init_data(value: &str) -> Result<Vec<u8>, String> {
    use std::io::Read;
    let allowed = || "base64 of gzip of init-data of at most 256 KiB".to_owned();
    let packed = sealpod_attestation::encoding::unbase64(value).map_err(|_| allowed())?;
    let mut raw = Vec::new();
    let most = sealpod_attestation::init_data::MAX_INIT_DATA as u64;
    flate2::read::GzDecoder::new(&packed[..])
        .take(most + 1)
        .read_to_end(&mut raw)
        .map_err(|_| allowed())?;
    if raw.is_empty() || raw.len() as u64 > most {
        return Err(allowed());
    }
    Ok(raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&str, &str)], allow: &[Name]) -> Result<Wishes, AnnotationError> {
        let map = pairs
            .iter()
            .map(|(k, v)| ((*k).into(), (*v).into()))
            .collect();
        read(&map, allow)
    }

    #[test]
    fn both_families_mean_the_same() {
        let ours = of(
            &[
                ("io.sealpod.vcpus", "3"),
                ("io.sealpod.memory_mib", "700"),
                ("io.sealpod.kernel_params", " a=1  b "),
            ],
            &Name::ALL,
        );
        let kata = of(
            &[
                ("io.katacontainers.config.hypervisor.default_vcpus", "3"),
                ("io.katacontainers.config.hypervisor.default_memory", "700"),
                ("io.katacontainers.config.hypervisor.kernel_params", "a=1 b"),
            ],
            &Name::ALL,
        );
        let wishes = ours.expect("wishes");
        assert_eq!((wishes.vcpus, wishes.memory_mib), (Some(3), Some(700)));
        assert_eq!(wishes.kernel_params, ["a=1", "b"]);
        assert_eq!(kata, Ok(wishes));
    }

    #[test]
    fn annotations_of_others_are_none_of_our_business() {
        let others = [
            ("io.kubernetes.cri.sandbox-id", "x"),
            ("io.katacontainers.pkg.oci.container_type", "pod_sandbox"),
        ];
        assert_eq!(of(&others, &[]), Ok(Wishes::default()));
    }

    #[test]
    fn unknown_forbidden_and_double_annotations_are_named() {
        let e = |pairs: &[(&str, &str)], allow: &[Name]| {
            of(pairs, allow).expect_err("error").to_string()
        };
        assert_eq!(
            e(&[("io.sealpod.vcpu", "1")], &Name::ALL),
            "Annotation io.sealpod.vcpu is not known; known are io.sealpod.vcpus, io.sealpod.memory_mib, io.sealpod.kernel_params, io.sealpod.attestation.policy, io.sealpod.attestation.devices, io.sealpod.init_data, io.sealpod.confidential"
        );
        let kata = "io.katacontainers.config.hypervisor.machine_type";
        assert!(
            e(&[(kata, "q35")], &Name::ALL).starts_with(&format!("Annotation {kata} is not known"))
        );
        assert_eq!(
            e(&[("io.sealpod.kernel_params", "x")], &[Name::Vcpus]),
            "Annotation io.sealpod.kernel_params is not allowed on this node; allowed are: vcpus"
        );
        assert!(e(&[("io.sealpod.vcpus", "1")], &[]).ends_with("allowed are: none"));
        let twice = [
            ("io.sealpod.vcpus", "1"),
            ("io.katacontainers.config.hypervisor.default_vcpus", "1"),
        ];
        assert!(e(&twice, &Name::ALL).contains("says again"));
        let kata = "io.katacontainers.config.hypervisor.cc_init_data";
        assert!(e(&[(kata, "H4sI")], &[]).contains("not allowed on this node"));
        assert!(e(&[(kata, "H4sI")], &Name::ALL).contains("base64 of gzip"));
    }

    #[test]
    fn hostile_values_are_refused() {
        let long = "x".repeat(VALUE_MAX + 1);
        for (key, value) in [
            ("io.sealpod.vcpus", "0"),
            ("io.sealpod.vcpus", "-1"),
            ("io.sealpod.vcpus", "256"),
            ("io.sealpod.vcpus", "4294967297"),
            ("io.sealpod.vcpus", ""),
            ("io.sealpod.memory_mib", "1.5"),
            ("io.sealpod.memory_mib", "15"),
            ("io.sealpod.kernel_params", "quiet init=/x"),
            ("io.sealpod.kernel_params", "sealpod.anything"),
            ("io.sealpod.kernel_params", "a\u{7f}"),
            ("io.sealpod.kernel_params", long.as_str()),
            ("io.sealpod.attestation.policy", "a/b"),
            ("io.sealpod.attestation.policy", ""),
            ("io.sealpod.attestation.devices", ""),
            ("io.sealpod.attestation.devices", "v.io/c=a,v.io/c=a"),
            ("io.sealpod.attestation.devices", "/dev/nvme0"),
            ("io.sealpod.init_data", ""),
            ("io.sealpod.init_data", "dmVyc2lvbg=="),
        ] {
            let e = of(&[(key, value)], &Name::ALL);
            assert!(
                matches!(e, Err(AnnotationError::Value { .. })),
                "{key}={value}: {e:?}"
            );
        }
    }
}
