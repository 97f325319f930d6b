//! What one client address may take: connections at once and requests a second (a token bucket). The
//! table is bounded; when it is full of addresses that are all active, the ones that come new share a
//! single bucket, so that a flood of addresses costs the newcomers and no memory.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::config::Limits;

/// Addresses that are told apart. An entry takes some 60 bytes.
const MAX_ADDRESSES: usize = 16_384;
/// Seconds' worth of requests that may come at once.
const BURST_SECONDS: f64 = 10.0;

/// All addresses.
#[derive(Debug)]
pub(crate) struct Addresses {
    per_second: f64,
    connections: u32,
    table: Mutex<HashMap<IpAddr, Use>>,
}

#[derive(Debug)]
struct Use {
    tokens: f64,
    at: Instant,
    open: u32,
}

/// A connection that counts as long as this lives.
#[derive(Debug)]
pub(crate) struct Open {
    addresses: Arc<Addresses>,
    key: IpAddr,
}

impl Addresses {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            per_second: limits.requests_per_second.into(),
            connections: limits.connections_per_address,
            table: Mutex::default(),
        }
    }

    /// Counts a connection; `None` if the address has too many.
    pub(crate) fn connect(self: &Arc<Self>, address: IpAddr) -> Option<Open> {
        let mut table = self.lock();
        let key = self.key_in(&mut table, address);
        let entry = self.entry(&mut table, key);
        if entry.open >= self.connections {
            return None;
        }
        entry.open += 1;
        let addresses = Arc::clone(self);
        Some(Open { addresses, key })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, Use>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn burst(&self) -> f64 {
        self.per_second * BURST_SECONDS
    }

    fn entry<'a>(&self, table: &'a mut HashMap<IpAddr, Use>, key: IpAddr) -> &'a mut Use {
        table.entry(key).or_insert_with(|| Use {
            tokens: self.burst(),
            at: Instant::now(),
            open: 0,
        })
    }

    /// The key an address is counted under.
    fn key_in(&self, table: &mut HashMap<IpAddr, Use>, address: IpAddr) -> IpAddr {
        let key = network(address);
        if table.len() >= MAX_ADDRESSES && !table.contains_key(&key) {
            // Whoever is not connected and has all its tokens back needs no memory.
            let now = Instant::now();
            let refill = Duration::from_secs_f64(BURST_SECONDS);
            table.retain(|_, u| u.open > 0 || now.duration_since(u.at) < refill);
            if table.len() >= MAX_ADDRESSES {
                return Ipv6Addr::UNSPECIFIED.into();
            }
        }
        key
    }
}

impl Open {
    /// Takes one request's token; whole seconds to wait if there is none.
    pub(crate) fn request(&self) -> Result<(), u64> {
        let a = &self.addresses;
        let mut table = a.lock();
        let burst = a.burst();
        let entry = a.entry(&mut table, self.key);
        let now = Instant::now();
        let gained = now.duration_since(entry.at).as_secs_f64() * a.per_second;
        entry.tokens = (entry.tokens + gained).min(burst);
        entry.at = now;
        if entry.tokens < 1.0 {
            let wait = (1.0 - entry.tokens) / a.per_second;
            return Err(wait.ceil().max(1.0) as u64);
        }
        entry.tokens -= 1.0;
        Ok(())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(entry) = self.addresses.lock().get_mut(&self.key) {
            entry.open = entry.open.saturating_sub(1);
        }
    }
}

/// What is one client: an IPv4 address, or the /64 that a host gets for itself.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let high = v6.to_bits() >> 64 << 64;
            Ipv6Addr::from_bits(high).into()
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn addresses(connections: u32, per_second: u32) -> Arc<Addresses> {
        Arc::new(Addresses::new(&Limits {
            connections_per_address: connections,
            requests_per_second: per_second,
            ..Limits::default()
        }))
    }

    #[test]
    fn an_address_has_so_many_connections_and_gets_them_back() {
        let all = addresses(2, 1);
        let a = IpAddr::from([10, 0, 0, 1]);
        let first = all.connect(a).unwrap();
        let _second = all.connect(a).unwrap();
        assert!(all.connect(a).is_none());
        assert!(all.connect(IpAddr::from([10, 0, 0, 2])).is_some());
        drop(first);
        assert!(all.connect(a).is_some());
    }

    #[test]
    fn a_burst_is_served_and_then_requests_wait() {
        let all = addresses(9, 1);
        let open = all.connect(IpAddr::from([10, 0, 0, 1])).unwrap();
        let served = (0..20).filter(|_| open.request().is_ok()).count();
        assert!((10..=11).contains(&served), "{served}");
        assert_eq!(open.request(), Err(1));
    }

    #[test]
    fn a_host_is_one_client_under_any_of_its_addresses() {
        let all = addresses(1, 1);
        let of = |text: &str| text.parse::<IpAddr>().unwrap();
        let _open = all.connect(of("2001:db8::1")).unwrap();
        assert!(all.connect(of("2001:db8::2")).is_none());
        assert!(all.connect(of("2001:db8:0:1::1")).is_some());
        let _open = all.connect(of("::ffff:10.0.0.1")).unwrap();
        assert!(all.connect(of("10.0.0.1")).is_none());
    }

    #[test]
    fn a_flood_of_addresses_takes_no_more_memory() {
        let all = addresses(4, 1);
        let known = all.connect(IpAddr::from([10, 0, 0, 1])).unwrap();
        let flood: Vec<Open> = (0..MAX_ADDRESSES as u32 + 100)
            .filter_map(|n| all.connect(Ipv4Addr::from_bits(0x0b00_0000 + n).into()))
            .collect();
        // The ones beyond the table share the four connections of one address.
        assert!(all.lock().len() <= MAX_ADDRESSES + 1);
        assert_eq!(flood.len(), MAX_ADDRESSES - 1 + 4);
        assert!(known.request().is_ok());
    }
}
