//! A machine on disk: a file with its state and one with its memory, from which any number of machines
//! go on. Knows files, formats and what a state is made of; stopping and starting machines is `machine`'s.
//! The files are open when they come here: a confined process has no path to any.
//!
//! ```text
//!  memory   the guest's memory, region after region, sparse
//!  state    "sealpod-snapshot <version> <SHA-256 of the rest>\n", then JSON; written last
//! ```
//! `docs/vmm-snapshot.md` has what is in it, and what it cannot do.

mod memory;
mod vcpu;
mod vm;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use vm_memory::GuestMemoryMmap;

use crate::mmio::TransportState;
use crate::virtio::State as DeviceState;

pub use memory::RegionState;
pub(crate) use memory::{copy, map, regions};
pub(crate) use vcpu::{VcpuState, registers};
pub(crate) use vm::{SerialState, VmState};

/// Of the format; a state of another version is refused.
const VERSION: u32 = 1;
/// First word of a state.
const MAGIC: &str = "sealpod-snapshot";
/// Longest state, bytes: 254 processors of 40 KiB and their devices.
const STATE_MAX: u64 = 16 << 20;
/// Names of the files, in a folder of their own.
const STATE: &str = "state";
const MEMORY: &str = "memory";

/// The files of a snapshot, open.
#[derive(Debug)]
pub struct Files {
    /// See the file's head.
    pub state: File,
    /// See the file's head.
    pub memory: File,
}

impl Files {
    /// Makes them in a folder, for their owner alone.
    ///
    /// # Errors
    /// [`Error::File`]; a file of that name exists.
    pub fn create(folder: &Path) -> Result<Self, Error> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        Self::with(folder, "make", &options)
    }

    /// Opens those of a folder.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn open(folder: &Path) -> Result<Self, Error> {
        Self::with(folder, "open", OpenOptions::new().read(true))
    }

    fn with(folder: &Path, what: &'static str, options: &OpenOptions) -> Result<Self, Error> {
        let one = |name| {
            let path = folder.join(name);
            let failed = Error::file(what, path.display().to_string());
            options.open(&path).map_err(failed)
        };
        Ok(Self {
            memory: one(MEMORY)?,
            state: one(STATE)?,
        })
    }
}

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
    #[error("Cannot {what} {file}")]
    File {
        /// What was wanted, after "cannot".
        what: &'static str,
        /// The file: its path, or what it is.
        file: String,
        /// Cause.
        source: io::Error,
    },
    /// It is not what it says it is.
    #[error("Snapshot's {file} is refused: {why}")]
    Refused {
        /// Which of its files.
        file: &'static str,
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

    fn file(what: &'static str, file: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let file = file.into();
        move |source| Self::File { what, file, source }
    }
}

/// Writes a machine, which must be paused, into empty files. Until the last step they are no snapshot.
///
/// # Errors
/// [`Error::Refused`]: a file is not empty; [`Error::File`]: the disk is full.
pub(crate) fn write(
    into: &Files,
    state: &MachineState,
    memory: &GuestMemoryMmap,
) -> Result<(), Error> {
    for (file, name) in [(&into.memory, MEMORY), (&into.state, STATE)] {
        let found = file.metadata().map_err(Error::file("measure", name))?;
        if found.len() != 0 {
            let why = "it is not empty".into();
            return Err(Error::Refused { file: name, why });
        }
    }
    let what = "write the snapshot's";
    memory::write(memory, &into.memory).map_err(Error::file(what, MEMORY))?;
    (into.memory.sync_all()).map_err(Error::file(what, MEMORY))?;

    let json = serde_json::to_vec(state).map_err(io::Error::other);
    let json = json.map_err(Error::file(what, STATE))?;
    let head = format!("{MAGIC} {VERSION} {}\n", checksum(&json));
    let mut file = &into.state;
    (file.write_all(head.as_bytes()))
        .and_then(|()| file.write_all(&json))
        .and_then(|()| file.sync_all())
        .map_err(Error::file(what, STATE))
}

/// Reads the state of a machine.
///
/// # Errors
/// [`Error::File`]; [`Error::Refused`]: not a snapshot, of another version, damaged, or its memory
/// does not have the size it should.
pub(crate) fn read(from: &Files) -> Result<MachineState, Error> {
    let mut raw = Vec::new();
    let mut file = &from.state;
    (file.rewind())
        .and_then(|()| file.take(STATE_MAX).read_to_end(&mut raw))
        .map_err(Error::file("read the snapshot's", STATE))?;
    let state = parse(&raw).map_err(|why| Error::Refused { file: STATE, why })?;
    let found = from.memory.metadata();
    let found = found.map_err(Error::file("measure the snapshot's", MEMORY))?;
    let expected: u64 = state.regions.iter().map(|region| region.size).sum();
    if found.len() != expected {
        let why = format!("it has {} bytes, not {expected}", found.len());
        return Err(Error::Refused { file: MEMORY, why });
    }
    Ok(state)
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
    fn a_folder_without_a_state_and_a_state_that_was_never_written_are_no_snapshots() {
        let folder = tempfile::tempdir().unwrap();
        File::create(folder.path().join(MEMORY)).unwrap();
        assert!(matches!(
            Files::open(folder.path()),
            Err(Error::File { what: "open", .. })
        ));
        assert!(Files::create(folder.path()).is_err());
        std::fs::remove_file(folder.path().join(MEMORY)).unwrap();
        let files = Files::create(folder.path()).unwrap();
        let read = read(&files).map(drop).unwrap_err().to_string();
        assert!(read.contains("first line"), "{read}");
    }
}
