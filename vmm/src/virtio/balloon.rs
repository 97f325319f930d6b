//! Memory balloon: the host takes memory back from a guest that can do without, and gets back the
//! pages that the guest reports as free by itself.
//!
//! Inflating and reporting only say that the *content* of pages is of no use: the host forgets it,
//! and gives zeros or old content when the guest touches the page again.
//!
//! Source: VIRTIO 1.2, section 5.5.
#![expect(unsafe_code, reason = "madvise has no safe wrapper")]

use tracing::debug;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

use super::rings::{Chain, Rings};
use super::{Activation, Device, Error, Saved, State, read_bytes};

/// Device type.
const KIND: u32 = 5;
/// Feature: the balloon gives memory back when the guest runs out of it.
const DEFLATE_ON_OOM: u32 = 2;
/// Feature: the guest reports free pages.
const REPORTING: u32 = 5;

// Queues (5.5.2). Drivers number them without gaps, so that reporting is next although statistics
// and hinting would come before it.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORT: usize = 2;
const COUNT: usize = 3;

/// Unit of the device, bytes, whatever the guest's pages are.
const PAGE: u64 = 4096;
/// Page numbers looked at in one request; Linux sends 256.
const MOST_PAGES: usize = 4096;

/// The balloon of one guest.
#[derive(Default)]
pub struct Balloon {
    /// Pages the host wants.
    target: u32,
    /// Pages the guest says it has given.
    actual: u32,
    rings: Option<Rings>,
    pressed: Option<Pressed>,
}

/// Told what the balloon has left, bytes.
type Pressed = Box<dyn Fn(u64) + Send>;

impl Balloon {
    /// An empty balloon.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the guest for so much of its memory, bytes, rounded down to pages. It takes its time, and
    /// may give less.
    pub fn set_target(&mut self, bytes: u64) {
        self.target = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        if let Some(rings) = &self.rings {
            rings.interrupt.config(&self.config());
        }
    }

    /// What the guest says it has given, bytes.
    #[must_use]
    pub fn actual(&self) -> u64 {
        u64::from(self.actual) * PAGE
    }

    /// Has `tell` called when the guest, out of memory, takes pages back that the host still wants: with
    /// what is left, bytes. As often as the guest likes.
    pub fn when_pressed(&mut self, tell: impl Fn(u64) + Send + 'static) {
        self.pressed = Some(Box::new(tell));
    }

    /// `struct virtio_balloon_config` (5.5.4), the fields that the offered features bring.
    fn config(&self) -> [u8; 8] {
        let mut config = [0; 8];
        config[..4].copy_from_slice(&self.target.to_le_bytes());
        config[4..].copy_from_slice(&self.actual.to_le_bytes());
        config
    }
}

impl Device for Balloon {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << DEFLATE_ON_OOM
            | 1 << REPORTING
    }

    /// Linux reports 32 ranges at a time and insists on room for them.
    fn queue_sizes(&self) -> &[u16] {
        const { &[16, 16, 32] }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // `actual` is the driver's, and is written as a whole.
        if let (4, Ok(actual)) = (offset, data.try_into()) {
            let before = self.actual;
            self.actual = u32::from_le_bytes(actual);
            // Nobody asked for less: the driver deflates for itself (`DEFLATE_ON_OOM`).
            if self.actual < before.min(self.target)
                && let Some(tell) = &self.pressed
            {
                tell(self.actual());
            }
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Error> {
        self.rings = Some(Rings::new(KIND, COUNT, activation)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.rings = None;
        self.actual = 0;
    }

    fn event(&mut self, token: u32) {
        let Some(rings) = &mut self.rings else {
            return;
        };
        let memory = rings.memory.memory();
        match token as usize {
            INFLATE => rings.serve(INFLATE, |chain| inflate(&memory, &chain)),
            // Pages that are touched again come back by themselves.
            DEFLATE => rings.serve(DEFLATE, |_| 0),
            REPORT => rings.serve(REPORT, |chain| report(&memory, &chain)),
            _ => {}
        }
    }

    fn save(&mut self) -> Result<Saved, Error> {
        Ok(Saved {
            queues: self.rings.as_ref().map(Rings::states).unwrap_or_default(),
            state: State::Balloon {
                target: self.target,
                actual: self.actual,
            },
        })
    }

    fn restore(&mut self, state: &State) -> Result<(), Error> {
        let State::Balloon { target, actual } = *state else {
            let found = state.clone();
            return Err(Error::WrongState { kind: KIND, found });
        };
        (self.target, self.actual) = (target, actual);
        Ok(())
    }
}

/// Forgets the pages whose numbers the guest has written.
fn inflate(memory: &GuestMemoryMmap, chain: &Chain<'_>) -> u32 {
    let length = chain.readable.len().min(MOST_PAGES * 4);
    let mut numbers = vec![0; length];
    chain.readable.read(&mut numbers);
    for (first, count) in runs(&numbers) {
        forget(memory, GuestAddress(first * PAGE), count * PAGE);
    }
    0
}

/// Page numbers as runs of consecutive ones: the first, and how many.
fn runs(numbers: &[u8]) -> Vec<(u64, u64)> {
    let mut pages: Vec<u64> = (numbers.as_chunks().0.iter())
        .map(|raw| u32::from_le_bytes(*raw).into())
        .collect();
    pages.sort_unstable();
    pages.dedup();
    (pages.chunk_by(|a, b| a + 1 == *b))
        .map(|run| (run[0], run.len() as u64))
        .collect()
}

/// Forgets the ranges that the guest has put up as if to be written.
fn report(memory: &GuestMemoryMmap, chain: &Chain<'_>) -> u32 {
    for slice in chain.writable.slices() {
        let at = slice.ptr_guard_mut().as_ptr() as usize;
        for region in memory.iter() {
            let start = region.as_ptr() as usize;
            if let Some(offset) = at.checked_sub(start).map(|offset| offset as u64)
                && offset < region.len()
            {
                forget_in(region, offset, slice.len() as u64);
            }
        }
    }
    0
}

/// Forgets what is in `length` bytes of guest memory from `at` on, as far as they are memory.
fn forget(memory: &GuestMemoryMmap, at: GuestAddress, length: u64) {
    for region in memory.iter() {
        let (start, end) = (region.start_addr().0, region.start_addr().0 + region.len());
        let from = at.0.max(start);
        let to = at.0.saturating_add(length).min(end);
        if from < to {
            forget_in(region, from - start, to - from);
        }
    }
}

/// Forgets the whole pages of a range within a region.
fn forget_in(region: &vm_memory::GuestRegionMmap, offset: u64, length: u64) {
    let end = offset.saturating_add(length).min(region.len()) / PAGE * PAGE;
    let start = offset.next_multiple_of(PAGE);
    if start >= end {
        return;
    }
    // Memory of a file is shared and is freed there; a private mapping just drops its copy.
    let advice = match region.file_offset() {
        Some(_) => libc::MADV_REMOVE,
        None => libc::MADV_DONTNEED,
    };
    // SAFETY: the range lies within the region's mapping, which lives as long as `region`, and
    // nobody holds a Rust reference into guest memory. What is lost is the guest's own content, by
    // its own wish.
    let result = unsafe {
        let address = region.as_ptr().add(start as usize);
        libc::madvise(address.cast(), (end - start) as usize, advice)
    };
    if result != 0 {
        // The guest can do without, but the host does not gain: no reason to trouble anybody.
        debug!(
            "Cannot give back guest memory: {}",
            std::io::Error::last_os_error()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_numbers_become_runs_whatever_their_order() {
        let raw =
            |pages: &[u32]| -> Vec<u8> { pages.iter().flat_map(|p| p.to_le_bytes()).collect() };
        assert_eq!(runs(&raw(&[7, 6, 5, 9, 5])), [(5, 3), (9, 1)]);
        assert_eq!(runs(&raw(&[u32::MAX])), [(u32::MAX.into(), 1)]);
        assert_eq!(runs(&[1, 2, 3]), []); // not a whole number
    }
}
