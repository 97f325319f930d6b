//! The driver for QEMU: starts one, jailed, with every connection opened beforehand and handed over
//! as a descriptor; watches it; and tells how it ended. `args` has its command line, `qmp` its
//! control protocol, `hotplug` the devices that come later.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use sealpod_vmm::vsock::VhostUserVsock;
use serde_json::json;
use tokio::sync::watch;

use super::args::{self, Layout, NicArgs};
use super::check::{check, find_program};
use super::console::Console;
use super::hotplug::{self, Ports};
use super::process::{self, ended, mark, pair, start_vsock};
use super::qmp::Qmp;
use super::{Accelerator, Disk, Driver, Mark, Nic, Passed, Vm, VmConfig, VmError, VmExit};
use super::{confidential, passed, tsc};
use crate::child::{self, Child, Command};
use crate::ledger::Ledger;

/// Descriptors that QEMU may have open. It has some 30, and 2 for each disk.
const OPEN_FILES: u64 = 1024;
/// How long QEMU may take to quit when asked before it is killed.
const QUIT_PATIENCE: Duration = Duration::from_secs(1);

/// Starts QEMU.
#[derive(Debug, Default, Clone, Copy)]
pub struct Qemu;

#[async_trait]
impl Driver for Qemu {
    async fn cmdline(&self, config: &VmConfig) -> String {
        cmdline(config).await
    }

    async fn start(&self, config: VmConfig, ledger: &Ledger) -> Result<Arc<dyn Vm>, VmError> {
        let cmdline = cmdline(&config).await;
        check(&config, &cmdline)?;
        let (monitor, monitor_end) = pair(&config.dir)?;
        let (console, console_end) = pair(&config.dir)?;
        let (vsock, vsock_end) = start_vsock(&config.dir)?;
        let accelerator = config.accelerator;
        let ports = Ports::new(config.hotplug_ports);
        let mut config = config;
        let passed = std::mem::take(&mut config.passed);
        let ends = [monitor_end, console_end, vsock_end];
        let command = command(config, &cmdline, ends, !passed.is_empty())?;

        let child = child::spawn(command, ledger).await?;
        let mut marks = vec![mark("vmm_spawned_ns")];
        let (console, reading) = Console::read(console);
        let (stopping, exit) = process::supervise(child.watch(), console.clone(), reading);
        let qmp = match Qmp::connect(monitor).await {
            Ok(qmp) => qmp,
            Err(e) => {
                child.kill();
                let exit = ended(exit).await;
                return Err(match e {
                    VmError::Ended => VmError::GaveUp(exit),
                    other => other,
                });
            }
        };
        if let Err(e) = pass_all(&qmp, &ports, &passed).await {
            child.kill();
            ended(exit).await;
            return Err(e);
        }
        // The monitor answers once the machine is built; then its vCPUs run.
        marks.push(mark("vcpus_started_ns"));
        Ok(Arc::new(Machine {
            child,
            qmp,
            vsock,
            console,
            stopping,
            exit,
            accelerator,
            ports,
            marks,
        }))
    }
}

/// Gives a machine whose vCPUs stand still its devices, and lets it run.
async fn pass_all(qmp: &Qmp, ports: &Ports, devices: &[Passed]) -> Result<(), VmError> {
    if devices.is_empty() {
        return Ok(());
    }
    for device in devices {
        passed::add(qmp, ports, device).await?;
    }
    qmp.execute("cont", json!({})).await.map(drop)
}

/// The guest's command line. The first time after a boot of the host, a measurement blocks.
async fn cmdline(config: &VmConfig) -> String {
    let state_dir = config.dir.parent().unwrap_or(&config.dir).to_owned();
    let tsc_khz = match config.accelerator {
        Accelerator::Kvm => None,
        Accelerator::Tcg => tokio::task::spawn_blocking(move || tsc::khz(&state_dir))
            .await
            .unwrap_or(None),
    };
    let hotplug = config.hotplug_ports > 0;
    args::cmdline(
        config.accelerator,
        config.vcpus,
        tsc_khz,
        hotplug,
        &config.kernel_params,
    )
}

/// QEMU as it will be run. Descriptors are numbered in the order they are given.
fn command(
    config: VmConfig,
    cmdline: &str,
    [monitor, console, vsock]: [OwnedFd; 3],
    stopped: bool,
) -> Result<Command, VmError> {
    let program = find_program(&config.program)?;
    let prefix = match program.parent() {
        Some(bin) if bin.ends_with("bin") => bin.parent().filter(|p| p.parent().is_some()),
        _ => None,
    };
    let firmware = prefix.is_some_and(|p| p.join("share/qemu").join(args::FIRMWARE).exists());
    let jail = process::jail(&config, prefix.unwrap_or(&program))?;
    let bit = confidential::encryption_bit();

    let mut command = Command::new("qemu", &program);
    let nics: Vec<NicArgs> = config
        .nics
        .into_iter()
        .map(|nic| NicArgs {
            fd: command.fd(nic.tap),
            mac: nic.mac,
            mtu: nic.mtu,
        })
        .collect();
    let layout = Layout {
        name: &config.dir.file_name().unwrap_or_default().to_string_lossy(),
        accelerator: config.accelerator,
        vcpus: config.vcpus,
        memory_mib: config.memory_mib,
        cmdline,
        firmware,
        monitor: command.fd(monitor),
        console: command.fd(console),
        vsock: command.fd(vsock),
        share: config.share.map(|share| command.fd(share)),
        nics: &nics,
        hotplug_ports: config.hotplug_ports,
        stopped,
        protected: config.confidential.as_ref().map(|guest| (guest, bit)),
    };
    command.args(args::build(&layout));
    command.cgroup(config.cgroup);
    command.jail(jail).user(config.user, config.user);
    // The guest's memory is not for core files.
    command.rlimit(libc::RLIMIT_CORE, 0);
    command.rlimit(libc::RLIMIT_NOFILE, OPEN_FILES);
    Ok(command)
}

/// A running QEMU.
struct Machine {
    child: Child,
    qmp: Qmp,
    vsock: VhostUserVsock,
    console: Console,
    stopping: Arc<AtomicBool>,
    exit: watch::Receiver<Option<VmExit>>,
    accelerator: Accelerator,
    ports: Ports,
    marks: Vec<Mark>,
}

#[async_trait]
impl Vm for Machine {
    fn pid(&self) -> u32 {
        self.child.pid()
    }
    fn pidfd(&self) -> io::Result<OwnedFd> {
        self.child.pidfd()
    }

    fn accelerator(&self) -> Accelerator {
        self.accelerator
    }

    fn marks(&self) -> Vec<Mark> {
        self.marks.clone()
    }

    fn console_tail(&self) -> Vec<String> {
        self.console.lines()
    }

    async fn describe(&self) -> Result<Vec<String>, VmError> {
        let command = json!({ "command-line": "info registers -a" });
        let answer = self.qmp.execute("human-monitor-command", command).await?;
        let text = answer.as_str().unwrap_or_default();
        Ok(text.lines().map(str::to_owned).collect())
    }

    async fn pause(&self) -> Result<(), VmError> {
        self.qmp.execute("stop", json!({})).await.map(drop)
    }

    async fn resume(&self) -> Result<(), VmError> {
        self.qmp.execute("cont", json!({})).await.map(drop)
    }

    async fn add_disk(&self, disk: Disk) -> Result<(), VmError> {
        hotplug::add_disk(&self.qmp, &self.ports, &disk).await
    }

    async fn remove_disk(&self, serial: &str) -> Result<(), VmError> {
        hotplug::remove_disk(&self.qmp, &self.ports, serial).await
    }

    async fn add_nic(&self, nic: Nic) -> Result<(), VmError> {
        hotplug::add_nic(&self.qmp, &self.ports, nic).await
    }

    async fn pass(&self, device: Passed) -> Result<(), VmError> {
        passed::add(&self.qmp, &self.ports, &device).await
    }

    async fn take_back(&self, id: &str) -> Result<(), VmError> {
        passed::take(&self.qmp, &self.ports, id).await
    }

    async fn wait(&self) -> VmExit {
        ended(self.exit.clone()).await
    }

    async fn stop(&self) {
        if self.exit.borrow().is_none() {
            self.stopping.store(true, Ordering::SeqCst);
            let quit = self.qmp.execute("quit", json!({}));
            let gone = async {
                // QEMU often ends before it has answered.
                let _ = quit.await;
                self.child.wait().await
            };
            if tokio::time::timeout(QUIT_PATIENCE, gone).await.is_err() {
                self.child.kill();
            }
        }
        self.wait().await;
        self.vsock.stop();
    }
}
