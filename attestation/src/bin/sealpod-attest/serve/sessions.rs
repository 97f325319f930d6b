//! Sessions of key-broker clients: from the challenge to the end of what the evidence was good for. A
//! session's nonce is answered once, well or badly. The table is bounded.
//!
//! ```text
//!   auth ──▶ Challenged ──attest: taken out──▶ judged ──accepted──▶ Attested ──end──▶ gone
//!                └──────────────60 s──────────▶ gone      └─refused─▶ gone
//! ```

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sealpod_attestation::binding::Nonce;
use sealpod_attestation::encoding::base64url;
use sealpod_attestation::kbs::{Binding, Tee, TeePubKey};

/// Sessions at once. One takes less than 2 KiB.
const MAX_SESSIONS: usize = 8192;
/// Time to answer a challenge.
const ANSWER: Duration = Duration::from_secs(60);

/// What is asked of a client.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    /// As the client has it: base64.
    pub(crate) nonce: String,
    pub(crate) bytes: Nonce,
    pub(crate) tee: Tee,
    pub(crate) binding: Binding,
}

/// What a client has proved.
#[derive(Debug)]
pub(crate) struct Attested {
    pub(crate) key: TeePubKey,
    /// Digest of the evidence, hexadecimal, for the audit log.
    pub(crate) evidence: String,
}

#[derive(Debug)]
enum State {
    Challenged(Asked),
    Attested(Arc<Attested>),
}

/// All sessions, by the value of their cookie.
#[derive(Debug, Default)]
pub(crate) struct Sessions(Mutex<HashMap<String, (Instant, State)>>);

impl Sessions {
    /// Opens a session: the value of its cookie. `None` if there are too many.
    pub(crate) fn open(&self, asked: Asked, id: [u8; 32]) -> Option<String> {
        let id = base64url(&id);
        self.insert(
            id.clone(),
            Instant::now() + ANSWER,
            State::Challenged(asked),
        )
        .then_some(id)
    }

    /// Takes a session that waits for evidence: whatever follows, its nonce is used.
    pub(crate) fn take(&self, id: &str) -> Option<Asked> {
        let mut table = self.lock();
        match table.get(id) {
            Some((_, State::Challenged(_))) => {}
            _ => return None,
        }
        match table.remove(id)? {
            (end, State::Challenged(asked)) if end > Instant::now() => Some(asked),
            _ => None,
        }
    }

    /// Puts a session back whose evidence was accepted, for so long.
    pub(crate) fn attested(&self, id: &str, attested: Attested, life: Duration) -> bool {
        let state = State::Attested(Arc::new(attested));
        self.insert(id.to_owned(), Instant::now() + life, state)
    }

    /// What the client of this session has proved.
    pub(crate) fn get(&self, id: &str) -> Option<Arc<Attested>> {
        match self.lock().get(id)? {
            (end, State::Attested(attested)) if *end > Instant::now() => Some(Arc::clone(attested)),
            _ => None,
        }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.lock().len()
    }

    fn insert(&self, id: String, end: Instant, state: State) -> bool {
        let mut table = self.lock();
        if table.len() >= MAX_SESSIONS {
            let now = Instant::now();
            table.retain(|_, (end, _)| *end > now);
            if table.len() >= MAX_SESSIONS {
                return false;
            }
        }
        table.insert(id, (end, state));
        true
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, (Instant, State)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked() -> Asked {
        Asked {
            nonce: "n".into(),
            bytes: Nonce([0; 32]),
            tee: Tee::Snp,
            binding: Binding::Sha384,
        }
    }

    fn attested() -> Attested {
        let key = TeePubKey::AKP {
            alg: "a".into(),
            public_key: "k".into(),
        };
        Attested {
            key,
            evidence: String::new(),
        }
    }

    #[test]
    fn a_challenge_is_answered_once() {
        let sessions = Sessions::default();
        let id = sessions.open(asked(), [1; 32]).unwrap();
        assert!(sessions.get(&id).is_none());
        assert!(sessions.take(&id).is_some());
        assert!(sessions.take(&id).is_none());
        assert!(sessions.take("unknown").is_none());
    }

    #[test]
    fn what_was_proved_ends() {
        let sessions = Sessions::default();
        assert!(sessions.attested("a", attested(), Duration::ZERO));
        assert!(sessions.get("a").is_none());
        assert!(sessions.attested("b", attested(), Duration::from_secs(60)));
        assert!(sessions.get("b").is_some());
        // An attested session waits for nothing.
        assert!(sessions.take("b").is_none());
        assert!(sessions.get("b").is_some());
    }

    #[test]
    fn a_full_table_takes_no_more_until_sessions_end() {
        let sessions = Sessions::default();
        for n in 0..MAX_SESSIONS - 1 {
            assert!(sessions.attested(&n.to_string(), attested(), Duration::from_secs(60)));
        }
        assert!(sessions.attested("ends", attested(), Duration::ZERO));
        assert!(sessions.open(asked(), [2; 32]).is_some());
        assert!(sessions.open(asked(), [3; 32]).is_none());
        assert_eq!(sessions.count(), MAX_SESSIONS);
    }
}
