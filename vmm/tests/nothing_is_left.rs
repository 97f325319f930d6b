//! A device that was started and stopped leaves no descriptor, thread or file. Alone in its process,
//! because it counts all of them.
#![expect(clippy::unwrap_used, reason = "a panic is a failed test")]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use sealpod_vmm::vsock::{Config, Limits, VhostUserVsock};

const PATIENCE: Duration = Duration::from_secs(10);

fn count(folder: impl AsRef<Path>) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

fn held() -> (usize, usize) {
    (count("/proc/self/fd"), count("/proc/self/task"))
}

/// Starts and stops a device in `dir`, with or without a QEMU and a client.
fn cycle(dir: &Path, used: bool) {
    let qemu = dir.join("vhost.sock");
    let listener = UnixListener::bind(&qemu).unwrap();
    let config = Config {
        uds: dir.join("vsock.sock"),
        guest_cid: 3,
        limits: Limits::default(),
    };
    let device = VhostUserVsock::start(listener, &config).unwrap();
    if used {
        let mut client = UnixStream::connect(&config.uds).unwrap();
        client.write_all(b"CONNECT 1\n").unwrap();
        // A QEMU that goes away in the middle of a message.
        UnixStream::connect(&qemu)
            .unwrap()
            .write_all(b"half")
            .unwrap();
        // The client is closed when that was noticed.
        let _ = client.read(&mut [0]);
    }
    device.stop();
    std::fs::remove_file(qemu).unwrap();
}

#[test]
fn a_stopped_device_leaves_no_descriptor_thread_or_file() {
    let dir = tempfile::tempdir().unwrap();
    let threads = count("/proc/self/task");
    cycle(dir.path(), true); // descriptors that the process keeps once it has them
    let before = (count("/proc/self/fd"), threads);
    for n in 0..20 {
        cycle(dir.path(), n % 2 == 0);
    }
    // The kernel takes a joined thread out of /proc a moment after the join.
    let start = Instant::now();
    while held() != before {
        assert!(start.elapsed() < PATIENCE, "{:?}, not {before:?}", held());
        std::thread::yield_now();
    }
    assert_eq!(count(dir.path()), 0);
}
