//! A container's counters as containerd's `io.containerd.cgroups.v2.Metrics`. Reading and translation
//! only.

use std::fs;
use std::path::Path;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats,
    PidsStat,
};
use protobuf::MessageField;

use super::read_file;

/// "max" in a limit's file.
const UNLIMITED: u64 = u64::MAX;

/// Value of `key` in a file of `key value` lines.
pub(super) fn flat(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        (name == key).then(|| value.trim().parse().ok())?
    })
}

/// Value of a file with one number, or "max".
fn single(text: &str) -> u64 {
    match text.trim() {
        "max" => UNLIMITED,
        number => number.parse().unwrap_or_default(),
    }
}

/// The counters of the group at `path`. What the guest's kernel does not count is absent or zero.
#[must_use]
pub fn read(path: &Path) -> Metrics {
    let file = |name: &str| read_file(&path.join(name)).ok();
    let number = |name: &str| file(name).map(|text| single(&text)).unwrap_or_default();
    let mut metrics = Metrics::new();
    if let Some(current) = file("pids.current") {
        metrics.pids = MessageField::some(PidsStat {
            current: single(&current),
            limit: number("pids.max"),
            ..Default::default()
        });
    }
    if let Some(text) = file("cpu.stat") {
        let mut cpu = self::cpu(&text);
        cpu.psi = psi(file("cpu.pressure"));
        metrics.cpu = MessageField::some(cpu);
    }
    if let Some(text) = file("memory.stat") {
        let mut memory = self::memory(&text);
        memory.usage = number("memory.current");
        memory.usage_limit = number("memory.max");
        memory.max_usage = number("memory.peak");
        memory.swap_usage = number("memory.swap.current");
        memory.swap_limit = number("memory.swap.max");
        memory.swap_max_usage = number("memory.swap.peak");
        memory.psi = psi(file("memory.pressure"));
        metrics.memory = MessageField::some(memory);
    }
    if let Some(text) = file("memory.events") {
        metrics.memory_events = MessageField::some(memory_events(&text));
    }
    if let Some(text) = file("io.stat") {
        metrics.io = MessageField::some(IOStat {
            usage: io(&text),
            psi: psi(file("io.pressure")),
            ..Default::default()
        });
    }
    metrics.hugetlb = huge(path);
    metrics
}

fn cpu(text: &str) -> CPUStat {
    let value = |key| flat(text, key).unwrap_or_default();
    CPUStat {
        usage_usec: value("usage_usec"),
        user_usec: value("user_usec"),
        system_usec: value("system_usec"),
        nr_periods: value("nr_periods"),
        nr_throttled: value("nr_throttled"),
        throttled_usec: value("throttled_usec"),
        nr_bursts: value("nr_bursts"),
        burst_usec: value("burst_usec"),
        ..Default::default()
    }
}

fn memory(text: &str) -> MemoryStat {
    let value = |key| flat(text, key).unwrap_or_default();
    MemoryStat {
        anon: value("anon"),
        file: value("file"),
        kernel_stack: value("kernel_stack"),
        slab: value("slab"),
        sock: value("sock"),
        shmem: value("shmem"),
        file_mapped: value("file_mapped"),
        file_dirty: value("file_dirty"),
        file_writeback: value("file_writeback"),
        anon_thp: value("anon_thp"),
        inactive_anon: value("inactive_anon"),
        active_anon: value("active_anon"),
        inactive_file: value("inactive_file"),
        active_file: value("active_file"),
        unevictable: value("unevictable"),
        slab_reclaimable: value("slab_reclaimable"),
        slab_unreclaimable: value("slab_unreclaimable"),
        pgfault: value("pgfault"),
        pgmajfault: value("pgmajfault"),
        // Split by the kernel since 5.9, one number in the message.
        workingset_refault: value("workingset_refault_anon") + value("workingset_refault_file"),
        workingset_activate: value("workingset_activate_anon") + value("workingset_activate_file"),
        workingset_nodereclaim: value("workingset_nodereclaim"),
        pgrefill: value("pgrefill"),
        pgscan: value("pgscan"),
        pgsteal: value("pgsteal"),
        pgactivate: value("pgactivate"),
        pgdeactivate: value("pgdeactivate"),
        pglazyfree: value("pglazyfree"),
        pglazyfreed: value("pglazyfreed"),
        thp_fault_alloc: value("thp_fault_alloc"),
        thp_collapse_alloc: value("thp_collapse_alloc"),
        ..Default::default()
    }
}

fn memory_events(text: &str) -> MemoryEvents {
    let value = |key| flat(text, key).unwrap_or_default();
    MemoryEvents {
        low: value("low"),
        high: value("high"),
        max: value("max"),
        oom: value("oom"),
        oom_kill: value("oom_kill"),
        oom_group_kill: value("oom_group_kill"),
        ..Default::default()
    }
}

/// How many processes the OOM killer has ended in the group at `path`.
#[must_use]
pub fn oom_kills(path: &Path) -> u64 {
    let text = read_file(&path.join("memory.events")).unwrap_or_default();
    flat(&text, "oom_kill").unwrap_or_default()
}

/// Lines of `major:minor key=value …`.
fn io(text: &str) -> Vec<IOEntry> {
    let mut all = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some((major, minor)) = words.next().and_then(|w| w.split_once(':')) else {
            continue;
        };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else {
            continue;
        };
        let mut entry = IOEntry {
            major,
            minor,
            ..Default::default()
        };
        for (key, value) in words.filter_map(|w| w.split_once('=')) {
            let value = value.parse().unwrap_or_default();
            match key {
                "rbytes" => entry.rbytes = value,
                "wbytes" => entry.wbytes = value,
                "rios" => entry.rios = value,
                "wios" => entry.wios = value,
                _ => {}
            }
        }
        all.push(entry);
    }
    all
}

/// Lines of `some|full avg10=… avg60=… avg300=… total=…`.
fn psi(text: Option<String>) -> MessageField<PSIStats> {
    let Some(text) = text else {
        return MessageField::none();
    };
    let line = |kind: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(kind))?;
        let mut data = PSIData::new();
        for (key, value) in line.split_whitespace().filter_map(|w| w.split_once('=')) {
            match key {
                "avg10" => data.avg10 = value.parse().unwrap_or_default(),
                "avg60" => data.avg60 = value.parse().unwrap_or_default(),
                "avg300" => data.avg300 = value.parse().unwrap_or_default(),
                "total" => data.total = value.parse().unwrap_or_default(),
                _ => {}
            }
        }
        Some(data)
    };
    MessageField::some(PSIStats {
        some: MessageField::from_option(line("some ")),
        full: MessageField::from_option(line("full ")),
        ..Default::default()
    })
}

fn huge(path: &Path) -> Vec<HugeTlbStat> {
    let mut all = Vec::new();
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let size = name
            .strip_prefix("hugetlb.")
            .and_then(|n| n.strip_suffix(".current"));
        let Some(size) = size.filter(|s| !s.contains('.')) else {
            continue; // also the reserved counters
        };
        let number = |suffix: &str| read_file(&path.join(format!("hugetlb.{size}.{suffix}")));
        let events = number("events").unwrap_or_default();
        all.push(HugeTlbStat {
            current: single(&number("current").unwrap_or_default()),
            max: single(&number("max").unwrap_or_default()),
            pagesize: size.into(),
            failcnt: flat(&events, "max").unwrap_or_default(),
            ..Default::default()
        });
    }
    all.sort_by(|a, b| a.pagesize.cmp(&b.pagesize));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_group_become_the_message() {
        let dir = tempfile::tempdir().expect("folder");
        for (name, text) in [
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
            (
                "cpu.stat",
                "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnice_usec 0\n",
            ),
            (
                "cpu.pressure",
                "some avg10=1.50 avg60=0.00 avg300=0.00 total=12\n",
            ),
            (
                "memory.stat",
                "anon 4096\nfile 8192\nworkingset_refault_anon 1\nworkingset_refault_file 2\n",
            ),
            ("memory.current", "20480\n"),
            ("memory.max", "max\n"),
            ("memory.events", "low 0\nhigh 0\nmax 4\noom 2\noom_kill 1\n"),
            (
                "io.stat",
                "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n8:0 \nbad\n",
            ),
            ("hugetlb.2MB.current", "0\n"),
            ("hugetlb.2MB.rsvd.current", "0\n"),
            ("hugetlb.2MB.max", "max\n"),
        ] {
            fs::write(dir.path().join(name), text).expect("written");
        }
        let m = read(dir.path());
        assert_eq!((m.pids.current, m.pids.limit), (3, u64::MAX));
        assert_eq!((m.cpu.usage_usec, m.cpu.system_usec), (1500, 500));
        assert_eq!((m.cpu.psi.some.total, m.cpu.psi.full.is_none()), (12, true));
        assert_eq!(
            (m.memory.anon, m.memory.usage, m.memory.usage_limit),
            (4096, 20480, u64::MAX)
        );
        assert_eq!(m.memory.workingset_refault, 3);
        assert_eq!((m.memory_events.oom_kill, oom_kills(dir.path())), (1, 1));
        assert_eq!(m.io.usage.len(), 2);
        assert_eq!((m.io.usage[0].major, m.io.usage[0].wios), (254, 4));
        assert_eq!(m.hugetlb.len(), 1);
        assert_eq!(m.hugetlb[0].pagesize, "2MB");
    }

    #[test]
    fn a_group_without_controllers_gives_an_empty_message() {
        let dir = tempfile::tempdir().expect("folder");
        let m = read(dir.path());
        assert!(m.pids.is_none() && m.memory.is_none() && m.hugetlb.is_empty());
    }
}
