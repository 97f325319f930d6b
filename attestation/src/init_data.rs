//! Init-data: what a pod's owner gives to the guest before it starts, bound into the evidence by its
//! digest (HOST_DATA of SEV-SNP, MRCONFIGID of TDX). The host carries the bytes and may not change
//! them; the guest reads from them whom it believes.
//!
//! The form is that of Trustee's init-data: a TOML document with `version`, `algorithm` and a table
//! `[data]` of strings. Of TOML only what such a document needs is read, everything else is refused:
//! this is linked into the guest's agent, and hostile bytes reach it before anything is checked.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256, Sha384};

use crate::binding::PublicKey;

/// Longest init-data.
pub const MAX_INIT_DATA: usize = 256 << 10;
/// Most entries.
const MAX_ENTRIES: usize = 64;
/// Entry with the public key (JWK) of the verifier whose tokens the guest believes.
pub const VERIFIER: &str = "verifier.jwk";
/// Entry with the audience that tokens must be for.
pub const AUDIENCE: &str = "audience";
/// Entry that says whether tokens from simulated evidence are believed: `production`, the default,
/// or `simulated`.
pub const ANCHORS: &str = "anchors";

/// Why init-data is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InitDataError {
    /// Longer than allowed.
    #[error("Init-data has {0} bytes; at most {MAX_INIT_DATA} are read")]
    Size(usize),
    /// Not UTF-8.
    #[error("Init-data is not UTF-8 text")]
    Utf8,
    /// Not the subset of TOML.
    #[error("Init-data line {0}: {1}")]
    Syntax(usize, &'static str),
    /// A key that means nothing here.
    #[error("Init-data has no key {0:?}; it has version, algorithm and the table [data]")]
    UnknownKey(String),
    /// A key twice.
    #[error("Init-data has {0:?} twice")]
    Twice(String),
    /// Another version or none.
    #[error("Init-data version {0:?} is not supported; known is 0.1.0")]
    Version(String),
    /// Another digest algorithm or none.
    #[error("Init-data algorithm {0:?} is not one of sha256, sha384, sha512")]
    Algorithm(String),
    /// An entry whose content is not what it should be.
    #[error("Init-data entry {0:?} is not {1}")]
    Entry(&'static str, &'static str),
}

/// SHA-384 of the bytes as they are: H(init-data) in the binding, and MRCONFIGID where it is not
/// empty.
pub fn digest(bytes: &[u8]) -> [u8; 48] {
    Sha384::digest(bytes).into()
}

/// HOST_DATA of an SNP guest: SHA-256 of the bytes; zeros where there is no init-data.
pub fn host_data(bytes: &[u8]) -> [u8; 32] {
    if bytes.is_empty() {
        return [0; 32];
    }
    Sha256::digest(bytes).into()
}

/// MRCONFIGID of a TD: SHA-384 of the bytes; zeros where there is no init-data.
pub fn mr_config_id(bytes: &[u8]) -> [u8; 48] {
    if bytes.is_empty() {
        return [0; 48];
    }
    digest(bytes)
}

/// Init-data, read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InitData {
    /// The entries of `[data]`.
    pub data: BTreeMap<String, String>,
}

impl InitData {
    /// Reads init-data. `algorithm` is checked to be a known one and otherwise without effect: the
    /// digest has the length that the platform's field has, never padded, never cut.
    ///
    /// # Errors
    /// When it is not of the form.
    pub fn parse(bytes: &[u8]) -> Result<Self, InitDataError> {
        if bytes.len() > MAX_INIT_DATA {
            return Err(InitDataError::Size(bytes.len()));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| InitDataError::Utf8)?;
        let (mut top, data) = Document { text, at: 0 }.read()?;
        let version = top.remove("version").unwrap_or_default();
        if version != "0.1.0" {
            return Err(InitDataError::Version(shown(&version)));
        }
        let algorithm = top.remove("algorithm").unwrap_or_default();
        let known = [
            "sha256", "sha384", "sha512", "sha-256", "sha-384", "sha-512",
        ];
        if !known.contains(&algorithm.as_str()) {
            return Err(InitDataError::Algorithm(shown(&algorithm)));
        }
        match top.into_keys().next() {
            Some(key) => Err(InitDataError::UnknownKey(shown(&key))),
            None => Ok(Self { data }),
        }
    }

    /// The verifier's key, if one is named.
    ///
    /// # Errors
    /// When the entry is no key.
    pub fn verifier(&self) -> Result<Option<PublicKey>, InitDataError> {
        let Some(text) = self.data.get(VERIFIER) else {
            return Ok(None);
        };
        let key = serde_json::from_str(text);
        key.map(Some)
            .map_err(|_| InitDataError::Entry(VERIFIER, "a JSON web key on P-384"))
    }

    /// The audience, if one is named.
    pub fn audience(&self) -> Option<&str> {
        self.data.get(AUDIENCE).map(String::as_str)
    }

    /// Whether tokens from simulated evidence are believed.
    ///
    /// # Errors
    /// When the entry is neither of its two values.
    pub fn allows_simulated(&self) -> Result<bool, InitDataError> {
        match self.data.get(ANCHORS).map(String::as_str) {
            None | Some("production") => Ok(false),
            Some("simulated") => Ok(true),
            Some(_) => Err(InitDataError::Entry(ANCHORS, "production or simulated")),
        }
    }

    /// Init-data with these entries, as text.
    pub fn to_text(&self) -> String {
        let mut text = "version = \"0.1.0\"\nalgorithm = \"sha384\"\n\n[data]\n".to_owned();
        for (key, value) in &self.data {
            text += &format!("{} = {}\n", quoted(key), quoted(value));
        }
        text
    }
}

fn shown(text: &str) -> String {
    text.chars().take(40).collect()
}

fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out += "\\\"",
            '\\' => out += "\\\\",
            '\n' => out += "\\n",
            c if c.is_control() => out += &format!("\\u{:04X}", u32::from(c)),
            c => out.push(c),
        }
    }
    out + "\""
}

type Table = BTreeMap<String, String>;

/// The text and how far it was read.
struct Document<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Document<'a> {
    /// The keys before `[data]`, and those in it.
    fn read(mut self) -> Result<(Table, Table), InitDataError> {
        let (mut top, mut data) = (Table::new(), Table::new());
        let mut in_data = false;
        loop {
            self.skip_blank();
            if self.rest().is_empty() {
                return Ok((top, data));
            }
            if self.take("[") {
                let header = self.key()?;
                if in_data || header != "data" || !self.take("]") {
                    return Err(self.syntax("the only table is [data], once"));
                }
                in_data = true;
            } else {
                let key = self.key()?;
                self.skip_spaces();
                if !self.take("=") {
                    return Err(self.syntax("expected key = \"text\""));
                }
                self.skip_spaces();
                let value = self.string()?;
                let table = if in_data { &mut data } else { &mut top };
                if table.len() == MAX_ENTRIES {
                    return Err(self.syntax("more than 64 entries"));
                }
                if table.insert(key.clone(), value).is_some() {
                    return Err(InitDataError::Twice(shown(&key)));
                }
            }
            self.end_of_line()?;
        }
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn syntax(&self, what: &'static str) -> InitDataError {
        InitDataError::Syntax(self.text[..self.at].matches('\n').count() + 1, what)
    }

    fn take(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn take_while(&mut self, keep: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let end = rest.find(|c| !keep(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    fn skip_spaces(&mut self) {
        self.take_while(|c| matches!(c, ' ' | '\t'));
    }

    fn skip_blank(&mut self) {
        loop {
            self.take_while(|c| matches!(c, ' ' | '\t' | '\n' | '\r'));
            if !self.take("#") {
                return;
            }
            self.take_while(|c| c != '\n');
        }
    }

    fn end_of_line(&mut self) -> Result<(), InitDataError> {
        self.skip_spaces();
        if self.take("#") {
            self.take_while(|c| !matches!(c, '\n' | '\r'));
        }
        if self.rest().is_empty() || self.take("\n") || self.take("\r\n") {
            return Ok(());
        }
        Err(self.syntax("text behind the end of a value"))
    }

    fn key(&mut self) -> Result<String, InitDataError> {
        if self.rest().starts_with(['"', '\'']) {
            return self.string();
        }
        let key = self.take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
        if key.is_empty() {
            return Err(self.syntax("expected a key"));
        }
        Ok(key.to_owned())
    }

    /// Any of TOML's four kinds of string.
    fn string(&mut self) -> Result<String, InitDataError> {
        for (quote, raw, lines) in [
            ("'''", true, true),
            ("\"\"\"", false, true),
            ("'", true, false),
            ("\"", false, false),
        ] {
            if self.take(quote) {
                if lines && !self.take("\n") {
                    self.take("\r\n");
                }
                return self.string_until(quote, raw, lines);
            }
        }
        Err(self.syntax("values are strings in quotes"))
    }

    fn string_until(
        &mut self,
        quote: &str,
        raw: bool,
        lines: bool,
    ) -> Result<String, InitDataError> {
        let mut value = String::new();
        loop {
            if self.rest().starts_with(quote) {
                // Up to two quotes may stand right before the three that close.
                if lines && self.rest()[1..].starts_with(quote) {
                    value.push_str(&quote[..1]);
                    self.at += 1;
                    continue;
                }
                self.at += quote.len();
                return Ok(value);
            }
            if lines && self.take("\r\n") {
                value.push_str("\r\n");
                continue;
            }
            let Some(c) = self.rest().chars().next() else {
                return Err(self.syntax("a string without end"));
            };
            self.at += c.len_utf8();
            match c {
                '\\' if !raw => self.escape(&mut value, lines)?,
                '\n' if lines => value.push('\n'),
                '\t' => value.push('\t'),
                c if c.is_control() => return Err(self.syntax("a control character in a string")),
                c => value.push(c),
            }
        }
    }

    fn escape(&mut self, value: &mut String, lines: bool) -> Result<(), InitDataError> {
        let Some(c) = self.rest().chars().next() else {
            return Err(self.syntax("a string without end"));
        };
        self.at += c.len_utf8();
        let digits = match c {
            '"' | '\\' => {
                value.push(c);
                return Ok(());
            }
            'n' | 't' | 'r' => {
                value.push(match c {
                    'n' => '\n',
                    't' => '\t',
                    _ => '\r',
                });
                return Ok(());
            }
            // A backslash at the end of a line swallows all white space up to the next text.
            '\n' | '\r' if lines => {
                self.take_while(|c| matches!(c, ' ' | '\t' | '\n' | '\r'));
                return Ok(());
            }
            'u' => 4,
            'U' => 8,
            _ => return Err(self.syntax("an unknown escape in a string")),
        };
        let code = self.rest().get(..digits);
        let scalar = code
            .filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|d| u32::from_str_radix(d, 16).ok())
            .and_then(char::from_u32);
        value.push(scalar.ok_or_else(|| self.syntax("an escape that is no character"))?);
        self.at += digits;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::binding::EphemeralKey;

    const HEAD: &str = "version = \"0.1.0\"\nalgorithm = \"sha384\"\n";

    /// The entries as the `toml` crate reads them.
    fn reference(text: &str) -> Option<BTreeMap<String, String>> {
        let table: toml::Table = text.parse().ok()?;
        let data = table.get("data")?.as_table()?;
        data.iter()
            .map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned())))
            .collect()
    }

    #[test]
    fn documents_are_read_as_toml_reads_them() {
        for body in [
            "[data]\n",
            "[data]\n\"a.toml\" = '''\nurl = 'x'\n\\n \"q\"\n'''\n",
            "[data]\na = \"x\\ty\\u00e9\\\"\" # c\nb-c = 'raw \\n'\n",
            "# c\n\n[data] # d\r\nx = \"\"\"\r\nline\r\n two \\\n   three\"\"\"\r\n",
            "[data]\nq = '''a''''\nr = \"\"\"b\"\"\"\"\"\ns = \"\"\n",
        ] {
            let text = format!("{HEAD}{body}");
            let read = InitData::parse(text.as_bytes()).unwrap_or_else(|e| panic!("{body}: {e}"));
            assert_eq!(Some(read.data), reference(&text), "{body}");
        }
    }

    #[test]
    fn written_init_data_reads_back_the_same() {
        let key = EphemeralKey::from_random(&[3; 48]).unwrap().public();
        let mut init = InitData::default();
        for (name, value) in [
            (
                VERIFIER,
                serde_json::to_string(&key).unwrap().as_str().to_owned(),
            ),
            (ANCHORS, "simulated".to_owned()),
            (AUDIENCE, "a\n\"\\\u{1}é".to_owned()),
        ] {
            init.data.insert(name.into(), value);
        }
        let text = init.to_text();
        assert_eq!(InitData::parse(text.as_bytes()).as_ref(), Ok(&init));
        assert_eq!(reference(&text), Some(init.data.clone()));
        assert_eq!(init.verifier().unwrap(), Some(key));
        assert_eq!(init.allows_simulated(), Ok(true));
        init.data.insert(ANCHORS.into(), "any".into());
        assert!(init.allows_simulated().is_err());
        init.data.insert(VERIFIER.into(), "{}".into());
        assert!(init.verifier().is_err());
    }

    #[test]
    fn what_is_not_init_data_is_refused() {
        for text in [
            String::new(),
            "version = \"0.2.0\"\nalgorithm = \"sha384\"\n[data]\n".into(),
            "version = \"0.1.0\"\nalgorithm = \"md5\"\n[data]\n".into(),
            format!("{HEAD}extra = \"x\"\n[data]\n"),
            format!("{HEAD}[other]\n"),
            format!("{HEAD}[data]\n[data]\n"),
            format!("{HEAD}[data]\na = 1\n"),
            format!("{HEAD}[data]\na = \"x\"\na = \"y\"\n"),
            format!("{HEAD}[data]\na = \"x\" b = \"y\"\n"),
            format!("{HEAD}[data]\na = \"x\ny\"\n"),
            format!("{HEAD}[data]\na = \"\\uD800\"\n"),
            format!("{HEAD}[data]\na = \"\\q\"\n"),
            format!("{HEAD}[data]\na = '''x\n"),
            format!("{HEAD}[data]\na.b = \"x\"\n"),
            format!("{HEAD}[data]\na\n"),
        ] {
            assert!(InitData::parse(text.as_bytes()).is_err(), "{text}");
        }
        assert_eq!(InitData::parse(&[0xff]), Err(InitDataError::Utf8));
        assert!(matches!(
            InitData::parse(&vec![b' '; MAX_INIT_DATA + 1]),
            Err(InitDataError::Size(_))
        ));
    }

    #[test]
    fn digests_have_the_length_of_their_field_and_nothing_is_zero() {
        assert_eq!(host_data(b""), [0; 32]);
        assert_eq!(mr_config_id(b""), [0; 48]);
        let expected: [u8; 32] = Sha256::digest(b"x").into();
        assert_eq!(host_data(b"x"), expected);
        assert_eq!(mr_config_id(b"x"), digest(b"x"));
    }
}
