//! Streaming exec, attach and port-forward through containerd's CRI server, as kubectl uses it.

use crate::on_every_cri;

on_every_cri!(
    a_streaming_exec_passes_streams_and_exit_code,
    a_streaming_exec_with_a_terminal_can_be_resized,
    attach_reaches_the_running_process,
    port_forward_reaches_a_server_in_the_pod,
    port_forward_reaches_a_server_on_loopback_only,
);

mod bodies {
    use sealpod_tests::{
        Env, Version, assets,
        cri::{Cri, Pod},
        need,
        websocket::{Channels, ERROR, RESIZE, STDERR, STDIN, STDOUT},
    };

    pub(super) fn a_streaming_exec_passes_streams_and_exit_code(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let c = cri.run(&pod, "c", |_| {}).unwrap();
        let script = "read line; echo \"got $line\"; echo err >&2; exit 5";
        let url = cri
            .exec_url(&c, &["sh", "-c", script], false, true)
            .unwrap();
        let mut channels = Channels::open(&env, &url).unwrap();
        channels.send(STDIN, b"a line\n").unwrap();
        channels.read_to_end().unwrap();
        assert_eq!(
            (channels.text(STDOUT), channels.text(STDERR)),
            ("got a line\n".into(), "err\n".into())
        );
        let status: serde_json::Value = serde_json::from_str(&channels.text(ERROR)).unwrap();
        assert_eq!(status["details"]["causes"][0]["message"], "5", "{status}");
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn a_streaming_exec_with_a_terminal_can_be_resized(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let c = cri.run(&pod, "c", |_| {}).unwrap();
        let script =
            "echo up; while [ \"$(stty size)\" != '44 123' ]; do sleep 0.1; done; echo resized";
        let url = cri.exec_url(&c, &["sh", "-c", script], true, true).unwrap();
        let mut channels = Channels::open(&env, &url).unwrap();
        let saw = |what: &'static str| {
            move |r: &[Vec<u8>; 5]| String::from_utf8_lossy(&r[1]).contains(what)
        };
        assert!(channels.read_until(saw("up")).unwrap());
        channels
            .send(RESIZE, br#"{"Width":123,"Height":44}"#)
            .unwrap();
        assert!(
            channels.read_until(saw("resized")).unwrap(),
            "{}",
            channels.text(STDOUT)
        );
        // As kubectl does. A pod that is removed while containerd still ends the exec keeps it from ever
        // closing the exec's pipes: it first asks how a task is that it has deleted itself.
        channels.read_to_end().unwrap();
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn attach_reaches_the_running_process(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let c = cri
            .run(&pod, "c", |c| {
                c.stdin = true;
                c.command = ["sh", "-c", "while read line; do echo \"got $line\"; done"]
                    .map(String::from)
                    .into();
            })
            .unwrap();
        let url = cri.attach_url(&c, true).unwrap();
        let mut channels = Channels::open(&env, &url).unwrap();
        channels.send(STDIN, b"one\n").unwrap();
        let has = |text: &'static str| move |r: &[Vec<u8>; 5]| r[1] == text.as_bytes();
        assert!(channels.read_until(has("got one\n")).unwrap());
        drop(channels);
        // Leaving does not end the process; a second visitor reaches it too.
        let url = cri.attach_url(&c, true).unwrap();
        let mut channels = Channels::open(&env, &url).unwrap();
        channels.send(STDIN, b"two\n").unwrap();
        assert!(channels.read_until(has("got two\n")).unwrap());
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    fn forwarded(env: &Env, cri: &Cri, pod: &Pod) -> String {
        let url = cri.port_forward_url(pod, 8080).unwrap();
        let mut channels = Channels::open(env, &url).unwrap();
        // Both channels begin with the port, little endian.
        assert!(
            channels
                .read_until(|r| r[0].len() >= 2 && r[1].len() >= 2)
                .unwrap()
        );
        channels.send(0, b"GET / HTTP/1.0\r\n\r\n").unwrap();
        let end = sealpod_tests::image::WEB_PAGE.as_bytes();
        let whole = channels.read_until(|r| r[0].ends_with(end)).unwrap();
        assert!(
            whole,
            "data {:?} error {:?}",
            channels.text(0),
            channels.text(1)
        );
        channels.text(0)
    }

    pub(super) fn port_forward_reaches_a_server_in_the_pod(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let c = cri
            .run(&pod, "c", |c| {
                c.command = ["httpd", "-f", "-p", "8080", "-h", "/www"]
                    .map(String::from)
                    .into();
            })
            .unwrap();
        cri.sh(&c, "until netstat -ltn | grep -q :8080; do sleep 0.1; done");
        for _ in 0..3 {
            assert!(forwarded(&env, &cri, &pod).contains("200 OK"));
        }
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn port_forward_reaches_a_server_on_loopback_only(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let c = cri
            .run(&pod, "c", |c| {
                c.command = ["httpd", "-f", "-p", "127.0.0.1:8080", "-h", "/www"]
                    .map(String::from)
                    .into();
            })
            .unwrap();
        cri.sh(&c, "until netstat -ltn | grep -q :8080; do sleep 0.1; done");
        assert!(forwarded(&env, &cri, &pod).contains("200 OK"));
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }
}
