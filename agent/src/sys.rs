//! System calls that no crate wraps, each with safe arguments and nothing added. What they are used
//! for is decided elsewhere.
#![expect(
    unsafe_code,
    reason = "raw system calls; every block states what makes it sound"
)]

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What a system call returns.
pub type Result<T> = nix::Result<T>;

fn check(ret: libc::c_long) -> Result<libc::c_long> {
    Errno::result(ret)
}

fn owned(ret: libc::c_long) -> Result<OwnedFd> {
    let fd = RawFd::try_from(check(ret)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the call has just returned this descriptor, nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Which side of a fork this is.
pub enum Fork {
    /// In the parent: the child's pid and a pidfd of it.
    Parent {
        /// Pid in the caller's PID namespace.
        pid: i32,
        /// Stable handle of the process.
        pidfd: OwnedFd,
    },
    /// In the child.
    Child,
}

/// Forks with clone3(2): `flags` are namespaces (`CLONE_NEW*`), `cgroup` is a cgroup v2 folder that
/// the child is born in (no migration, so no wait for an RCU grace period).
///
/// # Errors
/// `EDEADLK` when the caller has a second thread: the child could inherit a lock that is held.
pub fn fork(flags: libc::c_int, cgroup: Option<BorrowedFd<'_>>) -> Result<Fork> {
    let threads = nix::sys::stat::stat("/proc/self/task")?.st_nlink;
    if threads != 3 {
        return Err(Errno::EDEADLK); // ".", ".." and one thread
    }
    /// linux/sched.h; libc's constant is too narrow for it.
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

    let mut pidfd: RawFd = -1;
    // SAFETY: all zeroes is what clone3 takes for "not used".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags as u64 | libc::CLONE_PIDFD as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    args.pidfd = (&raw mut pidfd) as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM the child has its own copy of all memory and goes on from here on a
    // copy of this stack; it is the only thread, and so was its parent, so no lock is held by a
    // thread that it lacks.
    let ret = check(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut args,
            size_of::<libc::clone_args>(),
        )
    })?;
    if ret == 0 {
        return Ok(Fork::Child);
    }
    let pid = i32::try_from(ret).map_err(|_| Errno::EOVERFLOW)?;
    let pidfd = owned(libc::c_long::from(pidfd))?;
    Ok(Fork::Parent { pid, pidfd })
}

/// Ends the process without running anything of the parent's that was copied by the fork.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Collects one child that has ended: its pid and wait status. (nix's wrapper loses a child that a
/// real-time signal ended.)
pub fn reap() -> Option<(i32, i32)> {
    let mut status = 0;
    loop {
        // SAFETY: the status is written to a local integer.
        match Errno::result(unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) }) {
            Err(Errno::EINTR) => {}
            Ok(0) | Err(_) => return None,
            Ok(pid) => return Some((pid, status)),
        }
    }
}

/// kill(2) with any signal number, real-time signals too.
///
/// # Errors
/// `EINVAL` for a pid that stands for more than one process.
pub fn kill(pid: i32, signal: i32) -> Result<()> {
    if pid <= 1 {
        return Err(Errno::EINVAL);
    }
    // SAFETY: two integers.
    Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// setns(2) with a pidfd or a namespace file.
pub fn setns(fd: BorrowedFd<'_>, flags: libc::c_int) -> Result<()> {
    // SAFETY: two integers; the descriptor is open.
    check(unsafe { libc::syscall(libc::SYS_setns, fd.as_raw_fd(), flags) }).map(drop)
}

/// A pidfd of `pid`.
pub fn pidfd_open(pid: i32) -> Result<OwnedFd> {
    // SAFETY: two integers.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// Closes every descriptor from 3 up that is not in `keep`.
pub fn close_all_but(keep: &mut [RawFd]) -> Result<()> {
    keep.sort_unstable();
    let mut first: libc::c_uint = 3;
    for &fd in keep.iter() {
        let Ok(fd) = libc::c_uint::try_from(fd) else {
            continue;
        };
        if fd > first {
            close_range(first, fd - 1, 0)?;
        }
        first = first.max(fd + 1);
    }
    close_range(first, libc::c_uint::MAX, 0)
}

/// Marks every descriptor from 3 up to be closed by execve.
pub fn cloexec_all() -> Result<()> {
    close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
}

fn close_range(first: libc::c_uint, last: libc::c_uint, flags: libc::c_uint) -> Result<()> {
    // SAFETY: called only in a forked child that has copied no live owner of these descriptors which
    // it would use again.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) }).map(drop)
}

/// Makes `fd` standard descriptor `std` (0, 1 or 2) of this process.
pub fn make_standard(fd: BorrowedFd<'_>, std: RawFd) -> Result<()> {
    // SAFETY: dup2 onto 0, 1 or 2, which no owner in this process closes.
    check(libc::c_long::from(unsafe {
        libc::dup2(fd.as_raw_fd(), std)
    }))
    .map(drop)
}

/// Takes a descriptor by number, in a forked child that knows what its parent left there.
pub fn adopt(fd: RawFd) -> OwnedFd {
    // SAFETY: the caller's side of the fork protocol: the number is open and has no other owner here.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// openat2(2).
pub fn openat2(
    dir: BorrowedFd<'_>,
    path: &CStr,
    flags: libc::c_int,
    resolve: u64,
) -> Result<OwnedFd> {
    // SAFETY: all zeroes is a valid open_how.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = flags as u64;
    how.resolve = resolve;
    // SAFETY: the path ends with NUL, the structure has the size that is given.
    owned(unsafe {
        libc::syscall(
            libc::SYS_openat2,
            dir.as_raw_fd(),
            path.as_ptr(),
            &raw const how,
            size_of::<libc::open_how>(),
        )
    })
}

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct MountAttr {
    /// `MOUNT_ATTR_*` to set.
    pub set: u64,
    /// `MOUNT_ATTR_*` to clear.
    pub clear: u64,
    /// `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE`, `MS_UNBINDABLE`, or 0 to leave it.
    pub propagation: u64,
    /// User namespace of an idmapped mount.
    pub userns: u64,
}

const _: () = assert!(size_of::<MountAttr>() == 32); // MOUNT_ATTR_SIZE_VER0, linux/mount.h

/// A detached copy of the mount at `path` (with what is below it, if `recursive`).
pub fn open_tree(dir: BorrowedFd<'_>, path: &CStr, recursive: bool) -> Result<OwnedFd> {
    const OPEN_TREE_CLONE: libc::c_int = 1;
    let mut flags = OPEN_TREE_CLONE | libc::O_CLOEXEC | libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the path ends with NUL.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, dir.as_raw_fd(), path.as_ptr(), flags) })
}

/// Changes attributes of a mount that is open as `mount`.
pub fn mount_setattr(mount: BorrowedFd<'_>, recursive: bool, attr: &MountAttr) -> Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the empty path and the structure live through the call; the size is the structure's.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attr),
            size_of::<MountAttr>(),
        )
    })
    .map(drop)
}

/// Attaches the detached mount `mount` on what `target` has open.
pub fn move_mount(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<()> {
    const F_EMPTY_PATH: libc::c_uint = 4;
    const T_EMPTY_PATH: libc::c_uint = 0x40;
    // SAFETY: both paths are empty strings, both descriptors are open.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            target.as_raw_fd(),
            c"".as_ptr(),
            F_EMPTY_PATH | T_EMPTY_PATH,
        )
    })
    .map(drop)
}

/// A context in which a file system is configured (fsopen(2)).
pub fn fsopen(fs: &CStr) -> Result<OwnedFd> {
    const FSOPEN_CLOEXEC: libc::c_uint = 1;
    // SAFETY: the name ends with NUL.
    owned(unsafe { libc::syscall(libc::SYS_fsopen, fs.as_ptr(), FSOPEN_CLOEXEC) })
}

/// Sets one option of a file system context: `key=value`, or a flag when there is no value.
pub fn fsconfig_set(context: BorrowedFd<'_>, key: &CStr, value: Option<&CStr>) -> Result<()> {
    const SET_FLAG: libc::c_uint = 0;
    const SET_STRING: libc::c_uint = 1;
    let (cmd, value) = match value {
        Some(value) => (SET_STRING, value.as_ptr()),
        None => (SET_FLAG, std::ptr::null()),
    };
    // SAFETY: key and value end with NUL; a flag takes no value.
    check(unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            cmd,
            key.as_ptr(),
            value,
            0,
        )
    })
    .map(drop)
}

/// Makes the file system of a context and a detached mount of it with attributes `MOUNT_ATTR_*`.
pub fn fsmount(context: BorrowedFd<'_>, attr: u64) -> Result<OwnedFd> {
    const CMD_CREATE: libc::c_uint = 6;
    const FSMOUNT_CLOEXEC: libc::c_uint = 1;
    let null = std::ptr::null::<libc::c_char>();
    // SAFETY: CMD_CREATE takes neither key nor value.
    check(unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            CMD_CREATE,
            null,
            null,
            0,
        )
    })?;
    // SAFETY: integers only.
    owned(unsafe {
        libc::syscall(
            libc::SYS_fsmount,
            context.as_raw_fd(),
            FSMOUNT_CLOEXEC,
            attr as libc::c_uint,
        )
    })
}

/// pivot_root(".", "."): the old root ends on top of the new one, to be unmounted by the caller.
pub fn pivot_root_here() -> Result<()> {
    // SAFETY: two C strings.
    check(unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) }).map(drop)
}

/// Capability sets of capset(2), version 3.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct CapSets {
    /// One bit for each capability number.
    pub effective: u64,
    /// As above.
    pub permitted: u64,
    /// As above.
    pub inheritable: u64,
}

/// Sets this process's capabilities.
pub fn capset(sets: &CapSets) -> Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522; // linux/capability.h
    let half = |shift: u32| Data {
        effective: (sets.effective >> shift) as u32,
        permitted: (sets.permitted >> shift) as u32,
        inheritable: (sets.inheritable >> shift) as u32,
    };
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let data = [half(0), half(32)];
    // SAFETY: version 3 reads one header and two data elements, which is what is given.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) }).map(drop)
}

/// prctl(2) with integer arguments.
pub fn prctl(option: libc::c_int, arg2: u64, arg3: u64) -> Result<i32> {
    // SAFETY: used only with options whose arguments are integers.
    Errno::result(unsafe { libc::prctl(option, arg2, arg3, 0, 0) })
}

/// Sets the NIS domain name of this UTS namespace.
pub fn setdomainname(name: &str) -> Result<()> {
    // SAFETY: the pointer is valid for the length given.
    Errno::result(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }).map(drop)
}

/// Names this process, as `ps` shows it (15 bytes at most).
pub fn set_name(name: &CStr) {
    // SAFETY: the name ends with NUL; the kernel reads at most 16 bytes.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr(), 0, 0, 0) };
}

/// Loads a seccomp program (`struct sock_filter` array, native byte order).
pub fn seccomp_load(program: &[u8], flags: libc::c_ulong) -> Result<()> {
    let count = program.len() / size_of::<libc::sock_filter>();
    let prog = libc::sock_fprog {
        len: u16::try_from(count).map_err(|_| Errno::E2BIG)?,
        filter: program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the kernel copies `len` instructions, which `program` has; it reads them unaligned.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const prog,
        )
    })
    .map(drop)
}

/// bpf(2): loads a cgroup device program and returns it.
pub fn bpf_load_device_program(instructions: &[u64]) -> Result<OwnedFd> {
    #[repr(C)]
    #[derive(Default)]
    struct Load {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        prog_flags: u32,
    }
    const PROG_LOAD: libc::c_int = 5;
    const TYPE_CGROUP_DEVICE: u32 = 15;
    let attr = Load {
        prog_type: TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(instructions.len()).map_err(|_| Errno::E2BIG)?,
        insns: instructions.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..Load::default()
    };
    // SAFETY: the pointers are valid for the call and the counts are theirs.
    owned(unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const attr, size_of::<Load>()) })
}

/// bpf(2): attaches a device program to a cgroup folder, in place of `replace` when there is one.
pub fn bpf_attach_device(
    cgroup: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    replace: Option<BorrowedFd<'_>>,
) -> Result<()> {
    #[repr(C)]
    struct Attach {
        target: u32,
        program: u32,
        kind: u32,
        flags: u32,
        replace: u32,
    }
    const PROG_ATTACH: libc::c_int = 8;
    const CGROUP_DEVICE: u32 = 6;
    const F_ALLOW_MULTI: u32 = 2;
    const F_REPLACE: u32 = 4;
    let attr = Attach {
        target: cgroup.as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        kind: CGROUP_DEVICE,
        flags: F_ALLOW_MULTI | if replace.is_some() { F_REPLACE } else { 0 },
        replace: replace.map_or(0, |fd| fd.as_raw_fd() as u32),
    };
    // SAFETY: the structure lives through the call; all fields are integers.
    check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            PROG_ATTACH,
            &raw const attr,
            size_of::<Attach>(),
        )
    })
    .map(drop)
}

/// Adds `bytes` to the kernel's entropy pool and credits them (RNDADDENTROPY, random(4)).
pub fn add_entropy(random: BorrowedFd<'_>, bytes: &[u8]) -> Result<()> {
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    let len = i32::try_from(bytes.len()).map_err(|_| Errno::E2BIG)?;
    let mut info = Vec::with_capacity(8 + bytes.len());
    info.extend_from_slice(&(len * 8).to_ne_bytes());
    info.extend_from_slice(&len.to_ne_bytes());
    info.extend_from_slice(bytes);
    // SAFETY: the buffer is a rand_pool_info with as many bytes as it says.
    Errno::result(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, info.as_ptr()) })
        .map(drop)
}

/// Size of a terminal.
pub fn set_window_size(tty: BorrowedFd<'_>, columns: u16, rows: u16) -> Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the structure is the one that TIOCSWINSZ reads.
    Errno::result(unsafe { libc::ioctl(tty.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })
        .map(drop)
}

/// Makes `tty` the controlling terminal of this session.
pub fn take_terminal(tty: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: TIOCSCTTY takes an integer.
    Errno::result(unsafe { libc::ioctl(tty.as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)
}

/// Lets the slave of a pty master be opened.
pub fn unlock_pty(master: BorrowedFd<'_>) -> Result<()> {
    let zero: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads an int.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const zero) })
        .map(drop)
}

/// Opens the slave of a pty master, whatever is found at its path (ioctl_tty(2), TIOCGPTPEER).
pub fn open_pty_slave(master: BorrowedFd<'_>) -> Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags and returns a new descriptor.
    let fd = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) };
    owned(libc::c_long::from(fd))
}

/// I/O priority of this process.
pub fn set_ioprio(value: libc::c_int) -> Result<()> {
    const WHO_PROCESS: libc::c_int = 1;
    // SAFETY: three integers.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, value) }).map(drop)
}

/// Scheduling policy of this process (`struct sched_attr`, sched_setattr(2)).
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub struct SchedAttr {
    /// Size of this structure.
    pub size: u32,
    /// `SCHED_*`.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// For `SCHED_OTHER` and `SCHED_BATCH`.
    pub nice: i32,
    /// For `SCHED_FIFO` and `SCHED_RR`.
    pub priority: u32,
    /// Nanoseconds, for `SCHED_DEADLINE`, as the two below.
    pub runtime: u64,
    /// See above.
    pub deadline: u64,
    /// See above.
    pub period: u64,
}

/// Sets this process's scheduling policy.
pub fn sched_setattr(attr: &SchedAttr) -> Result<()> {
    // SAFETY: the structure carries its own size.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, std::ptr::from_ref(attr), 0) })
        .map(drop)
}

/// Lets go of the signal dispositions and mask that the agent's runtime has set: a new program
/// expects the defaults (Rust ignores SIGPIPE).
pub fn reset_signals() {
    for signal in 1..=64 {
        if matches!(signal, libc::SIGKILL | libc::SIGSTOP) {
            continue;
        }
        // SAFETY: SIG_DFL has no handler that could run; an unused number is refused, harmlessly.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: an empty set, written before it is read.
    unsafe {
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Registers a descriptor with the runtime.
///
/// # Errors
/// When it cannot be polled.
pub fn register(fd: OwnedFd, interest: Interest) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is the same open descriptor until it is dropped, which AsyncFd does last.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(Into::into)
}

/// A string for the kernel.
///
/// # Errors
/// `EINVAL` when it holds a NUL.
pub fn c_string(bytes: impl Into<Vec<u8>>) -> Result<CString> {
    CString::new(bytes).map_err(|_| Errno::EINVAL)
}
