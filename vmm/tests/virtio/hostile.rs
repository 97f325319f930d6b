//! Drivers that break the rules, against every device: whatever is in the rings and in guest memory,
//! the device survives, nothing outside of guest memory is touched, and a reset makes it as new.

use std::fs::File;
use std::io::Write;
use std::time::{Duration, Instant};

use sealpod_vmm::virtio::{Balloon, Block, Device, Error, Net, QueueState, Rng, Window};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::driver::{EVENT_IDX, MEMORY, Machine, Random, private_memory, shared_memory};
use crate::net::{self, Wire, frame, seen, send};
use crate::{fs, vsock};

/// Rounds against each device; each is a start, some kicks, and a reset.
const ROUNDS: u64 = 400;

fn disk() -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[0x77; 1 << 16]).unwrap();
    file
}

/// Fills memory with numbers at random, some of which mean something.
fn scribble<D: Device>(guest: &Machine<D>, random: &mut Random, from: u64, to: u64) {
    let raw: Vec<u8> = (from..to)
        .step_by(2)
        .flat_map(|_| {
            let value = match random.below(4) {
                0 => 0,
                1 => random.below(16) as u16,
                2 => 1 << random.below(16),
                _ => random.next() as u16,
            };
            value.to_le_bytes()
        })
        .collect();
    guest.memory.write_slice(&raw, GuestAddress(from)).unwrap();
}

/// Descriptors at random: mostly within memory and chained to each other.
fn tangle<D: Device>(guest: &Machine<D>, random: &mut Random, queue: usize) {
    let base = guest.rings[queue].descriptors();
    for index in 0..64 {
        let address = match random.below(8) {
            0 => random.next(),
            1 => MEMORY - random.below(8192),
            2 => base + random.below(0x3000), // the rings themselves
            _ => random.below(MEMORY),
        };
        let length = match random.below(6) {
            0 => random.next() as u32,
            1 => 0,
            2 => u32::MAX,
            _ => random.below(8192) as u32,
        };
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&address.to_le_bytes());
        raw[8..12].copy_from_slice(&length.to_le_bytes());
        raw[12..14].copy_from_slice(&(random.below(8) as u16).to_le_bytes());
        raw[14..].copy_from_slice(&(random.below(70) as u16).to_le_bytes());
        guest
            .memory
            .write_slice(&raw, GuestAddress(base + index * 16))
            .unwrap();
    }
    let available = guest.rings[queue].available();
    for entry in 0..64 {
        let head = random.below(70) as u16;
        guest
            .memory
            .write_obj(head, GuestAddress(available + 4 + entry * 2))
            .unwrap();
    }
    let index = match random.below(3) {
        0 => random.next() as u16,
        _ => random.below(64) as u16,
    };
    guest
        .memory
        .write_obj(index, GuestAddress(available + 2))
        .unwrap();
}

/// Rounds of nonsense; `alive` shows that the device works when the driver is reasonable again.
fn torment<D: Device + 'static>(device: D, seed: u64, alive: impl Fn(&mut Machine<D>)) {
    torment_amid(device, private_memory(), seed, || {}, alive);
}

/// The same while `others` do something on the host's side, once for each kick.
fn torment_amid<D: Device + 'static>(
    device: D,
    memory: GuestMemoryMmap,
    seed: u64,
    mut others: impl FnMut(),
    alive: impl Fn(&mut Machine<D>),
) {
    let mut guest = Machine::with(device, u64::MAX, memory);
    let mut random = Random(seed);
    let queues = guest.rings.len();
    for round in 0..ROUNDS {
        for queue in 0..queues {
            let ring = 0x4000 * (1 + queue as u64);
            match round % 3 {
                0 => scribble(&guest, &mut random, ring, ring + 0x3000),
                _ => tangle(&guest, &mut random, queue),
            }
        }
        scribble(&guest, &mut random, 0x10_0000, 0x10_1000);
        for _ in 0..3 {
            others();
            guest.kick(random.below(queues as u64) as usize);
            guest.run();
        }
        let (offset, value) = (random.next(), random.bytes(8));
        guest.device().write_config(offset, &value);
        guest.device().read_config(offset, &mut [0; 16]);
        guest.device().event(random.next() as u32);
        let saved = guest.device().save();
        assert!(matches!(saved, Ok(_) | Err(Error::NotSaved { .. })));
        if round % 10 == 0 {
            guest.reboot();
            alive(&mut guest);
        } else {
            guest.device().reset();
            guest.start(EVENT_IDX * random.below(2)).unwrap();
        }
    }
}

#[test]
fn rng_survives_a_senseless_driver() {
    torment(Rng::new().unwrap(), 1, |guest| {
        assert_eq!(guest.ask(0, &[], &[32]).len(), 32);
    });
}

#[test]
fn balloon_survives_a_senseless_driver() {
    torment(Balloon::new(), 2, |guest| {
        guest.ask(0, &[&[1, 0, 0, 0]], &[]);
    });
}

#[test]
fn block_survives_a_senseless_driver_and_a_read_only_disk_is_never_changed() {
    for (readonly, deep) in [(true, false), (false, false), (true, true), (false, true)] {
        if deep && !crate::block_deep::deep() {
            return;
        }
        let file = disk();
        let copy = file.try_clone().unwrap();
        torment(Block::new(file, readonly, "d").unwrap(), 3, |guest| {
            let status = guest.ask(0, &[&crate::block::header(0, 5)], &[512, 1]);
            assert_eq!(status[512], 0);
        });
        assert_eq!(copy.metadata().unwrap().len(), 1 << 16);
        if readonly {
            let mut content = vec![0; 1 << 16];
            std::os::unix::fs::FileExt::read_exact_at(&copy, &mut content, 0).unwrap();
            assert!(content.iter().all(|byte| *byte == 0x77));
        }
    }
}

#[test]
fn vsock_survives_a_senseless_driver() {
    let dir = tempfile::tempdir().unwrap();
    torment(vsock::device(dir.path()), 4, |guest| {
        guest.ask(1, &[b"not a packet"], &[]);
    });
}

#[test]
fn net_survives_a_senseless_driver_amid_frames_for_it() {
    for queues in [1, 2] {
        Wire::with(queues, |taps, host| {
            let receives = |guest: &mut Machine<Net>| {
                for _ in 0..128 {
                    guest.offer(0, &[], &[2048]);
                }
                guest.kick(0);
                guest.run();
            };
            let others = || send(&host, &[0; 10], &frame(&[1; 200]));
            let net = Net::new(taps, net::CONFIG).unwrap();
            torment_amid(net, private_memory(), 6, others, |guest| {
                receives(guest);
                let mut waiting = 0;
                while guest.done(0).is_some() {
                    waiting += 1; // what came meanwhile
                }
                assert!(waiting < 128);
                send(&host, &[0; 10], &frame(&[2; 60]));
                guest.run();
                let (_, got) = guest.done(0).unwrap();
                assert!(got.ends_with(&frame(&[2; 60])));
                net::drain(&host);
                let sent = frame(b"from a driver that has come to its senses, to the host");
                guest.ask(1, &[&[0; 12], &sent], &[]);
                while seen(&host) != sent {}
            });
        });
    }
}

#[test]
fn an_engine_in_another_process_survives_a_senseless_driver() {
    for (window, memory) in [
        (None, shared_memory()),
        (Some(Window::new().unwrap()), private_memory()),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (_engine, device) = vsock::remote(dir.path(), window);
        torment_amid(
            device,
            memory,
            7,
            || {},
            |guest| {
                vsock::refill(guest);
                guest.kick(0);
                vsock::connected_remotely(guest, dir.path());
            },
        );
    }
}

#[test]
fn a_daemon_that_sees_copies_only_is_not_kept_busy_by_a_senseless_driver() {
    let mut random = Random(12);
    for _ in 0..8 {
        let Some(daemon) = fs::Daemon::start() else {
            return;
        };
        let mut guest = daemon.relayed();
        for _ in 0..ROUNDS {
            tangle(&guest, &mut random, 1);
            guest.kick(1);
            guest.run();
            // However the driver's rings look, the daemon's are plain: it stops when it is asked to. What a
            // request says can still end it (virtiofsd does not go on after what is no FUSE message).
            let begin = Instant::now();
            guest.device().reset();
            let started = guest.start(0);
            assert!(begin.elapsed() < Duration::from_secs(5), "{started:?}");
            match started {
                Ok(()) => {}
                Err(Error::Daemon { .. }) => break,
                Err(e) => panic!("{e}"),
            }
        }
    }
}

#[test]
fn a_daemon_that_a_senseless_driver_keeps_busy_is_an_error_and_not_a_hang() {
    let Some(daemon) = fs::Daemon::start() else {
        return;
    };
    let mut guest = Machine::new(daemon.device());
    let mut random = Random(8);
    for _ in 0..ROUNDS {
        tangle(&guest, &mut random, 1);
        guest.kick(1);
        guest.run();
        guest.device().reset();
        // As soon as the daemon does not answer it is given up, and nobody waits for it again.
        let begin = Instant::now();
        match guest.start(0) {
            Ok(()) => {}
            Err(Error::Daemon { .. }) => {
                assert!(begin.elapsed() < Duration::from_secs(1));
                guest.device().reset();
                break;
            }
            Err(e) => panic!("{e}"),
        }
    }
    // Another guest's daemon has nothing to do with it.
    let other = fs::Daemon::start().unwrap();
    let mut other = Machine::new(other.device());
    assert_eq!(fs::read_hello(&mut other), b"from the host");
}

#[test]
fn requests_with_random_content_are_all_answered() {
    crate::block_deep::deep();
    let mut guest = Machine::new(Block::new(disk(), false, "d").unwrap());
    let mut random = Random(5);
    for _ in 0..5000 {
        let kind = [0, 1, 4, 8, 11, 13, random.next()][random.below(7) as usize];
        let sector = [random.below(130), random.next()][random.below(2) as usize];
        let mut said = crate::block::header(kind as u32, sector);
        let extra = random.below(1100) as usize;
        said.extend(random.bytes(extra));
        let cut = random.below(said.len() as u64) as usize;
        let (first, second) = said.split_at(cut);
        let room: Vec<u32> = (0..random.below(4))
            .map(|_| random.below(1100) as u32)
            .collect();
        let written = guest.ask(0, &[first, second], &[&room[..], &[1]].concat());
        let status = written.last().expect("a status");
        assert!([0, 1, 2].contains(status), "{status}");
    }
}

#[test]
fn the_same_buffer_many_times_in_one_request_is_bounded() {
    let mut guest = Machine::new(Block::new(disk(), false, "d").unwrap());
    let head = guest.place(16);
    let header = crate::block::header(0, 0);
    guest
        .memory
        .write_slice(&header, GuestAddress(head))
        .unwrap();
    let status = guest.place(1);
    let mut pieces = vec![(head, 16, 0)];
    pieces.extend([(0x20_0000, 8 << 20, 2); 200]); // 1.6 GiB of room
    pieces.push((status, 1, 2));
    guest.offer_pieces(0, &pieces);
    guest.kick(0);
    guest.run();
    assert_eq!(guest.bytes(status, 1), [1]);
}

#[test]
fn a_ring_that_promises_more_than_it_has_stops_that_queue_only() {
    let mut guest = Machine::new(Balloon::new());
    let index = GuestAddress(guest.rings[0].available() + 2);
    guest.memory.write_obj(1000_u16, index).unwrap();
    guest.kick(0);
    guest.run();
    assert_eq!(guest.interrupts(0), 0);
    guest.ask(1, &[&[0; 4]], &[]); // the other queue works
    guest.reboot();
    guest.ask(0, &[&[0; 4]], &[]);
}

#[test]
fn queues_outside_of_memory_are_refused_when_the_driver_starts() {
    let queue = |descriptors: u64, available: u64, used: u64, size: u16| {
        let mut queue = Queue::new(8).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(descriptors))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(available))
            .unwrap();
        queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
        queue.try_set_size(size).unwrap();
        queue.set_ready(true);
        queue
    };
    let mut guest = Machine::stopped(Rng::new().unwrap(), private_memory());
    for (descriptors, available, used) in [
        (MEMORY, 0x1000, 0x2000),
        (0x1000, MEMORY - 2, 0x2000),
        (0x1000, 0x2000, MEMORY - 4),
        (u64::MAX - 15, 0x1000, 0x2000),
        (0x1000, u64::MAX - 1, 0x2000),
        (0x1000, 0x2000, u64::MAX - 3),
    ] {
        let refused = guest.activate(0, vec![queue(descriptors, available, used, 8)]);
        assert!(
            matches!(refused, Err(Error::Queue(0))),
            "{descriptors:x} {available:x} {used:x}"
        );
    }
    let refused = guest.activate(0, vec![]);
    let expected = matches!(
        refused,
        Err(Error::Queues {
            expected: 1,
            found: 0
        })
    );
    assert!(expected);
    guest.start(0).unwrap();
    assert_eq!(guest.ask(0, &[], &[8]).len(), 8);
}

#[test]
fn a_queue_that_the_driver_left_out_is_left_alone() {
    let mut guest = Machine::stopped(Balloon::new(), private_memory());
    let queues = (0..3).map(|_| Queue::new(16).unwrap()).collect();
    guest.activate(0, queues).unwrap();
    for queue in 0..3 {
        guest.kick(queue);
        guest.device().event(queue as u32);
    }
    guest.run();
    assert_eq!((0..3).map(|n| guest.interrupts(n)).sum::<u64>(), 0);
}

#[test]
fn a_device_that_was_reset_touches_nothing() {
    let mut guest = Machine::new(Rng::new().unwrap());
    guest.offer(0, &[], &[64]);
    guest.device().reset();
    guest.device().reset();
    guest.kick(0);
    guest.run();
    guest.device().event(0);
    assert!(guest.done(0).is_none());
}

#[test]
fn a_written_down_queue_that_cannot_be_is_refused() {
    let good = QueueState::from(&Queue::new(16).unwrap());
    assert!(Queue::try_from(good).is_ok());
    for bad in [
        QueueState { size: 0, ..good },
        QueueState { size: 3, ..good },
        QueueState { size: 32, ..good },
        QueueState {
            max_size: 0,
            ..good
        },
        QueueState {
            descriptors: 1,
            ..good
        },
        QueueState { used: 2, ..good },
    ] {
        assert!(matches!(Queue::try_from(bad), Err(Error::QueueState(_))));
    }
}
