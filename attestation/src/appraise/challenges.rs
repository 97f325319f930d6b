//! The nonces that were given out: each can be answered once, for a minute, by one pod. The table is
//! bounded; when it is full of unanswered nonces, no more are given out.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crate::binding::Nonce;
use crate::challenge::CHALLENGE_LIFE;

/// Most nonces at one time.
pub const MAX_CHALLENGES: usize = 16_384;

/// What a nonce was given out for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pending {
    pub(super) pod_uid: String,
    pub(super) policy_digest: [u8; 48],
    pub(super) issued: u64,
}

/// The table.
#[derive(Debug, Default)]
pub(super) struct Challenges(Mutex<BTreeMap<Nonce, Pending>>);

impl Challenges {
    fn table(&self) -> std::sync::MutexGuard<'_, BTreeMap<Nonce, Pending>> {
        // Nothing panics while it holds the lock; a poisoned table is still a table.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a nonce; says `false` when the table is full.
    pub(super) fn insert(&self, nonce: Nonce, pending: Pending) -> bool {
        let mut table = self.table();
        if table.len() >= MAX_CHALLENGES {
            let now = pending.issued;
            table.retain(|_, p| alive(p, now));
        }
        let room = table.len() < MAX_CHALLENGES;
        if room {
            table.insert(nonce, pending);
        }
        room
    }

    /// Takes a nonce out, whatever becomes of the evidence: the second who brings it finds nothing.
    /// `Err` holds what was found in place of a live nonce.
    pub(super) fn take(&self, nonce: &Nonce, now: u64) -> Result<Pending, &'static str> {
        match self.table().remove(nonce) {
            Some(pending) if alive(&pending, now) => Ok(pending),
            Some(_) => Err("given out more than 60 s ago"),
            None => Err("not given out, or answered already"),
        }
    }

    /// How many wait for an answer.
    pub(super) fn len(&self) -> usize {
        self.table().len()
    }
}

fn alive(pending: &Pending, now: u64) -> bool {
    now < pending.issued.saturating_add(CHALLENGE_LIFE) && now.saturating_add(1) >= pending.issued
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(issued: u64) -> Pending {
        Pending {
            pod_uid: "pod".into(),
            policy_digest: [0; 48],
            issued,
        }
    }

    #[test]
    fn a_nonce_is_answered_once_and_within_a_minute() {
        let table = Challenges::default();
        let (a, b) = (Nonce([1; 32]), Nonce([2; 32]));
        assert!(table.insert(a, pending(100)) && table.insert(b, pending(100)));
        assert_eq!(table.take(&a, 159), Ok(pending(100)));
        assert!(table.take(&a, 159).is_err());
        assert!(table.take(&b, 160).is_err());
        assert!(table.take(&b, 101).is_err());
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn a_full_table_gives_out_none_until_some_have_expired() {
        let table = Challenges::default();
        let nonce = |n: usize| {
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&n.to_le_bytes());
            Nonce(bytes)
        };
        for n in 0..MAX_CHALLENGES {
            assert!(table.insert(nonce(n), pending(100)));
        }
        assert!(!table.insert(nonce(MAX_CHALLENGES), pending(130)));
        assert!(table.insert(nonce(MAX_CHALLENGES), pending(161)));
        assert_eq!(table.len(), 1);
    }
}
