//! What the shim is told without asking: the last pressure on memory, and the end. Of each kind only the
//! newest is kept, so that a guest cannot make them pile up.

use sealpod_protocol::vmm::{Ended, Event, MemoryPressure, ended::How, event::Kind};
use tokio::sync::watch;

use crate::machine;

/// How it all ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// By itself.
    Machine(machine::End),
    /// The shim wanted it.
    Stopped,
}

/// See the file's head. Written from any thread.
#[derive(Debug, Default)]
pub(super) struct Events(watch::Sender<State>);

#[derive(Debug, Default)]
struct State {
    /// Bytes that the balloon has left.
    pressure: Option<u64>,
    end: Option<End>,
    end_told: bool,
}

impl Events {
    pub(super) fn pressure(&self, balloon_bytes: u64) {
        self.0
            .send_modify(|state| state.pressure = Some(balloon_bytes));
    }

    /// Only the first counts.
    pub(super) fn end(&self, end: End) {
        self.0.send_modify(|state| {
            state.end.get_or_insert(end);
        });
    }

    /// Returns when there is an end.
    pub(super) async fn ended(&self) -> Option<End> {
        let mut changes = self.0.subscribe();
        let state = changes.wait_for(|state| state.end.is_some()).await;
        state.ok().and_then(|state| state.end.clone())
    }

    /// The next event; none after the end.
    pub(super) async fn next(&self) -> Option<Event> {
        let mut changes = self.0.subscribe();
        loop {
            let mut found = None;
            self.0.send_if_modified(|state| {
                found = state.take();
                false
            });
            if let Some(found) = found {
                return found;
            }
            changes.changed().await.ok()?;
        }
    }
}

impl State {
    /// Something to tell, or that there will be nothing more.
    fn take(&mut self) -> Option<Option<Event>> {
        let kind = match (self.pressure.take(), &self.end) {
            (Some(balloon_bytes), _) => Kind::MemoryPressure(MemoryPressure {
                balloon_bytes,
                ..Default::default()
            }),
            (None, Some(_)) if self.end_told => return Some(None),
            (None, Some(end)) => {
                self.end_told = true;
                Kind::Ended(ended(end))
            }
            (None, None) => return None,
        };
        Some(Some(Event {
            kind: Some(kind),
            ..Default::default()
        }))
    }
}

fn ended(end: &End) -> Ended {
    let (how, reason) = match end {
        End::Machine(machine::End::Reset) => (How::RESET, ""),
        End::Machine(machine::End::TripleFault) => (How::TRIPLE_FAULT, ""),
        End::Machine(machine::End::Failed(why)) => (How::FAILED, why.as_str()),
        End::Stopped => (How::STOPPED, ""),
    };
    Ended {
        how: how.into(),
        reason: reason.into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_newest_pressure_is_told_then_the_first_end_and_then_nothing() {
        let events = Events::default();
        events.pressure(2);
        events.pressure(1);
        let failed = machine::End::Failed("why".into());
        events.end(End::Machine(failed));
        events.end(End::Stopped);
        let Some(Kind::MemoryPressure(pressure)) = events.next().await.unwrap().kind else {
            panic!("no pressure");
        };
        assert_eq!(pressure.balloon_bytes, 1);
        let Some(Kind::Ended(end)) = events.next().await.unwrap().kind else {
            panic!("no end");
        };
        assert_eq!((end.how, &*end.reason), (How::FAILED.into(), "why"));
        assert_eq!(events.next().await, None);
    }

    #[tokio::test]
    async fn whoever_waits_hears_what_comes_later() {
        let events = std::sync::Arc::new(Events::default());
        let waiting = tokio::spawn({
            let events = std::sync::Arc::clone(&events);
            async move { events.next().await }
        });
        tokio::task::yield_now().await;
        events.end(End::Stopped);
        assert!(waiting.await.unwrap().unwrap().has_ended());
        assert_eq!(events.ended().await, Some(End::Stopped));
    }
}
