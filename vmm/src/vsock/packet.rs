//! The packet header on the wire. Encoding only; what a packet means is decided in `engine`.
//!
//! Source: Virtual I/O Device (VIRTIO) 1.2, section 5.10.6, `struct virtio_vsock_hdr`.

/// Context id of the host (5.10.4).
pub const HOST_CID: u64 = 2;
/// Bytes of a header.
pub const HEADER_LEN: usize = 44;
/// Socket type of a stream (5.10.6).
pub const TYPE_STREAM: u16 = 1;
/// Longest payload that is taken from or given to a guest in one packet, bytes. Linux sends no more.
pub const MAX_PAYLOAD: u32 = 64 * 1024;

/// Flag of [`Op::Shutdown`]: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of [`Op::Shutdown`]: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both directions are finished.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// `op` of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Grants it.
    Response = 2,
    /// Ends or refuses one.
    Rst = 3,
    /// Ends one or both directions.
    Shutdown = 4,
    /// Carries payload.
    Rw = 5,
    /// Tells `buf_alloc` and `fwd_cnt`.
    CreditUpdate = 6,
    /// Asks for the other's.
    CreditRequest = 7,
}

impl Op {
    /// The operation with this number, if there is one.
    #[must_use]
    pub fn new(op: u16) -> Option<Self> {
        Some(match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Rst,
            4 => Self::Shutdown,
            5 => Self::Rw,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// `struct virtio_vsock_hdr`, in host byte order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// Sender.
    pub src_cid: u64,
    /// Receiver.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Payload, bytes.
    pub len: u32,
    /// [`TYPE_STREAM`]; anything else is refused.
    pub type_: u16,
    /// An [`Op`].
    pub op: u16,
    /// Of [`Op::Shutdown`].
    pub flags: u32,
    /// Sender's receive window, bytes.
    pub buf_alloc: u32,
    /// Bytes the sender has taken out of its window so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header; every value of every field can come out.
    #[must_use]
    pub fn decode(raw: &[u8; HEADER_LEN]) -> Self {
        let mut at = Cursor { raw, position: 0 };
        Self {
            src_cid: u64::from_le_bytes(at.take()),
            dst_cid: u64::from_le_bytes(at.take()),
            src_port: u32::from_le_bytes(at.take()),
            dst_port: u32::from_le_bytes(at.take()),
            len: u32::from_le_bytes(at.take()),
            type_: u16::from_le_bytes(at.take()),
            op: u16::from_le_bytes(at.take()),
            flags: u32::from_le_bytes(at.take()),
            buf_alloc: u32::from_le_bytes(at.take()),
            fwd_cnt: u32::from_le_bytes(at.take()),
        }
    }

    /// The bytes on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut raw = [0; HEADER_LEN];
        let mut rest = &mut raw[..];
        for field in [
            &self.src_cid.to_le_bytes()[..],
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.type_.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ] {
            let (head, tail) = rest.split_at_mut(field.len());
            head.copy_from_slice(field);
            rest = tail;
        }
        raw
    }

    /// The reset that answers this packet.
    #[must_use]
    pub fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            type_: self.type_,
            op: Op::Rst as u16,
            ..Self::default()
        }
    }
}

struct Cursor<'a> {
    raw: &'a [u8; HEADER_LEN],
    position: usize,
}

impl Cursor<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut field = [0; N];
        field.copy_from_slice(&self.raw[self.position..self.position + N]);
        self.position += N;
        field
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_has_the_layout_of_the_specification() {
        let header = Header {
            src_cid: 3,
            dst_cid: HOST_CID,
            src_port: 0x0102_0304,
            dst_port: 1024,
            len: 9,
            type_: TYPE_STREAM,
            op: Op::Rw as u16,
            flags: 0x11,
            buf_alloc: 0x22,
            fwd_cnt: 0x33,
        };
        let raw = header.encode();
        assert_eq!(raw[0], 3);
        assert_eq!(raw[8], 2);
        assert_eq!(raw[16..20], [4, 3, 2, 1]);
        assert_eq!(raw[20..24], [0, 4, 0, 0]);
        assert_eq!(raw[24], 9);
        assert_eq!(raw[28..32], [1, 0, 5, 0]);
        assert_eq!((raw[32], raw[36], raw[40]), (0x11, 0x22, 0x33));
        assert_eq!(Header::decode(&raw), header);
    }

    #[test]
    fn only_the_seven_operations_exist() {
        assert!((0..=u16::MAX).filter_map(Op::new).count() == 7);
        assert!((0..=u16::MAX).all(|n| Op::new(n).is_none_or(|op| op as u16 == n)));
    }
}
