//! From the OCI runtime specification (config.json, as the shim has translated it for the guest) to a
//! plan. Refuses what cannot be kept; touches nothing.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Hook, Linux, LinuxDevice, LinuxDeviceType, LinuxIdMapping, LinuxNamespaceType,
    LinuxPersonalityDomain, Spec,
};

use super::mount_options::{self, normalize};
use super::plan::{ContainerPlan, DevicePlan, HookPlan, MountKind, ProcessPlan};
use super::spec_process;

/// Longest specification or process object, bytes.
pub const SPEC_MAX: usize = 4 << 20;
/// Most mounts, devices, hooks, groups, sysctls or paths of one container.
const LIST_MAX: usize = 4096;

/// A specification that cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Not JSON of the right shape.
    #[error("Invalid {what}: {source}")]
    Json {
        /// Which document.
        what: &'static str,
        /// Where and why.
        source: serde_json::Error,
    },
    /// Too large.
    #[error("{what} of {got} is larger than the {max} allowed")]
    TooLarge {
        /// What.
        what: &'static str,
        /// Its size.
        got: usize,
        /// The limit.
        max: usize,
    },
    /// A part that must be there.
    #[error("The specification has no {0}")]
    Missing(&'static str),
    /// A string with a NUL inside.
    #[error("A {0} contains a NUL byte")]
    Nul(&'static str),
    /// A path that is none.
    #[error("Invalid {what} {path:?}")]
    Path {
        /// What it is for.
        what: &'static str,
        /// As given.
        path: PathBuf,
    },
    /// A mount.
    #[error("Mount {destination:?}: {why}")]
    Mount {
        /// Which.
        destination: PathBuf,
        /// Why not.
        why: String,
    },
    /// Anything else, in words.
    #[error("{0}")]
    Unsupported(String),
}

pub(super) fn unsupported(text: impl Into<String>) -> SpecError {
    SpecError::Unsupported(text.into())
}

pub(super) fn capped<T>(what: &'static str, list: &[T]) -> Result<(), SpecError> {
    if list.len() > LIST_MAX {
        return Err(SpecError::TooLarge {
            what,
            got: list.len(),
            max: LIST_MAX,
        });
    }
    Ok(())
}

/// Reads a container's specification.
///
/// `rootfs` is its root in the guest, `terminal` the size of its terminal if it has one.
///
/// # Errors
/// [`SpecError`], naming what was wrong.
pub fn container(
    id: &str,
    json: &[u8],
    rootfs: PathBuf,
    terminal: Option<(u16, u16)>,
) -> Result<ContainerPlan, SpecError> {
    let spec: Spec = parse("container specification", json)?;
    if !spec.version().starts_with("1.") {
        return Err(unsupported(format!(
            "Specification version {:?}: only 1.x is known",
            spec.version()
        )));
    }
    let process = spec
        .process()
        .as_ref()
        .ok_or(SpecError::Missing("process"))?;
    let linux = spec.linux().clone().unwrap_or_default_empty();
    let mounts = spec.mounts().clone().unwrap_or_default();
    capped("number of mounts", &mounts)?;
    let mounts = mounts
        .iter()
        .map(mount_options::plan)
        .collect::<Result<Vec<_>, _>>()?;
    let own_dev = !mounts
        .iter()
        .any(|m| m.destination == Path::new("/dev") && matches!(m.kind, MountKind::Bind { .. }));
    let (namespaces, id_maps) = namespaces(&linux)?;
    let (start_hooks, hook_state) = hooks(id, &spec)?;
    let new_uts = namespaces & libc::CLONE_NEWUTS != 0;
    Ok(ContainerPlan {
        rootfs,
        root_readonly: spec.root().as_ref().and_then(|r| r.readonly()) == Some(true),
        propagation: root_propagation(linux.rootfs_propagation().as_deref())?,
        namespaces,
        id_maps,
        // Without a UTS namespace of its own the container has the pod's name.
        hostname: spec.hostname().clone().filter(|h| new_uts && !h.is_empty()),
        domainname: spec
            .domainname()
            .clone()
            .filter(|d| new_uts && !d.is_empty()),
        devices: devices(&linux)?,
        own_dev,
        mounts,
        masked_paths: paths("masked path", linux.masked_paths())?,
        readonly_paths: paths("read-only path", linux.readonly_paths())?,
        sysctls: sysctls(&linux)?,
        seccomp: linux.seccomp().clone(),
        resources: linux.resources().clone().unwrap_or_default(),
        start_hooks,
        hook_state,
        process: ProcessPlan {
            personality: personality(&linux)?,
            ..spec_process::process(process, terminal)?
        },
    })
}

/// Reads the process object of an exec.
///
/// # Errors
/// [`SpecError`], naming what was wrong.
pub fn exec(json: &[u8], terminal: Option<(u16, u16)>) -> Result<ProcessPlan, SpecError> {
    spec_process::process(&parse("process", json)?, terminal)
}

fn parse<T: serde::de::DeserializeOwned>(what: &'static str, json: &[u8]) -> Result<T, SpecError> {
    if json.len() > SPEC_MAX {
        return Err(SpecError::TooLarge {
            what,
            got: json.len(),
            max: SPEC_MAX,
        });
    }
    serde_json::from_slice(json).map_err(|source| SpecError::Json { what, source })
}

/// `Linux::default()` fills in masked paths, namespaces and more; a specification without the object
/// asks for none of them.
trait EmptyLinux {
    fn unwrap_or_default_empty(self) -> Linux;
}

impl EmptyLinux for Option<Linux> {
    fn unwrap_or_default_empty(self) -> Linux {
        self.unwrap_or_else(|| {
            let mut linux = Linux::default();
            linux
                .set_namespaces(None)
                .set_masked_paths(None)
                .set_readonly_paths(None)
                .set_resources(None)
                .set_devices(None);
            linux
        })
    }
}

fn paths(what: &'static str, list: &Option<Vec<String>>) -> Result<Vec<PathBuf>, SpecError> {
    let list = list.as_deref().unwrap_or_default();
    capped(what, list)?;
    list.iter().map(|p| normalize(what, Path::new(p))).collect()
}

fn personality(linux: &Linux) -> Result<Option<u64>, SpecError> {
    let Some(personality) = linux.personality() else {
        return Ok(None);
    };
    if personality.flags().as_ref().is_some_and(|f| !f.is_empty()) {
        return Err(unsupported("Personality flags are not supported"));
    }
    // linux/personality.h
    Ok(Some(match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 8,
    }))
}

/// The new namespaces and, for a user namespace, its maps.
fn namespaces(linux: &Linux) -> Result<(libc::c_int, Option<(String, String)>), SpecError> {
    let mut flags = 0;
    for namespace in linux.namespaces().as_deref().unwrap_or_default() {
        if let Some(path) = namespace
            .path()
            .as_ref()
            .filter(|p| !p.as_os_str().is_empty())
        {
            return Err(unsupported(format!(
                "Namespace {} has the path {path:?}, which means nothing in the guest",
                namespace.typ()
            )));
        }
        match namespace.typ() {
            LinuxNamespaceType::Ipc => flags |= libc::CLONE_NEWIPC,
            LinuxNamespaceType::Uts => flags |= libc::CLONE_NEWUTS,
            LinuxNamespaceType::User => flags |= libc::CLONE_NEWUSER,
            LinuxNamespaceType::Time => {
                return Err(unsupported("Time namespaces are not supported"));
            }
            // Mount and cgroup: always new. Network: the guest's is the pod's. PID: see the request.
            LinuxNamespaceType::Mount
            | LinuxNamespaceType::Cgroup
            | LinuxNamespaceType::Network
            | LinuxNamespaceType::Pid => {}
        }
    }
    if flags & libc::CLONE_NEWUSER == 0 {
        return Ok((flags, None));
    }
    let map = |what, list: &Option<Vec<LinuxIdMapping>>| {
        let list = list.as_deref().unwrap_or_default();
        if list.is_empty() {
            return Err(SpecError::Missing(what));
        }
        capped(what, list)?;
        let line =
            |m: &LinuxIdMapping| format!("{} {} {}\n", m.container_id(), m.host_id(), m.size());
        Ok(list.iter().map(line).collect::<String>())
    };
    let uids = map("uidMappings for its user namespace", linux.uid_mappings())?;
    let gids = map("gidMappings for its user namespace", linux.gid_mappings())?;
    Ok((flags, Some((uids, gids))))
}

fn root_propagation(name: Option<&str>) -> Result<libc::c_ulong, SpecError> {
    Ok(match name.unwrap_or_default() {
        "" | "slave" | "rslave" => libc::MS_SLAVE,
        "private" | "rprivate" => libc::MS_PRIVATE,
        "shared" | "rshared" => libc::MS_SHARED,
        "unbindable" | "runbindable" => libc::MS_UNBINDABLE,
        other => {
            return Err(unsupported(format!(
                "rootfsPropagation {other:?}: allowed are shared, slave, private, unbindable"
            )));
        }
    })
}

/// Nodes that every container has (runtime specification, config-linux, default devices), then those
/// of the specification.
fn devices(linux: &Linux) -> Result<Vec<DevicePlan>, SpecError> {
    let node = |name: &str, major, minor| DevicePlan {
        path: Path::new("/dev").join(name),
        kind: libc::S_IFCHR,
        major,
        minor,
        mode: 0o666,
        uid: 0,
        gid: 0,
    };
    let mut all = vec![
        node("null", 1, 3),
        node("zero", 1, 5),
        node("full", 1, 7),
        node("random", 1, 8),
        node("urandom", 1, 9),
        node("tty", 5, 0),
    ];
    let listed = linux.devices().as_deref().unwrap_or_default();
    capped("number of devices", listed)?;
    for device in listed {
        let device = self::device(device)?;
        all.retain(|d| d.path != device.path);
        all.push(device);
    }
    Ok(all)
}

fn device(device: &LinuxDevice) -> Result<DevicePlan, SpecError> {
    let path = normalize("device path", device.path())?;
    let number = |n: i64| {
        u32::try_from(n)
            .map_err(|_| unsupported(format!("Device {path:?}: number {n} is out of range")))
    };
    let kind = match device.typ() {
        LinuxDeviceType::B => libc::S_IFBLK,
        LinuxDeviceType::C | LinuxDeviceType::U => libc::S_IFCHR,
        LinuxDeviceType::P => libc::S_IFIFO,
        LinuxDeviceType::A => {
            return Err(unsupported(format!(
                "Device {path:?}: type must be b, c, u or p"
            )));
        }
    };
    Ok(DevicePlan {
        kind,
        major: number(device.major())?,
        minor: number(device.minor())?,
        mode: device.file_mode().unwrap_or(0o666) & 0o7777,
        uid: device.uid().unwrap_or_default(),
        gid: device.gid().unwrap_or_default(),
        path,
    })
}

fn sysctls(linux: &Linux) -> Result<Vec<(PathBuf, String)>, SpecError> {
    let Some(list) = linux.sysctl() else {
        return Ok(Vec::new());
    };
    let mut all: Vec<_> = list
        .iter()
        .map(|(name, value)| Ok((sysctl_path(name)?, value.clone())))
        .collect::<Result<_, SpecError>>()?;
    capped("number of sysctls", &all)?;
    all.sort(); // a map has no order, a test and a log should
    Ok(all)
}

/// File below `/proc/sys` of a sysctl that is written with dots or with slashes (then dots belong to
/// names, as in `net/ipv4/conf/eth0.1/forwarding`).
///
/// # Errors
/// [`SpecError::Unsupported`] for a name that leaves `/proc/sys`.
pub fn sysctl_path(name: &str) -> Result<PathBuf, SpecError> {
    let first = name.find(['.', '/']).map(|at| name.as_bytes()[at]);
    let path = match first {
        Some(b'/') => name.to_owned(),
        _ => name
            .chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect(),
    };
    let good = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
    if !path.split('/').all(good) {
        return Err(unsupported(format!("Invalid sysctl name {name:?}")));
    }
    Ok(path.into())
}

fn hooks(
    id: &str,
    spec: &Spec,
) -> Result<(Vec<HookPlan>, serde_json::Map<String, serde_json::Value>), SpecError> {
    let mut state = serde_json::Map::new();
    let Some(hooks) = spec.hooks() else {
        return Ok((Vec::new(), state));
    };
    for (name, list) in [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ] {
        if list.as_ref().is_some_and(|l| !l.is_empty()) {
            return Err(unsupported(format!(
                "Hook {name} runs a program of the host, which the guest does not have"
            )));
        }
    }
    let list = hooks.start_container().as_deref().unwrap_or_default();
    capped("number of hooks", list)?;
    state.insert("ociVersion".into(), spec.version().as_str().into());
    state.insert("id".into(), id.into());
    state.insert("status".into(), "created".into());
    state.insert("bundle".into(), "/".into());
    let annotations = spec.annotations().iter().flatten();
    let annotations = annotations.map(|(k, v)| (k.clone(), v.as_str().into()));
    state.insert(
        "annotations".into(),
        annotations.collect::<serde_json::Map<_, _>>().into(),
    );
    Ok((list.iter().map(hook).collect::<Result<_, _>>()?, state))
}

fn hook(hook: &Hook) -> Result<HookPlan, SpecError> {
    if !hook.path().is_absolute() {
        return Err(SpecError::Path {
            what: "hook (it must be absolute)",
            path: hook.path().clone(),
        });
    }
    let env = hook.env().as_deref().unwrap_or_default().iter();
    Ok(HookPlan {
        path: hook.path().clone(),
        args: hook.args().clone().unwrap_or_default(),
        env: env
            .filter_map(|e| e.split_once('='))
            .map(|(k, v)| (k.into(), v.into()))
            .collect(),
        timeout: hook
            .timeout()
            .and_then(|t| u64::try_from(t).ok())
            .filter(|t| *t > 0),
    })
}
