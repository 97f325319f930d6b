//! Small facts about this machine that are costly to find and hold until the next boot, each a file
//! in the state folder. A file is believed only if this user alone can have written it.

use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Most that is read of a file, bytes.
const SIZE_MAX: u64 = 4096;

#[derive(Serialize, Deserialize)]
struct File<T> {
    boot_id: String,
    kernel: String,
    fact: T,
}

/// The fact in file `path`, if it was found in this boot by this kernel's machine; else what `find`
/// finds, which is then written there.
pub(super) fn remembered<T: Serialize + DeserializeOwned>(
    path: &Path,
    find: impl FnOnce() -> T,
) -> T {
    let (boot_id, kernel) = (boot_id(), kernel_release());
    if let Some(file) = read::<T>(path)
        && file.boot_id == boot_id
        && file.kernel == kernel
        && !boot_id.is_empty()
    {
        return file.fact;
    }
    let file = File {
        boot_id,
        kernel,
        fact: find(),
    };
    // Next time it is found again; nothing else depends on the file.
    if let Err(e) = write(path, &file) {
        tracing::debug!("{} cannot be written: {e}", path.display());
    }
    file.fact
}

/// Which boot of this machine it is; empty where that cannot be told.
pub(super) fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.unwrap_or_default().trim().into()
}

/// Which kernel runs it.
pub(super) fn kernel_release() -> String {
    let name = rustix::system::uname();
    format!(
        "{} {}",
        name.release().to_string_lossy(),
        name.version().to_string_lossy()
    )
}

fn read<T: DeserializeOwned>(path: &Path) -> Option<File<T>> {
    let meta = std::fs::symlink_metadata(path).ok()?;
    let ours = meta.uid() == rustix::process::geteuid().as_raw() && meta.mode() & 0o022 == 0;
    if !meta.is_file() || !ours || meta.len() > SIZE_MAX {
        return None;
    }
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

fn write<T: Serialize>(path: &Path, content: &File<T>) -> io::Result<()> {
    let part = path.with_extension(format!("{}.part", std::process::id()));
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&part)?;
    let written = serde_json::to_writer(&mut file, content)
        .map_err(io::Error::from)
        .and_then(|()| file.flush())
        .and_then(|()| std::fs::rename(&part, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&part);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_fact_is_found_once_a_boot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fact.json");
        assert_eq!(remembered(&path, || 7), 7);
        assert_eq!(remembered(&path, || 8), 7);
        let mut file = read::<i32>(&path).unwrap();
        file.boot_id = "another boot".into();
        write(&path, &file).unwrap();
        assert_eq!(remembered(&path, || 9), 9);
    }

    #[test]
    fn a_file_that_is_no_fact_or_that_others_can_write_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fact.json");
        remembered(&path, || 7);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        assert!(read::<i32>(&path).is_none());
        std::fs::remove_file(&path).unwrap();
        for bad in [&b"{}"[..], b"7", b"\xff", &[b' '; 5000]] {
            std::fs::write(&path, bad).unwrap();
            assert_eq!(remembered(&path, || 9), 9);
            std::fs::remove_file(&path).unwrap();
        }
        assert_eq!(remembered(Path::new("/nonexistent/fact.json"), || 9), 9);
    }
}
