//! What a template is of: everything that would make going on from it wrong if it had changed. Its digest
//! is the template's name.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sealpod_attestation::{crypto::sha384, encoding::hex};
use sealpod_protocol::PROTOCOL_VERSION;
use serde::{Deserialize, Serialize};

use super::super::{VmConfig, cache};

/// Digits of a name: 128 bits.
const NAME_DIGITS: usize = 32;
/// Of `/proc/cpuinfo`, bytes: its first processor, and that is what counts.
const CPUINFO: u64 = 8192;
/// Lines of it that say what a guest sees of a processor.
const CPU_LINES: [&str; 6] = [
    "vendor_id",
    "cpu family",
    "model",
    "stepping",
    "microcode",
    "flags",
];

/// See the file's head.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct About {
    /// Of sealpod, and of what its agent speaks.
    version: String,
    host: Host,
    /// Kernel, initramfs, VMM.
    files: [FileId; 3],
    /// The kernel's command line.
    cmdline: String,
    vcpus: u32,
    memory_mib: u64,
    /// Slots for devices that come later.
    spare_slots: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Host {
    /// Clocks are set by it, and microcode may be.
    boot: String,
    kernel: String,
    cpu: String,
}

/// A file as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileId {
    path: PathBuf,
    device: u64,
    inode: u64,
    bytes: u64,
    /// Seconds and nanoseconds; the second pair cannot be set back.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileId {
    fn of(path: &Path) -> io::Result<Self> {
        let found = path.metadata()?;
        Ok(Self {
            path: path.into(),
            device: found.dev(),
            inode: found.ino(),
            bytes: found.size(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }
}

impl Host {
    fn this() -> io::Result<Self> {
        let mut text = String::new();
        let cpuinfo = File::open("/proc/cpuinfo")?;
        cpuinfo.take(CPUINFO).read_to_string(&mut text)?;
        let first = text.split("\n\n").next().unwrap_or_default();
        let told = first.lines().filter(|line| {
            let key = line.split(':').next().unwrap_or_default().trim();
            CPU_LINES.contains(&key)
        });
        Ok(Self {
            boot: cache::boot_id(),
            kernel: cache::kernel_release(),
            cpu: hex(&sha384(told.collect::<Vec<_>>().join("\n").as_bytes())),
        })
    }
}

fn version() -> String {
    format!("{} {PROTOCOL_VERSION}", env!("CARGO_PKG_VERSION"))
}

impl About {
    /// Of the template for VMs like this one.
    pub(super) fn of(config: &VmConfig, cmdline: String, spare_slots: u32) -> io::Result<Self> {
        let files = [&config.kernel, &config.initramfs, &config.program];
        let [kernel, initramfs, program] = files.map(|path| FileId::of(path));
        Ok(Self {
            version: version(),
            host: Host::this()?,
            files: [kernel?, initramfs?, program?],
            cmdline,
            vcpus: config.vcpus,
            memory_mib: config.memory_mib,
            spare_slots,
        })
    }

    pub(super) fn spare_slots(&self) -> u32 {
        self.spare_slots
    }

    pub(super) fn name(&self) -> io::Result<String> {
        let mut name = hex(&sha384(&serde_json::to_vec(self)?));
        name.truncate(NAME_DIGITS);
        Ok(name)
    }

    /// Whether what it is of is still there and the same.
    pub(super) fn is_current(&self) -> bool {
        let same = |file: &FileId| FileId::of(&file.path).is_ok_and(|now| now == *file);
        self.version == version()
            && Host::this().is_ok_and(|host| host == self.host)
            && self.files.iter().all(same)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::vm::Accelerator;

    impl About {
        pub(in crate::vm::template) fn set_slots(&mut self, slots: u32) {
            self.spare_slots = slots;
        }
    }

    /// A VM to be, of files in `dir`.
    pub(in crate::vm::template) fn config(dir: &Path) -> VmConfig {
        let file = |name: &str| {
            let path = dir.join(name);
            std::fs::write(&path, name).unwrap();
            path
        };
        VmConfig {
            dir: dir.into(),
            program: file("vmm"),
            kernel: file("kernel"),
            initramfs: file("initramfs"),
            kernel_params: Vec::new(),
            vcpus: 1,
            memory_mib: 64,
            share: None,
            nics: Vec::new(),
            passed: Vec::new(),
            confidential: None,
            cgroup: crate::host_cgroup::Entrance::default(),
            hotplug_ports: 0,
            accelerator: Accelerator::Kvm,
            user: 1,
        }
    }

    #[test]
    fn another_size_command_line_or_file_is_another_template() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let of = |config: &VmConfig, cmdline: &str, slots| {
            About::of(config, cmdline.into(), slots).unwrap()
        };
        let one = of(&config, "quiet", 3);
        let mut names = vec![one.name().unwrap()];
        assert_eq!(of(&config, "quiet", 3).name().unwrap(), names[0]);
        names.push(of(&config, "debug", 3).name().unwrap());
        names.push(of(&config, "quiet", 4).name().unwrap());
        let mut larger = self::config(dir.path());
        // Written anew just now: as an upgrade does.
        let upgraded = of(&larger, "quiet", 3);
        names.push(upgraded.name().unwrap());
        larger.memory_mib = 128;
        names.push(of(&larger, "quiet", 3).name().unwrap());
        larger.vcpus = 2;
        names.push(of(&larger, "quiet", 3).name().unwrap());
        let different: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(different.len(), names.len(), "{names:?}");
        assert!(!one.is_current() && upgraded.is_current());
        std::fs::remove_file(dir.path().join("vmm")).unwrap();
        assert!(!upgraded.is_current());
    }

    #[test]
    fn a_template_of_another_boot_is_not_current() {
        let dir = tempfile::tempdir().unwrap();
        let mut about = About::of(&config(dir.path()), String::new(), 0).unwrap();
        assert!(about.is_current());
        about.host.boot.push('x');
        assert!(!about.is_current());
    }
}
