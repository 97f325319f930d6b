//! Entropy.

use sealpod_vmm::virtio::Rng;

use crate::driver::Machine;

#[test]
fn every_request_is_filled_with_bytes_that_never_come_again() {
    let mut guest = Machine::new(Rng::new().unwrap());
    let first = guest.ask(0, &[], &[20, 44]);
    let second = guest.ask(0, &[], &[64]);
    assert_eq!((first.len(), second.len()), (64, 64));
    assert_ne!(first, second);
    assert_ne!(first, [0; 64]);
}

#[test]
fn a_huge_request_gets_a_part() {
    let mut guest = Machine::new(Rng::new().unwrap());
    assert_eq!(guest.ask(0, &[], &[8 << 20]).len(), 4096);
}

#[test]
fn a_request_without_room_is_given_back() {
    let mut guest = Machine::new(Rng::new().unwrap());
    assert_eq!(guest.ask(0, &[b"no room"], &[]), b"");
}

#[test]
fn a_moved_guest_goes_on_where_it_was() {
    let mut guest = Machine::new(Rng::new().unwrap());
    for _ in 0..5 {
        guest.ask(0, &[], &[8]);
    }
    guest.offer(0, &[], &[8]); // not kicked before the move
    let mut guest = guest.moved_to(Rng::new().unwrap());
    guest.run();
    assert_eq!(guest.done(0).unwrap().1.len(), 8);
    assert!(guest.interrupts(0) > 0);
    assert_eq!(guest.ask(0, &[], &[8]).len(), 8);
}
