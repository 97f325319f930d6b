//! Pieces of guest memory that together hold one packet, or one payload. No copy is made here
//! that was not asked for; a piece never outlives the memory it points into.

use vm_memory::VolatileSlice;

/// Most pieces of one packet: 64 KiB in pages, unaligned, plus a header, and some to spare.
pub(super) const MAX_FRAGMENTS: usize = 64;

/// A packet in more pieces than any driver needs.
#[derive(Debug, thiserror::Error)]
#[error("Packet is in more than {MAX_FRAGMENTS} pieces")]
pub struct TooManyFragments;

/// An ordered list of pieces of memory that another party may change at any time.
#[derive(Debug, Default)]
pub struct Buffers<'a> {
    slices: Vec<VolatileSlice<'a, ()>>,
    len: usize,
}

impl<'a> Buffers<'a> {
    /// Bytes in all pieces.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a piece; an empty one is left out.
    ///
    /// # Errors
    /// [`TooManyFragments`] when the list is full.
    pub fn push(&mut self, slice: VolatileSlice<'a, ()>) -> Result<(), TooManyFragments> {
        if slice.is_empty() {
            return Ok(());
        }
        if self.slices.len() == MAX_FRAGMENTS {
            return Err(TooManyFragments);
        }
        self.len += slice.len();
        self.slices.push(slice);
        Ok(())
    }

    /// Cuts off and returns the first `count` bytes, or as many as there are.
    pub fn split_front(&mut self, count: usize) -> Self {
        let mut front = Self::default();
        let mut used = 0;
        for slice in &mut self.slices {
            let want = count - front.len;
            if want == 0 {
                break;
            }
            let (head, tail) = match slice.split_at(want.min(slice.len())) {
                Ok(halves) => halves,
                Err(_) => break, // cannot be: the cut is within the piece
            };
            front.len += head.len();
            front.slices.push(head);
            *slice = tail;
            used += usize::from(tail.is_empty());
        }
        self.slices.drain(..used);
        self.len -= front.len;
        front
    }

    /// Drops all bytes after the first `count`.
    pub fn truncate(&mut self, count: usize) {
        if count < self.len {
            *self = self.split_front(count);
        }
    }

    /// Copies into `to`; returns how many bytes.
    pub fn read(&self, to: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            done += slice.copy_to(&mut to[done..]);
        }
        done
    }

    /// Copies as much of `from` as there is room for; returns how many bytes.
    pub fn write(&self, from: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            let count = slice.len().min(from.len() - done);
            slice.copy_from(&from[done..done + count]);
            done += count;
        }
        done
    }

    /// Appends all bytes after the first `skip` to `to`.
    pub(super) fn append_to(&self, skip: usize, to: &mut Vec<u8>) {
        let mut skip = skip;
        for slice in &self.slices {
            let Ok(rest) = slice.offset(skip.min(slice.len())) else {
                return; // cannot be: the offset is within the piece
            };
            skip -= slice.len() - rest.len();
            let start = to.len();
            to.resize(start + rest.len(), 0);
            rest.copy_to(&mut to[start..]);
        }
    }

    pub(super) fn slices(&self) -> &[VolatileSlice<'a, ()>] {
        &self.slices
    }
}

impl<'a> From<&'a mut [u8]> for Buffers<'a> {
    fn from(bytes: &'a mut [u8]) -> Self {
        let mut buffers = Self::default();
        if !bytes.is_empty() {
            buffers.len = bytes.len();
            buffers.slices.push(VolatileSlice::from(bytes));
        }
        buffers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_keep_their_order_across_pieces() {
        let (mut a, mut b, mut c) = (*b"head", *b"er-pay", *b"load");
        let mut all = Buffers::default();
        for piece in [&mut a[..], &mut b[..], &mut [][..], &mut c[..]] {
            all.push(VolatileSlice::from(piece)).unwrap();
        }
        let front = all.split_front(7);
        let mut text = [0; 7];
        assert_eq!(front.read(&mut text), 7);
        assert_eq!(&text, b"header-");
        assert_eq!((front.len(), all.len()), (7, 7));

        let mut rest = b"> ".to_vec();
        all.append_to(2, &mut rest);
        assert_eq!(rest, b"> yload");

        all.truncate(5);
        assert_eq!(all.write(b"123456789"), 5);
        assert_eq!((&b, &c), (b"er-123", b"45ad"));
    }

    #[test]
    fn a_cut_beyond_the_end_takes_what_there_is() {
        let mut bytes = *b"abc";
        let mut all = Buffers::from(&mut bytes[..]);
        assert_eq!(all.split_front(10).len(), 3);
        assert!(all.is_empty() && all.slices().is_empty());
        assert_eq!(all.split_front(1).len(), 0);
    }

    #[test]
    fn too_many_pieces_are_refused() {
        let mut bytes = [0; MAX_FRAGMENTS + 1];
        let mut all = Buffers::default();
        let results: Vec<bool> = (bytes.chunks_mut(1))
            .map(|piece| all.push(VolatileSlice::from(piece)).is_ok())
            .collect();
        assert_eq!(results.iter().filter(|ok| !**ok).count(), 1);
        assert_eq!(all.len(), MAX_FRAGMENTS);
    }
}
