//! The service's configuration file, and what it is made into. An unknown key or a value out of range
//! is an error that names the file, the key and what is allowed.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde::Deserialize;

/// Longest configuration file.
const MAX_FILE: u64 = 64 << 10;

/// The file. Paths that are not absolute start at the file's folder.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    /// Address and port to listen on.
    pub(crate) listen: SocketAddr,
    /// Folder of what the service makes: signing key, certificate, audit log.
    pub(crate) state: PathBuf,
    pub(crate) tls: Tls,
    pub(crate) verifier: Verifier,
    pub(crate) kbs: Kbs,
    pub(crate) limits: Limits,
}

/// The certificate; made by the service where none is named.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Tls {
    /// PEM, leaf first.
    pub(crate) certificate: Option<PathBuf>,
    /// PEM.
    pub(crate) key: Option<PathBuf>,
}

/// What evidence is judged by.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Verifier {
    /// Who signs the tokens: `iss`.
    pub(crate) issuer: String,
    /// A simulator's anchors, in place of the manufacturers'.
    pub(crate) anchors: Option<PathBuf>,
    /// Folder of certificates, CRLs, OCSP responses, RIMs and TDX collateral.
    pub(crate) collateral: Option<PathBuf>,
    /// Reference values, JSON.
    pub(crate) reference_values: Option<PathBuf>,
    /// Policy, Rego.
    pub(crate) policy: Option<PathBuf>,
}

impl Default for Verifier {
    fn default() -> Self {
        Self {
            issuer: "sealpod-attest".into(),
            anchors: None,
            collateral: None,
            reference_values: None,
            policy: None,
        }
    }
}

/// The key broker.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Kbs {
    /// Folder of resources, `<repository>/<type>/<tag>`. Absent: none are given out.
    pub(crate) resources: Option<PathBuf>,
    /// Audience of the tokens that its clients get.
    pub(crate) audience: String,
}

impl Default for Kbs {
    fn default() -> Self {
        Self {
            resources: None,
            audience: "kbs".into(),
        }
    }
}

/// How much of the machine clients may take.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Limits {
    /// Connections at once.
    pub(crate) connections: u32,
    /// Of these, from one client address.
    pub(crate) connections_per_address: u32,
    /// Requests a second from one client address, on average; ten times as many in a burst.
    pub(crate) requests_per_second: u32,
    /// Longest request body, KiB.
    pub(crate) body_kib: u32,
    /// Memory for the bodies of all requests at once, MiB.
    pub(crate) memory_mib: u32,
    /// For the TLS handshake and for the header of each request, seconds.
    pub(crate) header_seconds: u32,
    /// For the body of a request, seconds.
    pub(crate) body_seconds: u32,
    /// After which a connection is asked to end, seconds.
    pub(crate) connection_seconds: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            connections_per_address: 64,
            requests_per_second: 50,
            body_kib: 4096,
            memory_mib: 64,
            header_seconds: 5,
            body_seconds: 10,
            connection_seconds: 300,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8443)),
            state: "/var/lib/sealpod-attest".into(),
            tls: Tls::default(),
            verifier: Verifier::default(),
            kbs: Kbs::default(),
            limits: Limits::default(),
        }
    }
}

impl Config {
    /// Reads a file; without one, the defaults.
    pub(crate) fn load(path: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = path else {
            return Ok(Self::default());
        };
        let bytes = crate::input::read_up_to(path, MAX_FILE)?;
        let text = std::str::from_utf8(&bytes)
            .with_context(|| format!("{} is not text", path.display()))?;
        let mut config: Self = toml::from_str(text)
            .map_err(|error| anyhow::anyhow!(one_line(text, &error)))
            .with_context(|| format!("{} cannot be used", path.display()))?;
        config
            .check()
            .with_context(|| format!("{} cannot be used", path.display()))?;
        config.resolve(path.parent().unwrap_or(Path::new("")));
        Ok(config)
    }

    fn check(&self) -> anyhow::Result<()> {
        ensure!(
            self.tls.certificate.is_some() == self.tls.key.is_some(),
            "tls.certificate and tls.key go together: give both or neither"
        );
        let l = &self.limits;
        for (key, value, from, to) in [
            ("connections", l.connections, 1, 65_536),
            (
                "connections_per_address",
                l.connections_per_address,
                1,
                65_536,
            ),
            ("requests_per_second", l.requests_per_second, 1, 1_000_000),
            ("body_kib", l.body_kib, 64, 16_384),
            ("memory_mib", l.memory_mib, 1, 65_536),
            ("header_seconds", l.header_seconds, 1, 60),
            ("body_seconds", l.body_seconds, 1, 300),
            ("connection_seconds", l.connection_seconds, 1, 86_400),
        ] {
            ensure!(
                (from..=to).contains(&value),
                "limits.{key} is {value}; {from} to {to} are allowed"
            );
        }
        ensure!(
            l.body_kib <= l.memory_mib << 10,
            "limits.body_kib is {} but limits.memory_mib allows {} KiB for all bodies",
            l.body_kib,
            l.memory_mib << 10
        );
        for (key, text) in [
            ("verifier.issuer", &self.verifier.issuer),
            ("kbs.audience", &self.kbs.audience),
        ] {
            ensure!(
                (1..=128).contains(&text.len()),
                "{key} has {} bytes; 1 to 128 are allowed",
                text.len()
            );
        }
        Ok(())
    }

    /// Paths that are not absolute start at the file's folder.
    fn resolve(&mut self, folder: &Path) {
        let (tls, verifier) = (&mut self.tls, &mut self.verifier);
        let optional = [
            &mut tls.certificate,
            &mut tls.key,
            &mut verifier.anchors,
            &mut verifier.collateral,
            &mut verifier.reference_values,
            &mut verifier.policy,
            &mut self.kbs.resources,
        ];
        for path in optional.into_iter().flatten() {
            *path = folder.join(&*path);
        }
        self.state = folder.join(&self.state);
    }
}

impl Limits {
    pub(crate) fn header_time(&self) -> Duration {
        Duration::from_secs(self.header_seconds.into())
    }

    pub(crate) fn body_time(&self) -> Duration {
        Duration::from_secs(self.body_seconds.into())
    }

    pub(crate) fn connection_time(&self) -> Duration {
        Duration::from_secs(self.connection_seconds.into())
    }
}

/// An error and the beginning of its line. The parser's own text repeats what the file holds, however long
/// that is.
fn one_line(text: &str, error: &toml::de::Error) -> String {
    let start = error.span().map_or(0, |span| span.start);
    let number = text.get(..start).map_or(0, |b| b.matches('\n').count());
    let line = text.lines().nth(number).unwrap_or_default();
    let cut = |text: &str, most| -> String { text.chars().take(most).collect() };
    let words = cut(error.message(), 400).replace('\n', " ");
    format!("line {}, {:?}: {words}", number + 1, cut(line, 60))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> anyhow::Result<Config> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("serve.toml");
        std::fs::write(&file, text).unwrap();
        Config::load(Some(&file))
    }

    #[test]
    fn an_unknown_key_names_file_key_and_what_is_allowed() {
        let error = load("[limits]\nconections = 1\n").unwrap_err();
        let text = format!("{error:#}");
        for part in ["serve.toml", "conections", "connections_per_address"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for text in [
            "[limits]\nconnections = 0",
            "[limits]\nbody_kib = 2048\nmemory_mib = 1",
            "[tls]\nkey = \"k.pem\"",
            "listen = \"localhost\"",
            "[verifier]\nissuer = \"\"",
        ] {
            assert!(load(text).is_err(), "{text}");
        }
        assert!(load("").is_ok());
    }

    #[test]
    fn paths_start_at_the_file() {
        let config =
            load("state = \"s\"\n[verifier]\ncollateral = \"/c\"\npolicy = \"p.rego\"").unwrap();
        assert!(config.state.is_absolute() && config.state.ends_with("s"));
        assert_eq!(config.verifier.collateral.unwrap(), Path::new("/c"));
        assert!(config.verifier.policy.unwrap().is_absolute());
    }
}
