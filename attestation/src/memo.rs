//! What was computed before is not computed again: signatures of endorsements and parsed manifests,
//! which are the same for every pod. Only results that depend on nothing but their input are kept,
//! under the SHA-384 of that input; dates, anchors and revocation are judged anew every time. Evidence
//! itself never comes here.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// A bounded table of results; when it is full, it begins anew.
pub(crate) struct Memo<T> {
    table: Mutex<BTreeMap<[u8; 48], T>>,
    most: usize,
}

impl<T: Clone> Memo<T> {
    pub(crate) const fn new(most: usize) -> Self {
        Self {
            table: Mutex::new(BTreeMap::new()),
            most,
        }
    }

    pub(crate) fn get(&self, key: &[u8; 48]) -> Option<T> {
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.get(key).cloned()
    }

    pub(crate) fn put(&self, key: [u8; 48], value: T) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if table.len() >= self.most {
            table.clear();
        }
        table.insert(key, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_table_begins_anew() {
        let memo = Memo::new(2);
        for n in 0..3 {
            memo.put([n; 48], n);
        }
        assert_eq!((memo.get(&[0; 48]), memo.get(&[2; 48])), (None, Some(2)));
    }
}
