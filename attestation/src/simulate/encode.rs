//! Writes DER (ITU-T X.690): the opposite of `crate::der`, for the simulator alone.

use crate::der::tag;
use crate::time::Timestamp;

/// One element.
pub(super) fn element(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    let length = content.len();
    if length < 0x80 {
        out.push(length as u8);
    } else {
        let octets: Vec<u8> = length
            .to_be_bytes()
            .into_iter()
            .skip_while(|b| *b == 0)
            .collect();
        out.push(0x80 | octets.len() as u8);
        out.extend(octets);
    }
    out.extend(content);
    out
}

/// A SEQUENCE of elements.
pub(super) fn sequence(parts: &[&[u8]]) -> Vec<u8> {
    element(tag::SEQUENCE, &parts.concat())
}

/// An OBJECT IDENTIFIER from its content octets.
pub(super) fn oid(content: &[u8]) -> Vec<u8> {
    element(tag::OID, content)
}

/// A non-negative INTEGER, big endian.
pub(super) fn integer(value: &[u8]) -> Vec<u8> {
    let first = value.iter().position(|b| *b != 0).unwrap_or(value.len());
    let mut content = value[first..].to_vec();
    if content.first().is_none_or(|b| b & 0x80 != 0) {
        content.insert(0, 0);
    }
    element(tag::INTEGER, &content)
}

/// A small INTEGER.
pub(super) fn small(value: u32) -> Vec<u8> {
    integer(&value.to_be_bytes())
}

/// An OCTET STRING.
pub(super) fn octets(value: &[u8]) -> Vec<u8> {
    element(tag::OCTET_STRING, value)
}

/// A BIT STRING of whole octets.
pub(super) fn bits(value: &[u8]) -> Vec<u8> {
    element(tag::BIT_STRING, &[&[0], value].concat())
}

/// An explicit, context-specific element.
pub(super) fn explicit(n: u8, content: &[u8]) -> Vec<u8> {
    element(tag::context(n), content)
}

/// A GeneralizedTime.
pub(super) fn time(at: Timestamp) -> Vec<u8> {
    let text: String = at
        .to_string()
        .chars()
        .filter(char::is_ascii_digit)
        .collect();
    element(tag::GENERALIZED_TIME, format!("{text}Z").as_bytes())
}

/// A Name with one attribute each.
pub(super) fn name(parts: &[(&[u8], &str)]) -> Vec<u8> {
    let sets: Vec<Vec<u8>> = parts
        .iter()
        .map(|(kind, text)| {
            let value = element(tag::UTF8_STRING, text.as_bytes());
            element(tag::SET, &sequence(&[&oid(kind), &value]))
        })
        .collect();
    element(tag::SEQUENCE, &sets.concat())
}
