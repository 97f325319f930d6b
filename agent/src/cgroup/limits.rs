//! Resource limits of the specification (made for cgroup v1) as values of cgroup v2 files. Translation
//! only; the formulas are those of the runtime specification's reference runtime, since schedulers and
//! tests on top count on them.

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use super::CgroupError;

/// One value for one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// Name in the cgroup's folder.
    pub file: String,
    /// What is written.
    pub value: String,
    /// Whether a file that does not exist is no error.
    pub optional: bool,
}

/// Values that mean "no limit" where a file of theirs is missing.
const NO_LIMIT: [&str; 2] = ["max", "100"];

fn push(all: &mut Vec<Setting>, file: impl Into<String>, value: impl ToString) {
    let value = value.to_string();
    all.push(Setting {
        file: file.into(),
        optional: NO_LIMIT.contains(&value.as_str()),
        value,
    });
}

/// A number of bytes or processes, where a negative one is none.
fn limit(value: i64) -> String {
    u64::try_from(value).map_or_else(|_| "max".into(), |v| v.to_string())
}

/// The files to write, in order.
///
/// # Errors
/// [`CgroupError::Invalid`] for what cannot be expressed.
pub fn settings(resources: &LinuxResources) -> Result<Vec<Setting>, CgroupError> {
    let mut all = Vec::new();
    if let Some(memory) = resources.memory() {
        self::memory(&mut all, memory)?;
    }
    if let Some(cpu) = resources.cpu() {
        self::cpu(&mut all, cpu);
    }
    if let Some(pids) = resources.pids() {
        // 0 has no meaning of its own in the specification: no limit.
        let value = Some(pids.limit())
            .filter(|l| *l > 0)
            .map_or("max".into(), limit);
        push(&mut all, "pids.max", value);
    }
    if let Some(io) = resources.block_io() {
        block_io(&mut all, io);
    }
    for huge in resources.hugepage_limits().iter().flatten() {
        let size = huge.page_size();
        if !size.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(CgroupError::Invalid(format!("huge page size {size:?}")));
        }
        for kind in ["max", "rsvd.max"] {
            all.push(Setting {
                file: format!("hugetlb.{size}.{kind}"),
                value: limit(huge.limit()),
                optional: true, // the guest need not have pages of every size the host has
            });
        }
    }
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (file, value) in unified {
        let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if !file.contains('.') || !file.bytes().all(good) || file.starts_with("cgroup.") {
            return Err(CgroupError::Invalid(format!(
                "unified key {file:?}: not a limit's file"
            )));
        }
        push(&mut all, file, value);
    }
    Ok(all)
}

fn memory(all: &mut Vec<Setting>, memory: &LinuxMemory) -> Result<(), CgroupError> {
    // The specification's swap limit is memory and swap together, the kernel's is swap alone.
    if let Some(both) = memory.swap().filter(|s| *s != 0) {
        let swap = match (both, memory.limit().unwrap_or_default()) {
            (..0, _) => None,
            (both, memory) if memory > 0 => {
                let swap = both
                    .checked_sub(memory)
                    .filter(|s| *s >= 0)
                    .ok_or_else(|| {
                        CgroupError::Invalid(format!(
                            "memory+swap limit {both} is below the memory limit {memory}"
                        ))
                    })?;
                Some(swap)
            }
            _ => {
                return Err(CgroupError::Invalid(
                    "a swap limit needs a memory limit".into(),
                ));
            }
        };
        all.push(Setting {
            file: "memory.swap.max".into(),
            value: swap.map_or("max".into(), limit),
            optional: true, // a guest without swap needs no limit on it
        });
    }
    if let Some(value) = memory.limit().filter(|l| *l != 0) {
        push(all, "memory.max", limit(value));
    }
    if let Some(value) = memory.reservation().filter(|l| *l != 0) {
        push(all, "memory.low", limit(value.max(0)));
    }
    Ok(())
}

fn cpu(all: &mut Vec<Setting>, cpu: &LinuxCpu) {
    if let Some(shares) = cpu.shares().filter(|s| *s != 0) {
        push(all, "cpu.weight", weight(shares));
    }
    if let Some(idle) = cpu.idle() {
        push(all, "cpu.idle", idle);
    }
    let quota = cpu.quota().filter(|q| *q != 0);
    let period = cpu.period().filter(|p| *p != 0);
    if quota.is_some() || period.is_some() {
        let quota = quota.filter(|q| *q > 0).map_or("max".into(), limit);
        let value = period.map_or(quota.clone(), |period| format!("{quota} {period}"));
        push(all, "cpu.max", value);
    }
    if let Some(burst) = cpu.burst() {
        push(all, "cpu.max.burst", burst);
    }
    for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(list) = list.as_ref().filter(|l| !l.is_empty()) {
            push(all, file, list);
        }
    }
}

/// cgroup v1 shares, 2 to 262144, as a v2 weight, 1 to 10000.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

fn block_io(all: &mut Vec<Setting>, io: &LinuxBlockIo) {
    if let Some(weight) = io.weight().filter(|w| *w != 0) {
        // v1: 10 to 1000; v2: 1 to 10000.
        let weight = 1 + (u64::from(weight).clamp(10, 1_000) - 10) * 9_999 / 990;
        all.push(Setting {
            file: "io.weight".into(),
            value: format!("default {weight}"),
            optional: true, // no weighing without a scheduler that weighs
        });
    }
    for (key, list) in [
        ("rbps", io.throttle_read_bps_device()),
        ("wbps", io.throttle_write_bps_device()),
        ("riops", io.throttle_read_iops_device()),
        ("wiops", io.throttle_write_iops_device()),
    ] {
        for device in list.iter().flatten() {
            let (major, minor, rate) = (device.major(), device.minor(), device.rate());
            push(all, "io.max", format!("{major}:{minor} {key}={rate}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(json: serde_json::Value) -> Vec<String> {
        let resources = serde_json::from_value(json).expect("resources");
        let all = settings(&resources).expect("valid");
        all.iter()
            .map(|s| format!("{}={}", s.file, s.value))
            .collect()
    }

    #[test]
    fn limits_of_a_kubernetes_pod_become_v2_values() {
        assert_eq!(
            lines(serde_json::json!({
                "memory": {"limit": 134217728, "swap": 134217728, "reservation": 67108864},
                "cpu": {"shares": 512, "quota": 50000, "period": 100000, "cpus": "0-1"},
                "pids": {"limit": 100},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
                "unified": {"memory.oom.group": "1", "memory.high": "1000"}
            })),
            [
                "memory.swap.max=0",
                "memory.max=134217728",
                "memory.low=67108864",
                "cpu.weight=20",
                "cpu.max=50000 100000",
                "cpuset.cpus=0-1",
                "pids.max=100",
                "hugetlb.2MB.max=0",
                "hugetlb.2MB.rsvd.max=0",
                "memory.high=1000",
                "memory.oom.group=1",
            ]
        );
    }

    #[test]
    fn negative_and_zero_limits_mean_none() {
        let json = serde_json::json!({"memory": {"limit": -1, "swap": -1},
            "cpu": {"quota": -1, "period": 100000, "shares": 0}, "pids": {"limit": -1}});
        assert_eq!(
            lines(json),
            [
                "memory.swap.max=max",
                "memory.max=max",
                "cpu.max=max 100000",
                "pids.max=max"
            ]
        );
        assert!(lines(serde_json::json!({"memory": {"limit": 0}})).is_empty());
    }

    #[test]
    fn shares_span_the_range_of_weights() {
        assert_eq!((weight(2), weight(1024), weight(262_144)), (1, 39, 10_000));
        assert_eq!((weight(0), weight(u64::MAX)), (1, 10_000));
    }

    #[test]
    fn resources_that_cannot_be_or_would_leave_the_group_are_refused() {
        for bad in [
            serde_json::json!({"unified": {"../x": "1"}}),
            serde_json::json!({"unified": {"cgroup.procs": "1"}}),
            serde_json::json!({"unified": {"memory": "1"}}),
            serde_json::json!({"memory": {"limit": 100, "swap": 50}}),
            serde_json::json!({"memory": {"swap": 50}}),
            serde_json::json!({"hugepageLimits": [{"pageSize": "../2MB", "limit": 0}]}),
        ] {
            let resources = serde_json::from_value(bad.clone()).expect("resources");
            assert!(settings(&resources).is_err(), "{bad}");
        }
    }
}
