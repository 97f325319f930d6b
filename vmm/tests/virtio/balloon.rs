//! The balloon: what the guest gives up is forgotten, everything else stays.

use std::sync::atomic::Ordering;

use sealpod_vmm::virtio::{Balloon, Device};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::driver::{MEMORY, Machine, private_memory, shared_memory};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORT: usize = 2;
const PAGE: u64 = 4096;

fn guest(memory: GuestMemoryMmap) -> Machine<Balloon> {
    let balloon = Balloon::new();
    let features = balloon.features();
    Machine::with(balloon, features, memory)
}

fn numbers(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

#[test]
fn pages_in_the_balloon_are_forgotten_and_their_neighbours_are_not() {
    for memory in [shared_memory(), private_memory()] {
        let mut guest = guest(memory);
        let page = |n: u64| GuestAddress((2 << 20) + n * PAGE);
        for n in 0..8 {
            guest.memory.write_obj(0x5ea1_u32, page(n)).unwrap();
        }
        let first = (2 << 20) / PAGE as u32;
        let given = numbers(&[first + 5, first + 2, first + 3]);
        guest.ask(INFLATE, &[&given], &[]);
        let left: Vec<bool> = (0..8)
            .map(|n| guest.memory.read_obj::<u32>(page(n)).unwrap() != 0)
            .collect();
        assert_eq!(left, [true, true, false, false, true, false, true, true]);
        guest.ask(DEFLATE, &[&given], &[]);
        guest.memory.write_obj(7_u32, page(2)).unwrap();
        assert_eq!(guest.memory.read_obj::<u32>(page(2)).unwrap(), 7);
    }
}

#[test]
fn reported_ranges_are_forgotten_and_partial_pages_are_not() {
    for memory in [shared_memory(), private_memory()] {
        let mut guest = guest(memory);
        let base = 4 << 20;
        let mark = |guest: &Machine<Balloon>, at: u64| {
            guest.memory.write_obj(1_u8, GuestAddress(at)).unwrap();
        };
        for n in 0..8 {
            mark(&guest, base + n * PAGE);
        }
        mark(&guest, base + PAGE + 100);
        // From the middle of page 1 to the middle of page 4.
        guest.offer_pieces(REPORT, &[(base + PAGE + 50, 3 * PAGE as u32, 2)]);
        guest.kick(REPORT);
        guest.run();
        guest.done(REPORT).unwrap();
        let left: Vec<u8> = (0..6).map(|n| guest.bytes(base + n * PAGE, 1)[0]).collect();
        assert_eq!(left, [1, 1, 0, 0, 1, 1]);
        assert_eq!(guest.bytes(base + PAGE + 100, 1), [1]);
    }
}

#[test]
fn pages_that_do_not_exist_are_ignored() {
    let mut guest = guest(shared_memory());
    let beyond = (MEMORY / PAGE) as u32;
    let given = numbers(&[beyond, beyond + 1, u32::MAX, u32::MAX - 1]);
    guest.ask(INFLATE, &[&given], &[]);
    guest.ask(INFLATE, &[b"odd"], &[]);
    guest.ask(INFLATE, &[&vec![0xff; 1 << 20]], &[]);
}

#[test]
fn the_guest_is_told_the_target_and_tells_what_it_gave() {
    let guest = guest(shared_memory());
    guest.device().set_target((3 << 20) + 5);
    assert_eq!(guest.told.config.load(Ordering::SeqCst), 1);
    let mut target = [0; 4];
    guest.device().read_config(0, &mut target);
    assert_eq!(u32::from_le_bytes(target), 768);
    guest.device().write_config(4, &100_u32.to_le_bytes());
    assert_eq!(guest.device().actual(), 100 * PAGE);
    // What is not the driver's to write stays.
    guest.device().write_config(0, &[9; 4]);
    guest.device().write_config(u64::MAX, &[9; 4]);
    guest.device().write_config(4, &[9; 3]);
    let mut config = [0; 12];
    guest.device().read_config(0, &mut config);
    assert_eq!(config, [0, 3, 0, 0, 100, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_moved_guest_keeps_its_balloon() {
    let guest = guest(shared_memory());
    guest.device().set_target(8 << 20);
    guest.device().write_config(4, &5_u32.to_le_bytes());
    let guest = guest.moved_to(Balloon::new());
    let mut config = [0; 8];
    guest.device().read_config(0, &mut config);
    assert_eq!(config, [0, 8, 0, 0, 5, 0, 0, 0]);
}

#[test]
fn a_guest_that_takes_back_what_is_still_wanted_is_short_of_memory() {
    let mut balloon = Balloon::new();
    let (tell, told) = std::sync::mpsc::channel();
    balloon.when_pressed(move |left| tell.send(left).unwrap());
    let has = |balloon: &mut Balloon, pages: u32| {
        balloon.write_config(4, &pages.to_le_bytes());
        told.try_iter().collect::<Vec<_>>()
    };
    balloon.set_target(100 * PAGE);
    assert!(has(&mut balloon, 60).is_empty());
    assert!(has(&mut balloon, 100).is_empty());
    // By itself.
    assert_eq!(has(&mut balloon, 70), [70 * PAGE]);
    // The host wants less: nobody is short.
    balloon.set_target(20 * PAGE);
    assert!(has(&mut balloon, 20).is_empty());
    assert_eq!(has(&mut balloon, 0), [0]);
}
