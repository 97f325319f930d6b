//! Reference integrity manifests: SWID tags with golden measurements, signed with XML signatures
//! (W3C XML Signature; only the one form that NVIDIA uses is accepted: an enveloped signature over
//! the whole document, Canonical XML 1.1, ECDSA P-384 with SHA-384).

use std::collections::BTreeMap;
use std::sync::Arc;

use super::xml::{Element, XmlError};
use crate::anchors::Pin;
use crate::crypto::sha384;
use crate::encoding::{self, EncodingError};
use crate::memo::Memo;
use crate::time::Timestamp;
use crate::x509::{self, Certificate, ChainError, X509Error};

const SWID: &str = "http://standards.iso.org/iso/19770/-2/2015/schema.xsd";
const SHA384: &str = "http://www.w3.org/2001/04/xmlenc#sha384";
const DSIG: &str = "http://www.w3.org/2000/09/xmldsig#";
const C14N_1_1: &str = "http://www.w3.org/2006/12/xml-c14n11";
const ECDSA_SHA384: &str = "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384";
const ENVELOPED: &str = "http://www.w3.org/2000/09/xmldsig#enveloped-signature";
const DIGEST_SHA384: &str = "http://www.w3.org/2001/04/xmldsig-more#sha384";
/// Measurement blocks are counted in one byte.
const MAX_INDEX: u8 = 254;
const MAX_ALTERNATIVES: usize = 128;

/// Why a manifest cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RimError {
    /// Not XML of the accepted subset.
    #[error("RIM is not XML of the accepted form")]
    Xml(#[from] XmlError),
    /// Something is missing, double or malformed.
    #[error("RIM has no valid {0}")]
    Part(&'static str),
    /// A golden value that cannot be read.
    #[error("RIM measurement {0:?}: {1}")]
    Measurement(String, &'static str),
    /// The same index twice.
    #[error("RIM has index {0} twice")]
    DuplicateIndex(u8),
    /// A certificate or signature is not base64.
    #[error("RIM {0} is not base64")]
    Base64(&'static str, #[source] EncodingError),
}

/// Why a manifest is not believed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RimSignatureError {
    /// A form of signature that nobody here accepts.
    #[error("RIM signature has another {0} than the accepted one")]
    Form(&'static str),
    /// The content was changed.
    #[error("RIM digest is {0}; the signature covers {1}")]
    Digest(String, String),
    /// The signature is not the signer's.
    #[error("RIM signature is not that of {0}")]
    Signature(String),
    /// The signer's certificates cannot be read.
    #[error("RIM certificate cannot be read")]
    X509(#[from] X509Error),
    /// The signer's chain does not lead to the pinned root.
    #[error("RIM signer's chain does not lead to the root")]
    Chain(#[from] ChainError),
}

/// What a manifest describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RimKind {
    /// GPU driver and the firmware it loads.
    Driver,
    /// VBIOS of a GPU.
    Vbios,
    /// BIOS of an NVSwitch.
    Switch,
}

/// A manifest, decoded.
#[derive(Clone, Debug)]
pub struct Rim {
    /// Chip: `GH100`.
    pub product: String,
    /// Version of what it describes.
    pub version: String,
    /// What it describes.
    pub kind: RimKind,
    /// Index → the values that are allowed there. Block number is index + 1.
    pub golden: BTreeMap<u8, Vec<[u8; 48]>>,
    /// The signer's chain, leaf first, DER.
    pub chain: Vec<Vec<u8>>,
    digest: [u8; 48],
    claimed_digest: Vec<u8>,
    signed_info: Vec<u8>,
    signature: Vec<u8>,
    form: Result<(), &'static str>,
}

impl Rim {
    /// Reads a manifest. What it says is not believed before both
    /// [`Self::verify_signature`] and [`Self::verify_chain`] have passed.
    ///
    /// # Errors
    /// When it is not a manifest of the known form.
    pub fn parse(bytes: &[u8]) -> Result<Self, RimError> {
        let root = Element::parse(bytes)?;
        if root.namespace != SWID || root.local != "SoftwareIdentity" {
            return Err(RimError::Part("SoftwareIdentity"));
        }
        let golden = golden(one(&root, SWID, "Payload").ok_or(RimError::Part("Payload"))?)?;
        let meta = one(&root, SWID, "Meta").ok_or(RimError::Part("Meta"))?;
        let text = |name, part| {
            meta.attribute(name)
                .filter(|v| !v.is_empty() && v.len() <= 64)
                .map(str::to_owned)
                .ok_or(RimError::Part(part))
        };
        let version = text("colloquialVersion", "colloquialVersion")?;
        let kind = match text("edition", "edition")?.as_str() {
            "SWITCH" => RimKind::Switch,
            // VBIOS versions are five groups of two hexadecimal digits, driver versions are decimal.
            "GPU" if version.len() == 14 && version.split('.').count() == 5 => RimKind::Vbios,
            "GPU" => RimKind::Driver,
            _ => return Err(RimError::Part("edition (GPU or SWITCH)")),
        };
        let product = text("product", "product")?;

        let signature = one(&root, DSIG, "Signature").ok_or(RimError::Part("Signature"))?;
        let info = one(signature, DSIG, "SignedInfo").ok_or(RimError::Part("SignedInfo"))?;
        let value = one(signature, DSIG, "SignatureValue")
            .and_then(Element::text)
            .ok_or(RimError::Part("SignatureValue"))?;
        let reference = one(info, DSIG, "Reference").ok_or(RimError::Part("Reference"))?;
        let claimed = one(reference, DSIG, "DigestValue")
            .and_then(Element::text)
            .ok_or(RimError::Part("DigestValue"))?;
        let document = root.canonical(&|e| e.namespace == DSIG && e.local == "Signature");
        Ok(Self {
            product,
            version,
            kind,
            golden,
            chain: chain(signature)?,
            digest: sha384(&document),
            claimed_digest: encoding::unbase64(claimed)
                .map_err(|e| RimError::Base64("DigestValue", e))?,
            signed_info: info.canonical(&|_| false),
            signature: encoding::unbase64(value)
                .map_err(|e| RimError::Base64("SignatureValue", e))?,
            form: form(&root, signature, info, reference),
        })
    }

    /// As [`Self::parse`]; a manifest that was read before is not read again.
    ///
    /// # Errors
    /// When it is not a manifest of the known form.
    pub fn read(bytes: &[u8]) -> Result<Arc<Self>, RimError> {
        static READ: Memo<Arc<Rim>> = Memo::new(512);
        let id = sha384(bytes);
        if let Some(rim) = READ.get(&id) {
            return Ok(rim);
        }
        let rim = Arc::new(Self::parse(bytes)?);
        READ.put(id, Arc::clone(&rim));
        Ok(rim)
    }

    /// Checks the signer's chain to a pinned root at `now`; says nothing about the content. Returns
    /// the earliest end of validity in the chain.
    ///
    /// # Errors
    /// What breaks the chain, and where.
    pub fn verify_chain(
        &self,
        anchors: &[Pin],
        now: Timestamp,
    ) -> Result<Timestamp, RimSignatureError> {
        let chain = x509::parse_all(&self.chain)?;
        Ok(x509::verify_chain(
            &chain.iter().collect::<Vec<_>>(),
            anchors,
            now,
        )?)
    }

    /// Checks digest and signature alone. Anybody can make a manifest that passes this.
    ///
    /// # Errors
    /// When content or signature were changed.
    pub fn verify_signature(&self) -> Result<(), RimSignatureError> {
        self.form.map_err(RimSignatureError::Form)?;
        if self.claimed_digest != self.digest {
            return Err(RimSignatureError::Digest(
                encoding::hex(&self.digest),
                encoding::hex(&self.claimed_digest),
            ));
        }
        let signer = Certificate::parse(self.chain.first().map_or(&[], Vec::as_slice))?;
        if !signer
            .key
            .verify_endorsement_fixed(&self.signed_info, &self.signature)
        {
            return Err(RimSignatureError::Signature(signer.label()));
        }
        Ok(())
    }
}

/// The only child of a name.
fn one<'a>(parent: &'a Element, namespace: &'a str, local: &'a str) -> Option<&'a Element> {
    let mut found = parent.named(namespace, local);
    match (found.next(), found.next()) {
        (Some(element), None) => Some(element),
        _ => None,
    }
}

fn golden(payload: &Element) -> Result<BTreeMap<u8, Vec<[u8; 48]>>, RimError> {
    let mut golden = BTreeMap::new();
    let mut seen = 0;
    for resource in payload
        .named(SWID, "Resource")
        .filter(|r| r.attribute("type") == Some("Measurement"))
    {
        seen += 1;
        let name: String = resource
            .attribute("name")
            .unwrap_or("(no name)")
            .chars()
            .take(64)
            .collect();
        let wrong = |what| RimError::Measurement(name.clone(), what);
        let index: u8 = resource
            .attribute("index")
            .and_then(|i| i.parse().ok())
            .filter(|i| *i <= MAX_INDEX)
            .ok_or(wrong("no valid index"))?;
        let alternatives: usize = resource
            .attribute("alternatives")
            .and_then(|a| a.parse().ok())
            .filter(|a| (1..=MAX_ALTERNATIVES).contains(a))
            .ok_or(wrong("no valid number of alternatives"))?;
        let active = match resource.attribute("active") {
            Some("True") => true,
            Some("False") => false,
            _ => return Err(wrong("active is neither True nor False")),
        };
        let mut values = Vec::new();
        for n in 0..alternatives {
            let local = format!("Hash{n}");
            let attribute = resource
                .attributes
                .iter()
                .find(|a| a.namespace == SHA384 && a.local == local);
            let text = attribute.ok_or(wrong("fewer hashes than alternatives"))?;
            values.push(
                encoding::unhex_array(&text.value)
                    .map_err(|_| wrong("a hash is not 96 hexadecimal digits"))?,
            );
        }
        let hashes = resource
            .attributes
            .iter()
            .filter(|a| a.namespace == SHA384 && a.local.starts_with("Hash"))
            .count();
        if hashes != alternatives {
            return Err(wrong("more hashes than alternatives"));
        }
        if resource.attribute("size") != Some("48") {
            return Err(wrong("size is not 48"));
        }
        if golden.insert(index, active.then_some(values)).is_some() {
            return Err(RimError::DuplicateIndex(index));
        }
    }
    if seen == 0 {
        return Err(RimError::Part("measurement in its Payload"));
    }
    Ok(golden
        .into_iter()
        .filter_map(|(i, v)| v.map(|v| (i, v)))
        .collect())
}

fn chain(signature: &Element) -> Result<Vec<Vec<u8>>, RimError> {
    let info = one(signature, DSIG, "KeyInfo").ok_or(RimError::Part("KeyInfo"))?;
    let data = one(info, DSIG, "X509Data").ok_or(RimError::Part("X509Data"))?;
    let certificates: Vec<Vec<u8>> = data
        .named(DSIG, "X509Certificate")
        .map(|c| {
            encoding::unbase64(c.text().unwrap_or("?"))
                .map_err(|e| RimError::Base64("X509Certificate", e))
        })
        .collect::<Result<_, _>>()?;
    if certificates.is_empty() {
        Err(RimError::Part("X509Certificate"))
    } else {
        Ok(certificates)
    }
}

/// Whether the signature is of the one accepted form: nothing but the whole document is signed,
/// nothing but the known transforms is applied, and nothing unexpected stands anywhere in it.
fn form(
    root: &Element,
    signature: &Element,
    info: &Element,
    reference: &Element,
) -> Result<(), &'static str> {
    fn shape<'a>(
        parent: &'a Element,
        names: &[&'static str],
    ) -> Result<Vec<&'a Element>, &'static str> {
        let children: Vec<&Element> = parent.elements().collect();
        let same = children.len() == names.len()
            && children
                .iter()
                .zip(names)
                .all(|(c, n)| c.namespace == DSIG && c.local == **n);
        if same && parent.only_elements() {
            Ok(children)
        } else {
            Err("structure")
        }
    }
    fn plain(element: &Element, algorithm: &str) -> bool {
        element.children.is_empty()
            && element.attributes.len() == 1
            && element.attribute("Algorithm") == Some(algorithm)
    }
    if root.elements().last() != Some(signature)
        || !signature.attributes.is_empty()
        || !info.attributes.is_empty()
    {
        return Err("place");
    }
    let parts = shape(signature, &["SignedInfo", "SignatureValue", "KeyInfo"])?;
    let data = shape(parts[2], &["X509Data"])?[0];
    let bare = [parts[1], parts[2], data]
        .iter()
        .all(|e| e.attributes.is_empty());
    let certificates = data
        .elements()
        .all(|c| c.namespace == DSIG && c.local == "X509Certificate" && c.attributes.is_empty());
    if !bare || !data.only_elements() || !certificates {
        return Err("structure");
    }
    let methods = shape(
        info,
        &["CanonicalizationMethod", "SignatureMethod", "Reference"],
    )?;
    if !plain(methods[0], C14N_1_1) {
        return Err("canonicalisation");
    }
    if !plain(methods[1], ECDSA_SHA384) {
        return Err("signature algorithm");
    }
    if reference.attributes.len() != 1 || reference.attribute("URI") != Some("") {
        return Err("reference");
    }
    let parts = shape(reference, &["Transforms", "DigestMethod", "DigestValue"])?;
    let transforms = shape(parts[0], &["Transform", "Transform"])?;
    if !plain(transforms[0], ENVELOPED) || !plain(transforms[1], C14N_1_1) {
        return Err("transform");
    }
    if plain(parts[1], DIGEST_SHA384) {
        Ok(())
    } else {
        Err("digest algorithm")
    }
}
