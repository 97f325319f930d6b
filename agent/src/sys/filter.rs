//! Programs that the kernel runs on a container's behalf: seccomp filters and device filters.
#![expect(
    unsafe_code,
    reason = "raw system calls; every block states what makes it sound"
)]

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::{Result, check, owned};

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
