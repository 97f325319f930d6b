//! Every process that a pod consists of is killed at every moment of a pod's life. Afterwards containerd
//! reports the container as ended, nothing is left, and the same name can be used again. The agent's
//! deaths are in failure_agent.rs.

use std::{
    io::Read,
    time::{Duration, Instant},
};

use sealpod_tests::{Env, Version, assets, namespaces::Process, need, only_sealpod, wait};

use crate::on_every_containerd;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Victim {
    Shim,
    Vm,
    Virtiofsd,
    Containerd,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    Idle,
    Create,
    Exec,
    Delete,
}

/// How long containerd may take to notice.
pub(super) const NOTICED: Duration = Duration::from_secs(20);

impl Victim {
    /// What its command line holds; a VM is run by one of two programs.
    fn marks(self) -> &'static [&'static str] {
        match self {
            // Which serves, not the one that starts it and may be gone when the signal comes.
            Self::Shim => &["-socket"],
            Self::Vm => &["qemu-system-x86_64", "sealpod-vmm"],
            Self::Virtiofsd => &["virtiofsd"],
            Self::Containerd => &["--config"],
        }
    }

    pub(super) fn processes(self, env: &Env) -> Vec<Process> {
        let marks = self.marks().iter();
        marks.flat_map(|mark| env.processes(mark)).collect()
    }

    /// Kills all that it consists of; `false` where it does not run.
    fn kill(self, env: &mut Env) -> bool {
        if self == Self::Containerd {
            env.containerd.kill();
            return true;
        }
        let found = self.processes(env);
        for process in &found {
            env.namespaces.kill(process.pid, "KILL");
        }
        !found.is_empty()
    }
}

fn survives(version: Version, victim: Victim, moment: Moment) {
    need!(assets::complete());
    only_sealpod!();
    let mut env = Env::new(version).unwrap();
    let id = env.id("pod");
    match moment {
        Moment::Idle => {
            env.ctr_start(&[], &id, &["sleep", "1000"]);
            assert!(victim.kill(&mut env), "nothing to kill");
        }
        Moment::Create => {
            let args = env.run_args(&["--detach"], &id, &["sleep", "1000"]);
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let mut client = env.spawn("ctr", &args);
            let there = |env: &Env| match victim {
                // At any moment from the first on that there is a shim, or one that starts it.
                Victim::Containerd => !env.processes("containerd-shim-sealpod-v2").is_empty(),
                other => !other.processes(env).is_empty(),
            };
            wait::until("the victim is there", NOTICED, || there(&env).then_some(()));
            victim.kill(&mut env);
            let status = wait::until("the client ends", Duration::from_secs(60), || {
                client.try_wait().unwrap()
            });
            assert!(!status.success() || env.ctr_status(&id).as_deref() != Some("RUNNING"));
        }
        Moment::Exec => {
            env.ctr_start(&[], &id, &["sleep", "1000"]);
            let mut client = env.spawn("ctr", &["task", "exec", "--exec-id", "e", &id, "yes"]);
            let mut out = client.stdout.take().unwrap();
            out.read_exact(&mut vec![0; 100_000]).unwrap();
            victim.kill(&mut env);
            // The client ends, or is ended: what counts is that its stream does.
            let drain = std::thread::spawn(move || std::io::copy(&mut out, &mut std::io::sink()));
            if victim == Victim::Containerd {
                let _ = client.kill();
            }
            let begin = Instant::now();
            while client.try_wait().unwrap().is_none()
                && begin.elapsed() < NOTICED * wait::patience()
            {
                std::thread::sleep(Duration::from_millis(50));
            }
            let _ = client.kill();
            let _ = client.wait();
            for process in env.processes("--exec-id") {
                env.namespaces.kill(process.pid, "KILL");
            }
            let _ = drain.join();
        }
        Moment::Delete => {
            env.ctr_start(&[], &id, &["sleep", "1000"]);
            let _ = env.ctr(&["task", "kill", "-s", "KILL", &id]).ok();
            wait::until("the task has ended", NOTICED, || {
                (env.ctr_status(&id).as_deref() == Some("STOPPED")).then_some(())
            });
            let mut client = env.spawn("ctr", &["task", "delete", &id]);
            victim.kill(&mut env);
            wait::until("the client ends", Duration::from_secs(60), || {
                client.try_wait().unwrap()
            });
        }
    }
    after(&mut env, victim, moment, &id);
}

/// What has to hold whatever was killed whenever.
fn after(env: &mut Env, victim: Victim, moment: Moment, id: &str) {
    if victim == Victim::Containerd {
        env.containerd.start(&env.namespaces).unwrap();
        if matches!(moment, Moment::Idle | Moment::Exec) {
            assert_eq!(
                env.ctr_status(id).as_deref(),
                Some("RUNNING"),
                "pods outlive containerd"
            );
            assert_eq!(
                env.ctr_exec(id, "alive", &["echo", "alive"]).ok().stdout,
                "alive\n"
            );
        }
    } else {
        wait::until("containerd reports the end", NOTICED, || {
            let status = env.ctr_status(id);
            (status.is_none() || status.as_deref() == Some("STOPPED")).then_some(())
        });
    }
    env.ctr_remove(id);
    if moment != Moment::Create {
        env.assert_clean();
    }
    // A shim that was killed before containerd knew it is never asked to delete anything: there, the
    // next start is what cleans up.
    // A containerd that was killed there can leave a snapshot that no container owns; its name is taken.
    let next = match (victim, moment) {
        (Victim::Containerd, Moment::Create) => format!("{id}-next"),
        _ => id.to_owned(),
    };
    assert_eq!(
        env.ctr_run(&[], &next, &["echo", "again"]).ok().stdout,
        "again\n"
    );
    env.assert_clean();
}

on_every_containerd!(
    shim_killed_idle,
    shim_killed_during_create,
    shim_killed_during_exec,
    shim_killed_during_delete,
    vm_killed_idle,
    vm_killed_during_create,
    vm_killed_during_exec,
    vm_killed_during_delete,
    virtiofsd_killed_idle,
    virtiofsd_killed_during_create,
    virtiofsd_killed_during_exec,
    virtiofsd_killed_during_delete,
    containerd_killed_idle,
    containerd_killed_during_create,
    containerd_killed_during_exec,
    containerd_killed_during_delete,
);

/// The names by which the tests above are known.
mod bodies {
    use super::{Moment, Version, Victim, survives};

    macro_rules! cases {
        ($($name:ident $victim:ident $moment:ident),+ $(,)?) => { $(
            pub(super) fn $name(version: Version) {
                survives(version, Victim::$victim, Moment::$moment);
            }
        )+ };
    }

    cases!(
        shim_killed_idle Shim Idle,
        shim_killed_during_create Shim Create,
        shim_killed_during_exec Shim Exec,
        shim_killed_during_delete Shim Delete,
        vm_killed_idle Vm Idle,
        vm_killed_during_create Vm Create,
        vm_killed_during_exec Vm Exec,
        vm_killed_during_delete Vm Delete,
        virtiofsd_killed_idle Virtiofsd Idle,
        virtiofsd_killed_during_create Virtiofsd Create,
        virtiofsd_killed_during_exec Virtiofsd Exec,
        virtiofsd_killed_during_delete Virtiofsd Delete,
        containerd_killed_idle Containerd Idle,
        containerd_killed_during_create Containerd Create,
        containerd_killed_during_exec Containerd Exec,
        containerd_killed_during_delete Containerd Delete,
    );
}
