//! Standard streams and terminals through `ctr`.

use crate::on_every_containerd;

on_every_containerd!(
    every_byte_of_stdin_comes_back,
    every_byte_of_a_fast_writer_arrives,
    an_exec_passes_every_byte_both_ways,
    streams_stay_apart,
    a_terminal_is_one,
    an_exec_can_have_a_terminal,
    the_exit_comes_after_the_last_byte,
    a_background_child_does_not_hold_the_exit,
);

mod bodies {
    use sealpod_tests::{Env, Version, assets, image, need};

    /// Bytes that do not compress and are the same each time.
    fn noise(length: usize) -> Vec<u8> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut out = Vec::with_capacity(length + 8);
        while out.len() < length {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            out.extend(state.to_le_bytes());
        }
        out.truncate(length);
        out
    }

    /// Runs a client that is fed `input`; the SHA-256 and length of what it prints.
    fn piped(env: &Env, args: &[&str], input: &[u8]) -> (i32, String, usize) {
        use std::io::{Read, Write};
        let mut child = env.spawn("ctr", args);
        let mut stdin = child.stdin.take().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let mut bytes = Vec::new();
        std::thread::scope(|scope| {
            scope.spawn(move || stdin.write_all(input));
            stdout.read_to_end(&mut bytes).unwrap();
        });
        let code = child.wait().unwrap().code().unwrap();
        (code, image::sha256(&bytes[..]).unwrap(), bytes.len())
    }

    pub(super) fn every_byte_of_stdin_comes_back(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let data = noise(8 << 20);
        let args = env.run_args(&["--rm"], &env.id("a"), &["cat"]);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let (code, sum, length) = piped(&env, &args, &data);
        assert_eq!((code, length), (0, data.len()));
        assert_eq!(sum, image::sha256(&data[..]).unwrap());
        env.assert_clean();
    }

    pub(super) fn every_byte_of_a_fast_writer_arrives(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let script = "head -c 33554432 /dev/zero";
        let args = env.run_args(&["--rm"], &env.id("a"), &["sh", "-c", script]);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let (code, _, length) = piped(&env, &args, b"");
        assert_eq!((code, length), (0, 32 << 20));
        env.assert_clean();
    }

    pub(super) fn an_exec_passes_every_byte_both_ways(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let id = env.id("a");
        env.ctr_start(&[], &id, &["sleep", "1000"]);
        let data = noise(4 << 20);
        let (code, sum, _) = piped(&env, &["task", "exec", "--exec-id", "e", &id, "cat"], &data);
        assert_eq!(code, 0);
        assert_eq!(sum, image::sha256(&data[..]).unwrap());
        env.ctr_remove(&id);
        env.assert_clean();
    }

    pub(super) fn streams_stay_apart(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let script = "for i in $(seq 500); do echo out $i; echo err $i >&2; done";
        let done = env.ctr_run(&[], &env.id("a"), &["sh", "-c", script]).ok();
        let expected = |word: &str| {
            (1..=500)
                .map(|i| format!("{word} {i}\n"))
                .collect::<String>()
        };
        assert_eq!(done.stdout, expected("out"));
        assert_eq!(done.stderr, expected("err"));
        env.assert_clean();
    }

    pub(super) fn a_terminal_is_one(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        // The size is passed on just after the start.
        let wait = "until [ \"$(stty size)\" = \"33 111\" ]; do sleep 0.1; done; exit 4";
        let script = format!("'test -t 0 && test -t 1 && tty; {wait}'");
        let args = env.run_args(&["--rm", "-t"], &env.id("a"), &["sh", "-c", &script]);
        let line = format!("stty rows 33 cols 111; ctr {}", args.join(" "));
        let done = env.run("script", &["-qec", &line, "/dev/null"]);
        assert_eq!(done.code, 4, "{}", done.text());
        assert!(done.stdout.contains("/dev/pts/0"), "{}", done.text());
        env.assert_clean();
    }

    pub(super) fn an_exec_can_have_a_terminal(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let id = env.id("a");
        env.ctr_start(&[], &id, &["sleep", "1000"]);
        let line = format!("ctr task exec -t --exec-id e {id} sh -c 'tty; exit 6'");
        let done = env.run("script", &["-qec", &line, "/dev/null"]);
        assert_eq!(done.code, 6, "{}", done.text());
        assert!(done.stdout.contains("/dev/pts/"), "{}", done.text());
        env.ctr_remove(&id);
        env.assert_clean();
    }

    pub(super) fn the_exit_comes_after_the_last_byte(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let id = env.id("a");
        env.ctr_start(&[], &id, &["sleep", "1000"]);
        for round in 0..10 {
            let exec = format!("e{round}");
            let done = env
                .ctr_exec(&id, &exec, &["sh", "-c", "seq 5000; echo last"])
                .ok();
            assert_eq!(done.stdout.lines().count(), 5001);
            assert_eq!(done.stdout.lines().last(), Some("last"));
        }
        env.ctr_remove(&id);
        env.assert_clean();
    }

    pub(super) fn a_background_child_does_not_hold_the_exit(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        // The child keeps the output open; it dies with the container's init.
        let done = env
            .ctr_run(&[], &env.id("a"), &["sh", "-c", "sleep 1000 & echo done"])
            .ok();
        assert_eq!(done.stdout, "done\n");
        env.assert_clean();
    }
}
