//! From a request to a VM whose agent answers: what is taken, in which order, and what the guest is
//! told first. A failure gives everything back and says at which stage it happened.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use oci_spec::runtime::Spec;
use sealpod_protocol::agent;

use super::{Mark, Pod, StandIn, first, machine::Taken, protect, template};
use crate::{
    annotations,
    attest::{
        Settings,
        launch::Launch,
        wanted::{self, Wanted},
        withhold::Withheld,
    },
    clock,
    config::{self, Config},
    error::{Error, Kind, Result},
    guest::{Dialled, Guest},
    host_cgroup::{self, HostCgroup},
    ledger::Ledger,
    network::{PodNetns, PodNetwork, TapNic, portforward::PortForward},
    podfile::PodFile,
    sizing::{self, Size},
    spec,
    virtiofs::{self, Virtiofs},
    vm,
};

/// Of a NIC whose interface is not known yet, bytes: it may become anything.
const LARGEST_MTU: u32 = 65535;

/// What a VM is made from.
#[derive(Debug, Clone)]
pub(super) struct BootRequest {
    /// Configuration file that the runtime's options name.
    pub(super) config: Option<String>,
    /// Network namespace, where the specification does not say.
    pub(super) netns: Option<PathBuf>,
    /// The pod's annotations.
    pub(super) annotations: HashMap<String, String>,
    /// The sandbox's or only container's specification.
    pub(super) spec: Option<Spec>,
    /// Whether disks or interfaces can come later. Ports for them cost a start 50 ms.
    pub(super) grows: bool,
}

/// What was decided before anything is taken.
pub(super) struct Plan {
    pub(super) config: Config,
    size: Size,
    kernel_params: Vec<String>,
    /// Devices that are passed through and there from the start.
    cold: Vec<Wanted>,
    accelerator: vm::Accelerator,
    confidential: Option<vm::Confidential>,
    /// sealpod-vmm runs it, not QEMU.
    builtin: bool,
    hotplug_ports: u32,
    /// Some that are passed through.
    wants_devices: bool,
    policy: Option<String>,
    init_data: Option<Vec<u8>>,
}

impl Plan {
    /// How long the agent may take to answer.
    pub(super) fn boot_limit(&self) -> Duration {
        Duration::from_secs(self.config.timeouts.boot_seconds.into())
    }

    /// Whether the VM may go on from a template. One that evidence is asked of has to boot: what it is
    /// made of is measured then.
    pub(super) fn may_use_template(&self) -> bool {
        let attested = self.policy.is_some() || self.init_data.is_some() || self.wants_devices;
        let own = attested || self.confidential.is_some();
        self.config.hypervisor.template && self.builtin && !own
    }
}

fn refused(e: &dyn std::error::Error) -> Error {
    Error::chain(Kind::InvalidArgument, e)
}

pub(super) fn failed(e: &dyn std::error::Error) -> Error {
    Error::chain(Kind::Unknown, e)
}

fn plan(request: &BootRequest) -> Result<Plan> {
    let path = request.config.as_deref().map(Path::new);
    let config = config::load(path).map_err(|e| refused(&e))?;
    let wishes = annotations::read(&request.annotations, &config.annotations.allow)
        .map_err(|e| refused(&e))?;
    let limits = match &request.spec {
        Some(spec) => sizing::limits(spec).map_err(|e| refused(&e))?,
        None => sizing::Limits::default(),
    };
    let host = sizing::Host::this();
    let size = sizing::size(limits, &wishes, &config.sizing, host).map_err(|e| refused(&e))?;
    let mut kernel_params = config.hypervisor.kernel_params.clone();
    kernel_params.extend(wishes.kernel_params);
    let wants_devices = !wishes.devices.is_empty();
    let cold = wanted::cold(&wishes.devices, &config.attestation).map_err(|e| refused(&e))?;
    let hotplug_ports = match request.grows || wants_devices {
        true => config.hypervisor.hotplug_ports,
        false => 0,
    };
    let hypervisor = &config.hypervisor;
    let wanted = match hypervisor.accelerator {
        config::Accelerator::Auto => None,
        config::Accelerator::Kvm => Some(vm::Accelerator::Kvm),
        config::Accelerator::Tcg => Some(vm::Accelerator::Tcg),
    };
    let accelerator = vm::choose_accelerator(wanted, &config.runtime.state_dir);
    let confidential = protect::decide(&config, wishes.confidential, accelerator)?;
    // Devices that are passed through, confidential guests and guests without KVM are QEMU's.
    let kvm = accelerator == vm::Accelerator::Kvm;
    let builtin = hypervisor.uses_vmm(kvm, wants_devices || confidential.is_some());
    Ok(Plan {
        config,
        accelerator,
        confidential,
        size,
        kernel_params,
        cold,
        builtin,
        hotplug_ports,
        wants_devices,
        policy: wishes.policy,
        init_data: wishes.init_data,
    })
}

/// Boots the pod's VM; what it took stands in `taken`, also when it fails. Returns how long the guest
/// may take to end by itself.
pub(super) async fn boot(
    pod: &Arc<Pod>,
    ledger: &Ledger,
    request: &BootRequest,
    taken: &mut Taken,
) -> Result<Duration> {
    pod.timeline.mark(Mark::Requested);
    let plan = plan(request)?;
    let netns = netns(request).await?;
    let cgroup = taken.cgroup.insert(cgroup(pod, ledger, request, &plan)?);

    let dir = pod.identity.place.dir();
    virtiofs::make_share(dir).map_err(|e| failed(&e))?;
    let network = PodNetwork::new(netns, ledger.clone()).await;
    let network = taken.network.insert(network.map_err(|e| failed(&e))?);
    let mut config = vm_config(pod, &plan, cgroup)?;
    let reserved = Withheld::reserve(&plan.cold, ledger).map_err(|e| failed(&e))?;
    (taken.withheld, config.passed) = reserved;
    let driver = driver(&plan, &mut config)?;
    let cmdline = driver.cmdline(&config).await;
    let attested = attestation(pod, &plan, request, &config, cmdline)?;
    if let Some(guest) = &mut config.confidential {
        guest.init_data.clone_from(&attested.init_data);
    }

    // Neither needs the other.
    let entrance = cgroup.entrance().map_err(|e| failed(&e))?;
    let devices = async {
        let started =
            Virtiofs::start(&plan.config.hypervisor.virtiofsd, dir, entrance, ledger).await;
        let (virtiofsd, share) = started.map_err(|e| failed(&e))?;
        taken.virtiofsd = Some(virtiofsd);
        let taps = network.attach().await.map_err(|e| failed(&e))?;
        Ok::<_, Error>((share, taps.into_iter().map(nic).collect()))
    };
    let restored = template::restored(pod, &plan, &config, ledger);
    let (restored, devices) = tokio::join!(restored, devices);
    let (share, nics): (_, Vec<_>) = devices?;
    let (vm, guest, hello) = match template::with_devices(pod, restored, &share, &nics).await {
        Some((vm, guest, hello)) => {
            let vm = taken.vm.insert(vm);
            pod.timeline.mark(Mark::VmCreated);
            (vm, guest, hello)
        }
        None => {
            (config.share, config.nics) = (Some(share), nics);
            let dialled = Dialled::bind(dir.join(vm::VSOCK_FILE)).map_err(|e| failed(&e))?;
            pod.timeline.mark(Mark::VmStarting);
            let started = driver.start(config, ledger).await;
            let vm = taken.vm.insert(started.map_err(|e| failed(&e))?);
            pod.timeline.mark(Mark::VmCreated);
            let (guest, hello) = first::answer(vm.as_ref(), dialled, plan.boot_limit()).await?;
            (vm, guest, hello)
        }
    };
    pod.timeline.vm(&vm.marks());
    mark_guest_times(pod, &hello);
    let set_up = first::set_up(&guest, request, network, &attested);
    let strict = plan.config.runtime.strict_cgroup;
    let (set_up, joined, forwarding) =
        tokio::join!(set_up, join(cgroup, strict), port_forward(network, &guest));
    taken.port_forward = forwarding;
    set_up?;
    joined?;
    pod.timeline.mark(Mark::SetUp);
    pod.put_up_gate(attested, std::mem::take(&mut taken.withheld));
    let stand_in = StandIn::new(network.netns(), vm.as_ref()).await?;
    announce(pod, &plan, vm.as_ref(), (&guest, &hello), stand_in.pid());
    taken.stand_in = Some(stand_in);
    Ok(Duration::from_secs(
        plan.config.timeouts.shutdown_seconds.into(),
    ))
}

/// Which driver starts the VM, and its program.
fn driver(plan: &Plan, config: &mut vm::VmConfig) -> Result<&'static dyn vm::Driver> {
    let hypervisor = &plan.config.hypervisor;
    let (driver, program): (&dyn vm::Driver, _) = match plan.builtin {
        true => (&vm::Builtin, &hypervisor.vmm),
        false => (&vm::Qemu, &hypervisor.qemu),
    };
    config.program = vm::find_program(program).map_err(|e| failed(&e))?;
    Ok(driver)
}

/// What the VM driver is told, all but the devices. Descriptors are duplicated for the VMM; it has no others.
fn vm_config(pod: &Pod, plan: &Plan, cgroup: &HostCgroup) -> Result<vm::VmConfig> {
    let hypervisor = &plan.config.hypervisor;
    let kernel = match plan.confidential {
        Some(_) => &hypervisor.confidential_kernel,
        None => &hypervisor.kernel,
    };
    Ok(vm::VmConfig {
        dir: pod.identity.place.dir().to_owned(),
        program: PathBuf::new(), // the driver's, once that is chosen
        kernel: kernel.clone(),
        initramfs: hypervisor.initramfs.clone(),
        kernel_params: plan.kernel_params.clone(),
        vcpus: plan.size.vcpus,
        memory_mib: plan.size.memory_mib,
        share: None,
        nics: Vec::new(),
        passed: Vec::new(),
        cgroup: cgroup.entrance().map_err(|e| failed(&e))?,
        hotplug_ports: plan.hotplug_ports,
        accelerator: plan.accelerator,
        confidential: plan.confidential.clone(),
        user: hypervisor.user.get(),
    })
}

/// The NIC of the VM at the other end of a tap.
pub(super) fn nic(tap: TapNic) -> vm::Nic {
    vm::Nic {
        tap: tap.tap,
        mac: tap.mac,
        mtu: tap.mtu.unwrap_or(LARGEST_MTU),
    }
}

async fn netns(request: &BootRequest) -> Result<PodNetns> {
    let netns = match (&request.netns, &request.spec) {
        (Some(path), _) => PodNetns::open(path).await,
        (None, Some(spec)) => PodNetns::from_spec(spec).await,
        (None, None) => PodNetns::create().await,
    };
    netns.map_err(|e| refused(&e))
}

fn cgroup(pod: &Pod, ledger: &Ledger, request: &BootRequest, plan: &Plan) -> Result<HostCgroup> {
    let path = request
        .spec
        .as_ref()
        .and_then(|s| s.linux().as_ref()?.cgroups_path().clone());
    let path = path.unwrap_or_default();
    let strict = plan.config.runtime.strict_cgroup;
    let cgroup = HostCgroup::create(&path.to_string_lossy(), pod.id(), ledger, strict);
    cgroup.map_err(|e| failed(&e))
}

/// The shim is of the pod too. Off the runtime's thread, while the guest has something to do: a move waits for every
/// processor of the host, 8 to 20 ms.
async fn join(cgroup: &HostCgroup, strict: bool) -> Result<()> {
    let dirs = cgroup.dirs().to_vec();
    let joining = tokio::task::spawn_blocking(move || host_cgroup::join(&dirs, std::process::id()));
    match joining.await.map_err(|e| failed(&e))? {
        Err(e) if strict => Err(failed(&e)),
        Err(e) => {
            tracing::warn!("{}", crate::error::chain(&e));
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

fn mark_guest_times(pod: &Pod, hello: &agent::HelloResponse) {
    let now = clock::boot_ns();
    pod.timeline.mark_at(Mark::AgentReady, now);
    // The guest's clock began with its kernel; its last stamp was taken when it dialled, just now.
    let since_init = hello.ready_ns.saturating_sub(hello.init_started_ns);
    pod.timeline
        .mark_at(Mark::KernelUp, now.saturating_sub(since_init));
}

/// What the pod is attested by: what it starts with, what it brings, what the node has.
fn attestation(
    pod: &Pod,
    plan: &Plan,
    request: &BootRequest,
    config: &vm::VmConfig,
    cmdline: String,
) -> Result<Settings> {
    let launch = Launch {
        kernel: config.kernel.clone(),
        initramfs: config.initramfs.clone(),
        cmdline,
        vcpus: config.vcpus,
        confidential: config.confidential.clone(),
    };
    let uid = request.annotations.get(spec::SANDBOX_UID);
    let names = (pod.namespace(), pod.id(), uid.map(String::as_str));
    let init_data = plan.init_data.clone();
    let policy = plan.policy.as_deref();
    let dir = pod.identity.place.dir();
    let settings = Settings::new(&plan.config, policy, init_data, names, dir, launch);
    settings.map_err(|e| refused(&e))
}

/// Without it the pod works, but containerd's port-forward does not.
async fn port_forward(network: &PodNetwork, guest: &Guest) -> Option<PortForward> {
    let guest = guest.clone();
    let dial = move |port| {
        let guest = guest.clone();
        async move {
            let header = sealpod_protocol::streams::Header::Tcp { port };
            guest.stream(&header).await.map_err(std::io::Error::other)
        }
    };
    match PortForward::start(network.netns(), dial).await {
        Ok(forward) => Some(forward),
        Err(e) => {
            tracing::warn!(
                "Port forwarding is not available: {}",
                crate::error::chain(&e)
            );
            None
        }
    }
}

/// Tells the rest of the shim, and other programs on the host, that the pod is up.
fn announce(
    pod: &Pod,
    plan: &Plan,
    vm: &dyn vm::Vm,
    (guest, hello): (&Guest, &agent::HelloResponse),
    pid: u32,
) {
    let created_ns = clock::unix_ns();
    let file = PodFile {
        namespace: pod.namespace().into(),
        id: pod.id().into(),
        shim_pid: std::process::id(),
        vm_pid: vm.pid(),
        created_unix: u64::try_from(created_ns / 1_000_000_000).unwrap_or(0),
        accelerator: vm.accelerator().as_str().into(),
        vcpus: plan.size.vcpus,
        memory_mib: plan.size.memory_mib,
    };
    if let Err(e) = file.write(pod.identity.place.dir()) {
        tracing::warn!("{}", crate::error::chain(&e));
    }
    let mut view = super::lock(&pod.view);
    view.guest = Some(guest.clone());
    view.pid = pid;
    view.created_ns = Some(created_ns);
    view.info = [
        ("accelerator", file.accelerator),
        ("agent", hello.agent_version.clone()),
        ("kernel", hello.kernel_release.clone()),
        ("vcpus", file.vcpus.to_string()),
        ("memory_mib", file.memory_mib.to_string()),
        ("agent_rss_bytes", hello.agent_rss_bytes.to_string()),
        (
            "guest_memory_available_bytes",
            hello.memory_available_bytes.to_string(),
        ),
    ]
    .into_iter()
    .map(|(k, v)| (k.to_owned(), v))
    .collect();
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is planned for a pod with these annotations on a node with this configuration.
    fn planned(hypervisor: &str, annotations: &[(&str, &str)]) -> Plan {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("sealpod.toml");
        let text = format!(
            "[hypervisor]\naccelerator = \"kvm\"\n{hypervisor}\n[attestation]\n\
             devices.\"nvidia.com/pgpu=0\" = {{ kind = \"vfio\", address = \"0000:65:00.0\" }}\n"
        );
        std::fs::write(&path, text).expect("written");
        let of = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        let request = BootRequest {
            config: Some(path.display().to_string()),
            netns: None,
            annotations: annotations.iter().map(of).collect(),
            spec: None,
            grows: true,
        };
        plan(&request).map_err(|e| e.message).expect("a plan")
    }

    #[test]
    fn a_pod_that_is_attested_or_gets_devices_never_comes_from_a_template() {
        const ON: &str = "driver = \"vmm\"\ntemplate = true";
        assert!(planned(ON, &[]).may_use_template());
        assert!(!planned("driver = \"vmm\"", &[]).may_use_template());
        assert!(!planned("driver = \"qemu\"\ntemplate = true", &[]).may_use_template());
        let policy = ("io.sealpod.attestation.policy", "strict");
        // Without any entry.
        const INIT_DATA: &str = "H4sIAAAAAAACAytLLSrOzM9TsFVQMtAz1DNQ4krMSc8vyizJyAWJFWck6hpbmChxRackliTGcgEA3XsgES8AAAA=";
        let init_data = ("io.sealpod.init_data", INIT_DATA);
        let devices = ("io.sealpod.attestation.devices", "nvidia.com/pgpu=0");
        for attested in [policy, init_data, devices] {
            assert!(!planned(ON, &[attested]).may_use_template(), "{attested:?}");
        }
    }
}
