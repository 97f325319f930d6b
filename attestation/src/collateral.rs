//! Collateral: everything that is not evidence and comes from elsewhere — certificates, CRLs, OCSP
//! responses, RIMs, Intel's TCB bundles, event logs. A pile that is filled before verification; what
//! a file is, its content says. No file is opened here.

use crate::der::{self, tag};
use crate::encoding::{self, EncodingError};
use crate::ocsp::OcspResponse;
use crate::snp;
use crate::tdx::{Bundle, BundleError};
use crate::x509::{Certificate, Crl, X509Error};

/// Largest single file that is looked at: RIMs are 20 to 30 KB, CRLs can grow.
pub const MAX_FILE: usize = 8 << 20;

/// What was handed to a verifier beside the evidence.
#[derive(Clone, Debug, Default)]
pub struct Collateral {
    /// Certificates, DER.
    pub certificates: Vec<Vec<u8>>,
    /// Certificate revocation lists, DER.
    pub crls: Vec<Vec<u8>>,
    /// OCSP responses, DER.
    pub ocsp: Vec<Vec<u8>>,
    /// NVIDIA reference integrity manifests, XML.
    pub rims: Vec<Vec<u8>>,
    /// Intel TDX collateral.
    pub bundles: Vec<Bundle>,
    /// Confidential-computing event logs (CCEL).
    pub event_logs: Vec<Vec<u8>>,
}

/// Why a file is no collateral.
#[derive(Debug, thiserror::Error)]
pub enum CollateralError {
    /// Too large.
    #[error("{0} bytes; at most {MAX_FILE} are read")]
    Size(usize),
    /// Nothing that is known.
    #[error(
        "Neither PEM, DER certificate, CRL, OCSP response, RIM, TDX collateral JSON, AMD certificate table nor event log"
    )]
    Unknown,
    /// PEM with errors in it.
    #[error("Broken text encoding")]
    Encoding(#[from] EncodingError),
    /// PEM of another kind.
    #[error("PEM block {0:?} is neither a CERTIFICATE nor an X509 CRL")]
    Label(String),
    /// A certificate or CRL with errors in it.
    #[error("Broken certificate or CRL")]
    X509(#[from] X509Error),
    /// JSON that is no TDX collateral.
    #[error("JSON is not TDX collateral")]
    Bundle(#[from] BundleError),
    /// An AMD certificate table with errors in it.
    #[error("Broken AMD certificate table")]
    CertTable(#[from] snp::CertTableError),
}

impl Collateral {
    /// Adds a file, recognised by its content.
    ///
    /// # Errors
    /// When it is not one of the known kinds, or broken.
    pub fn add(&mut self, bytes: &[u8]) -> Result<(), CollateralError> {
        if bytes.len() > MAX_FILE {
            return Err(CollateralError::Size(bytes.len()));
        }
        let text = std::str::from_utf8(bytes).ok().map(str::trim_start);
        match text {
            Some(t) if t.starts_with('<') => {
                self.rims.push(bytes.to_vec());
                Ok(())
            }
            Some(t) if t.starts_with('{') => {
                self.bundles.push(Bundle::parse(t)?);
                Ok(())
            }
            Some(t) if t.contains("-----BEGIN ") => self.add_pem(t),
            _ => self.add_binary(bytes),
        }
    }

    fn add_pem(&mut self, text: &str) -> Result<(), CollateralError> {
        let blocks = encoding::pem_blocks(text)?;
        if blocks.is_empty() {
            return Err(CollateralError::Unknown);
        }
        for (label, der) in blocks {
            match label.as_str() {
                "CERTIFICATE" => {
                    Certificate::parse(&der)?;
                    self.certificates.push(der);
                }
                "X509 CRL" => {
                    Crl::parse(&der)?;
                    self.crls.push(der);
                }
                _ => return Err(CollateralError::Label(label.chars().take(40).collect())),
            }
        }
        Ok(())
    }

    fn add_binary(&mut self, bytes: &[u8]) -> Result<(), CollateralError> {
        if crate::tdx::looks_like_event_log(bytes) {
            self.event_logs.push(bytes.to_vec());
        } else if OcspResponse::parse(bytes).is_ok() {
            self.ocsp.push(bytes.to_vec());
        } else if Crl::parse(bytes).is_ok() {
            self.crls.push(bytes.to_vec());
        } else if bytes.first() == Some(&tag::SEQUENCE) {
            // One certificate, or several in a row, as AMD's key service sends chains in DER.
            let mut reader = der::Reader::new(bytes);
            while !reader.is_empty() {
                let raw = reader.any().map_err(X509Error::from)?.raw;
                Certificate::parse(raw)?;
                self.certificates.push(raw.to_vec());
            }
        } else if snp::looks_like_cert_table(bytes) {
            self.certificates.extend(snp::cert_table(bytes)?);
        } else {
            return Err(CollateralError::Unknown);
        }
        Ok(())
    }
}
