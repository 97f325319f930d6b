//! Disks that do several requests at once: the same bytes and answers as one after the other, and nothing under way when a
//! turn has ended.
#![expect(unsafe_code, reason = "advice on a file has no safe interface")]

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use sealpod_vmm::virtio::{Block, prepare_thread};
use vm_memory::{Bytes, GuestAddress};

use crate::block::header;
use crate::driver::{Machine, Random};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;

const OK: u8 = 0;
const IOERR: u8 = 1;

/// Of the disk.
const SECTORS: u64 = 4096;
/// Requests of a turn, each with its part of the disk.
const PARTS: u64 = 32;

/// Has the disks of this test do several requests at once.
pub(crate) fn deep() -> bool {
    let can = prepare_thread();
    if let Err(e) = &can {
        eprintln!("SKIPPED: no io_uring here: {e}");
    }
    can.is_ok()
}

/// A guest with a disk, the disk, and what is on it.
fn guest() -> (Machine<Block>, File, Vec<u8>) {
    let content = Random(17).bytes(SECTORS as usize * 512);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&content).unwrap();
    let disk = Block::new(file.try_clone().unwrap(), false, "deep").unwrap();
    (Machine::new(disk), file, content)
}

/// Offers a request in a part of the disk that no other of the turn touches. Returns its head, and what the answer
/// must be.
fn offer(
    guest: &mut Machine<Block>,
    random: &mut Random,
    model: &mut [u8],
    part: u64,
) -> (u16, Vec<u8>) {
    let own = SECTORS / PARTS;
    let sector = part * own + random.below(own / 2);
    let count = 1 + random.below(own / 2) as usize;
    let range = sector as usize * 512..(sector as usize + count) * 512;
    match random.below(7) {
        0..3 => {
            let half = count as u32 * 256;
            let head = guest.offer(0, &[&header(IN, sector)], &[half, half, 1]);
            (head, [&model[range], &[OK]].concat())
        }
        3..6 => {
            let data = random.bytes(count * 512);
            let (first, second) = data.split_at(data.len() / 3);
            let head = guest.offer(0, &[&header(OUT, sector), first, second], &[1]);
            model[range].copy_from_slice(&data);
            (head, vec![OK])
        }
        _ => {
            let (what, answer) = match random.below(2) {
                0 => (header(FLUSH, 0), OK),
                _ => (header(OUT, SECTORS), IOERR),
            };
            let data: &[u8] = if answer == OK { &[] } else { &[7; 512] };
            (guest.offer(0, &[&what, data], &[1]), vec![answer])
        }
    }
}

#[test]
fn many_requests_at_once_get_the_answers_of_one_after_the_other() {
    if !deep() {
        return;
    }
    let (mut guest, file, mut model) = guest();
    let mut random = Random(0xdee9);
    for _ in 0..200 {
        let count = 1 + random.below(PARTS);
        let mut expected = HashMap::new();
        for part in 0..count {
            let (head, answer) = offer(&mut guest, &mut random, &mut model, part);
            expected.insert(head, answer);
        }
        guest.kick(0);
        guest.run();
        while let Some((head, answer)) = guest.done(0) {
            let wanted = expected.remove(&head).expect("an answer to each");
            assert!(answer == wanted, "{} bytes", answer.len());
        }
        assert_eq!(expected.len(), 0, "requests without an answer");
        assert!(guest.interrupts(0) > 0);
    }
    let mut content = vec![0; model.len()];
    file.read_exact_at(&mut content, 0).unwrap();
    assert!(content == model);
}

#[test]
fn a_disk_that_became_shorter_fails_what_is_beyond_its_end_only() {
    if !deep() {
        return;
    }
    let (mut guest, file, content) = guest();
    file.set_len(8 * 512).unwrap();
    // Before the end, across it, and after it.
    let offers = [0, 6, 100].map(|sector| guest.offer(0, &[&header(IN, sector)], &[2048, 1]));
    guest.kick(0);
    guest.run();
    let answers: HashMap<u16, Vec<u8>> = std::iter::from_fn(|| guest.done(0)).collect();
    let status = offers.map(|head| answers[&head][2048]);
    assert_eq!(status, [OK, IOERR, IOERR]);
    assert!(answers[&offers[0]][..2048] == content[..2048]);
}

#[test]
fn a_ring_that_breaks_stops_until_the_driver_comes_again() {
    if !deep() {
        return;
    }
    let (mut guest, _file, content) = guest();
    for sector in 0..3 {
        guest.offer(0, &[&header(IN, sector)], &[512, 1]);
    }
    // A fourth that is no descriptor.
    let available = guest.rings[0].available();
    let entries = [(4 + 3 * 2, 5000_u16), (2, 4)];
    for (at, value) in entries {
        (guest.memory.write_obj(value, GuestAddress(available + at))).unwrap();
    }
    guest.kick(0);
    guest.run();
    assert_eq!(guest.done(0), None);
    guest.reboot();
    let answer = guest.ask(0, &[&header(IN, 9)], &[512, 1]);
    assert!(answer[..512] == content[9 * 512..10 * 512] && answer[512] == OK);
}

/// Requests of 4 KiB in a second, at places at random, in turns of 32; of what is read nothing or all is in the host's
/// page cache.
fn requests_per_second(file: &File, kind: u32, cached: bool) -> f64 {
    const TURNS: u64 = 200;
    let places = file.metadata().unwrap().len() / 4096;
    let disk = Block::new(file.try_clone().unwrap(), kind == IN, "speed").unwrap();
    let mut guest = Machine::new(disk);
    let mut random = Random(3);
    let advice = match cached {
        true => libc::POSIX_FADV_WILLNEED,
        false => libc::POSIX_FADV_DONTNEED,
    };
    for advice in [advice, libc::POSIX_FADV_RANDOM] {
        // SAFETY: no pointers are passed.
        let advised = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, advice) };
        assert_eq!(advised, 0);
    }
    let data = [5; 4096];
    let mut spent = Duration::ZERO;
    for _ in 0..TURNS {
        for _ in 0..PARTS {
            let header = header(kind, random.below(places) * 8);
            match kind {
                IN => guest.offer(0, &[&header], &[4096, 1]),
                _ => guest.offer(0, &[&header, &data], &[1]),
            };
        }
        guest.kick(0);
        let begin = Instant::now();
        guest.run();
        spent += begin.elapsed();
        let answers = std::iter::from_fn(|| guest.done(0));
        let good = answers.filter(|(_, answer)| answer.last() == Some(&OK));
        assert_eq!(good.count() as u64, PARTS);
    }
    (TURNS * PARTS) as f64 / spent.as_secs_f64()
}

#[test]
#[ignore = "a measurement: docs/virtio.md has its figures"]
fn speed_of_many_at_once() {
    let mut file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for _ in 0..512 {
        file.write_all(&Random(1).bytes(1 << 20)).unwrap();
    }
    file.sync_all().unwrap();
    for (what, kind, cached) in [
        ("reads of the disk", IN, false),
        ("reads of the page cache", IN, true),
        ("writes", OUT, true),
    ] {
        for _ in 0..3 {
            let measure = || requests_per_second(&file, kind, cached);
            let one = std::thread::scope(|s| s.spawn(measure).join().unwrap());
            let work = || deep().then(measure);
            let many = std::thread::scope(|s| s.spawn(work).join().unwrap());
            eprintln!(
                "{what}, 4 KiB, in a second: {one:.0} one after the other, {many:.0?} at once"
            );
        }
    }
}
