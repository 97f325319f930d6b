//! Where the runtime's streaming server is to be reached for one stream.

use k8s_cri::v1 as api;
use tonic::Status;

use super::{Cri, Pod};

impl Cri {
    /// URL of a streaming exec.
    ///
    /// # Errors
    /// The server's.
    pub fn exec_url(
        &self,
        id: &str,
        command: &[&str],
        tty: bool,
        stdin: bool,
    ) -> Result<String, Status> {
        let request = api::ExecRequest {
            container_id: id.into(),
            cmd: command.iter().map(|&w| w.into()).collect(),
            tty,
            stdin,
            stdout: true,
            stderr: !tty,
        };
        Ok(self.call(async |c| c.exec(request).await)?.url)
    }

    /// URL of an attach.
    ///
    /// # Errors
    /// The server's.
    pub fn attach_url(&self, id: &str, stdin: bool) -> Result<String, Status> {
        let request = api::AttachRequest {
            container_id: id.into(),
            stdin,
            tty: false,
            stdout: true,
            stderr: true,
        };
        Ok(self.call(async |c| c.attach(request).await)?.url)
    }

    /// URL of a port-forward to one port.
    ///
    /// # Errors
    /// The server's.
    pub fn port_forward_url(&self, pod: &Pod, port: i32) -> Result<String, Status> {
        let request = api::PortForwardRequest {
            pod_sandbox_id: pod.id.clone(),
            port: vec![port],
        };
        Ok(self.call(async |c| c.port_forward(request).await)?.url)
    }
}
