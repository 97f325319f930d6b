//! A sandbox of the Sandbox API, in the terms that a sandbox container's specification would have used:
//! from there on there is one way to boot a pod.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use oci_spec::OciSpecError;
use oci_spec::runtime::{
    LinuxBuilder, LinuxCpuBuilder, LinuxMemoryBuilder, LinuxNamespaceBuilder, LinuxNamespaceType,
    LinuxResourcesBuilder, MountBuilder, Spec,
};
use sealpod_protocol::{SANDBOX_SHM_DIR, cri::PodSandboxConfig};

use super::{Pod, boot::BootRequest, lock};
use crate::{
    container::Exit,
    error::{Error, Kind, Result},
    spec,
};

/// What the Sandbox service is asked for.
#[derive(Debug, Clone)]
pub struct SandboxRequest {
    /// Bundle of the sandbox.
    pub bundle: PathBuf,
    /// The pod's network namespace.
    pub netns: Option<PathBuf>,
    /// Annotations of the pod.
    pub annotations: HashMap<String, String>,
    /// Configuration file that the runtime's options name.
    pub config: Option<String>,
    /// What the CRI says of the pod.
    pub pod: Option<PodSandboxConfig>,
}

/// What the Sandbox service is told of the pod.
#[derive(Debug, Clone, Copy)]
pub struct SandboxStatus {
    /// The VM runs.
    pub ready: bool,
    /// When it was there.
    pub created_ns: Option<i64>,
    /// How it ended.
    pub exit: Option<Exit>,
}

impl Pod {
    /// Notes what a sandbox will be made of.
    ///
    /// # Errors
    /// A second time.
    pub fn create_sandbox(&self, request: SandboxRequest) -> Result<()> {
        let mut sandbox = lock(&self.sandbox);
        if sandbox.is_some() {
            return Err(Error::new(
                Kind::AlreadyExists,
                format!("sandbox {:?} already exists", self.id()),
            ));
        }
        *sandbox = Some(request);
        self.asked.send_replace(true);
        Ok(())
    }

    /// Boots the VM of a sandbox that was created. Returns the pod's pid and when it was there.
    ///
    /// # Errors
    /// Not created, or what the boot failed of.
    pub async fn start_sandbox(self: &Arc<Self>) -> Result<(u32, i64)> {
        let request = lock(&self.sandbox).clone();
        let request = request
            .ok_or_else(|| Error::not_found(format!("sandbox {:?} not found", self.id())))?;
        if let Some(pod) = &request.pod {
            let written = write_files(self.identity.place.dir(), pod);
            written.map_err(|e| Error::chain(Kind::Unknown, &e))?;
        }
        let boot = boot_request(self.id(), request)?;
        self.boot(boot).await?;
        self.connect_network().await?;
        Ok((self.pid(), lock(&self.view).created_ns.unwrap_or_default()))
    }

    /// State for the Sandbox service.
    #[must_use]
    pub fn sandbox_status(&self) -> SandboxStatus {
        let view = lock(&self.view);
        SandboxStatus {
            ready: view.guest.is_some(),
            created_ns: view.created_ns,
            exit: *self.ended.borrow(),
        }
    }
}

/// What to boot for `request`. The CRI's pod configuration comes first, then the bundle's
/// specification, then nothing.
pub(super) fn boot_request(id: &str, request: SandboxRequest) -> Result<BootRequest> {
    let wrong = |e: &dyn std::error::Error| Error::chain(Kind::InvalidArgument, e);
    let spec = match &request.pod {
        Some(pod) => Some(from_cri(id, pod).map_err(|e| wrong(&e))?),
        None if request.bundle.join("config.json").exists() => {
            Some(spec::load(&request.bundle).map_err(|e| wrong(&e))?)
        }
        None => None,
    };
    let mut annotations = spec.as_ref().map(spec::annotations).unwrap_or_default();
    annotations.extend(request.annotations);
    spec::mark_sandbox(&mut annotations);
    Ok(BootRequest {
        config: request.config,
        netns: request.netns,
        annotations,
        spec,
        grows: true,
    })
}

fn from_cri(id: &str, pod: &PodSandboxConfig) -> std::result::Result<Spec, OciSpecError> {
    let limits = pod.linux.resources.as_ref();
    let positive = |n: i64| (n > 0).then_some(n);
    let mut cpu = LinuxCpuBuilder::default();
    let mut memory = LinuxMemoryBuilder::default();
    if let Some(limits) = limits {
        if let Some(quota) = positive(limits.cpu_quota) {
            cpu = cpu.quota(quota);
        }
        if let Ok(period @ 1..) = u64::try_from(limits.cpu_period) {
            cpu = cpu.period(period);
        }
        if let Some(bytes) = positive(limits.memory_limit_in_bytes) {
            memory = memory.limit(bytes);
        }
    }
    let resources = LinuxResourcesBuilder::default()
        .cpu(cpu.build()?)
        .memory(memory.build()?);
    let network = LinuxNamespaceBuilder::default()
        .typ(LinuxNamespaceType::Network)
        .build()?;
    let mut linux = LinuxBuilder::default()
        .sysctl(pod.linux.sysctls.clone())
        .namespaces(vec![network])
        .resources(resources.build()?)
        .build()?;
    let parent = &pod.linux.cgroup_parent;
    if !parent.is_empty() {
        // systemd's form where the parent is a slice, else a path.
        let path = match parent.rsplit('/').next() {
            Some(slice) if slice.ends_with(".slice") => format!("{slice}:sealpod:{id}"),
            _ => format!("{}/{id}", parent.trim_end_matches('/')),
        };
        linux.set_cgroups_path(Some(path.into()));
    }
    let mut spec = Spec::default();
    spec.set_hostname((!pod.hostname.is_empty()).then(|| pod.hostname.clone()));
    spec.set_annotations(Some(pod.annotations.clone()));
    spec.set_linux(Some(linux));
    Ok(spec)
}

/// Folder of the pod's that holds the files that its containers share.
const FILES_DIR: &str = "etc";
/// Where the sandbox's files appear in its containers.
const FILES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

/// Writes what containerd's own sandbox would have written for the containers of `pod`: host name,
/// hosts and resolver, below the pod's folder `dir`.
pub(super) fn write_files(dir: &Path, pod: &PodSandboxConfig) -> io::Result<()> {
    let dir = dir.join(FILES_DIR);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(&dir)?;
    let of_host = |name: &str| match fs::read(Path::new("/etc").join(name)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other,
    };
    fs::write(dir.join("hostname"), format!("{}\n", pod.hostname))?;
    fs::write(dir.join("hosts"), of_host("hosts")?)?;
    let dns = &pod.dns_config;
    let line = |word: &str, all: &[String]| match all {
        [] => String::new(),
        some => format!("{word} {}\n", some.join(" ")),
    };
    let mut resolv = line("search", &dns.searches);
    resolv.extend(dns.servers.iter().map(|s| format!("nameserver {s}\n")));
    resolv.push_str(&line("options", &dns.options));
    let resolv = if resolv.is_empty() {
        of_host("resolv.conf")?
    } else {
        resolv.into_bytes()
    };
    fs::write(dir.join("resolv.conf"), resolv)
}

/// Gives the container of `spec` the files that [`write_files`] wrote in `dir`, and the pod's shared
/// memory, where it does not bring its own.
pub(super) fn add_mounts(spec: &mut Spec, dir: &Path) -> std::result::Result<(), OciSpecError> {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        let is_tmpfs = mount.typ().as_deref() == Some("tmpfs");
        if mount.destination() == Path::new("/dev/shm") && is_tmpfs {
            mount
                .set_typ(Some("bind".into()))
                .set_source(Some(SANDBOX_SHM_DIR.into()))
                .set_options(Some(
                    ["rbind", "nosuid", "nodev", "noexec"]
                        .map(String::from)
                        .into(),
                ));
        }
    }
    for name in FILES {
        let destination = Path::new("/etc").join(name);
        if mounts.iter().any(|m| *m.destination() == destination) {
            continue;
        }
        let mount = MountBuilder::default()
            .typ("bind")
            .source(dir.join(FILES_DIR).join(name))
            .destination(destination)
            .options(["rbind", "rprivate"].map(String::from).to_vec());
        mounts.push(mount.build()?);
    }
    spec.set_mounts(Some(mounts));
    Ok(())
}

#[cfg(test)]
mod tests {
    use sealpod_protocol::cri::{DNSConfig, LinuxContainerResources, LinuxPodSandboxConfig};

    use super::*;
    use crate::sizing;

    #[test]
    fn a_container_gets_the_pods_files_unless_it_brings_its_own() {
        let dir = tempfile::tempdir().expect("tempdir");
        let pod = PodSandboxConfig {
            hostname: "web".into(),
            dns_config: Some(DNSConfig {
                servers: vec!["10.0.0.10".into()],
                searches: vec!["a.local".into(), "b.local".into()],
                options: vec!["ndots:5".into()],
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        write_files(dir.path(), &pod).expect("files");
        let resolv = std::fs::read_to_string(dir.path().join("etc/resolv.conf")).expect("file");
        assert_eq!(
            resolv,
            "search a.local b.local\nnameserver 10.0.0.10\noptions ndots:5\n"
        );
        let mut spec: Spec = serde_json::from_str(
            r#"{"ociVersion":"1.0.2","mounts":[{"destination":"/dev/shm","type":"tmpfs","source":"shm"},
               {"destination":"/etc/hosts","type":"bind","source":"/mine"}]}"#,
        )
        .expect("spec");
        add_mounts(&mut spec, dir.path()).expect("mounts");
        let source = |d: &str| {
            let all = spec.mounts().clone().unwrap_or_default();
            let found = all.into_iter().find(|m| m.destination() == Path::new(d));
            found.and_then(|m| m.source().clone())
        };
        assert_eq!(source("/etc/hosts"), Some("/mine".into()));
        assert_eq!(
            source("/etc/resolv.conf"),
            Some(dir.path().join("etc/resolv.conf"))
        );
        assert_eq!(source("/dev/shm"), Some(SANDBOX_SHM_DIR.into()));
    }

    #[test]
    fn a_cri_pods_name_limits_and_cgroup_reach_the_boot() {
        let pod = PodSandboxConfig {
            hostname: "web".into(),
            annotations: [("io.sealpod.vcpus".to_owned(), "2".to_owned())].into(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: "/kubepods/burstable/pod1".into(),
                sysctls: [("net.core.somaxconn".to_owned(), "9".to_owned())].into(),
                resources: Some(LinuxContainerResources {
                    cpu_period: 100_000,
                    cpu_quota: 150_000,
                    memory_limit_in_bytes: 1 << 28,
                    ..Default::default()
                })
                .into(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        let request = SandboxRequest {
            bundle: "/nowhere".into(),
            netns: None,
            annotations: Default::default(),
            config: None,
            pod: Some(pod),
        };
        let boot = boot_request("p1", request).expect("boot request");
        let spec = boot.spec.expect("spec");
        assert_eq!(spec.hostname().as_deref(), Some("web"));
        let limits = sizing::limits(&spec).expect("limits");
        assert_eq!(
            (limits.cpu_milli, limits.memory_bytes),
            (Some(1500), Some(1 << 28))
        );
        let linux = spec.linux().clone().expect("linux");
        assert_eq!(
            linux.cgroups_path().clone(),
            Some("/kubepods/burstable/pod1/p1".into())
        );
        assert_eq!(boot.annotations["io.sealpod.vcpus"], "2");
        assert_eq!(
            spec::role(&boot.annotations).expect("role"),
            spec::Role::Sandbox
        );
    }
}
