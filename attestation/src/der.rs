//! A strict reader of DER (ITU-T X.690): definite, minimal lengths; single-byte tags; no copies.
//! Everything that certificates, CRLs and OCSP responses are made of passes through here.

/// Tags used by the formats of this room.
pub mod tag {
    #![expect(missing_docs, reason = "the names are those of X.680")]
    pub const BOOLEAN: u8 = 0x01;
    pub const INTEGER: u8 = 0x02;
    pub const BIT_STRING: u8 = 0x03;
    pub const OCTET_STRING: u8 = 0x04;
    pub const OID: u8 = 0x06;
    pub const ENUMERATED: u8 = 0x0a;
    pub const UTF8_STRING: u8 = 0x0c;
    pub const PRINTABLE_STRING: u8 = 0x13;
    pub const IA5_STRING: u8 = 0x16;
    pub const UTC_TIME: u8 = 0x17;
    pub const GENERALIZED_TIME: u8 = 0x18;
    pub const SEQUENCE: u8 = 0x30;
    pub const SET: u8 = 0x31;
    /// Context-specific, constructed.
    pub const fn context(n: u8) -> u8 {
        0xa0 | n
    }
    /// Context-specific, primitive.
    pub const fn context_primitive(n: u8) -> u8 {
        0x80 | n
    }
}

/// Why bytes are not the DER that was expected.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DerError {
    /// The bytes end within an element.
    #[error("DER ends within an element")]
    Truncated,
    /// A long or indefinite form where a shorter one is required.
    #[error("DER length or tag is not in its shortest form")]
    NotMinimal,
    /// Another element than the expected one.
    #[error("DER tag 0x{found:02x} where 0x{expected:02x} was expected")]
    Tag {
        /// The tag the format has here.
        expected: u8,
        /// The tag in the bytes.
        found: u8,
    },
    /// Bytes remain after the last element.
    #[error("{0} bytes after the last DER element")]
    Trailing(usize),
    /// The content of an element is not of its type.
    #[error("Bad content of a DER {0}")]
    Content(&'static str),
}

/// One element: its tag, its content, and both with the length as they were encoded.
#[derive(Clone, Copy, Debug)]
pub struct Element<'a> {
    /// Identifier octet.
    pub tag: u8,
    /// Content octets.
    pub value: &'a [u8],
    /// The whole encoding.
    pub raw: &'a [u8],
}

/// Reads one element after the other.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads from `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Whether all has been read.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// The next tag, if there is one.
    pub fn peek(&self) -> Option<u8> {
        self.rest.first().copied()
    }

    /// Any element.
    pub fn any(&mut self) -> Result<Element<'a>, DerError> {
        let (&tag, rest) = self.rest.split_first().ok_or(DerError::Truncated)?;
        if tag & 0x1f == 0x1f {
            return Err(DerError::NotMinimal);
        }
        let (&first, rest) = rest.split_first().ok_or(DerError::Truncated)?;
        let (length, header) = if first < 0x80 {
            (usize::from(first), 2)
        } else {
            let count = usize::from(first & 0x7f);
            if count == 0 || count > 4 {
                return Err(DerError::NotMinimal);
            }
            let octets = rest.get(..count).ok_or(DerError::Truncated)?;
            let length = octets.iter().fold(0usize, |n, b| n << 8 | usize::from(*b));
            if octets[0] == 0 || length < 0x80 {
                return Err(DerError::NotMinimal);
            }
            (length, 2 + count)
        };
        let end = header.checked_add(length).ok_or(DerError::Truncated)?;
        let raw = self.rest.get(..end).ok_or(DerError::Truncated)?;
        self.rest = &self.rest[end..];
        Ok(Element {
            tag,
            value: &raw[header..],
            raw,
        })
    }

    /// An element of the given tag.
    pub fn element(&mut self, tag: u8) -> Result<Element<'a>, DerError> {
        let found = self.peek().ok_or(DerError::Truncated)?;
        if found != tag {
            return Err(DerError::Tag {
                expected: tag,
                found,
            });
        }
        self.any()
    }

    /// The content of an element of the given tag.
    pub fn value(&mut self, tag: u8) -> Result<&'a [u8], DerError> {
        self.element(tag).map(|e| e.value)
    }

    /// A reader of the content of a constructed element of the given tag.
    pub fn nested(&mut self, tag: u8) -> Result<Reader<'a>, DerError> {
        self.value(tag).map(Reader::new)
    }

    /// The content of the next element if it has the given tag.
    pub fn optional(&mut self, tag: u8) -> Result<Option<&'a [u8]>, DerError> {
        if self.peek() == Some(tag) {
            self.value(tag).map(Some)
        } else {
            Ok(None)
        }
    }

    /// A BIT STRING of whole octets.
    pub fn bit_string(&mut self) -> Result<&'a [u8], DerError> {
        match self.value(tag::BIT_STRING)?.split_first() {
            Some((0, bits)) => Ok(bits),
            _ => Err(DerError::Content("BIT STRING")),
        }
    }

    /// The content of a non-negative INTEGER, without its leading zero octet.
    pub fn unsigned(&mut self) -> Result<&'a [u8], DerError> {
        unsigned(self.value(tag::INTEGER)?)
    }

    /// A small non-negative INTEGER.
    pub fn small(&mut self) -> Result<u64, DerError> {
        small(self.unsigned()?)
    }

    /// Ends: nothing may remain.
    pub fn finish(self) -> Result<(), DerError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(DerError::Trailing(self.rest.len()))
        }
    }
}

fn unsigned(content: &[u8]) -> Result<&[u8], DerError> {
    match content {
        [] => Err(DerError::Content("INTEGER")),
        [0, next, ..] if *next < 0x80 => Err(DerError::NotMinimal),
        [0, rest @ ..] if !rest.is_empty() => Ok(rest),
        [first, ..] if *first >= 0x80 => Err(DerError::Content("INTEGER that may not be negative")),
        all => Ok(all),
    }
}

fn small(content: &[u8]) -> Result<u64, DerError> {
    if content.len() > 8 {
        return Err(DerError::Content("INTEGER of at most 64 bits"));
    }
    Ok(content.iter().fold(0, |n, b| n << 8 | u64::from(*b)))
}

/// Reads exactly one element of the given tag from `bytes`, and returns a reader of its content.
pub fn only(bytes: &[u8], tag: u8) -> Result<Reader<'_>, DerError> {
    let mut outer = Reader::new(bytes);
    let inner = outer.nested(tag)?;
    outer.finish()?;
    Ok(inner)
}

/// An object identifier's dotted form; for messages.
pub fn oid_text(oid: &[u8]) -> String {
    let mut arcs: Vec<u64> = Vec::new();
    let mut n = 0u64;
    for byte in oid {
        n = n.wrapping_shl(7) | u64::from(byte & 0x7f);
        if byte & 0x80 == 0 {
            if arcs.is_empty() {
                let first = (n / 40).min(2);
                arcs.extend([first, n - first * 40]);
            } else {
                arcs.push(n);
            }
            n = 0;
        }
    }
    arcs.iter()
        .map(u64::to_string)
        .collect::<Vec<_>>()
        .join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_forms_and_truncation_are_refused() {
        for bytes in [
            &[][..],
            &[0x30],
            &[0x30, 0x80, 0, 0],
            &[0x30, 0x81, 0x01, 0],
            &[0x30, 0x82, 0, 0x80],
            &[0x04, 5, 1],
            &[0x1f, 0x81, 0],
            &[0x30, 0x85, 1, 0, 0, 0, 0],
        ] {
            assert!(Reader::new(bytes).any().is_err(), "{bytes:02x?}");
        }
        assert_eq!(
            only(&[0x30, 0, 0], tag::SEQUENCE).unwrap_err(),
            DerError::Trailing(1)
        );
    }

    #[test]
    fn integers_are_minimal_and_not_negative() {
        assert_eq!(Reader::new(&[2, 2, 0, 0x80]).small().unwrap(), 0x80);
        assert_eq!(Reader::new(&[2, 1, 0]).small().unwrap(), 0);
        assert!(Reader::new(&[2, 2, 0, 1]).small().is_err());
        assert!(Reader::new(&[2, 1, 0x80]).small().is_err());
        assert!(Reader::new(&[2, 0]).small().is_err());
    }

    #[test]
    fn oids_read_as_dotted() {
        assert_eq!(
            oid_text(&[0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1]),
            "1.2.840.10045.2.1"
        );
    }
}
