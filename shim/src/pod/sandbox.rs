//! A sandbox of the Sandbox API, in the terms that a sandbox container's specification would have used:
//! from there on there is one way to boot a pod.

use oci_spec::OciSpecError;
use oci_spec::runtime::{
    LinuxBuilder, LinuxCpuBuilder, LinuxMemoryBuilder, LinuxNamespaceBuilder, LinuxNamespaceType,
    LinuxResourcesBuilder, Spec,
};
use sealpod_protocol::cri::PodSandboxConfig;

use super::{SandboxRequest, boot::BootRequest};
use crate::{
    error::{Error, Kind, Result},
    spec,
};

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

#[cfg(test)]
mod tests {
    use sealpod_protocol::cri::{LinuxContainerResources, LinuxPodSandboxConfig};

    use super::*;
    use crate::sizing;

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
