//! The driver for sealpod-vmm: starts one, jailed, with every connection opened beforehand and handed
//! over as a descriptor, and asks it for things over one of them (`protocol/proto/vmm.proto`). It runs
//! on KVM only, and has neither PCI nor confidential guests: those are QEMU's.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use sealpod_protocol::vmm::RemoveDiskRequest;
use sealpod_protocol::vmm::{CreateRequest, Disk as DiskRequest, Empty, Nic as NicRequest};
use sealpod_protocol::vmm_ttrpc::VmmClient;
use sealpod_vmm::vsock::VhostUserVsock;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{Mutex, watch};
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{self, Context};

use super::check::{check, find_program};
use super::console::Console;
use super::hotplug::{self, Ports};
use super::process::{self, INITRAMFS, KERNEL, ended, mark, pair, start_vsock};
use super::{Accelerator, Disk, Driver, Mark, Nic, Passed, Vm, VmConfig, VmError, VmExit};
use crate::child::{self, Child, Command};
use crate::ledger::Ledger;

/// How long sealpod-vmm may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// And to make the machine, for which it reads kernel and initramfs.
const CREATE_PATIENCE: Duration = Duration::from_secs(30);
/// One whose connection has broken has ended, or is about to.
const END_PATIENCE: Duration = Duration::from_secs(1);
/// Descriptors that it may have open: some 60, and 5 for each device.
const OPEN_FILES: u64 = 1024;
/// The kernel's command line: what every guest of this VMM has. The clocks' rates are known.
const CMDLINE: &str = "console=ttyS0 quiet tsc=reliable dummy.numdummies=0";

/// Starts sealpod-vmm.
#[derive(Debug, Default, Clone, Copy)]
pub struct Builtin;

#[async_trait]
impl Driver for Builtin {
    async fn cmdline(&self, config: &VmConfig) -> String {
        cmdline(config)
    }

    async fn start(&self, config: VmConfig, ledger: &Ledger) -> Result<Arc<dyn Vm>, VmError> {
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
        let (command, request) = command(config, cmdline, ends)?;

        let child = child::spawn(command, ledger).await?;
        let spawned = mark("vmm_spawned");
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
        machine.create(&request).await?;
        machine.resume().await?;
        machine.marks.push(mark("vcpus_started"));
        Ok(Arc::new(machine))
    }
}

fn cmdline(config: &VmConfig) -> String {
    let mut words = vec![CMDLINE];
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

/// The process as it will be run, and what it is asked first.
fn command(
    config: VmConfig,
    cmdline: String,
    ends: Ends,
) -> Result<(Command, CreateRequest), VmError> {
    let program = find_program(&config.program)?;
    let jail = process::jail(&config, &program)?;
    let mut command = Command::new("sealpod-vmm", &program);
    let [control, descriptors] = [ends.control, ends.descriptors].map(|fd| command.fd(fd));
    command.args([
        "serve".to_owned(),
        control.to_string(),
        descriptors.to_string(),
    ]);
    let number = |fd: RawFd| fd.unsigned_abs();
    let nics = config.nics.into_iter().map(|nic| NicRequest {
        fd: number(command.fd(nic.tap)),
        mac: nic.mac.to_vec(),
        mtu: nic.mtu,
        ..Default::default()
    });
    let nics = nics.collect();
    let request = CreateRequest {
        memory_mib: config.memory_mib,
        vcpus: config.vcpus,
        kernel: KERNEL.into(),
        initramfs: INITRAMFS.into(),
        cmdline,
        spare_slots: config.hotplug_ports,
        console_fd: number(command.fd(ends.console)),
        vsock_fd: number(command.fd(ends.vsock)),
        share_fd: config.share.map_or(0, |share| number(command.fd(share))),
        nics,
        ..Default::default()
    };
    command.cgroup(config.cgroup);
    if let Some(netns) = config.netns {
        command.netns(netns);
    }
    command.jail(jail).user(config.user, config.user);
    // The guest's memory is not for core files.
    command.rlimit(libc::RLIMIT_CORE, 0);
    command.rlimit(libc::RLIMIT_NOFILE, OPEN_FILES);
    Ok((command, request))
}

/// A running sealpod-vmm.
struct Machine {
    child: Child,
    client: VmmClient,
    /// Descriptors go over it, each right before the request that uses it.
    descriptors: Mutex<UnixStream>,
    vsock: VhostUserVsock,
    console: Console,
    stopping: Arc<AtomicBool>,
    exit: watch::Receiver<Option<VmExit>>,
    ports: Ports,
    marks: Vec<Mark>,
}

fn soon() -> Context {
    context::with_duration(PATIENCE)
}

impl Machine {
    async fn create(&self, request: &CreateRequest) -> Result<(), VmError> {
        const COMMAND: &str = "create the machine";
        let limit = context::with_duration(CREATE_PATIENCE);
        let Err(e) = self.client.create(limit, request).await else {
            return Ok(());
        };
        if matches!(e, ttrpc::Error::RpcStatus(_)) {
            return Err(self.failure(COMMAND, e));
        }
        match tokio::time::timeout(END_PATIENCE, ended(self.exit.clone())).await {
            Ok(exit) => Err(VmError::GaveUp(exit)),
            Err(_) => {
                self.child.kill();
                ended(self.exit.clone()).await;
                Err(VmError::Silent {
                    command: COMMAND.into(),
                    seconds: CREATE_PATIENCE.as_secs(),
                })
            }
        }
    }

    fn failure(&self, command: &str, e: ttrpc::Error) -> VmError {
        let command = command.to_owned();
        match e {
            ttrpc::Error::RpcStatus(status) => VmError::Refused {
                command,
                reason: status.message().chars().take(500).collect(),
            },
            _ if self.exit.borrow().is_some() => VmError::Ended,
            _ => VmError::Silent {
                command,
                seconds: PATIENCE.as_secs(),
            },
        }
    }

    fn answered<T>(&self, command: &str, answer: ttrpc::Result<T>) -> Result<(), VmError> {
        if self.exit.borrow().is_some() {
            return Err(VmError::Ended);
        }
        answer.map(drop).map_err(|e| self.failure(command, e))
    }
}

/// Sends a descriptor and a byte that carries it.
async fn send(socket: &UnixStream, fd: BorrowedFd<'_>) -> Result<(), VmError> {
    let sent = socket.async_io(Interest::WRITABLE, || {
        let fds = [fd];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let byte = [IoSlice::new(&[0])];
        Ok(sendmsg(socket, &byte, &mut control, SendFlags::NOSIGNAL)?)
    });
    sent.await.map(drop).map_err(|_| VmError::Ended)
}

#[async_trait]
impl Vm for Machine {
    fn pid(&self) -> u32 {
        self.child.pid()
    }

    fn accelerator(&self) -> Accelerator {
        Accelerator::Kvm
    }

    fn marks(&self) -> Vec<Mark> {
        self.marks.clone()
    }

    fn console_tail(&self) -> Vec<String> {
        self.console.lines()
    }

    async fn pause(&self) -> Result<(), VmError> {
        let answer = self.client.pause(soon(), &Empty::new()).await;
        self.answered("pause", answer)
    }

    async fn resume(&self) -> Result<(), VmError> {
        let answer = self.client.resume(soon(), &Empty::new()).await;
        self.answered("resume", answer)
    }

    async fn add_disk(&self, disk: Disk) -> Result<(), VmError> {
        hotplug::check_serial(&disk.serial)?;
        let mut port = self.ports.take(&hotplug::disk_id(&disk.serial))?;
        let (file, _) = hotplug::open(&disk)?;
        let request = DiskRequest {
            serial: disk.serial,
            readonly: disk.readonly,
            ..Default::default()
        };
        let descriptors = self.descriptors.lock().await;
        send(&descriptors, file.as_fd()).await?;
        let answer = self.client.add_disk(soon(), &request).await;
        self.answered("add a disk", answer)?;
        port.keep = true;
        Ok(())
    }

    /// A guest whose driver still uses it keeps it: this VMM cannot ask for it.
    async fn remove_disk(&self, serial: &str) -> Result<(), VmError> {
        hotplug::check_serial(serial)?;
        let id = hotplug::disk_id(serial);
        if !self.ports.holds(&id) {
            return Err(VmError::NoDevice(serial.into()));
        }
        let request = RemoveDiskRequest {
            serial: serial.into(),
            ..Default::default()
        };
        let answer = self.client.remove_disk(soon(), &request).await;
        self.answered("remove a disk", answer)?;
        self.ports.release(&id);
        Ok(())
    }

    async fn add_nic(&self, nic: Nic) -> Result<(), VmError> {
        let mut port = self.ports.take(&hotplug::nic_id(nic.mac))?;
        let request = NicRequest {
            mac: nic.mac.to_vec(),
            mtu: nic.mtu,
            ..Default::default()
        };
        let descriptors = self.descriptors.lock().await;
        send(&descriptors, nic.tap.as_fd()).await?;
        let answer = self.client.add_nic(soon(), &request).await;
        self.answered("add a network device", answer)?;
        port.keep = true;
        Ok(())
    }

    async fn pass(&self, device: Passed) -> Result<(), VmError> {
        Err(VmError::Config {
            what: "Passed-through device",
            value: device.id().into(),
            allowed: "sealpod-vmm has no PCI; hypervisor.driver = \"qemu\" has".into(),
        })
    }

    async fn take_back(&self, id: &str) -> Result<(), VmError> {
        Err(VmError::NoDevice(id.into()))
    }

    async fn wait(&self) -> VmExit {
        ended(self.exit.clone()).await
    }

    async fn stop(&self) {
        if self.exit.borrow().is_none() {
            self.stopping.store(true, Ordering::SeqCst);
            // It holds nothing that would have to be written first.
            self.child.kill();
        }
        self.wait().await;
        self.vsock.stop();
    }
}
