//! What a guest reads of a slot, without a guest.

use super::page::{CONFIG_CHANGE, CONFIG_GENERATION, INTERRUPT_STATUS};
use super::*;
use crate::virtio::{Balloon, Device, EventLoop};
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use vm_memory::{GuestAddress, GuestMemoryMmap};

const STATUS: u64 = 0x70;

/// A slot with a balloon, what the guest reads of it, and the loop that would serve it.
fn balloon() -> (Transport, Arc<Mutex<Balloon>>, EventLoop) {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
    let eventfd = || EventFd::new(libc::EFD_NONBLOCK).expect("eventfd");
    let page = Box::leak(Box::default());
    let kicks = (0..3).map(|_| eventfd()).collect();
    let mut slot = Transport::new(Memory::new(memory), eventfd(), kicks, page);
    assert_eq!(read(&slot, 0x08), 0, "an empty slot has no device");
    let events = EventLoop::new().expect("event loop");
    let device = Arc::new(Mutex::new(Balloon::new()));
    let watch = events.attach(device.clone());
    assert!(slot.plug(device.clone(), watch));
    (slot, device, events)
}

fn read(slot: &Transport, offset: u64) -> u32 {
    slot.page.at(offset).load(Ordering::SeqCst)
}

fn write(slot: &mut Transport, offset: u64, value: u32) {
    slot.write(offset, &value.to_le_bytes());
}

#[test]
fn what_a_guest_reads_follows_what_it_writes() {
    let (mut slot, device, _events) = balloon();
    assert_eq!([0, 4, 8].map(|o| read(&slot, o)), [MAGIC, VERSION, 5]);
    let features = lock_balloon(&device).features();
    for (select, half) in [(0, features as u32), (1, (features >> 32) as u32), (2, 0)] {
        write(&mut slot, 0x14, select);
        assert_eq!(read(&slot, 0x10), half, "features {select}");
    }
    for (queue, size) in [(0, 16), (2, 32), (3, 0), (u32::MAX, 0)] {
        write(&mut slot, 0x30, queue);
        assert_eq!(read(&slot, 0x34), size, "queue {queue}");
    }
    write(&mut slot, STATUS, 3);
    assert_eq!(read(&slot, STATUS), 3);
    write(&mut slot, STATUS, 3 | FEATURES_OK);
    assert_eq!(read(&slot, STATUS), 3, "VERSION_1 was not accepted");
    write(&mut slot, STATUS, 0);
    assert_eq!(read(&slot, STATUS), 0);
    // What the driver may write of the configuration is read back; nothing else changes.
    write(&mut slot, CONFIG + 4, 7);
    write(&mut slot, CONFIG, 9);
    assert_eq!([0, 4, 8].map(|o| read(&slot, CONFIG + o)), [0, 7, 0]);
    assert!(slot.unplug().is_some());
    assert_eq!([8, CONFIG + 4].map(|o| read(&slot, o)), [0, 0]);
}

#[test]
fn a_change_of_the_configuration_is_shown_until_the_driver_has_seen_it() {
    let (mut slot, device, _events) = balloon();
    for (select, half) in [(0, 0), (1, 1)] {
        write(&mut slot, 0x24, select);
        write(&mut slot, 0x20, half);
    }
    let before = read(&slot, CONFIG_GENERATION);
    for status in [3, 3 | FEATURES_OK, 3 | FEATURES_OK | DRIVER_OK] {
        write(&mut slot, STATUS, status);
        assert_eq!(read(&slot, STATUS), status);
    }
    assert_eq!(read(&slot, INTERRUPT_STATUS), USED_BUFFER);
    lock_balloon(&device).set_target(3 << 12);
    assert_eq!(read(&slot, CONFIG), 3);
    assert_eq!(read(&slot, CONFIG_GENERATION), before + 1);
    assert_eq!(read(&slot, INTERRUPT_STATUS), USED_BUFFER | CONFIG_CHANGE);
    write(&mut slot, INTERRUPT_ACK, USED_BUFFER | CONFIG_CHANGE);
    assert_eq!(read(&slot, INTERRUPT_STATUS), USED_BUFFER);
}

fn lock_balloon(device: &Mutex<Balloon>) -> std::sync::MutexGuard<'_, Balloon> {
    device.lock().expect("lock")
}

#[test]
fn a_device_is_driven_from_the_drivers_first_word_until_it_has_let_go() {
    let (mut slot, ..) = balloon();
    assert!(!slot.is_driven());
    // ACKNOWLEDGE, then DRIVER; a driver that goes resets, and Linux acknowledges again.
    for (status, driven) in [(1, false), (2, true), (0, false), (1, false)] {
        write(&mut slot, STATUS, status);
        assert_eq!(slot.is_driven(), driven, "{status}");
    }
    assert!(slot.unplug().is_some());
    assert!(!slot.is_driven());
}
