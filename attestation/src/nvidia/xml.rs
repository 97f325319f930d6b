//! The subset of XML that reference integrity manifests are written in, and its canonical form
//! (W3C Canonical XML 1.1, without comments). Document types, processing instructions, CDATA,
//! comments and `xml:` attributes are refused: none occurs in a manifest, and each has been used to
//! make a signature cover something else than what is read.

use quick_xml::Reader;
use quick_xml::events::Event;

use super::xml_builder::{Builder, predefined};

/// Manifests have 20 to 30 KB.
const MAX_BYTES: usize = 512 << 10;

/// Why a text is not a document of the subset.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum XmlError {
    /// Not UTF-8.
    #[error("XML is not UTF-8")]
    Utf8,
    /// A limit was exceeded.
    #[error("XML exceeds the limit of {0} {1}")]
    Limit(usize, &'static str),
    /// Not well formed.
    #[error("XML is not well formed near byte {0}")]
    Syntax(u64),
    /// A construct outside of the subset.
    #[error("XML holds {0}, which is not allowed")]
    Construct(&'static str),
    /// A prefix without declaration.
    #[error("XML prefix {0:?} is not declared")]
    Prefix(String),
    /// No root element.
    #[error("XML has no root element, or more than one")]
    Root,
}

/// An attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attribute {
    /// Name as written.
    pub name: String,
    /// Namespace; empty for an attribute without prefix.
    pub namespace: String,
    /// Name without prefix.
    pub local: String,
    /// Value.
    pub value: String,
}

/// Content of an element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// An element.
    Element(Element),
    /// Text.
    Text(String),
}

/// An element.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Element {
    /// Name as written.
    pub name: String,
    /// Namespace; empty without one.
    pub namespace: String,
    /// Name without prefix.
    pub local: String,
    /// Attributes in the order they were written.
    pub attributes: Vec<Attribute>,
    /// Content.
    pub children: Vec<Node>,
    /// All namespaces in scope: prefix and URI, sorted by prefix.
    pub(super) scope: Vec<(String, String)>,
}

impl Element {
    /// Reads a document.
    ///
    /// # Errors
    /// When it is not a well-formed document of the subset.
    pub fn parse(bytes: &[u8]) -> Result<Self, XmlError> {
        if bytes.len() > MAX_BYTES {
            return Err(XmlError::Limit(MAX_BYTES, "bytes"));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| XmlError::Utf8)?;
        if text.contains('\0') {
            return Err(XmlError::Construct("a NUL"));
        }
        let mut reader = Reader::from_str(text);
        let mut builder = Builder::default();
        loop {
            let event = reader
                .read_event()
                .map_err(|_| XmlError::Syntax(reader.error_position()))?;
            let at = reader.buffer_position();
            let syntax = || XmlError::Syntax(at);
            match event {
                Event::Start(tag) => builder.open(&tag, at)?,
                Event::Empty(tag) => {
                    builder.open(&tag, at)?;
                    builder.close()?;
                }
                Event::End(_) => builder.close()?,
                Event::Text(text) => {
                    builder.text(std::str::from_utf8(&text).map_err(|_| XmlError::Utf8)?, at)?
                }
                Event::GeneralRef(reference) => {
                    let resolved = match reference.resolve_char_ref().map_err(|_| syntax())? {
                        Some(c) => c,
                        None => predefined(&reference).ok_or(XmlError::Construct("an entity"))?,
                    };
                    builder.resolved(resolved, at)?;
                }
                Event::Decl(_) if builder.untouched() => {}
                Event::Decl(_) | Event::PI(_) => {
                    return Err(XmlError::Construct("a processing instruction"));
                }
                Event::DocType(_) => return Err(XmlError::Construct("a document type")),
                Event::CData(_) => return Err(XmlError::Construct("CDATA")),
                Event::Comment(_) => return Err(XmlError::Construct("a comment")),
                Event::Eof => return builder.finish(),
            }
        }
    }

    /// The child elements.
    pub fn elements(&self) -> impl Iterator<Item = &Element> {
        self.children.iter().filter_map(|n| {
            if let Node::Element(e) = n {
                Some(e)
            } else {
                None
            }
        })
    }

    /// The child elements of a name.
    pub fn named<'a>(
        &'a self,
        namespace: &'a str,
        local: &'a str,
    ) -> impl Iterator<Item = &'a Element> {
        self.elements()
            .filter(move |e| e.namespace == namespace && e.local == local)
    }

    /// The value of an attribute without namespace.
    pub fn attribute(&self, local: &str) -> Option<&str> {
        self.attributes
            .iter()
            .find(|a| a.namespace.is_empty() && a.local == local)
            .map(|a| a.value.as_str())
    }

    /// The text of an element that has no elements in it.
    pub fn text(&self) -> Option<&str> {
        match self.children.as_slice() {
            [Node::Text(text)] => Some(text),
            [] => Some(""),
            _ => None,
        }
    }

    /// Whether there is nothing but elements and white space in it.
    pub fn only_elements(&self) -> bool {
        self.children.iter().all(|n| match n {
            Node::Element(_) => true,
            Node::Text(t) => t.chars().all(char::is_whitespace),
        })
    }

    /// The canonical form of this element as the root of a node set, without its descendants for
    /// which `skip` holds.
    pub fn canonical(&self, skip: &dyn Fn(&Element) -> bool) -> Vec<u8> {
        let mut out = Vec::with_capacity(16 << 10);
        self.write(&mut out, &[], skip);
        out
    }

    fn write(
        &self,
        out: &mut Vec<u8>,
        outer: &[(String, String)],
        skip: &dyn Fn(&Element) -> bool,
    ) {
        out.push(b'<');
        out.extend(self.name.as_bytes());
        // Namespaces first, by prefix, where they differ from what is in scope already.
        for (prefix, uri) in &self.scope {
            let known = outer
                .iter()
                .find(|(p, _)| p == prefix)
                .map_or("", |(_, u)| u.as_str());
            if known == uri {
                continue;
            }
            out.extend(if prefix.is_empty() {
                b" xmlns".to_vec()
            } else {
                format!(" xmlns:{prefix}").into_bytes()
            });
            out.extend(b"=\"");
            escape(out, uri, true);
            out.push(b'"');
        }
        let mut attributes: Vec<&Attribute> = self.attributes.iter().collect();
        attributes.sort_by(|a, b| (&a.namespace, &a.local).cmp(&(&b.namespace, &b.local)));
        for attribute in attributes {
            out.push(b' ');
            out.extend(attribute.name.as_bytes());
            out.extend(b"=\"");
            escape(out, &attribute.value, true);
            out.push(b'"');
        }
        out.push(b'>');
        for child in &self.children {
            match child {
                Node::Element(e) if skip(e) => {}
                Node::Element(e) => e.write(out, &self.scope, skip),
                Node::Text(text) => escape(out, text, false),
            }
        }
        out.extend(b"</");
        out.extend(self.name.as_bytes());
        out.push(b'>');
    }
}

fn escape(out: &mut Vec<u8>, text: &str, attribute: bool) {
    for byte in text.bytes() {
        match byte {
            b'&' => out.extend(b"&amp;"),
            b'<' => out.extend(b"&lt;"),
            b'>' if !attribute => out.extend(b"&gt;"),
            b'"' if attribute => out.extend(b"&quot;"),
            b'\t' if attribute => out.extend(b"&#x9;"),
            b'\n' if attribute => out.extend(b"&#xA;"),
            b'\r' => out.extend(b"&#xD;"),
            other => out.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canonical(text: &str) -> String {
        String::from_utf8(
            Element::parse(text.as_bytes())
                .unwrap()
                .canonical(&|_| false),
        )
        .unwrap()
    }

    #[test]
    fn canonical_form_is_that_of_the_recommendation() {
        // After the examples of Canonical XML 1.1, sections 3.3 and 3.4.
        assert_eq!(
            canonical("<doc  b = '2'   a='1'\n><e/></doc>\n"),
            r#"<doc a="1" b="2"><e></e></doc>"#
        );
        assert_eq!(
            canonical(
                r#"<e5 a:attr="out" b:attr="sorted" attr2="all" attr="I'm" xmlns:b="http://b" xmlns:a="http://a" xmlns="http://e"/>"#
            ),
            r#"<e5 xmlns="http://e" xmlns:a="http://a" xmlns:b="http://b" attr="I'm" attr2="all" a:attr="out" b:attr="sorted"></e5>"#
        );
        assert_eq!(
            canonical(r#"<a xmlns="u"><b xmlns="u"><c xmlns=""/></b></a>"#),
            r#"<a xmlns="u"><b><c xmlns=""></c></b></a>"#
        );
        assert_eq!(
            canonical("<t>a &amp; b &lt; c &#62; d\r\ne &quot;&#x20ac;</t>"),
            "<t>a &amp; b &lt; c &gt; d\ne \"€</t>"
        );
        assert_eq!(
            canonical("<t a='x&#9;y\tz&quot;'/>"),
            "<t a=\"x&#x9;y z&quot;\"></t>"
        );
    }

    #[test]
    fn constructs_outside_of_the_subset_are_refused() {
        for text in [
            "<!DOCTYPE a><a/>",
            "<a><!-- c --></a>",
            "<a><![CDATA[x]]></a>",
            "<a><?p?></a>",
            "<a/><b/>",
            "<a>",
            "</a>",
            "",
            "x<a/>",
            "<a>&e;</a>",
            "<p:a/>",
            "<a xml:lang='en'/>",
            "<a b='1' b='2'/>",
            "<a b='<'/>",
            "<a><b></a></b>",
            "<a>\u{1}</a>",
            "<a b=c/>",
        ] {
            assert!(Element::parse(text.as_bytes()).is_err(), "{text}");
        }
        assert_eq!(Element::parse(&[0xff, 0xfe]), Err(XmlError::Utf8));
        assert_eq!(
            Element::parse("<a>".repeat(17).as_bytes()),
            Err(XmlError::Limit(16, "levels"))
        );
    }
}
