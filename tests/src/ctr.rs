//! containerd driven by its own command-line client, `ctr`.

use std::process::Child;

use crate::{Env, assets, env::Done, image::BUSYBOX};

/// containerd namespace of the `ctr` tests.
pub const NAMESPACE: &str = "default";

impl Env {
    /// `ctr` in a containerd namespace.
    ///
    /// # Panics
    /// Where it cannot be started.
    pub fn ctr_in(&self, namespace: &str, args: &[&str]) -> Done {
        let mut all = vec!["-n", namespace];
        all.extend(args);
        self.run("ctr", &all)
    }

    /// `ctr`.
    ///
    /// # Panics
    /// Where it cannot be started.
    pub fn ctr(&self, args: &[&str]) -> Done {
        self.ctr_in(NAMESPACE, args)
    }

    /// Arguments of `ctr run` for the runtime under test: options, then id, then the command.
    #[must_use]
    pub fn run_args(&self, options: &[&str], id: &str, command: &[&str]) -> Vec<String> {
        self.image_run_args(&assets::runtime(), BUSYBOX, options, id, command)
    }

    /// The same for any runtime and image.
    #[must_use]
    pub fn image_run_args(
        &self,
        runtime: &str,
        image: &str,
        options: &[&str],
        id: &str,
        command: &[&str],
    ) -> Vec<String> {
        let mut args = vec!["-n", NAMESPACE, "run", "--runtime", runtime];
        args.extend(options);
        args.extend([image, id]);
        args.extend(command);
        args.into_iter().map(str::to_owned).collect()
    }

    /// `ctr run --rm` to its end.
    ///
    /// # Panics
    /// Where `ctr` cannot be started.
    pub fn ctr_run(&self, options: &[&str], id: &str, command: &[&str]) -> Done {
        let mut all = vec!["--rm"];
        all.extend(options);
        let args = self.run_args(&all, id, command);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        self.run("ctr", &args)
    }

    /// `ctr run --detach`.
    ///
    /// # Panics
    /// Where the container does not start.
    #[track_caller]
    pub fn ctr_start(&self, options: &[&str], id: &str, command: &[&str]) {
        let mut all = vec!["--detach"];
        all.extend(options);
        let args = self.run_args(&all, id, command);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let _ = self.run("ctr", &args).ok();
    }

    /// `ctr run --rm` with its standard streams piped, not waited for.
    ///
    /// # Panics
    /// Where `ctr` cannot be started.
    pub fn ctr_spawn(&self, options: &[&str], id: &str, command: &[&str]) -> Child {
        let mut all = vec!["--rm"];
        all.extend(options);
        let args = self.run_args(&all, id, command);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        self.spawn("ctr", &args)
    }

    /// `ctr task exec`.
    ///
    /// # Panics
    /// Where `ctr` cannot be started.
    pub fn ctr_exec(&self, id: &str, exec_id: &str, command: &[&str]) -> Done {
        let mut args = vec!["task", "exec", "--exec-id", exec_id, id];
        args.extend(command);
        self.ctr(&args)
    }

    /// Runs a container whose specification is a file, made of what `ctr` itself would ask for after
    /// `change`; its root is a plain folder with busybox.
    ///
    /// # Panics
    /// Where the specification cannot be had.
    pub fn ctr_run_spec(&self, change: impl FnOnce(&mut serde_json::Value)) -> Done {
        let id = self.id("spec");
        let args = self.spec_args("--rm", &id, change);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let done = self.ctr(&args);
        self.ctr_remove(&id);
        done
    }

    /// Arguments of `ctr` that run the container `id` by a specification as in [`Self::ctr_run_spec`].
    ///
    /// # Panics
    /// Where the specification cannot be had.
    pub fn spec_args(
        &self,
        option: &str,
        id: &str,
        change: impl FnOnce(&mut serde_json::Value),
    ) -> Vec<String> {
        let (plain, runtime) = (self.id("plain"), assets::runtime());
        let create = ["container", "create", "--runtime", &runtime, BUSYBOX];
        let _ = self.ctr(&[&create[..], &[&plain, "true"]].concat()).ok();
        let info = self.ctr(&["container", "info", &plain]).ok().stdout;
        let info: serde_json::Value = serde_json::from_str(&info).expect("JSON of ctr");
        let _ = self.ctr(&["container", "delete", &plain]).ok();
        let mut spec = info["Spec"].clone();
        let root = self.spec_root();
        if !root.exists() {
            crate::image::busybox_folder(&root).expect("root");
        }
        spec["root"] = serde_json::json!({ "path": root });
        spec["linux"]["cgroupsPath"] = format!("/{NAMESPACE}/{id}").into();
        change(&mut spec);
        let file = self.folder().join(format!("{id}.json"));
        std::fs::write(&file, spec.to_string()).expect("specification");
        let file = file.to_string_lossy();
        let args = ["run", option, "--runtime", &runtime, "--config", &file, id];
        args.map(String::from).to_vec()
    }

    /// The root of all containers that run by a specification.
    #[must_use]
    pub fn spec_root(&self) -> std::path::PathBuf {
        self.folder().join("rootfs")
    }

    /// A container's status by `ctr task ls`, or `None`.
    #[must_use]
    pub fn ctr_status(&self, id: &str) -> Option<String> {
        let list = self.ctr(&["task", "ls"]).stdout;
        let line = list
            .lines()
            .find(|l| l.split_whitespace().next() == Some(id))?;
        line.split_whitespace().nth(2).map(str::to_owned)
    }

    /// PID of a task as containerd knows it.
    #[must_use]
    pub fn ctr_pid(&self, namespace: &str, id: &str) -> Option<u32> {
        let list = self.ctr_in(namespace, &["task", "ls"]).stdout;
        let line = list
            .lines()
            .find(|l| l.split_whitespace().next() == Some(id))?;
        line.split_whitespace().nth(1)?.parse().ok()
    }

    /// Kills and removes a container; fails quietly where nothing is there.
    pub fn ctr_remove(&self, id: &str) {
        let _ = self.ctr(&["task", "kill", "-s", "KILL", id]);
        let _ = self.ctr(&["task", "delete", "-f", id]);
        let _ = self.ctr(&["container", "delete", id]);
    }
}
