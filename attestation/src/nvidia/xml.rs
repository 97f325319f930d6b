//! The subset of XML that reference integrity manifests are written in, and its canonical form
//! (W3C Canonical XML 1.1, without comments). Document types, processing instructions, CDATA,
//! comments and `xml:` attributes are refused: none occurs in a manifest, and each has been used to
//! make a signature cover something else than what is read.

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

/// Manifests have 20 to 30 KB.
const MAX_BYTES: usize = 512 << 10;
const MAX_DEPTH: usize = 16;
const MAX_ELEMENTS: usize = 4096;
const MAX_ATTRIBUTES: usize = 256;

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
    scope: Vec<(String, String)>,
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

fn predefined(name: &[u8]) -> Option<char> {
    Some(match name {
        b"amp" => '&',
        b"lt" => '<',
        b"gt" => '>',
        b"quot" => '"',
        b"apos" => '\'',
        _ => return None,
    })
}

#[derive(Default)]
struct Builder {
    open: Vec<Element>,
    root: Option<Element>,
    count: usize,
}

impl Builder {
    fn untouched(&self) -> bool {
        self.root.is_none() && self.open.is_empty()
    }

    fn open(&mut self, tag: &BytesStart<'_>, at: u64) -> Result<(), XmlError> {
        self.count += 1;
        if self.count > MAX_ELEMENTS {
            return Err(XmlError::Limit(MAX_ELEMENTS, "elements"));
        }
        if self.open.len() >= MAX_DEPTH {
            return Err(XmlError::Limit(MAX_DEPTH, "levels"));
        }
        if self.root.is_some() {
            return Err(XmlError::Root);
        }
        let mut scope = self
            .open
            .last()
            .map(|e| e.scope.clone())
            .unwrap_or_default();
        let mut plain = Vec::new();
        for (n, attribute) in tag.attributes().enumerate() {
            if n >= MAX_ATTRIBUTES {
                return Err(XmlError::Limit(MAX_ATTRIBUTES, "attributes"));
            }
            let attribute = attribute.map_err(|_| XmlError::Syntax(at))?;
            let name = name(attribute.key.as_ref(), at)?;
            let raw = std::str::from_utf8(&attribute.value).map_err(|_| XmlError::Utf8)?;
            let value = attribute_value(raw).ok_or(XmlError::Syntax(at))?;
            if name == "xmlns" || name.starts_with("xmlns:") {
                let prefix = name
                    .strip_prefix("xmlns")
                    .unwrap_or("")
                    .trim_start_matches(':')
                    .to_owned();
                scope.retain(|(p, _)| *p != prefix);
                scope.push((prefix, value));
            } else if name.starts_with("xml:") {
                return Err(XmlError::Construct("an xml: attribute"));
            } else {
                plain.push((name, value));
            }
        }
        scope.sort();
        let name = name(tag.name().as_ref(), at)?;
        let (namespace, local) = resolve(&scope, &name, true)?;
        let mut attributes = Vec::new();
        for (name, value) in plain {
            let (namespace, local) = resolve(&scope, &name, false)?;
            attributes.push(Attribute {
                name,
                namespace,
                local,
                value,
            });
        }
        self.open.push(Element {
            name,
            namespace,
            local,
            attributes,
            children: Vec::new(),
            scope,
        });
        Ok(())
    }

    fn close(&mut self) -> Result<(), XmlError> {
        let done = self.open.pop().ok_or(XmlError::Root)?;
        match self.open.last_mut() {
            Some(parent) => parent.children.push(Node::Element(done)),
            None => self.root = Some(done),
        }
        Ok(())
    }

    fn text(&mut self, raw: &str, at: u64) -> Result<(), XmlError> {
        // Line ends are normalised before anything else sees them (XML 1.0 section 2.11).
        let text = raw.replace("\r\n", "\n").replace('\r', "\n");
        if self.open.is_empty() {
            let blank = text
                .trim_start_matches('\u{feff}')
                .bytes()
                .all(|b| b.is_ascii_whitespace());
            return if blank {
                Ok(())
            } else {
                Err(XmlError::Syntax(at))
            };
        }
        if text.contains("]]>")
            || text
                .chars()
                .any(|c| c.is_control() && !matches!(c, '\t' | '\n'))
        {
            return Err(XmlError::Syntax(at));
        }
        self.append(&text);
        Ok(())
    }

    fn resolved(&mut self, c: char, at: u64) -> Result<(), XmlError> {
        if self.open.is_empty() {
            return Err(XmlError::Syntax(at));
        }
        self.append(c.encode_utf8(&mut [0; 4]));
        Ok(())
    }

    fn append(&mut self, text: &str) {
        let Some(element) = self.open.last_mut() else {
            return;
        };
        if let Some(Node::Text(last)) = element.children.last_mut() {
            last.push_str(text);
        } else {
            element.children.push(Node::Text(text.to_owned()));
        }
    }

    fn finish(self) -> Result<Element, XmlError> {
        if self.open.is_empty() {
            self.root.ok_or(XmlError::Root)
        } else {
            Err(XmlError::Root)
        }
    }
}

fn name(bytes: &[u8], at: u64) -> Result<String, XmlError> {
    let ok = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b':' | b'_' | b'-' | b'.');
    let colons = bytes.iter().filter(|b| **b == b':').count();
    let first_ok = bytes
        .first()
        .is_some_and(|b| b.is_ascii_alphabetic() || *b == b'_');
    if !first_ok || !bytes.iter().all(ok) || colons > 1 || bytes.ends_with(b":") {
        return Err(XmlError::Syntax(at));
    }
    Ok(String::from_utf8_lossy(bytes).into_owned())
}

fn resolve(
    scope: &[(String, String)],
    name: &str,
    element: bool,
) -> Result<(String, String), XmlError> {
    let find = |prefix: &str| {
        scope
            .iter()
            .find(|(p, _)| p == prefix)
            .map(|(_, u)| u.clone())
    };
    match name.split_once(':') {
        Some((prefix, local)) => match find(prefix) {
            Some(uri) if !uri.is_empty() => Ok((uri, local.to_owned())),
            _ => Err(XmlError::Prefix(prefix.to_owned())),
        },
        None if element => Ok((find("").unwrap_or_default(), name.to_owned())),
        None => Ok((String::new(), name.to_owned())),
    }
}

/// Normalises and decodes an attribute's value (XML 1.0 section 3.3.3).
fn attribute_value(raw: &str) -> Option<String> {
    if raw.contains('<')
        || raw
            .chars()
            .any(|c| c.is_control() && !matches!(c, '\t' | '\n' | '\r'))
    {
        return None;
    }
    let spaced = raw.replace("\r\n", " ").replace(['\t', '\n', '\r'], " ");
    quick_xml::escape::unescape(&spaced)
        .ok()
        .map(std::borrow::Cow::into_owned)
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
