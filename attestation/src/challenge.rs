//! The challenge: the verifier's nonce for one pod under one policy, with the verifier's own time,
//! signed. A guest whose clock is the host's can take the time from here.

use serde::{Deserialize, Serialize};
use sha2::Sha384;

use crate::binding::{self, Nonce, PublicKey};
use crate::encoding::unbase64url;

/// How long a nonce can be answered, seconds.
pub const CHALLENGE_LIFE: u64 = 60;
/// Longest uid of a pod.
pub const MAX_POD_UID: usize = 128;

/// Why a challenge is not believed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("Challenge is not signed by the verifier")]
pub struct ChallengeError;

/// A challenge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Challenge {
    /// To be bound into the evidence.
    pub nonce: Nonce,
    /// The pod it is for.
    pub pod_uid: String,
    /// SHA-384 of the policy that will be applied, hexadecimal.
    pub policy_digest: String,
    /// The verifier's time, seconds since 1970.
    pub issued: u64,
    /// When the nonce is no longer answered.
    pub expires: u64,
    /// ES384 over [`Self::signed`], base64url.
    pub signature: String,
}

impl Challenge {
    /// What is signed: SHA-384 of the transcript of `challenge-v1` and all fields.
    pub fn signed(&self) -> [u8; 48] {
        let (issued, expires) = (self.issued.to_le_bytes(), self.expires.to_le_bytes());
        let fields = [
            &self.nonce.0[..],
            self.pod_uid.as_bytes(),
            self.policy_digest.as_bytes(),
            &issued,
            &expires,
        ];
        binding::transcript::<Sha384>("challenge-v1", fields).into()
    }

    /// Checks that `verifier` signed it.
    ///
    /// # Errors
    /// When it did not.
    pub fn verify(&self, verifier: &PublicKey) -> Result<(), ChallengeError> {
        let signature = unbase64url(&self.signature).map_err(|_| ChallengeError)?;
        if verifier.verifies(&self.signed(), &signature) {
            Ok(())
        } else {
            Err(ChallengeError)
        }
    }
}

/// Whether a text can be a pod's uid: printable ASCII without spaces, 1 to 128 characters.
pub fn is_pod_uid(text: &str) -> bool {
    (1..=MAX_POD_UID).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic())
}
