//! Specifications as vendors write them, and as nobody should.

use super::*;

fn of(text: &str, name: &str) -> Result<CdiDevice, String> {
    written("cdi.json", text.as_bytes(), name)
}

fn written(file: &str, text: &[u8], name: &str) -> Result<CdiDevice, String> {
    let dir = tempfile::tempdir().expect("folder");
    let file = dir.path().join(file);
    std::fs::write(&file, text).expect("file");
    read(&file, name).map_err(|e| crate::error::chain(&e))
}

fn with(edits: &str) -> String {
    format!(
        r#"{{"cdiVersion":"0.6.0","kind":"nvidia.com/pgpu","devices":[
        {{"name":"0","containerEdits":{{"deviceNodes":[{{"path":"/dev/vfio/75"}}]}}}}],
        "containerEdits":{{"deviceNodes":[{{"path":"/dev/vfio/vfio"}}],{edits}}}}}"#
    )
}

#[test]
fn a_device_is_one_node_with_the_variables_of_both_levels() {
    let text = with(r#""env":["NVIDIA_VISIBLE_DEVICES=void"]"#);
    assert_eq!(
        of(&text, "nvidia.com/pgpu=0"),
        Ok(CdiDevice {
            host: "/dev/vfio/75".into(),
            path: "/dev/vfio/75".into(),
            env: vec!["NVIDIA_VISIBLE_DEVICES=void".into()],
        })
    );
    let renamed = text.replace(
        r#"{"path":"/dev/vfio/75"}"#,
        r#"{"path":"/dev/gpu","hostPath":"/dev/vfio/75","type":"c","major":1,"permissions":"rw"}"#,
    );
    let found = of(&renamed, "nvidia.com/pgpu=0").expect("device");
    assert_eq!(
        (found.host, found.path),
        ("/dev/vfio/75".into(), "/dev/gpu".into())
    );
}

#[test]
fn what_a_vm_cannot_be_given_is_refused_by_name() {
    let name = "nvidia.com/pgpu=0";
    for (edits, said) in [
        (
            r#""hooks":[{"hookName":"createContainer","path":"/x"}]"#,
            "hooks",
        ),
        (
            r#""mounts":[{"hostPath":"/a","containerPath":"/b"}]"#,
            "mounts",
        ),
        (r#""additionalGids":[1]"#, "additionalGids"),
        (r#""env":["novalue"]"#, "NAME=value"),
        (r#""somethingNew":[]"#, "somethingNew"),
    ] {
        let e = of(&with(edits), name).expect_err(edits);
        assert!(e.contains(said), "{edits}: {e}");
    }
    let good = with(r#""env":[]"#);
    for (from, to, said) in [
        ("nvidia.com/pgpu", "other.com/gpu", "is about"),
        (r#""name":"0""#, r#""name":"1""#, "exactly one device"),
        ("0.6.0", "2.0.0", "not known"),
        ("/dev/vfio/75", "/dev/../etc", "no absolute path"),
        (r#"{"path":"/dev/vfio/75"}"#, "", "0 nodes"),
        (
            r#"{"path":"/dev/vfio/75"}"#,
            r#"{"path":"/dev/a"},{"path":"/dev/b"}"#,
            "2 nodes",
        ),
        ("{", "", "no CDI specification"),
    ] {
        let e = of(&good.replacen(from, to, 1), name).expect_err(to);
        assert!(e.contains(said), "{to}: {e}");
    }
    assert!(read(Path::new("/does/not/exist"), name).is_err());
}

/// What `nvidia-ctk cdi generate --mode=vfio` writes, in its form and order, for two GPUs.
const VENDOR: &str = r#"---
cdiVersion: 0.5.0
kind: nvidia.com/pgpu
devices:
    - name: "0"
      containerEdits:
        deviceNodes:
            - path: /dev/vfio/75
              permissions: rwm
    - name: GPU-5d1c6f0e
      containerEdits:
        deviceNodes:
            - path: /dev/vfio/76
              hostPath: /dev/vfio/76
              major: 511
              minor: 1
              fileMode: 438
containerEdits:
    env:
        - NVIDIA_VISIBLE_DEVICES=void
    deviceNodes:
        - path: /dev/vfio/vfio
"#;

fn yaml(text: &str, name: &str) -> Result<CdiDevice, String> {
    written("cdi.yaml", text.as_bytes(), name)
}

#[test]
fn yaml_as_the_vendors_tool_writes_it_is_read_like_json() {
    for (name, node) in [("0", "/dev/vfio/75"), ("GPU-5d1c6f0e", "/dev/vfio/76")] {
        let found = yaml(VENDOR, &format!("nvidia.com/pgpu={name}")).expect(name);
        assert_eq!(found.host, Path::new(node));
        assert_eq!(found.env, ["NVIDIA_VISIBLE_DEVICES=void"]);
    }
    let name = "nvidia.com/pgpu=0";
    assert_eq!(
        written("cdi.yml", VENDOR.as_bytes(), name),
        yaml(VENDOR, name)
    );
    // JSON is YAML, too.
    assert_eq!(
        yaml(&with(r#""env":[]"#), name),
        of(&with(r#""env":[]"#), name)
    );
    // An alias within its bounds is what it stands for.
    let alias = VENDOR
        .replace("path: /dev/vfio/76\n", "path: &node /dev/vfio/76\n")
        .replace("hostPath: /dev/vfio/76", "hostPath: *node");
    assert_eq!(yaml(&alias, name), yaml(VENDOR, name));
}

#[test]
fn yaml_with_an_error_is_named_with_its_line_and_what_is_allowed() {
    for (from, to, parts) in [
        (
            "kind:",
            "kint:",
            &["line 3", "kint", "cdiVersion", "kind"][..],
        ),
        (
            "hostPath:",
            "hostpath:",
            &["line 14", "hostpath", "hostPath", "fileMode"],
        ),
        (
            "cdiVersion: 0.5.0",
            "cdiVersion: 0.5.0\ncdiVersion: 0.6.0",
            &["line 3", "cdiVersion", "uplicate"],
        ),
        (
            "permissions: rwm",
            "path: /dev/vfio/1",
            &["line 9", "path", "uplicate"],
        ),
        ("name: \"0\"", "name: 0", &["line 5", "quoting"]),
        ("name: \"0\"", "name: !secret x", &["line 5", "!secret"]),
        ("devices:\n", "devices: 7\nold:\n", &["line 4"]),
        ("    env:", "\tenv:", &["line 19"]),
        (
            "kind: nvidia.com/pgpu",
            "kind: *nowhere",
            &["line 3", "unknown value"],
        ),
        (
            "    env:",
            "    <<: {hooks: []}\n    env:",
            &["line 19", "merge key"],
        ),
        (
            "        - path: /dev/vfio/vfio\n",
            "        - path: /dev/vfio/vfio\n---\nkind: more\n",
            &["document"],
        ),
    ] {
        let text = VENDOR.replacen(from, to, 1);
        assert_ne!(text, VENDOR);
        let e = yaml(&text, "nvidia.com/pgpu=0").expect_err(to);
        let all = parts.iter().all(|part| e.contains(part));
        assert!(
            all && e.contains("cdi.yaml is no CDI specification in YAML") && !e.contains('\n'),
            "{to}: {e}"
        );
    }
    let e = yaml(
        &VENDOR.replace("    env:", "    hooks:\n        - path: /x\n    env:"),
        "nvidia.com/pgpu=0",
    );
    assert!(e.expect_err("hooks").contains("asks for hooks"));
    let e = written("cdi.conf", VENDOR.as_bytes(), "nvidia.com/pgpu=0").expect_err("name");
    assert!(e.contains(".json") && e.contains(".yaml"), "{e}");
}

#[test]
fn hostile_yaml_is_refused_at_once() {
    let mut laughs =
        String::from("cdiVersion: 0.5.0\nannotations:\n  a0: &a0 [x, x, x, x, x, x, x, x, x]\n");
    for n in 1..30 {
        let before = format!("*a{}, ", n - 1).repeat(9);
        laughs += &format!("  a{n}: &a{n} [{before}]\n");
    }
    let deep = |open: &str| format!("annotations: {}", open.repeat(400_000 / open.len()));
    let indented: String = (0..1000)
        .map(|n| format!("{}a:\n", " ".repeat(n)))
        .collect();
    let hostile: Vec<(&str, Vec<u8>)> = vec![
        ("laughs", laughs.into()),
        ("deep", deep("[").into()),
        ("deep", deep("{a: ").into()),
        ("deep", deep("- ").replace(": ", ":\n").into()),
        ("deep", indented.into()),
        ("many", "- 1\n".repeat(250_000).into()),
        (
            "many",
            format!("annotations: [{}]", "1,".repeat(500_000)).into(),
        ),
        (
            "many",
            format!("annotations: [{}]", "&a x,".repeat(200_000)).into(),
        ),
        ("itself", "annotations: &a [*a]".into()),
        ("large", vec![b'#'; 2 << 20]),
        ("long", vec![b'x'; 1 << 20]),
        ("keys", format!("{}: x", "k".repeat(1 << 19)).into()),
        ("no text", vec![0xff; 4096]),
        ("zeros", vec![0; 4096]),
        ("empty", vec![]),
        ("cut", VENDOR.as_bytes()[..VENDOR.len() / 2].to_vec()),
    ];
    for (kind, bytes) in hostile {
        let start = std::time::Instant::now();
        let e = written("cdi.yaml", &bytes, "nvidia.com/pgpu=0").expect_err(kind);
        assert!(e.len() < 600 && !e.contains('\n'), "{kind}: {e}");
        assert!(
            start.elapsed().as_secs() < 5,
            "{kind}: {:?}",
            start.elapsed()
        );
        if matches!(kind, "laughs" | "deep" | "many") && e.contains("limit") {
            assert!(e.contains("allowed are 16 levels"), "{kind}: {e}");
        }
    }
}
