//! All connections of one engine, how they are found, and how many there may be. Accounting only;
//! nothing is sent or received here.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;

use super::connection::{Connection, Key, Origin, State};
use super::limits::Limits;

/// Names a connection for as long as it lives; never that of a later one in the same place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Id(pub(super) u64);

impl Id {
    fn new(index: usize, generation: u32) -> Self {
        Self(u64::from(generation) << 32 | index as u64)
    }

    fn index(self) -> usize {
        (self.0 & 0xffff_ffff) as usize
    }
}

#[derive(Default)]
struct Place {
    generation: u32,
    connection: Option<Connection>,
}

/// The connections.
pub(super) struct Table {
    limits: Limits,
    places: Vec<Place>,
    free: Vec<usize>,
    keys: HashMap<Key, Id>,
    /// Sum of the windows of all connections, bytes.
    reserved: usize,
    next_serial: u64,
    next_port: u32,
}

/// First of the host's ports for connections it opens; they cannot be mistaken for services.
const FIRST_PORT: u32 = 1 << 30;

impl Table {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            places: Vec::new(),
            free: Vec::new(),
            keys: HashMap::new(),
            reserved: 0,
            next_serial: 0,
            next_port: FIRST_PORT,
        }
    }

    pub(super) fn get(&mut self, id: Id) -> Option<&mut Connection> {
        let place = self.places.get_mut(id.index())?;
        let found = place.connection.as_mut()?;
        (Id::new(id.index(), place.generation) == id).then_some(found)
    }

    pub(super) fn find(&self, key: Key) -> Option<Id> {
        self.keys.get(&key).copied()
    }

    pub(super) fn ids(&self) -> Vec<Id> {
        let ids = self.places.iter().enumerate();
        ids.filter(|(_, place)| place.connection.is_some())
            .map(|(index, place)| Id::new(index, place.generation))
            .collect()
    }

    /// Takes in a client that has yet to say what it wants.
    pub(super) fn add_greeting(&mut self, stream: UnixStream) -> Id {
        let serial = self.serial();
        self.put(Connection::greeting(stream, serial))
    }

    /// Takes in a connection that the guest asked for.
    pub(super) fn add_accepted(
        &mut self,
        key: Key,
        make: impl FnOnce(u64, u32) -> Connection,
    ) -> Option<Id> {
        let window = self.limits.next_window(self.reserved)?;
        let serial = self.serial();
        let id = self.put(make(serial, window));
        self.reserved += window as usize;
        self.keys.insert(key, id);
        Some(id)
    }

    /// Turns a greeting into a request for `guest_port`. Returns whether there is room for it.
    pub(super) fn start_request(&mut self, id: Id, guest_port: u32) -> bool {
        let Some(window) = self.limits.next_window(self.reserved) else {
            return false;
        };
        let key = self.free_key(guest_port);
        let Some(connection) = self.get(id) else {
            return false;
        };
        connection.request(key, window);
        self.reserved += window as usize;
        self.keys.insert(key, id);
        true
    }

    /// Whether one more connection of this origin fits.
    pub(super) fn has_room(&self, origin: Origin) -> bool {
        let most = match origin {
            Origin::Host => self.limits.host_connections,
            Origin::Guest => self.limits.guest_connections,
        };
        let counted = |c: &&Connection| c.origin == origin && c.state != State::Greeting;
        self.connections().filter(counted).count() < most
    }

    /// The oldest greeting, when there are as many as there may be.
    pub(super) fn greeting_to_evict(&self) -> Option<Id> {
        let greetings = || self.entries().filter(|(_, c)| c.state == State::Greeting);
        if greetings().count() < self.limits.greetings {
            return None;
        }
        let oldest = greetings().min_by_key(|(_, c)| c.serial)?;
        Some(oldest.0)
    }

    /// The oldest connection of this origin that only waits for the guest's RST.
    pub(super) fn lingering(&self, origin: Origin) -> Option<Id> {
        self.entries()
            .filter(|(_, c)| c.origin == origin && c.state == State::Lingering)
            .min_by_key(|(_, c)| c.serial)
            .map(|(id, _)| id)
    }

    /// The guest may use the connection's ports anew; the connection itself stays.
    pub(super) fn forget_key(&mut self, id: Id) {
        if let Some(key) = self.get(id).map(|c| c.key)
            && self.keys.get(&key) == Some(&id)
        {
            self.keys.remove(&key);
        }
    }

    /// Takes a connection out.
    pub(super) fn remove(&mut self, id: Id) -> Option<Connection> {
        self.get(id)?;
        self.forget_key(id);
        let place = self.places.get_mut(id.index())?;
        let connection = place.connection.take()?;
        place.generation = place.generation.wrapping_add(1);
        self.free.push(id.index());
        self.reserved -= connection.window() as usize;
        Some(connection)
    }

    pub(super) fn connections(&self) -> impl Iterator<Item = &Connection> {
        self.entries().map(|(_, connection)| connection)
    }

    fn entries(&self) -> impl Iterator<Item = (Id, &Connection)> {
        let places = self.places.iter().enumerate();
        places.filter_map(|(index, place)| {
            let connection = place.connection.as_ref()?;
            Some((Id::new(index, place.generation), connection))
        })
    }

    fn put(&mut self, connection: Connection) -> Id {
        let index = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place::default());
            self.places.len() - 1
        });
        let place = &mut self.places[index];
        place.connection = Some(connection);
        Id::new(index, place.generation)
    }

    fn serial(&mut self) -> u64 {
        self.next_serial += 1;
        self.next_serial
    }

    fn free_key(&mut self, guest_port: u32) -> Key {
        loop {
            let key = Key {
                host_port: self.next_port,
                guest_port,
            };
            self.next_port = FIRST_PORT | (self.next_port.wrapping_add(1) & (FIRST_PORT - 1));
            if !self.keys.contains_key(&key) {
                return key;
            }
        }
    }

    /// Panics when the accounting does not add up. For tests.
    pub(super) fn check(&self) {
        let windows: usize = self.connections().map(|c| c.window() as usize).sum();
        assert_eq!(self.reserved, windows, "reserved memory");
        assert!(self.reserved <= self.limits.memory, "memory limit");
        let count = |origin, greeting| {
            self.connections()
                .filter(|c| c.origin == origin && (c.state == State::Greeting) == greeting)
                .count()
        };
        assert!(count(Origin::Host, false) <= self.limits.host_connections);
        assert!(count(Origin::Guest, false) <= self.limits.guest_connections);
        assert!(count(Origin::Host, true) <= self.limits.greetings);
        for (id, connection) in self.entries() {
            assert!(
                connection.backlog() <= connection.window() as usize,
                "backlog"
            );
            let keyed = !matches!(connection.state, State::Greeting | State::Draining);
            assert_eq!(self.find(connection.key) == Some(id), keyed, "key");
        }
        assert!(self.keys.len() <= self.connections().count());
    }
}
