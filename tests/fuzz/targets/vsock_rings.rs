//! Any content of guest memory where the vsock device's virtqueues are: descriptors that loop, point
//! nowhere or lie about their length, indices that jump. The input is laid over the rings.
#![no_main]

use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use sealpod_vmm::vsock::{Config, Engine, Limits, queues};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Of each queue.
const SIZE: u16 = 16;

fn queue(base: u64) -> Queue {
    let mut queue = Queue::new(SIZE).expect("a queue");
    let done = (queue.try_set_desc_table_address(GuestAddress(base)))
        .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(base + 0x100)))
        .and_then(|()| queue.try_set_used_ring_address(GuestAddress(base + 0x140)));
    done.expect("aligned addresses");
    queue.set_event_idx(true);
    queue.set_ready(true);
    queue
}

fuzz_target!(|data: &[u8]| {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    let dir = DIR.get_or_init(|| tempfile::tempdir().expect("a temporary folder"));
    let config = Config {
        uds: dir.path().join("v"),
        guest_cid: 3,
        limits: Limits::default(),
    };
    let mut engine = Engine::new(&config).expect("an engine");
    // Something to say to the guest.
    let mut client = UnixStream::connect(&config.uds).expect("a client");
    let _ = std::io::Write::write_all(&mut client, b"CONNECT 1\n");
    engine.handle_events();

    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).expect("memory");
    let (mut rx, mut tx) = (queue(0x200), queue(0x600));
    // Up to four rounds: what the guest's memory holds in each.
    for image in data.chunks(0x1000).take(4) {
        let at = GuestAddress(0x200);
        memory.write_slice(image, at).expect("it fits");
        if queues::service(&mut engine, &memory, &mut rx, &mut tx).is_err() {
            break;
        }
        engine.check();
    }
});
