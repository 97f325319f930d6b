//! Guests that start and work eight at a time, under sealpod-vmm and under QEMU by turns: each comes to its end. Where
//! QEMU's do not either, it is not sealpod-vmm's doing: so was found why guests in the lab once failed (docs/lab.md).
//! `SEALPOD_STORM_ROUNDS` makes it more rounds than one.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use sealpod_vmm::machine::{Config, Machine};

use crate::bench::{Bench, devices};

/// Processes that come and go, and memory that is taken and given back, so that free pages are reported.
const GUEST: &str = "mkdir /tmp; mount -t tmpfs t /tmp\n\
    work() { n=0; while [ $n -lt 8 ]; do n=$((n+1)); echo $n | sha256sum | cat >/dev/null; done; }\n\
    for i in 1 2 3; do echo \"part $i\"; work & work\n\
    dd if=/dev/zero of=/tmp/f bs=1M count=24 2>/dev/null; rm /tmp/f; sleep 1; wait; done\n\
    echo done; reboot -f\n";
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 reboot=t";
const GUESTS: usize = 8;
const VCPUS: u32 = 1;
/// Longer than a guest is silent in the busiest lab.
const SILENCE: Duration = Duration::from_secs(90);

/// What became of a guest.
#[derive(Debug, PartialEq)]
enum Fate {
    Done,
    /// Its console closed before; with its last words.
    Ended(String),
    /// It never spoke again.
    Silent(String),
}

#[test]
fn eight_guests_at_once_all_come_to_their_end() {
    let Some(bench) = Bench::new(GUEST) else {
        return;
    };
    let rounds = std::env::var("SEALPOD_STORM_ROUNDS");
    let rounds = rounds.map_or(1, |rounds| rounds.parse().expect("a number of rounds"));
    let mut others = Vec::new();
    for round in 0..rounds {
        for vmm in ["sealpod-vmm", "QEMU"] {
            let fates: Vec<Fate> = thread::scope(|scope| {
                let bench = &bench;
                let start = |guest| {
                    scope.spawn(move || match vmm {
                        "QEMU" => qemu(bench),
                        _ => sealpod_vmm(bench, guest),
                    })
                };
                let guests: Vec<_> = (0..GUESTS).map(start).collect();
                let end = guests.into_iter().map(|guest| guest.join().unwrap());
                end.collect()
            });
            let other = fates.into_iter().filter(|fate| *fate != Fate::Done);
            others.extend(other.map(|fate| format!("round {round}, {vmm}: {fate:?}")));
        }
        eprintln!("{} rounds: {others:#?}", round + 1);
    }
    assert!(others.is_empty(), "{others:#?}");
}

fn sealpod_vmm(bench: &Bench, guest: usize) -> Fate {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (tell, ended) = mpsc::channel();
    let config = Config {
        boot: bench.what_boots(CMDLINE),
        memory_mib: 256,
        shared_memory: false,
        vcpus: VCPUS,
        console: File::from(OwnedFd::from(theirs)),
        devices: devices(&bench.disk(&format!("storm{guest}"))),
        spare_slots: 0,
        confined: None,
    };
    let console = ours.try_clone().unwrap();
    let machine = Machine::new(config, move |end| {
        tell.send(end).unwrap_or(());
        // As the end of a process would do.
        console.shutdown(Shutdown::Both).unwrap_or(());
    })
    .unwrap();
    machine.resume();
    let fate = follow(ours);
    if fate != Fate::Done {
        eprintln!("sealpod-vmm's word: {:?}", ended.try_recv());
        machine.pause();
        eprintln!("{:#?}", machine.describe());
    }
    fate
}

fn qemu(bench: &Bench) -> Fate {
    let mut qemu = Command::new("qemu-system-x86_64")
        .args("-M pc -accel kvm -cpu host -m 256 -nodefaults -no-user-config".split(' '))
        .args("-display none -no-reboot -serial stdio -device virtio-rng-pci".split(' '))
        .args(["-device", "virtio-balloon-pci,free-page-reporting=on"])
        .args(["-append", CMDLINE, "-kernel"])
        .arg(&bench.kernel)
        .arg("-initrd")
        .arg(&bench.initramfs)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let fate = follow(qemu.stdout.take().unwrap());
    if fate != Fate::Done {
        eprintln!("QEMU's status: {:?}", qemu.try_wait());
    }
    qemu.kill().unwrap();
    qemu.wait().unwrap();
    fate
}

/// Reads a guest's console to its end.
fn follow(console: impl Read + Send + 'static) -> Fate {
    let (send, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(console).lines().map_while(Result::ok) {
            if send.send(line).is_err() {
                return;
            }
        }
    });
    let mut last = String::new();
    loop {
        match lines.recv_timeout(SILENCE) {
            Ok(line) if line.trim() == "done" => return Fate::Done,
            Ok(line) => last = line,
            Err(mpsc::RecvTimeoutError::Disconnected) => return Fate::Ended(last),
            Err(mpsc::RecvTimeoutError::Timeout) => return Fate::Silent(last),
        }
    }
}
