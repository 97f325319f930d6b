//! Finds, reads, merges and checks the files of the configuration.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use toml::{Table, Value};

use super::Config;

/// Where the configuration is looked for where nothing else is said.
pub const DEFAULT_PATH: &str = "/etc/sealpod/sealpod.toml";
/// Environment variable that names another file.
pub const PATH_VARIABLE: &str = "SEALPOD_CONFIG";
/// Largest file that is read, bytes.
const SIZE_MAX: u64 = 1 << 20;

/// What is wrong with the configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file, or the folder of drop-ins, cannot be read.
    #[error("Configuration {path} cannot be read")]
    Read {
        /// File or folder.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Not TOML, an unknown key, or a value of the wrong type.
    #[error("Configuration {path} is not valid: {reason}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// The place in it, the key, and what is allowed.
        reason: String,
    },
    /// A value that is not allowed.
    #[error("Configuration {path}: the value of {key} is not allowed; allowed is {allowed}")]
    Value {
        /// The file.
        path: PathBuf,
        /// `section.key`.
        key: &'static str,
        /// In words.
        allowed: String,
    },
}

/// Reads the configuration: the file `explicit` (the runtime option `ConfigPath`), else the one that
/// the environment variable [`PATH_VARIABLE`] names, else [`DEFAULT_PATH`], which alone may be
/// absent. Then every `*.toml` of the folder `<file>.d`, in the order of their names; what comes later
/// wins, key by key.
///
/// # Errors
/// [`ConfigError`], always naming the file.
pub fn load(explicit: Option<&Path>) -> Result<Config, ConfigError> {
    let named = explicit.map(PathBuf::from).or_else(|| {
        let path = std::env::var_os(PATH_VARIABLE)?;
        (!path.is_empty()).then(|| path.into())
    });
    match named {
        Some(path) => load_from(&path, true),
        None => load_from(Path::new(DEFAULT_PATH), false),
    }
}

fn load_from(path: &Path, required: bool) -> Result<Config, ConfigError> {
    let mut merged = Table::new();
    let mut last = path.to_path_buf();
    match read(path) {
        Ok(text) => merge(&mut merged, parse(path, &text)?),
        Err(e) if !required && e.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(unreadable(path)(source)),
    }
    for path in drop_ins(path)? {
        let text = read(&path).map_err(unreadable(&path))?;
        merge(&mut merged, parse(&path, &text)?);
        last = path;
    }
    // Each file was valid alone, so only values that do not go together can be wrong now.
    let config: Config = Value::Table(merged)
        .try_into()
        .map_err(|e: toml::de::Error| ConfigError::Parse {
            path: last.clone(),
            reason: e.to_string(),
        })?;
    config.check_together().map_err(value_error(&last))?;
    Ok(config)
}

/// The file's keys, after checking it as if it were the only one.
fn parse(path: &Path, text: &str) -> Result<Table, ConfigError> {
    let invalid = |e: toml::de::Error| ConfigError::Parse {
        path: path.into(),
        reason: e.to_string().trim_end().into(),
    };
    let config: Config = toml::from_str(text).map_err(invalid)?;
    config.check_values().map_err(value_error(path))?;
    toml::from_str(text).map_err(invalid)
}

fn value_error(path: &Path) -> impl FnOnce(super::Complaint) -> ConfigError {
    let path = path.to_path_buf();
    |(key, allowed)| ConfigError::Value { path, key, allowed }
}

fn unreadable(path: &Path) -> impl FnOnce(io::Error) -> ConfigError {
    let path = path.to_path_buf();
    |source| ConfigError::Read { path, source }
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?
        .take(SIZE_MAX + 1)
        .read_to_string(&mut text)?;
    if text.len() as u64 > SIZE_MAX {
        return Err(io::Error::other(format!("larger than {SIZE_MAX} bytes")));
    }
    Ok(text)
}

/// `<file>.d/*.toml`, sorted. The folder may be absent.
fn drop_ins(path: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let mut folder = path.as_os_str().to_owned();
    folder.push(".d");
    let folder = PathBuf::from(folder);
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(unreadable(&folder)(source)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(unreadable(&folder))?.path();
        if path.extension().is_some_and(|e| e == "toml") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Tables merge key by key; any other value replaces the earlier one.
fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => merge(old, new),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Accelerator;

    /// Loads `main` with the drop-ins `10.toml`, `20.toml`, …
    fn with(main: &str, drop_ins: &[&str]) -> Result<Config, String> {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("sealpod.toml");
        std::fs::write(&path, main).expect("write");
        let folder = dir.path().join("sealpod.toml.d");
        std::fs::create_dir(&folder).expect("mkdir");
        std::fs::write(folder.join("ignored.conf"), "no toml").expect("write");
        for (i, text) in drop_ins.iter().enumerate() {
            std::fs::write(folder.join(format!("{}0.toml", i + 1)), text).expect("write");
        }
        let prefix = format!("{}/", dir.path().display());
        load(Some(&path)).map_err(|e| e.to_string().replace(&prefix, ""))
    }

    #[test]
    fn empty_file_is_the_defaults() {
        assert_eq!(with("", &[]), Ok(Config::default()));
    }

    #[test]
    fn shipped_file_names_every_key_with_its_default() {
        let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/sealpod.toml");
        let text = std::fs::read_to_string(shipped).expect("configs/sealpod.toml");
        // Its keys are commented out: `#key = value`.
        let text: String = text
            .lines()
            .map(|l| match l.strip_prefix('#') {
                Some(key) if !key.starts_with(' ') => format!("{key}\n"),
                _ => format!("{l}\n"),
            })
            .collect();
        assert_eq!(with(&text, &[]), Ok(Config::default()));
        let keys = |t: Table| -> Vec<String> {
            let section = |(s, v): (String, Value)| {
                let keys: Vec<String> = v.as_table().expect("section").keys().cloned().collect();
                keys.into_iter().map(move |k| format!("{s}.{k}"))
            };
            t.into_iter().flat_map(section).collect()
        };
        let all = Table::try_from(Config::default()).expect("table");
        let documented: Table = toml::from_str(&text).expect("toml");
        let (mut all, mut documented) = (keys(all), keys(documented));
        all.sort();
        documented.sort();
        assert_eq!(documented, all);
    }

    #[test]
    fn unknown_key_is_named_with_its_file_and_the_allowed_ones() {
        let e = with("[sizing]\ndefault_cpus = 2\n", &[]).expect_err("unknown key");
        assert!(
            e.starts_with("Configuration sealpod.toml is not valid"),
            "{e}"
        );
        assert!(e.contains("line 2"), "{e}");
        assert!(
            e.contains("unknown field `default_cpus`, expected one of `default_vcpus`"),
            "{e}"
        );
        let e = with("", &["", "[hypervisr]\n"]).expect_err("unknown section");
        assert!(
            e.contains("sealpod.toml.d/20.toml") && e.contains("`hypervisor`"),
            "{e}"
        );
    }

    #[test]
    fn wrong_values_are_named_with_what_is_allowed() {
        for (text, key, allowed) in [
            (
                "[sizing]\ndefault_vcpus = 0",
                "sizing.default_vcpus",
                "1 to 255",
            ),
            (
                "[sizing]\nmax_vcpus = 1\ndefault_vcpus = 2",
                "sizing.default_vcpus",
                "which is 1",
            ),
            (
                "[runtime]\nstate_dir = \"run\"",
                "runtime.state_dir",
                "absolute path",
            ),
            (
                "[runtime]\nstate_dir = \"/run/../etc\"",
                "runtime.state_dir",
                "absolute path",
            ),
            (
                "[hypervisor]\nqemu = \"./qemu\"",
                "hypervisor.qemu",
                "search in PATH",
            ),
            (
                "[hypervisor]\nkernel_params = [\"init=/bin/sh\"]",
                "hypervisor.kernel_params",
                "`init=`",
            ),
            (
                "[hypervisor]\nkernel_params = [\"a b\"]",
                "hypervisor.kernel_params",
                "single words",
            ),
            (
                "[timeouts]\nboot_seconds = 0",
                "timeouts.boot_seconds",
                "1 to 3600",
            ),
        ] {
            let e = with(text, &[]).expect_err(text);
            assert!(e.contains(key) && e.contains(allowed), "{text}: {e}");
        }
        for (text, allowed) in [
            (
                "[hypervisor]\naccelerator = \"hvf\"",
                "`auto`, `kvm`, `tcg`",
            ),
            ("[hypervisor]\nuser = 0", "nonzero"),
            ("[runtime]\nlog_level = \"loud\"", "`trace`"),
            ("[annotations]\nallow = [\"privileged\"]", "`memory_mib`"),
            ("[runtime]\nstrict_cgroup = \"yes\"", "boolean"),
        ] {
            let e = with(text, &[]).expect_err(text);
            assert!(e.contains(allowed), "{text}: {e}");
        }
    }

    #[test]
    fn later_files_win_key_by_key() {
        let config = with(
            "[hypervisor]\naccelerator = \"kvm\"\nhotplug_ports = 3",
            &[
                "[hypervisor]\naccelerator = \"tcg\"",
                "[sizing]\ndefault_memory_mib = 300",
            ],
        )
        .expect("config");
        assert_eq!(config.hypervisor.accelerator, Accelerator::Tcg);
        assert_eq!(config.hypervisor.hotplug_ports, 3);
        assert_eq!(config.sizing.default_memory_mib, 300);
    }

    #[test]
    fn file_that_was_asked_for_must_be_there() {
        let e = load(Some(Path::new("/nonexistent/s.toml"))).expect_err("absent");
        assert_eq!(
            e.to_string(),
            "Configuration /nonexistent/s.toml cannot be read"
        );
        assert_eq!(
            load_from(Path::new("/nonexistent/s.toml"), false).ok(),
            Some(Config::default())
        );
    }
}
