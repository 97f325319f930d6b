//! The shared folder with a real virtiofs daemon, spoken to in FUSE as a guest's kernel does. Skips,
//! loudly, where there is no daemon.

use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;

use sealpod_vmm::virtio::{Device, Error, Remote, Window};
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
        Remote::folder(self.connect(), "sealpod", None).unwrap()
    }

    /// A device whose daemon never sees the guest's memory, and a guest that cannot share it.
    pub(crate) fn relayed(&self) -> Machine<Remote> {
        let window = Some(Window::new().unwrap());
        let device = Remote::folder(self.connect(), "sealpod", window).unwrap();
        let features = device.features();
        Machine::with(device, features, private_memory())
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("socket")).unwrap()
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

fn numbers(list: &[u32]) -> Vec<u8> {
    list.iter().flat_map(|n| n.to_le_bytes()).collect()
}

fn init(guest: &mut Machine<Remote>) {
    // INIT: version 7.38, read ahead, no flags.
    let init = fuse(
        guest,
        26,
        0,
        &numbers(&[7, 38, 4096, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        64,
    );
    assert_eq!(init[..4], 7_u32.to_le_bytes());
}

/// Opens a file of the root; returns its node and a handle.
fn open(guest: &mut Machine<Remote>, name: &[u8], flags: u32) -> (u64, Vec<u8>) {
    let entry = fuse(guest, 1, 1, name, 128); // LOOKUP
    let node = u64::from_le_bytes(entry[..8].try_into().unwrap());
    let opened = fuse(guest, 14, node, &numbers(&[flags, 0]), 16); // OPEN
    (node, opened[..8].to_vec())
}

pub(crate) fn read_hello(guest: &mut Machine<Remote>) -> Vec<u8> {
    init(guest);
    let (node, handle) = open(guest, b"hello\0", 0);
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
fn a_guest_whose_memory_nobody_shares_reads_it_too() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    let mut guest = daemon.relayed();
    assert_eq!(read_hello(&mut guest), b"from the host");
    assert!(guest.interrupts(REQUESTS) > 0);
    guest.reboot();
    assert_eq!(read_hello(&mut guest), b"from the host");
}

/// Reads and writes of as much as Linux asks in one request, and of more such at once than a window has
/// room for.
fn move_much(daemon: &Daemon, mut guest: Machine<Remote>) {
    const PIECE: usize = 1008 << 10;
    let path = daemon.dir.path().join("share/large");
    let content = crate::driver::Random(5).bytes(3 * PIECE);
    std::fs::write(&path, &content).unwrap();
    init(&mut guest);
    let (node, handle) = open(&mut guest, b"large\0", 2); // O_RDWR
    let body = |at: usize| {
        let numbers = numbers(&[at as u32, 0, PIECE as u32, 0, 0, 0, 0, 0]);
        [&handle[..], &numbers].concat()
    };
    for n in 0..12 {
        let read = request(15, node, &body(n % 3 * PIECE));
        guest.offer(REQUESTS, &[&read], &[16, 4096, PIECE as u32 - 4096]);
    }
    guest.kick(REQUESTS);
    let mut found: Vec<_> = (0..12).map(|_| answer(&mut guest)).collect();
    let mut expected: Vec<_> = (0..12)
        .map(|n| &content[n % 3 * PIECE..][..PIECE])
        .collect();
    found.sort();
    expected.sort();
    assert!(found == expected);

    let new = crate::driver::Random(9).bytes(PIECE);
    let mut write = request(16, node, &body(4096));
    write[..4].copy_from_slice(&(40 + 40 + PIECE as u32).to_le_bytes());
    let (first, rest) = new.split_at(PIECE / 3);
    guest.offer(REQUESTS, &[&write, first, rest], &[16, 8]);
    guest.kick(REQUESTS);
    assert_eq!(answer(&mut guest)[..4], (PIECE as u32).to_le_bytes());
    let file = std::fs::read(&path).unwrap();
    let expected = [&content[..4096], &new, &content[4096 + PIECE..]].concat();
    assert!(file == expected);
}

#[test]
fn a_folder_can_be_driven_and_saved_before_its_daemon_comes() {
    let Some(daemon) = Daemon::start() else {
        return;
    };
    let to_come = |window| Remote::folder_to_come("sealpod", window).unwrap();
    let guest = Machine::with(to_come(None), u64::MAX, private_memory());
    let mut guest = guest.moved_to(to_come(Some(Window::new().unwrap())));
    // What is asked too early is answered when there is somebody to answer it.
    let early = request(3, 1, &[0; 16]); // GETATTR, before INIT
    guest.offer(REQUESTS, &[&early], &[16, 104]);
    guest.kick(REQUESTS);
    guest.run();
    assert!(guest.done(REQUESTS).is_none());
    guest.device().attach(daemon.connect()).unwrap();
    while guest.done(REQUESTS).is_none() {
        assert!(guest.events.turn(PATIENCE).unwrap());
    }
    assert_eq!(read_hello(&mut guest), b"from the host");
    let again = guest.device().attach(daemon.connect());
    assert!(matches!(again, Err(Error::Configuration(why)) if why.contains("already")));
    let saved = guest.device().save();
    assert!(matches!(saved, Err(Error::NotSaved { kind: 26, .. })));
}

#[test]
fn large_files_come_and_go_whole_also_by_copies() {
    let (Some(one), Some(other)) = (Daemon::start(), Daemon::start()) else {
        return;
    };
    move_much(&one, Machine::new(one.device()));
    move_much(&other, other.relayed());
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
        Remote::folder(ours, "sealpod", None),
        Err(Error::Daemon { .. })
    ));
    for tag in ["", "\0", &"x".repeat(37)] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let refused = Remote::folder(ours, tag, None);
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
