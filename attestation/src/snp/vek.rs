//! The versioned endorsement key's certificate: which chip and which TCB it is for (AMD, VCEK
//! certificate and KDS interface specification, section 3).

use super::{Product, SigningKey, Tcb};
use crate::der::{Reader, tag};
use crate::x509::Certificate;

/// 1.3.6.1.4.1.3704.1, AMD's arc.
const ARC: [u8; 8] = [0x2b, 6, 1, 4, 1, 0x9c, 0x78, 1];

/// Why a certificate is not a VCEK or VLEK.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum VekError {
    /// Another subject.
    #[error("Common name is {0:?}, neither SEV-VCEK nor SEV-VLEK")]
    Name(String),
    /// An extension is missing or not of its type.
    #[error("Extension 1.3.6.1.4.1.3704.1.{0} is missing or malformed")]
    Extension(&'static str),
    /// A product nobody here knows.
    #[error("Unknown product name {0:?}")]
    Product(String),
}

/// What an endorsement key's certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vek {
    /// Chip (VCEK) or loaded (VLEK) key.
    pub kind: SigningKey,
    /// Product line.
    pub product: Product,
    /// Security patch levels the key was derived for.
    pub tcb: Tcb,
    /// The chip; of 64 or 8 bytes. None for a VLEK.
    pub hwid: Option<Vec<u8>>,
    /// The cloud provider; VLEK only.
    pub csp_id: Option<String>,
}

impl Vek {
    /// Reads the extensions of a certificate.
    ///
    /// # Errors
    /// When it is not the certificate of an endorsement key.
    pub fn from_certificate(certificate: &Certificate<'_>) -> Result<Self, VekError> {
        let kind = match certificate.common_name() {
            Some("SEV-VCEK") => SigningKey::Vcek,
            Some("SEV-VLEK") => SigningKey::Vlek,
            _ => return Err(VekError::Name(certificate.label())),
        };
        let extension = |arcs: &[u8]| certificate.extension(&[&ARC[..], arcs].concat());
        let name = extension(&[2])
            .and_then(ia5)
            .ok_or(VekError::Extension("2"))?;
        let product = Product::from_name(&name).ok_or(VekError::Product(name))?;
        let level = |arc: u8, text: &'static str| {
            extension(&[3, arc])
                .and_then(small)
                .ok_or(VekError::Extension(text))
        };
        let tcb = Tcb {
            fmc: if product == Product::Turin {
                level(9, "3.9")?
            } else {
                0
            },
            bootloader: level(1, "3.1")?,
            tee: level(2, "3.2")?,
            snp: level(3, "3.3")?,
            microcode: level(8, "3.8")?,
        };
        let hwid = extension(&[4]).map(|value| octets(value).to_vec());
        let csp_id = extension(&[5]).and_then(ia5);
        match kind {
            SigningKey::Vcek if hwid.is_none() => Err(VekError::Extension("4")),
            SigningKey::Vlek if csp_id.is_none() => Err(VekError::Extension("5")),
            _ => Ok(Self {
                kind,
                product,
                tcb,
                hwid,
                csp_id,
            }),
        }
    }

    /// Whether the key is that of the chip with this id. Turin's id has 8 bytes, the rest is zero.
    pub fn is_of_chip(&self, chip_id: &[u8; 64]) -> bool {
        let length = if self.product == Product::Turin {
            8
        } else {
            64
        };
        self.hwid.as_ref().is_some_and(|id| {
            id.len() == length
                && chip_id[..length] == id[..]
                && chip_id[length..].iter().all(|b| *b == 0)
        })
    }
}

fn small(value: &[u8]) -> Option<u8> {
    let mut reader = Reader::new(value);
    let level = reader.small().ok()?;
    reader.finish().ok()?;
    u8::try_from(level).ok()
}

fn ia5(value: &[u8]) -> Option<String> {
    let mut reader = Reader::new(value);
    let element = reader.any().ok()?;
    reader.finish().ok()?;
    let known = matches!(
        element.tag,
        tag::IA5_STRING | tag::UTF8_STRING | tag::PRINTABLE_STRING
    );
    let text = std::str::from_utf8(element.value).ok()?;
    (known && element.value.len() <= 64 && !text.chars().any(char::is_control))
        .then(|| text.to_owned())
}

/// The hardware id stands raw in some certificates and in an OCTET STRING in others.
fn octets(value: &[u8]) -> &[u8] {
    if matches!(value.len(), 8 | 64) {
        value
    } else {
        Reader::new(value).value(tag::OCTET_STRING).unwrap_or(value)
    }
}
