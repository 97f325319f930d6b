//! Machines that are written down and go on, on real KVM: `make lab` runs them anywhere. Outside of the
//! lab they skip, loudly: a `/dev/kvm` that exists may not be a real one.
#![expect(clippy::unwrap_used, reason = "a panic is a failed test")]

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use sealpod_vmm::machine::{Boot, Config, End, Error, Machine, Restore};
use sealpod_vmm::virtio::{Balloon, Block, Device, Rng};

/// Counts, on its console and on its disk, sector after sector.
const GUEST: &str = "#!/bin/busybox sh\nexport PATH=/bin\n/bin/busybox --install -s /bin\n\
    mkdir -p /proc /dev; mount -t proc p /proc; mount -t devtmpfs d /dev\nn=0\n\
    while :; do n=$((n+1)); echo $n | dd of=/dev/vda bs=512 seek=$n conv=fsync,notrunc 2>/dev/null\n\
    echo tick $n; done\n";
/// Bytes of the disk.
const DISK: u64 = 1 << 20;
/// Longer than anything takes in the lab.
const PATIENCE: Duration = Duration::from_secs(120);

/// Where things are, if this is the place for it.
struct Bench {
    kernel: PathBuf,
    initramfs: PathBuf,
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Option<Self> {
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
        let files = [
            ("bin", 0o040_755, &b""[..]),
            ("bin/busybox", 0o100_755, &busybox),
            ("init", 0o100_755, GUEST.as_bytes()),
        ];
        std::fs::write(&initramfs, cpio(&files)).unwrap();
        Some(Self {
            kernel,
            initramfs,
            dir,
        })
    }

    fn disk(&self, name: &str) -> File {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(self.dir.path().join(name)).unwrap();
        file.set_len(DISK).unwrap();
        file
    }

    fn boot(&self, vcpus: u32) -> Guest {
        Guest::new(self.disk("first"), |console, devices, ended| {
            let config = Config {
                boot: Boot {
                    kernel: File::open(&self.kernel).unwrap(),
                    initramfs: Some(File::open(&self.initramfs).unwrap()),
                    cmdline: "console=ttyS0 quiet panic=-1".into(),
                },
                memory_mib: 128,
                shared_memory: false,
                vcpus,
                console,
                devices,
                spare_slots: 1,
            };
            Machine::new(config, ended)
        })
    }

    fn restore(&self, snapshot: &Path, name: &str, shared_memory: bool) -> Guest {
        std::fs::copy(self.dir.path().join("first"), self.dir.path().join(name)).unwrap();
        Guest::new(self.disk(name), |console, devices, ended| {
            let restore = Restore {
                snapshot: snapshot.to_owned(),
                shared_memory,
                console,
                devices,
            };
            Machine::restore(restore, ended)
        })
    }
}

/// A machine, its console and its disk.
struct Guest {
    machine: Machine,
    lines: mpsc::Receiver<String>,
    disk: File,
    ended: mpsc::Receiver<End>,
}

type Devices = Vec<Arc<Mutex<dyn Device>>>;

fn devices(disk: &File) -> Devices {
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
        let (send, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(ours).lines() {
                if line.is_err() || send.send(line.unwrap()).is_err() {
                    return;
                }
            }
        });
        Self {
            machine,
            lines,
            disk,
            ended,
        }
    }

    /// The next number the guest counts to.
    fn tick(&self) -> u64 {
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

    fn wait_for(&self, number: u64) -> u64 {
        loop {
            let tick = self.tick();
            if tick >= number {
                return tick;
            }
        }
    }

    /// What the guest has written to a sector.
    fn sector(&self, number: u64) -> u64 {
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

#[test]
fn clones_of_a_written_down_machine_go_on_where_it_stood_each_for_itself() {
    let Some(bench) = Bench::new() else {
        return;
    };
    let begin = Instant::now();
    let first = bench.boot(2);
    first.machine.resume();
    let counted = first.wait_for(5);
    eprintln!("boot to tick {counted}: {:?}", begin.elapsed());
    first.machine.pause();
    let snapshot = bench.dir.path().join("snapshot");
    std::fs::create_dir(&snapshot).unwrap();
    let begin = Instant::now();
    first.machine.save(&snapshot).unwrap();
    eprintln!("save: {:?}", begin.elapsed());
    // The first machine goes on as if nothing had been.
    first.machine.resume();
    first.wait_for(counted + 3);
    first.machine.stop();

    let clones = [
        bench.restore(&snapshot, "one", false),
        bench.restore(&snapshot, "two", false),
        bench.restore(&snapshot, "three", true),
    ];
    for clone in &clones {
        let begin = Instant::now();
        clone.machine.resume();
        let next = clone.tick();
        eprintln!("resume to tick {next}: {:?}", begin.elapsed());
        assert!((counted..counted + 5).contains(&next), "{counted} {next}");
        let later = clone.wait_for(next + 4);
        assert_eq!(clone.sector(later), later);
    }
    // A clone can be written down like any other.
    let again = bench.dir.path().join("again");
    std::fs::create_dir(&again).unwrap();
    clones[0].machine.pause();
    clones[0].machine.save(&again).unwrap();
    let clone = bench.restore(&again, "four", false);
    clone.machine.resume();
    assert!(clone.tick() > counted);
}

#[test]
fn a_snapshot_is_refused_where_it_does_not_fit() {
    let Some(bench) = Bench::new() else {
        return;
    };
    let guest = bench.boot(1);
    guest.machine.resume();
    guest.wait_for(1);
    let snapshot = bench.dir.path().join("snapshot");
    std::fs::create_dir(&snapshot).unwrap();
    assert!(matches!(
        guest.machine.save(&snapshot),
        Err(Error::NotPaused)
    ));
    guest.machine.pause();
    guest.machine.save(&snapshot).unwrap();
    assert!(matches!(
        guest.machine.save(&snapshot),
        Err(Error::Snapshot(_))
    ));

    let restore = |devices: Devices| {
        let restore = Restore {
            snapshot: snapshot.clone(),
            shared_memory: false,
            console: File::options().write(true).open("/dev/null").unwrap(),
            devices,
        };
        Machine::restore(restore, |_| {}).err().unwrap().to_string()
    };
    let all = || devices(&bench.disk("first"));
    let mut fewer = all();
    fewer.pop();
    assert!(restore(fewer).contains("needs a device of type 5"));
    let mut others = all();
    others.swap(0, 1);
    assert!(restore(others).contains("slot 0 needs a device of type 4"));
    let mut more = all();
    more.extend(all());
    assert!(restore(more).contains("fewer devices"));

    let state = snapshot.join("state");
    let mut raw = std::fs::read(&state).unwrap();
    let middle = raw.len() / 2;
    raw[middle] ^= 1;
    std::fs::write(&state, &raw).unwrap();
    assert!(restore(all()).contains("checksum"));
    raw[middle] ^= 1;
    std::fs::write(&state, &raw).unwrap();
    File::options()
        .write(true)
        .open(snapshot.join("memory"))
        .unwrap()
        .set_len(5)
        .unwrap();
    assert!(restore(all()).contains("5 bytes"));
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
