//! The service's certificate: from the files that are named, or made once and kept in the state
//! folder. TLS 1.3 alone, by rustls with aws-lc-rs.

use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use sealpod_attestation::crypto;
use sealpod_attestation::encoding;

use super::config::Config;
use super::self_signed;

/// File names in the state folder.
const CERTIFICATE: &str = "tls-certificate.pem";
const KEY: &str = "tls-key.pem";

/// A loaded certificate.
pub(crate) struct Loaded {
    pub(crate) config: Arc<ServerConfig>,
    /// SHA-384 of the leaf's public key: what clients pin.
    pub(crate) pin: String,
}

/// Loads the certificate, making one where none is named and none was made before.
pub(crate) fn load(config: &Config) -> anyhow::Result<Loaded> {
    let (certificate, key) = match (&config.tls.certificate, &config.tls.key) {
        (Some(certificate), Some(key)) => (certificate.clone(), key.clone()),
        _ => {
            let files = (config.state.join(CERTIFICATE), config.state.join(KEY));
            if !files.0.exists() {
                make(&files.0, &files.1, config)?;
            }
            files
        }
    };
    let chain = CertificateDer::pem_file_iter(&certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("{} holds no certificates", certificate.display()))?;
    let leaf = chain
        .first()
        .with_context(|| format!("{} holds no certificate", certificate.display()))?;
    let pin = pin(leaf).with_context(|| format!("{} cannot be used", certificate.display()))?;
    let private = PrivateKeyDer::from_pem_file(&key)
        .with_context(|| format!("{} holds no private key", key.display()))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut tls = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .with_context(|| format!("{} and {} do not fit", certificate.display(), key.display()))?;
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    // No session tickets: every connection is small and none is resumed.
    tls.send_tls13_tickets = 0;
    Ok(Loaded {
        config: Arc::new(tls),
        pin,
    })
}

fn pin(leaf: &CertificateDer<'_>) -> anyhow::Result<String> {
    let leaf = sealpod_attestation::x509::Certificate::parse(leaf)?;
    Ok(encoding::hex(&crypto::sha384(leaf.spki)))
}

fn make(certificate: &Path, key: &Path, config: &Config) -> anyhow::Result<()> {
    let made = self_signed::make(config.listen.ip())?;
    // The key first: a certificate without its key would stay in the way.
    secret(key, encoding::pem("PRIVATE KEY", &made.key).as_bytes())?;
    std::fs::write(certificate, encoding::pem("CERTIFICATE", &made.certificate))
        .with_context(|| format!("Cannot write {}", certificate.display()))?;
    eprintln!("sealpod-attest: made {}", certificate.display());
    Ok(())
}

/// Writes a file that only its owner can read, in place of what was there.
pub(crate) fn secret(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let write = || -> std::io::Result<()> {
        let _ = std::fs::remove_file(path);
        let mut options = std::fs::OpenOptions::new();
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().with_context(|| format!("Cannot write {}", path.display()))
}

/// Makes the state folder, for its owner alone.
pub(crate) fn state_folder(path: &Path) -> anyhow::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("Cannot make {}", path.display()))?;
    let meta =
        std::fs::metadata(path).with_context(|| format!("Cannot read {}", path.display()))?;
    ensure!(meta.is_dir(), "{} is not a folder", path.display());
    Ok(())
}
