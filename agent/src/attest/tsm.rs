//! Reports through configfs-tsm, the kernel's one interface for all TEEs (Linux 6.7 and newer;
//! Documentation/ABI/testing/configfs-tsm-report). A folder that is made below `report` is a request:
//! `inblob` takes the report data, `outblob` and `auxblob` give the evidence, `generation` counts the
//! changes of the request so that nobody's answer is taken for another's.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::PathBuf;

use sealpod_attestation::evidence::{MAX_CERTIFICATES, MAX_REPORT, Tee};

use super::{CpuEvidence, SourceError};

/// Where configfs is mounted.
pub const CONFIGFS: &str = "/sys/kernel/config";
/// Folder of the requests, below [`CONFIGFS`].
pub const REPORTS: &str = "tsm/report";
/// Name of our request.
const REQUEST: &str = "sealpod";
/// Longest of the small files.
const WORD_MAX: usize = 64;
/// How often a request that someone else disturbed is made again.
const ATTEMPTS: u32 = 3;

/// The folder of requests, as the kernel's or one that behaves like it.
pub trait Tree {
    /// Makes a request.
    fn make(&self, request: &str) -> io::Result<()>;
    /// Ends it.
    fn end(&self, request: &str) -> io::Result<()>;
    /// Writes a whole attribute at once.
    fn write(&self, request: &str, attribute: &str, value: &[u8]) -> io::Result<()>;
    /// Reads an attribute of at most `most` bytes.
    fn read(&self, request: &str, attribute: &str, most: usize) -> io::Result<Vec<u8>>;
}

/// The kernel's, at its root.
#[derive(Debug, Clone)]
pub struct Configfs(pub PathBuf);

impl Tree for Configfs {
    fn make(&self, request: &str) -> io::Result<()> {
        match fs::create_dir(self.0.join(request)) {
            // Left by a request that was cut short.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }

    fn end(&self, request: &str) -> io::Result<()> {
        fs::remove_dir(self.0.join(request))
    }

    fn write(&self, request: &str, attribute: &str, value: &[u8]) -> io::Result<()> {
        let path = self.0.join(request).join(attribute);
        OpenOptions::new().write(true).open(path)?.write_all(value)
    }

    fn read(&self, request: &str, attribute: &str, most: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let file = File::open(self.0.join(request).join(attribute))?;
        file.take(most as u64 + 1).read_to_end(&mut bytes)?;
        if bytes.len() > most {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "too long"));
        }
        Ok(bytes)
    }
}

/// A report over `data`, with what the host gave along with it.
///
/// # Errors
/// [`SourceError::Step`] names the attribute, [`SourceError::Provider`] a TEE that is not known.
pub fn report(tree: &impl Tree, data: &[u8; 64]) -> Result<CpuEvidence, SourceError> {
    let step = |what: &'static str| move |source| SourceError::Step { what, source };
    tree.make(REQUEST).map_err(step("make a TSM request"))?;
    let mut result = Err(SourceError::Disturbed);
    for _ in 0..ATTEMPTS {
        result = request(tree, data);
        if !matches!(result, Err(SourceError::Disturbed)) {
            break;
        }
    }
    // A request that stays is used again.
    let _ = tree.end(REQUEST);
    result
}

fn request(tree: &impl Tree, data: &[u8; 64]) -> Result<CpuEvidence, SourceError> {
    let step = |what: &'static str| move |source| SourceError::Step { what, source };
    let before = generation(tree)?;
    tree.write(REQUEST, "inblob", data)
        .map_err(step("write inblob"))?;
    let provider = tree
        .read(REQUEST, "provider", WORD_MAX)
        .map_err(step("read provider"))?;
    let provider = String::from_utf8_lossy(&provider);
    let tee = match provider.trim() {
        "sev_guest" => Tee::Snp,
        "tdx_guest" => Tee::Tdx,
        other => return Err(SourceError::Provider(other.chars().take(32).collect())),
    };
    let report = match tree.read(REQUEST, "outblob", MAX_REPORT) {
        // The request was changed while the report was made (EWOULDBLOCK).
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(SourceError::Disturbed),
        other => other.map_err(step("read outblob"))?,
    };
    // Only SNP has one, and only where the host has certificates.
    let endorsements = match tree.read(REQUEST, "auxblob", MAX_CERTIFICATES) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(SourceError::Disturbed),
        other => other.map_err(step("read auxblob"))?,
    };
    // One change since: ours.
    if generation(tree)? != before.wrapping_add(1) {
        return Err(SourceError::Disturbed);
    }
    Ok(CpuEvidence {
        tee,
        report,
        endorsements,
        event_log: Vec::new(),
    })
}

fn generation(tree: &impl Tree) -> Result<u64, SourceError> {
    let text = tree.read(REQUEST, "generation", WORD_MAX);
    let text = text.map_err(|source| SourceError::Step {
        what: "read generation",
        source,
    })?;
    let number = std::str::from_utf8(&text).ok();
    let number = number.and_then(|t| t.trim().parse().ok());
    number.ok_or(SourceError::Disturbed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    /// Behaves as drivers/virt/coco/tsm.c does.
    #[derive(Default)]
    struct Fake {
        provider: &'static str,
        aux: Option<Vec<u8>>,
        /// Changes that another user of the request makes while ours is under way.
        disturb: RefCell<u32>,
        longest: usize,
        state: RefCell<State>,
    }

    #[derive(Default)]
    struct State {
        made: bool,
        generation: u64,
        inblob: Vec<u8>,
        ended: u32,
    }

    impl Tree for Fake {
        fn make(&self, _: &str) -> io::Result<()> {
            self.state.borrow_mut().made = true;
            Ok(())
        }

        fn end(&self, _: &str) -> io::Result<()> {
            let mut state = self.state.borrow_mut();
            state.made = false;
            state.ended += 1;
            Ok(())
        }

        fn write(&self, _: &str, attribute: &str, value: &[u8]) -> io::Result<()> {
            let mut state = self.state.borrow_mut();
            if !state.made || attribute != "inblob" || value.len() > 64 {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            state.inblob = value.to_vec();
            state.generation += 1;
            Ok(())
        }

        fn read(&self, _: &str, attribute: &str, most: usize) -> io::Result<Vec<u8>> {
            let mut state = self.state.borrow_mut();
            if !state.made {
                return Err(io::ErrorKind::NotFound.into());
            }
            let mut left = self.disturb.borrow_mut();
            let value = match attribute {
                "provider" => format!("{}\n", self.provider).into_bytes(),
                "generation" => format!("{}\n", state.generation).into_bytes(),
                "outblob" if state.inblob.is_empty() => {
                    return Err(io::ErrorKind::InvalidInput.into());
                }
                "outblob" => {
                    let answer = [b"report over ", &state.inblob[..]].concat();
                    if *left > 0 {
                        *left -= 1;
                        state.generation += 1;
                    }
                    [answer, vec![0; self.longest]].concat()
                }
                "auxblob" => self.aux.clone().ok_or(io::ErrorKind::NotFound)?,
                _ => return Err(io::ErrorKind::NotFound.into()),
            };
            if value.len() > most {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            Ok(value)
        }
    }

    #[test]
    fn the_report_is_over_what_was_written_and_the_request_is_gone_afterwards() {
        let fake = Fake {
            provider: "sev_guest",
            aux: Some(b"table".to_vec()),
            ..Fake::default()
        };
        let evidence = report(&fake, &[7; 64]).expect("report");
        assert_eq!(evidence.tee, Tee::Snp);
        assert_eq!(evidence.report, [&b"report over "[..], &[7; 64]].concat());
        assert_eq!(evidence.endorsements, b"table");
        assert_eq!(fake.state.borrow().ended, 1);
        let tdx = Fake {
            provider: "tdx_guest",
            ..Fake::default()
        };
        let evidence = report(&tdx, &[8; 64]).expect("report");
        assert_eq!((evidence.tee, evidence.endorsements), (Tee::Tdx, vec![]));
    }

    #[test]
    fn a_request_that_someone_else_changed_is_made_again_and_never_believed() {
        let fake = |disturb| Fake {
            provider: "sev_guest",
            disturb: RefCell::new(disturb),
            ..Fake::default()
        };
        assert!(report(&fake(2), &[1; 64]).is_ok());
        let often = fake(ATTEMPTS);
        assert!(matches!(
            report(&often, &[1; 64]),
            Err(SourceError::Disturbed)
        ));
        assert_eq!(often.state.borrow().ended, 1);
    }

    #[test]
    fn unknown_providers_and_reports_without_end_are_refused() {
        let other = Fake {
            provider: "arm_cca",
            ..Fake::default()
        };
        let e = report(&other, &[1; 64]).expect_err("provider").to_string();
        assert!(e.contains("arm_cca"), "{e}");
        let long = Fake {
            provider: "sev_guest",
            longest: MAX_REPORT,
            ..Fake::default()
        };
        let e = report(&long, &[1; 64]).expect_err("long").to_string();
        assert!(e.contains("outblob"), "{e}");
    }

    #[test]
    fn the_kernels_tree_is_found_below_any_root() {
        let dir = tempfile::tempdir().expect("folder");
        let tree = Configfs(dir.path().to_owned());
        tree.make("a").expect("made");
        tree.make("a").expect("made again");
        // An attribute is the kernel's to make: none is made here.
        assert!(tree.write("a", "inblob", b"x").is_err());
        fs::write(dir.path().join("a/inblob"), "").expect("file");
        tree.write("a", "inblob", b"xyz").expect("written");
        assert_eq!(tree.read("a", "inblob", 3).expect("read"), b"xyz");
        assert!(tree.read("a", "inblob", 2).is_err());
        fs::remove_file(dir.path().join("a/inblob")).expect("removed");
        tree.end("a").expect("ended");
        assert!(!dir.path().join("a").exists());
    }
}
