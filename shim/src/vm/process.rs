//! What every VMM's process has, whichever program it is: its jail, its connections to the shim, the
//! vsock engine at the other end of one of them, and somebody who waits for its end and says what it
//! was.

use std::fs::DirBuilder;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sealpod_attestation::evidence::Tee;
use sealpod_vmm::vsock::{self, VhostUserVsock};
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::console::{Console, panic_message};
use super::{Accelerator, ExitReason, Mark, VSOCK_FILE, VmConfig, VmError, VmExit};
use crate::child::{self, Exit, Jail, Watch};

/// Where the jail has the guest's kernel and root.
pub(super) const KERNEL: &str = "/boot/vmlinux";
pub(super) const INITRAMFS: &str = "/boot/initramfs";
/// And what a confidential guest needs besides: firmware, and who makes quotes.
pub(super) const GUEST_FIRMWARE: &str = "/boot/firmware";
pub(super) const QUOTE_SOCKET: &str = "/boot/quotes";
/// The security processor of SNP hosts.
const SEV: &str = "/dev/sev";
/// Mount point, in the pod's folder, of the VMM's root.
const JAIL_DIR: &str = "vmm";
/// Socket, in the pod's folder, that exists for the moment in which the VMM's end is connected.
const VHOST_FILE: &str = "vhost.sock";
/// `/dev/kvm` (Linux' devices.txt: misc device 232).
const KVM_MAJOR: u32 = 10;
const KVM_MINOR: u32 = 232;
/// How long the rest of the console may take to be read once QEMU has ended.
const DRAIN: Duration = Duration::from_millis(200);
/// What QEMU writes when it is ended by a signal; its exit code is then 0 as for a guest's end.
const BY_SIGNAL: &str = "terminating on signal";

/// A root with the program's folder, the guest's kernel and root, and KVM where that is used.
pub(super) fn jail(config: &VmConfig, program: &Path) -> Result<Jail, VmError> {
    let root = config.dir.join(JAIL_DIR);
    let host = |source| VmError::Host {
        action: "make folder",
        path: root.clone(),
        source,
    };
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder.create(&root).map_err(host)?;
    let mut jail = Jail::new(&root);
    jail.visible(program)
        .file(&config.kernel, KERNEL)
        .file(&config.initramfs, INITRAMFS);
    if config.accelerator == Accelerator::Kvm {
        jail.device("/dev/kvm", KVM_MAJOR, KVM_MINOR);
    }
    if let Some(guest) = &config.confidential {
        jail.file(&guest.firmware, GUEST_FIRMWARE);
        if let Some(socket) = &guest.quote_socket {
            jail.file(socket, QUOTE_SOCKET);
        }
        if guest.tee == Tee::Snp {
            // Its number is given out when the driver is loaded.
            let number = std::fs::metadata(SEV).map_err(|source| VmError::Host {
                action: "look at",
                path: SEV.into(),
                source,
            })?;
            let number = number.rdev();
            jail.device(SEV, rustix::fs::major(number), rustix::fs::minor(number));
        }
    }
    Ok(jail)
}

/// Words of every guest's command line that keep it small: free memory goes back to the host in pieces of 64 KiB,
/// and the tables of names and inodes have as many places as a pod needs and not one for each 4 KiB of memory.
/// The same for each size, as the command line is measured.
pub(super) const SMALL: &str =
    "page_reporting.page_reporting_order=4 dhash_entries=32768 ihash_entries=16384";

/// This moment.
pub(super) fn mark(what: &'static str) -> Mark {
    let at_ns = crate::clock::boot_ns();
    Mark { what, at_ns }
}

/// A connection to a VMM: the shim's end and the VMM's.
pub(super) fn pair(dir: &Path) -> Result<(UnixStream, OwnedFd), VmError> {
    let make = || -> io::Result<_> {
        let (ours, theirs) = StdStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((UnixStream::from_std(ours)?, theirs.into()))
    };
    make().map_err(|source| VmError::Host {
        action: "make sockets for",
        path: dir.into(),
        source,
    })
}

/// Starts the vsock engine; returns the VMM's end of the connection to it. The socket between them has
/// a name only until it is connected.
pub(super) fn start_vsock(dir: &Path) -> Result<(VhostUserVsock, OwnedFd), VmError> {
    let path: PathBuf = dir.join(VHOST_FILE);
    let (listener, stream) = child::connected(&path).map_err(|source| VmError::Host {
        action: "connect socket",
        path: path.clone(),
        source,
    })?;
    let config = vsock::Config {
        uds: dir.join(VSOCK_FILE),
        guest_cid: sealpod_protocol::GUEST_CID,
        limits: vsock::Limits::default(),
    };
    Ok((VhostUserVsock::start(listener, &config)?, stream.into()))
}

/// Waits for the VMM's end and says what it was.
struct Supervisor {
    child: Watch,
    console: Console,
    reading: tokio::task::JoinHandle<()>,
    stopping: Arc<AtomicBool>,
}

impl Supervisor {
    async fn run(mut self) -> VmExit {
        let exit = self.child.wait().await;
        if tokio::time::timeout(DRAIN, &mut self.reading)
            .await
            .is_err()
        {
            self.reading.abort();
        }
        let console = self.console.lines();
        let output = self.child.output();
        let signalled = output.iter().any(|line| line.contains(BY_SIGNAL));
        // An end that nobody who stops it brings about came first, also where it was to be stopped: because its
        // agent was gone, say.
        let by_stop = matches!(exit, Exit::Code(0) | Exit::Signal(libc::SIGKILL)) || signalled;
        let reason = if by_stop && self.stopping.load(Ordering::SeqCst) {
            ExitReason::Stopped
        } else if exit != Exit::Code(0) || signalled {
            ExitReason::Vmm(exit)
        } else {
            panic_message(&console).map_or(ExitReason::Guest, ExitReason::Panic)
        };
        VmExit {
            reason,
            console,
            output,
        }
    }
}

/// Has the end of a VMM told: returns where [`super::Vm::stop`] says that it was asked for, and where
/// the end will be.
pub(super) fn supervise(
    child: Watch,
    console: Console,
    reading: tokio::task::JoinHandle<()>,
) -> (Arc<AtomicBool>, watch::Receiver<Option<VmExit>>) {
    let stopping = Arc::new(AtomicBool::new(false));
    let (tell, exit) = watch::channel(None);
    let supervisor = Supervisor {
        child,
        console,
        reading,
        stopping: Arc::clone(&stopping),
    };
    tokio::spawn(async move { tell.send_replace(Some(supervisor.run().await)) });
    (stopping, exit)
}

/// Waits for the end.
pub(super) async fn ended(mut exit: watch::Receiver<Option<VmExit>>) -> VmExit {
    let told = exit.wait_for(Option::is_some).await;
    // The supervisor always tells; were its runtime to end first, nobody would be left to ask.
    told.ok().and_then(|e| e.clone()).unwrap_or(VmExit {
        reason: ExitReason::Stopped,
        console: Vec::new(),
        output: Vec::new(),
    })
}
