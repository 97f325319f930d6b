//! Each test that mounts has a mount namespace of its own.

use super::{bind::bind, *};

#[test]
fn mountinfo_paths_are_unescaped() {
    assert_eq!(unescape("/a\\040b\\134c"), PathBuf::from("/a b\\c"));
    assert_eq!(unescape("/a\\x"), PathBuf::from("/a\\x"));
}

/// Runs in a thread with a mount namespace of its own.
fn isolated(test: impl FnOnce() + Send + 'static) {
    let run = move || {
        if let Err(e) = unshare(CloneFlags::CLONE_FS)
            .map_err(io::Error::from)
            .and_then(|()| private_namespace())
        {
            eprintln!("SKIPPED: mounts need root: {e}");
            return;
        }
        test();
    };
    thread::spawn(run).join().expect("test thread");
}

#[test]
fn an_overlay_of_a_hundred_long_layers_is_mounted_and_detached() {
    isolated(|| {
        let dir = tempfile::tempdir().expect("tempdir");
        // overlayfs needs an upper directory that is not an overlay itself.
        mount(
            Some("t"),
            dir.path(),
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .expect("tmpfs");
        let base = dir
            .path()
            .join("snapshots-of-a-folder-with-a-long-name-to-fill-the-page");
        let lower: Vec<String> = (0..100)
            .map(|i| {
                let d = base.join(format!("{i}/fs"));
                fs::create_dir_all(&d).expect("layer");
                fs::write(d.join(format!("f{i}")), "x").expect("file");
                d.to_string_lossy().into_owned()
            })
            .collect();
        let target = dir.path().join("root");
        let layer = RootMount {
            fstype: "overlay".into(),
            source: "overlay".into(),
            options: vec![format!("lowerdir={}", lower.join(":"))],
            ..Default::default()
        };
        assert!(layer.options[0].len() > OPTIONS_MAX);
        let stage = dir.path().join("stage");
        root(&[layer], Path::new("/none"), &target, &stage).expect("root");
        assert!(target.join("f0").exists() && target.join("f99").exists());
        detach(&target).expect("detach");
        assert!(!target.join("f0").exists());
    });
}

#[test]
fn a_read_only_volume_of_one_file_cannot_be_written() {
    isolated(|| {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join("f");
        fs::write(&file, "x").expect("file");
        let v = HostMount {
            name: "0".into(),
            source: HostSource::Bind {
                path: file,
                is_dir: false,
                recursive: true,
                private: true,
            },
            readonly: ReadOnly::Top,
        };
        let at = dir.path().join("mounts");
        volume(&v, &at, &dir.path().join("stages")).expect("volume");
        let e = fs::write(at.join("0"), "y").expect_err("read-only");
        assert_eq!(e.raw_os_error(), Some(nix::libc::EROFS));
        detach(dir.path()).expect("detach");
    });
}

/// What a file server sees of a volume, by the propagation that its container wants.
#[test]
fn a_private_volume_stays_as_it_was_and_another_shows_later_mounts() {
    isolated(|| {
        let dir = tempfile::tempdir().expect("tempdir");
        let at = |name: &str| dir.path().join(name);
        let tmpfs = |on: &Path| {
            create_dir(on).expect("folder");
            raw("tmpfs", "t", on, MsFlags::empty(), "").expect("tmpfs");
        };
        let propagation = |on: &Path, flag| raw("propagation", "", on, flag, "").expect("set");
        // The host's folder, of which this namespace is a slave, and the share.
        tmpfs(&at("host"));
        propagation(&at("host"), MsFlags::MS_SHARED);
        tmpfs(&at("share"));
        propagation(&at("share"), MsFlags::MS_SHARED);
        create_dir(&at("host/later")).expect("folder");
        create_dir(&at("server")).expect("folder");
        bind(&at("share"), &at("server"), true).expect("server");
        for (name, private) in [("private", true), ("open", false)] {
            let v = HostMount {
                name: name.into(),
                source: HostSource::Bind {
                    path: at("host"),
                    is_dir: true,
                    recursive: true,
                    private,
                },
                readonly: ReadOnly::No,
            };
            volume(&v, &at("share/volumes"), &at("stages")).expect("volume");
        }
        tmpfs(&at("host/later"));
        fs::write(at("host/later/f"), "x").expect("file");
        assert!(at("server/volumes/open/later/f").exists());
        assert!(at("server/volumes/private/later").exists());
        assert!(!at("server/volumes/private/later/f").exists());
        detach(dir.path()).expect("detach");
    });
}

#[test]
fn read_only_holds_for_the_file_server_and_below_where_it_is_recursive() {
    isolated(|| {
        let dir = tempfile::tempdir().expect("tempdir");
        let below = dir.path().join("host/below");
        create_dir(&below).expect("folder");
        raw("tmpfs", "t", &below, MsFlags::empty(), "").expect("tmpfs");
        let (share, server) = (dir.path().join("share"), dir.path().join("server"));
        create_dir(&share).expect("folder");
        raw("tmpfs", "t", &share, MsFlags::empty(), "").expect("tmpfs");
        raw("propagation", "", &share, MsFlags::MS_SHARED, "").expect("shared");
        create_dir(&server).expect("folder");
        bind(&share, &server, true).expect("server");
        for (name, readonly, writable) in [
            ("top", ReadOnly::Top, true),
            ("all", ReadOnly::Recursive, false),
        ] {
            let v = HostMount {
                name: name.into(),
                source: HostSource::Bind {
                    path: dir.path().join("host"),
                    is_dir: true,
                    recursive: true,
                    private: true,
                },
                readonly,
            };
            let stages = dir.path().join("stages");
            volume(&v, &share.join("volumes"), &stages).expect("volume");
            let seen = server.join("volumes").join(name);
            assert!(fs::write(seen.join("f"), "").is_err(), "{name}");
            assert_eq!(
                fs::write(seen.join("below/f"), "").is_ok(),
                writable,
                "{name}"
            );
        }
        detach(dir.path()).expect("detach");
    });
}
