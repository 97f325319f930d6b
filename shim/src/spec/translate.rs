//! From what containerd wrote for the host to what the guest is told.
//!
//! | in config.json | in the guest |
//! |---|---|
//! | network namespace | the guest's: it has the pod's network and nothing else |
//! | IPC, UTS namespace with a path | the guest's, which all containers of a pod share |
//! | the same without a path | a new one |
//! | PID namespace | none: the guest's; of a task of the pod (`/proc/<pid>/ns/pid`): see [`PidNamespace::Of`]; without a path: a new one |
//! | hooks | run by the host (see `hooks`), but `startContainer`, which runs in the container |
//! | cgroup path, cpuset, resctrl, AppArmor, SELinux | the host's business: left out |

use std::path::Path;

use oci_spec::runtime::{Hooks, Linux, LinuxNamespaceType, LinuxResources, Spec};

use super::{BlockDevice, Error, HostMount, MemoryVolume, devices, mounts, namespace};

/// Largest specification that is sent: a ttrpc message is at most 4 MiB.
pub(super) const SPEC_MAX: usize = (4 << 20) - (64 << 10);

/// Which PID namespace the container gets in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PidNamespace {
    /// Its own.
    Private,
    /// That of the task with this pid: the sandbox's stands for the pod's, which its containers share.
    Of(u32),
    /// The guest's.
    Guest,
}

/// A specification for the guest, and what the host has to do for it.
#[derive(Debug)]
pub struct GuestSpec {
    /// `config.json` for the agent.
    pub json: Vec<u8>,
    /// To be mounted below the share.
    pub mounts: Vec<HostMount>,
    /// To be made by the guest.
    pub memory: Vec<MemoryVolume>,
    /// To be attached to the VM.
    pub disks: Vec<BlockDevice>,
    /// PID namespace.
    pub pid_namespace: PidNamespace,
    /// Devices that the guest lacks are left out (privileged containers list all of the host's).
    pub skip_missing_devices: bool,
}

/// Translates `spec` of the container whose bundle is `bundle`.
///
/// # Errors
/// [`Error`] names the part that cannot be run in a VM, or at all.
pub fn translate(mut spec: Spec, bundle: &Path) -> Result<GuestSpec, Error> {
    if spec.root().is_none() {
        return Err(Error::Missing("root"));
    }
    let process = spec
        .process_mut()
        .as_mut()
        .ok_or(Error::Missing("process"))?;
    if process
        .args()
        .as_ref()
        .is_none_or(|a| a.first().is_none_or(String::is_empty))
    {
        return Err(Error::Missing("process.args"));
    }
    process.set_apparmor_profile(None).set_selinux_label(None);

    let pid_namespace = match namespace(&spec, LinuxNamespaceType::Pid) {
        None => PidNamespace::Guest,
        Some(Some(path)) => PidNamespace::Of(task_of(&path)?),
        Some(None) => PidNamespace::Private,
    };
    if spec.linux().is_none() {
        spec.set_linux(Some(Linux::default()));
    }
    if let Some(linux) = spec.linux_mut() {
        guest_linux(linux)?;
    }
    if let Some(hooks) = spec.hooks_mut() {
        *hooks = guest_hooks(hooks);
    }
    spec.set_annotations(None);
    let (mounts, memory) = mounts::translate(&mut spec, bundle)?;
    let (disks, skip_missing_devices) = devices::take(&mut spec)?;

    let json = serde_json::to_vec(&spec).map_err(|e| Error::Unsupported(e.to_string()))?;
    if json.len() > SPEC_MAX {
        return Err(Error::TooLargeForGuest {
            bytes: json.len(),
            max: SPEC_MAX,
        });
    }
    Ok(GuestSpec {
        json,
        mounts,
        memory,
        disks,
        pid_namespace,
        skip_missing_devices,
    })
}

/// The task whose PID namespace `path` is.
fn task_of(path: &Path) -> Result<u32, Error> {
    let text = path.to_str().unwrap_or_default();
    let pid = text
        .strip_prefix("/proc/")
        .and_then(|rest| rest.strip_suffix("/ns/pid"))
        .and_then(|pid| pid.parse().ok());
    pid.ok_or_else(|| Error::Value {
        field: "linux.namespaces[pid].path".into(),
        found: text.into(),
        allowed: "/proc/<pid of a task of the same pod>/ns/pid: others are of the host".into(),
    })
}

fn guest_linux(linux: &mut Linux) -> Result<(), Error> {
    use LinuxNamespaceType as N;
    let mut kept = Vec::new();
    for ns in linux.namespaces().iter().flatten() {
        let shared = ns
            .path()
            .as_ref()
            .is_some_and(|p| !p.as_os_str().is_empty());
        match (ns.typ(), shared) {
            (N::Network | N::Pid, _) | (N::Ipc | N::Uts, true) => {}
            (N::User | N::Time, true) => {
                return Err(Error::Unsupported(format!(
                    "Namespace {} with a path cannot be joined: the path is the host's",
                    ns.typ()
                )));
            }
            _ => {
                let mut ns = ns.clone();
                ns.set_path(None);
                kept.push(ns);
            }
        }
    }
    if !kept.iter().any(|n| n.typ() == N::Mount) {
        return Err(Error::Missing("linux.namespaces[mount]"));
    }
    linux.set_namespaces(Some(kept)).set_cgroups_path(None);
    linux
        .set_mount_label(None)
        .set_intel_rdt(None)
        .set_net_devices(None);
    if let Some(resources) = linux.resources_mut() {
        without_host_cpus(resources);
    }
    if let Some(seccomp) = linux.seccomp()
        && seccomp.listener_path().is_some()
    {
        return Err(Error::Unsupported(
            "Seccomp notifications (`linux.seccomp.listenerPath`) cannot leave the guest".into(),
        ));
    }
    Ok(())
}

/// CPUs and NUMA nodes are numbered by the host; the guest has its own few.
fn without_host_cpus(resources: &mut LinuxResources) {
    if let Some(cpu) = resources.cpu_mut() {
        cpu.set_cpus(None).set_mems(None);
    }
}

/// Makes an update of a container's limits one for the guest. As with runc it changes no device: the rules
/// that a client repeats are the host's, and know nothing of disks that were attached.
pub fn translate_update(resources: &mut LinuxResources) {
    without_host_cpus(resources);
    resources.set_devices(None);
}

/// What is left of the hooks for the guest: those whose paths are the container's.
fn guest_hooks(hooks: &Hooks) -> Hooks {
    let mut guest = Hooks::default();
    guest.set_start_container(hooks.start_container().clone());
    guest
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: &str = r#"{"ociVersion":"1.0.2","root":{"path":"rootfs"},
        "process":{"cwd":"/","args":["sh"],"user":{"uid":0,"gid":0},"apparmorProfile":"docker-default"},
        "annotations":{"a":"b"},
        "linux":{"cgroupsPath":"/kubepods/x","resources":{"cpu":{"cpus":"7","quota":5}},
          "namespaces":[{"type":"pid"},{"type":"network","path":"/var/run/netns/x"},
            {"type":"ipc","path":"/proc/9/ns/ipc"},{"type":"uts"},{"type":"mount"},{"type":"cgroup"}]}}"#;

    fn spec(json: &str) -> Spec {
        serde_json::from_str(json).expect("spec")
    }

    #[test]
    fn nothing_of_the_host_is_left() {
        let g = translate(spec(SPEC), Path::new("/b")).expect("translate");
        let text = String::from_utf8(g.json).expect("utf-8");
        for host in [
            "kubepods",
            "netns",
            "/proc/9",
            "docker-default",
            "annotations",
            "network",
            "\"7\"",
        ] {
            assert!(!text.contains(host), "{host} in {text}");
        }
        for kept in ["uts", "mount", "cgroup", "\"quota\":5"] {
            assert!(text.contains(kept), "{kept} missing in {text}");
        }
        assert_eq!(g.pid_namespace, PidNamespace::Private);
    }

    #[test]
    fn a_specification_that_cannot_run_names_the_part() {
        for (from, to, part) in [
            (r#""args":["sh"]"#, r#""args":[]"#, "process.args"),
            (r#""root":{"path":"rootfs"},"#, "", "root"),
            (r#"{"type":"mount"},"#, "", "mount"),
        ] {
            let e = translate(spec(&SPEC.replace(from, to)), Path::new("/b"));
            let e = e.map(|_| ()).expect_err(part).to_string();
            assert!(e.contains(part), "{e}");
        }
        let mut none = spec(SPEC);
        none.set_process(None);
        let e = translate(none, Path::new("/b"))
            .map(|_| ())
            .expect_err("process");
        assert_eq!(e.to_string(), "The specification has no `process`");
    }

    #[test]
    fn a_pid_namespace_is_a_tasks_or_is_refused() {
        let of = |path: &str| {
            let pid = format!(r#"{{"type":"pid","path":"{path}"}}"#);
            let text = SPEC.replace(r#"{"type":"pid"}"#, &pid);
            translate(spec(&text), Path::new("/b")).map(|g| g.pid_namespace)
        };
        assert_eq!(of("/proc/17/ns/pid").expect("task"), PidNamespace::Of(17));
        for other in ["/proc/self/ns/pid", "/run/pids/x", "/proc/17/ns/net"] {
            let e = of(other).expect_err(other).to_string();
            assert!(e.contains(other), "{e}");
        }
    }

    #[test]
    fn ten_megabytes_of_arguments_are_refused_with_both_numbers() {
        let long = format!(r#""args":["sh","{}"]"#, "x".repeat(10 << 20));
        let e = translate(
            spec(&SPEC.replace(r#""args":["sh"]"#, &long)),
            Path::new("/b"),
        );
        let e = e.map(|_| ()).expect_err("too large").to_string();
        assert!(
            e.contains("1048") && e.contains(&SPEC_MAX.to_string()),
            "{e}"
        );
    }
}
