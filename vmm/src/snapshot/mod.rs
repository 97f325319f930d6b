//! A machine on disk: a folder with its state and its memory, from which any number of machines go on.
//! Knows files, formats and what a state is made of; stopping and starting machines is `machine`'s.
//!
//! ```text
//!  <folder>/memory   the guest's memory, region after region, sparse
//!  <folder>/state    "sealpod-snapshot <version> <SHA-256 of the rest>\n", then JSON; written last
//! ```
//! `docs/vmm-snapshot.md` has what is in it, and what it cannot do.

mod memory;
mod vcpu;
mod vm;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use vm_memory::GuestMemoryMmap;

use crate::mmio::TransportState;
use crate::virtio::State as DeviceState;

pub use memory::RegionState;
pub(crate) use memory::{fill, map, regions};
pub(crate) use vcpu::{VcpuState, registers};
pub(crate) use vm::{SerialState, VmState};

/// Of the format; a state of another version is refused.
const VERSION: u32 = 1;
/// First word of a state.
const MAGIC: &str = "sealpod-snapshot";
/// Longest state, bytes: 254 processors of 40 KiB and their devices.
const STATE_MAX: u64 = 16 << 20;
const STATE: &str = "state";
const MEMORY: &str = "memory";

/// Everything of a machine but the content of its memory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// Where its memory lies.
    pub regions: Vec<RegionState>,
    /// Interrupt controllers and clock.
    pub(crate) vm: VmState,
    /// Each processor, by number.
    pub(crate) vcpus: Vec<VcpuState>,
    /// The console's UART.
    pub(crate) serial: SerialState,
    /// Each slot, in order.
    pub slots: Vec<SlotState>,
}

/// A slot for a device.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotState {
    /// Queues that the slot has room for.
    pub queues: usize,
    /// What is in it; nothing in a spare one.
    pub device: Option<SlotDevice>,
}

/// A device in its slot.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotDevice {
    /// Its type (VIRTIO 1.2, section 5).
    pub kind: u32,
    /// Where its driver stands.
    pub transport: TransportState,
    /// What it remembers.
    pub device: DeviceState,
}

/// Why a machine could not be written down or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the snapshot.
    #[error("Cannot {what} {path}")]
    File {
        /// What was wanted, after "cannot".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The state is not what it says it is.
    #[error("Snapshot {path} is refused: {why}")]
    Refused {
        /// The file.
        path: PathBuf,
        /// Reason.
        why: String,
    },
    /// KVM did not give or take a part of the state.
    #[error("KVM refused {call}")]
    Kvm {
        /// The ioctl.
        call: &'static str,
        /// What it said.
        source: kvm_ioctls::Error,
    },
    /// A register that this host's KVM does not take.
    #[error("KVM refused register {0:#x} of the snapshot: it comes from another kind of host")]
    Register(u32),
    /// More of something than KVM takes.
    #[error("State of the snapshot has too many {0}")]
    TooMany(&'static str),
    /// The guest's memory could not be mapped.
    #[error("Memory of the snapshot: {0}")]
    Memory(String),
}

impl Error {
    fn kvm(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { call, source }
    }

    fn file(what: &'static str, path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| Self::File {
            what,
            path: path.to_owned(),
            source,
        }
    }
}

/// Writes a machine, which must be paused, into an empty folder. Until the last step the folder is no
/// snapshot.
///
/// # Errors
/// [`Error::File`]; a file of that name exists, or the disk is full.
pub(crate) fn write(
    folder: &Path,
    state: &MachineState,
    memory: &GuestMemoryMmap,
) -> Result<(), Error> {
    let path = folder.join(MEMORY);
    let file = create(&path)?;
    memory::write(memory, &file).map_err(Error::file("write", &path))?;
    file.sync_all().map_err(Error::file("write", &path))?;

    let path = folder.join(STATE);
    let json = serde_json::to_vec(state).map_err(io::Error::other);
    let json = json.map_err(Error::file("write", &path))?;
    let mut file = create(&path)?;
    let head = format!("{MAGIC} {VERSION} {}\n", checksum(&json));
    (file.write_all(head.as_bytes()))
        .and_then(|()| file.write_all(&json))
        .and_then(|()| file.sync_all())
        .map_err(Error::file("write", &path))
}

/// Reads the state of a machine and opens its memory.
///
/// # Errors
/// [`Error::File`]; [`Error::Refused`]: not a snapshot, of another version, damaged, or its memory
/// does not have the size it should.
pub(crate) fn read(folder: &Path) -> Result<(MachineState, File), Error> {
    let path = folder.join(STATE);
    let file = File::open(&path).map_err(Error::file("open", &path))?;
    let mut raw = Vec::new();
    (file.take(STATE_MAX).read_to_end(&mut raw)).map_err(Error::file("read", &path))?;
    let state = parse(&raw).map_err(|why| Error::Refused {
        path: path.clone(),
        why,
    })?;
    let path = folder.join(MEMORY);
    let memory = File::open(&path).map_err(Error::file("open", &path))?;
    let found = memory.metadata().map_err(Error::file("measure", &path))?;
    let expected: u64 = state.regions.iter().map(|region| region.size).sum();
    if found.len() != expected {
        let why = format!("it has {} bytes, not {expected}", found.len());
        return Err(Error::Refused { path, why });
    }
    Ok((state, memory))
}

fn parse(raw: &[u8]) -> Result<MachineState, String> {
    let end = raw.iter().position(|byte| *byte == b'\n');
    let end = end.ok_or("it has no first line")?;
    let head = std::str::from_utf8(&raw[..end]).map_err(|_| "its first line is not text")?;
    let words: Vec<&str> = head.split(' ').collect();
    let [MAGIC, version, sum] = words[..] else {
        return Err("it does not begin as a snapshot does".into());
    };
    if version != VERSION.to_string() {
        return Err(format!("it has version {version}, not {VERSION}"));
    }
    let json = &raw[end + 1..];
    if checksum(json) != sum {
        return Err("its checksum is wrong".into());
    }
    let state: MachineState = serde_json::from_slice(json).map_err(|e| e.to_string())?;
    memory::check(&state.regions)?;
    if state.vcpus.is_empty() {
        return Err("it has no processor".into());
    }
    Ok(state)
}

fn checksum(bytes: &[u8]) -> String {
    let sum = Sha256::digest(bytes);
    sum.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn create(path: &Path) -> Result<File, Error> {
    (OpenOptions::new().write(true).create_new(true).mode(0o600))
        .open(path)
        .map_err(Error::file("make", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(raw: &[u8]) -> String {
        parse(raw).unwrap_err()
    }

    fn with_head(version: u32, json: &str) -> Vec<u8> {
        let sum = checksum(json.as_bytes());
        format!("{MAGIC} {version} {sum}\n{json}").into_bytes()
    }

    #[test]
    fn what_is_no_snapshot_of_this_version_or_is_damaged_is_refused_with_the_reason() {
        assert!(refused(b"").contains("first line"));
        assert!(refused(b"\xff\n").contains("not text"));
        assert!(refused(b"ELF 1 00\n{}").contains("does not begin"));
        assert!(refused(&with_head(2, "{}")).contains("version 2, not 1"));
        let mut damaged = with_head(VERSION, "{\"regions\":[]}");
        *damaged.last_mut().unwrap() = b' ';
        assert!(refused(&damaged).contains("checksum"));
        assert!(refused(&with_head(VERSION, "{}")).contains("missing field"));
        assert!(refused(&with_head(VERSION, "{\"more\":1}")).contains("unknown field"));
    }

    #[test]
    fn a_folder_without_a_state_is_no_snapshot() {
        let folder = tempfile::tempdir().unwrap();
        File::create(folder.path().join(MEMORY)).unwrap();
        assert!(matches!(
            read(folder.path()),
            Err(Error::File { what: "open", .. })
        ));
    }
}
