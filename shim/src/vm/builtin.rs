//! The driver for sealpod-vmm: starts one, jailed, with every connection opened beforehand and handed
//! over as a descriptor, and asks it for things over one of them (`protocol/proto/vmm.proto`). It runs
//! on KVM only, and has neither PCI nor confidential guests: those are QEMU's.

mod launch;

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use sealpod_protocol::vmm::{Disk as DiskRequest, Empty, Nic as NicRequest, RemoveDiskRequest};
use sealpod_protocol::vmm_ttrpc::VmmClient;
use sealpod_vmm::snapshot::Files;
use sealpod_vmm::vsock::VhostUserVsock;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{Mutex, watch};
use ttrpc::context::{self, Context};

use super::console::Console;
use super::hotplug::{self, Ports};
use super::process::ended;
use super::{Accelerator, Disk, Driver, Mark, Nic, Passed, Vm, VmConfig, VmError, VmExit};
use crate::child::Child;
use crate::ledger::Ledger;
use launch::First;
pub(super) use launch::{Begin, cmdline, launch};

/// How long sealpod-vmm may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// To make the machine, for which it reads kernel and initramfs, or a template.
const MAKE_PATIENCE: Duration = Duration::from_secs(30);
/// To write a machine down.
const SAVE_PATIENCE: Duration = Duration::from_secs(60);
/// One whose connection has broken has ended, or is about to.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// Starts sealpod-vmm.
#[derive(Debug, Default, Clone, Copy)]
pub struct Builtin;

#[async_trait]
impl Driver for Builtin {
    async fn cmdline(&self, config: &VmConfig) -> String {
        cmdline(config)
    }

    async fn start(&self, config: VmConfig, ledger: &Ledger) -> Result<Arc<dyn Vm>, VmError> {
        let machine = launch(config, Begin::Boot { saved: false }, ledger).await?;
        Ok(Arc::new(machine))
    }
}

/// A running sealpod-vmm.
pub(super) struct Machine {
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
    async fn make(&self, request: &First) -> Result<(), VmError> {
        let limit = context::with_duration(MAKE_PATIENCE);
        let (command, made) = match request {
            First::Create(request) => (
                "create the machine",
                self.client.create(limit, request).await,
            ),
            First::Restore(request) => (
                "restore the machine",
                self.client.restore(limit, request).await,
            ),
        };
        let Err(e) = made else {
            return Ok(());
        };
        if matches!(e, ttrpc::Error::RpcStatus(_)) {
            return Err(self.failure(command, e));
        }
        match tokio::time::timeout(END_PATIENCE, ended(self.exit.clone())).await {
            Ok(exit) => Err(VmError::GaveUp(exit)),
            Err(_) => {
                self.child.kill();
                ended(self.exit.clone()).await;
                Err(VmError::Silent {
                    command: command.into(),
                    seconds: MAKE_PATIENCE.as_secs(),
                })
            }
        }
    }

    /// Writes it, which must be paused, into empty files.
    pub(super) async fn save(&self, into: &Files) -> Result<(), VmError> {
        let descriptors = self.descriptors.lock().await;
        send(&descriptors, into.state.as_fd()).await?;
        send(&descriptors, into.memory.as_fd()).await?;
        let patience = context::with_duration(SAVE_PATIENCE);
        let answer = self.client.save(patience, &Empty::new()).await;
        self.answered("save the machine", answer)
    }

    /// Plugs in the share of a machine that was restored, by a connection to its daemon.
    pub(super) async fn add_share(&self, daemon: BorrowedFd<'_>) -> Result<(), VmError> {
        let descriptors = self.descriptors.lock().await;
        send(&descriptors, daemon).await?;
        let answer = self.client.add_share(soon(), &Empty::new()).await;
        self.answered("add the share", answer)
    }

    /// Plugs in a network device that is not counted among those that come later.
    pub(super) async fn plug_nic(&self, nic: &Nic) -> Result<(), VmError> {
        let request = NicRequest {
            mac: nic.mac.to_vec(),
            mtu: nic.mtu,
            ..Default::default()
        };
        let descriptors = self.descriptors.lock().await;
        send(&descriptors, nic.tap.as_fd()).await?;
        let answer = self.client.add_nic(soon(), &request).await;
        self.answered("add a network device", answer)
    }

    /// Has the VMM end by itself, and waits for that.
    pub(super) async fn end(&self) -> Result<(), VmError> {
        self.stopping.store(true, Ordering::SeqCst);
        let answer = self.client.stop(soon(), &Empty::new()).await;
        answer.map_err(|e| self.failure("stop", e))?;
        self.wait().await;
        self.vsock.stop();
        Ok(())
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
    fn pidfd(&self) -> io::Result<OwnedFd> {
        self.child.pidfd()
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

    async fn describe(&self) -> Result<Vec<String>, VmError> {
        let answer = self.client.describe(soon(), &Empty::new()).await;
        let answer = answer.map_err(|e| self.failure("describe the machine", e))?;
        Ok(answer.lines)
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
        self.plug_nic(&nic).await?;
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
