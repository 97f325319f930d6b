//! Whether containerd is there, finds the shim, and has the runtime in its CRI configuration.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use toml::{Table, Value};

use super::{Finding, version};
use crate::vm::find_program;

/// What containerd calls us.
const RUNTIME_TYPE: &str = "io.containerd.sealpod.v2";
/// The program that it looks for in its PATH.
const SHIM: &str = "containerd-shim-sealpod-v2";
const DEFAULT_CONFIG: &str = "/etc/containerd/config.toml";
/// Largest file that is read, bytes.
const SIZE_MAX: u64 = 4 << 20;
/// Most imported files that are read.
const IMPORTS_MAX: usize = 64;

/// The CRI plugin's name by version of the configuration file (1, 2 and 3).
const CRI_PLUGINS: [&str; 3] = [
    "cri",
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.runtime",
];

pub(super) fn shim_in_path() -> Finding {
    let name = "shim";
    match find_program(Path::new(SHIM)) {
        Ok(path) => Finding::ok(name, path.display().to_string()),
        Err(_) => Finding::warn(
            name,
            format!("{SHIM} is not in this shell's PATH"),
            "`make install`; containerd looks for it in its own PATH",
        ),
    }
}

pub(super) fn check(config: Option<&Path>) -> Vec<Finding> {
    let program = find_program(Path::new("containerd")).ok();
    let installed = match program.as_deref().map(|p| (p, version(p))) {
        Some((_, Some(version))) => Finding::ok("containerd", version),
        Some((path, None)) => Finding::warn(
            "containerd",
            format!("{} does not say its version", path.display()),
            "1.6, 1.7 and 2.x are known to work",
        ),
        None => Finding::warn(
            "containerd",
            "not in PATH",
            "install it (Debian: apt install containerd), unless something else brings its own",
        ),
    };
    vec![
        installed,
        runtime(config.unwrap_or(Path::new(DEFAULT_CONFIG))),
    ]
}

/// The runtime in containerd's configuration. Only Kubernetes needs it: `ctr`, nerdctl and Docker name
/// the runtime type themselves.
fn runtime(path: &Path) -> Finding {
    let name = "containerd's config";
    let fix = "for Kubernetes, add configs/containerd/ and configs/runtimeclass.yaml";
    let mut files = vec![path.to_path_buf()];
    let mut handlers = Vec::new();
    let mut next = 0;
    while let Some(file) = files.get(next).filter(|_| next < IMPORTS_MAX).cloned() {
        next += 1;
        let table = match read(&file) {
            Ok(table) => table,
            Err(e) => return Finding::warn(name, format!("{}: {e}", file.display()), fix),
        };
        handlers.extend(runtimes(&table));
        for import in imports(&table, &file) {
            if !files.contains(&import) {
                files.push(import);
            }
        }
    }
    if handlers.is_empty() {
        let found = format!("{} has no runtime of type {RUNTIME_TYPE}", path.display());
        return Finding::warn(name, found, fix);
    }
    handlers.sort();
    handlers.dedup();
    Finding::ok(
        name,
        format!("RuntimeClass handler {}", handlers.join(", ")),
    )
}

fn read(path: &Path) -> Result<Table, String> {
    let mut text = String::new();
    let file = File::open(path).map_err(|e| e.to_string())?;
    file.take(SIZE_MAX)
        .read_to_string(&mut text)
        .map_err(|e| e.to_string())?;
    toml::from_str(&text).map_err(|e| e.message().to_owned())
}

/// Names of the runtimes of our type.
fn runtimes(config: &Table) -> Vec<String> {
    let at = |plugin: &&str| {
        let plugin = config.get("plugins")?.get(plugin)?;
        plugin.get("containerd")?.get("runtimes")?.as_table()
    };
    let ours =
        |runtime: &Value| runtime.get("runtime_type").and_then(Value::as_str) == Some(RUNTIME_TYPE);
    CRI_PLUGINS
        .iter()
        .filter_map(at)
        .flat_map(|table| table.iter().filter(|(_, r)| ours(r)))
        .map(|(name, _)| name.clone())
        .collect()
}

/// Files that `imports` names: paths, relative ones to the importing file, with `*` in the last part.
fn imports(config: &Table, from: &Path) -> Vec<PathBuf> {
    let list = config.get("imports").and_then(Value::as_array);
    let patterns = list.into_iter().flatten().filter_map(Value::as_str);
    let base = from.parent().unwrap_or(Path::new("/"));
    let mut found = Vec::new();
    for pattern in patterns {
        let pattern = base.join(pattern);
        let (Some(dir), Some(last)) = (pattern.parent(), pattern.file_name()) else {
            continue;
        };
        let last = last.to_string_lossy().into_owned();
        let Some((before, after)) = last.split_once('*') else {
            found.push(pattern);
            continue;
        };
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let mut matching: Vec<_> = entries
            .map(|e| e.path())
            .filter(|p| {
                let name = p.file_name().unwrap_or_default().to_string_lossy();
                name.len() >= before.len() + after.len()
                    && name.starts_with(before)
                    && name.ends_with(after)
            })
            .collect();
        matching.sort();
        found.extend(matching);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::State;

    #[test]
    fn runtime_is_found_in_every_format_and_through_imports() {
        let dir = tempfile::tempdir().expect("tempdir");
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).expect("write");
            path
        };
        let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/containerd");
        for file in ["sealpod-v2.toml", "sealpod-v3.toml"] {
            let finding = runtime(&Path::new(shipped).join(file));
            assert_eq!(
                finding,
                Finding::ok("containerd's config", "RuntimeClass handler sealpod")
            );
        }
        let main = write("config.toml", "version = 2\nimports = [\"conf-*.toml\"]\n");
        assert_eq!(runtime(&main).state, State::Warn);
        write(
            "conf-1.toml",
            "version = 2\nimports = [\"config.toml\"]\n[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.vm]\nruntime_type = 'io.containerd.sealpod.v2'\n",
        );
        assert_eq!(runtime(&main).found, "RuntimeClass handler vm");
    }

    #[test]
    fn runtime_of_another_type_is_not_ours() {
        let table: Table = toml::from_str(
            "[plugins.cri.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n[plugins.cri.containerd.runtimes.odd]\n",
        )
        .expect("toml");
        assert!(runtimes(&table).is_empty());
    }
}
