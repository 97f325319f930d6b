//! From `spec.linux.cgroupsPath` to a path below a hierarchy's root. Text only, no I/O.

use std::path::{Component, Path, PathBuf};

use super::CgroupError;

/// Longest path, bytes.
const PATH_MAX: usize = 1024;
/// Longest name of a directory, bytes (`NAME_MAX`).
const NAME_MAX: usize = 255;
/// Slice of a systemd-style path that names none (systemd.slice(5)).
const DEFAULT_SLICE: &str = "system.slice";

/// The path of a pod's cgroup below a hierarchy's root. `cgroups_path` is the cgroupfs form
/// (`/a/b/c`), the systemd form (`a-b.slice:prefix:name`, giving `a.slice/a-b.slice/prefix-name.scope`)
/// or empty, giving `sealpod/<id>`.
///
/// # Errors
/// [`CgroupError::Path`] for anything else.
pub fn relative_path(cgroups_path: &str, id: &str) -> Result<PathBuf, CgroupError> {
    let refuse = |reason| CgroupError::Path {
        path: cgroups_path.chars().take(PATH_MAX).collect(),
        reason,
    };
    if cgroups_path.len() > PATH_MAX || cgroups_path.contains('\0') {
        return Err(refuse("it is too long or holds a NUL"));
    }
    let path = if cgroups_path.is_empty() {
        Path::new("sealpod").join(id)
    } else if cgroups_path.contains(':') {
        systemd(cgroups_path).map_err(refuse)?
    } else {
        PathBuf::from(cgroups_path.trim_start_matches('/'))
    };
    let plain = |c: Component<'_>| matches!(c, Component::Normal(n) if n.len() <= NAME_MAX);
    if !path.components().all(plain) || path.components().next().is_none() {
        return Err(refuse("it is not a path of plain names below the root"));
    }
    Ok(path)
}

fn systemd(text: &str) -> Result<PathBuf, &'static str> {
    let parts: Vec<&str> = text.split(':').collect();
    let [slice, prefix, name] = parts.as_slice() else {
        return Err("it has not three parts");
    };
    if [slice, prefix, name].iter().any(|p| p.contains('/')) || name.is_empty() {
        return Err("a part holds a slash or the name is empty");
    }
    let slice = if slice.is_empty() {
        DEFAULT_SLICE
    } else {
        slice
    };
    let unit = match (name.ends_with(".slice"), prefix.is_empty()) {
        (true, _) => (*name).to_owned(),
        (false, true) => format!("{name}.scope"),
        (false, false) => format!("{prefix}-{name}.scope"),
    };
    Ok(expand_slice(slice)?.join(unit))
}

/// `a-b-c.slice` lies in `a.slice/a-b.slice` (systemd.slice(5)); `-.slice` is the root.
fn expand_slice(slice: &str) -> Result<PathBuf, &'static str> {
    let Some(stem) = slice.strip_suffix(".slice") else {
        return Err("its first part does not end with .slice");
    };
    let mut path = PathBuf::new();
    if stem == "-" {
        return Ok(path);
    }
    let mut name = String::new();
    for part in stem.split('-') {
        if part.is_empty() {
            return Err("its slice has an empty part");
        }
        if !name.is_empty() {
            name.push('-');
        }
        name.push_str(part);
        path.push(format!("{name}.slice"));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_gives_the_path_that_its_author_means() {
        for (given, wanted) in [
            ("", "sealpod/c1"),
            ("/kubepods/burstable/pod1/c1", "kubepods/burstable/pod1/c1"),
            ("default/c1", "default/c1"),
            (
                "kubepods-burstable-pod1.slice:cri-containerd:c1",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-c1.scope",
            ),
            ("system.slice:docker:c1", "system.slice/docker-c1.scope"),
            (":docker:c1", "system.slice/docker-c1.scope"),
            ("-.slice:p:c1", "p-c1.scope"),
            ("a.slice::c1", "a.slice/c1.scope"),
            ("a.slice:p:a-b.slice", "a.slice/a-b.slice"),
        ] {
            assert_eq!(
                relative_path(given, "c1").unwrap(),
                Path::new(wanted),
                "{given}"
            );
        }
    }

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        for bad in [
            "/",
            "..",
            "/a/../../b",
            "a:b",
            "a:b:c:d",
            "notaslice:p:n",
            "a--b.slice:p:n",
            ".slice:p:n",
            "a.slice:../x:n",
            "a.slice:p:",
            "a.slice:p:../../n",
            "a\0b",
            &"x/".repeat(600),
            &"x".repeat(300),
        ] {
            assert!(relative_path(bad, "c1").is_err(), "{bad:?}");
        }
    }
}
