//! The control connection: what the shim asks, as `protocol/proto/vmm.proto` has it, done to one
//! machine. Descriptors come in here and become devices; the machine itself is `machine`'s.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use sealpod_protocol::vmm::{
    BalloonRequest, BalloonResponse, CreateRequest, Disk, Empty, Nic, RemoveDiskRequest,
};
use sealpod_protocol::vmm_ttrpc::{Vmm, create_vmm};
use sealpod_protocol::{GUEST_CID, SHARE_TAG};
use tokio::sync::mpsc;
use ttrpc::r#async::transport::Listener;
use ttrpc::r#async::{Server, TtrpcContext};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::machine::{Boot, Config, End, Machine};
use crate::virtio::{Balloon, Block, Device, Net, NetConfig, Remote};

/// First descriptor that is not one of the standard three.
const FIRST_FD: RawFd = 3;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Serves the shim on descriptor `control`, with `descriptors` as the socket over which further ones
/// come, until the guest ends or the shim is gone.
///
/// # Errors
/// The descriptors are not what they should be, or the machine fails.
pub async fn serve(control: RawFd, descriptors: RawFd) -> Result<(), Failure> {
    let inherited = Inherited::default();
    let control = UnixStream::from(inherited.take(control)?);
    control.set_nonblocking(true)?;
    let control = tokio::net::UnixStream::from_std(control)?;
    let (tell, mut ended) = mpsc::unbounded_channel();
    let service = Service {
        descriptors: UnixStream::from(inherited.take(descriptors)?),
        inherited,
        tell: tell.clone(),
        vm: Mutex::default(),
    };
    let only = futures_util::stream::iter([Ok(control)]);
    let mut server = Server::new()
        .register_service(create_vmm(Arc::new(service)))
        .add_listener(Listener::new(only));
    server.start().await?;
    let end = ended.recv().await;
    match end {
        Some(End::Failed(why)) => Err(why.into()),
        Some(End::Guest) | None => Ok(()),
    }
}

/// Descriptors that the process began with, each of which has one owner.
#[derive(Default)]
struct Inherited(Mutex<Vec<RawFd>>);

impl Inherited {
    /// # Errors
    /// A standard descriptor, one that is not open, or one that was taken before.
    #[expect(
        unsafe_code,
        reason = "an inherited descriptor is known by its number only"
    )]
    fn take(&self, fd: RawFd) -> Result<OwnedFd, Failure> {
        let mut taken = lock(&self.0);
        // SAFETY: asks for the descriptor's flags; no pointer is passed.
        let open = unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0;
        if fd < FIRST_FD || !open || taken.contains(&fd) {
            return Err(format!("Descriptor {fd} is no inherited one, or is in use").into());
        }
        taken.push(fd);
        // SAFETY: it is open, and was taken by nobody else: descriptors are taken before this process
        // opens files of its own, or have numbers that the shim has given out before.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: sets a flag of a descriptor that is open.
        unsafe { libc::fcntl(owned.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
        Ok(owned)
    }

    fn number(&self, fd: u32) -> Result<OwnedFd, Failure> {
        self.take(RawFd::try_from(fd)?)
    }
}

/// A machine and what the shim knows it by.
struct Running {
    machine: Machine,
    balloon: Arc<Mutex<Balloon>>,
    /// Slot of each disk, by serial.
    disks: HashMap<String, usize>,
}

struct Service {
    inherited: Inherited,
    descriptors: UnixStream,
    tell: mpsc::UnboundedSender<End>,
    vm: Mutex<Option<Running>>,
}

impl Service {
    fn create(&self, request: &CreateRequest) -> Result<(), Failure> {
        let mut vm = lock(&self.vm);
        if vm.is_some() {
            return Err("There is a machine already".into());
        }
        let balloon = Arc::new(Mutex::new(Balloon::new()));
        // No entropy device: the shim gives the agent entropy, and the processor has RDRAND.
        let mut devices: Vec<Arc<Mutex<dyn Device>>> = vec![balloon.clone()];
        let shared_memory = request.vsock_fd != 0 || request.share_fd != 0;
        if request.vsock_fd != 0 {
            let daemon = UnixStream::from(self.inherited.number(request.vsock_fd)?);
            devices.push(Arc::new(Mutex::new(Remote::vsock(daemon, GUEST_CID)?)));
        }
        if request.share_fd != 0 {
            let daemon = UnixStream::from(self.inherited.number(request.share_fd)?);
            devices.push(Arc::new(Mutex::new(Remote::folder(daemon, SHARE_TAG)?)));
        }
        for nic in &request.nics {
            let tap = self.inherited.number(nic.fd)?;
            devices.push(Arc::new(Mutex::new(net(tap, nic)?)));
        }
        let open = |path: &str| File::open(path).map_err(|e| format!("{path}: {e}"));
        let console = UnixStream::from(self.inherited.number(request.console_fd)?);
        // A console that nobody reads must not stop the guest.
        console.set_nonblocking(true)?;
        let config = Config {
            boot: Boot {
                kernel: open(&request.kernel)?,
                initramfs: Some(open(&request.initramfs)?),
                cmdline: request.cmdline.clone(),
            },
            memory_mib: request.memory_mib,
            shared_memory,
            vcpus: request.vcpus,
            console: File::from(OwnedFd::from(console)),
            devices,
            spare_slots: request.spare_slots as usize,
            confined: true,
        };
        let tell = self.tell.clone();
        let machine = Machine::new(config, move |end| {
            // Nobody listens any more: the process is ending.
            let _ = tell.send(end);
        })?;
        *vm = Some(Running {
            machine,
            balloon,
            disks: HashMap::new(),
        });
        Ok(())
    }

    fn with<T>(&self, act: impl FnOnce(&mut Running) -> Result<T, Failure>) -> Result<T, Failure> {
        match lock(&self.vm).as_mut() {
            Some(running) => act(running),
            None => Err("There is no machine yet".into()),
        }
    }

    /// A descriptor that the shim has just sent.
    fn sent(&self) -> Result<OwnedFd, Failure> {
        let mut byte = [0];
        self.descriptors.set_nonblocking(true)?;
        let (_, file) = self.descriptors.recv_with_fd(&mut byte)?;
        Ok(file.ok_or("No descriptor was sent")?.into())
    }

    fn add_disk(&self, disk: &Disk) -> Result<(), Failure> {
        let file = File::from(self.sent()?);
        let device = Block::new(file, disk.readonly, &disk.serial)?;
        self.with(|running| {
            if running.disks.contains_key(&disk.serial) {
                return Err(format!("There is a disk {:?} already", disk.serial).into());
            }
            let slot = running.machine.plug(Arc::new(Mutex::new(device)))?;
            running.disks.insert(disk.serial.clone(), slot);
            Ok(())
        })
    }

    fn remove_disk(&self, serial: &str) -> Result<(), Failure> {
        self.with(|running| {
            let slot = *running.disks.get(serial).ok_or("There is no such disk")?;
            if running.machine.is_driven(slot) {
                return Err("The guest's driver uses it".into());
            }
            running.machine.unplug(slot);
            running.disks.remove(serial);
            Ok(())
        })
    }

    fn add_nic(&self, nic: &Nic) -> Result<(), Failure> {
        let device = net(self.sent()?, nic)?;
        self.with(|running| {
            running.machine.plug(Arc::new(Mutex::new(device)))?;
            Ok(())
        })
    }

    fn set_balloon(&self, bytes: u64) -> Result<u64, Failure> {
        self.with(|running| {
            let mut balloon = lock(&running.balloon);
            balloon.set_target(bytes);
            Ok(balloon.actual())
        })
    }
}

fn net(tap: OwnedFd, nic: &Nic) -> Result<Net, Failure> {
    let mac = <[u8; 6]>::try_from(&*nic.mac).map_err(|_| "A MAC address has 6 bytes")?;
    let mtu = u16::try_from(nic.mtu)?;
    Ok(Net::new(vec![tap], NetConfig { mac, mtu })?)
}

/// A failure as ttrpc tells it, with its causes.
fn refused(failure: Failure) -> ttrpc::Error {
    let mut text = failure.to_string();
    let mut source = failure.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::FAILED_PRECONDITION, text))
}

fn done(result: Result<(), Failure>) -> ttrpc::Result<Empty> {
    result.map(|()| Empty::new()).map_err(refused)
}

#[async_trait]
impl Vmm for Service {
    async fn create(&self, _: &TtrpcContext, request: CreateRequest) -> ttrpc::Result<Empty> {
        done(self.create(&request))
    }

    async fn resume(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        done(self.with(|running| {
            running.machine.resume();
            Ok(())
        }))
    }

    async fn pause(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        done(self.with(|running| {
            running.machine.pause();
            Ok(())
        }))
    }

    async fn add_disk(&self, _: &TtrpcContext, disk: Disk) -> ttrpc::Result<Empty> {
        done(self.add_disk(&disk))
    }

    async fn add_nic(&self, _: &TtrpcContext, nic: Nic) -> ttrpc::Result<Empty> {
        done(self.add_nic(&nic))
    }

    async fn remove_disk(
        &self,
        _: &TtrpcContext,
        request: RemoveDiskRequest,
    ) -> ttrpc::Result<Empty> {
        done(self.remove_disk(&request.serial))
    }

    async fn set_balloon(
        &self,
        _: &TtrpcContext,
        request: BalloonRequest,
    ) -> ttrpc::Result<BalloonResponse> {
        let bytes = self.set_balloon(request.bytes).map_err(refused)?;
        Ok(BalloonResponse {
            bytes,
            ..Default::default()
        })
    }
}

/// A poisoned lock means that a thread has panicked; what it guards is still whole.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
