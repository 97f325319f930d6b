//! A guest's virtio driver and transport, as far as devices can tell: real split virtqueues in guest
//! memory, filled and emptied from the driver's side (VIRTIO 1.2, section 2.7), an event loop, and
//! counted interrupts. Knows no device.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use sealpod_vmm::virtio::{
    Activation, Device, Error, EventLoop, Interrupt, Memory, QueueState, Saved, Watch,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

/// Guest memory, bytes.
pub(crate) const MEMORY: u64 = 16 << 20;
/// Where data of chains lies; below are the rings.
const DATA: u64 = 0x10_0000;
/// Bytes for each ring.
const RING: u64 = 0x4000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const EVENT_IDX: u64 = 1 << 29;

pub(crate) fn eventfd() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap()
}

/// Memory of a file, as devices in other processes need it.
pub(crate) fn shared_memory() -> GuestMemoryMmap {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MEMORY).unwrap();
    let region = MmapRegion::from_file(FileOffset::new(file, 0), MEMORY as usize).unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    GuestMemoryMmap::from_regions(vec![region]).unwrap()
}

/// Memory that only this process has.
pub(crate) fn private_memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap()
}

/// Counts what the guest is told.
pub(crate) struct Told {
    pub(crate) queues: [AtomicU64; 64],
    pub(crate) config: AtomicU64,
    /// What another process may signal instead, if the transport has such a thing.
    pub(crate) direct: Mutex<Option<EventFd>>,
}

impl Interrupt for Told {
    fn queue(&self, index: u16) {
        self.queues[usize::from(index)].fetch_add(1, Ordering::SeqCst);
    }

    fn config(&self, _config: &[u8]) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }

    fn notifier(&self, _index: u16) -> Option<EventFd> {
        let direct = self.direct.lock().unwrap();
        direct.as_ref().map(|direct| direct.try_clone().unwrap())
    }
}

/// A chain that the device has: its descriptors, and the address and length of its writable pieces.
type Offered = (Vec<u16>, Vec<(u64, u32)>);

/// One ring, driver's side.
pub(crate) struct Ring {
    base: u64,
    size: u16,
    free: Vec<u16>,
    /// By head.
    chains: Vec<Option<Offered>>,
    added: u16,
    seen: u16,
}

impl Ring {
    fn new(index: usize, size: u16) -> Self {
        Self {
            base: RING * (1 + index as u64),
            size,
            free: (0..size).rev().collect(),
            chains: vec![None; size.into()],
            added: 0,
            seen: 0,
        }
    }

    pub(crate) fn descriptors(&self) -> u64 {
        self.base
    }

    pub(crate) fn available(&self) -> u64 {
        self.base + 0x1000
    }

    pub(crate) fn used(&self) -> u64 {
        self.base + 0x2000
    }

    /// The same ring as the device sees it.
    fn device_side(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        let at = GuestAddress;
        queue
            .try_set_desc_table_address(at(self.descriptors()))
            .unwrap();
        queue
            .try_set_avail_ring_address(at(self.available()))
            .unwrap();
        queue.try_set_used_ring_address(at(self.used())).unwrap();
        queue.set_ready(true);
        queue
    }
}

/// A guest with one device.
pub(crate) struct Machine<D: Device + 'static> {
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) events: Arc<EventLoop>,
    pub(crate) told: Arc<Told>,
    pub(crate) rings: Vec<Ring>,
    pub(crate) kicks: Vec<EventFd>,
    device: Arc<Mutex<D>>,
    watch: Watch,
    next_data: u64,
}

impl<D: Device + 'static> Machine<D> {
    /// A guest whose driver accepted everything.
    pub(crate) fn new(device: D) -> Self {
        let features = device.features();
        Self::with(device, features, shared_memory())
    }

    /// A guest whose driver accepted `features`.
    pub(crate) fn with(device: D, features: u64, memory: GuestMemoryMmap) -> Self {
        let mut machine = Self::stopped(device, memory);
        machine.start(features).unwrap();
        machine
    }

    /// A guest whose driver is not up.
    pub(crate) fn stopped(device: D, memory: GuestMemoryMmap) -> Self {
        let sizes = device.queue_sizes().to_vec();
        let device = Arc::new(Mutex::new(device));
        let events = Arc::new(EventLoop::new().unwrap());
        let watch = events.attach(device.clone());
        let kicks = sizes.iter().map(|_| eventfd()).collect();
        Self {
            memory,
            events,
            told: Arc::new(Told {
                queues: [const { AtomicU64::new(0) }; 64],
                config: AtomicU64::new(0),
                direct: Mutex::new(None),
            }),
            rings: rings(&sizes),
            kicks,
            device,
            watch,
            next_data: DATA,
        }
    }

    pub(crate) fn device(&self) -> MutexGuard<'_, D> {
        self.device.lock().unwrap()
    }

    /// The driver is up, with empty rings.
    pub(crate) fn start(&mut self, features: u64) -> Result<(), Error> {
        let queues = self.rings.iter().map(Ring::device_side).collect();
        self.activate(features, queues)
    }

    /// Hands these queues to the device.
    pub(crate) fn activate(&mut self, features: u64, queues: Vec<Queue>) -> Result<(), Error> {
        let kicks = self.kicks.iter().map(|kick| kick.try_clone().unwrap());
        let activation = Activation {
            memory: Memory::new(self.memory.clone()),
            features: features | VERSION_1,
            queues: queues.into_iter().zip(kicks).collect(),
            interrupt: self.told.clone(),
            watch: self.watch.clone(),
        };
        self.device().activate(activation)
    }

    /// The guest restarts: the device is reset and the rings are empty again.
    pub(crate) fn reboot(&mut self) {
        self.device().reset();
        let sizes: Vec<u16> = self.rings.iter().map(|ring| ring.size).collect();
        self.rings = rings(&sizes);
        let zeros = vec![0; (RING * sizes.len() as u64) as usize];
        self.memory.write_slice(&zeros, GuestAddress(RING)).unwrap();
        self.next_data = DATA;
        let features = self.device().features();
        self.start(features).unwrap();
    }

    /// The device is taken out of the machine.
    pub(crate) fn detach(&self) {
        self.events.detach(&self.watch);
    }

    /// A place of so many bytes for data.
    pub(crate) fn place(&mut self, length: u32) -> u64 {
        if self.next_data + u64::from(length) + 64 > MEMORY {
            self.next_data = DATA;
        }
        let at = self.next_data;
        self.next_data += u64::from(length) + 64; // never contiguous
        at
    }

    /// Offers a chain: bytes for the device to read, in these pieces, then room of these sizes.
    /// Returns its head.
    pub(crate) fn offer(&mut self, queue: usize, said: &[&[u8]], room: &[u32]) -> u16 {
        let mut pieces = Vec::new();
        for bytes in said {
            let at = self.place(bytes.len() as u32);
            self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
            pieces.push((at, bytes.len() as u32, 0));
        }
        for length in room {
            pieces.push((self.place(*length), *length, WRITE));
        }
        self.offer_pieces(queue, &pieces)
    }

    /// Offers a chain of these pieces of memory: address, length, flags.
    pub(crate) fn offer_pieces(&mut self, queue: usize, pieces: &[(u64, u32, u16)]) -> u16 {
        let ring = &mut self.rings[queue];
        let indices: Vec<u16> = pieces.iter().map(|_| ring.free.pop().unwrap()).collect();
        for (n, (address, length, flags)) in pieces.iter().enumerate() {
            let next = indices.get(n + 1);
            let flags = flags | if next.is_some() { NEXT } else { 0 };
            let mut raw = [0; 16];
            raw[..8].copy_from_slice(&address.to_le_bytes());
            raw[8..12].copy_from_slice(&length.to_le_bytes());
            raw[12..14].copy_from_slice(&flags.to_le_bytes());
            raw[14..].copy_from_slice(&next.copied().unwrap_or(0).to_le_bytes());
            let at = ring.base + u64::from(indices[n]) * 16;
            self.memory.write_slice(&raw, GuestAddress(at)).unwrap();
        }
        let room = pieces.iter().filter(|piece| piece.2 & WRITE != 0);
        let room = room.map(|(at, length, _)| (*at, *length)).collect();
        let head = indices[0];
        ring.chains[usize::from(head)] = Some((indices, room));
        let entry = ring.available() + 4 + u64::from(ring.added % ring.size) * 2;
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        ring.added = ring.added.wrapping_add(1);
        let index = GuestAddress(ring.available() + 2);
        (self.memory.store(ring.added, index, Ordering::Release)).unwrap();
        head
    }

    /// The next chain the device is done with: its head, and what was written to it.
    pub(crate) fn done(&mut self, queue: usize) -> Option<(u16, Vec<u8>)> {
        let ring = &mut self.rings[queue];
        let index = GuestAddress(ring.used() + 2);
        let used: u16 = self.memory.load(index, Ordering::Acquire).unwrap();
        if used == ring.seen {
            return None;
        }
        let entry = ring.used() + 4 + u64::from(ring.seen % ring.size) * 8;
        let head: u32 = self.memory.read_obj(GuestAddress(entry)).unwrap();
        let length: u32 = self.memory.read_obj(GuestAddress(entry + 4)).unwrap();
        ring.seen = ring.seen.wrapping_add(1);
        // used_event: tell us about the very next one.
        let event = GuestAddress(ring.available() + 4 + u64::from(ring.size) * 2);
        self.memory.write_obj(ring.seen, event).unwrap();
        let (indices, room) = ring.chains[head as usize].take().expect("it was offered");
        ring.free.extend(indices);
        let mut written = Vec::new();
        for (at, size) in room {
            let mut piece = vec![0; (length - written.len() as u32).min(size) as usize];
            self.memory
                .read_slice(&mut piece, GuestAddress(at))
                .unwrap();
            written.extend(piece);
        }
        assert_eq!(
            written.len(),
            length as usize,
            "it says that it wrote more than there is room"
        );
        Some((head as u16, written))
    }

    pub(crate) fn kick(&self, queue: usize) {
        self.kicks[queue].write(1).unwrap();
    }

    /// Has the device handle all that it is told.
    pub(crate) fn run(&self) {
        for _ in 0..20 {
            assert!(self.events.turn(0).unwrap());
        }
    }

    /// Offers a chain, has it handled and returns what was written to it.
    pub(crate) fn ask(&mut self, queue: usize, said: &[&[u8]], room: &[u32]) -> Vec<u8> {
        let head = self.offer(queue, said, room);
        self.kick(queue);
        self.run();
        let (done, written) = self.done(queue).expect("the device is done with it");
        assert_eq!(done, head);
        written
    }

    /// How often the guest was told about a queue since the last time.
    pub(crate) fn interrupts(&self, queue: usize) -> u64 {
        self.told.queues[queue].swap(0, Ordering::SeqCst)
    }

    pub(crate) fn bytes(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    /// Moves the guest to another process, as far as a device can tell: its state goes through text
    /// to a device made anew.
    pub(crate) fn moved_to(self, device: D) -> Self {
        let features = self.device().features() | VERSION_1;
        let saved = self.device().save().unwrap();
        let text = serde_json::to_string(&saved).unwrap();
        let saved: Saved = serde_json::from_str(&text).unwrap();
        self.device().reset();
        let mut machine = Self::stopped(device, self.memory.clone());
        machine.rings = self.rings;
        machine.next_data = self.next_data;
        machine.device().restore(&saved.state).unwrap();
        let queues = saved.queues.into_iter().map(queue).collect();
        machine.activate(features, queues).unwrap();
        machine
    }
}

fn queue(state: QueueState) -> Queue {
    Queue::try_from(state).unwrap()
}

fn rings(sizes: &[u16]) -> Vec<Ring> {
    let rings = sizes.iter().enumerate();
    rings.map(|(index, size)| Ring::new(index, *size)).collect()
}

/// Numbers that look random and are the same every time (xorshift).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}
