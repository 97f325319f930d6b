//! What clients and gates read: tokens, challenges, init-data, the key broker's messages, and what the
//! policy is given to judge. No token is believed that the key did not sign.
//!
//! The first byte of the input chooses the reader.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use sealpod_attestation::binding::{EphemeralKey, PublicKey};
use sealpod_attestation::challenge::Challenge;
use sealpod_attestation::init_data::InitData;
use sealpod_attestation::kbs::{self, Binding, Evidence, Tee};
use sealpod_attestation::policy::Policy;
use sealpod_attestation::token::{self, Expected};

/// A verifier whose private key is not used.
fn verifier() -> &'static PublicKey {
    static KEY: OnceLock<PublicKey> = OnceLock::new();
    KEY.get_or_init(|| EphemeralKey::from_random(&[1; 48]).expect("a key").public())
}

fn policy() -> &'static Policy {
    static POLICY: OnceLock<Policy> = OnceLock::new();
    POLICY.get_or_init(|| Policy::built_in().expect("the default policy"))
}

fuzz_target!(|data: &[u8]| {
    let Some((choice, bytes)) = data.split_first() else {
        return;
    };
    let text = || std::str::from_utf8(bytes).unwrap_or_default();
    match choice % 7 {
        0 => {
            let _ = token::peek(text());
            let expected = Expected {
                verifiers: std::slice::from_ref(verifier()),
                audience: "gate",
                pod_uid: "pod",
                confirmation: None,
                nonce: None,
                init_data_digest: None,
                now: 1_795_219_200,
                allow_simulated: true,
                devices: &[],
            };
            assert!(
                token::check(text(), &expected).is_err(),
                "a token nobody signed"
            );
        }
        1 => {
            if let Ok(challenge) = serde_json::from_slice::<Challenge>(bytes) {
                assert!(
                    challenge.verify(verifier()).is_err(),
                    "a challenge nobody signed"
                );
            }
        }
        2 => {
            if let Ok(read) = InitData::parse(bytes) {
                let _ = (read.verifier(), read.audience(), read.allows_simulated());
                let again = InitData::parse(read.to_text().as_bytes())
                    .expect("what is written can be read");
                assert_eq!(again.data, read.data);
            }
        }
        3 => drop(kbs::parse_request(bytes)),
        4 => {
            if let Ok(message) = kbs::parse_attestation(bytes) {
                let key = &message.runtime_data.tee_pubkey;
                let evidence = &message.tee_evidence;
                let bound = Binding::Sha512.report_data(
                    &message.runtime_data.nonce,
                    key,
                    &evidence.additional_evidence,
                );
                let _ = (
                    bound,
                    Evidence::read(Tee::Snp, evidence),
                    Evidence::read(Tee::Tdx, evidence),
                );
                let _ = kbs::encrypt(key, b"secret");
            }
        }
        5 => {
            if let Ok(input) = serde_json::from_slice::<serde_json::Value>(bytes) {
                // The default policy demands checks that only a verifier can report.
                let decision = policy().evaluate(&input);
                let named = input.pointer("/cpu/checks/report-data").is_some();
                assert!(
                    named || !decision.is_ok_and(|d| d.allow),
                    "allowed: {input}"
                );
            }
        }
        _ => drop(serde_json::from_slice::<PublicKey>(bytes)),
    }
});
