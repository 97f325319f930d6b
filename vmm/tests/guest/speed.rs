//! How fast disk and network are, beside QEMU with the same kernel, guest, disk and tap, by turns in one boot
//! of the lab. The machine's speed drifts while that takes minutes, so what counts is each round's own ratio,
//! and of those the median and the quartiles; who begins changes with each round. A measurement: it fails only
//! when something does not work. `make bench-lab` runs it, with a file in `SEALPOD_BENCH_FILE` for the figures.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sealpod_vmm::machine::{Config, Machine};
use sealpod_vmm::virtio::{Block, Device, Error, Net, NetConfig, open_tap};

use crate::bench::{Bench, DISK};

/// Tells when each of its tasks begins and ends. Streams go from and to dd, which reads and writes its socket
/// 64 KiB at a time; nc would do so by the KiB, and measure what the guest makes of that.
const GUEST: &str = "mkdir /sys; mount -t sysfs s /sys\n\
    t() { echo \"begin $1\"; shift; \"$@\" >/dev/null 2>&1; echo end; }\n\
    t sequential-write-MB dd if=/dev/zero of=/dev/vda bs=1M count=64 oflag=direct conv=notrunc\n\
    t sequential-read-MB dd if=/dev/vda of=/dev/null bs=1M count=64 iflag=direct\n\
    t writes-of-4K dd if=/dev/zero of=/dev/vda bs=4k count=1000 oflag=direct conv=notrunc\n\
    t reads-of-4K dd if=/dev/vda of=/dev/null bs=4k count=1000 iflag=direct\n\
    ifconfig lo up; ifconfig eth0 10.9.0.2 netmask 255.255.255.0 up; echo up\n\
    to_guest() { nc -l -p 5001 -e dd of=/dev/null bs=64k; }\n\
    to_host() { nc 10.9.0.1 5002 -e dd if=/dev/zero bs=64k count=1024; }\n\
    echo_() { nc -l -p 5003 -e cat; }\n\
    t network-to-guest-MB to_guest\n\
    t network-to-host-MB to_host\n\
    t round-trips echo_\n\
    echo done; reboot -f\n";
/// MiB, requests, MiB and round trips of the tasks, in their order.
const AMOUNTS: [f64; 7] = [64.0, 64.0, 1000.0, 1000.0, 64.0, 64.0, 500.0];
/// Odd, so that each median is a measurement.
const ROUNDS: usize = 15;
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 reboot=t";

/// Each task's name and seconds.
type Times = Vec<(String, f64)>;

#[test]
#[ignore = "a measurement"]
fn speed() {
    let Some(bench) = Bench::new(GUEST) else {
        return;
    };
    for arguments in [
        "tuntap add dev bench0 mode tap vnet_hdr",
        "addr add 10.9.0.1/24 dev bench0",
        "link set bench0 up",
    ] {
        let done = Command::new("ip").args(arguments.split(' ')).status();
        assert!(done.unwrap().success(), "ip {arguments}");
    }
    let disk = bench.path().join("disk");
    File::create(&disk)
        .unwrap()
        .write_all(&vec![7; DISK as usize])
        .unwrap();
    let mut rounds = Vec::new();
    for round in 0..ROUNDS {
        let (ours, qemu) = if round % 2 == 0 {
            let ours = sealpod_vmm(&bench, &disk);
            (ours, qemu(&bench, &disk))
        } else {
            let qemu = qemu(&bench, &disk);
            (sealpod_vmm(&bench, &disk), qemu)
        };
        rounds.push([ours, qemu]);
    }
    report(&rounds);
}

/// Prints and writes each task's rates (medians) and how the rounds' ratios are spread.
fn report(rounds: &[[Times; 2]]) {
    let mut report = serde_json::Map::new();
    for (task, amount) in AMOUNTS.iter().enumerate() {
        let rate = |vmm: usize| sorted(rounds, |round| amount / round[vmm][task].1);
        let ratios = sorted(rounds, |round| round[1][task].1 / round[0][task].1);
        let at = |values: &[f64], part: usize| values[(values.len() - 1) * part / 4];
        let (ours, qemu) = (at(&rate(0), 2), at(&rate(1), 2));
        let hundredths = |part| (at(&ratios, part) * 100.0).round() / 100.0;
        let [low, ratio, high] = [1, 2, 3].map(hundredths);
        let name = &rounds[0][0][task].0;
        println!(
            "{name}: sealpod-vmm {ours:.1}/s, QEMU {qemu:.1}/s, ratio {ratio:.2} ({low:.2} to {high:.2})"
        );
        let row = serde_json::json!({
            "sealpod-vmm": ours, "qemu-pc": qemu, "ratio (1)": ratio, "quartiles": [low, high],
        });
        report.insert(format!("{name}/s"), row);
    }
    if let Some(file) = std::env::var_os("SEALPOD_BENCH_FILE") {
        std::fs::write(file, format!("{:#}\n", serde_json::Value::from(report))).unwrap();
    }
}

fn sorted(rounds: &[[Times; 2]], value: impl Fn(&[Times; 2]) -> f64) -> Vec<f64> {
    let mut values: Vec<f64> = rounds.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    values
}

/// One guest's tasks by sealpod-vmm.
fn sealpod_vmm(bench: &Bench, disk: &Path) -> Times {
    let (ours, theirs) = UnixStream::pair().unwrap();
    // A machine before this one may hold it for a moment: its threads end by themselves.
    let tap = loop {
        match open_tap("bench0") {
            Err(Error::Resource { source, .. }) if source.raw_os_error() == Some(libc::EBUSY) => {
                std::thread::sleep(Duration::from_millis(5));
            }
            opened => break opened.unwrap(),
        }
    };
    let net = NetConfig {
        mac: [2, 0, 0, 0, 0, 9],
        mtu: 1500,
    };
    let file = File::options().read(true).write(true).open(disk).unwrap();
    let devices: Vec<Arc<Mutex<dyn Device>>> = vec![
        Arc::new(Mutex::new(Block::new(file, false, "disk").unwrap())),
        Arc::new(Mutex::new(Net::new(vec![tap], net).unwrap())),
    ];
    let config = Config {
        boot: bench.what_boots(CMDLINE),
        memory_mib: 256,
        shared_memory: false,
        vcpus: 1,
        console: File::from(OwnedFd::from(theirs)),
        devices,
        spare_slots: 0,
        confined: None,
    };
    let machine = Machine::new(config, |_| {}).unwrap();
    machine.resume();
    measure(ours)
}

/// One guest's tasks by QEMU.
fn qemu(bench: &Bench, disk: &Path) -> Times {
    let mut qemu = Command::new("qemu-system-x86_64")
        .args("-M pc -accel kvm -cpu host -m 256 -nodefaults -no-user-config".split(' '))
        .args("-display none -no-reboot -serial stdio".split(' '))
        .args(["-append", CMDLINE, "-kernel"])
        .arg(&bench.kernel)
        .arg("-initrd")
        .arg(&bench.initramfs)
        .args(["-device", "virtio-blk-pci,drive=d,serial=disk", "-drive"])
        .arg(format!("if=none,id=d,format=raw,file={}", disk.display()))
        .args(["-netdev", "tap,id=n,ifname=bench0,script=no,downscript=no"])
        .args(["-device", "virtio-net-pci,netdev=n,mac=02:00:00:00:00:09"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let times = measure(qemu.stdout.take().unwrap());
    qemu.wait().unwrap();
    times
}

/// Follows a guest through its tasks and does the host's part; returns how long each took.
fn measure(console: impl Read) -> Times {
    let listener = TcpListener::bind("10.9.0.1:5002").unwrap();
    let mut times = Vec::new();
    let mut task = (String::new(), Instant::now());
    for line in BufReader::new(console).lines() {
        let line = line.unwrap();
        let line = line.trim();
        if let Some(name) = line.strip_prefix("begin ") {
            task = (name.to_owned(), Instant::now());
            match name {
                "network-to-guest-MB" => {
                    let mut stream = connect(5001);
                    task.1 = Instant::now();
                    for _ in 0..1024 {
                        stream.write_all(&[0; 65536]).unwrap();
                    }
                    stream.shutdown(Shutdown::Write).unwrap();
                }
                "network-to-host-MB" => {
                    let (mut stream, _) = listener.accept().unwrap();
                    task.1 = Instant::now();
                    let count = std::io::copy(&mut stream, &mut std::io::sink()).unwrap();
                    assert_eq!(count, 64 << 20);
                }
                "round-trips" => {
                    let mut stream = connect(5003);
                    stream.set_nodelay(true).unwrap();
                    task.1 = Instant::now();
                    for _ in 0..500 {
                        stream.write_all(b"x").unwrap();
                        stream.read_exact(&mut [0]).unwrap();
                    }
                }
                _ => {}
            }
        } else if line == "end" {
            let seconds = task.1.elapsed().as_secs_f64();
            eprintln!("{}: {seconds:.3} s", task.0);
            times.push((task.0.clone(), seconds));
        } else if line == "done" {
            assert_eq!(times.len(), AMOUNTS.len());
            return times;
        } else {
            eprintln!("guest: {line}");
        }
    }
    panic!("the guest ended early, after {times:?}");
}

/// Connects as soon as the guest listens.
fn connect(port: u16) -> TcpStream {
    loop {
        match TcpStream::connect(("10.9.0.2", port)) {
            Ok(stream) => return stream,
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}
