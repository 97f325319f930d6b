//! What a guest without a TEE asks the shim's simulator on [`crate::SIMULATOR_PORT`]: evidence, where the
//! hardware would give it. Encoding only.
//!
//! One request and one answer a connection, little endian:
//!
//! ```text
//! request:  kind u8 | key [32] | nonce [64 or 32] | device length u8 | device
//! answer:   length u32 | first blob | length u32 | second blob
//! ```
//! The key is the one that the shim gave the agent for this request: a process in a container can
//! connect too, and gets nothing without it. A refused request is a connection that ends.

/// Length of the key, bytes.
pub const KEY_LEN: usize = 32;
/// Longest answer's blob, bytes.
pub const BLOB_MAX: usize = 1 << 20;
/// Longest device id, bytes.
pub const DEVICE_MAX: usize = 128;
/// Longest encoded request, bytes.
pub const REQUEST_MAX: usize = 1 + KEY_LEN + 64 + 1 + DEVICE_MAX;

const REPORT: u8 = 1;
const GPU: u8 = 2;

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// A report over these 64 bytes; answered by the report and its endorsements, or a quote and its event
    /// log.
    Report([u8; 64]),
    /// Evidence of a device over this nonce; answered by the report and its certificates.
    Gpu {
        /// Nonce.
        nonce: [u8; 32],
        /// Id of the device.
        device: String,
    },
}

/// A request.
#[derive(Clone, PartialEq, Eq)]
pub struct Request {
    /// Proves that the agent asks.
    pub key: [u8; KEY_LEN],
    /// What is asked for.
    pub ask: Ask,
}

impl Request {
    /// As it is sent. A device id of more than [`DEVICE_MAX`] bytes is cut, and so refused.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (kind, nonce, device) = match &self.ask {
            Ask::Report(data) => (REPORT, &data[..], ""),
            Ask::Gpu { nonce, device } => (GPU, &nonce[..], device.as_str()),
        };
        let device = &device.as_bytes()[..device.len().min(DEVICE_MAX)];
        let mut bytes = vec![kind];
        bytes.extend_from_slice(&self.key);
        bytes.extend_from_slice(nonce);
        bytes.push(device.len() as u8);
        bytes.extend_from_slice(device);
        bytes
    }

    /// The request that `bytes` are, if they are exactly one; `None` while some are missing or if they
    /// are none.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (kind, rest) = bytes.split_first()?;
        let (key, rest) = rest.split_first_chunk::<KEY_LEN>()?;
        let (data, rest) = match *kind {
            REPORT => rest.split_at_checked(64)?,
            GPU => rest.split_at_checked(32)?,
            _ => return None,
        };
        let (length, device) = rest.split_first()?;
        if device.len() != usize::from(*length) || device.len() > DEVICE_MAX {
            return None;
        }
        let ask = match *kind {
            REPORT if device.is_empty() => Ask::Report(data.try_into().ok()?),
            REPORT => return None,
            _ => Ask::Gpu {
                nonce: data.try_into().ok()?,
                device: std::str::from_utf8(device).ok()?.to_owned(),
            },
        };
        Some(Self { key: *key, ask })
    }
}

/// An answer of two blobs, as it is sent.
#[must_use]
pub fn answer(first: &[u8], second: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(first.len() + second.len() + 8);
    for blob in [first, second] {
        bytes.extend_from_slice(&(blob.len() as u32).to_le_bytes());
        bytes.extend_from_slice(blob);
    }
    bytes
}

/// The two blobs of a whole answer; `None` if it is none.
#[must_use]
pub fn blobs(bytes: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    fn blob(bytes: &[u8]) -> Option<(Vec<u8>, &[u8])> {
        let (length, rest) = bytes.split_first_chunk::<4>()?;
        let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
        let (blob, rest) = rest
            .split_at_checked(length)
            .filter(|_| length <= BLOB_MAX)?;
        Some((blob.to_vec(), rest))
    }
    let (first, rest) = blob(bytes)?;
    let (second, rest) = blob(rest)?;
    rest.is_empty().then_some((first, second))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_answers_survive_the_way_and_no_part_of_one_is_taken_for_it() {
        for ask in [
            Ask::Report([7; 64]),
            Ask::Gpu {
                nonce: [8; 32],
                device: "stand-in-0".into(),
            },
        ] {
            let request = Request {
                key: [1; KEY_LEN],
                ask,
            };
            let bytes = request.encode();
            assert!(bytes.len() <= REQUEST_MAX);
            assert!(Request::decode(&bytes).as_ref() == Some(&request));
            for cut in 0..bytes.len() {
                assert!(Request::decode(&bytes[..cut]).is_none());
            }
            let longer = [&bytes[..], &[0]].concat();
            assert!(Request::decode(&longer).is_none());
        }
        let bytes = answer(b"report", b"chain");
        assert_eq!(blobs(&bytes), Some((b"report".to_vec(), b"chain".to_vec())));
        for cut in 0..bytes.len() {
            assert_eq!(blobs(&bytes[..cut]), None);
        }
        assert_eq!(blobs(&[0xff; 64]), None);
    }
}
