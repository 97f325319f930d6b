//! System calls that no crate wraps, each with safe arguments and nothing added. What they are used
//! for is decided elsewhere.
#![expect(
    unsafe_code,
    reason = "raw system calls; every block states what makes it sound"
)]

mod filter;
mod mount;
mod terminal;

pub use filter::*;
pub use mount::*;
pub use terminal::*;

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

/// Sends a signal to the process that a pidfd stands for.
///
/// # Errors
/// `ESRCH` when it has ended.
pub fn kill_by(pidfd: &OwnedFd, signal: libc::c_int) -> Result<()> {
    let (fd, none) = (pidfd.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
    // SAFETY: a descriptor, a number, and no siginfo.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, none, 0) }).map(drop)
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

/// Has the kernel's random generator take its key from the pool now (RNDRESEEDCRNG, random(4)). One that
/// has had too little entropy for a first key yet is let be.
pub fn reseed(random: BorrowedFd<'_>) -> Result<()> {
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    // SAFETY: takes no argument.
    match Errno::result(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) }) {
        Err(Errno::ENODATA) => Ok(()),
        done => done.map(drop),
    }
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
