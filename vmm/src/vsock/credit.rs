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
    use proptest::{collection::vec, prelude::*};

    use super::*;

    /// One step of a connection. What may be refused is in turn any number, and one about as large as
    /// there is room for.
    #[derive(Debug, Clone)]
    enum Step {
        Note { buf_alloc: u32, ahead: Amount },
        Receive(Amount),
        Forward(u32),
        Send(u32),
        Tell,
    }

    #[derive(Debug, Clone)]
    enum Amount {
        Any(u32),
        /// So much more than would fill what is free, less one.
        AtEdge(u32),
    }

    impl Amount {
        fn of(self, free: u64) -> u64 {
            match self {
                Self::Any(amount) => amount.into(),
                Self::AtEdge(more) => (free + u64::from(more)).saturating_sub(1),
            }
        }
    }

    fn step() -> impl Strategy<Value = Step> {
        let number = prop_oneof![0..5000_u32, any::<u32>(), u32::MAX - 2..=u32::MAX];
        let amount = prop_oneof![
            number.clone().prop_map(Amount::Any),
            (0..3_u32).prop_map(Amount::AtEdge)
        ];
        prop_oneof![
            (number.clone(), amount.clone())
                .prop_map(|(buf_alloc, ahead)| Step::Note { buf_alloc, ahead }),
            amount.prop_map(Step::Receive),
            number.clone().prop_map(Step::Forward),
            number.prop_map(Step::Send),
            Just(Step::Tell),
        ]
    }

    proptest! {
        /// Beside numbers that do not go around: what was sent, acknowledged, received and forwarded in all.
        #[test]
        fn whatever_comes_no_side_is_granted_more_than_it_has(
            (window, guest_window, start) in (1..10_000_u32, any::<u32>(), any::<u32>()),
            steps in vec(step(), 0..60),
        ) {
            let at = Wrapping(start);
            let mut credit = Credit {
                received: at,
                forwarded: at,
                told: at,
                guest_forwarded: at,
                sent: at,
                ..Credit::new(window, guest_window)
            };
            let (mut sent, mut acknowledged) = (0_u64, 0_u64);
            let (mut received, mut forwarded) = (0_u64, 0_u64);
            let mut granted = guest_window;
            for step in steps {
                let free = u64::from(window) - (received - forwarded);
                match step {
                    Step::Note { buf_alloc, ahead } => {
                        let under_way = sent - acknowledged;
                        let ahead = ahead.of(under_way).min(u32::MAX.into());
                        let fwd_cnt = start.wrapping_add((acknowledged + ahead) as u32);
                        let noted = credit.note(&grant(buf_alloc, fwd_cnt));
                        prop_assert_eq!(noted.is_ok(), ahead <= under_way);
                        if noted.is_ok() {
                            acknowledged += ahead;
                            granted = buf_alloc;
                        }
                    }
                    Step::Receive(count) => {
                        let count = count.of(free);
                        let taken = credit.receive(count as usize);
                        prop_assert_eq!(taken.is_ok(), count <= free);
                        received += if taken.is_ok() { count } else { 0 };
                    }
                    Step::Forward(count) => {
                        let count = u64::from(count).min(received - forwarded);
                        credit.forward(count as usize);
                        forwarded += count;
                    }
                    Step::Send(count) => {
                        let count = count.min(credit.room());
                        credit.send(count);
                        sent += u64::from(count);
                    }
                    Step::Tell => {
                        let told = start.wrapping_add(forwarded as u32);
                        prop_assert_eq!(credit.tell(), (window, told));
                        prop_assert!(!credit.is_due());
                    }
                }
                let room = u64::from(granted).saturating_sub(sent - acknowledged);
                prop_assert_eq!(u64::from(credit.room()), room);
            }
        }
    }

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
