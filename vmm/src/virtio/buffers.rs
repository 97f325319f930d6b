//! Pieces of guest memory that together hold one packet, one request, or part of one. No copy is
//! made here that was not asked for; a piece never outlives the memory it points into.

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// Most pieces of one buffer: as many as the largest queue has descriptors.
pub const MAX_PIECES: usize = 256;

/// A buffer in more pieces than any driver needs.
#[derive(Debug, thiserror::Error)]
#[error("Buffer is in more than {MAX_PIECES} pieces")]
pub struct TooManyPieces;

/// An ordered list of pieces of memory that another party may change at any time.
#[derive(Debug, Default, Clone)]
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
    /// [`TooManyPieces`] when the list is full.
    pub fn push(&mut self, slice: VolatileSlice<'a, ()>) -> Result<(), TooManyPieces> {
        if slice.is_empty() {
            return Ok(());
        }
        if self.slices.len() == MAX_PIECES {
            return Err(TooManyPieces);
        }
        self.len += slice.len();
        self.slices.push(slice);
        Ok(())
    }

    /// Adds `length` bytes of guest memory from `address` on. Returns whether they are memory and fit.
    pub(crate) fn push_guest(
        &mut self,
        memory: &'a GuestMemoryMmap,
        address: GuestAddress,
        length: usize,
    ) -> bool {
        (memory.get_slices(address, length))
            .all(|slice| slice.is_ok_and(|slice| self.push(slice).is_ok()))
    }

    /// Adds all pieces of `other`.
    ///
    /// # Errors
    /// [`TooManyPieces`] when the list is full; some may have been added.
    pub(crate) fn append(&mut self, other: &Self) -> Result<(), TooManyPieces> {
        other.slices.iter().try_for_each(|slice| self.push(*slice))
    }

    /// Cuts off and returns the first `count` bytes, or as many as there are.
    pub fn split_front(&mut self, count: usize) -> Self {
        let length = count.min(self.len);
        let (mut whole, mut left) = (0, length);
        while let Some(slice) = self.slices.get(whole)
            && slice.len() <= left
        {
            left -= slice.len();
            whole += 1;
        }
        let rest = self.slices.split_off(whole);
        let slices = std::mem::replace(&mut self.slices, rest);
        let mut front = Self {
            slices,
            len: length,
        };
        if left > 0
            && let Some(slice) = self.slices.first_mut()
            && let Ok((head, tail)) = slice.split_at(left)
        {
            front.slices.push(head);
            *slice = tail;
        }
        self.len -= length;
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
        self.write_at(0, from)
    }

    /// Like [`Buffers::write`], after the first `skip` bytes.
    pub fn write_at(&self, skip: usize, from: &[u8]) -> usize {
        let (mut skip, mut done) = (skip, 0);
        for slice in &self.slices {
            let Ok(rest) = slice.offset(skip.min(slice.len())) else {
                break; // cannot be: the offset is within the piece
            };
            skip -= slice.len() - rest.len();
            let count = rest.len().min(from.len() - done);
            rest.copy_from(&from[done..done + count]);
            done += count;
        }
        done
    }

    /// Cuts off and returns the last `count` bytes, or as many as there are.
    pub fn split_back(&mut self, count: usize) -> Self {
        let front = self.split_front(self.len.saturating_sub(count));
        std::mem::replace(self, front)
    }

    /// At most `most` of the bytes after the first `skip`, as the kernel's scatter-gather calls take them. Good for as
    /// long as the pieces are.
    pub(crate) fn iovecs(&self, skip: usize, most: usize) -> Vec<libc::iovec> {
        let mut iovecs = Vec::with_capacity(self.slices.len());
        let (mut skip, mut left) = (skip, most);
        for slice in &self.slices {
            let Ok(rest) = slice.offset(skip.min(slice.len())) else {
                break; // cannot be: the offset is within the piece
            };
            skip -= slice.len() - rest.len();
            let length = rest.len().min(left);
            if length > 0 {
                iovecs.push(libc::iovec {
                    iov_base: rest.ptr_guard_mut().as_ptr().cast(),
                    iov_len: length,
                });
                left -= length;
            }
        }
        iovecs
    }

    /// Appends all bytes after the first `skip` to `to`.
    pub(crate) fn append_to(&self, skip: usize, to: &mut Vec<u8>) {
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

    /// The pieces, in order; none is empty.
    pub(crate) fn slices(&self) -> &[VolatileSlice<'a, ()>] {
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
#[expect(unsafe_code, reason = "the kernel reads by address")]
mod tests {
    use std::io::Read;
    use std::net::Shutdown;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn bytes(buffers: &Buffers<'_>) -> Vec<u8> {
        let mut bytes = Vec::new();
        buffers.append_to(0, &mut bytes);
        bytes
    }

    /// What the kernel would write out.
    fn pointed_at(iovecs: &[libc::iovec]) -> Vec<u8> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        for piece in iovecs {
            // SAFETY: the kernel reads what a piece of the test's buffers names, and says so if it is no memory.
            let sent = unsafe { libc::write(ours.as_raw_fd(), piece.iov_base, piece.iov_len) };
            assert_eq!(sent as usize, piece.iov_len);
        }
        ours.shutdown(Shutdown::Write).unwrap();
        let mut bytes = Vec::new();
        theirs.read_to_end(&mut bytes).unwrap();
        bytes
    }

    proptest! {
        #[test]
        fn in_any_pieces_bytes_are_cut_and_copied_as_in_one(
            mut pieces in vec(vec(any::<u8>(), 0..9), 0..12),
            steps in vec((0..4, 0..70_usize), 0..12),
        ) {
            let mut model = pieces.concat();
            let mut all = Buffers::default();
            for piece in &mut pieces {
                all.push(VolatileSlice::from(&mut piece[..])).unwrap();
            }
            for (step, count) in steps {
                let cut = count.min(model.len());
                match step {
                    0 => {
                        let rest = model.split_off(cut);
                        prop_assert_eq!(bytes(&all.split_front(count)), model);
                        model = rest;
                    }
                    1 => {
                        let back = model.split_off(model.len() - cut);
                        prop_assert_eq!(bytes(&all.split_back(count)), back);
                    }
                    2 => {
                        all.truncate(count);
                        model.truncate(count);
                    }
                    _ => {
                        let new = [0xa5; 7];
                        let fit = new.len().min(model.len() - cut);
                        prop_assert_eq!(all.write_at(count, &new), fit);
                        model[cut..cut + fit].copy_from_slice(&new[..fit]);
                    }
                }
                prop_assert_eq!(&bytes(&all), &model);
                prop_assert_eq!((all.len(), all.is_empty()), (model.len(), model.is_empty()));
                for skip in [0, count / 2, count] {
                    let skipped = skip.min(model.len());
                    let end = (skipped + count).min(model.len());
                    prop_assert_eq!(pointed_at(&all.iovecs(skip, count)), &model[skipped..end]);
                }
            }
        }
    }

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
    fn the_end_can_be_cut_off_wherever_the_pieces_end() {
        for cut in 0..8 {
            let (mut a, mut b) = (*b"abc", *b"defg");
            let mut all = Buffers::from(&mut a[..]);
            all.push(VolatileSlice::from(&mut b[..])).unwrap();
            let back = all.split_back(cut);
            let (mut front_text, mut back_text) = (Vec::new(), Vec::new());
            all.append_to(0, &mut front_text);
            back.append_to(0, &mut back_text);
            assert_eq!(back_text.len(), cut.min(7));
            assert_eq!([front_text, back_text].concat(), b"abcdefg");
        }
    }

    #[test]
    fn no_iovec_reaches_beyond_what_was_asked_for() {
        let (mut a, mut b) = (*b"abc", *b"defg");
        let mut all = Buffers::from(&mut a[..]);
        all.push(VolatileSlice::from(&mut b[..])).unwrap();
        for (most, lengths) in [(0, &[][..]), (3, &[3]), (5, &[3, 2]), (9, &[3, 4])] {
            let found: Vec<usize> = all.iovecs(0, most).iter().map(|v| v.iov_len).collect();
            assert_eq!(found, lengths, "{most}");
        }
    }

    #[test]
    fn too_many_pieces_are_refused() {
        let mut bytes = [0; MAX_PIECES + 1];
        let mut all = Buffers::default();
        let results: Vec<bool> = (bytes.chunks_mut(1))
            .map(|piece| all.push(VolatileSlice::from(piece)).is_ok())
            .collect();
        assert_eq!(results.iter().filter(|ok| !**ok).count(), 1);
        assert_eq!(all.len(), MAX_PIECES);
    }
}
