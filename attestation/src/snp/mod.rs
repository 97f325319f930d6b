//! AMD SEV-SNP: attestation reports, the chain of their signing keys, and the verifier.

mod cert_table;
mod checks;
mod product;
mod report;
mod tcb;
mod vek;
mod verify;

pub use cert_table::{CertTableError, cert_table, looks_like_cert_table};
pub use product::Product;
pub use report::{
    GuestPolicy, KeyInfo, PlatformInfo, REPORT_LENGTH, Report, ReportError, SIGNED_LENGTH,
    SigningKey,
};
pub use tcb::Tcb;
pub use vek::{Vek, VekError};
pub use verify::{SnpLimits, SnpPolicy, verify};
