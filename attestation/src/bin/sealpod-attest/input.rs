//! Reading files: capped, and recognised by their content.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use sealpod_attestation::verdict::Tee;
use sealpod_attestation::{Collateral, Timestamp, collateral, encoding, nvidia, snp, tdx};

/// Files in a folder of collateral.
const MAX_FILES: usize = 4096;

/// Reads a file, or standard input for `-`, up to the size of the largest collateral.
pub(crate) fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    read_up_to(path, collateral::MAX_FILE as u64)
}

/// Reads a file, or standard input for `-`, of at most `limit` bytes.
pub(crate) fn read_up_to(path: &Path, limit: u64) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let name = path.display();
    let read = if path == Path::new("-") {
        std::io::stdin().take(limit + 1).read_to_end(&mut bytes)
    } else {
        let file = std::fs::File::open(path).with_context(|| format!("Cannot open {name}"))?;
        if file.metadata().is_ok_and(|m| m.is_dir()) {
            bail!("{name} is a folder");
        }
        file.take(limit + 1).read_to_end(&mut bytes)
    };
    read.with_context(|| format!("Cannot read {name}"))?;
    if bytes.len() as u64 > limit {
        bail!("{name} is larger than {limit} bytes");
    }
    Ok(bytes)
}

/// Evidence: a binary file, or one in hexadecimal or base64 text.
pub(crate) fn read_evidence(path: &Path) -> anyhow::Result<Vec<u8>> {
    Ok(decode_text(read(path)?))
}

/// Undoes hexadecimal or base64 where the whole file is such text.
pub(crate) fn decode_text(bytes: Vec<u8>) -> Vec<u8> {
    let Some(text) = std::str::from_utf8(&bytes).ok().map(str::trim) else {
        return bytes;
    };
    // Shorter than any evidence, or structured text: as it is.
    if text.len() < 256 || text.starts_with(['{', '[', '<', '-']) {
        return bytes;
    }
    let compact: String = text
        .strip_prefix("0x")
        .unwrap_or(text)
        .split_ascii_whitespace()
        .collect();
    encoding::unhex(&compact)
        .or_else(|_| encoding::unbase64(&compact))
        .unwrap_or(bytes)
}

/// What kind of evidence these bytes are.
pub(crate) fn detect(bytes: &[u8]) -> Option<Tee> {
    let text = std::str::from_utf8(bytes).ok().map(str::trim_start);
    if text.is_some_and(|t| t.starts_with(['[', '{'])) || bytes.starts_with(&[0x11, 0xe0]) {
        return Some(Tee::Nvidia);
    }
    if bytes.len() == snp::REPORT_LENGTH && bytes[1..4] == [0, 0, 0] {
        return Some(Tee::Snp);
    }
    let quote =
        bytes.len() >= 48 && bytes[1] == 0 && (3..=5).contains(&bytes[0]) && bytes[2..4] == [2, 0];
    (quote || tdx::TdReport::parse(bytes).is_ok()).then_some(Tee::Tdx)
}

/// Devices of a file of GPU evidence.
pub(crate) fn devices(path: &Path, bytes: Vec<u8>) -> anyhow::Result<Vec<nvidia::Device>> {
    match std::str::from_utf8(&bytes) {
        Ok(text) if text.trim_start().starts_with(['[', '{']) => nvidia::parse_evidence_json(text)
            .with_context(|| format!("{} is no GPU evidence", path.display())),
        _ => {
            let name = path
                .file_name()
                .map(|n| n.to_string_lossy().into_owned())
                .unwrap_or_default();
            Ok(vec![nvidia::Device {
                name,
                report: bytes,
                chain: Vec::new(),
            }])
        }
    }
}

/// Adds a file, or every file below a folder, to the collateral. In a folder, files that are no
/// collateral are skipped; a file that was named must be some.
pub(crate) fn add_collateral(pile: &mut Collateral, path: &Path) -> anyhow::Result<()> {
    if !path.is_dir() {
        let bytes = read(path)?;
        let unusable = || format!("{} cannot be used", path.display());
        pile.add(&bytes).with_context(unusable)?;
        // A manifest is read when a device needs it; one that was named has to be one in any case.
        if pile.rims.last() == Some(&bytes) {
            nvidia::Rim::parse(&bytes).with_context(unusable)?;
        }
        return Ok(());
    }
    let mut folders = vec![path.to_owned()];
    let mut files: Vec<PathBuf> = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)
            .with_context(|| format!("Cannot list {}", folder.display()))?
        {
            let entry = entry?;
            // Symbolic links are not followed: a folder may hold what others put there.
            match entry.file_type()? {
                t if t.is_dir() => folders.push(entry.path()),
                t if t.is_file() => files.push(entry.path()),
                _ => {}
            }
            if files.len() > MAX_FILES {
                bail!("{} holds more than {MAX_FILES} files", path.display());
            }
        }
    }
    files.sort();
    for file in files {
        if let Err(error) = pile.add(&read(&file)?) {
            eprintln!("sealpod-attest: skipped {}: {error}", file.display());
        }
    }
    Ok(())
}

/// The time that was given, or the machine's.
pub(crate) fn now(given: Option<Timestamp>) -> Timestamp {
    given.unwrap_or_else(|| {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Timestamp(since.map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX)))
    })
}

/// A value of exactly `N` bytes: hexadecimal, or `@FILE` with the bytes.
pub(crate) fn exact<const N: usize>(
    option: &str,
    value: Option<&String>,
) -> anyhow::Result<Option<[u8; N]>> {
    let Some(value) = value else { return Ok(None) };
    let bytes = match value.strip_prefix('@') {
        Some(file) => read(Path::new(file))?,
        None => encoding::unhex(value).with_context(|| format!("--{option} is not hexadecimal"))?,
    };
    let length = bytes.len();
    match bytes.try_into() {
        Ok(array) => Ok(Some(array)),
        Err(_) => bail!(
            "--{option} has {length} bytes; exactly {N} are needed (nothing is padded or cut)"
        ),
    }
}
