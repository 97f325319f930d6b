//! `make bench-lab`: what a VM costs, sealpod-vmm and QEMU's machines by turns in one run on real KVM:
//! time from exec to the guest's init, exits and page faults until then, memory beyond the guest's,
//! threads; bare, with a disk, and with a network device. Writes `vmm.json` into the folder that it is
//! given. `--other NAME=COMMAND` adds a VMM: words with `{kernel}`, `{initrd}`, `{cmdline}` and
//! `{memory}` in them, its console on standard output.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use sealpod_tests::{assets, measure::forget_the_last_guest, stats::percentile};
use serde_json::{Value, json};

const MEMORY_MIB: u64 = 256;
/// What the init of `initramfs/pack.sh --floor` writes when it is told to stay.
const INIT: &str = "init stays";
/// Not `quiet`, with which the kernel still warns: with ACPI, which sealpod-vmm has none of, it does, and each character is
/// an exit.
const CMDLINE: &str = "console=ttyS0 loglevel=4 reboot=t noreplace-smp tsc=reliable";
/// How long a VMM that does not get there is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// QEMU's machines without what no guest here uses.
const QEMU: [(&str, &str); 3] = [
    (
        "qemu-microvm",
        "microvm,rtc=off,pit=off,pic=off,auto-kernel-cmdline=on",
    ),
    ("qemu-pc", "pc,hpet=off,usb=off,vmport=off"),
    (
        "qemu-q35",
        "q35,hpet=off,smbus=off,sata=off,usb=off,vmport=off",
    ),
];

/// The tap of every VMM's network device.
const TAP: &str = "sealbench0";

/// The tap, as long as somebody measures.
struct Tap;

impl Tap {
    fn new() -> Result<Self> {
        ip(&["tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"])?;
        let tap = Self;
        ip(&["link", "set", TAP, "up"])?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if let Err(e) = ip(&["link", "delete", TAP]) {
            eprintln!("{e:#}");
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let status = Command::new("ip").args(arguments).status().context("ip")?;
    ensure!(status.success(), "ip {}", arguments.join(" "));
    Ok(())
}

/// A VMM and how it is started.
struct Vmm {
    name: String,
    words: Vec<String>,
}

/// What one start cost.
#[derive(Default)]
struct Cost {
    init_ms: Vec<f64>,
    exits: Vec<f64>,
    faults: Vec<f64>,
    memory_kib: Vec<f64>,
    threads: Vec<f64>,
}

fn words(parts: &[&str]) -> Vec<String> {
    parts.iter().map(|&p| p.to_owned()).collect()
}

/// A VMM bare, with a disk, and with a network device.
fn variants(name: &str, bare: &[&str], disk: &[&str], nic: &[&str]) -> Vec<Vmm> {
    let with = |suffix: &str, more: &[&str]| Vmm {
        name: format!("{name}{suffix}"),
        words: words(&[bare, more].concat()),
    };
    vec![with("", &[]), with("+disk", disk), with("+net", nic)]
}

fn vmms(others: &[String], disk: &Path) -> Result<Vec<Vmm>> {
    let guest = assets::target().join("guest");
    let (kernel, initrd) = (guest.join("vmlinux"), guest.join("floor.cpio"));
    let (kernel, initrd) = (kernel.to_string_lossy(), initrd.to_string_lossy());
    let memory = MEMORY_MIB.to_string();
    let cmdline = format!("{CMDLINE} -- stay");
    let own = assets::programs().join("sealpod-vmm");
    let own = own.to_string_lossy();
    let boot = [&*own, "boot", "--kernel", &kernel, "--initrd", &initrd];
    let boot = [&boot[..], &["--cmdline", &cmdline, "--memory", &memory]].concat();
    let disk = disk.to_string_lossy();
    let mut vmms = variants("sealpod-vmm", &boot, &["--disk", &disk], &["--tap", TAP]);
    for (name, machine) in QEMU {
        let common = [
            "qemu-system-x86_64",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-accel",
            "kvm",
            "-cpu",
            "host",
            "-serial",
            "stdio",
        ];
        let rest = [
            "-M", machine, "-m", &memory, "-kernel", &kernel, "-initrd", &initrd,
        ];
        let all = [&common[..], &rest, &["-append", &cmdline]].concat();
        let (bus, rom) = match name {
            "qemu-microvm" => ("device", ""),
            _ => ("pci", ",romfile="),
        };
        let drive = format!("file={disk},format=raw,if=none,id=d");
        let blk = format!("virtio-blk-{bus},drive=d");
        let tap = format!("tap,id=n,ifname={TAP},script=no,downscript=no");
        let net = format!("virtio-net-{bus},netdev=n{rom}");
        let disk = ["-drive", &drive, "-device", &blk];
        let nic = ["-netdev", &tap, "-device", &net];
        vmms.extend(variants(name, &all, &disk, &nic));
    }
    for other in others {
        let (name, command) = other.split_once('=').context("--other NAME=COMMAND")?;
        let fill = |word: &str| {
            word.replace("{kernel}", &kernel)
                .replace("{initrd}", &initrd)
                .replace("{cmdline}", &cmdline)
                .replace("{memory}", &memory)
        };
        vmms.push(Vmm {
            name: name.into(),
            words: command.split_whitespace().map(fill).collect(),
        });
    }
    Ok(vmms)
}

/// Kills the VMM, whatever happens.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts one, measures when its init has come up, and kills it.
fn measure(vmm: &Vmm, cost: &mut Cost) -> Result<()> {
    forget_the_last_guest();
    let begin = Instant::now();
    let child = Command::new(&vmm.words[0])
        .args(&vmm.words[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| vmm.words[0].clone())?;
    let mut running = Running(child);
    let out = running.0.stdout.take().context("no output")?;
    let (tell, told) = mpsc::channel();
    // Ends with the output, which ends with the VMM.
    thread::spawn(move || {
        let mut lines = BufReader::new(out).split(b'\n').map_while(Result::ok);
        if lines.any(|line| String::from_utf8_lossy(&line).contains(INIT)) {
            let _ = tell.send(());
        }
    });
    if let Err(e) = told.recv_timeout(PATIENCE) {
        bail!("no init within {} s: {e}", PATIENCE.as_secs());
    }
    cost.init_ms.push(begin.elapsed().as_secs_f64() * 1e3);
    let pid = running.0.id();
    let kvm = kvm_folder(pid)?;
    cost.exits.push(number(&kvm.join("exits"))?);
    cost.faults.push(number(&kvm.join("pf_fixed"))?);
    let proc_dir = PathBuf::from(format!("/proc/{pid}"));
    cost.threads
        .push(fs::read_dir(proc_dir.join("task"))?.count() as f64);
    cost.memory_kib.push(own_memory_kib(&proc_dir)?);
    Ok(())
}

fn number(path: &Path) -> Result<f64> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Ok(text.trim().parse()?)
}

/// KVM's statistics of a VM are in a folder named after its process.
fn kvm_folder(pid: u32) -> Result<PathBuf> {
    let prefix = format!("{pid}-");
    fs::read_dir("/sys/kernel/debug/kvm")?
        .flatten()
        .find(|e| e.file_name().to_string_lossy().starts_with(&prefix))
        .map(|e| e.path())
        .context("KVM knows no such VM")
}

/// PSS of everything but the guest's memory: mappings of at least half its size are that.
fn own_memory_kib(proc_dir: &Path) -> Result<f64> {
    let mut sum = 0;
    let mut guest = false;
    for line in fs::read_to_string(proc_dir.join("smaps"))?.lines() {
        let mut parts = line.split_whitespace();
        let key = parts.next().unwrap_or_default();
        let value = parts
            .next()
            .and_then(|v| v.parse::<u64>().ok())
            .unwrap_or(0);
        match key {
            "Size:" => guest = value >= MEMORY_MIB * 512,
            "Pss:" if !guest => sum += value,
            _ => {}
        }
    }
    Ok(sum as f64)
}

fn summary(cost: &Cost) -> Value {
    let middle = |samples: &[f64]| (percentile(samples, 0.5) * 10.0).round() / 10.0;
    json!({
        "init_ms": middle(&cost.init_ms), "exits": middle(&cost.exits),
        "page_faults": middle(&cost.faults), "memory_kib": middle(&cost.memory_kib),
        "threads": middle(&cost.threads), "rounds": cost.init_ms.len(),
    })
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let folder = PathBuf::from(
        arguments
            .next()
            .context("usage: bench_vmm FOLDER [--other …]")?,
    );
    let others: Vec<String> = arguments.filter(|a| a != "--other").collect();
    let rounds = std::env::var("SEALPOD_BENCH_ROUNDS").map_or(Ok(5), |r| r.parse())?;
    let disk = std::env::temp_dir().join("bench-disk.img");
    fs::File::create(&disk)?.set_len(64 << 20)?;
    let _tap = Tap::new()?;
    let vmms = vmms(&others, &disk)?;
    let mut costs: Vec<Option<Cost>> = vmms.iter().map(|_| Some(Cost::default())).collect();
    let mut missing = serde_json::Map::new();
    // The first round warms the page cache.
    for round in 0..=rounds {
        for (vmm, slot) in vmms.iter().zip(&mut costs) {
            let Some(cost) = slot else { continue };
            if let Err(e) = measure(vmm, cost) {
                missing.insert(vmm.name.clone(), json!(format!("{e:#}")));
                *slot = None;
            } else if round == 0 {
                *cost = Cost::default();
            }
        }
    }
    let mut report = serde_json::Map::new();
    for (vmm, cost) in vmms.iter().zip(&costs) {
        let Some(cost) = cost else { continue };
        println!("{:18} {}", vmm.name, summary(cost));
        report.insert(vmm.name.clone(), summary(cost));
    }
    ensure!(
        report.contains_key("sealpod-vmm"),
        "sealpod-vmm: {missing:?}"
    );
    let init = |name: &str| report.get(name).and_then(|r| r["init_ms"].as_f64());
    let ratio = |to: &str| {
        let with = |suffix: &str| {
            let ours = init(&format!("sealpod-vmm{suffix}"))?;
            Some((ours / init(&format!("{to}{suffix}"))? * 1000.0).round() / 1000.0)
        };
        json!({ "bare": with(""), "disk": with("+disk"), "net": with("+net") })
    };
    let goals = json!({
        "init_to_qemu_pc (0.7)": ratio("qemu-pc"), "init_to_qemu_q35 (0.5)": ratio("qemu-q35"),
        "exits (1500)": report["sealpod-vmm"]["exits"],
        "page_faults (20)": report["sealpod-vmm"]["page_faults"],
        "memory_kib (4608)": report["sealpod-vmm"]["memory_kib"],
    });
    println!("{goals:#}");
    let all = json!({ "vmms": report, "goals": goals, "did not run": missing });
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("vmm.json"), format!("{all:#}\n"))?;
    Ok(())
}
