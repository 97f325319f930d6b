//! Appraisal for a key broker's client: the same evidence, judged the same way, but bound as the
//! broker's protocol has it, and to the client's own key. The broker has asked the nonce, and seen to
//! it that it is answered once.

use sha2::Sha384;

use super::judge::{self, Bound, tee_name};
use super::result::{self, Answers};
use super::{Embedded, VerifierError, shown};
use crate::audit::Record;
use crate::binding::{Nonce, transcript};
use crate::encoding::hex;
use crate::evidence::Tee;
use crate::init_data;
use crate::kbs::{Evidence, TeePubKey};

/// What a client brought, and what it has to be bound to.
#[derive(Debug)]
pub struct ClientRequest<'a> {
    /// The nonce that was answered.
    pub nonce: Nonce,
    /// The kind of guest.
    pub tee: Tee,
    /// Its evidence.
    pub evidence: Evidence,
    /// Its key.
    pub key: &'a TeePubKey,
    /// What REPORT_DATA has to be.
    pub report_data: [u8; 64],
    /// What the devices' nonce has to be.
    pub device_nonce: [u8; 32],
    /// Its init-data; empty if it has none.
    pub init_data: &'a [u8],
    /// Who will use the token.
    pub audience: &'a str,
}

/// What is said about evidence that is accepted.
#[derive(Clone, Debug)]
pub struct ClientAppraisal {
    /// The token, compact.
    pub token: String,
    /// When it expires, seconds since 1970.
    pub expires: u64,
    /// Digest of the evidence, hexadecimal.
    pub evidence_digest: String,
}

impl Embedded {
    /// Appraises the evidence of a key broker's client.
    ///
    /// # Errors
    /// The refusal, or why there was no decision; both mean no.
    pub fn appraise_client(
        &self,
        request: ClientRequest<'_>,
        now: u64,
    ) -> Result<ClientAppraisal, VerifierError> {
        let inputs = self.inputs();
        let evidence_digest = digest(request.tee, &request.evidence);
        let record = Record {
            event: "client-appraisal".into(),
            time: now,
            audience: shown(request.audience),
            tee: tee_name(request.tee).into(),
            evidence: evidence_digest.clone(),
            policy: hex(inputs.policy.digest()),
            init_data: hex(&init_data::digest(request.init_data)),
            ..Record::default()
        };
        let bound = Bound {
            tee: request.tee,
            report: &request.evidence.report,
            certificates: request.evidence.certificates,
            event_log: &request.evidence.event_log,
            devices: request.evidence.devices,
            init_data: request.init_data,
            report_data: request.report_data,
            device_nonce: request.device_nonce,
            pod_uid: "",
            audience: request.audience,
        };
        let answers = Answers {
            nonce: request.nonce,
            key: request.key,
            evidence_digest,
        };
        let decision = judge::judge(&inputs, &bound, now).and_then(|findings| {
            result::claims(&self.issuer, &inputs, &bound, &findings, answers, now)
        });
        let (token, claims) = self.conclude(record, decision)?;
        Ok(ClientAppraisal {
            token,
            expires: claims.exp,
            evidence_digest: claims.evidence_digest,
        })
    }
}

/// SHA-384 of `client-evidence-v1` and everything that was brought, hexadecimal.
fn digest(tee: Tee, evidence: &Evidence) -> String {
    let parts = [
        tee_name(tee).as_bytes(),
        &evidence.report,
        &evidence.event_log,
    ];
    let devices = evidence.devices.iter();
    let devices = devices.flat_map(|d| {
        let parts = [d.name.as_bytes(), &d.report[..]];
        parts.into_iter().chain(d.chain.iter().map(Vec::as_slice))
    });
    let certificates = evidence.certificates.iter().map(Vec::as_slice);
    let fields = parts.into_iter().chain(certificates).chain(devices);
    let digest: [u8; 48] = transcript::<Sha384>("client-evidence-v1", fields).into();
    hex(&digest)
}
