//! Attestation: evidence in, verdict out.
//!
//! This room verifies SEV-SNP reports, TDX quotes and NVIDIA GPU and NVSwitch reports, offline:
//! trust anchors, the time and all collateral are values handed in. Nothing here opens a file or a
//! socket except the program `sealpod-attest`. Everything that is parsed here is hostile.
//!
//! The way evidence takes: bytes → parser (`snp::Report`, `tdx::Quote`, `nvidia::Report`) →
//! verifier → [`Verdict`], a list of typed checks with what was expected and what was found.

pub mod anchors;
pub mod collateral;
pub mod crypto;
pub mod der;
pub mod encoding;
pub mod measure;
pub mod nvidia;
pub mod ocsp;
pub mod reference;
pub mod snp;
pub mod tdx;
pub mod time;
pub mod verdict;
pub mod x509;

pub use anchors::TrustAnchors;
pub use collateral::Collateral;
pub use time::Timestamp;
pub use verdict::{Check, Outcome, Status, Verdict};
