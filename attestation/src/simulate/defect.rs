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
    Tampered = "tampered": Snp "report-signature";
    /// Signed by a key that no certificate is for.
    WrongKey = "wrong-key": Snp "report-signature";
    /// Under a root that nobody pinned.
    UnknownRoot = "unknown-root": Snp "vek-chain";
    /// A certificate of the chain has expired.
    ExpiredCertificate = "expired-certificate": Snp "vek-chain";
    /// A certificate of the chain is revoked.
    Revoked = "revoked": Snp "revocation";
    /// The CRL is out of date.
    ExpiredCrl = "expired-crl": Snp "revocation";
    /// A format version that nobody knows.
    UnknownVersion = "unknown-version": Snp "report-format";
    /// The report names a kind of key that does not exist.
    UnknownSigningKey = "unknown-signing-key": Snp "signing-key";
    /// The chip's key was masked.
    MaskedChipKey = "masked-chip-key": Snp "mask-chip-key";
    /// The CPUID is that of another product.
    OtherProduct = "other-product": Snp "product";
    /// The endorsement key was derived for another TCB.
    TcbMismatch = "tcb-mismatch": Snp "vek-tcb";
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
    /// The key is that of another chip.
    OtherChip = "other-chip": Snp "chip-id";
    /// A policy bit that must be set is not.
    PolicyReserved = "policy-reserved": Snp "policy-reserved";
    /// A policy bit that nobody knows is set.
    PolicyUnknownBit = "policy-unknown-bit": Snp "policy-known-bits";
    /// The host may debug the guest.
    Debug = "debug": Snp "policy-debug";
    /// The guest may be migrated.
    MigrationAllowed = "migration-allowed": Snp "policy-migration-agent";
    /// The guest has a migration agent.
    MigrationAgent = "migration-agent": Snp "migration-agent";
    /// Multithreading is on where the guest forbids it.
    SmtForbidden = "smt-forbidden": Snp "platform-smt";
    /// The memory was not checked for aliases.
    NoAliasCheck = "no-alias-check": Snp "platform-alias-check";
    /// Asked for by the host, not by the guest.
    HostReport = "host-report": Snp "vmpl";
    /// Bound to other data: a stale nonce, another key, another pod.
    ReportData = "report-data": Snp "report-data";
    /// Another launch measurement.
    Measurement = "measurement": Snp "measurement";
    /// Other init-data.
    HostData = "host-data": Snp "host-data";
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
