//! How large a pod's VM is: from the pod's limits, its annotations and the node's configuration.
//! Arithmetic only.
//!
//! vCPUs: the CPU limit rounded up; without one, the default. Memory: the memory limit; without one,
//! the default. An annotation is a lower bound for both, the configured maximum (or the host) an upper
//! one. Then the guest's own needs are added to the memory:
//!
//! ```text
//! guest memory = (workload + sizing.overhead_memory_mib) × 64/63, rounded up to 2 MiB
//! ```
//!
//! The overhead is for kernel and agent; the 63rd part for the kernel's page descriptors (64 bytes for
//! each page of 4 KiB). So a container whose limit is L can really use L.

use std::collections::HashMap;

use oci_spec::runtime::Spec;

use crate::{annotations::Wishes, config::Sizing};

/// Least memory limit that a pod may have, MiB. Below it no program of any size runs.
pub const WORKLOAD_MIN_MIB: u64 = 4;
/// Guest memory is a multiple of this, MiB: a huge page.
const ALIGN_MIB: u64 = 2;
/// Page descriptors take one part of this many.
const DESCRIPTOR_PART: u64 = 64;
const MIB: u64 = 1 << 20;

/// Annotations with which containerd tells what the whole pod may use (containerd, pkg/cri/annotations
/// and internal/cri/annotations); cgroup v1 units.
const CRI_CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const CRI_CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const CRI_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// What the host has to give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// CPUs that this process may use.
    pub cpus: u32,
    /// Memory, MiB.
    pub memory_mib: u64,
}

impl Host {
    /// This host. A value that cannot be found out limits nothing.
    #[must_use]
    pub fn this() -> Self {
        let cpus = std::thread::available_parallelism()
            .map_or(u32::MAX, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let total = meminfo
            .lines()
            .find_map(|l| l.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
        let total: Option<u64> = total.and_then(|kib| kib.trim().parse().ok());
        Self {
            cpus,
            memory_mib: total.map_or(u64::MAX, |kib| kib / 1024),
        }
    }
}

/// The limits of a pod; none where it has none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Thousandths of a CPU.
    pub cpu_milli: Option<u64>,
    /// Bytes.
    pub memory_bytes: Option<u64>,
}

/// The size of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// vCPUs.
    pub vcpus: u32,
    /// Guest memory, overhead included, MiB.
    pub memory_mib: u64,
}

/// A pod that has no size.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizingError {
    /// Too little memory.
    #[error(
        "Memory limit of {bytes} bytes is below {WORKLOAD_MIN_MIB} MiB, the least for a workload in a VM"
    )]
    TooLittleMemory {
        /// The limit.
        bytes: u64,
    },
    /// An annotation of containerd is not a number.
    #[error("Annotation {key} has the value `{value}`; allowed is a number")]
    NotANumber {
        /// Its key.
        key: &'static str,
        /// Its beginning.
        value: String,
    },
}

/// The limits of a pod: of the whole pod where a CRI client states them, else of the container that
/// `spec` describes.
///
/// # Errors
/// [`SizingError::NotANumber`].
pub fn limits(spec: &Spec) -> Result<Limits, SizingError> {
    let empty = HashMap::new();
    let annotations = spec.annotations().as_ref().unwrap_or(&empty);
    let number = |key: &'static str| match annotations.get(key) {
        Some(value) => value
            .parse::<i64>()
            .map(Some)
            .map_err(|_| SizingError::NotANumber {
                key,
                value: value.chars().take(32).collect(),
            }),
        None => Ok(None),
    };
    let resources = spec.linux().as_ref().and_then(|l| l.resources().as_ref());
    let cpu = resources.and_then(|r| r.cpu().as_ref());
    let memory = resources.and_then(|r| r.memory().as_ref());

    let quota = number(CRI_CPU_QUOTA)?.or_else(|| cpu.and_then(oci_spec::runtime::LinuxCpu::quota));
    let period = match number(CRI_CPU_PERIOD)? {
        Some(period) => u64::try_from(period).ok(),
        None => cpu.and_then(oci_spec::runtime::LinuxCpu::period),
    };
    let memory =
        number(CRI_MEMORY)?.or_else(|| memory.and_then(oci_spec::runtime::LinuxMemory::limit));
    Ok(Limits {
        cpu_milli: milli(quota, period),
        memory_bytes: memory.and_then(positive),
    })
}

/// A limit of 0 or less is no limit, in cgroups as in Kubernetes.
fn positive(limit: i64) -> Option<u64> {
    u64::try_from(limit).ok().filter(|l| *l > 0)
}

/// Thousandths of a CPU; the kernel's default period is 100 ms.
fn milli(quota: Option<i64>, period: Option<u64>) -> Option<u64> {
    let quota = positive(quota?)?;
    let period = period.filter(|p| *p > 0).unwrap_or(100_000);
    Some(quota.saturating_mul(1000).div_ceil(period))
}

/// The size of the VM of a pod with these limits and annotations.
///
/// # Errors
/// [`SizingError::TooLittleMemory`].
pub fn size(
    limits: Limits,
    wishes: &Wishes,
    config: &Sizing,
    host: Host,
) -> Result<Size, SizingError> {
    let most = |configured: u64, host: u64| match configured {
        0 => host,
        n => n.min(host),
    };
    let limit = limits.cpu_milli.map(|m| m.div_ceil(1000));
    let vcpus = at_least(limit, wishes.vcpus.map(u64::from))
        .unwrap_or(config.default_vcpus.into())
        .min(most(config.max_vcpus.into(), host.cpus.into()))
        .max(1);

    if let Some(bytes) = limits.memory_bytes
        && bytes < WORKLOAD_MIN_MIB * MIB
    {
        return Err(SizingError::TooLittleMemory { bytes });
    }
    let limit = limits.memory_bytes.map(|b| b.div_ceil(MIB));
    let workload = at_least(limit, wishes.memory_mib)
        .unwrap_or(config.default_memory_mib)
        .min(most(config.max_memory_mib, host.memory_mib))
        .max(WORKLOAD_MIN_MIB);
    // The clamp above keeps this far from overflow, except on a host of unknown size.
    let net = workload.saturating_add(config.overhead_memory_mib);
    let gross = net.saturating_add(net.div_ceil(DESCRIPTOR_PART - 1));
    Ok(Size {
        vcpus: u32::try_from(vcpus).unwrap_or(u32::MAX),
        memory_mib: gross.checked_next_multiple_of(ALIGN_MIB).unwrap_or(gross),
    })
}

fn at_least(limit: Option<u64>, wish: Option<u64>) -> Option<u64> {
    limit.max(wish)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Host = Host {
        cpus: 8,
        memory_mib: 16_384,
    };

    fn of(cpu_milli: Option<u64>, mib: Option<u64>, wishes: &Wishes) -> (u32, u64) {
        let limits = Limits {
            cpu_milli,
            memory_bytes: mib.map(|m| m * MIB),
        };
        let size = size(limits, wishes, &Sizing::default(), HOST).expect("size");
        (size.vcpus, size.memory_mib)
    }

    #[test]
    fn defaults_limits_and_annotations() {
        let none = Wishes::default();
        // (512 + 64) × 64/63 = 585.1…
        assert_eq!(of(None, None, &none), (1, 586));
        assert_eq!(of(Some(1500), Some(1024), &none), (2, 1106));
        assert_eq!(of(Some(100_000), Some(1 << 30), &none).0, 8);
        let more = Wishes {
            vcpus: Some(3),
            memory_mib: Some(512),
            ..Wishes::default()
        };
        assert_eq!(of(Some(500), Some(100), &more), (3, 586));
        assert_eq!(of(Some(4000), Some(1024), &more), (4, 1106));
    }

    #[test]
    fn configured_maximum_holds_against_annotations() {
        let config = Sizing {
            max_vcpus: 2,
            max_memory_mib: 256,
            default_memory_mib: 256,
            ..Sizing::default()
        };
        let wishes = Wishes {
            vcpus: Some(255),
            memory_mib: Some(1 << 24),
            ..Wishes::default()
        };
        let size = size(Limits::default(), &wishes, &config, HOST).expect("size");
        assert_eq!((size.vcpus, size.memory_mib), (2, 326));
    }

    #[test]
    fn limit_that_no_workload_fits_in_is_refused_with_numbers() {
        let limits = Limits {
            memory_bytes: Some(MIB),
            ..Limits::default()
        };
        let e = size(limits, &Wishes::default(), &Sizing::default(), HOST).expect_err("1 MiB");
        assert_eq!(
            e.to_string(),
            "Memory limit of 1048576 bytes is below 4 MiB, the least for a workload in a VM"
        );
    }

    /// Numbers that a client may send, from a fixed generator (xorshift64).
    fn numbers(count: usize) -> impl Iterator<Item = u64> {
        let edges = [
            1,
            MIB,
            4 * MIB,
            u64::MAX,
            u64::MAX - 1,
            i64::MAX as u64,
            1 << 40,
        ];
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let random = std::iter::repeat_with(move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state >> (state % 60)
        });
        edges.into_iter().chain(random.take(count))
    }

    #[test]
    fn any_limits_give_a_vm_that_fits_the_host_and_holds_the_workload() {
        for (cpu, memory) in numbers(20_000).zip(numbers(20_100).skip(53)) {
            let limits = Limits {
                cpu_milli: Some(cpu),
                memory_bytes: Some(memory),
            };
            let Ok(size) = size(limits, &Wishes::default(), &Sizing::default(), HOST) else {
                assert!(memory < WORKLOAD_MIN_MIB * MIB, "{memory}");
                continue;
            };
            assert!((1..=HOST.cpus).contains(&size.vcpus), "{limits:?}");
            assert_eq!(size.memory_mib % ALIGN_MIB, 0);
            // What is left after descriptors and overhead is the limit, or all that the host has.
            let usable = size.memory_mib - size.memory_mib.div_ceil(64) - 64;
            let wanted = memory.div_ceil(MIB).min(HOST.memory_mib);
            assert!(usable + 1 >= wanted, "{limits:?} {size:?}");
            assert!(
                size.memory_mib <= (wanted + 64) * 64 / 63 + 1 + ALIGN_MIB,
                "{limits:?} {size:?}"
            );
        }
    }

    #[test]
    fn more_limit_never_means_less_vm() {
        let mut bytes: Vec<u64> = numbers(2_000).filter(|b| *b >= 4 * MIB).collect();
        bytes.sort_unstable();
        let sizes = bytes.iter().map(|b| {
            let limits = Limits {
                cpu_milli: Some(*b),
                memory_bytes: Some(*b),
            };
            size(limits, &Wishes::default(), &Sizing::default(), HOST).expect("size")
        });
        let sizes: Vec<_> = sizes.collect();
        assert!(sizes.is_sorted_by_key(|s| s.memory_mib) && sizes.is_sorted_by_key(|s| s.vcpus));
    }

    fn spec(json: &str) -> Result<Limits, SizingError> {
        limits(&serde_json::from_str(json).expect("spec"))
    }

    #[test]
    fn limits_come_from_the_pod_before_the_container() {
        let container = r#""linux":{"resources":{"cpu":{"quota":150000,"period":100000},"memory":{"limit":1048576000}}}"#;
        let alone = spec(&format!(r#"{{"ociVersion":"1.0.2",{container}}}"#)).expect("limits");
        assert_eq!(
            (alone.cpu_milli, alone.memory_bytes),
            (Some(1500), Some(1_048_576_000))
        );
        let pod = r#""annotations":{"io.kubernetes.cri.sandbox-cpu-period":"100000","io.kubernetes.cri.sandbox-cpu-quota":"300000","io.kubernetes.cri.sandbox-memory":"0"}"#;
        let both = spec(&format!(r#"{{"ociVersion":"1.0.2",{container},{pod}}}"#)).expect("limits");
        assert_eq!((both.cpu_milli, both.memory_bytes), (Some(3000), None));
    }

    #[test]
    fn unlimited_is_no_limit_and_nonsense_is_an_error() {
        let none = spec(
            r#"{"ociVersion":"1.0.2","linux":{"resources":{"cpu":{"quota":-1,"period":0},"memory":{"limit":-1}}}}"#,
        );
        assert_eq!(none, Ok(Limits::default()));
        let e = spec(
            r#"{"ociVersion":"1.0.2","annotations":{"io.kubernetes.cri.sandbox-memory":"lots"}}"#,
        );
        assert!(matches!(e, Err(SizingError::NotANumber { .. })));
    }
}
