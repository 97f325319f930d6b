//! Attestation: evidence in, verdict out.
//!
//! This room verifies SEV-SNP reports, TDX quotes and NVIDIA GPU and NVSwitch reports, offline:
//! trust anchors, the time and all collateral are values handed in. Everything that is parsed here
//! is hostile.
//!
//! The way evidence takes: bytes → parser (`snp::Report`, `tdx::Quote`, `nvidia::Report`) →
//! verifier → `Verdict`, a list of typed checks with what was expected and what was found → policy →
//! token, which the gates check.
//!
//! Two faces. Without features: what the guest's agent links ([`binding`], [`evidence`],
//! [`init_data`], [`token`]), small and without C code. With `verify`: everything else.

pub mod binding;
pub mod challenge;
pub mod encoding;
pub mod evidence;
pub mod init_data;
pub mod token;

#[cfg(feature = "verify")]
pub mod anchors;
#[cfg(feature = "verify")]
pub mod appraise;
#[cfg(feature = "verify")]
pub mod audit;
#[cfg(feature = "verify")]
pub mod collateral;
#[cfg(feature = "verify")]
pub mod crypto;
#[cfg(feature = "verify")]
pub mod der;
#[cfg(feature = "kbs")]
pub mod kbs;
#[cfg(feature = "verify")]
pub mod measure;
#[cfg(feature = "verify")]
mod memo;
#[cfg(feature = "verify")]
pub mod nvidia;
#[cfg(feature = "verify")]
pub mod ocsp;
#[cfg(feature = "verify")]
pub mod policy;
#[cfg(feature = "verify")]
pub mod reference;
#[cfg(feature = "remote")]
pub mod remote;
#[cfg(feature = "verify")]
pub mod signer;
#[cfg(feature = "verify")]
pub mod simulate;
#[cfg(feature = "verify")]
pub mod snp;
#[cfg(feature = "verify")]
pub mod tdx;
#[cfg(feature = "verify")]
pub mod time;
#[cfg(feature = "verify")]
pub mod verdict;
#[cfg(feature = "verify")]
pub mod x509;

#[cfg(feature = "verify")]
pub use anchors::TrustAnchors;
#[cfg(feature = "verify")]
pub use collateral::Collateral;
#[cfg(feature = "verify")]
pub use time::Timestamp;
#[cfg(feature = "verify")]
pub use verdict::{Check, Outcome, Status, Verdict};
