//! Devices served by a thread that may do no more than a VMM's: what of its rules no guest of the lab needs.

use std::fs::File;

use sealpod_vmm::confine::{self, May, Thread};
use sealpod_vmm::virtio::{Block, Device, prepare_thread};

use crate::block::header;
use crate::driver::{Machine, private_memory};

const FLUSH: u64 = 1 << 9;
// Types of requests (VIRTIO 1.2, 5.2.6).
const OUT: u32 = 1;
const DO_FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// Runs this in a confined thread of the devices' name.
fn as_devices<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let confined = move || {
        if let Err(e) = prepare_thread() {
            eprintln!("SKIPPED in part: no io_uring here: {e}");
        }
        confine::thread(Thread::Devices, May::Run).unwrap();
        work()
    };
    let thread = std::thread::Builder::new().name("devices".into());
    thread.spawn(confined).unwrap().join().unwrap()
}

/// On a file system that cannot zero a range, only free it.
fn disk() -> File {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(1 << 20).unwrap();
    file
}

#[test]
fn a_confined_thread_can_flush_discard_and_zero_a_disk() {
    let disk = Block::new(disk(), false, "d").unwrap();
    let mut guest = Machine::new(disk);
    let _guest = as_devices(move || {
        // Sectors 8 to 15; no flags.
        let range = [8_u64.to_le_bytes(), 8_u64.to_le_bytes()].concat();
        for (kind, data) in [
            (OUT, &[7; 8192][..]),
            (DO_FLUSH, &[]),
            (DISCARD, &range),
            (WRITE_ZEROES, &range),
        ] {
            let status = guest.ask(0, &[&header(kind, 0), data], &[1]);
            assert_eq!(status, [0], "{kind}");
        }
        guest
    });
}

#[test]
fn a_confined_thread_can_do_several_requests_at_once() {
    let disk = Block::new(disk(), false, "d").unwrap();
    let mut guest = Machine::new(disk);
    let mut guest = as_devices(move || {
        for sector in 0..8 {
            guest.offer(0, &[&header(OUT, sector), &[7; 512]], &[1]);
        }
        guest.kick(0);
        guest.run();
        guest
    });
    let answers = std::iter::from_fn(|| guest.done(0)).map(|(_, status)| status);
    assert!(answers.eq(std::iter::repeat_n(vec![0], 8)));
}

#[test]
fn a_confined_thread_can_write_through_and_close_a_disk() {
    let disk = Block::new(disk(), false, "d").unwrap();
    let features = disk.features() & !FLUSH;
    let mut guest = Machine::with(disk, features, private_memory());
    let guest = as_devices(move || {
        let status = guest.ask(0, &[&header(OUT, 0), &[7; 512]], &[1]);
        assert_eq!(status, [0]);
        guest
    });
    // Who takes a device out resets it; who served it meanwhile may be its last owner.
    guest.device().reset();
    as_devices(move || drop(guest));
}
