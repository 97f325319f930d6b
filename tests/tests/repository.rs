//! What the repository promises about itself: licences and sources of what it depends on, and a test
//! behind every promise of `docs/promises.md`. Reads the tree; needs no network.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every package that is linked, built or run, as cargo resolves them for this platform.
fn packages() -> Vec<Value> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--offline"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(root())
        .output()
        .expect("cargo metadata");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let mut metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    serde_json::from_value(metadata["packages"].take()).expect("packages")
}

fn strings(table: &toml::Table, section: &str, key: &str) -> BTreeSet<String> {
    let list = table[section][key].as_array().expect("a list");
    list.iter()
        .filter_map(|v| v.as_str().map(str::to_owned))
        .collect()
}

/// Whether an SPDX expression can be satisfied with `allowed` alone. `/` is the old way to write OR.
fn satisfied(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let text = expression
        .replace('/', " OR ")
        .replace('(', " ( ")
        .replace(')', " ) ");
    let words: Vec<&str> = text.split_whitespace().collect();
    let (value, rest) = either(&words, allowed);
    value && rest.is_empty()
}

fn either<'a>(words: &'a [&'a str], allowed: &BTreeSet<String>) -> (bool, &'a [&'a str]) {
    let (mut value, mut rest) = both(words, allowed);
    while let ["OR", tail @ ..] = rest {
        let (next, after) = both(tail, allowed);
        value |= next;
        rest = after;
    }
    (value, rest)
}

fn both<'a>(words: &'a [&'a str], allowed: &BTreeSet<String>) -> (bool, &'a [&'a str]) {
    let (mut value, mut rest) = one(words, allowed);
    while let ["AND", tail @ ..] = rest {
        let (next, after) = one(tail, allowed);
        value &= next;
        rest = after;
    }
    (value, rest)
}

fn one<'a>(words: &'a [&'a str], allowed: &BTreeSet<String>) -> (bool, &'a [&'a str]) {
    match words {
        ["(", tail @ ..] => {
            let (value, rest) = either(tail, allowed);
            (value, rest.strip_prefix(&[")"]).unwrap_or(rest))
        }
        [name, "WITH", exception, rest @ ..] => {
            (allowed.contains(&format!("{name} WITH {exception}")), rest)
        }
        [name, rest @ ..] => (allowed.contains(*name), rest),
        [] => (false, words),
    }
}

/// Licences that single packages may have besides.
fn exceptions(deny: &toml::Table) -> BTreeMap<String, BTreeSet<String>> {
    let list = deny["licenses"].get("exceptions");
    let list = list.and_then(toml::Value::as_array).into_iter().flatten();
    list.map(|one| {
        let one = one.as_table().expect("a table");
        let allowed = one["allow"].as_array().expect("a list").iter();
        let allowed = allowed.map(|a| a.as_str().expect("a licence").to_owned());
        let name = one["name"].as_str().expect("a name");
        (name.to_owned(), allowed.collect())
    })
    .collect()
}

#[test]
fn dependencies_keep_deny_toml() {
    let text = std::fs::read_to_string(root().join("deny.toml")).expect("deny.toml");
    let deny: toml::Table = text.parse().expect("TOML");
    let allowed = strings(&deny, "licenses", "allow");
    let banned: BTreeSet<&str> = deny["bans"]["deny"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|ban| ban["name"].as_str())
        .collect();
    let exceptions = exceptions(&deny);
    let mut wrong = Vec::new();
    for package in packages() {
        let text = |key: &str| package[key].as_str().unwrap_or_default().to_owned();
        let (name, license, source) = (text("name"), text("license"), text("source"));
        let excepted = exceptions.get(&name);
        if !satisfied(&license, &allowed) && !excepted.is_some_and(|e| satisfied(&license, e)) {
            wrong.push(format!("{name}: licence {license:?} is not allowed"));
        }
        if !(source.is_empty() || source.starts_with("registry+")) {
            wrong.push(format!("{name}: comes from {source}"));
        }
        if banned.contains(name.as_str()) {
            wrong.push(format!("{name} is banned"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn licence_expressions_are_read_as_spdx_means_them() {
    let allowed = ["MIT", "Apache-2.0 WITH LLVM-exception"]
        .map(str::to_owned)
        .into();
    for good in [
        "MIT",
        "MIT/Apache-2.0",
        "GPL-2.0 OR MIT",
        "(MIT OR X) AND (Y OR MIT)",
        "Apache-2.0 WITH LLVM-exception",
    ] {
        assert!(satisfied(good, &allowed), "{good}");
    }
    for bad in [
        "",
        "X",
        "MIT AND X",
        "X OR Y",
        "(MIT OR X) AND Y",
        "Apache-2.0",
    ] {
        assert!(!satisfied(bad, &allowed), "{bad}");
    }
}

/// Names of all functions in the tree's Rust files, and of modules.
fn functions(dir: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name();
        if path.is_dir() && name != "target" && name != ".git" {
            functions(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            // Names that a macro makes tests of.
            for list in text.split("on_every_containerd!(").skip(1) {
                let list = list.split(')').next().unwrap_or_default();
                found.extend(list.split(',').map(|name| name.trim().to_owned()));
            }
            for part in text.split("fn ").skip(1) {
                found.insert(
                    part.split(|c: char| !(c.is_alphanumeric() || c == '_'))
                        .next()
                        .unwrap_or_default()
                        .to_owned(),
                );
            }
        }
    }
}

/// A promise is a row of a table; its last column names at least one test in backticks. Only the name
/// after the last `::` counts.
#[test]
fn every_promise_names_a_test_that_exists() {
    let Ok(text) = std::fs::read_to_string(root().join("docs/promises.md")) else {
        eprintln!("SKIPPED: docs/promises.md is not there");
        return;
    };
    let mut known = BTreeSet::new();
    functions(&root(), &mut known);
    let mut wrong = Vec::new();
    let rows = text
        .lines()
        .filter(|l| l.starts_with('|') && !l.starts_with("|-") && !l.starts_with("| -"));
    for row in rows.skip(1) {
        let last = row
            .trim_end_matches(['|', ' '])
            .rsplit('|')
            .next()
            .unwrap_or_default();
        if last.trim_matches(['-', ' ', ':']).is_empty() || last.trim().eq_ignore_ascii_case("test")
        {
            continue;
        }
        let names: Vec<&str> = last.split('`').skip(1).step_by(2).collect();
        if names.is_empty() {
            wrong.push(format!("no test is named in: {row}"));
        }
        for name in names {
            let function = name.rsplit("::").next().unwrap_or(name);
            if !known.contains(function) {
                wrong.push(format!("no test is called {name}: {row}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
