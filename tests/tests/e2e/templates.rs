//! Pods whose VMs go on from a template (`hypervisor.template`). Only sealpod-vmm has templates: elsewhere
//! pods boot as ever.

use crate::on_every_containerd;

on_every_containerd!(pods_go_on_from_one_template_and_boot_where_it_is_damaged);

mod bodies {
    use std::{fs, path::Path};

    use sealpod_tests::{Env, Settings, Version, assets, need, only_sealpod};

    /// Pods that ran, by what each guest says of itself.
    fn boot_id(env: &Env, name: &str) -> String {
        let script = "echo left > /tmp/left && cat /tmp/left /proc/sys/kernel/random/boot_id";
        let done = env.ctr_run(&[], &env.id(name), &["sh", "-c", script]);
        let (first, id) = (done.ok().stdout.split_once('\n'))
            .map(|(first, id)| (first.to_owned(), id.to_owned()))
            .unwrap();
        assert_eq!(first, "left");
        assert_eq!(id.len(), 37, "{id}");
        id
    }

    fn named(folder: &Path, wanted: impl Fn(&str) -> bool) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| wanted(name)).collect()
    }

    pub(super) fn pods_go_on_from_one_template_and_boot_where_it_is_damaged(version: Version) {
        need!(assets::complete());
        only_sealpod!();
        let settings = Settings {
            more: "template = true\n".into(),
            ..Settings::default()
        };
        let env = Env::with_settings(version, &settings).unwrap();
        let folder = env.namespaces.path("/run/sealpod/templates");
        let mut ids = vec![boot_id(&env, "a")];
        if assets::accelerator().as_deref() != Some("kvm") {
            assert!(!folder.exists(), "QEMU has no templates");
            env.assert_clean();
            return;
        }
        let whole = |name: &str| name != "lock" && !name.contains('.');
        let made = named(&folder, whole);
        assert_eq!(made.len(), 1, "{made:?}");
        // Until it knows what they write to; one that ends at once may not be looked at.
        let write_set = folder.join(&made[0]).join("write_set.json");
        let known = || fs::read_to_string(&write_set).is_ok_and(|json| json.contains("\"vms\":2"));
        for n in 0..8 {
            ids.push(boot_id(&env, &format!("b{n}")));
            if known() {
                break;
            }
        }
        assert!(known());
        ids.push(boot_id(&env, "knowing"));
        assert_eq!(named(&folder, whole), made);

        let said = "The VM boots instead of going on from a template";
        assert!(!env.containerd.log_tail(1000).contains(said));
        let state = folder.join(&made[0]).join("state");
        let mut raw = fs::read(&state).unwrap();
        let middle = raw.len() / 2;
        raw[middle] ^= 1;
        fs::write(&state, raw).unwrap();
        ids.push(boot_id(&env, "c"));
        let log = env.containerd.log_tail(1000);
        assert!(log.contains(said), "{log}");
        // Given up, and not tried again for a while.
        assert_eq!(named(&folder, whole), [""; 0]);
        let failed = named(&folder, |name| name.ends_with(".failed"));
        assert_eq!(failed, [format!("{}.failed", made[0])]);
        ids.push(boot_id(&env, "d"));
        assert_eq!(named(&folder, whole), [""; 0]);

        let all = ids.len();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), all, "each guest has a boot of its own");
        // What is kept between pods on purpose.
        fs::remove_dir_all(folder).unwrap();
        env.assert_clean();
    }
}
