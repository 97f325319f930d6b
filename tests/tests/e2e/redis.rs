//! A real server from Debian's packages in a pod, under load from the host.

use crate::on_every_containerd;

on_every_containerd!(redis_serves_a_benchmark_and_keeps_its_data);

mod bodies {
    use std::time::Duration;

    use sealpod_tests::{Env, Version, assets, image, need, wait};

    pub(super) fn redis_serves_a_benchmark_and_keeps_its_data(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        env.import("default", &image::redis().unwrap()).unwrap();
        let data = env.folder().join("data");
        std::fs::create_dir(&data).unwrap();
        let mount = format!(
            "type=bind,src={},dst=/data,options=rbind:rw",
            data.display()
        );
        let tools = assets::unpacked("redis");
        let libraries = format!(
            "LD_LIBRARY_PATH={}",
            tools.join("usr/lib/x86_64-linux-gnu").display()
        );
        let client = |program: &str, args: &[&str]| {
            let program = tools.join("usr/bin").join(program);
            let mut all = vec![libraries.as_str(), program.to_str().unwrap()];
            all.extend(args);
            env.run("env", &all)
        };
        for round in 0..2 {
            let id = env.id(&format!("redis{round}"));
            let args = env.image_run_args(
                &assets::runtime(),
                image::REDIS,
                &["--detach", "--cni", "--mount", &mount],
                &id,
                &[
                    "redis-server",
                    "--bind",
                    "0.0.0.0",
                    "--protected-mode",
                    "no",
                    "--appendonly",
                    "yes",
                    "--dir",
                    "/data",
                ],
            );
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let _ = env.run("ctr", &args).ok();
            let ip = env.pod_address(&id).to_string();
            let cli = |args: &[&str]| {
                let mut all = vec!["-h", ip.as_str()];
                all.extend(args);
                client("redis-cli", &all)
            };
            wait::until("Redis answers", Duration::from_secs(30), || {
                (cli(&["ping"]).stdout.trim() == "PONG").then_some(())
            });
            if round == 0 {
                assert_eq!(
                    cli(&["set", "kept", "through the pod's end"]).stdout.trim(),
                    "OK"
                );
                let load = client(
                    "redis-benchmark",
                    &[
                        "-h",
                        &ip,
                        "-n",
                        "5000",
                        "-c",
                        "20",
                        "-P",
                        "4",
                        "-t",
                        "set,get,incr,lpush,mset",
                        "-q",
                    ],
                );
                assert_eq!(load.code, 0, "{}", load.text());
                assert!(
                    !load.text().to_lowercase().contains("error"),
                    "{}",
                    load.text()
                );
                assert!(load.text().contains("MSET"), "{}", load.text());
            } else {
                assert_eq!(cli(&["get", "kept"]).stdout.trim(), "through the pod's end");
            }
            let _ = cli(&["shutdown"]);
            wait::until("Redis ended", Duration::from_secs(20), || {
                (env.ctr_status(&id).as_deref() == Some("STOPPED")).then_some(())
            });
            env.ctr_remove(&id);
        }
    }
}
