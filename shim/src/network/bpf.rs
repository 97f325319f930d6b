//! The few words of bpf(2) that port forwarding needs: a socket map with one listener, a program of
//! type `SK_LOOKUP` that picks it for every TCP connection, and a link that binds the program to a
//! network namespace for as long as its descriptor is open. Numbers are those of linux/bpf.h
//! (kernel 5.9 and later).
#![expect(unsafe_code, reason = "bpf(2) has no safe wrapper")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;

const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;

const HELPER_MAP_LOOKUP_ELEM: i32 = 1;
const HELPER_SK_RELEASE: i32 = 86;
const HELPER_SK_ASSIGN: i32 = 124;

/// Offset of `protocol` in `struct bpf_sk_lookup`.
const CTX_PROTOCOL: i16 = 12;

/// One instruction: `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Insn {
    code: u8,
    /// Destination register in the low four bits, source in the high four.
    regs: u8,
    off: i16,
    imm: i32,
}
const _: () = assert!(size_of::<Insn>() == 8);

const fn insn(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> Insn {
    Insn {
        code,
        regs: src << 4 | dst,
        off,
        imm,
    }
}

// Opcodes: class | size or operation | mode or source, as linux/bpf_common.h composes them.
const LDX_W: u8 = 0x61;
const ST_W: u8 = 0x62;
const LD_IMM64: u8 = 0x18;
const MOV_REG: u8 = 0xbf;
const MOV_IMM: u8 = 0xb7;
const ADD_IMM: u8 = 0x07;
const JNE_IMM: u8 = 0x55;
const JEQ_IMM: u8 = 0x15;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
/// `BPF_PSEUDO_MAP_FD`: the immediate of `LD_IMM64` is a map's descriptor.
const PSEUDO_MAP_FD: u8 = 1;

/// Not TCP, or no listener: as if the program were not there. Else the listener takes the
/// connection, and if that cannot be, nobody does.
fn steer_to_listener(map: BorrowedFd<'_>) -> [Insn; 22] {
    [
        insn(MOV_REG, 6, 1, 0, 0),
        insn(LDX_W, 2, 1, CTX_PROTOCOL, 0),
        insn(JNE_IMM, 2, 0, 17, libc::IPPROTO_TCP), // to "pass"
        insn(ST_W, 10, 0, -4, 0),
        insn(MOV_REG, 2, 10, 0, 0),
        insn(ADD_IMM, 2, 0, 0, -4),
        insn(LD_IMM64, 1, PSEUDO_MAP_FD, 0, map.as_raw_fd()),
        insn(0, 0, 0, 0, 0), // second half of LD_IMM64
        insn(CALL, 0, 0, 0, HELPER_MAP_LOOKUP_ELEM),
        insn(JEQ_IMM, 0, 0, 10, 0), // to "pass"
        insn(MOV_REG, 7, 0, 0, 0),
        insn(MOV_REG, 1, 6, 0, 0),
        insn(MOV_REG, 2, 7, 0, 0),
        insn(MOV_IMM, 3, 0, 0, 0),
        insn(CALL, 0, 0, 0, HELPER_SK_ASSIGN),
        insn(MOV_REG, 8, 0, 0, 0),
        insn(MOV_REG, 1, 7, 0, 0),
        insn(CALL, 0, 0, 0, HELPER_SK_RELEASE),
        insn(MOV_IMM, 0, 0, 0, 0), // SK_DROP
        insn(JNE_IMM, 8, 0, 1, 0), // to EXIT
        insn(MOV_IMM, 0, 0, 0, 1), // "pass": SK_PASS
        insn(EXIT, 0, 0, 0, 0),
    ]
}

#[repr(C)]
#[derive(Default)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[repr(C)]
#[derive(Default)]
struct MapUpdate {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}
const _: () = assert!(size_of::<ProgLoad>() == 72);

#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

/// Sends every TCP connection that ends in `netns` to `listener`, a socket of that namespace, until
/// what is returned is closed.
///
/// # Errors
/// Those of bpf(2): the kernel is older than 5.9 or built without it, or CAP_BPF and CAP_NET_ADMIN
/// are missing.
pub(super) fn steer_tcp(netns: BorrowedFd<'_>, listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut map = MapCreate {
        map_type: BPF_MAP_TYPE_SOCKMAP,
        key_size: 4,
        value_size: 8,
        max_entries: 1,
    };
    // SAFETY: `map` holds no pointers.
    let map = unsafe { bpf_fd(BPF_MAP_CREATE, &mut map) }?;

    let key = 0_u32;
    let value = u64::from(number(listener));
    let mut update = MapUpdate {
        map_fd: number(map.as_fd()),
        key: &raw const key as u64,
        value: &raw const value as u64,
        ..Default::default()
    };
    // SAFETY: key and value point to as many bytes as the map was made for, and outlive the call.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut update) }?;

    let program = steer_to_listener(map.as_fd());
    let license = c"Apache-2.0";
    let mut load = ProgLoad {
        prog_type: BPF_PROG_TYPE_SK_LOOKUP,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        prog_name: *b"sealpod_forward\0",
        expected_attach_type: BPF_SK_LOOKUP,
        ..Default::default()
    };
    // SAFETY: `insns` points to `insn_cnt` instructions, `license` to a C string; both outlive the
    // call. What the instructions may do is for the kernel's verifier to decide.
    let program = unsafe { bpf_fd(BPF_PROG_LOAD, &mut load) }?;

    let mut link = LinkCreate {
        prog_fd: number(program.as_fd()),
        target_fd: number(netns),
        attach_type: BPF_SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: `link` holds no pointers.
    unsafe { bpf_fd(BPF_LINK_CREATE, &mut link) }
}

/// A descriptor as the kernel's structures carry it.
fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// # Safety
/// `T` is what `command` takes, and every pointer in it is valid for it.
unsafe fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is valid for its size; the rest is the caller's promise.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attr),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// # Safety
/// As [`bpf`], and `command` returns a descriptor.
unsafe fn bpf_fd<T>(command: libc::c_long, attr: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let fd = unsafe { bpf(command, attr) }?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just given us this descriptor (close-on-exec, as all of bpf's are), and
    // nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
