//! What is wrong is named, and nothing is changed by it.

use crate::on_every_containerd;

on_every_containerd!(
    a_missing_kernel_is_named,
    a_kernel_that_is_none_is_named,
    a_missing_initramfs_is_named,
    an_initramfs_that_is_none_shows_the_guests_last_words,
    a_guest_that_does_not_answer_is_described_in_the_log,
    an_unknown_key_is_named_with_the_known_ones,
    an_unknown_annotation_is_named_with_the_known_ones,
    an_annotation_that_is_not_allowed_is_named,
    memory_below_the_guests_need_is_refused_with_the_number,
    a_missing_program_is_named,
    a_folder_is_not_a_program,
    a_ten_megabyte_argument_list_is_refused,
    a_second_start_is_refused,
    a_signal_to_an_exited_task_finds_nothing,
    wrong_ids_are_refused,
    an_unknown_namespace_is_named,
    a_specification_without_a_process_or_a_root_is_named,
    a_missing_working_folder_is_made_or_named,
);

mod bodies {
    use std::{fs, path::PathBuf, time::Duration};

    use sealpod_tests::{Env, Settings, Version, assets, env::Done, need, only_sealpod, wait};

    /// Runs one container that has to be refused; the message, with nothing left behind.
    #[track_caller]
    fn refused(env: &Env, options: &[&str], command: &[&str]) -> String {
        let id = env.id("bad");
        let done: Done = env.ctr_run(options, &id, command);
        assert_ne!(done.code, 0, "{}", done.text());
        env.ctr_remove(&id);
        env.assert_clean();
        done.text()
    }

    #[track_caller]
    fn assert_names(message: &str, parts: &[&str]) {
        for part in parts {
            assert!(
                message.to_lowercase().contains(&part.to_lowercase()),
                "{part:?} is not in: {message}"
            );
        }
    }

    fn env_with(version: Version, change: impl FnOnce(&mut Settings)) -> Env {
        let mut settings = Settings::default();
        change(&mut settings);
        Env::with_settings(version, &settings).unwrap()
    }

    pub(super) fn a_missing_kernel_is_named(version: Version) {
        need!(assets::complete());
        only_sealpod!();
        let env = env_with(version, |s| s.kernel = PathBuf::from("/nowhere/vmlinux"));
        assert_names(
            &refused(&env, &[], &["true"]),
            &["/nowhere/vmlinux", "kernel"],
        );
    }

    pub(super) fn a_kernel_that_is_none_is_named(version: Version) {
        need!(assets::complete());
        only_sealpod!();
        let env = env_with(version, |s| s.kernel = PathBuf::from("/etc/passwd"));
        assert_names(&refused(&env, &[], &["true"]), &["/etc/passwd", "ELF"]);
    }

    pub(super) fn a_missing_initramfs_is_named(version: Version) {
        need!(assets::complete());
        only_sealpod!();
        let env = env_with(version, |s| {
            s.initramfs = PathBuf::from("/nowhere/initramfs")
        });
        assert_names(
            &refused(&env, &[], &["true"]),
            &["/nowhere/initramfs", "initramfs"],
        );
    }

    pub(super) fn an_initramfs_that_is_none_shows_the_guests_last_words(version: Version) {
        need!(assets::complete());
        only_sealpod!();
        let env = env_with(version, |s| {
            s.initramfs = PathBuf::from("/etc/passwd");
            s.boot_seconds = 10 * wait::patience();
        });
        // Refused by a look at the file, or by the kernel that finds no init in it.
        let message = refused(&env, &[], &["true"]).to_lowercase();
        assert!(
            message.contains("/etc/passwd") || message.contains("panic"),
            "{message}"
        );
    }

    pub(super) fn a_guest_that_does_not_answer_is_described_in_the_log(version: Version) {
        need!(assets::complete());
        only_sealpod!();
        // An archive of nothing but its end, whose kernel finds no init and then does not restart.
        let folder = tempfile::tempdir().unwrap();
        let empty = folder.path().join("empty.cpio");
        let fields = [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 11, 0];
        let fields = fields.map(|field| format!("{field:08x}")).concat();
        fs::write(&empty, format!("070701{fields}TRAILER!!!\0\0\0\0")).unwrap();
        let env = env_with(version, |s| {
            s.initramfs = empty;
            s.more = "kernel_params = [\"panic=0\"]\n".into();
            s.boot_seconds = 5 * wait::patience();
        });
        let message = refused(&env, &[], &["true"]);
        assert_names(&message, &["did not answer within", "panic"]);
        // What each VMM says of its first processor.
        let log = env.containerd.log_tail(1000);
        let told = log
            .lines()
            .filter(|l| l.contains("The guest does not answer. "));
        let told: Vec<_> = told.collect();
        assert!(!told.is_empty() && told.len() <= 64, "{log}");
        let first = |line: &&str| line.contains("Processor 0: ") || line.contains("CPU#0");
        assert!(told.iter().any(first), "{told:#?}");
    }

    pub(super) fn an_unknown_key_is_named_with_the_known_ones(version: Version) {
        need!(assets::complete());
        only_sealpod!();
        let env = env_with(version, |s| s.more = "colour = \"blue\"\n".into());
        assert_names(
            &refused(&env, &[], &["true"]),
            &["sealpod.toml", "colour", "accelerator"],
        );
    }

    pub(super) fn an_unknown_annotation_is_named_with_the_known_ones(version: Version) {
        need!(assets::complete());
        only_sealpod!();
        let env = Env::new(version).unwrap();
        let options = ["--annotation", "io.sealpod.colour=blue"];
        assert_names(
            &refused(&env, &options, &["true"]),
            &["io.sealpod.colour", "vcpus"],
        );
    }

    pub(super) fn an_annotation_that_is_not_allowed_is_named(version: Version) {
        need!(assets::complete());
        only_sealpod!();
        let env = Env::new(version).unwrap();
        let options = ["--annotation", "io.sealpod.kernel_params=quiet"];
        assert_names(
            &refused(&env, &options, &["true"]),
            &["io.sealpod.kernel_params", "allow"],
        );
    }

    pub(super) fn memory_below_the_guests_need_is_refused_with_the_number(version: Version) {
        need!(assets::complete());
        only_sealpod!();
        let env = Env::new(version).unwrap();
        let options = ["--annotation", "io.sealpod.memory_mib=1"];
        assert_names(&refused(&env, &options, &["true"]), &["memory", "MiB"]);
    }

    pub(super) fn a_missing_program_is_named(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        assert_names(
            &refused(&env, &[], &["no-such-program"]),
            &["\"no-such-program\"", "executable file not found in $PATH"],
        );
        assert_names(
            &refused(&env, &[], &["/no/such/program"]),
            &["/no/such/program", "no such file or directory"],
        );
        let id = env.id("good");
        env.ctr_start(&[], &id, &["sleep", "1000"]);
        let done = env.ctr_exec(&id, "e", &["no-such-program"]);
        assert_ne!(done.code, 0);
        assert_names(
            &done.text(),
            &["\"no-such-program\"", "executable file not found in $PATH"],
        );
        assert_eq!(env.ctr_status(&id).as_deref(), Some("RUNNING"));
        env.ctr_remove(&id);
        env.assert_clean();
    }

    pub(super) fn a_folder_is_not_a_program(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let message = refused(&env, &[], &["/etc/passwd"]);
        assert_names(&message, &["/etc/passwd", "permission denied"]);
        let message = refused(&env, &[], &["/etc"]);
        assert_names(&message, &["/etc"]);
    }

    pub(super) fn a_ten_megabyte_argument_list_is_refused(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let done = env.ctr_run_spec(|spec| {
            spec["process"]["args"] = serde_json::json!(["/bin/echo", "x".repeat(10 << 20)]);
        });
        assert_ne!(done.code, 0, "{}", done.text());
        env.assert_clean();
    }

    pub(super) fn a_second_start_is_refused(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let id = env.id("a");
        env.ctr_start(&[], &id, &["sleep", "1000"]);
        let done = env.ctr(&["task", "start", &id]);
        assert_ne!(done.code, 0);
        assert_eq!(env.ctr_status(&id).as_deref(), Some("RUNNING"));
        let again = env.run_args(&["--detach"], &id, &["true"]);
        let again: Vec<&str> = again.iter().map(String::as_str).collect();
        let done = env.run("ctr", &again);
        assert_names(&done.text(), &["already exists"]);
        env.ctr_remove(&id);
        env.assert_clean();
    }

    pub(super) fn a_signal_to_an_exited_task_finds_nothing(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let id = env.id("a");
        env.ctr_start(&[], &id, &["true"]);
        wait::until("stopped", Duration::from_secs(20), || {
            (env.ctr_status(&id).as_deref() == Some("STOPPED")).then_some(())
        });
        let done = env.ctr(&["task", "kill", &id]);
        assert_ne!(done.code, 0);
        assert_names(&done.text(), &["process already finished"]);
        let done = env.ctr_exec(&id, "e", &["true"]);
        assert_ne!(done.code, 0);
        env.ctr_remove(&id);
        env.assert_clean();
    }

    pub(super) fn wrong_ids_are_refused(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let id = env.id("a");
        env.ctr_start(&[], &id, &["sleep", "1000"]);
        for args in [
            vec!["task", "kill", "no-such-task"],
            vec!["task", "kill", "--exec-id", "no-such-exec", &id],
            vec!["task", "pause", "no-such-task"],
            vec!["task", "metrics", "no-such-task"],
            vec!["task", "delete", "--exec-id", "no-such-exec", &id],
        ] {
            let done = env.ctr(&args);
            assert_ne!(done.code, 0, "{args:?}");
            assert_names(&done.text(), &["not found"]);
        }
        assert_eq!(env.ctr_status(&id).as_deref(), Some("RUNNING"));
        env.ctr_remove(&id);
        env.assert_clean();
    }

    pub(super) fn an_unknown_namespace_is_named(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let done = env.ctr_run_spec(|spec| {
            let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.push(serde_json::json!({ "type": "flavour" }));
        });
        assert_ne!(done.code, 0);
        assert_names(&done.text(), &["flavour"]);
        env.assert_clean();
    }

    pub(super) fn a_specification_without_a_process_or_a_root_is_named(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let done = env.ctr_run_spec(|spec| {
            spec.as_object_mut().unwrap().remove("process");
        });
        assert_ne!(done.code, 0);
        assert_names(&done.text(), &["process"]);
        let done = env.ctr_run_spec(|spec| spec["root"]["path"] = "/nowhere/rootfs".into());
        assert_ne!(done.code, 0);
        assert_names(&done.text(), &["/nowhere/rootfs"]);
        env.assert_clean();
    }

    pub(super) fn a_missing_working_folder_is_made_or_named(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        // runc makes it; a runtime may also refuse with the name.
        let done = env.ctr_run(&["--cwd", "/not/there"], &env.id("a"), &["pwd"]);
        assert!(
            done.stdout == "/not/there\n" || done.text().contains("/not/there"),
            "{}",
            done.text()
        );
        env.assert_clean();
    }
}
