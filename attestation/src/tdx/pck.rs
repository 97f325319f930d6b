//! The provisioning certification key's certificate: which platform, at which TCB (Intel SGX PCK
//! Certificate and CRL Profile Specification, section 1.3.5).

use crate::der::{self, Reader, tag};
use crate::x509::Certificate;

/// 1.2.840.113741.1.13.1
const SGX_EXTENSIONS: [u8; 9] = [0x2a, 0x86, 0x48, 0x86, 0xf8, 0x4d, 1, 13, 1];

/// Why a certificate is not a PCK certificate.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PckError {
    /// Not DER where it must be.
    #[error("SGX extensions are not DER")]
    Der(#[from] der::DerError),
    /// A field is missing or of the wrong size.
    #[error("SGX extension {0} is missing or malformed")]
    Field(&'static str),
}

/// What a PCK certificate says about its platform.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pck {
    /// Platform provisioning id, 16 bytes.
    pub ppid: [u8; 16],
    /// Security version numbers of the 16 SGX components.
    pub cpu_svn: [u8; 16],
    /// Security version of the provisioning enclave.
    pub pce_svn: u16,
    /// Id of the provisioning enclave.
    pub pce_id: [u8; 2],
    /// Family, model, stepping, platform type and SKU.
    pub fmspc: [u8; 6],
}

impl Pck {
    /// Reads the SGX extensions of a certificate.
    ///
    /// # Errors
    /// When one is missing or malformed.
    pub fn from_certificate(certificate: &Certificate<'_>) -> Result<Self, PckError> {
        let value = certificate
            .extension(&SGX_EXTENSIONS)
            .ok_or(PckError::Field("1.2.840.113741.1.13.1"))?;
        let fields = pairs(value)?;
        let find = |arc: u8| {
            fields
                .iter()
                .find(|(oid, _)| oid.strip_prefix(&SGX_EXTENSIONS[..]) == Some(&[arc][..]))
                .map(|(_, v)| *v)
        };
        let tcb = pairs(find(2).ok_or(PckError::Field("TCB"))?)?;
        let svn = |arc: u8| {
            let wanted = [&SGX_EXTENSIONS[..], &[2, arc]].concat();
            let (_, value) = tcb.iter().find(|(oid, _)| **oid == wanted)?;
            Reader::new(value).small().ok()
        };
        let mut cpu_svn = [0; 16];
        for (arc, out) in (1u8..).zip(cpu_svn.iter_mut()) {
            *out = svn(arc)
                .and_then(|n| u8::try_from(n).ok())
                .ok_or(PckError::Field("TCB component"))?;
        }
        Ok(Self {
            ppid: octets(find(1), "PPID")?,
            cpu_svn,
            pce_svn: svn(17)
                .and_then(|n| u16::try_from(n).ok())
                .ok_or(PckError::Field("PCESVN"))?,
            pce_id: octets(find(3), "PCEID")?,
            fmspc: octets(find(4), "FMSPC")?,
        })
    }
}

/// An identifier and its value's whole encoding.
type Pair<'a> = (&'a [u8], &'a [u8]);

/// A SEQUENCE of SEQUENCE { OID, value }.
fn pairs(encoded: &[u8]) -> Result<Vec<Pair<'_>>, PckError> {
    let mut list = der::only(encoded, tag::SEQUENCE)?;
    let mut pairs = Vec::new();
    while !list.is_empty() {
        let mut pair = list.nested(tag::SEQUENCE)?;
        let oid = pair.value(tag::OID)?;
        pairs.push((oid, pair.any()?.raw));
        pair.finish()?;
    }
    Ok(pairs)
}

fn octets<const N: usize>(encoded: Option<&[u8]>, name: &'static str) -> Result<[u8; N], PckError> {
    let value = Reader::new(encoded.ok_or(PckError::Field(name))?).value(tag::OCTET_STRING)?;
    value.try_into().map_err(|_| PckError::Field(name))
}
