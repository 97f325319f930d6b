//! How the ends of processes are learned and told: each once, those of execs before that of the container
//! which took them along.

use std::time::Duration;

use containerd_shim_protos::events::task as ev;
use tokio::sync::watch;

use super::{Container, Exit, Handle, Phase, Process};
use crate::{guest::Guest, io};

/// How long the exit of a container may wait for those of its execs. Normally they come with it.
const EXECS: Duration = Duration::from_secs(2);

impl Handle {
    /// See [`crate::pod::Pod`]: the VM has ended, and every process with it.
    pub async fn vm_ended(&self) {
        let done = self
            .owner
            .call(|c| Box::pin(async move { c.vm_ended().await }))
            .await;
        if let Err(e) = done {
            tracing::error!("{e}");
        }
    }

    /// Waits in the background for the end of a process in the guest, and tells it.
    pub(super) fn watch(&self, guest: Guest, id: String, exec_id: String, drain: io::Drain) {
        let handle = self.clone();
        tokio::spawn(async move {
            let request = Guest::process(&id, &exec_id);
            let exit = match guest.agent().wait(Guest::whenever(), &request).await {
                Ok(w) => {
                    drain.wait(w.stdout_bytes, w.stderr_bytes).await;
                    Exit {
                        status: w.exit_status,
                        at_ns: w.exited_at_unix_ns,
                    }
                }
                Err(e) => {
                    tracing::warn!(id, exec_id, "Exit not told by the guest: {e}");
                    killed_with_vm()
                }
            };
            if exec_id.is_empty() {
                handle.execs_told().await;
            }
            let told = handle
                .owner
                .call(move |c| Box::pin(async move { c.exited(&exec_id, exit).await }));
            if let Err(e) = told.await {
                tracing::error!("{e}");
            }
        });
    }

    /// Returns when the exits of all execs are told, but for those whose clients take no output. With init
    /// they end; told after it, a client would have deleted the task, and would never let go of their
    /// streams.
    async fn execs_told(&self) {
        let running = self
            .owner
            .call(|c| Box::pin(async move { c.running_execs() }));
        let told = all_told(running.await.unwrap_or_default());
        if tokio::time::timeout(EXECS, told).await.is_err() {
            tracing::info!(
                "A container's exit is told before those of its execs: their output is stuck"
            );
        }
    }
}

async fn all_told(execs: Vec<watch::Receiver<Option<Exit>>>) {
    for mut exited in execs {
        // One that is deleted meanwhile is over, too.
        let _ = exited.wait_for(Option::is_some).await;
    }
}

impl Container {
    /// Records that a process has ended, and tells it once. For init, everything else in the container
    /// has ended too.
    pub(super) async fn exited(&mut self, exec_id: &str, exit: Exit) {
        let pid = self.pid();
        let Ok(process) = self.process(exec_id) else {
            return;
        };
        if !process.stop(exit) {
            return;
        }
        if exec_id.is_empty() {
            self.paused = false;
        }
        let event = ev::TaskExit {
            container_id: self.id.clone(),
            id: if exec_id.is_empty() {
                self.id.clone()
            } else {
                exec_id.into()
            },
            pid,
            exit_status: exit.status,
            exited_at: Some(crate::clock::timestamp(exit.at_ns)).into(),
            ..Default::default()
        };
        self.publish(event).await;
        if exec_id.is_empty() && self.alone {
            // Nothing can run again in the VM of a pod that is one container: it goes when all is told,
            // not when somebody comes to delete the task.
            self.pod.stop_vm_after(all_told(self.running_execs()));
        }
    }

    /// What waits for the exits of the execs that run.
    fn running_execs(&self) -> Vec<watch::Receiver<Option<Exit>>> {
        let running = self.execs.values().filter(|p| p.phase == Phase::Running);
        running.map(Process::exited).collect()
    }

    async fn vm_ended(&mut self) {
        let running: Vec<String> = self
            .execs
            .iter()
            .filter(|(_, p)| p.phase == Phase::Running)
            .map(|(id, _)| id.clone())
            .collect();
        for exec_id in running {
            self.exited(&exec_id, killed_with_vm()).await;
        }
        self.exited("", killed_with_vm()).await;
    }
}

/// Reports an exit that the guest can no longer tell: SIGKILL's.
fn killed_with_vm() -> Exit {
    Exit {
        status: 128 + 9,
        at_ns: crate::clock::unix_ns(),
    }
}
