//! What an environment holds at one moment, so that two moments can be compared: processes, mounts,
//! interfaces, cgroups, files of runtime state, containerd's descriptors. Only looks.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use crate::{Env, cni};

/// Kept between pods on purpose: what the node learned about its KVM, and iptables' lock.
const KEPT: [&str; 3] = [
    "/run/sealpod/kvm-probe.json",
    "/run/sealpod/tsc.json",
    "/run/xtables.lock",
];

/// See the module.
#[derive(Debug, Clone)]
pub struct Snapshot {
    items: BTreeSet<String>,
    descriptors: BTreeMap<String, usize>,
}

impl Snapshot {
    /// The present moment.
    #[must_use]
    pub fn take(env: &Env) -> Self {
        let mut items = BTreeSet::new();
        for process in env.namespaces.processes() {
            // containerd itself may have been started again.
            if !process.command.contains("/containerd --config ") {
                items.insert(format!("process {} {}", process.pid, process.command));
            }
        }
        for mount in env.namespaces.mounts() {
            items.insert(format!("mount {mount}"));
        }
        for link in links(env) {
            items.insert(format!("link {link}"));
        }
        for cgroup in cgroups(env.tag()) {
            items.insert(format!("cgroup {}", cgroup.display()));
        }
        let run = env.namespaces.path("/run");
        let tasks = "io.containerd.runtime.v2.task";
        let roots = [
            run.clone(),
            env.containerd.state().join(tasks),
            env.folder().join("root").join(tasks),
        ];
        for root in roots {
            let mut found = Vec::new();
            walk(&root, &mut found);
            for path in found {
                let shown = path
                    .strip_prefix(&run)
                    .map_or(path.clone(), |p| Path::new("/run").join(p));
                if !KEPT.iter().any(|k| shown == Path::new(k)) {
                    items.insert(format!("file {}", shown.display()));
                }
            }
        }
        Self {
            items,
            descriptors: descriptors(env),
        }
    }

    /// What is in `after` and was not in `self`, one line each.
    #[must_use]
    pub fn leaks(&self, after: &Self) -> Vec<String> {
        let mut leaks: Vec<_> = after.items.difference(&self.items).cloned().collect();
        for (kind, count) in &after.descriptors {
            let had = self.descriptors.get(kind).copied().unwrap_or(0);
            if *count > had {
                leaks.push(format!(
                    "containerd has {count} descriptors of kind {kind}, had {had}"
                ));
            }
        }
        leaks
    }
}

/// Everything below `dir` but folders, and the folders of pods and bundles themselves.
fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_dir = entry.file_type().is_ok_and(|t| t.is_dir());
        // Pipes of clients: they make them, and leave them when they or the shim are killed.
        if path.ends_with("containerd/fifo") {
            continue;
        }
        if is_dir && !path.ends_with("netns") {
            walk(&path, found);
        }
        let in_state = dir.ends_with("run/sealpod")
            || dir
                .parent()
                .is_some_and(|d| d.ends_with("io.containerd.runtime.v2.task"));
        if !is_dir || in_state {
            found.push(path);
        }
    }
}

fn links(env: &Env) -> Vec<String> {
    let mut all = Vec::new();
    let netns = std::fs::read_dir(env.namespaces.path("/run/netns"));
    for entry in netns.into_iter().flatten().flatten() {
        all.push(format!("netns {}", entry.file_name().to_string_lossy()));
    }
    for line in env.run("ip", &["-o", "link"]).stdout.lines() {
        let name = line.split(": ").nth(1).unwrap_or(line);
        let name = name.split('@').next().unwrap_or(name);
        // The plugin keeps its bridge for the next pod.
        if name != cni::BRIDGE {
            all.push(name.to_owned());
        }
    }
    all
}

/// cgroups, of every hierarchy, below which the name `tag` occurs.
#[must_use]
pub fn cgroups(tag: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![(PathBuf::from("/sys/fs/cgroup"), 0)];
    while let Some((dir, depth)) = todo.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            if !entry.file_type().is_ok_and(|t| t.is_dir()) {
                continue;
            }
            let path = entry.path();
            // The parent that a CRI client names is the client's own (a kubelet removes it).
            if path.to_string_lossy().contains(tag) && !path.ends_with(tag) {
                found.push(path.clone());
            }
            if depth < 6 {
                todo.push((path, depth + 1));
            }
        }
    }
    found
}

/// Removes what a torn-down environment left in the machine's cgroup tree: nothing lives in it.
#[derive(Debug)]
pub struct CgroupSweep(pub String);

impl Drop for CgroupSweep {
    fn drop(&mut self) {
        let mut all = cgroups(&self.0);
        // Deepest first.
        all.sort_by_key(|p| std::cmp::Reverse(p.components().count()));
        for path in all {
            let _ = std::fs::remove_dir(path);
        }
    }
}

fn descriptors(env: &Env) -> BTreeMap<String, usize> {
    let mut count = BTreeMap::new();
    let pid = env.containerd.pid(&env.namespaces);
    let fds = std::fs::read_dir(env.namespaces.path(&format!("/proc/{pid}/fd")));
    for entry in fds.into_iter().flatten().flatten() {
        let Ok(to) = std::fs::read_link(entry.path()) else {
            continue;
        };
        let to = to.to_string_lossy();
        let kind = to.split(':').next().unwrap_or(&to);
        *count.entry(kind.to_owned()).or_insert(0) += 1;
    }
    count
}
