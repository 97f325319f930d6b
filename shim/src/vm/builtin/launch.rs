//! A sealpod-vmm is started: its process, jailed, with every connection opened beforehand, and the first
//! request, which makes the machine.

use std::os::fd::OwnedFd;

use sealpod_protocol::vmm::{
    CreateRequest, Empty, Nic as NicRequest, Pages, RestoreRequest, event::Kind,
};
use sealpod_protocol::vmm_ttrpc::VmmClient;
use sealpod_vmm::snapshot::Files;
use tokio::sync::Mutex;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context;

use super::super::check::{check, find_program};
use super::super::console::Console;
use super::super::hotplug::Ports;
use super::super::process::{self, INITRAMFS, KERNEL, mark, pair, start_vsock};
use super::super::{Accelerator, Vm as _, VmConfig, VmError};
use super::Machine;
use crate::child::{self, Command};
use crate::ledger::Ledger;

/// Descriptors that it may have open: some 60, and 5 for each device.
const OPEN_FILES: u64 = 1024;
/// The kernel's command line: what every guest of this VMM has. The clocks' rates are known.
const CMDLINE: &str = "console=ttyS0 quiet tsc=reliable dummy.numdummies=0";

/// How a machine begins.
pub(in super::super) enum Begin {
    /// With its kernel; whether it may be written down later.
    Boot { saved: bool },
    /// Where one stood that was written down, without what that one plugged in later; runs of pages, (first, count),
    /// that the guest is known to write to.
    Restore(Files, Vec<(u64, u64)>),
}

/// Starts one; returns when its virtual CPUs run.
pub(in super::super) async fn launch(
    config: VmConfig,
    begin: Begin,
    ledger: &Ledger,
) -> Result<Machine, VmError> {
    if config.accelerator != Accelerator::Kvm {
        return Err(VmError::Config {
            what: "Accelerator",
            value: config.accelerator.as_str().into(),
            allowed: "sealpod-vmm runs on KVM only".into(),
        });
    }
    let cmdline = cmdline(&config);
    check(&config, &cmdline)?;
    let (control, control_end) = pair(&config.dir)?;
    let (descriptors, descriptors_end) = pair(&config.dir)?;
    let (console, console_end) = pair(&config.dir)?;
    let (vsock, vsock_end) = start_vsock(&config.dir)?;
    let ends = Ends {
        control: control_end,
        descriptors: descriptors_end,
        console: console_end,
        vsock: vsock_end,
    };
    let ports = Ports::new(config.hotplug_ports);
    let (command, request) = command(config, cmdline, begin, ends)?;

    let child = child::spawn(command, ledger).await?;
    let spawned = mark("vmm_spawned_ns");
    let (console, reading) = Console::read(console);
    let (stopping, exit) = process::supervise(child.watch(), console.clone(), reading);
    let client = VmmClient::new(ttrpc::asynchronous::Client::new(Socket::new(control)));
    let mut machine = Machine {
        child,
        client,
        descriptors: Mutex::new(descriptors),
        vsock,
        console,
        stopping,
        exit,
        ports,
        marks: vec![spawned],
    };
    machine.make(&request).await?;
    machine.marks.push(mark("machine_made_ns"));
    machine.resume().await?;
    machine.marks.push(mark("vcpus_started_ns"));
    tokio::spawn(listen(machine.client.clone()));
    Ok(machine)
}

/// Tells the log what the VMM tells, until it has ended.
async fn listen(client: VmmClient) {
    let forever = || context::with_timeout(0);
    while let Ok(event) = client.next_event(forever(), &Empty::new()).await {
        match event.kind {
            Some(Kind::MemoryPressure(pressure)) => tracing::warn!(
                "The guest ran out of memory and took some back: its balloon has {} MiB left",
                pressure.balloon_bytes >> 20
            ),
            // Also of a VM that is stopped because its agent was gone: then this says why that was.
            Some(Kind::Ended(ended)) => tracing::info!("The VM ended by {:?}", ended.how),
            _ => {}
        }
    }
}

pub(in super::super) fn cmdline(config: &VmConfig) -> String {
    let mut words = vec![CMDLINE, process::SMALL];
    if config.vcpus == 1 {
        // Lock prefixes stay as they are: there is nobody to lock out, and nothing to patch.
        words.push("noreplace-smp");
    }
    words.extend(config.kernel_params.iter().map(String::as_str));
    words.join(" ")
}

/// sealpod-vmm's ends of its connections.
struct Ends {
    control: OwnedFd,
    descriptors: OwnedFd,
    console: OwnedFd,
    vsock: OwnedFd,
}

/// What it is asked first.
pub(super) enum First {
    Create(CreateRequest),
    Restore(RestoreRequest),
}

/// The process as it will be run, and what it is asked first.
fn command(
    config: VmConfig,
    cmdline: String,
    begin: Begin,
    ends: Ends,
) -> Result<(Command, First), VmError> {
    let program = find_program(&config.program)?;
    let jail = process::jail(&config, &program)?;
    let mut command = Command::new("sealpod-vmm", &program);
    let [control, descriptors] = [ends.control, ends.descriptors].map(|fd| command.fd(fd));
    command.args([
        "serve".to_owned(),
        control.to_string(),
        descriptors.to_string(),
    ]);
    let mut give = |fd: OwnedFd| command.fd(fd).unsigned_abs();
    let (console_fd, vsock_fd) = (give(ends.console), give(ends.vsock));
    let request = match begin {
        Begin::Boot { saved } => First::Create(CreateRequest {
            memory_mib: config.memory_mib,
            vcpus: config.vcpus,
            kernel: KERNEL.into(),
            initramfs: INITRAMFS.into(),
            cmdline,
            spare_slots: config.hotplug_ports,
            console_fd,
            vsock_fd,
            share_fd: config.share.map_or(0, &mut give),
            nics: (config.nics.into_iter())
                .map(|nic| NicRequest {
                    fd: give(nic.tap),
                    mac: nic.mac.to_vec(),
                    mtu: nic.mtu,
                    ..Default::default()
                })
                .collect(),
            saved,
            ..Default::default()
        }),
        Begin::Restore(files, write_set) => First::Restore(RestoreRequest {
            write_set: (write_set.into_iter())
                .map(|(first, count)| Pages {
                    first,
                    count,
                    ..Default::default()
                })
                .collect(),
            state_fd: give(files.state.into()),
            memory_fd: give(files.memory.into()),
            console_fd,
            vsock_fd,
            ..Default::default()
        }),
    };
    command.cgroup(config.cgroup);
    command.jail(jail).user(config.user, config.user);
    // The guest's memory is not for core files.
    command.rlimit(libc::RLIMIT_CORE, 0);
    command.rlimit(libc::RLIMIT_NOFILE, OPEN_FILES);
    Ok((command, request))
}
