//! Mount options as text, in the form of fstab and of containerd. Pure.
//!
//! Source: mount(8), mount(2).

use nix::mount::MsFlags;

/// fstab-style options as (flags, propagation flags, data).
pub(super) fn parse_options(options: &[String]) -> (MsFlags, MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut propagation = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        let (set, flag) = match option.as_str() {
            "defaults" | "rw" => (false, MsFlags::MS_RDONLY),
            "ro" => (true, MsFlags::MS_RDONLY),
            "bind" => (true, MsFlags::MS_BIND),
            "rbind" => (true, MsFlags::MS_BIND | MsFlags::MS_REC),
            "nosuid" => (true, MsFlags::MS_NOSUID),
            "suid" => (false, MsFlags::MS_NOSUID),
            "nodev" => (true, MsFlags::MS_NODEV),
            "dev" => (false, MsFlags::MS_NODEV),
            "noexec" => (true, MsFlags::MS_NOEXEC),
            "exec" => (false, MsFlags::MS_NOEXEC),
            "sync" => (true, MsFlags::MS_SYNCHRONOUS),
            "async" => (false, MsFlags::MS_SYNCHRONOUS),
            "noatime" => (true, MsFlags::MS_NOATIME),
            "atime" => (false, MsFlags::MS_NOATIME),
            "nodiratime" => (true, MsFlags::MS_NODIRATIME),
            "relatime" => (true, MsFlags::MS_RELATIME),
            "norelatime" => (false, MsFlags::MS_RELATIME),
            "strictatime" => (true, MsFlags::MS_STRICTATIME),
            "remount" => (true, MsFlags::MS_REMOUNT),
            "private" | "rprivate" | "slave" | "rslave" | "shared" | "rshared" => {
                propagation = propagation_flag(option);
                continue;
            }
            other => {
                data.push(other);
                continue;
            }
        };
        flags.set(flag, set);
    }
    (flags, propagation, data.join(","))
}

fn propagation_flag(option: &str) -> MsFlags {
    let (name, recurse) = match option.strip_prefix('r') {
        Some(name) => (name, MsFlags::MS_REC),
        None => (option, MsFlags::empty()),
    };
    recurse
        | match name {
            "private" => MsFlags::MS_PRIVATE,
            "slave" => MsFlags::MS_SLAVE,
            _ => MsFlags::MS_SHARED,
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(options: &[&str]) -> Vec<String> {
        options.iter().map(|o| (*o).into()).collect()
    }

    #[test]
    fn options_become_flags_and_data() {
        let (flags, propagation, data) = parse_options(&strings(&[
            "ro",
            "nosuid",
            "rslave",
            "lowerdir=/a:/b",
            "index=off",
        ]));
        assert_eq!(flags, MsFlags::MS_RDONLY | MsFlags::MS_NOSUID);
        assert_eq!(propagation, MsFlags::MS_REC | MsFlags::MS_SLAVE);
        assert_eq!(data, "lowerdir=/a:/b,index=off");
    }
}
