//! When each stage of a start was reached, and what the gate took of it, for people who look for where the
//! time goes. Written to `<pod dir>/timeline.json`, a JSON object of CLOCK_BOOTTIME nanoseconds.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use crate::{attest::Took, clock, vm};

/// A stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Mark {
    /// The serving process runs.
    ShimStarted,
    /// The request that makes the VM has arrived.
    Requested,
    /// The VM is about to be started.
    VmStarting,
    /// The VM's process runs.
    VmCreated,
    /// The guest's kernel has started its init.
    KernelUp,
    /// The agent has answered.
    AgentReady,
    /// The guest is the pod's: share, network, host name.
    SetUp,
    /// The container is made.
    ContainerCreated,
    /// The container's process has been let go.
    ContainerStarted,
    /// Something was read from it.
    FirstOutput,
}

impl Mark {
    fn name(self) -> &'static str {
        match self {
            Self::ShimStarted => "shim_start_ns",
            Self::Requested => "requested_ns",
            Self::VmStarting => "vm_starting_ns",
            Self::VmCreated => "vm_created_ns",
            Self::KernelUp => "kernel_up_ns",
            Self::AgentReady => "agent_ready_ns",
            Self::SetUp => "set_up_ns",
            Self::ContainerCreated => "container_created_ns",
            Self::ContainerStarted => "container_started_ns",
            Self::FirstOutput => "first_output_ns",
        }
    }
}

#[derive(Debug)]
pub(super) struct Timeline {
    file: PathBuf,
    marks: Mutex<BTreeMap<&'static str, u64>>,
}

impl Timeline {
    pub(super) fn new(dir: &Path) -> Self {
        let timeline = Self {
            file: dir.join("timeline.json"),
            marks: Mutex::default(),
        };
        timeline.mark(Mark::ShimStarted);
        timeline
    }

    /// Notes `mark` as reached now. Only the first time counts.
    pub(super) fn mark(&self, mark: Mark) {
        self.mark_at(mark, clock::boot_ns());
    }

    /// Notes what the gate took of the first start of a container that had to pass it.
    pub(super) fn gate(&self, took: &Took) {
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        for (part, time) in [
            ("gate_took_ns", took.whole),
            ("gate_evidence_took_ns", took.evidence),
            ("gate_attach_took_ns", took.attach),
        ] {
            let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
            marks.entry(part).or_insert_with(|| ns(time));
        }
    }

    /// Notes what the VM's driver noted, for the next time the file is written.
    pub(super) fn vm(&self, noted: &[vm::Mark]) {
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        for mark in noted {
            marks.entry(mark.what).or_insert(mark.at_ns);
        }
    }

    /// Notes `mark` as reached at `ns`.
    pub(super) fn mark_at(&self, mark: Mark, ns: u64) {
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        if marks.contains_key(mark.name()) {
            return;
        }
        marks.insert(mark.name(), ns);
        // Written at the stages that somebody looks for: not on the way to them.
        if mark >= Mark::ContainerStarted
            && let Ok(text) = serde_json::to_string(&*marks)
            && let Err(e) = std::fs::write(&self.file, text)
        {
            tracing::debug!("Timeline not written: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_time_counts() {
        let dir = tempfile::tempdir().expect("tempdir");
        let t = Timeline::new(dir.path());
        for n in [3, 4] {
            t.gate(&Took {
                whole: Duration::from_nanos(n),
                ..Took::default()
            });
        }
        t.mark_at(Mark::ContainerStarted, 7);
        t.mark_at(Mark::ContainerStarted, 8);
        let text = std::fs::read_to_string(dir.path().join("timeline.json")).expect("file");
        let v: serde_json::Value = serde_json::from_str(&text).expect("json");
        assert_eq!(v["container_started_ns"], 7);
        assert_eq!(v["gate_took_ns"], 3);
        assert!(v["shim_start_ns"].is_u64());
    }
}
