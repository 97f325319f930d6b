//! A VMM as the shim has it: a process that is told everything over its socket. What comes and goes while
//! its guest runs, and what it tells by itself.
#![expect(
    unsafe_code,
    reason = "descriptors that a child inherits are made so with fcntl"
)]

use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::sync::mpsc;
use std::time::Instant;

use sealpod_protocol::vmm::ended::How;
use sealpod_protocol::vmm::event::Kind;
use sealpod_protocol::vmm::{
    BalloonRequest, CreateRequest, Disk, Empty, Event, Nic, RemoveNicRequest,
};
use sealpod_protocol::vmm_ttrpc::VmmClient;
use sealpod_vmm::virtio::open_tap;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::bench::{Bench, PATIENCE, lines};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const MIB: u64 = 1 << 20;
/// Of the guest, MiB.
const MEMORY: u64 = 128;

/// Says what came; lets go of the network device when a disk comes, and looks for others when the disk says so; takes
/// back, as its files grow, what the balloon has.
const GUEST: &str = r#"mkdir /sys; mount -t sysfs s /sys
    drivers=/sys/bus/platform/drivers/virtio-mmio
    look() { for d in /sys/bus/platform/devices/virtio-mmio.*; do
        [ -e $d/driver ] || echo ${d##*/} > $drivers/bind; done 2>/dev/null; }
    nic() { until [ -e /sys/class/net/eth0 ]; do look; sleep 0.05; done
        echo $1 $(cat /sys/class/net/eth0/address) $(cat /sys/class/net/eth0/mtu); }
    echo up; nic first
    until [ -e /sys/block/vda ]; do look; sleep 0.05; done; echo disk $(cat /sys/block/vda/serial)
    for d in /sys/bus/platform/devices/virtio-mmio.*; do
        ! ls -d $d/virtio*/net/eth0 || echo ${d##*/} > $drivers/unbind; done >/dev/null 2>&1
    [ -e /sys/class/net/eth0 ] || echo let go
    until dd if=/dev/vda bs=2 count=1 2>/dev/null | grep -q go; do blockdev --flushbufs /dev/vda; sleep 0.05; done
    nic again; dd if=/dev/zero of=/file bs=1M count=44 2>/dev/null && echo full
    nic last; reboot -f
"#;

/// A VMM and what it is told by.
struct Vmm {
    process: Child,
    client: VmmClient,
    descriptors: UnixStream,
    lines: mpsc::Receiver<String>,
}

fn soon() -> context::Context {
    context::with_duration(PATIENCE)
}

/// Given to the next child.
fn inherit(fd: &impl AsRawFd) -> u32 {
    // SAFETY: sets a flag of an open descriptor.
    assert!(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) } >= 0);
    fd.as_raw_fd() as u32
}

impl Vmm {
    /// Boots the bench's guest.
    async fn boot(bench: &Bench) -> Self {
        let (control, its_control) = UnixStream::pair().unwrap();
        let (descriptors, its_descriptors) = UnixStream::pair().unwrap();
        let (console, its_console) = UnixStream::pair().unwrap();
        let request = CreateRequest {
            memory_mib: MEMORY,
            vcpus: 1,
            kernel: bench.kernel.display().to_string(),
            initramfs: bench.initramfs.display().to_string(),
            cmdline: "console=ttyS0 quiet panic=-1 reboot=t".into(),
            spare_slots: 2,
            console_fd: inherit(&its_console),
            ..Default::default()
        };
        let process = Command::new(env!("CARGO_BIN_EXE_sealpod-vmm"))
            .arg("serve")
            .args([&its_control, &its_descriptors].map(|fd| inherit(fd).to_string()))
            .spawn()
            .unwrap();
        control.set_nonblocking(true).unwrap();
        let control = tokio::net::UnixStream::from_std(control).unwrap();
        let client = VmmClient::new(Client::new(Socket::new(control)));
        client.create(soon(), &request).await.unwrap();
        client.resume(soon(), &Empty::new()).await.unwrap();
        Self {
            process,
            client,
            descriptors,
            lines: lines(console),
        }
    }

    /// Waits for a line of the guest's that begins with this, and returns the rest of it.
    fn line(&self, wanted: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(PATIENCE);
            let line = line.unwrap_or_else(|e| panic!("the guest does not say {wanted}: {e}"));
            match line.trim().strip_prefix(wanted) {
                Some(rest) => return rest.trim().to_owned(),
                None => eprintln!("guest: {line}"),
            }
        }
    }

    fn send(&self, fd: OwnedFd) {
        let sent = self.descriptors.send_with_fd(&[0_u8][..], fd.as_raw_fd());
        assert_eq!(sent.unwrap(), 1);
    }

    async fn add_nic(&self, mtu: u32) -> ttrpc::Result<Empty> {
        self.send(open_tap(TAP).unwrap());
        let nic = Nic {
            mac: MAC.to_vec(),
            mtu,
            ..Default::default()
        };
        self.client.add_nic(soon(), &nic).await
    }

    async fn remove_nic(&self) -> Result<(), String> {
        let request = RemoveNicRequest {
            mac: MAC.to_vec(),
            ..Default::default()
        };
        let removed = self.client.remove_nic(soon(), &request).await;
        removed.map(drop).map_err(|e| e.to_string())
    }

    /// Asks for memory until the guest has given it.
    async fn balloon(&self, bytes: u64) {
        let request = BalloonRequest {
            bytes,
            ..Default::default()
        };
        let begin = Instant::now();
        while self
            .client
            .set_balloon(soon(), &request)
            .await
            .unwrap()
            .bytes
            < bytes
        {
            assert!(begin.elapsed() < PATIENCE, "the guest gives nothing");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    /// What it says of where it stands, a line each.
    async fn describe(&self) -> Vec<String> {
        let described = self.client.describe(soon(), &Empty::new()).await;
        described.unwrap().lines
    }

    async fn event(&self) -> Event {
        self.client.next_event(soon(), &Empty::new()).await.unwrap()
    }
}

const TAP: &str = "sealpod-test";

fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status().unwrap();
    assert!(status.success(), "ip {arguments:?}");
}

#[tokio::test]
async fn devices_come_and_go_and_the_vmm_tells_of_memory_and_of_the_end() {
    let Some(bench) = Bench::new(GUEST) else {
        return;
    };
    ip(&["tuntap", "add", TAP, "mode", "tap", "vnet_hdr"]);
    let mut vmm = Vmm::boot(&bench).await;
    vmm.line("up");

    vmm.add_nic(1400).await.unwrap();
    assert_eq!(vmm.line("first"), "02:00:00:00:00:07 1400");
    let refused = vmm.remove_nic().await.unwrap_err();
    assert!(refused.contains("driver uses it"), "{refused}");

    let file = bench.disk("disk");
    vmm.send(file.try_clone().unwrap().into());
    let disk = Disk {
        serial: "vol-1".into(),
        readonly: true,
        ..Default::default()
    };
    vmm.client.add_disk(soon(), &disk).await.unwrap();
    assert_eq!(vmm.line("disk"), "vol-1");
    // It goes on afterwards, as the rest of this shows.
    let lines = vmm.describe().await;
    assert!(lines[0].starts_with("Processor 0: "), "{lines:#?}");
    assert!(lines[0].contains(", flags 0x"), "{lines:#?}");
    let balloon = "Slot 0: device of type 5, status 0xf, ";
    assert!(lines[1].starts_with(balloon), "{lines:#?}");
    let disk = lines.last().unwrap();
    let queue = disk.strip_prefix("Slot 2: device of type 2, status 0xf, ");
    let (_, queue) = queue.unwrap().split_once("queue 0: ").unwrap();
    // It was asked for its serial at least, and has answered that.
    let numbers = queue.split(' ').filter_map(|word| word.parse::<u16>().ok());
    let numbers: Vec<_> = numbers.collect();
    // Available, size of the queue, used; the pin's comes after them.
    assert!(numbers.len() == 4 && numbers[0] > 0, "{disk}");
    assert!((1..=numbers[0]).contains(&numbers[2]), "{disk}");
    assert!(queue.contains("pin 7 is vector 0x"), "{disk}");
    vmm.line("let go");
    vmm.remove_nic().await.unwrap();
    let refused = vmm.remove_nic().await.unwrap_err();
    assert!(refused.contains("no network device"), "{refused}");
    // Half of what the guest has; then files that are larger than what is left.
    vmm.balloon(64 * MIB).await;
    vmm.add_nic(1500).await.unwrap();
    file.write_all_at(b"go", 0).unwrap();
    assert_eq!(vmm.line("again"), "02:00:00:00:00:07 1500");
    let Some(Kind::MemoryPressure(pressure)) = vmm.event().await.kind else {
        panic!("the guest wrote its files without the balloon's memory");
    };
    assert!(pressure.balloon_bytes < 64 * MIB, "{pressure:?}");
    vmm.line("full");
    vmm.line("last");

    let end = loop {
        match vmm.event().await.kind {
            Some(Kind::Ended(ended)) => break ended,
            Some(Kind::MemoryPressure(_)) => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(end.how.enum_value(), Ok(How::TRIPLE_FAULT), "{end:?}");
    assert!(vmm.process.wait().unwrap().success());
    // Nobody has its ends any more.
    assert_eq!(vmm.descriptors.read(&mut [0]).unwrap(), 0);
    ip(&["tuntap", "del", TAP, "mode", "tap"]);
}
