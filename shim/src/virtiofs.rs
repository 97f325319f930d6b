//! The pod's share: the folder `<pod dir>/share`, served to the guest by a jailed virtiofsd that can
//! see nothing else. The shim mounts roots and volumes below it, before and while the guest runs, in
//! its own mount namespace; each mount arrives in the daemon's by propagation.
//!
//! ```text
//!  shim's mount namespace                  virtiofsd's
//!  <pod dir>/share      (shared)  ──────▶  /share        (slave; all else unmounted)
//!     └─ c1/rootfs      mounted   ──────▶     └─ c1/rootfs
//! ```
//! The daemon stays root, because it creates files for every user of the guest, with the few
//! capabilities which that takes; seccomp kills it for any other system call.

use std::fs::DirBuilder;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::mount::{MountPropagationFlags, mount_bind, mount_change};
use rustix::process::{Resource, getrlimit};

use crate::child::{self, Child, ChildError, Command, Exit, Jail, Watch};
use crate::host_cgroup::Entrance;
use crate::ledger::Ledger;

/// The share, in the pod's folder.
pub const SHARE_DIR: &str = "share";
/// Mount point, in the pod's folder, of the daemon's root.
const JAIL_DIR: &str = "virtiofsd";
/// Socket, in the pod's folder, that exists for the moment in which its ends are connected.
const SOCKET_FILE: &str = "virtiofs.sock";
/// Where the daemon sees the share.
const SERVED: &str = "/share";
/// Threads that serve requests, so that one slow write does not hold all others up.
const THREADS: u32 = 2;
/// Most files the daemon may have open, if the shim's own limit allows as many: it has one open for
/// each file the guest remembers.
const OPEN_FILES: u64 = 1_000_000;
/// capabilities(7): to create and change files as any user, and to reduce itself to that
/// (`SETPCAP`, `SYS_CHROOT`, which it gives up before it serves).
const CAPABILITIES: [u32; 10] = [
    0,  // CHOWN
    1,  // DAC_OVERRIDE
    3,  // FOWNER
    4,  // FSETID
    6,  // SETGID
    7,  // SETUID
    8,  // SETPCAP
    18, // SYS_CHROOT
    27, // MKNOD
    31, // SETFCAP
];

/// Why the share is not served.
#[derive(Debug, thiserror::Error)]
pub enum VirtiofsError {
    /// A folder, mount or socket of the share could not be made.
    #[error("Cannot {action} {path}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The daemon did not start.
    #[error("virtiofsd did not start")]
    Spawn(#[from] ChildError),
}

/// Makes the share of the pod folder `dir`: a mount of its own, whose submounts propagate. To be
/// called in the shim's own mount namespace, before anything is mounted below it. Returns the folder.
///
/// # Errors
/// [`VirtiofsError::Host`].
pub fn make_share(dir: &Path) -> Result<PathBuf, VirtiofsError> {
    // Passable in the guest for a container whose root is another user there. On the host nobody else
    // comes this far: the pod's folder is closed.
    let share = make_dir(&dir.join(SHARE_DIR), 0o711)?;
    let mount = |r: rustix::io::Result<()>| {
        r.map_err(|e| VirtiofsError::Host {
            action: "mount share",
            path: share.clone(),
            source: e.into(),
        })
    };
    mount(mount_bind(&share, &share))?;
    mount(mount_change(&share, MountPropagationFlags::SHARED))?;
    Ok(share)
}

fn make_dir(path: &Path, mode: u32) -> Result<PathBuf, VirtiofsError> {
    let mut builder = DirBuilder::new();
    let made = builder.recursive(true).mode(mode).create(path);
    made.map_err(|source| VirtiofsError::Host {
        action: "make folder",
        path: path.into(),
        source,
    })?;
    Ok(path.into())
}

/// A daemon that serves a pod's share. Dropping it kills it.
#[derive(Debug)]
pub struct Virtiofs {
    child: Child,
}

impl Virtiofs {
    /// Starts `program` (absolute) for the share that [`make_share`] made in `dir`, in
    /// `cgroup`. Returns it with the connection that the VMM is to have.
    ///
    /// # Errors
    /// [`VirtiofsError`]; then there is no daemon.
    pub async fn start(
        program: &Path,
        dir: &Path,
        cgroup: Entrance,
        ledger: &Ledger,
    ) -> Result<(Self, OwnedFd), VirtiofsError> {
        let socket = dir.join(SOCKET_FILE);
        let (listener, client) =
            child::connected(&socket).map_err(|source| VirtiofsError::Host {
                action: "connect socket",
                path: socket.clone(),
                source,
            })?;
        let program = program
            .canonicalize()
            .map_err(|source| VirtiofsError::Host {
                action: "find program",
                path: program.into(),
                source,
            })?;
        let mut jail = Jail::new(&make_dir(&dir.join(JAIL_DIR), 0o700)?);
        jail.visible(&program)
            .folder(&dir.join(SHARE_DIR), SERVED)
            .proc();
        let mut command = Command::new("virtiofsd", &program);
        let listener = command.fd(listener.into());
        command.args(args(listener)).env(child::SMALL_STACKS);
        command.jail(jail).cgroup(cgroup);
        command.capabilities(&CAPABILITIES);
        command.rlimit(libc::RLIMIT_CORE, 0);
        let allowed = getrlimit(Resource::Nofile).maximum.unwrap_or(OPEN_FILES);
        command.rlimit(libc::RLIMIT_NOFILE, OPEN_FILES.min(allowed));
        let child = child::spawn(command, ledger).await?;
        Ok((Self { child }, client.into()))
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// To see how it ends, and what it wrote.
    #[must_use]
    pub fn watch(&self) -> Watch {
        self.child.watch()
    }

    /// Kills it and waits until it is gone. Idempotent.
    pub async fn stop(&self) -> Exit {
        self.child.kill();
        self.child.wait().await
    }
}

fn args(listener: i32) -> Vec<String> {
    vec![
        format!("--fd={listener}"),
        format!("--shared-dir={SERVED}"),
        // It is in namespaces of its own already; this hides the jail's own files from it, too.
        "--sandbox=chroot".into(),
        "--seccomp=kill".into(),
        // Metadata and names may change on the host; files are seen anew after one second at most,
        // and at once when opened.
        "--cache=auto".into(),
        // Each mount is a file system of its own in the guest: inode numbers do not collide.
        "--announce-submounts".into(),
        "--xattr".into(),
        // As on the file system below. Costs one request for each file of another owner.
        "--posix-acl=auto".into(),
        // Handles would need CAP_DAC_READ_SEARCH, which reaches every file of the host.
        "--inode-file-handles=never".into(),
        format!("--thread-pool-size={THREADS}"),
        // The limit is set already.
        "--rlimit-nofile=0".into(),
        "--log-level=warn".into(),
    ]
}
