//! A node that attests its pods with a simulator: authority, collateral, reference values and the lines of
//! its configuration. Made with the programs under test, below an environment's folder.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};

use crate::{Env, Settings, Version};

/// CDI name of the stand-in device; its node in a container is `/dev/gpu0`.
pub const DEVICE: &str = "sealpod.io/stand-in=gpu0";
/// First bytes of the stand-in's content.
pub const CONTENT: &str = "known content of the stand-in\n";
/// Bytes of the stand-in.
const SIZE: usize = 1 << 20;
/// SNP firmware of the simulated machine.
const MINIMUM_SNP: &str = "8";

/// What differs between nodes.
#[derive(Debug, Clone)]
pub struct Node {
    /// What is simulated: `snp` or `tdx`.
    pub tee: String,
    /// A defect of all simulated evidence, or empty.
    pub defect: String,
    /// Renewal is after half of it, seconds.
    pub lease_seconds: u32,
    /// `kill` or `freeze`.
    pub on_loss: String,
    /// More lines of `[attestation]`.
    pub more: String,
    /// Whether the simulator's anchors are named.
    pub anchors: bool,
    /// Another guest than pods have.
    pub initramfs: Option<PathBuf>,
}

impl Default for Node {
    fn default() -> Self {
        Self {
            tee: "snp".into(),
            defect: String::new(),
            lease_seconds: 300,
            on_loss: "kill".into(),
            more: String::new(),
            anchors: true,
            initramfs: None,
        }
    }
}

impl Env {
    /// An environment whose node has a simulator, the stand-in and a policy with reference values.
    ///
    /// # Errors
    /// As [`Env::new`], or where a program under test fails.
    pub fn attesting(version: Version) -> Result<Self> {
        let env = Self::new(version)?;
        let mut content = vec![b'.'; SIZE];
        content[..CONTENT.len()].copy_from_slice(CONTENT.as_bytes());
        fs::write(env.folder().join("content.img"), content)?;
        let (ca, out) = (env.path("ca"), env.path("minted"));
        // The collateral of both lies in one folder; SNP needs none.
        for kind in ["gpu", "tdx"] {
            let minted = ["simulate", kind, "--ca", &ca, "--output", &out];
            let minted = env.run("sealpod-attest", &minted);
            ensure!(minted.code == 0, "sealpod-attest: {}", minted.text());
        }
        env.reconfigure(&Node::default())?;
        env.expect(&[])?;
        Ok(env)
    }

    fn path(&self, name: &str) -> String {
        self.folder().join(name).to_string_lossy().into_owned()
    }

    /// The configuration of pods that start from now on.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn reconfigure(&self, node: &Node) -> Result<()> {
        let Node {
            tee,
            defect,
            lease_seconds,
            on_loss,
            more,
            anchors,
            initramfs,
        } = node;
        let (ca, state) = (self.path("ca"), self.path("state-attest"));
        let anchors = match anchors {
            true => format!("anchors = \"{ca}/anchors.json\"\n"),
            false => String::new(),
        };
        let (collateral, refs) = (self.path("minted/collateral"), self.path("refs.json"));
        let content = self.path("content.img");
        let attestation = format!(
            "[annotations]\nallow = [\"kernel_params\", \"attestation.policy\", \"attestation.devices\", \"init_data\"]\n\
             [attestation]\nstate_dir = \"{state}\"\nsimulator = \"{ca}\"\n{anchors}\
             collateral = \"{collateral}\"\nsimulator_tee = \"{tee}\"\nsimulator_defect = \"{defect}\"\n\
             lease_seconds = {lease_seconds}\n{more}\
             [attestation.policies.default]\nreference_values = \"{refs}\"\non_loss = \"{on_loss}\"\n\
             [attestation.devices.\"{DEVICE}\"]\nkind = \"stand-in\"\npath = \"{content}\"\n"
        );
        let mut settings = Settings {
            more: attestation,
            ..Settings::default()
        };
        if let Some(initramfs) = initramfs {
            settings.initramfs.clone_from(initramfs);
        }
        let file = self.folder().join("sealpod.toml");
        fs::write(file, settings.text()).context("sealpod.toml")
    }

    /// Writes the reference values of pods with devices that add these words to their command line.
    ///
    /// # Errors
    /// Where `sealpod measure` fails.
    pub fn expect(&self, params: &[&str]) -> Result<()> {
        self.measure(&[&["--devices"], params].concat())
    }

    /// The same of pods that want no device.
    ///
    /// # Errors
    /// Where `sealpod measure` fails.
    pub fn expect_pod_without_devices(&self, params: &[&str]) -> Result<()> {
        self.measure(params)
    }

    /// `words` begins with `--devices` or has none.
    fn measure(&self, words: &[&str]) -> Result<()> {
        let config = self.path("sealpod.toml");
        let mut args = vec!["--config", &config, "measure", "--minimum-snp", MINIMUM_SNP];
        for word in words {
            match *word {
                "--devices" => args.push(word),
                param => args.extend(["--kernel-param", param]),
            }
        }
        let done = self.run("sealpod", &args);
        ensure!(done.code == 0, "sealpod measure: {}", done.text());
        Ok(fs::write(self.folder().join("refs.json"), done.stdout)?)
    }

    /// The public key of this node's verifier, which signs its audit logs.
    #[must_use]
    pub fn verifier_key(&self) -> String {
        self.path("state-attest/verifier.jwk")
    }

    /// The audit logs of this node.
    #[must_use]
    pub fn audit_logs(&self) -> Vec<PathBuf> {
        let logs = fs::read_dir(self.folder().join("state-attest/audit"));
        let mut logs: Vec<_> = logs
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.path())
            .collect();
        logs.retain(|p| p.extension().is_some_and(|e| e == "jsonl"));
        logs.sort();
        logs
    }

    /// Their lines.
    #[must_use]
    pub fn audit(&self) -> String {
        let read = |p: PathBuf| fs::read_to_string(p).unwrap_or_default();
        self.audit_logs().into_iter().map(read).collect()
    }
}
