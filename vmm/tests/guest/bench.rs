//! Guests made of busybox and a script, with the guest kernel, on real KVM; what they print, line by
//! line, and what they write to their disks.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use sealpod_vmm::machine::{Boot, Config, End, Error, Machine, Restore};
use sealpod_vmm::snapshot::Files;
use sealpod_vmm::virtio::{Balloon, Block, Device, Rng};

/// What every guest does first.
const INIT: &str = "#!/bin/busybox sh\nexport PATH=/bin\n/bin/busybox --install -s /bin\n\
    mkdir -p /proc /dev; mount -t proc p /proc; mount -t devtmpfs d /dev\n";
/// Bytes of a disk.
pub(crate) const DISK: u64 = 64 << 20;
/// Longer than anything takes in the lab.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Where things are, if this is the place for it.
pub(crate) struct Bench {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    dir: tempfile::TempDir,
}

impl Bench {
    /// For guests that run this script.
    pub(crate) fn new(script: &str) -> Option<Self> {
        let kernel = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest/vmlinux");
        let busybox = std::fs::read("/bin/busybox");
        let (Ok(busybox), true) = (busybox, kernel.exists()) else {
            eprintln!("SKIPPED: needs the guest kernel (make guest-kernel) and a static busybox");
            return None;
        };
        if std::env::var_os("SEALPOD_LAB_RESULTS").is_none() {
            eprintln!("SKIPPED: needs the lab (make lab)");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let initramfs = dir.path().join("guest.cpio");
        let init = format!("{INIT}{script}");
        let files = [
            ("bin", 0o040_755, &b""[..]),
            ("bin/busybox", 0o100_755, &busybox),
            ("init", 0o100_755, init.as_bytes()),
        ];
        std::fs::write(&initramfs, cpio(&files)).unwrap();
        Some(Self {
            kernel,
            initramfs,
            dir,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn what_boots(&self, cmdline: &str) -> Boot {
        Boot {
            kernel: File::open(&self.kernel).unwrap(),
            initramfs: Some(File::open(&self.initramfs).unwrap()),
            cmdline: cmdline.into(),
        }
    }

    pub(crate) fn disk(&self, name: &str) -> File {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(self.dir.path().join(name)).unwrap();
        file.set_len(DISK).unwrap();
        file
    }

    pub(crate) fn boot(&self, vcpus: u32) -> Guest {
        Guest::new(self.disk("first"), |console, devices, ended| {
            let config = Config {
                boot: self.what_boots("console=ttyS0 quiet panic=-1"),
                memory_mib: 128,
                shared_memory: false,
                vcpus,
                console,
                devices,
                spare_slots: 1,
                confined: None,
            };
            Machine::new(config, ended)
        })
    }

    pub(crate) fn restore(&self, snapshot: &Path, name: &str) -> Guest {
        std::fs::copy(self.dir.path().join("first"), self.dir.path().join(name)).unwrap();
        Guest::new(self.disk(name), |console, devices, ended| {
            let restore = Restore {
                snapshot: Files::open(snapshot).unwrap(),
                // Two runs, of which the guest surely knows something.
                write_set: vec![(1, 2), (4096, 64)],
                console,
                devices,
                confined: None,
            };
            Machine::restore(restore, ended)
        })
    }
}

/// A machine, its console and its disk.
pub(crate) struct Guest {
    pub(crate) machine: Machine,
    lines: mpsc::Receiver<String>,
    disk: File,
    ended: mpsc::Receiver<End>,
}

pub(crate) type Devices = Vec<Arc<Mutex<dyn Device>>>;

/// What the guests have.
pub(crate) fn devices(disk: &File) -> Devices {
    let disk = Block::new(disk.try_clone().unwrap(), false, "disk").unwrap();
    vec![
        Arc::new(Mutex::new(Rng::new().unwrap())),
        Arc::new(Mutex::new(disk)),
        Arc::new(Mutex::new(Balloon::new())),
    ]
}

impl Guest {
    fn new(
        disk: File,
        build: impl FnOnce(File, Devices, Box<dyn FnOnce(End) + Send>) -> Result<Machine, Error>,
    ) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (tell, ended) = mpsc::channel();
        let ended_tell = Box::new(move |end| tell.send(end).unwrap_or(()));
        let console = File::from(OwnedFd::from(theirs));
        let machine = build(console, devices(&disk), ended_tell).unwrap();
        Self {
            machine,
            lines: lines(ours),
            disk,
            ended,
        }
    }

    /// The next number the guest counts to.
    pub(crate) fn tick(&self) -> u64 {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            let line = self.lines.recv_timeout(PATIENCE).unwrap_or_else(|_| {
                panic!(
                    "the guest says nothing; it ended: {:?}",
                    self.ended.try_recv()
                )
            });
            match line.trim().strip_prefix("tick ") {
                Some(number) => return number.parse().unwrap(),
                None => eprintln!("guest: {line}"),
            }
        }
        panic!("the guest does not count");
    }

    pub(crate) fn wait_for(&self, number: u64) -> u64 {
        loop {
            let tick = self.tick();
            if tick >= number {
                return tick;
            }
        }
    }

    /// What the guest has written to a sector.
    pub(crate) fn sector(&self, number: u64) -> u64 {
        let mut raw = [0; 16];
        self.disk.read_exact_at(&mut raw, number * 512).unwrap();
        let text = String::from_utf8_lossy(&raw);
        text.lines()
            .next()
            .unwrap()
            .trim_matches('\0')
            .parse()
            .unwrap_or(0)
    }
}

/// What a console says, line by line, until it closes.
pub(crate) fn lines(console: UnixStream) -> mpsc::Receiver<String> {
    let (send, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(console).lines() {
            if line.is_err() || send.send(line.unwrap()).is_err() {
                return;
            }
        }
    });
    lines
}

/// A "newc" archive (cpio(5)) of `(name, mode, content)`.
fn cpio(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    let end = [("TRAILER!!!", 0, &b""[..])];
    for (number, (name, mode, content)) in files.iter().chain(&end).enumerate() {
        let (size, length) = (content.len() as u32, name.len() as u32 + 1);
        let fields = [
            number as u32 + 1,
            *mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            0,
            0,
            length,
            0,
        ];
        archive.write_all(b"070701").unwrap();
        for field in fields {
            write!(archive, "{field:08x}").unwrap();
        }
        archive.extend([name.as_bytes(), &[0]].concat());
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}
