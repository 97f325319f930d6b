//! Images built on the spot, as OCI archives: busybox, a pause image and Redis, all from Debian's
//! packages. Archives are kept in the build tree under a name made of what went into them.

use std::{
    fs::File,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::assets;

/// A shell, tools and a web server.
pub const BUSYBOX: &str = "localhost/sealpod/busybox:1";
/// What holds a pod's namespaces where the runtime wants a process for that.
pub const PAUSE: &str = "localhost/sealpod/pause:1";
/// Redis from Debian's package.
pub const REDIS: &str = "localhost/sealpod/redis:1";

/// Raised when the way images are built changes.
const RECIPE: &str = "6";
/// Text that the web server of the busybox image answers with.
pub const WEB_PAGE: &str = "served from a sealpod pod\n";

const PAUSE_SCRIPT: &str =
    "#!/bin/sh\ntrap 'exit 0' TERM INT\nwhile :; do sleep 3600 & wait $!; done\n";

/// One file, link or folder of an image.
enum Item {
    Dir(u32),
    File(u32, Vec<u8>),
    Link(String),
}

struct Image {
    reference: &'static str,
    items: Vec<(String, Item)>,
    config: Value,
}

/// The archive of [`BUSYBOX`].
///
/// # Errors
/// Where the packages are missing or the disk is full.
pub fn busybox() -> Result<PathBuf> {
    archive("busybox", || {
        Ok(Image {
            reference: BUSYBOX,
            items: busybox_items()?,
            config: json!({ "Cmd": ["/bin/sh"], "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"] }),
        })
    })
}

/// The files of [`BUSYBOX`] as a folder, for containers without an image.
///
/// # Errors
/// As [`busybox`].
pub fn busybox_folder(dir: &Path) -> Result<()> {
    let image = Image {
        reference: BUSYBOX,
        items: busybox_items()?,
        config: Value::Null,
    };
    let layer = layer(&image)?;
    Ok(tar::Archive::new(layer.as_slice()).unpack(dir)?)
}

/// The archive of [`PAUSE`].
///
/// # Errors
/// As [`busybox`].
pub fn pause() -> Result<PathBuf> {
    archive("pause", || {
        let mut items = busybox_items()?;
        items.push(("pause".into(), Item::File(0o755, PAUSE_SCRIPT.into())));
        Ok(Image {
            reference: PAUSE,
            items,
            config: json!({ "Entrypoint": ["/pause"], "Env": ["PATH=/bin"] }),
        })
    })
}

/// The archive of [`REDIS`]: the server listens on every address, data in `/data`.
///
/// # Errors
/// As [`busybox`].
pub fn redis() -> Result<PathBuf> {
    archive("redis", || {
        let mut items = busybox_items()?;
        items.push(("data".into(), Item::Dir(0o777)));
        let tree = assets::unpacked("redis");
        let libraries = tree.join("usr/lib/x86_64-linux-gnu");
        for program in ["redis-server", "redis-cli", "redis-benchmark"] {
            // redis-server is a link to redis-check-rdb in Debian; read through it.
            let path = tree.join("usr/bin").join(program);
            items.push((
                format!("bin/{program}"),
                Item::File(0o755, std::fs::read(&path)?),
            ));
            for library in needed_libraries(&path, &libraries)? {
                let name = library
                    .strip_prefix(&libraries)
                    .unwrap_or(&library)
                    .to_owned();
                let name = name
                    .file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned();
                let at = if name.starts_with("ld-linux") {
                    "lib64"
                } else {
                    "lib"
                };
                items.push((
                    format!("{at}/{name}"),
                    Item::File(0o755, std::fs::read(&library)?),
                ));
            }
        }
        Ok(Image {
            reference: REDIS,
            items,
            config: json!({
                "Entrypoint": ["/bin/redis-server", "--bind", "0.0.0.0", "--protected-mode", "no"],
                "Env": ["PATH=/bin", "LD_LIBRARY_PATH=/lib"],
                "WorkingDir": "/data",
            }),
        })
    })
}

/// Paths of the libraries that `ldd` names, looked for in `first` before the machine's own.
fn needed_libraries(program: &Path, first: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd")
        .arg(program)
        .env("LD_LIBRARY_PATH", first)
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        !text.contains("not found"),
        "{} lacks libraries:\n{text}",
        program.display()
    );
    let word = |line: &str| {
        line.split_whitespace()
            .find(|w| w.starts_with('/'))
            .map(PathBuf::from)
    };
    Ok(text.lines().filter_map(word).collect())
}

fn busybox_items() -> Result<Vec<(String, Item)>> {
    let path = assets::unpacked("tools/bin/busybox");
    let program = std::fs::read(&path).with_context(|| path.display().to_string())?;
    let applets = Command::new(&path).arg("--list").output()?;
    let mut items: Vec<(String, Item)> = Vec::new();
    for dir in [
        "bin", "dev", "etc", "home", "lib", "lib64", "proc", "root", "sys", "usr", "var", "www",
    ] {
        items.push((dir.into(), Item::Dir(0o755)));
    }
    for dir in ["usr/bin", "usr/sbin", "sbin", "var/run"] {
        items.push((dir.into(), Item::Dir(0o755)));
    }
    items.push(("tmp".into(), Item::Dir(0o1777)));
    items.push(("bin/busybox".into(), Item::File(0o755, program)));
    for applet in String::from_utf8_lossy(&applets.stdout)
        .lines()
        .filter(|a| *a != "busybox")
    {
        items.push((format!("bin/{applet}"), Item::Link("busybox".into())));
    }
    let text = |s: &str| Item::File(0o644, s.as_bytes().to_vec());
    let passwd = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\nuser:x:1000:1000::/home:/bin/sh\n";
    items.push(("etc/passwd".into(), text(passwd)));
    items.push((
        "etc/group".into(),
        text("root:x:0:\nnogroup:x:65534:\nuser:x:1000:\nextra:x:2000:user\n"),
    ));
    items.push(("www/index.html".into(), text(WEB_PAGE)));
    Ok(items)
}

/// The file of an archive, built unless it is there.
fn archive(name: &str, make: impl FnOnce() -> Result<Image>) -> Result<PathBuf> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock();
    let mut key = Sha256::new();
    key.update(RECIPE);
    for package in ["tools", "redis"] {
        let list = assets::unpacked(package).join(".packages");
        key.update(std::fs::read(&list).with_context(|| list.display().to_string())?);
    }
    let key: String = hex(&key.finalize()).chars().take(12).collect();
    let dir = assets::target().join("test-images");
    std::fs::create_dir_all(&dir)?;
    let path = dir.canonicalize()?.join(format!("{name}-{key}.tar"));
    if !path.exists() {
        let part = path.with_extension(format!("{}.part", std::process::id()));
        write_archive(&make()?, &part)?;
        std::fs::rename(&part, &path)?;
    }
    Ok(path)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn layer(image: &Image) -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut done = std::collections::BTreeSet::new();
    for (name, item) in &image.items {
        if !done.insert(name) {
            continue;
        }
        let mut header = tar::Header::new_gnu();
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        match item {
            Item::Dir(mode) => {
                header.set_entry_type(tar::EntryType::Directory);
                header.set_mode(*mode);
                header.set_size(0);
                tar.append_data(&mut header, format!("{name}/"), std::io::empty())?;
            }
            Item::File(mode, content) => {
                header.set_mode(*mode);
                header.set_size(content.len() as u64);
                tar.append_data(&mut header, name, content.as_slice())?;
            }
            Item::Link(to) => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_mode(0o777);
                header.set_size(0);
                tar.append_link(&mut header, name, to)?;
            }
        }
    }
    Ok(tar.into_inner()?)
}

/// Writes `image` by the OCI image layout specification, with one uncompressed layer, and with the
/// `manifest.json` that `docker load` reads.
fn write_archive(image: &Image, to: &Path) -> Result<()> {
    let mut tar = tar::Builder::new(File::create(to).with_context(|| to.display().to_string())?);
    let mut add = |name: &str, content: &[u8]| -> Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, name, content)?;
        Ok(())
    };
    let mut blob = |kind: &str, content: &[u8]| -> Result<Value> {
        let digest = hex(&Sha256::digest(content));
        add(&format!("blobs/sha256/{digest}"), content)?;
        Ok(
            json!({ "mediaType": format!("application/vnd.oci.image.{kind}"),
            "digest": format!("sha256:{digest}"), "size": content.len() }),
        )
    };
    let layer = blob("layer.v1.tar", &layer(image)?)?;
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": image.config,
        "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
    });
    let config = blob("config.v1+json", config.to_string().as_bytes())?;
    let manifest = json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config, "layers": [layer] });
    let mut manifest = blob("manifest.v1+json", manifest.to_string().as_bytes())?;
    manifest["annotations"] = json!({
        "io.containerd.image.name": image.reference,
        "org.opencontainers.image.ref.name": image.reference,
    });
    let blob_path = |v: &Value| v["digest"].as_str().unwrap_or_default().replace(':', "/");
    let docker = json!([{ "Config": format!("blobs/{}", blob_path(&config)),
        "RepoTags": [image.reference], "Layers": [format!("blobs/{}", blob_path(&layer))] }]);
    add(
        "index.json",
        json!({ "schemaVersion": 2, "manifests": [manifest] })
            .to_string()
            .as_bytes(),
    )?;
    add("manifest.json", docker.to_string().as_bytes())?;
    add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    tar.into_inner()?.flush()?;
    Ok(())
}

/// The SHA-256 of what a reader yields, in hex.
///
/// # Errors
/// Those of the reader.
pub fn sha256(mut from: impl Read) -> Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = [0; 65536];
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..n]);
    }
}
