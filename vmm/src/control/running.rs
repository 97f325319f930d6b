//! The one machine of the process and what the shim knows it by: how it is made from what a request
//! names, and what comes and goes later. Descriptors are open when they come here.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use sealpod_protocol::vmm::{CreateRequest, Disk, Nic, RestoreRequest};
use sealpod_protocol::{GUEST_CID, SHARE_TAG};

use super::events::{End, Events};
use super::inherited::Inherited;
use super::{Failure, lock};
use crate::confine::May;
use crate::machine::{self, Boot, Config, Machine, Restore};
use crate::snapshot::Files;
use crate::virtio::{Balloon, Block, Device, Net, NetConfig, Remote, Window};

/// See the file's head.
pub(super) struct Running {
    machine: Machine,
    balloon: Arc<Mutex<Balloon>>,
    /// Slot of each device that the shim has added, by its name: a disk's serial, a NIC's address.
    added: HashMap<String, usize>,
    /// The share of a guest that goes on, whose daemon comes later.
    share: Option<Arc<Mutex<Remote>>>,
}

/// Devices that a machine begins with.
type Devices = Vec<Arc<Mutex<dyn Device>>>;

impl Running {
    /// Boots one.
    pub(super) fn create(
        request: &CreateRequest,
        inherited: &Inherited,
        events: &Arc<Events>,
    ) -> Result<Self, Failure> {
        let (balloon, mut devices) = first_devices(request.vsock_fd, None, inherited, events)?;
        if request.share_fd != 0 {
            let daemon = UnixStream::from(inherited.number(request.share_fd)?);
            let share = Remote::folder(daemon, SHARE_TAG, None)?;
            devices.push(Arc::new(Mutex::new(share)));
        } else if request.saved {
            // So that guests that go on from it have found theirs.
            let share = Remote::folder_to_come(SHARE_TAG, None)?;
            devices.push(Arc::new(Mutex::new(share)));
        }
        for nic in &request.nics {
            let tap = inherited.number(nic.fd)?;
            devices.push(Arc::new(Mutex::new(net(tap, nic)?)));
        }
        let open = |path: &str| File::open(path).map_err(|e| format!("{path}: {e}"));
        let may = if request.saved {
            May::BeSaved
        } else {
            May::Run
        };
        let config = Config {
            boot: Boot {
                kernel: open(&request.kernel)?,
                initramfs: Some(open(&request.initramfs)?),
                cmdline: request.cmdline.clone(),
            },
            memory_mib: request.memory_mib,
            shared_memory: request.vsock_fd != 0 || request.share_fd != 0,
            vcpus: request.vcpus,
            console: console(request.console_fd, inherited)?,
            devices,
            spare_slots: request.spare_slots as usize,
            confined: Some(may),
        };
        let machine = Machine::new(config, tell(events))?;
        Ok(Self::new(machine, balloon, None))
    }

    /// Has one go on.
    pub(super) fn restore(
        request: &RestoreRequest,
        inherited: &Inherited,
        events: &Arc<Events>,
    ) -> Result<Self, Failure> {
        // Windows are made now: once it is confined the process can make none.
        let window = Some(Window::new()?);
        let (balloon, mut devices) = first_devices(request.vsock_fd, window, inherited, events)?;
        let share = Remote::folder_to_come(SHARE_TAG, Some(Window::new()?))?;
        let share = Arc::new(Mutex::new(share));
        devices.push(share.clone());
        let restore = Restore {
            snapshot: Files {
                state: inherited.number(request.state_fd)?.into(),
                memory: inherited.number(request.memory_fd)?.into(),
            },
            write_set: (request.write_set.iter())
                .map(|pages| (pages.first, pages.count))
                .collect(),
            console: console(request.console_fd, inherited)?,
            devices,
            confined: Some(May::Run),
        };
        let machine = Machine::restore(restore, tell(events))?;
        Ok(Self::new(machine, balloon, Some(share)))
    }

    fn new(
        machine: Machine,
        balloon: Arc<Mutex<Balloon>>,
        share: Option<Arc<Mutex<Remote>>>,
    ) -> Self {
        Self {
            machine,
            balloon,
            added: HashMap::new(),
            share,
        }
    }

    pub(super) fn machine(&self) -> &Machine {
        &self.machine
    }

    pub(super) fn add_disk(&mut self, file: OwnedFd, disk: &Disk) -> Result<(), Failure> {
        let device = Block::new(file.into(), disk.readonly, &disk.serial)?;
        self.add(disk_name(&disk.serial), Arc::new(Mutex::new(device)))
    }

    pub(super) fn add_nic(&mut self, tap: OwnedFd, nic: &Nic) -> Result<(), Failure> {
        let device = net(tap, nic)?;
        self.add(nic_name(&nic.mac), Arc::new(Mutex::new(device)))
    }

    pub(super) fn add_share(&mut self, daemon: OwnedFd) -> Result<(), Failure> {
        let share = (self.share.as_ref()).ok_or("Its share came when it was created")?;
        lock(share).attach(daemon.into())?;
        Ok(())
    }

    fn add(&mut self, name: String, device: Arc<Mutex<dyn Device>>) -> Result<(), Failure> {
        if self.added.contains_key(&name) {
            return Err(format!("There is {name} already").into());
        }
        let slot = self.machine.plug(device)?;
        self.added.insert(name, slot);
        Ok(())
    }

    pub(super) fn remove_disk(&mut self, serial: &str) -> Result<(), Failure> {
        self.remove(&disk_name(serial))
    }

    pub(super) fn remove_nic(&mut self, mac: &[u8]) -> Result<(), Failure> {
        self.remove(&nic_name(mac))
    }

    fn remove(&mut self, name: &str) -> Result<(), Failure> {
        let slot = *self
            .added
            .get(name)
            .ok_or_else(|| format!("There is no {name} that was added"))?;
        if self.machine.is_driven(slot) {
            return Err("The guest's driver uses it".into());
        }
        self.machine.unplug(slot);
        self.added.remove(name);
        Ok(())
    }

    pub(super) fn set_balloon(&self, bytes: u64) -> u64 {
        let mut balloon = lock(&self.balloon);
        balloon.set_target(bytes);
        balloon.actual()
    }
}

fn disk_name(serial: &str) -> String {
    format!("disk {serial:?}")
}

fn nic_name(mac: &[u8]) -> String {
    format!("network device {mac:02x?}")
}

/// What every machine has, in this order: the balloon, and the vsock engine's device where there is one.
fn first_devices(
    vsock: u32,
    window: Option<Window>,
    inherited: &Inherited,
    events: &Arc<Events>,
) -> Result<(Arc<Mutex<Balloon>>, Devices), Failure> {
    let mut balloon = Balloon::new();
    let pressed = Arc::clone(events);
    balloon.when_pressed(move |left| pressed.pressure(left));
    let balloon = Arc::new(Mutex::new(balloon));
    // No entropy device: the shim gives the agent entropy, and the processor has RDRAND.
    let mut devices: Devices = vec![balloon.clone()];
    if vsock != 0 {
        let daemon = UnixStream::from(inherited.number(vsock)?);
        devices.push(Arc::new(Mutex::new(Remote::vsock(
            daemon, GUEST_CID, window,
        )?)));
    }
    Ok((balloon, devices))
}

fn console(fd: u32, inherited: &Inherited) -> Result<File, Failure> {
    let console = UnixStream::from(inherited.number(fd)?);
    // A console that nobody reads must not stop the guest.
    console.set_nonblocking(true)?;
    Ok(File::from(OwnedFd::from(console)))
}

fn tell(events: &Arc<Events>) -> impl FnOnce(machine::End) + Send + 'static {
    let events = Arc::clone(events);
    move |end| events.end(End::Machine(end))
}

fn net(tap: OwnedFd, nic: &Nic) -> Result<Net, Failure> {
    let mac = <[u8; 6]>::try_from(&*nic.mac).map_err(|_| "A MAC address has 6 bytes")?;
    let mtu = u16::try_from(nic.mtu)?;
    Ok(Net::new(vec![tap], NetConfig { mac, mtu })?)
}
