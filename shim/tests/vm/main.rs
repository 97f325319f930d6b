//! The QEMU driver with real VMs, and the share that virtiofsd serves to them. Skips, loudly, where root, QEMU, the guest's kernel or a static
//! busybox (for the guests that do something) is missing.
#![expect(clippy::unwrap_used, reason = "a test")]

mod bench;
mod gates;
mod share;
mod template;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bench::Bench;
use sealpod_shim::child::Exit;
use sealpod_shim::network::{PodNetns, PodNetwork, TapNic, mac_text};
use sealpod_shim::vm::{Disk, ExitReason, Nic, Vm, VmConfig, VmError};

/// `Driver::start` gives nothing that can be printed.
fn refused(result: Result<Arc<dyn Vm>, VmError>) -> String {
    match result {
        Ok(_) => panic!("the VM started"),
        Err(e) => {
            let source = std::error::Error::source(&e).map_or(String::new(), |s| format!(": {s}"));
            format!("{e}{source}")
        }
    }
}

#[tokio::test]
async fn a_guest_that_ends_itself_is_seen_to_have_ended() {
    let Some(bench) = Bench::new() else { return };
    let start = Instant::now();
    let vm = bench.start("tsc").await;
    let exit = bench::ended(&vm).await;
    eprintln!("from start to end: {:?}; {exit}", start.elapsed());
    assert_eq!(exit.reason, ExitReason::Guest);
    assert!(
        exit.console.iter().any(|l| l.contains("init tsc")),
        "{exit}"
    );
    assert_eq!(bench::ended(&vm).await, exit);
    vm.stop().await;
    assert!(matches!(vm.pause().await, Err(VmError::Ended)));
    drop(vm);
    bench.finish();
}

#[tokio::test]
async fn a_panic_is_the_reason_and_its_line_is_told() {
    let Some(bench) = Bench::new() else { return };
    let vm = bench.start("panic").await;
    let exit = bench::ended(&vm).await;
    let ExitReason::Panic(message) = &exit.reason else {
        panic!("{exit}");
    };
    assert!(message.contains("Attempted to kill init"), "{exit}");
    vm.stop().await;
    drop(vm);
    bench.finish();
}

#[tokio::test]
async fn what_no_vm_can_have_is_refused_by_name_and_nothing_is_taken() {
    let Some(bench) = Bench::new() else { return };
    type Spoil = fn(&mut VmConfig);
    let wrong: [(&str, Spoil); 8] = [
        ("/nonexistent/vmlinux", |c| {
            c.kernel = "/nonexistent/vmlinux".into()
        }),
        ("not ELF", |c| c.kernel = "/etc/services".into()),
        ("/nonexistent/root", |c| {
            c.initramfs = "/nonexistent/root".into()
        }),
        ("64 to", |c| c.memory_mib = 8),
        ("1 to 255", |c| c.vcpus = 0),
        ("2047", |c| c.kernel_params = vec!["x".repeat(2048)]),
        ("control", |c| c.kernel_params = vec!["a\nb".into()]),
        ("find program /nonexistent/qemu", |c| {
            c.program = "/nonexistent/qemu".into()
        }),
    ];
    for (named, spoil) in wrong {
        let mut config = bench.config("tsc");
        spoil(&mut config);
        let message = refused(bench::driver().start(config, &bench.ledger).await);
        assert!(message.contains(named), "{named:?} not in {message:?}");
    }
    bench.finish();
}

#[tokio::test]
async fn a_vmm_that_gives_up_is_quoted() {
    let Some(bench) = Bench::new() else { return };
    let mut config = bench.config("tsc");
    config.program = "/usr/bin/env".into();
    let message = refused(bench::driver().start(config, &bench.ledger).await);
    // What `env` makes of the arguments that each driver gives.
    let (code, words) = match bench::builtin() {
        Some(_) => ("exit code 127", "'serve': No such file"),
        None => ("exit code 125", "invalid option"),
    };
    assert!(message.contains(code), "{message}");
    assert!(message.contains(words), "{message}");
    bench.finish();
}

#[tokio::test]
async fn a_vm_can_be_paused_resumed_and_stopped() {
    let Some(bench) =
        Bench::with_guest("i=0; while true; do i=$((i+1)); echo tick $i; sleep 0.05; done")
    else {
        return;
    };
    let vm = bench.start_guest(|_| {}).await;
    bench::line(&vm, "tick 3").await;
    vm.pause().await.unwrap();
    vm.pause().await.unwrap();
    // What was on its way arrives; then nothing does.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let paused = vm.console_tail();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(vm.console_tail(), paused);
    vm.resume().await.unwrap();
    let last = paused.last().unwrap().rsplit(' ').next().unwrap();
    let next = last.parse::<u32>().unwrap() + 2;
    bench::line(&vm, &format!("tick {next}")).await;
    vm.stop().await;
    vm.stop().await;
    assert_eq!(bench::ended(&vm).await.reason, ExitReason::Stopped);
    drop(vm);
    bench.finish();
}

#[tokio::test]
async fn a_killed_vmm_is_the_reason() {
    let Some(bench) = Bench::with_guest("echo up; sleep 1000") else {
        return;
    };
    let vm = bench.start_guest(|_| {}).await;
    bench::line(&vm, "up").await;
    bench::run("kill", &["-9", &vm.pid().to_string()]);
    let exit = bench::ended(&vm).await;
    assert_eq!(exit.reason, ExitReason::Vmm(Exit::Signal(libc::SIGKILL)));
    assert_eq!(exit.console.last().unwrap(), "up");
    vm.stop().await;
    drop(vm);
    bench.finish();
}

#[tokio::test]
async fn disks_come_and_go_while_the_guest_runs() {
    let script = "echo up
        until [ -e /dev/vda ]; do look; sleep 0.05; done
        cat /sys/block/vda/serial; echo; dd if=/dev/vda bs=5 count=1 2>/dev/null; echo
        echo there > /dev/vda; sync; echo written; let_go vda; echo free
        while [ -e /dev/vda ]; do sleep 0.05; done; echo gone
        until blockdev --getro /dev/vda 2>/dev/null | grep 1; do look; sleep 0.05; done
        echo end > /dev/vda || echo refused; reboot -f";
    let Some(bench) = Bench::with_guest(script) else {
        return;
    };
    let disk = bench.file("disk.img", "hello".repeat(1 << 18).as_bytes());
    let vm = bench.start_guest(|_| {}).await;
    bench::line(&vm, "up").await;
    let mut volume = Disk {
        path: disk.clone(),
        readonly: false,
        serial: "vol-0123456789".into(),
    };
    let start = Instant::now();
    vm.add_disk(volume.clone()).await.unwrap();
    bench::line(&vm, "hello").await;
    eprintln!("disk added and read after {:?}", start.elapsed());
    assert!(vm.console_tail().contains(&volume.serial));
    let again = vm.add_disk(volume.clone()).await.unwrap_err();
    assert!(matches!(again, VmError::Config { .. }), "{again}");
    let other = Disk {
        serial: "other".into(),
        ..volume.clone()
    };
    let full = vm.add_disk(other).await.unwrap_err();
    assert!(matches!(full, VmError::NoPort { ports: 1 }), "{full}");
    // sealpod-vmm cannot ask the guest for it; this one lets go of it by itself.
    bench::line(&vm, "free").await;
    let start = Instant::now();
    vm.remove_disk(&volume.serial).await.unwrap();
    bench::line(&vm, "gone").await;
    eprintln!("disk removed after {:?}", start.elapsed());
    assert!(std::fs::read(&disk).unwrap().starts_with(b"there"));
    let missing = vm.remove_disk(&volume.serial).await.unwrap_err();
    assert!(matches!(missing, VmError::NoDevice(_)), "{missing}");

    volume.readonly = true;
    for (path, named) in [
        ("/nonexistent/disk", "open disk"),
        ("/dev/null", "block device"),
    ] {
        let wrong = Disk {
            path: path.into(),
            ..volume.clone()
        };
        let message = vm.add_disk(wrong).await.unwrap_err().to_string();
        assert!(message.contains(named), "{message}");
    }
    vm.add_disk(volume).await.unwrap();
    bench::line(&vm, "refused").await;
    assert_eq!(bench::ended(&vm).await.reason, ExitReason::Guest);
    assert!(std::fs::read(&disk).unwrap().starts_with(b"there"));
    vm.stop().await;
    drop(vm);
    bench.finish();
}

#[tokio::test]
async fn several_vcpus_and_ports_come_up() {
    let Some(bench) = Bench::with_guest(
        "echo cpus $(nproc); ls /sys/bus/pci/devices 2>/dev/null | wc -l; reboot -f",
    ) else {
        return;
    };
    let vm = bench
        .start_guest(|c| {
            c.vcpus = 2;
            c.hotplug_ports = 4;
        })
        .await;
    let exit = bench::ended(&vm).await;
    assert!(exit.console.iter().any(|l| l == "cpus 2"), "{exit}");
    assert!(vm.marks().iter().is_sorted_by_key(|mark| mark.at_ns));
    assert!(!Path::new(&format!("/proc/{}", vm.pid())).exists());
    vm.stop().await;
    drop(vm);
    bench.finish();
}

#[tokio::test]
async fn a_nic_can_be_there_from_the_start_or_come_later() {
    let script = "n=/sys/class/net; ifconfig eth0 10.9.0.2; ping -c 1 -W 1 10.9.0.1; echo up
        cat $n/eth0/address $n/eth0/mtu
        until [ -e $n/eth1 ]; do look; sleep 0.05; done
        cat $n/eth1/address $n/eth1/mtu; echo done; reboot -f";
    let Some(bench) = Bench::with_guest(script) else {
        return;
    };
    let mut taps = Vec::new();
    let mut networks = Vec::new();
    for _ in 0..2 {
        // A namespace without interfaces: the tap waits for one.
        let netns = PodNetns::create().await.unwrap();
        let mut network = PodNetwork::new(netns, bench.ledger.clone()).await.unwrap();
        taps.extend(network.attach().await.unwrap());
        networks.push(network);
    }
    let nic = |tap: TapNic, mtu| Nic {
        tap: tap.tap,
        mac: tap.mac,
        mtu,
    };
    let macs: Vec<String> = taps.iter().map(|t| mac_text(t.mac)).collect();
    let later = nic(taps.pop().unwrap(), 1400);
    let first = nic(taps.pop().unwrap(), 1450);
    let vm = bench.start_guest(|c| c.nics = vec![first]).await;
    bench::line(&vm, "up").await;
    bench::line(&vm, &macs[0]).await;
    vm.add_nic(later).await.unwrap();
    bench::line(&vm, "done").await;
    let lines = vm.console_tail();
    for wanted in [&macs[1], "1450", "1400"] {
        assert!(
            lines.iter().any(|l| l == wanted),
            "{wanted} not in {lines:?}"
        );
    }
    assert_eq!(bench::ended(&vm).await.reason, ExitReason::Guest);
    vm.stop().await;
    drop(vm);
    bench.finish();
}
