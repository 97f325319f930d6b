//! The guest's virtio driver: real split virtqueues in guest memory, filled and emptied from the
//! driver's side (VIRTIO 1.2, section 2.7). Knows packets as bytes only.

use sealpod_vmm::vsock::{HEADER_LEN, Header};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Descriptors of each queue.
pub(crate) const SIZE: u16 = 64;
/// Guest memory, bytes.
pub(crate) const MEMORY: usize = 16 << 20;
const TX_SLOT: u64 = 80 << 10;
const RX_SLOT: u64 = 64 << 10;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// One ring, driver's side. Chains have at most four descriptors: slot `n` owns `4n..4n+4`.
pub(crate) struct Ring {
    base: u64,
    slots: u16,
    free: Vec<u16>,
    added: u16,
    seen: u16,
}

impl Ring {
    fn new(base: u64) -> Self {
        let slots = SIZE / 4;
        Self {
            base,
            slots,
            free: (0..slots).collect(),
            added: 0,
            seen: 0,
        }
    }

    pub(crate) fn desc(&self) -> GuestAddress {
        GuestAddress(self.base)
    }

    pub(crate) fn avail(&self) -> GuestAddress {
        GuestAddress(self.base + 0x1000)
    }

    pub(crate) fn used(&self) -> GuestAddress {
        GuestAddress(self.base + 0x2000)
    }

    /// Puts a chain of these pieces, at most four, at the device's disposal.
    fn offer(&mut self, memory: &GuestMemoryMmap, slot: u16, pieces: &[(u64, u32)], flags: u16) {
        for (n, (address, length)) in pieces.iter().enumerate() {
            let index = slot * 4 + n as u16;
            let more = n + 1 < pieces.len();
            let at = GuestAddress(self.base + u64::from(index) * 16);
            let flags = flags | if more { NEXT } else { 0 };
            let mut raw = [0; 16];
            raw[..8].copy_from_slice(&address.to_le_bytes());
            raw[8..12].copy_from_slice(&length.to_le_bytes());
            raw[12..14].copy_from_slice(&flags.to_le_bytes());
            raw[14..].copy_from_slice(&(index + 1).to_le_bytes());
            memory.write_slice(&raw, at).unwrap();
        }
        let entry = self.avail().0 + 4 + u64::from(self.added % SIZE) * 2;
        memory.write_obj(slot * 4, GuestAddress(entry)).unwrap();
        self.added = self.added.wrapping_add(1);
        let index = GuestAddress(self.avail().0 + 2);
        let order = std::sync::atomic::Ordering::Release;
        memory.store(self.added, index, order).unwrap();
    }

    /// The next chain the device is done with: its slot, and how many bytes it wrote.
    fn done(&mut self, memory: &GuestMemoryMmap) -> Option<(u16, u32)> {
        let index = GuestAddress(self.used().0 + 2);
        let order = std::sync::atomic::Ordering::Acquire;
        let used: u16 = memory.load(index, order).unwrap();
        if used == self.seen {
            return None;
        }
        let entry = self.used().0 + 4 + u64::from(self.seen % SIZE) * 8;
        let head: u32 = memory.read_obj(GuestAddress(entry)).unwrap();
        let length: u32 = memory.read_obj(GuestAddress(entry + 4)).unwrap();
        self.seen = self.seen.wrapping_add(1);
        // used_event: tell us about the very next one.
        let event = GuestAddress(self.avail().0 + 4 + u64::from(SIZE) * 2);
        memory.write_obj(self.seen, event).unwrap();
        Some((head as u16 / 4, length))
    }

    /// The same ring as the device's side of this process sees it.
    pub(crate) fn device_side(&self) -> Queue {
        let mut queue = Queue::new(SIZE).unwrap();
        queue.try_set_desc_table_address(self.desc()).unwrap();
        queue.try_set_avail_ring_address(self.avail()).unwrap();
        queue.try_set_used_ring_address(self.used()).unwrap();
        queue.set_event_idx(true);
        queue.set_ready(true);
        queue
    }
}

/// Both rings and the memory behind them.
pub(crate) struct Driver {
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) rx: Ring,
    pub(crate) tx: Ring,
    /// How received packets are laid out: sizes of the pieces of each receive buffer.
    pub(crate) rx_layout: Vec<u32>,
    /// Where sent packets are cut into descriptors: offsets, ascending.
    pub(crate) tx_cuts: Vec<usize>,
}

impl Driver {
    /// A driver that has not offered any receive buffer yet.
    pub(crate) fn new(memory: GuestMemoryMmap) -> Self {
        Self {
            memory,
            rx: Ring::new(0x1_0000),
            tx: Ring::new(0x2_0000),
            rx_layout: vec![4096],
            tx_cuts: Vec::new(),
        }
    }

    /// Offers all receive buffers that are free.
    pub(crate) fn refill(&mut self) {
        while let Some(slot) = self.rx.free.pop() {
            let mut at = 0x10_0000 + u64::from(slot) * RX_SLOT;
            let mut pieces = Vec::new();
            for length in &self.rx_layout {
                pieces.push((at, *length));
                at += u64::from(*length) + 64; // never contiguous
            }
            self.rx.offer(&self.memory, slot, &pieces, WRITE);
        }
    }

    /// Sends raw bytes as one packet. `false`: the ring is full.
    pub(crate) fn send_raw(&mut self, packet: &[u8]) -> bool {
        while let Some((slot, _)) = self.tx.done(&self.memory) {
            self.tx.free.push(slot);
        }
        let Some(slot) = self.tx.free.pop() else {
            return false;
        };
        let base = 0x80_0000 + u64::from(slot) * TX_SLOT;
        let mut pieces = Vec::new();
        let mut start = 0;
        let cuts = self.tx_cuts.iter().copied().filter(|c| *c < packet.len());
        for end in cuts.chain([packet.len()]) {
            let at = base + start as u64 + 64 * pieces.len() as u64;
            (self.memory)
                .write_slice(&packet[start..end], GuestAddress(at))
                .unwrap();
            pieces.push((at, (end - start) as u32));
            start = end;
        }
        self.tx.offer(&self.memory, slot, &pieces, 0);
        true
    }

    /// Sends a packet. `false`: the ring is full.
    pub(crate) fn send(&mut self, header: &Header, payload: &[u8]) -> bool {
        self.send_raw(&[&header.encode()[..], payload].concat())
    }

    /// The next packet from the device. Its buffer is free afterwards, but not offered again.
    pub(crate) fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let (slot, length) = self.rx.done(&self.memory)?;
        self.rx.free.push(slot);
        let mut packet = Vec::new();
        let mut at = 0x10_0000 + u64::from(slot) * RX_SLOT;
        let mut left = length;
        for piece in &self.rx_layout {
            let take = left.min(*piece);
            let start = packet.len();
            packet.resize(start + take as usize, 0);
            (self.memory)
                .read_slice(&mut packet[start..], GuestAddress(at))
                .unwrap();
            left -= take;
            at += u64::from(*piece) + 64;
        }
        if packet.len() < HEADER_LEN {
            return self.receive(); // a buffer that was of no use
        }
        let payload = packet.split_off(HEADER_LEN);
        let header = Header::decode(packet.as_slice().try_into().unwrap());
        assert_eq!(payload.len(), header.len as usize);
        Some((header, payload))
    }

    /// How many packets the device has not taken yet.
    pub(crate) fn untaken(&mut self) -> usize {
        while let Some((slot, _)) = self.tx.done(&self.memory) {
            self.tx.free.push(slot);
        }
        usize::from(self.tx.slots) - self.tx.free.len()
    }

    /// As after a reboot: both rings are empty and start at their first entry.
    pub(crate) fn reset(&mut self) {
        for base in [self.rx.base, self.tx.base] {
            let zeros = vec![0; 0x3000];
            self.memory.write_slice(&zeros, GuestAddress(base)).unwrap();
        }
        self.rx = Ring::new(self.rx.base);
        self.tx = Ring::new(self.tx.base);
    }
}
