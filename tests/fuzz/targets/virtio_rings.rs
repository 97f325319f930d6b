//! Any content of guest memory, for the block device, the balloon, the entropy device and, as root, the
//! network device: rings and requests, in up to four rounds. The first byte chooses the device and what
//! its driver accepted.
#![no_main]

mod tap;

use std::sync::{Arc, Mutex, OnceLock};

use libfuzzer_sys::fuzz_target;
use sealpod_vmm::virtio::{
    Activation, Balloon, Block, Device, EventLoop, Interrupt, Memory, Net, NetConfig, Rng,
    prepare_thread,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use self::tap::Wire;

/// Of each queue.
const SIZE: u16 = 16;
/// Token by which the network device hears that its tap has a frame.
const TAP: u32 = 33;
/// Sectors of the disk.
const SECTORS: u64 = 64;

struct Deaf;

impl Interrupt for Deaf {
    fn queue(&self, _: u16) {}
    fn config(&self, _: &[u8]) {}
}

/// All queues share one set of rings: what one of them does, the other finds.
fn queue() -> Queue {
    let mut queue = Queue::new(SIZE).expect("a queue");
    let done = (queue.try_set_desc_table_address(GuestAddress(0x200)))
        .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(0x300)))
        .and_then(|()| queue.try_set_used_ring_address(GuestAddress(0x340)));
    done.expect("aligned addresses");
    queue.set_ready(true);
    queue
}

fn disk(readonly: bool) -> Block {
    static DISK: OnceLock<std::fs::File> = OnceLock::new();
    let disk = DISK.get_or_init(|| {
        let file = tempfile::tempfile().expect("a disk");
        file.set_len(SECTORS * 512).expect("its size");
        file
    });
    let file = disk.try_clone().expect("a descriptor");
    assert_eq!(file.metadata().expect("its size").len(), SECTORS * 512);
    Block::new(file, readonly, "fuzz").expect("a device")
}

/// The host's side of the network device, if this process may have one.
fn wire() -> Option<&'static Wire> {
    static WIRE: OnceLock<Option<Wire>> = OnceLock::new();
    let make = || {
        let wire = Wire::new();
        (wire.inspect_err(|e| eprintln!("no network device is fuzzed: {e}"))).ok()
    };
    WIRE.get_or_init(make).as_ref()
}

fn net(wire: &Wire) -> Net {
    let config = NetConfig {
        mac: [2, 0, 0, 0, 0, 9],
        mtu: 1500,
    };
    Net::new(vec![wire.tap()], config).expect("a device")
}

/// Disks do several requests at once, where the kernel can.
fn deep() {
    static DEEP: OnceLock<()> = OnceLock::new();
    DEEP.get_or_init(|| match prepare_thread() {
        Ok(()) => {}
        Err(e) => eprintln!("disks are fuzzed with one request after the other: {e}"),
    });
}

fuzz_target!(|data: &[u8]| {
    deep();
    let Some((choice, data)) = data.split_first() else {
        return;
    };
    let wire = wire().filter(|_| choice % 5 == 4);
    let device: Arc<Mutex<dyn Device>> = match choice % 5 {
        0 => Arc::new(Mutex::new(disk(false))),
        1 => Arc::new(Mutex::new(disk(true))),
        2 => Arc::new(Mutex::new(Balloon::new())),
        3 => Arc::new(Mutex::new(Rng::new().expect("a device"))),
        _ => match wire {
            Some(wire) => Arc::new(Mutex::new(net(wire))),
            None => return,
        },
    };
    let events = EventLoop::new().expect("an event loop");
    let watch = events.attach(device.clone());
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).expect("memory");
    let mut device = device.lock().expect("no panic before");
    let queues = device.queue_sizes().len();
    let kick = || EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd");
    let activation = Activation {
        memory: Memory::new(memory.clone()),
        // Event indices; a frame for the guest in several buffers.
        features: u64::from(choice / 5 % 2) << 29 | u64::from(choice / 10 % 2) << 15 | 1 << 32,
        queues: (0..queues).map(|_| (queue(), kick())).collect(),
        interrupt: Arc::new(Deaf),
        watch,
    };
    device.activate(activation).expect("queues that are memory");
    for image in data.chunks(0x1000).take(4) {
        memory
            .write_slice(image, GuestAddress(0x200))
            .expect("it fits");
        if let Some(wire) = wire {
            wire.send();
            device.event(TAP);
        }
        for queue in 0..queues {
            device.event(queue as u32);
        }
    }
    device.save().expect("its state");
    device.reset();
});
