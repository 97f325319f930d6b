//! Makes elements of XML tokens: nesting, namespaces, limits, and normalised text.

use quick_xml::events::BytesStart;

use super::xml::{Attribute, Element, Node, XmlError};

const MAX_DEPTH: usize = 16;
const MAX_ELEMENTS: usize = 4096;
const MAX_ATTRIBUTES: usize = 256;

pub(super) fn predefined(name: &[u8]) -> Option<char> {
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
pub(super) struct Builder {
    open: Vec<Element>,
    root: Option<Element>,
    count: usize,
}

impl Builder {
    pub(super) fn untouched(&self) -> bool {
        self.root.is_none() && self.open.is_empty()
    }

    pub(super) fn open(&mut self, tag: &BytesStart<'_>, at: u64) -> Result<(), XmlError> {
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

    pub(super) fn close(&mut self) -> Result<(), XmlError> {
        let done = self.open.pop().ok_or(XmlError::Root)?;
        match self.open.last_mut() {
            Some(parent) => parent.children.push(Node::Element(done)),
            None => self.root = Some(done),
        }
        Ok(())
    }

    pub(super) fn text(&mut self, raw: &str, at: u64) -> Result<(), XmlError> {
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

    pub(super) fn resolved(&mut self, c: char, at: u64) -> Result<(), XmlError> {
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

    pub(super) fn finish(self) -> Result<Element, XmlError> {
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
