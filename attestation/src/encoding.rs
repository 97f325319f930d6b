//! Text encodings of bytes: hexadecimal, base64, PEM. Strict: what is not exactly right is refused.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};

/// Why a text could not be decoded.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum EncodingError {
    /// Not pairs of hexadecimal digits, or not of the length asked for.
    #[error("Not hexadecimal of the expected length")]
    Hex,
    /// Not base64.
    #[error("Not valid base64")]
    Base64,
    /// A PEM boundary is missing or does not match.
    #[error("Not valid PEM: {0}")]
    Pem(&'static str),
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|b| {
            [
                DIGITS[usize::from(b >> 4)] as char,
                DIGITS[usize::from(b & 15)] as char,
            ]
        })
        .collect()
}

/// Decodes hexadecimal of either case; no separators, no prefix.
pub fn unhex(text: &str) -> Result<Vec<u8>, EncodingError> {
    let digit = |c: u8| {
        (c as char)
            .to_digit(16)
            .map(|d| d as u8)
            .ok_or(EncodingError::Hex)
    };
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if !rest.is_empty() {
        return Err(EncodingError::Hex);
    }
    pairs
        .iter()
        .map(|[h, l]| Ok(digit(*h)? << 4 | digit(*l)?))
        .collect()
}

/// Decodes hexadecimal into exactly `N` bytes.
pub fn unhex_array<const N: usize>(text: &str) -> Result<[u8; N], EncodingError> {
    unhex(text)?.try_into().map_err(|_| EncodingError::Hex)
}

/// Decodes standard base64; ASCII white space between the characters is skipped.
pub fn unbase64(text: &str) -> Result<Vec<u8>, EncodingError> {
    let compact: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    STANDARD.decode(compact).map_err(|_| EncodingError::Base64)
}

/// Standard base64 with padding.
pub fn base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// Base64url without padding (RFC 7515 section 2).
pub fn base64url(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Decodes base64url without padding.
pub fn unbase64url(text: &str) -> Result<Vec<u8>, EncodingError> {
    URL_SAFE_NO_PAD
        .decode(text)
        .map_err(|_| EncodingError::Base64)
}

/// One PEM block: its label (`CERTIFICATE`, `X509 CRL`, …) and its bytes.
pub type PemBlock = (String, Vec<u8>);

/// All PEM blocks of a text, in order; text between blocks is ignored (RFC 7468 section 5.2).
pub fn pem_blocks(text: &str) -> Result<Vec<PemBlock>, EncodingError> {
    blocks(text, false)
}

/// As [`pem_blocks`], where nothing but line ends may stand between the blocks.
pub fn pem_blocks_only(text: &str) -> Result<Vec<PemBlock>, EncodingError> {
    blocks(text, true)
}

fn blocks(text: &str, only: bool) -> Result<Vec<PemBlock>, EncodingError> {
    let blank = |text: &str| !only || text.bytes().all(|b| matches!(b, b'\n' | b'\r'));
    let mut blocks = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find("-----BEGIN ") {
        if !blank(&rest[..start]) {
            return Err(EncodingError::Pem("text between the blocks"));
        }
        let after = &rest[start + 11..];
        let (label, body) = after
            .split_once("-----")
            .ok_or(EncodingError::Pem("no end of the BEGIN line"))?;
        let end = format!("-----END {label}-----");
        let (content, tail) = body
            .split_once(end.as_str())
            .ok_or(EncodingError::Pem("no END line of the same label"))?;
        blocks.push((label.to_owned(), unbase64(content)?));
        rest = tail;
    }
    if !blank(rest) {
        return Err(EncodingError::Pem("text behind the blocks"));
    }
    Ok(blocks)
}

/// One PEM block as text, 64 characters to a line.
pub fn pem(label: &str, bytes: &[u8]) -> String {
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in base64(bytes).as_bytes().chunks(64) {
        text.push_str(&String::from_utf8_lossy(line));
        text.push('\n');
    }
    text + &format!("-----END {label}-----\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pem_survives_the_round_trip() {
        let bytes: Vec<u8> = (0..200).collect();
        let text = format!("comment\n{}{}", pem("A", &bytes), pem("B C", b"x"));
        assert_eq!(
            pem_blocks(&text).unwrap(),
            vec![("A".into(), bytes), ("B C".into(), b"x".to_vec())]
        );
    }

    #[test]
    fn broken_text_is_refused() {
        assert_eq!(unhex("0g"), Err(EncodingError::Hex));
        assert_eq!(unhex("012"), Err(EncodingError::Hex));
        assert_eq!(unhex_array::<2>("0102ff"), Err(EncodingError::Hex));
        assert!(pem_blocks("-----BEGIN X-----\nAAAA\n-----END Y-----").is_err());
        assert!(pem_blocks("-----BEGIN X").is_err());
        assert!(pem_blocks("-----BEGIN X-----\n!!!!\n-----END X-----").is_err());
    }
}
