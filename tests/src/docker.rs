//! A private dockerd on top of an environment's containerd.

use std::{process::Child, time::Duration};

use anyhow::Result;

use crate::{Env, assets, env::Done, image, wait};

/// See the module; ends when dropped.
#[derive(Debug)]
pub struct Docker<'a> {
    env: &'a Env,
    daemon: Child,
}

impl<'a> Docker<'a> {
    /// Starts it and loads the busybox image.
    ///
    /// # Errors
    /// Where it cannot be started.
    ///
    /// # Panics
    /// When it does not answer.
    pub fn start(env: &'a Env) -> Result<Self> {
        let folder = env.folder().join("docker");
        std::fs::create_dir_all(&folder)?;
        let daemon_json = folder.join("daemon.json");
        std::fs::write(&daemon_json, "{}")?;
        let log = std::fs::File::create(folder.join("log"))?;
        let mut command = env.command("dockerd");
        command
            .arg("--config-file")
            .arg(&daemon_json)
            .arg("--data-root")
            .arg(folder.join("root"))
            .arg("--exec-root")
            .arg(folder.join("exec"))
            .arg("--pidfile")
            .arg(folder.join("pid"))
            .arg("--host")
            .arg(Self::address(env))
            .arg("--containerd")
            .arg(env.containerd.address())
            .args(["--iptables=false", "--ip6tables=false", "--bridge=none"])
            .stdin(std::process::Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let daemon = env.namespaces.enter(|| command.spawn())?;
        let docker = Self { env, daemon };
        wait::until("dockerd up", Duration::from_secs(60), || {
            (docker.docker(&["version"]).code == 0).then_some(())
        });
        let archive = image::busybox()?;
        let _ = docker
            .docker(&["load", "--input", &archive.to_string_lossy()])
            .ok();
        Ok(docker)
    }

    fn address(env: &Env) -> String {
        format!("unix://{}", env.folder().join("docker/d.sock").display())
    }

    /// The `docker` client.
    ///
    /// # Panics
    /// Where it cannot be started.
    pub fn docker(&self, args: &[&str]) -> Done {
        let host = Self::address(self.env);
        let mut all = vec!["--host", &host];
        all.extend(args);
        self.env.run("docker", &all)
    }

    /// `docker run --rm` with the runtime under test.
    ///
    /// # Panics
    /// As [`Self::docker`].
    pub fn run(&self, options: &[&str], command: &[&str]) -> Done {
        let runtime = format!("--runtime={}", assets::runtime());
        let mut all = vec!["run", &runtime, "--network=none"];
        all.extend(options);
        all.push(image::BUSYBOX);
        all.extend(command);
        self.docker(&all)
    }
}

impl Drop for Docker<'_> {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}
