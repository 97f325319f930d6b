//! Init-data: what a pod's owner gives to the guest before it starts, bound into the evidence by its
//! digest (HOST_DATA of SEV-SNP, MRCONFIGID of TDX). The host carries the bytes and may not change
//! them; the guest reads from them whom it believes.
//!
//! The form is that of Trustee's init-data: a TOML document with `version`, `algorithm` and a table
//! `[data]` of strings. Of TOML only what such a document needs is read, everything else is refused:
//! this is linked into the guest's agent, and hostile bytes reach it before anything is checked.

mod text;

use std::collections::BTreeMap;

use sha2::{Digest, Sha256, Sha384};

use crate::binding::PublicKey;
use text::{Document, quoted};

/// Longest init-data.
pub const MAX_INIT_DATA: usize = 256 << 10;
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
        let (mut top, data) = Document::new(text).read()?;
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
