//! Disks: every byte where it belongs, nothing outside, and a status for every request.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};

use sealpod_vmm::virtio::{Block, Device, Error};

use crate::driver::{EVENT_IDX, Machine, Random, private_memory};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Bytes of the disk.
const SIZE: u64 = 4 << 20;
const SECTORS: u64 = SIZE / 512;

/// A disk with no byte twice in a row, and another descriptor of it.
fn disk() -> (File, File) {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&Random(7).bytes(SIZE as usize)).unwrap();
    let copy = file.try_clone().unwrap();
    (file, copy)
}

fn guest() -> (Machine<Block>, File) {
    let (file, copy) = disk();
    (
        Machine::new(Block::new(file, false, "data-1").unwrap()),
        copy,
    )
}

fn readonly() -> (Machine<Block>, File) {
    let (file, copy) = disk();
    (
        Machine::new(Block::new(file, true, "data-1").unwrap()),
        copy,
    )
}

pub(crate) fn header(kind: u32, sector: u64) -> Vec<u8> {
    let fields = [u64::from(kind).to_le_bytes(), sector.to_le_bytes()];
    fields.concat()
}

fn read(guest: &mut Machine<Block>, sector: u64, room: &[u32]) -> (Vec<u8>, u8) {
    let room = [room, &[1]].concat();
    let mut written = guest.ask(0, &[&header(IN, sector)], &room);
    let status = written.pop().unwrap();
    (written, status)
}

fn write(guest: &mut Machine<Block>, sector: u64, data: &[&[u8]]) -> u8 {
    let head = header(OUT, sector);
    let said = [&[&head[..]], data].concat();
    guest.ask(0, &said, &[1])[0]
}

fn ranges(guest: &mut Machine<Block>, kind: u32, list: &[(u64, u32, u32)]) -> u8 {
    let mut said = header(kind, 0);
    for (sector, count, flags) in list {
        said.extend(sector.to_le_bytes());
        said.extend(count.to_le_bytes());
        said.extend(flags.to_le_bytes());
    }
    guest.ask(0, &[&said], &[1])[0]
}

fn content(mut file: &File) -> Vec<u8> {
    let mut all = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut all).unwrap();
    all
}

#[test]
fn a_read_gives_what_is_on_the_disk_in_any_pieces() {
    let (mut guest, file) = guest();
    let expected = content(&file);
    for room in [
        &[512][..],
        &[4096, 4096],
        &[1, 510, 1],
        &[700, 836],
        &[512; 100],
    ] {
        let length = room.iter().sum::<u32>() as usize;
        for sector in [0, 1, 77, SECTORS - length as u64 / 512] {
            let (data, status) = read(&mut guest, sector, room);
            let at = sector as usize * 512;
            assert_eq!(status, OK);
            assert!(data == expected[at..at + length], "{sector} {room:?}");
        }
    }
}

#[test]
fn random_writes_and_zeroes_leave_exactly_what_a_model_has() {
    let (mut guest, file) = guest();
    let mut model = content(&file);
    let mut random = Random(0xb10c);
    for _ in 0..2000 {
        let sector = random.below(SECTORS);
        let count = 1 + random.below(16.min(SECTORS - sector));
        let range = sector as usize * 512..(sector + count) as usize * 512;
        match random.below(4) {
            0 => {
                let unmap = random.below(2) as u32;
                let list = [(sector, count as u32, unmap)];
                assert_eq!(ranges(&mut guest, WRITE_ZEROES, &list), OK);
                model[range].fill(0);
            }
            1 => {
                let (data, status) = read(&mut guest, sector, &[count as u32 * 512]);
                assert_eq!(status, OK);
                assert!(data == model[range]);
            }
            _ => {
                let data = random.bytes(range.len());
                let (first, second) = data.split_at(random.below(data.len() as u64) as usize);
                assert_eq!(write(&mut guest, sector, &[first, second]), OK);
                model[range].copy_from_slice(&data);
            }
        }
    }
    assert!(content(&file) == model);
    assert_eq!(file.metadata().unwrap().len(), SIZE);
}

#[test]
fn nothing_beyond_the_end_can_be_reached() {
    let (mut guest, file) = guest();
    let before = content(&file);
    for (sector, count) in [
        (SECTORS, 1),
        (SECTORS - 1, 2),
        (u64::MAX, 1),
        (u64::MAX / 512, 1),
        (u64::MAX / 512 + 1, 1),
        (1 << 55, 1),
    ] {
        let data = vec![1; count * 512];
        assert_eq!(write(&mut guest, sector, &[&data]), IOERR, "{sector}");
        assert_eq!(read(&mut guest, sector, &[data.len() as u32]).1, IOERR);
        let list = [(sector, count as u32, 0)];
        assert_eq!(ranges(&mut guest, DISCARD, &list), IOERR);
        assert_eq!(ranges(&mut guest, WRITE_ZEROES, &list), IOERR);
    }
    assert!(content(&file) == before);
    assert_eq!(file.metadata().unwrap().len(), SIZE);
}

#[test]
fn malformed_requests_fail_and_change_nothing() {
    let (mut guest, file) = guest();
    let before = content(&file);
    assert_eq!(write(&mut guest, 0, &[&[1; 511]]), IOERR);
    assert_eq!(read(&mut guest, 0, &[513]).1, IOERR);
    assert_eq!(guest.ask(0, &[&[0; 15]], &[1]), [IOERR]);
    assert_eq!(guest.ask(0, &[], &[1]), [IOERR]);
    assert_eq!(guest.ask(0, &[&header(OUT, 0), &[1; 512]], &[]), b"");
    assert_eq!(guest.ask(0, &[&header(99, 0)], &[1]), [UNSUPP]);
    assert_eq!(ranges(&mut guest, DISCARD, &[]), IOERR);
    assert_eq!(ranges(&mut guest, DISCARD, &[(0, 8, 1)]), UNSUPP);
    assert_eq!(ranges(&mut guest, WRITE_ZEROES, &[(0, 8, 2)]), UNSUPP);
    assert_eq!(ranges(&mut guest, WRITE_ZEROES, &[(0, 1, 0); 2]), IOERR);
    assert_eq!(ranges(&mut guest, DISCARD, &[(0, u32::MAX, 0)]), IOERR);
    assert_eq!(ranges(&mut guest, DISCARD, &[(0, 1, 0); 33]), IOERR);
    // One bad range and none is done.
    assert_eq!(
        ranges(&mut guest, DISCARD, &[(0, 8, 0), (SECTORS, 1, 0)]),
        IOERR
    );
    assert!(content(&file) == before);
}

#[test]
fn a_read_only_disk_is_never_changed() {
    let (mut guest, file) = readonly();
    let before = content(&file);
    assert_eq!(
        guest.device().features() & (1 << 5 | 1 << 13 | 1 << 14),
        1 << 5
    );
    assert_eq!(write(&mut guest, 0, &[&[1; 512]]), IOERR);
    assert_eq!(ranges(&mut guest, DISCARD, &[(0, 8, 0)]), IOERR);
    assert_eq!(ranges(&mut guest, WRITE_ZEROES, &[(0, 8, 0)]), IOERR);
    assert_eq!(guest.ask(0, &[&header(FLUSH, 0)], &[1]), [OK]);
    assert_eq!(
        read(&mut guest, 3, &[512]),
        (before[1536..2048].to_vec(), OK)
    );
    assert!(content(&file) == before);
}

#[test]
fn a_discard_frees_space_on_the_host() {
    let (mut guest, file) = guest();
    file.sync_all().unwrap(); // so that blocks are allocated
    let before = file.metadata().unwrap().blocks();
    assert_eq!(
        ranges(&mut guest, DISCARD, &[(0, 2048, 0), (4096, 2048, 0)]),
        OK
    );
    assert!(file.metadata().unwrap().blocks() < before);
    assert_eq!(file.metadata().unwrap().len(), SIZE);
}

#[test]
fn a_disk_says_who_it_is_and_how_large() {
    let (mut guest, _) = guest();
    let mut id = guest.ask(0, &[&header(GET_ID, 0)], &[20, 1]);
    assert_eq!(id.pop(), Some(OK));
    assert_eq!(id, b"data-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    let mut capacity = [0; 8];
    guest.device().read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), SECTORS);
    let mut beyond = [1; 100];
    guest.device().read_config(u64::MAX - 3, &mut beyond);
    assert_eq!(beyond, [0; 100]);
}

#[test]
fn what_cannot_be_a_disk_is_refused_by_name() {
    let refused = |file: File, serial: &str| match Block::new(file, false, serial) {
        Err(Error::Configuration(why)) => why,
        _ => panic!("not refused"),
    };
    let file = || disk().0;
    assert!(refused(file(), "").contains("1 to 20"));
    assert!(refused(file(), "123456789012345678901").contains("1 to 20"));
    assert!(refused(file(), "sp ace").contains("letters"));
    assert!(refused(tempfile::tempfile().unwrap(), "tiny").contains("less than 512"));
    assert!(refused(File::open("/dev/null").unwrap(), "null").contains("neither"));
}

#[test]
fn a_driver_without_event_indices_is_told_unless_it_says_no() {
    let (file, _) = disk();
    let block = Block::new(file, false, "d").unwrap();
    let features = block.features() & !EVENT_IDX;
    let mut guest = Machine::with(block, features, private_memory());
    guest.ask(0, &[&header(FLUSH, 0)], &[1]);
    assert_eq!(guest.interrupts(0), 1);
    let flags = vm_memory::GuestAddress(guest.rings[0].available());
    vm_memory::Bytes::write_obj(&guest.memory, 1_u16, flags).unwrap();
    guest.ask(0, &[&header(FLUSH, 0)], &[1]);
    assert_eq!(guest.interrupts(0), 0);
}

#[test]
fn many_requests_at_once_are_one_interrupt() {
    let (mut guest, _) = guest();
    for sector in 0..50 {
        guest.offer(0, &[&header(IN, sector)], &[512, 1]);
    }
    guest.kick(0);
    guest.run();
    assert_eq!(guest.interrupts(0), 1);
    for _ in 0..50 {
        assert_eq!(guest.done(0).unwrap().1[512], OK);
    }
}

#[test]
fn indirect_descriptors_are_followed() {
    let (mut guest, file) = guest();
    let (table, head, data) = (guest.place(48), guest.place(16), guest.place(513));
    let mut raw = Vec::new();
    for (address, length, flags, next) in
        [(head, 16, 1, 1), (data, 512, 3, 2), (data + 512, 1, 2, 0)]
    {
        raw.extend(u64::to_le_bytes(address));
        raw.extend(u32::to_le_bytes(length));
        raw.extend(u16::to_le_bytes(flags));
        raw.extend(u16::to_le_bytes(next));
    }
    let memory = guest.memory.clone();
    let put = |at, bytes: &[u8]| {
        vm_memory::Bytes::write_slice(&memory, bytes, vm_memory::GuestAddress(at)).unwrap();
    };
    put(table, &raw);
    put(head, &header(IN, 9));
    put(data + 512, &[0xff]);
    guest.offer_pieces(0, &[(table, 48, 4)]);
    guest.kick(0);
    guest.run();
    let mut expected = [0; 512];
    file.read_exact_at(&mut expected, 9 * 512).unwrap();
    assert_eq!(guest.bytes(data, 513), [&expected[..], &[OK]].concat());
}

#[test]
fn a_moved_guest_finds_its_disk_and_its_requests() {
    let (mut guest, file) = guest();
    assert_eq!(write(&mut guest, 5, &[&[0x42; 512]]), OK);
    guest.offer(0, &[&header(IN, 5)], &[512, 1]); // not kicked before the move
    let device = Block::new(file, false, "data-1").unwrap();
    let mut guest = guest.moved_to(device);
    guest.run();
    assert_eq!(guest.done(0).unwrap().1, [&[0x42; 512][..], &[OK]].concat());
    assert_eq!(read(&mut guest, 5, &[512]).0, [0x42; 512]);
}
