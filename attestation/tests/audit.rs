//! The audit log: intact logs are found intact, every edit, cut, change of order and forged line is
//! found, and a writer that died in the middle does no harm.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sealpod_attestation::audit::{self, AuditError, AuditLog, Broken, Record, Summary};
use sealpod_attestation::signer::Signer;

struct Lab {
    _dir: tempfile::TempDir,
    path: PathBuf,
    signer: Arc<Signer>,
}

impl Lab {
    fn with(records: u64) -> Self {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("audit.log");
        let signer = Arc::new(Signer::generate().expect("key"));
        let lab = Self {
            _dir: dir,
            path,
            signer,
        };
        for n in 0..records {
            lab.append(n).expect("append");
        }
        lab
    }

    fn append(&self, n: u64) -> Result<(), AuditError> {
        let log = AuditLog::open(&self.path, Arc::clone(&self.signer))?;
        log.append(Record {
            event: "appraisal".into(),
            time: n,
            verdict: "refused".into(),
            ..Record::default()
        })
    }

    fn lines(&self) -> Vec<String> {
        let text = std::fs::read_to_string(&self.path).expect("log");
        text.lines().map(str::to_owned).collect()
    }

    fn write(&self, lines: &[String]) {
        let text: String = lines.iter().map(|l| format!("{l}\n")).collect();
        std::fs::write(&self.path, text).expect("write");
    }

    fn checkpoint(&self) -> String {
        std::fs::read_to_string(audit::checkpoint_path(&self.path)).expect("checkpoint")
    }

    fn verify(&self) -> Result<Summary, Broken> {
        verify(&self.path, &self.checkpoint(), &self.signer)
    }
}

fn verify(path: &Path, checkpoint: &str, signer: &Signer) -> Result<Summary, Broken> {
    let log = std::fs::File::open(path).expect("log");
    audit::verify(log, checkpoint, signer.public(), |_, _| {})
}

#[test]
fn an_intact_log_is_found_intact_and_is_the_owners_alone() {
    use std::os::unix::fs::PermissionsExt;
    let lab = Lab::with(20);
    let summary = lab.verify().unwrap();
    assert_eq!((summary.records, summary.open_end), (20, false));
    let mode = std::fs::metadata(&lab.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(Lab::with(1).verify().unwrap().records, 1);
}

#[test]
fn writers_at_the_same_time_lose_no_record() {
    let lab = Lab::with(0);
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let lab = &lab;
            scope.spawn(move || {
                for n in 0..10 {
                    lab.append(writer * 100 + n).expect("append");
                }
            });
        }
    });
    assert_eq!(lab.verify().unwrap().records, 40);
}

#[test]
fn every_edit_cut_and_change_of_order_is_found() {
    let lab = Lab::with(8);
    let lines = lab.lines();
    let broken = |change: &dyn Fn(&mut Vec<String>)| {
        let mut changed = lines.clone();
        change(&mut changed);
        lab.write(&changed);
        let found = lab.verify();
        lab.write(&lines);
        found.expect_err("broken")
    };
    for at in 0..lines.len() {
        broken(&|l| l[at] = l[at].replace("refused", "affirming"));
        broken(&|l| l[at] = l[at].replace("\"time\":", "\"time\":1"));
        broken(&|l| drop(l.remove(at)));
        broken(&|l| l.insert(at, l[at].clone()));
        broken(&|l| l.truncate(at));
        if at > 0 {
            broken(&|l| l.swap(at, at - 1));
        }
    }
    broken(&|l| l.push(l[7].clone()));
    broken(&|l| l[3].push(' '));
    assert_eq!(lab.verify().unwrap().records, 8);
}

#[test]
fn a_checkpoint_of_another_key_or_an_older_log_is_found() {
    let lab = Lab::with(3);
    let old = lab.checkpoint();
    lab.append(3).unwrap();
    assert!(verify(&lab.path, &old, &lab.signer).unwrap().open_end);
    lab.append(4).unwrap();
    assert!(verify(&lab.path, &old, &lab.signer).is_err());
    let other = Signer::generate().unwrap();
    assert!(verify(&lab.path, &lab.checkpoint(), &other).is_err());
    let forged = lab.checkpoint().replace("\"seq\":5", "\"seq\":4");
    assert!(verify(&lab.path, &forged, &lab.signer).is_err());
}

#[test]
fn a_writer_that_died_between_line_and_checkpoint_leaves_a_log_to_append_to() {
    let lab = Lab::with(3);
    let old = lab.checkpoint();
    lab.append(3).unwrap();
    // The line is there, its checkpoint is not.
    std::fs::write(audit::checkpoint_path(&lab.path), &old).unwrap();
    lab.append(4).unwrap();
    assert_eq!(lab.verify().unwrap().records, 5);
    // Half a line.
    let mut text = std::fs::read_to_string(&lab.path).unwrap();
    text.push_str("{\"seq\":6,\"pre");
    std::fs::write(&lab.path, text).unwrap();
    lab.append(5).unwrap();
    assert_eq!(lab.verify().unwrap().records, 6);
}

#[test]
fn a_log_that_was_cut_or_forged_takes_no_more_records() {
    let lab = Lab::with(3);
    let lines = lab.lines();
    lab.write(&lines[..2]);
    assert!(matches!(lab.append(9), Err(AuditError::Broken(..))));
    let mut forged = lines.clone();
    forged.push(lines[2].clone());
    lab.write(&forged);
    assert!(matches!(lab.append(9), Err(AuditError::Broken(..))));
    lab.write(&lines);
    std::fs::remove_file(audit::checkpoint_path(&lab.path)).unwrap();
    assert!(matches!(lab.append(9), Err(AuditError::File(..))));
}
