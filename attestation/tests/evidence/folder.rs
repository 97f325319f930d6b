//! The evidence folder, its manifest, and the table of cases. Only reads.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use sealpod_attestation::{Collateral, Timestamp, Verdict};

/// What one case expects of a verdict.
pub(crate) enum Expect {
    /// Accepted, and the named checks are among those that passed.
    Accepted(&'static [&'static str]),
    /// Refused, by exactly these checks; each name with a part of what was found.
    Refused(&'static [(&'static str, &'static str)]),
    /// Not evidence or collateral at all; a part of the message.
    Unreadable(&'static str),
}

/// Produces a verdict from the folder's files.
pub(crate) type Run = Box<dyn Fn(&Folder) -> Result<Verdict, String>>;

/// One line of the table.
pub(crate) struct Case {
    /// Files it covers; the first one gives it its name.
    pub(crate) files: &'static [&'static str],
    /// What is particular about it: the time, a permission.
    pub(crate) setting: &'static str,
    /// The expectation.
    pub(crate) expect: Expect,
    /// Produces the verdict, or the message of what could not be read.
    pub(crate) run: Run,
}

/// The folder.
pub(crate) struct Folder {
    root: PathBuf,
    manifest: BTreeMap<String, String>,
}

impl Folder {
    /// Opens the folder, or says loudly that it is absent.
    pub(crate) fn open() -> Option<Self> {
        let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/evidence");
        let root = std::env::var_os("SEALPOD_EVIDENCE_DIR").map_or(default, PathBuf::from);
        if !root.is_dir() {
            eprintln!(
                "\n*** SKIPPED: no evidence folder at {}; set SEALPOD_EVIDENCE_DIR ***\n",
                root.display()
            );
            return None;
        }
        let text = std::fs::read_to_string(root.join("manifest.json")).expect("manifest.json");
        let entries: Vec<serde_json::Value> =
            serde_json::from_str(&text).expect("manifest.json is JSON");
        let text_of =
            |e: &serde_json::Value, key: &str| e[key].as_str().unwrap_or_default().to_owned();
        let manifest = entries
            .iter()
            .map(|e| (text_of(e, "file"), text_of(e, "expect")))
            .collect();
        Some(Self { root, manifest })
    }

    /// A file's bytes.
    pub(crate) fn read(&self, file: &str) -> Vec<u8> {
        std::fs::read(self.root.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
    }

    /// Collateral made of these files.
    pub(crate) fn collateral(&self, files: &[&str]) -> Result<Collateral, String> {
        let mut collateral = Collateral::default();
        for file in files {
            collateral
                .add(&self.read(file))
                .map_err(|e| sealpod_attestation::verdict::chain_text(&e))?;
        }
        Ok(collateral)
    }

    fn files(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut folders = vec![self.root.clone()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).expect("folder") {
                let path = entry.expect("entry").path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let name = path
                        .strip_prefix(&self.root)
                        .expect("below")
                        .display()
                        .to_string();
                    if name != "manifest.json" {
                        found.insert(name);
                    }
                }
            }
        }
        found
    }

    /// Runs all cases, prints the table, and fails if one went wrong or a file is not covered.
    pub(crate) fn run(&self, cases: &[Case]) {
        let mut wrong = Vec::new();
        let mut covered = BTreeSet::new();
        println!(
            "{:<44} {:<34} {:<10} {:<58} manifest",
            "evidence", "setting", "verdict", "reason"
        );
        for case in cases {
            covered.extend(case.files.iter().map(|f| (*f).to_owned()));
            let result = (case.run)(self);
            let (verdict, reason) = describe(&result);
            let stated = self
                .manifest
                .get(case.files[0])
                .map_or("(not in the manifest)", String::as_str);
            println!(
                "{:<44} {:<34} {verdict:<10} {:<58} {stated}",
                case.files[0],
                case.setting,
                cut(&reason, 58)
            );
            if let Err(problem) = judge(&case.expect, &result) {
                wrong.push(format!("{} [{}]: {problem}", case.files[0], case.setting));
            }
        }
        let files = self.files();
        wrong.extend(
            files
                .difference(&covered)
                .map(|f| format!("{f}: no case covers it")),
        );
        wrong.extend(
            self.manifest
                .keys()
                .filter(|f| !files.contains(*f))
                .map(|f| format!("{f}: in the manifest, not in the folder")),
        );
        println!("{} cases, {} files", cases.len(), files.len());
        assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    }
}

/// A time.
pub(crate) fn at(text: &str) -> Timestamp {
    text.parse().expect("time")
}

fn describe(result: &Result<Verdict, String>) -> (String, String) {
    match result {
        Ok(v) => {
            let failures: Vec<String> = v
                .failures()
                .map(|c| format!("{}: {}", c.name, cut(&c.found, 60)))
                .collect();
            (
                format!("{:?}", v.status),
                if failures.is_empty() {
                    "-".into()
                } else {
                    failures.join("; ")
                },
            )
        }
        Err(message) => ("Unreadable".into(), message.clone()),
    }
}

fn judge(expect: &Expect, result: &Result<Verdict, String>) -> Result<(), String> {
    match (expect, result) {
        (Expect::Unreadable(part), Err(message)) if message.contains(part) => Ok(()),
        (Expect::Accepted(names), Ok(verdict)) if verdict.accepted() => {
            let missing = |n: &&&str| {
                verdict
                    .check(n)
                    .is_none_or(|c| c.outcome != sealpod_attestation::Outcome::Pass)
            };
            match names.iter().find(missing) {
                None => Ok(()),
                Some(name) => Err(format!(
                    "check {name} did not pass: {:?}",
                    verdict.check(name)
                )),
            }
        }
        (Expect::Refused(expected), Ok(verdict)) => {
            let found: Vec<(&str, &str)> = verdict
                .failures()
                .map(|c| (c.name.as_str(), c.found.as_str()))
                .collect();
            let same = found.len() == expected.len()
                && expected
                    .iter()
                    .all(|(name, part)| found.iter().any(|(n, f)| n == name && f.contains(part)));
            if same {
                Ok(())
            } else {
                Err(format!("expected refusal by {expected:?}, got {found:?}"))
            }
        }
        _ => Err(format!("unexpected {:?}", describe(result))),
    }
}

fn cut(text: &str, length: usize) -> String {
    if text.chars().count() <= length {
        text.to_owned()
    } else {
        text.chars().take(length - 1).chain(['…']).collect()
    }
}
