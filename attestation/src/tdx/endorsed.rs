//! Intel's collateral, authenticated: CRLs, TCB info and QE identity are signed under the root,
//! current, and of the right kind.

use super::collateral::Bundle;
use super::pck::Pck;
use crate::anchors::Pin;
use crate::time::Timestamp;
use crate::verdict::Checks;
use crate::x509::{self, Certificate, ChainError, Crl, CrlError, X509Error};

/// Why a signed part of the collateral is not believed.
#[derive(Debug, thiserror::Error)]
enum CollateralFault {
    #[error("Certificate cannot be read")]
    X509(#[from] X509Error),
    #[error("Chain does not lead to the root")]
    Chain(#[from] ChainError),
    #[error("Revocation")]
    Crl(#[from] CrlError),
    #[error("Signature is not the signing certificate's")]
    Signature,
    #[error("Issued {0}, next update {1}: not current at {2}")]
    Window(Timestamp, Timestamp, Timestamp),
    #[error("It is {0} version {1}")]
    Kind(String, u32),
}

/// The bundle for this platform; of several, one that is current.
pub(super) fn choose<'a>(bundles: &'a [Bundle], pck: &Pck, now: Timestamp) -> Option<&'a Bundle> {
    bundles.iter().max_by_key(|b| {
        (
            b.tcb_info.fmspc == pck.fmspc,
            b.is_current(now),
            b.tcb_info.tcb_evaluation_data_number,
            b.tcb_info.issue_date,
        )
    })
}

/// CRLs, TCB info and QE identity: authentic and current.
pub(super) fn check(
    checks: &mut Checks,
    bundle: &Bundle,
    pck_chain: &[&Certificate<'_>],
    pins: &[Pin],
    now: Timestamp,
) -> Option<()> {
    let root_crl = checks.result("root-crl-format", "a CRL", Crl::parse(&bundle.root_ca_crl))?;
    let pck_crl = checks.result("pck-crl-format", "a CRL", Crl::parse(&bundle.pck_crl))?;
    let [leaf, ca, root] = pck_chain else {
        checks.fail("pck-chain-length", "3 certificates", pck_chain.len());
        return None;
    };
    let revocation = || {
        root_crl.verify(root, now)?;
        root_crl.admits(root)?;
        root_crl.admits(ca)?;
        pck_crl.verify(ca, now)?;
        pck_crl.admits(leaf)
    };
    let ok = checks.result(
        "pck-revocation",
        "current CRLs of the root and of the PCK CA without the chain",
        revocation(),
    );
    if ok.is_some() {
        checks.valid_until(root_crl.next_update.min(pck_crl.next_update));
    }

    let info = &bundle.tcb_info;
    let signed = Signed {
        text: &bundle.tcb_info_text,
        signature: &bundle.tcb_info_signature,
        chain: &bundle.tcb_info_issuer_chain,
        window: (info.issue_date, info.next_update),
        kind: (&info.id, info.version),
        accepted: ("TDX", &[3]),
    };
    let end = checks.result(
        "tcb-info",
        "TDX version 3, signed by Intel, current",
        signed.verify(&root_crl, pins, now),
    );
    if let Some(end) = end {
        checks.valid_until(end);
    }
    let identity = &bundle.qe_identity;
    let signed = Signed {
        text: &bundle.qe_identity_text,
        signature: &bundle.qe_identity_signature,
        chain: &bundle.qe_identity_issuer_chain,
        window: (identity.issue_date, identity.next_update),
        kind: (&identity.id, identity.version),
        accepted: ("TD_QE", &[2, 3]),
    };
    let end = checks.result(
        "qe-identity",
        "TD_QE version 2 or 3, signed by Intel, current",
        signed.verify(&root_crl, pins, now),
    );
    if let Some(end) = end {
        checks.valid_until(end);
    }
    Some(())
}

/// A signed JSON part of the collateral.
struct Signed<'a> {
    text: &'a str,
    signature: &'a [u8],
    chain: &'a [Vec<u8>],
    window: (Timestamp, Timestamp),
    kind: (&'a str, u32),
    accepted: (&'a str, &'a [u32]),
}

impl Signed<'_> {
    fn verify(
        &self,
        root_crl: &Crl<'_>,
        pins: &[Pin],
        now: Timestamp,
    ) -> Result<Timestamp, CollateralFault> {
        let chain = x509::parse_all(self.chain)?;
        let chain: Vec<&Certificate<'_>> = chain.iter().collect();
        let end = x509::verify_chain(&chain, pins, now)?;
        let signer = chain.first().ok_or(CollateralFault::Signature)?;
        root_crl.admits(signer)?;
        // A PCK CA or a PCK of the same root may not sign collateral.
        let authentic = signer
            .common_name()
            .is_some_and(|n| n.ends_with("TCB Signing"))
            && signer
                .key
                .verify_endorsement_fixed(self.text.as_bytes(), self.signature);
        if !authentic {
            return Err(CollateralFault::Signature);
        }
        if self.kind.0 != self.accepted.0 || !self.accepted.1.contains(&self.kind.1) {
            return Err(CollateralFault::Kind(
                self.kind.0.chars().take(20).collect(),
                self.kind.1,
            ));
        }
        if now < self.window.0 || now > self.window.1 {
            return Err(CollateralFault::Window(self.window.0, self.window.1, now));
        }
        Ok(end.min(self.window.1))
    }
}
