//! The shared folder with a real virtiofs daemon, spoken to in FUSE as a guest's kernel does. Skips,
//! loudly, where there is no daemon.

use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;

use sealpod_vmm::virtio::{Device, Error, Remote};
use tempfile::TempDir;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::driver::{Machine, eventfd, private_memory};

const REQUESTS: usize = 1;
/// Milliseconds after which something hangs.
const PATIENCE: i32 = 20_000;

/// virtiofsd from the environment, the cache that `get-virtiofsd.sh` fills, or the system.
fn virtiofsd() -> Option<PathBuf> {
    let home = std::env::var("HOME").unwrap_or_default();
    let cache = std::env::var("SEALPOD_CACHE").unwrap_or(format!("{home}/.cache/sealpod"));
    let built = std::fs::read_dir(cache).into_iter().flatten().flatten();
    let built = built.map(|e| e.path().join("bin/virtiofsd"));
    let named = std::env::var_os("SEALPOD_VIRTIOFSD").map(PathBuf::from);
    (named.into_iter())
        .chain(built)
        .chain(["/usr/libexec/virtiofsd".into()])
        .find(|p| p.exists())
}

/// A daemon that serves a folder with one file.
pub(crate) struct Daemon {
    child: Child,
    dir: TempDir,
}

impl Daemon {
    pub(crate) fn start() -> Option<Self> {
        let Some(program) = virtiofsd() else {
            eprintln!("SKIPPED: needs virtiofsd (shim/get-virtiofsd.sh)");
            return None;
        };
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("share")).unwrap();
        std::fs::write(dir.path().join("share/hello"), "from the host").unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let child = Command::new(program)
            .args([
                "--fd=0",
                "--sandbox=none",
                "--log-level=off",
                "--shared-dir",
            ])
            .arg(dir.path().join("share"))
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Some(Self { child, dir })
    }

    pub(crate) fn device(&self) -> Remote {
        let socket = UnixStream::connect(self.dir.path().join("socket")).unwrap();
        Remote::folder(socket, "sealpod").unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A FUSE request (linux/fuse.h): `struct fuse_in_header` and what follows it.
fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut raw = Vec::new();
    raw.extend((40 + body.len() as u32).to_le_bytes());
    raw.extend(opcode.to_le_bytes());
    raw.extend(77_u64.to_le_bytes()); // unique
    raw.extend(node.to_le_bytes());
    raw.extend([0; 16]); // uid, gid, pid, padding
    raw.extend(body);
    raw
}

/// Sends a request and returns the answer after its header.
fn fuse(guest: &mut Machine<Remote>, opcode: u32, node: u64, body: &[u8], room: u32) -> Vec<u8> {
    guest.offer(REQUESTS, &[&request(opcode, node, body)], &[16, room]);
    guest.kick(REQUESTS);
    answer(guest)
}

fn answer(guest: &mut Machine<Remote>) -> Vec<u8> {
    let direct = guest
        .told
        .direct
        .lock()
        .unwrap()
        .as_ref()
        .map(|e| e.try_clone().unwrap());
    loop {
        if let Some((_, mut raw)) = guest.done(REQUESTS) {
            let body = raw.split_off(16);
            assert_eq!(raw[4..8], [0; 4], "error of the daemon");
            assert_eq!(raw[8], 77);
            return body;
        }
        match &direct {
            Some(direct) => wait(direct),
            None => assert!(guest.events.turn(PATIENCE).unwrap()),
        }
    }
}

/// Waits until the descriptor is signalled.
fn wait(on: &vmm_sys_util::eventfd::EventFd) {
    let epoll = Epoll::new().unwrap();
    let event = EpollEvent::new(EventSet::IN, 0);
    epoll
        .ctl(ControlOperation::Add, on.as_raw_fd(), event)
        .unwrap();
    assert_eq!(epoll.wait(PATIENCE, &mut [event]).unwrap(), 1);
    on.read().unwrap();
}

pub(crate) fn read_hello(guest: &mut Machine<Remote>) -> Vec<u8> {
    let numbers = |list: &[u32]| -> Vec<u8> { list.iter().flat_map(|n| n.to_le_bytes()).collect() };
    // INIT: version 7.38, read ahead, no flags.
    let init = fuse(
        guest,
        26,
        0,
        &numbers(&[7, 38, 4096, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        64,
    );
    assert_eq!(init[..4], 7_u32.to_le_bytes());
    let entry = fuse(guest, 1, 1, b"hello\0", 128); // LOOKUP in the root
    let node = u64::from_le_bytes(entry[..8].try_into().unwrap());
    let opened = fuse(guest, 14, node, &numbers(&[0, 0]), 16); // OPEN to read
    let handle = numbers(&[
        u32::from_le_bytes(opened[..4].try_into().unwrap()),
        u32::from_le_bytes(opened[4..8].try_into().unwrap()),
    ]);
    // READ: handle, offset, size, and four fields without meaning here.
    let body = [&handle[..], &numbers(&[0, 0, 4096, 0, 0, 0, 0, 0])].concat();
    fuse(guest, 15, node, &body, 4096)
}

#[test]
fn a_guest_reads_a_file_of_the_host() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    let mut guest = Machine::new(daemon.device());
    assert_eq!(read_hello(&mut guest), b"from the host");
    assert!(guest.interrupts(REQUESTS) > 0);
}

#[test]
fn the_daemon_signals_the_transport_itself_where_it_can() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    let device = daemon.device();
    let features = device.features();
    let mut guest = Machine::stopped(device, crate::driver::shared_memory());
    *guest.told.direct.lock().unwrap() = Some(eventfd());
    guest.start(features).unwrap();
    assert_eq!(read_hello(&mut guest), b"from the host");
    assert_eq!(guest.told.queues[REQUESTS].load(Ordering::SeqCst), 0);
}

#[test]
fn a_guest_that_restarts_finds_the_folder_again() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    let mut guest = Machine::new(daemon.device());
    assert_eq!(read_hello(&mut guest), b"from the host");
    guest.reboot();
    assert_eq!(read_hello(&mut guest), b"from the host");
}

#[test]
fn private_memory_is_refused_because_the_daemon_cannot_see_it() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    let device = daemon.device();
    let features = device.features();
    let mut guest = Machine::stopped(device, private_memory());
    let refused = guest.start(features);
    assert!(matches!(refused, Err(Error::Configuration(why)) if why.contains("not a file's")));
}

#[test]
fn a_daemon_that_died_is_an_error_and_not_a_hang() {
    let Some(mut daemon) = Daemon::start() else {
        return;
    };
    let device = daemon.device();
    let features = device.features();
    let mut guest = Machine::stopped(device, crate::driver::shared_memory());
    daemon.child.kill().unwrap();
    daemon.child.wait().unwrap();
    assert!(matches!(guest.start(features), Err(Error::Daemon { .. })));
    guest.device().reset();
}

#[test]
fn a_daemon_that_hangs_up_at_once_is_refused_and_so_is_a_wrong_tag() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    assert!(matches!(
        Remote::folder(ours, "sealpod"),
        Err(Error::Daemon { .. })
    ));
    for tag in ["", "\0", &"x".repeat(37)] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let refused = Remote::folder(ours, tag);
        assert!(matches!(refused, Err(Error::Configuration(_))), "{tag:?}");
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0); // nothing was said
    }
}

#[test]
fn the_configuration_is_the_tag_and_one_queue() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    let mut config = [9; 44];
    daemon.device().read_config(0, &mut config);
    assert_eq!(config[..8], *b"sealpod\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_shared_folder_is_not_saved() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    let saved = daemon.device().save();
    assert!(matches!(saved, Err(Error::NotSaved { kind: 26, .. })));
}
