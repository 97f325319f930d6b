//! The device thread: pausing, going on, ending.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use sealpod_vmm::virtio::{Block, Rng};

use crate::driver::Machine;

/// Long enough that only a hang takes so long.
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn a_running_loop_serves_kicks_and_ends_when_told() {
    let mut guest = Machine::new(Rng::new().unwrap());
    let events = guest.events.clone();
    let runner = thread::spawn(move || events.run());
    guest.offer(0, &[], &[16]);
    guest.kick(0);
    while guest.done(0).is_none() {
        thread::yield_now();
    }
    guest.events.stop();
    guest.events.stop(); // twice is once
    runner.join().unwrap().unwrap();
}

#[test]
fn a_paused_loop_does_nothing_until_it_goes_on() {
    let mut guest = Machine::new(Rng::new().unwrap());
    guest.run(); // the events of the start
    guest.events.pause();
    guest.events.pause();
    guest.offer(0, &[], &[16]);
    guest.kick(0);
    let events = guest.events.clone();
    let (sender, turned) = mpsc::channel();
    thread::spawn(move || sender.send(events.turn(-1).unwrap()));
    // The event is there, and is not handled.
    assert!(turned.recv_timeout(Duration::from_millis(100)).is_err());
    assert!(guest.done(0).is_none());
    guest.events.resume();
    assert!(turned.recv_timeout(PATIENCE).unwrap());
    assert!(guest.done(0).is_some());
}

#[test]
fn a_paused_loop_can_be_ended() {
    let guest = Machine::new(Rng::new().unwrap());
    guest.events.pause();
    let events = guest.events.clone();
    let runner = thread::spawn(move || events.run());
    guest.events.stop();
    runner.join().unwrap().unwrap();
}

#[test]
fn a_detached_device_is_reset_and_hears_nothing_more() {
    let mut guest = Machine::new(Block::new(disk(), false, "d").unwrap());
    guest.run();
    guest.detach();
    guest.offer(0, &[&[0; 16]], &[1]);
    guest.kick(0);
    guest.run();
    assert!(guest.done(0).is_none());
}

fn disk() -> std::fs::File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    file
}
