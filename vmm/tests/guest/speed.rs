//! How fast disk and network are, beside QEMU with the same kernel, guest, disk and tap, one after the
//! other in one boot of the lab. A measurement: it fails only when something does not work. `make bench-lab`
//! runs it, with a file in `SEALPOD_BENCH_FILE` for the figures.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sealpod_vmm::machine::{Boot, Config, Machine};
use sealpod_vmm::virtio::{Block, Device, Net, NetConfig, open_tap};

use crate::bench::{Bench, DISK};

/// Tells when each of its tasks begins and ends. Streams go from and to dd, which reads and writes its socket
/// 64 KiB at a time; nc would do so by the KiB, and measure what the guest makes of that.
const GUEST: &str = "mkdir /sys; mount -t sysfs s /sys\n\
    t() { echo \"begin $1\"; shift; \"$@\" >/dev/null 2>&1; echo end; }\n\
    t sequential-write-MB dd if=/dev/zero of=/dev/vda bs=1M count=16 oflag=direct conv=notrunc\n\
    t sequential-read-MB dd if=/dev/vda of=/dev/null bs=1M count=16 iflag=direct\n\
    t writes-of-4K dd if=/dev/zero of=/dev/vda bs=4k count=300 oflag=direct conv=notrunc\n\
    t reads-of-4K dd if=/dev/vda of=/dev/null bs=4k count=300 iflag=direct\n\
    ifconfig lo up; ifconfig eth0 10.9.0.2 netmask 255.255.255.0 up; echo up\n\
    to_guest() { nc -l -p 5001 -e dd of=/dev/null bs=64k; }\n\
    to_host() { nc 10.9.0.1 5002 -e dd if=/dev/zero bs=64k count=256; }\n\
    echo_() { nc -l -p 5003 -e cat; }\n\
    t network-to-guest-MB to_guest\n\
    t network-to-host-MB to_host\n\
    t round-trips echo_\n\
    echo done; reboot -f\n";
/// MiB, requests, MiB and round trips of the tasks, in their order.
const AMOUNTS: [f64; 7] = [16.0, 16.0, 300.0, 300.0, 16.0, 16.0, 100.0];
const ROUNDS: usize = 5;
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 reboot=t";

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
    let mut results = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let tap = open_tap("bench0").unwrap();
        let net = NetConfig {
            mac: [2, 0, 0, 0, 0, 9],
            mtu: 1500,
        };
        let file = File::options().read(true).write(true).open(&disk).unwrap();
        let devices: Vec<Arc<Mutex<dyn Device>>> = vec![
            Arc::new(Mutex::new(Block::new(file, false, "disk").unwrap())),
            Arc::new(Mutex::new(Net::new(vec![tap], net).unwrap())),
        ];
        let config = Config {
            boot: Boot {
                kernel: File::open(&bench.kernel).unwrap(),
                initramfs: Some(File::open(&bench.initramfs).unwrap()),
                cmdline: CMDLINE.into(),
            },
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
        results[0].push(measure(ours));
        drop(machine);

        let mut qemu = Command::new("qemu-system-x86_64")
            .args([
                "-M",
                "pc",
                "-accel",
                "kvm",
                "-cpu",
                "host",
                "-m",
                "256",
                "-nodefaults",
            ])
            .args([
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
                "-serial",
                "stdio",
            ])
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
        results[1].push(measure(qemu.stdout.take().unwrap()));
        qemu.wait().unwrap();
    }
    let [ours, qemu] = results;
    let mut report = serde_json::Map::new();
    for (task, amount) in AMOUNTS.iter().enumerate() {
        let rate = |rounds: &[Vec<(String, Duration)>]| {
            let mut times: Vec<f64> = rounds.iter().map(|r| r[task].1.as_secs_f64()).collect();
            times.sort_by(f64::total_cmp);
            amount / times[times.len() / 2]
        };
        let (a, b) = (rate(&ours), rate(&qemu));
        let name = &ours[0][task].0;
        println!(
            "{name}: sealpod-vmm {a:.1}/s, QEMU {b:.1}/s, ratio {:.2}",
            a / b
        );
        let ratio = (a / b * 100.0).round() / 100.0;
        let row = serde_json::json!({ "sealpod-vmm": a, "qemu-pc": b, "ratio (1)": ratio });
        report.insert(format!("{name}/s"), row);
    }
    if let Some(file) = std::env::var_os("SEALPOD_BENCH_FILE") {
        std::fs::write(file, format!("{:#}\n", serde_json::Value::from(report))).unwrap();
    }
}

/// Follows a guest through its tasks and does the host's part; returns how long each took.
fn measure(console: impl Read) -> Vec<(String, Duration)> {
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
                    for _ in 0..256 {
                        stream.write_all(&[0; 65536]).unwrap();
                    }
                    stream.shutdown(Shutdown::Write).unwrap();
                }
                "network-to-host-MB" => {
                    let (mut stream, _) = listener.accept().unwrap();
                    task.1 = Instant::now();
                    let count = std::io::copy(&mut stream, &mut std::io::sink()).unwrap();
                    assert_eq!(count, 16 << 20);
                }
                "round-trips" => {
                    let mut stream = connect(5003);
                    stream.set_nodelay(true).unwrap();
                    task.1 = Instant::now();
                    for _ in 0..100 {
                        stream.write_all(b"x").unwrap();
                        stream.read_exact(&mut [0]).unwrap();
                    }
                }
                _ => {}
            }
        } else if line == "end" {
            eprintln!("{}: {:?}", task.0, task.1.elapsed());
            times.push((task.0.clone(), task.1.elapsed()));
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
