//! A pod that nobody will ask for: the containerd that had its shim started died before its first
//! request, and a later one may not know of it. Told by the end of the process that called `start`.

use std::{fs::File, io, os::fd::OwnedFd, sync::Arc, time::Duration};

use rustix::process::{PidfdFlags, getppid, pidfd_open};

use crate::{child, pod::Pod};

/// For the first request after the caller's end: `start` may have been called through a program that
/// ends with it.
const GRACE: Duration = Duration::from_secs(3);

/// The caller of this process, to be watched by the serving one; `/dev/null`, which never ends, where the
/// kernel cannot tell (before 5.3).
pub(super) fn caller() -> io::Result<OwnedFd> {
    let pidfd = getppid().map(|pid| pidfd_open(pid, PidfdFlags::empty()));
    match pidfd {
        Some(Ok(pidfd)) => Ok(pidfd),
        _ => Ok(File::open("/dev/null")?.into()),
    }
}

/// Ends `pod` if `caller` ends and nothing is asked of the pod.
pub(super) async fn end_if_abandoned(pod: Arc<Pod>, caller: OwnedFd) {
    let Ok(caller) = child::watch_pidfd(Arc::new(caller)) else {
        return;
    };
    tokio::select! {
        () = pod.asked() => return,
        _ = caller.readable() => {}
    }
    if tokio::time::timeout(GRACE, pod.asked()).await.is_err() {
        tracing::info!("Who started this shim is gone and has asked for nothing: it ends");
        pod.shutdown(true).await;
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use rustix::process::Pid;

    use super::*;

    fn watched(child: &std::process::Child) -> OwnedFd {
        let pid = Pid::from_child(child);
        pidfd_open(pid, PidfdFlags::empty()).expect("pidfd")
    }

    fn ended() -> OwnedFd {
        let mut child = Command::new("true").spawn().expect("spawn");
        let caller = watched(&child);
        child.wait().expect("wait");
        caller
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_was_never_asked_for_ends_after_its_caller() {
        let pod = Pod::for_test();
        tokio::join!(end_if_abandoned(Arc::clone(&pod), ended()), pod.finished());
    }

    #[tokio::test]
    async fn a_pod_whose_caller_lives_or_that_was_asked_for_stays() {
        let mut cat = Command::new("cat");
        let mut child = cat.stdin(Stdio::piped()).spawn().expect("spawn");
        let pod = Pod::for_test();
        let watch = tokio::spawn(end_if_abandoned(Arc::clone(&pod), watched(&child)));
        let sandbox = crate::pod::SandboxRequest {
            bundle: "/nowhere".into(),
            netns: None,
            annotations: Default::default(),
            config: None,
            pod: None,
        };
        pod.create_sandbox(sandbox).expect("created");
        watch.await.expect("watched");
        drop(child.stdin.take());
        child.wait().expect("wait");
        end_if_abandoned(Arc::clone(&pod), ended()).await;
        assert!(!pod.has_finished());
    }
}
