//! The named defects: what can be wrong with evidence, and the check that has to find it.

use serde::Serialize;

use super::SimulateError;
use crate::verdict::Tee;

macro_rules! defects {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal: $($tee:ident $check:literal),+;)+) => {
        /// A thing that is wrong with minted evidence.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
        pub enum Defect {
            $($(#[doc = $doc])+ #[serde(rename = $name)] $variant,)+
        }

        impl Defect {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// Its name, for command lines.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// The check that refuses it in this kind of evidence; `None` where it cannot be minted.
            pub fn check(self, tee: Tee) -> Option<&'static str> {
                match (self, tee) {
                    $($((Self::$variant, Tee::$tee) => Some($check),)+)+
                    _ => None,
                }
            }
        }
    };
}

defects! {
    /// Changed after it was signed.
    Tampered = "tampered": Snp "report-signature", Tdx "quote-signature", Nvidia "report-signature";
    /// Signed by a key that no certificate is for.
    WrongKey = "wrong-key": Snp "report-signature", Tdx "quote-signature", Nvidia "report-signature";
    /// Under a root that nobody pinned.
    UnknownRoot = "unknown-root": Snp "vek-chain", Tdx "pck-chain", Nvidia "chain";
    /// A certificate of the chain has expired.
    ExpiredCertificate = "expired-certificate": Snp "vek-chain", Tdx "pck-chain", Nvidia "chain";
    /// A certificate of the chain is revoked.
    Revoked = "revoked": Snp "revocation", Tdx "pck-revocation", Nvidia "chain-revocation";
    /// The CRL or OCSP response is out of date.
    ExpiredCrl = "expired-crl": Snp "revocation", Tdx "pck-revocation", Nvidia "chain-revocation";
    /// A format version that nobody knows.
    UnknownVersion = "unknown-version": Snp "report-format", Tdx "quote-format", Nvidia "report-format";
    /// The report names a kind of key that does not exist.
    UnknownSigningKey = "unknown-signing-key": Snp "signing-key";
    /// The chip's key was masked.
    MaskedChipKey = "masked-chip-key": Snp "mask-chip-key";
    /// The CPUID is that of another product.
    OtherProduct = "other-product": Snp "product";
    /// The endorsement key was derived for another TCB.
    TcbMismatch = "tcb-mismatch": Snp "vek-tcb", Tdx "tcb-level";
    /// The reported TCB is above the current one.
    TcbAboveCurrent = "tcb-above-current": Snp "tcb-reported-not-above-current";
    /// Reserved bytes of the current TCB are set.
    TcbReserved = "tcb-reserved": Snp "tcb-layout";
    /// The current TCB is not committed.
    Provisional = "provisional": Snp "tcb-committed";
    /// The current firmware is not committed.
    FirmwareUncommitted = "firmware-uncommitted": Snp "firmware-committed";
    /// Launched at a TCB below the minimum.
    OldLaunchTcb = "old-launch-tcb": Snp "tcb-launch-minimum";
    /// The key, or the name in the report, is that of another chip.
    OtherChip = "other-chip": Snp "chip-id", Nvidia "chip";
    /// A policy bit that must be set is not.
    PolicyReserved = "policy-reserved": Snp "policy-reserved";
    /// A policy bit that nobody knows is set.
    PolicyUnknownBit = "policy-unknown-bit": Snp "policy-known-bits", Tdx "td-attributes";
    /// The host may debug the guest.
    Debug = "debug": Snp "policy-debug", Tdx "td-debug";
    /// The guest may be migrated.
    MigrationAllowed = "migration-allowed": Snp "policy-migration-agent", Tdx "td-migratable";
    /// The guest has a migration agent.
    MigrationAgent = "migration-agent": Snp "migration-agent", Tdx "service-td";
    /// Multithreading is on where the guest forbids it.
    SmtForbidden = "smt-forbidden": Snp "platform-smt";
    /// The memory was not checked for aliases.
    NoAliasCheck = "no-alias-check": Snp "platform-alias-check";
    /// Asked for by the host, not by the guest.
    HostReport = "host-report": Snp "vmpl";
    /// Bound to other data: a stale nonce, another key, another pod.
    ReportData = "report-data": Snp "report-data", Tdx "report-data", Nvidia "nonce";
    /// Another launch measurement.
    Measurement = "measurement": Snp "measurement", Tdx "mr-td", Nvidia "measurements";
    /// Other init-data.
    HostData = "host-data": Snp "host-data", Tdx "mr-config-id";
    /// Something stands behind the evidence.
    Padding = "padding": Tdx "quote-padding", Nvidia "report-format";
    /// The quoting enclave does not vouch for the attestation key.
    AttestationKey = "attestation-key": Tdx "attestation-key";
    /// The platform does not vouch for the quoting enclave.
    QeReport = "qe-report": Tdx "qe-report-signature";
    /// Another quoting enclave.
    OtherQe = "other-qe": Tdx "qe-level";
    /// Another TDX module.
    OtherModule = "other-module": Tdx "tcb-level";
    /// The TDX module is out of date.
    OutOfDate = "out-of-date": Tdx "tcb-status";
    /// The platform's TCB is revoked.
    TcbRevoked = "tcb-revoked": Tdx "tcb-status";
    /// The collateral is out of date.
    ExpiredCollateral = "expired-collateral": Tdx "tcb-info";
    /// The collateral was changed after it was signed.
    TamperedCollateral = "tampered-collateral": Tdx "tcb-info", Nvidia "driver-rim-signature";
    /// The quoting enclave's identity is out of date.
    ExpiredQeIdentity = "expired-qe-identity": Tdx "qe-identity";
    /// The quoting enclave's identity was changed after it was signed.
    TamperedQeIdentity = "tampered-qe-identity": Tdx "qe-identity";
    /// The collateral is of another platform.
    OtherPlatform = "other-platform": Tdx "fmspc";
    /// The collateral is of another provisioning enclave.
    OtherPce = "other-pce": Tdx "pce-id";
    /// The collateral is of an evaluation below the minimum.
    OldEvaluation = "old-evaluation": Tdx "tcb-evaluation-number";
    /// The TD takes exceptions on pages that the host took away.
    SeptVe = "sept-ve": Tdx "td-sept-ve-disable";
    /// Processor features that nobody allowed.
    Xfam = "xfam": Tdx "xfam";
    /// The event log does not make the registers.
    EventLog = "event-log": Tdx "event-log-rtmr1";
    /// A certificate of the chain is missing.
    ShortChain = "short-chain": Nvidia "chain-length";
    /// The responder does not know a certificate.
    UnknownToResponder = "unknown-to-responder": Nvidia "chain-revocation";
    /// The firmware is not the one that was certified.
    OtherFirmware = "other-firmware": Nvidia "fwid";
    /// A decoder status that nobody knows.
    UnknownDecoder = "unknown-decoder": Nvidia "nvdec0-status";
    /// A feature mode that nobody knows.
    UnknownMode = "unknown-mode": Nvidia "mode";
    /// The driver's manifest is of another version.
    RimVersion = "rim-version": Nvidia "driver-rim-version";
    /// The driver's manifest is signed under a root that nobody pinned.
    RimRoot = "rim-root": Nvidia "driver-rim-chain";
    /// The manifests' signer is revoked.
    RimRevoked = "rim-revoked": Nvidia "driver-rim-revocation";
    /// Both manifests name the same index.
    RimOverlap = "rim-overlap": Nvidia "rim-overlap";
}

impl Defect {
    /// The defect of this name.
    ///
    /// # Errors
    /// When there is none, or evidence of this kind cannot have it.
    pub fn from_name(name: &str, tee: Tee) -> Result<Self, SimulateError> {
        let known = Self::ALL.iter().find(|d| d.name() == name);
        known
            .copied()
            .filter(|d| d.check(tee).is_some())
            .ok_or_else(|| SimulateError::Defect(name.chars().take(40).collect(), Self::list(tee)))
    }

    /// The names of all defects that evidence of this kind can have.
    pub fn list(tee: Tee) -> String {
        let names: Vec<&str> = Self::ALL
            .iter()
            .filter(|d| d.check(tee).is_some())
            .map(|d| d.name())
            .collect();
        names.join(", ")
    }

    pub(super) fn demand(defect: Option<Self>, tee: Tee) -> Result<(), SimulateError> {
        match defect.filter(|d| d.check(tee).is_none()) {
            Some(d) => Err(SimulateError::Defect(d.name().into(), Self::list(tee))),
            None => Ok(()),
        }
    }
}
