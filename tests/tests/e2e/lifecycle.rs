//! A container's life as `ctr` sees it.

use crate::on_every_containerd;

on_every_containerd!(run_prints_and_ends_with_the_exit_code);

mod bodies {
    use sealpod_tests::{Env, Version, assets, need};

    pub(super) fn run_prints_and_ends_with_the_exit_code(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let done = env.ctr_run(
            &[],
            &env.id("a"),
            &["sh", "-c", "echo out; echo err >&2; exit 7"],
        );
        assert_eq!(
            (done.code, done.stdout.as_str()),
            (7, "out\n"),
            "{}",
            done.text()
        );
        assert_eq!(done.stderr.lines().next(), Some("err"));
        env.assert_clean();
    }
}
