//! Reference integrity manifests: SWID tags with golden values, signed with the one form of XML
//! signature that NVIDIA uses.

use std::fmt::Write;

use super::SimulateError;
use super::issue::{Certificate, Entity, Window};
use crate::crypto::sha384;
use crate::encoding::{base64, hex};
use crate::nvidia::Element;

/// What a manifest says.
pub(super) struct Manifest<'a> {
    pub(super) product: &'a str,
    pub(super) version: &'a str,
    pub(super) switch: bool,
    /// Index and value.
    pub(super) golden: &'a [(u8, [u8; 48])],
}

const HEAD: &str = concat!(
    r#"<SoftwareIdentity xmlns="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" "#,
    r#"xmlns:h="http://www.w3.org/2001/04/xmlenc#sha384" name="simulated" tagId="simulated" "#,
    r#"version="1.0" tagVersion="0"><Entity name="Simulator" role="tagCreator"/>"#,
);
const INFO: &str = concat!(
    r#"<ds:SignedInfo><ds:CanonicalizationMethod Algorithm="http://www.w3.org/2006/12/xml-c14n11"/>"#,
    r#"<ds:SignatureMethod Algorithm="http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"/>"#,
    r#"<ds:Reference URI=""><ds:Transforms>"#,
    r#"<ds:Transform Algorithm="http://www.w3.org/2000/09/xmldsig#enveloped-signature"/>"#,
    r#"<ds:Transform Algorithm="http://www.w3.org/2006/12/xml-c14n11"/></ds:Transforms>"#,
    r#"<ds:DigestMethod Algorithm="http://www.w3.org/2001/04/xmldsig-more#sha384"/>"#,
);

impl Manifest<'_> {
    /// The manifest, signed by `signer` under `root`.
    pub(super) fn sign(
        &self,
        signer: &Entity<'_>,
        root: &Entity<'_>,
        window: Window,
    ) -> Result<String, SimulateError> {
        let mut body = String::from(HEAD);
        let edition = if self.switch { "SWITCH" } else { "GPU" };
        let (version, product) = (self.version, self.product);
        // Writing to a String does not fail.
        let _ = write!(
            body,
            r#"<Meta colloquialVersion="{version}" edition="{edition}" product="{product}"/><Payload>"#
        );
        for (index, value) in self.golden {
            let value = hex(value);
            let _ = write!(
                body,
                r#"<Resource type="Measurement" index="{index}" active="True" alternatives="1" h:Hash0="{value}" name="Measurement_{index}" size="48"/>"#
            );
        }
        body += "</Payload>";
        let form = |_| SimulateError::Setting("product and version must be plain text");
        let unsigned = format!("{body}</SoftwareIdentity>");
        let root_element = Element::parse(unsigned.as_bytes()).map_err(form)?;
        let digest = base64(&sha384(&root_element.canonical(&|_| false)));
        let info = format!(
            "{INFO}<ds:DigestValue>{digest}</ds:DigestValue></ds:Reference></ds:SignedInfo>"
        );
        let mut certificates = String::new();
        for (subject, issuer, ca) in [(signer, root, false), (root, root, true)] {
            let certificate = Certificate {
                subject,
                issuer,
                ca,
                window,
                extensions: Vec::new(),
                zero_serial: false,
            };
            let der = base64(&certificate.issue()?);
            let _ = write!(
                certificates,
                "<ds:X509Certificate>{der}</ds:X509Certificate>"
            );
        }
        let document = |signature: &str| {
            format!(
                r#"{body}<ds:Signature xmlns:ds="http://www.w3.org/2000/09/xmldsig#">{info}<ds:SignatureValue>{signature}</ds:SignatureValue><ds:KeyInfo><ds:X509Data>{certificates}</ds:X509Data></ds:KeyInfo></ds:Signature></SoftwareIdentity>"#
            )
        };
        // What is signed is SignedInfo in its place, with the namespaces that are in scope there.
        let draft = Element::parse(document("").as_bytes()).map_err(form)?;
        let signed_info = draft
            .elements()
            .filter(|e| e.local == "Signature")
            .flat_map(Element::elements)
            .find(|e| e.local == "SignedInfo")
            .map(|e| e.canonical(&|_| false))
            .unwrap_or_default();
        Ok(document(&base64(&signer.key.sign_fixed(&signed_info)?)))
    }
}
