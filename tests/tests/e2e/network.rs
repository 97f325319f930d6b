//! A pod's CNI network, seen from the host and from inside.

use crate::on_every_containerd;

on_every_containerd!(
    a_server_is_reached_over_cni,
    the_guest_has_the_cni_address_and_route,
    a_container_without_a_network_has_loopback,
    a_tasks_pid_leads_to_the_pods_network_and_its_processes_have_none,
);

mod bodies {
    use std::{fs, io::ErrorKind, time::Duration};

    use sealpod_tests::{Env, Version, assets, cni, ctr, image, need, only_sealpod, wait};

    use crate::failure::Victim;

    pub(super) fn a_server_is_reached_over_cni(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let id = env.id("web");
        env.ctr_start(&["--cni"], &id, &["httpd", "-f", "-p", "80", "-h", "/www"]);
        let ip = env.pod_address(&id);
        let page = wait::until("the page", Duration::from_secs(20), || {
            env.http_get((ip, 80).into()).ok()
        });
        assert!(
            page.starts_with("HTTP/1.") && page.contains("200 OK"),
            "{page}"
        );
        assert!(page.ends_with(image::WEB_PAGE), "{page}");
        // A port that nobody listens on is refused by the guest, at once.
        assert!(env.connect((ip, 81).into()).is_err());
        env.ctr_remove(&id);
    }

    pub(super) fn the_guest_has_the_cni_address_and_route(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let id = env.id("net");
        env.ctr_start(&["--cni"], &id, &["sleep", "1000"]);
        let ip = env.pod_address(&id).to_string();
        assert!(ip.starts_with("10.88."), "{ip}");
        let routes = env.ctr_exec(&id, "e1", &["ip", "route"]).ok().stdout;
        assert!(
            routes.contains(&format!("default via {}", cni::HOST)),
            "{routes}"
        );
        let ping = env.ctr_exec(
            &id,
            "e2",
            &["ping", "-c", "3", "-i", "0.2", "-W", "5", cni::HOST],
        );
        assert_eq!(ping.code, 0, "{}", ping.text());
        // A full-sized packet passes: the MTU is the link's.
        let ping = env.ctr_exec(
            &id,
            "e3",
            &["ping", "-c", "1", "-W", "5", "-s", "1472", cni::HOST],
        );
        assert_eq!(ping.code, 0, "{}", ping.text());
        env.ctr_remove(&id);
    }

    pub(super) fn a_container_without_a_network_has_loopback(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let script = "ip -o -4 addr | cut -d ' ' -f 2 | sort -u; httpd -p 127.0.0.1:80 -h /www; wget -q -O - http://127.0.0.1/";
        let done = env.ctr_run(&[], &env.id("a"), &["sh", "-c", script]);
        // runc leaves loopback down without CNI; a guest's own is up.
        if assets::runtime() == assets::SEALPOD_RUNTIME {
            let done = done.ok();
            assert_eq!(done.stdout, format!("lo\n{}", image::WEB_PAGE));
        }
        env.assert_clean();
    }

    pub(super) fn a_tasks_pid_leads_to_the_pods_network_and_its_processes_have_none(
        version: Version,
    ) {
        need!(assets::complete());
        only_sealpod!();
        let env = Env::new(version).unwrap();
        let id = env.id("pid");
        env.ctr_start(&["--cni"], &id, &["sleep", "1000"]);
        let pid = env.ctr_pid(ctr::NAMESPACE, &id).expect("the task's pid");

        let (names, pods) = env.network_of(pid).unwrap();
        assert_eq!(names, ["eth0", "lo", "sealtap0"], "CNI's, and the VM's end");
        let mut all = vec![pods];
        for of_pod in [Victim::Vm, Victim::Virtiofsd] {
            let found = of_pod.processes(&env);
            assert_eq!(found.len(), 1, "{found:?}");
            let (names, netns) = env.network_of(found[0].pid).unwrap();
            assert_eq!(names, ["lo"], "{found:?}");
            all.push(netns);
        }
        let hosts = env.containerd.pid(&env.namespaces);
        all.push(env.network_of(hosts).unwrap().1);
        let count = all.len();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count, "each in a namespace of its own: {all:?}");

        // Tools that copy files by way of the task's root reach nothing of the host.
        let root = env.namespaces.path(&format!("/proc/{pid}/root"));
        for of_the_host in ["etc/passwd", "proc", "root", "run", "tmp", "var"] {
            assert!(!root.join(of_the_host).exists(), "{of_the_host}");
        }
        let e = fs::write(root.join("file"), "").expect_err("a root that is read-only");
        assert_eq!(e.kind(), ErrorKind::ReadOnlyFilesystem);
        env.ctr_remove(&id);
        env.assert_clean();
    }
}
