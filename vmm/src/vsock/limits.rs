//! How much one guest, and its host's clients, can make an engine hold. Numbers only.

use super::Error;

/// Smallest receive window a connection is given, bytes.
pub(super) const MIN_WINDOW: u32 = 4096;

/// A connection is promised this part of the memory that is left: the first ones get full windows,
/// later ones shrink, none fails for want of memory before the table is full.
const SHARE: usize = 64;

/// Caps of one engine. The defaults hold at most 16 MiB in the worst case and nothing when idle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections that the host opened, at a time.
    pub host_connections: usize,
    /// Connections that the guest opened, at a time. Separate, so that a process in the guest
    /// cannot use up what the host needs to reach the agent.
    pub guest_connections: usize,
    /// Host clients that have not yet sent their `CONNECT` line; one more closes the oldest.
    pub greetings: usize,
    /// Largest receive window of a connection: what the guest may send before the host client has
    /// read it, bytes.
    pub window: u32,
    /// Sum of all windows, bytes. Only what host clients do not read is really allocated.
    pub memory: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            host_connections: 192,
            guest_connections: 64,
            greetings: 32,
            window: 256 * 1024,
            memory: 16 * 1024 * 1024,
        }
    }
}

impl Limits {
    /// Refuses limits under which a connection could not work.
    pub(super) fn check(&self) -> Result<(), Error> {
        let connections = self.host_connections.saturating_add(self.guest_connections);
        if self.host_connections == 0 || self.guest_connections == 0 || self.greetings == 0 {
            return Err(Error::Limits("no connections are allowed"));
        }
        if connections.saturating_add(self.greetings) > 65536 {
            return Err(Error::Limits("more than 65536 connections"));
        }
        if self.window < MIN_WINDOW {
            return Err(Error::Limits("a window is at least 4096 bytes"));
        }
        if self.memory < connections * MIN_WINDOW as usize {
            return Err(Error::Limits(
                "memory is below 4096 bytes for each connection",
            ));
        }
        Ok(())
    }

    /// Window for one more connection, bytes, or `None` when `reserved` is already all there is.
    pub(super) fn next_window(&self, reserved: usize) -> Option<u32> {
        let left = self.memory.saturating_sub(reserved);
        let share = u32::try_from(left / SHARE).unwrap_or(u32::MAX);
        let window = share.min(self.window).max(MIN_WINDOW);
        (window as usize <= left).then_some(window)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_lasts_for_every_connection_the_table_can_hold() {
        let limits = Limits::default();
        let mut reserved = 0;
        for n in 0..limits.host_connections + limits.guest_connections {
            let window = limits.next_window(reserved);
            let window = window.unwrap_or_else(|| panic!("no window for connection {n}"));
            assert!((MIN_WINDOW..=limits.window).contains(&window));
            reserved += window as usize;
        }
        assert!(reserved <= limits.memory);
    }

    #[test]
    fn unusable_limits_are_refused() {
        let good = Limits::default();
        assert!(good.check().is_ok());
        for bad in [
            Limits {
                host_connections: 0,
                ..good
            },
            Limits {
                guest_connections: 100_000,
                ..good
            },
            Limits {
                greetings: 0,
                ..good
            },
            Limits {
                window: 100,
                ..good
            },
            Limits {
                memory: 4096,
                ..good
            },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }
}
