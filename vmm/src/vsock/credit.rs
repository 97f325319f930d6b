//! Flow control of one connection, both ways: how much each side may still send. Arithmetic only;
//! all counters are modulo 2^32 (VIRTIO 1.2, section 5.10.6.3).

use std::num::Wrapping;

use super::connection::Violation;
use super::packet::Header;

/// What each side of a connection has granted and used up.
#[derive(Debug, Default)]
pub(super) struct Credit {
    // Guest to host: what the guest may send before it hears from us again.
    window: u32,
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest last heard it.
    told: Wrapping<u32>,
    due: bool,

    // Host to guest.
    guest_window: u32,
    guest_forwarded: Wrapping<u32>,
    sent: Wrapping<u32>,
}

impl Credit {
    /// A connection on which nothing was sent; the guest may send `window` bytes, and the host what
    /// the guest has granted so far.
    pub(super) fn new(window: u32, guest_window: u32) -> Self {
        Self {
            window,
            guest_window,
            ..Self::default()
        }
    }

    /// Bytes that are promised to this connection.
    pub(super) fn window(&self) -> u32 {
        self.window
    }

    /// Takes note of the credit that a packet of the guest grants.
    pub(super) fn note(&mut self, header: &Header) -> Result<(), Violation> {
        let in_flight = self.sent - Wrapping(header.fwd_cnt);
        let was_in_flight = self.sent - self.guest_forwarded;
        if in_flight > was_in_flight {
            return Err(Violation::Acknowledged);
        }
        self.guest_forwarded = Wrapping(header.fwd_cnt);
        self.guest_window = header.buf_alloc;
        Ok(())
    }

    /// Takes note of payload from the guest.
    pub(super) fn receive(&mut self, length: usize) -> Result<(), Violation> {
        let length = u32::try_from(length).map_err(|_| Violation::Length)?;
        if length > self.window - (self.received - self.forwarded).0 {
            return Err(Violation::Credit);
        }
        self.received += length;
        Ok(())
    }

    /// `count` bytes have left our hands; the guest is told when they make half a window.
    pub(super) fn forward(&mut self, count: usize) {
        self.forwarded += count as u32; // at most `window`
        let untold = (self.forwarded - self.told).0;
        if untold > 0 && untold >= self.window / 2 {
            self.due = true;
        }
    }

    /// Bytes the guest will take. A guest that shrinks its window below what is under way has none.
    pub(super) fn room(&self) -> u32 {
        let in_flight = (self.sent - self.guest_forwarded).0;
        self.guest_window.saturating_sub(in_flight)
    }

    /// `count` bytes are on their way to the guest.
    pub(super) fn send(&mut self, count: u32) {
        self.sent += count;
    }

    /// The guest wants to know where it stands.
    pub(super) fn owe(&mut self) {
        self.due = true;
    }

    /// Whether the guest is to be told although there is nothing else to say.
    pub(super) fn is_due(&self) -> bool {
        self.due
    }

    /// What every packet tells the guest: `buf_alloc` and `fwd_cnt`.
    pub(super) fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        self.due = false;
        (self.window, self.forwarded.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(buf_alloc: u32, fwd_cnt: u32) -> Header {
        Header {
            buf_alloc,
            fwd_cnt,
            ..Header::default()
        }
    }

    #[test]
    fn counters_may_go_around_any_number_of_times() {
        let mut credit = Credit::new(4096, 4096);
        let (mut forwarded, mut sent) = (0_u32, 0_u32);
        for _ in 0..(3 << 20) {
            assert_eq!(credit.room(), 4096);
            credit.send(4096);
            assert_eq!(credit.room(), 0);
            sent = sent.wrapping_add(4096);
            credit.note(&grant(4096, sent)).unwrap();
            credit.receive(4096).unwrap();
            assert_eq!(credit.receive(1), Err(Violation::Credit));
            credit.forward(4096);
            forwarded = forwarded.wrapping_add(4096);
            assert!(credit.is_due());
            assert_eq!(credit.tell(), (4096, forwarded));
        }
    }

    #[test]
    fn nothing_that_was_not_sent_can_be_acknowledged() {
        let mut credit = Credit::new(100, 1000);
        credit.send(10);
        for wrong in [11, u32::MAX, 1 << 31] {
            assert_eq!(
                credit.note(&grant(1000, wrong)),
                Err(Violation::Acknowledged)
            );
        }
        credit.note(&grant(5, 4)).unwrap();
        assert_eq!(credit.room(), 0); // six are under way
        assert_eq!(credit.note(&grant(5, 3)), Err(Violation::Acknowledged)); // it takes nothing back
    }
}
