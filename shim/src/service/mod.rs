//! containerd's requests, translated into the pod's words: Task v2 and v3 and the Sandbox service, all
//! from one implementation. Keeps no state.

mod convert;
mod sandbox;
mod task;

use std::{collections::HashMap, sync::Arc};

use containerd_shim_protos::{sandbox_async::create_sandbox, shim_async::create_task};
use ttrpc::r#async::Service;

pub(crate) use convert::config_path;

use crate::pod::Pod;

/// Versions of the Task service. Their messages are the same, only the package differs.
const TASK_V2: &str = "containerd.task.v2.Task";
const TASK_V3: &str = "containerd.task.v3.Task";

/// Everything that the shim's socket serves, by service name.
#[must_use]
pub fn all(pod: &Arc<Pod>) -> HashMap<String, Service> {
    let task = Arc::new(task::TaskService::new(Arc::clone(pod)));
    let mut services = create_task(task.clone());
    if let Some(v2) = create_task(task).remove(TASK_V3) {
        services.insert(TASK_V2.into(), v2);
    }
    services.extend(create_sandbox(Arc::new(sandbox::SandboxService::new(
        Arc::clone(pod),
    ))));
    services
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn both_task_versions_and_the_sandbox_are_served() {
        let services = all(&Pod::for_test());
        let mut names: Vec<_> = services.keys().map(String::as_str).collect();
        names.sort_unstable();
        assert_eq!(
            names,
            ["containerd.runtime.sandbox.v1.Sandbox", TASK_V2, TASK_V3]
        );
        assert_eq!(
            services[TASK_V2].methods.len(),
            services[TASK_V3].methods.len()
        );
    }
}
