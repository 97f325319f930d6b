//! The program to execute: found as the process's user inside the container, with the error texts that
//! clients recognise (those of runc, which are Go's). Runs in the child.

use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::{AccessFlags, chdir, execve, faccessat};

use super::{LaunchError, Step, describe};
use crate::container::plan::ProcessPlan;
use crate::sys;

/// Most that is read of a container's /etc/passwd, bytes.
const PASSWD_MAX: u64 = 1 << 20;

/// Makes the working directory of a container's init where it does not exist. Best effort: entering it
/// says what is wrong.
pub(super) fn make_working_directory(path: &Path) {
    let _ = std::fs::create_dir_all(path);
}

/// Enters the working directory. With `privileged` a missing permission is not an error yet, but
/// `Ok(false)`: the process's user may have it.
pub(super) fn enter_working_directory(
    plan: &ProcessPlan,
    privileged: bool,
) -> Result<bool, LaunchError> {
    match chdir(plan.cwd.as_path()) {
        Ok(()) => Ok(true),
        Err(Errno::EPERM | Errno::EACCES) if privileged => Ok(false),
        Err(errno) => Err(LaunchError::text(format!(
            "chdir to cwd ({:?}) set in config.json failed: {}",
            plan.cwd,
            describe(errno)
        ))),
    }
}

/// A program that is there and may be executed.
pub(super) struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    /// Finds the process's program.
    pub(super) fn find(plan: &ProcessPlan) -> Result<Self, LaunchError> {
        let name = plan.args.first().map_or(c"", CString::as_c_str);
        let path = look_up(name, variable(&plan.env, b"PATH"))?;
        let mut env = plan.env.clone();
        if variable(&env, b"HOME").is_none_or(|home| home.is_empty()) {
            env.retain(|e| !e.to_bytes().starts_with(b"HOME="));
            env.extend(CString::new(format!("HOME={}", home(plan.uid))));
        }
        Ok(Self {
            path,
            args: plan.args.clone(),
            env,
        })
    }

    /// Becomes it.
    pub(super) fn execute(self) -> Result<Infallible, LaunchError> {
        sys::cloexec_all().step(|| "mark descriptors close-on-exec".into())?;
        execve(&self.path, &self.args, &self.env).map_err(|errno| {
            LaunchError::text(format!("exec {}: {}", text(&self.path), describe(errno)))
        })
    }
}

fn text(name: &CStr) -> std::borrow::Cow<'_, str> {
    name.to_string_lossy()
}

fn variable<'a>(env: &'a [CString], name: &[u8]) -> Option<&'a [u8]> {
    env.iter().find_map(|entry| {
        entry
            .to_bytes()
            .strip_prefix(name)
            .and_then(|rest| rest.strip_prefix(b"="))
    })
}

fn look_up(name: &CStr, path: Option<&[u8]>) -> Result<CString, LaunchError> {
    let failed = |why: String| LaunchError::text(format!("exec: {:?}: {why}", text(name)));
    if name.to_bytes().contains(&b'/') {
        return match executable(name) {
            Ok(()) => Ok(name.to_owned()),
            Err((true, errno)) => Err(failed(format!("stat {}: {}", text(name), describe(errno)))),
            Err((false, errno)) => Err(failed(describe(errno))),
        };
    }
    for folder in path.unwrap_or_default().split(|b| *b == b':') {
        let folder = if folder.is_empty() { b"." } else { folder };
        let candidate = [folder, b"/", name.to_bytes()].concat();
        let Ok(candidate) = CString::new(candidate) else {
            continue;
        };
        if executable(&candidate).is_ok() {
            return Ok(candidate);
        }
    }
    Err(failed("executable file not found in $PATH".into()))
}

/// Whether this process may execute the file; else the error, and whether it was stat's.
fn executable(path: &CStr) -> Result<(), (bool, Errno)> {
    let stat = nix::sys::stat::stat(path).map_err(|errno| (true, errno))?;
    if stat.st_mode & libc::S_IFMT == libc::S_IFDIR {
        return Err((false, Errno::EISDIR));
    }
    let effective = nix::fcntl::AtFlags::AT_EACCESS;
    faccessat(nix::fcntl::AT_FDCWD, path, AccessFlags::X_OK, effective)
        .map_err(|errno| (false, errno))
}

/// Home of a user by the container's /etc/passwd; `/` when it has none.
fn home(uid: u32) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut content = Vec::new();
        let file = std::fs::File::open("/etc/passwd")?;
        file.take(PASSWD_MAX).read_to_end(&mut content)?;
        Ok(content)
    };
    let passwd = read().unwrap_or_default();
    home_in(&passwd, uid).unwrap_or_else(|| "/".into())
}

fn home_in(passwd: &[u8], uid: u32) -> Option<String> {
    let uid = uid.to_string();
    passwd.split(|b| *b == b'\n').find_map(|line| {
        let mut fields = line.split(|b| *b == b':').skip(2);
        let found = fields.next()? == uid.as_bytes();
        let home = fields.nth(2)?;
        let home = PathBuf::from(std::ffi::OsStr::from_bytes(home));
        (found && !home.as_os_str().is_empty()).then(|| home.display().to_string())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(name: &CStr, path: &[u8]) -> String {
        look_up(name, Some(path))
            .expect_err("not found")
            .to_string()
    }

    #[test]
    fn lookup_errors_are_the_texts_that_clients_recognise() {
        assert_eq!(
            error(c"no-such-program", b"/usr/bin:/bin"),
            "exec: \"no-such-program\": executable file not found in $PATH"
        );
        assert_eq!(
            error(c"/no/such", b""),
            "exec: \"/no/such\": stat /no/such: no such file or directory"
        );
        assert_eq!(
            error(c"/etc/passwd", b""),
            "exec: \"/etc/passwd\": permission denied"
        );
        assert_eq!(error(c"/etc", b""), "exec: \"/etc\": is a directory");
    }

    #[test]
    fn programs_are_found_in_the_order_of_path() {
        let found = look_up(c"sh", Some(b"/nowhere:/bin:/usr/bin")).expect("sh exists");
        assert_eq!(found.as_c_str(), c"/bin/sh");
    }

    #[test]
    fn home_comes_from_the_containers_passwd_file() {
        let passwd = b"root:x:0:0:root:/root:/bin/sh\nweb:x:33:33::/var/www:\nbad\nx:x:7:7::";
        assert_eq!(home_in(passwd, 33).as_deref(), Some("/var/www"));
        assert_eq!(home_in(passwd, 0).as_deref(), Some("/root"));
        assert_eq!(home_in(passwd, 7), None);
        assert_eq!(home_in(&[0xff; 64], 0), None);
    }
}
