//! The audit log: a file that only grows. Each line is a JSON record that carries the SHA-384 of the
//! line before it, so that an edit or a changed order shows; a signed checkpoint beside the log
//! (`<log>.checkpoint`) names the number, end and hash of the last line, so that a cut and a forged
//! line at the end show.
//!
//! ```text
//! append: lock ─▶ read checkpoint ─▶ [adopt one line of a crash] ─▶ write line, sync ─▶ checkpoint, sync
//! ```
//!
//! All state is in the two files: several processes can append to one log, under a lock on it.
//! Whoever can write both files *and* holds an old checkpoint can set both back; keep checkpoints
//! elsewhere where that matters, and give one to [`verify`].

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::binding::{PublicKey, transcript};
use crate::crypto::sha384;
use crate::encoding::{base64url, hex, unbase64url};
use crate::signer::{Signer, SignerError};

/// Longest line.
const MAX_LINE: u64 = 64 << 10;
/// The hash before the first line.
const START: [u8; 48] = [0; 48];

/// Why nothing was appended.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// A file cannot be read or written.
    #[error("Audit log {0:?}")]
    File(PathBuf, #[source] std::io::Error),
    /// The files do not belong together: somebody changed one.
    #[error("Audit log {0:?} is broken")]
    Broken(PathBuf, #[source] Broken),
    /// The checkpoint could not be signed.
    #[error("Audit checkpoint")]
    Signer(#[from] SignerError),
    /// A record that no line can hold.
    #[error("Audit record does not fit a line of {MAX_LINE} bytes")]
    Record,
}

/// Where and why a log is not intact.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("Line {line}: {why}")]
pub struct Broken {
    /// Number of the line, from 1; 0 is the checkpoint.
    pub line: u64,
    /// What is wrong.
    pub why: String,
}

fn broken<T>(line: u64, why: impl Into<String>) -> Result<T, Broken> {
    let why = why.into();
    Err(Broken { line, why })
}

/// What happened. Fields that an event does not have stay empty and are not written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Record {
    /// `appraisal`, `gate`, `lease`, `revocation`, ….
    pub event: String,
    /// Seconds since 1970, by the writer's clock.
    pub time: u64,
    /// The pod.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub pod_uid: String,
    /// Who asked.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub audience: String,
    /// `snp` or `tdx`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub tee: String,
    /// Digest of the evidence.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub evidence: String,
    /// Digest of the policy.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub policy: String,
    /// Digest of the init-data.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub init_data: String,
    /// `affirming`, `refused`, `released`, `withheld`, ….
    pub verdict: String,
    /// The check that refused.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub check: String,
    /// Why: what was expected and found.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Number of the token.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub jti: String,
    /// Devices it is about.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<String>,
    /// Whether it rests on simulated anchors.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub sim: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    seq: u64,
    prev: String,
    record: Record,
}

/// How far a log reaches, signed by its writer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// Number of lines.
    pub seq: u64,
    /// Length of the file, bytes.
    pub end: u64,
    /// SHA-384 of the last line, hexadecimal.
    pub hash: String,
    /// `kid` of the key that signed.
    pub kid: String,
    /// ES384 over the transcript of `audit-checkpoint-v1` and the fields above, base64url.
    pub signature: String,
}

impl Checkpoint {
    fn signed(&self) -> [u8; 48] {
        let (seq, end) = (self.seq.to_le_bytes(), self.end.to_le_bytes());
        let fields = [&seq[..], &end, self.hash.as_bytes(), self.kid.as_bytes()];
        transcript::<sha2::Sha384>("audit-checkpoint-v1", fields).into()
    }

    fn new(seq: u64, end: u64, hash: &[u8; 48], signer: &Signer) -> Result<Self, SignerError> {
        let mut checkpoint = Self {
            seq,
            end,
            hash: hex(hash),
            kid: signer.public().thumbprint(),
            signature: String::new(),
        };
        checkpoint.signature = base64url(&signer.sign(&checkpoint.signed())?);
        Ok(checkpoint)
    }

    /// Reads a checkpoint and checks that `key` signed it.
    ///
    /// # Errors
    /// When it is not one, or another's.
    pub fn parse(text: &str, key: &PublicKey) -> Result<Self, Broken> {
        let Ok(checkpoint) = serde_json::from_str::<Self>(text) else {
            return broken(0, "checkpoint cannot be read");
        };
        let signature = unbase64url(&checkpoint.signature).unwrap_or_default();
        if !key.verifies(&checkpoint.signed(), &signature) {
            return broken(0, "checkpoint is not signed by the log's key");
        }
        Ok(checkpoint)
    }
}

/// An audit log to append to.
#[derive(Debug)]
pub struct AuditLog {
    path: PathBuf,
    signer: Arc<Signer>,
}

/// Where the checkpoint of a log lies.
pub fn checkpoint_path(log: &Path) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(".checkpoint");
    name.into()
}

impl AuditLog {
    /// Opens a log, or makes an empty one, readable by its owner alone. Checks that log and checkpoint
    /// belong together; the lines before the last are checked by [`verify`].
    ///
    /// # Errors
    /// When a file cannot be read or written, or does not fit the other.
    pub fn open(path: &Path, signer: Arc<Signer>) -> Result<Self, AuditError> {
        let log = Self {
            path: path.into(),
            signer,
        };
        log.locked(|log, file| log.end(file).map(drop))?;
        Ok(log)
    }

    /// Appends a record. When this returns, the record is on the disk.
    ///
    /// # Errors
    /// When it could not be written, or the log is broken.
    pub fn append(&self, record: Record) -> Result<(), AuditError> {
        self.locked(|log, file| {
            let last = log.end(file)?;
            let line = Line {
                seq: last.seq + 1,
                prev: last.hash,
                record,
            };
            let mut text = serde_json::to_string(&line).map_err(|_| AuditError::Record)?;
            text.push('\n');
            if text.len() as u64 > MAX_LINE {
                return Err(AuditError::Record);
            }
            let wrote = file
                .seek(SeekFrom::Start(last.end))
                .and_then(|_| file.write_all(text.as_bytes()))
                .and_then(|()| file.sync_data());
            wrote.map_err(|e| log.failed(e))?;
            let end = last.end + text.len() as u64;
            log.write_checkpoint(line.seq, end, &sha384(text.as_bytes()))
        })
    }

    fn failed(&self, error: std::io::Error) -> AuditError {
        AuditError::File(self.path.clone(), error)
    }

    fn broken(&self, line: u64, why: &str) -> AuditError {
        let why = why.into();
        AuditError::Broken(self.path.clone(), Broken { line, why })
    }

    fn locked<T>(
        &self,
        work: impl FnOnce(&Self, &mut File) -> Result<T, AuditError>,
    ) -> Result<T, AuditError> {
        let open = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&self.path);
        let mut file = open.map_err(|e| self.failed(e))?;
        // Released when the file is closed.
        flock(&file, FlockOperation::LockExclusive).map_err(|e| self.failed(e.into()))?;
        work(self, &mut file)
    }

    /// The checkpoint, after what a crash left behind it was settled.
    fn end(&self, file: &mut File) -> Result<Checkpoint, AuditError> {
        let length = file.metadata().map_err(|e| self.failed(e))?.len();
        let path = checkpoint_path(&self.path);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && length == 0 => {
                self.write_checkpoint(0, 0, &START)?;
                std::fs::read_to_string(&path).map_err(|e| self.failed(e))?
            }
            Err(e) => return Err(AuditError::File(path, e)),
        };
        let last = Checkpoint::parse(&text, self.signer.public())
            .map_err(|e| AuditError::Broken(path, e))?;
        if length < last.end {
            return Err(self.broken(last.seq, "the log is shorter than its checkpoint"));
        }
        if length == last.end {
            return Ok(last);
        }
        self.adopt(file, &last, length)
    }

    /// A process died between a line and its checkpoint: a whole line is kept, a part of one was
    /// never answered for and goes.
    fn adopt(
        &self,
        file: &mut File,
        last: &Checkpoint,
        length: u64,
    ) -> Result<Checkpoint, AuditError> {
        let many = "more than one line stands behind the checkpoint";
        if length - last.end > MAX_LINE {
            return Err(self.broken(last.seq, many));
        }
        let mut tail = Vec::new();
        file.seek(SeekFrom::Start(last.end))
            .and_then(|_| file.read_to_end(&mut tail))
            .map_err(|e| self.failed(e))?;
        let (seq, end, hash) = match tail.iter().position(|b| *b == b'\n') {
            Some(at) if at + 1 == tail.len() => {
                check_line(&tail, last.seq + 1, &last.hash)
                    .map_err(|e| AuditError::Broken(self.path.clone(), e))?;
                (last.seq + 1, length, sha384(&tail))
            }
            Some(_) => return Err(self.broken(last.seq, many)),
            None => {
                file.set_len(last.end).map_err(|e| self.failed(e))?;
                return Ok(last.clone());
            }
        };
        self.write_checkpoint(seq, end, &hash)?;
        Ok(Checkpoint::new(seq, end, &hash, &self.signer)?)
    }

    /// Replaces the checkpoint: the old or the new one is there at any time.
    fn write_checkpoint(&self, seq: u64, end: u64, hash: &[u8; 48]) -> Result<(), AuditError> {
        let checkpoint = Checkpoint::new(seq, end, hash, &self.signer)?;
        let text = serde_json::to_string(&checkpoint).map_err(|_| AuditError::Record)?;
        let path = checkpoint_path(&self.path);
        let mut new = path.clone().into_os_string();
        new.push(".new");
        let write = || {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&new)?;
            file.write_all(text.as_bytes())?;
            file.sync_data()?;
            std::fs::rename(&new, &path)
        };
        write().map_err(|e| AuditError::File(path.clone(), e))
    }
}

fn check_line(text: &[u8], seq: u64, prev: &str) -> Result<Record, Broken> {
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    let line: Line = match serde_json::from_slice(body) {
        Ok(line) => line,
        Err(e) => return broken(seq, format!("not a record: {e}")),
    };
    if line.seq != seq {
        return broken(seq, format!("it is record {}", line.seq));
    }
    if line.prev != prev {
        return broken(seq, "its hash of the line before is not that line's");
    }
    Ok(line.record)
}

/// What an intact log holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Number of records.
    pub records: u64,
    /// SHA-384 of the last line, hexadecimal.
    pub hash: String,
    /// Whether a last line has no checkpoint yet: its writer died, or is writing now.
    pub open_end: bool,
}

/// Reads a log from its beginning and calls `each` with every record; checks every hash, and the end
/// against the signed checkpoint.
///
/// # Errors
/// The first line that is not as it was written, or what the checkpoint says against the log.
pub fn verify(
    log: impl Read,
    checkpoint: &str,
    key: &PublicKey,
    mut each: impl FnMut(u64, &Record),
) -> Result<Summary, Broken> {
    let checkpoint = Checkpoint::parse(checkpoint, key)?;
    let mut reader = BufReader::new(log);
    let (mut seq, mut end, mut hash) = (0, 0, hex(&START));
    let mut sealed = checkpoint.seq == 0 && checkpoint.end == 0 && checkpoint.hash == hash;
    loop {
        let mut text = Vec::new();
        let mut limited = (&mut reader).take(MAX_LINE + 1);
        if let Err(e) = limited.read_until(b'\n', &mut text) {
            return broken(seq + 1, format!("cannot be read: {e}"));
        }
        if text.is_empty() {
            break;
        }
        if text.len() as u64 > MAX_LINE || !text.ends_with(b"\n") {
            return broken(seq + 1, "has no end");
        }
        seq += 1;
        let record = check_line(&text, seq, &hash)?;
        end += text.len() as u64;
        hash = hex(&sha384(&text));
        each(seq, &record);
        if seq == checkpoint.seq {
            if (end, &hash) != (checkpoint.end, &checkpoint.hash) {
                return broken(seq, "it is not the line that the checkpoint names");
            }
            sealed = true;
        }
    }
    if !sealed {
        return broken(
            seq,
            format!(
                "the log ends here; its checkpoint names {} records",
                checkpoint.seq
            ),
        );
    }
    if seq > checkpoint.seq + 1 {
        return broken(checkpoint.seq + 1, "not covered by the checkpoint");
    }
    Ok(Summary {
        records: seq,
        hash,
        open_end: seq > checkpoint.seq,
    })
}
