//! The control connection: what the shim asks, as `protocol/proto/vmm.proto` has it, done to one
//! machine ([`running`]). Descriptors come in here and become devices; the machine itself is
//! `machine`'s.
//!
//! ```text
//!  nothing ── Create, Restore ──▶ paused ◀── Pause, Resume ──▶ running
//!                                    └── the guest ends, KVM fails, Stop ──▶ ended: told, and the process goes
//! ```

mod events;
mod inherited;
mod running;

use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use sealpod_protocol::vmm::{
    BalloonRequest, BalloonResponse, CreateRequest, Description, Disk, Empty, Event, Nic,
    RemoveDiskRequest, RemoveNicRequest, RestoreRequest,
};
use sealpod_protocol::vmm_ttrpc::{Vmm, create_vmm};
use ttrpc::r#async::transport::Listener;
use ttrpc::r#async::{Server, TtrpcContext};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::machine;
use crate::snapshot::Files;
use events::{End, Events};
use inherited::Inherited;
use running::Running;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Serves the shim on descriptor `control`, with `descriptors` as the socket over which further ones
/// come, until the guest ends or the shim wants it to.
///
/// # Errors
/// The descriptors are not what they should be, or the machine fails.
pub async fn serve(control: RawFd, descriptors: RawFd) -> Result<(), Failure> {
    let inherited = Inherited::default();
    let control = UnixStream::from(inherited.take(control)?);
    control.set_nonblocking(true)?;
    let control = tokio::net::UnixStream::from_std(control)?;
    let descriptors = UnixStream::from(inherited.take(descriptors)?);
    descriptors.set_nonblocking(true)?;
    let events = Arc::new(Events::default());
    let service = Service {
        descriptors,
        inherited,
        events: Arc::clone(&events),
        vm: Mutex::default(),
    };
    let only = futures_util::stream::iter([Ok(control)]);
    let mut server = Server::new()
        .register_service(create_vmm(Arc::new(service)))
        .add_listener(Listener::new(only));
    server.start().await?;
    let end = events.ended().await;
    // What was asked is answered first, and who waits for an event hears of this one.
    server.disconnect().await;
    match end {
        Some(End::Machine(machine::End::Failed(why))) => Err(why.into()),
        _ => Ok(()),
    }
}

struct Service {
    inherited: Inherited,
    descriptors: UnixStream,
    events: Arc<Events>,
    vm: Mutex<Option<Running>>,
}

impl Service {
    /// Makes the machine, once.
    fn make(&self, make: impl FnOnce() -> Result<Running, Failure>) -> Result<(), Failure> {
        let mut vm = lock(&self.vm);
        if vm.is_some() {
            return Err("There is a machine already".into());
        }
        *vm = Some(make()?);
        Ok(())
    }

    fn with<T>(&self, act: impl FnOnce(&mut Running) -> Result<T, Failure>) -> Result<T, Failure> {
        match lock(&self.vm).as_mut() {
            Some(running) => act(running),
            None => Err("There is no machine yet".into()),
        }
    }

    /// A descriptor that the shim has just sent.
    fn sent(&self) -> Result<OwnedFd, Failure> {
        let mut byte = [0];
        let (_, file) = self.descriptors.recv_with_fd(&mut byte)?;
        Ok(file.ok_or("No descriptor was sent")?.into())
    }

    fn save(&self) -> Result<(), Failure> {
        let files = Files {
            state: self.sent()?.into(),
            memory: self.sent()?.into(),
        };
        self.with(|running| Ok(running.machine().save(&files)?))
    }

    fn stop(&self) {
        if let Some(running) = lock(&self.vm).as_ref() {
            running.machine().stop();
        }
        self.events.end(End::Stopped);
    }
}

/// A failure as ttrpc tells it, with its causes.
fn refused(failure: Failure) -> ttrpc::Error {
    let mut text = failure.to_string();
    let mut source = failure.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::FAILED_PRECONDITION, text))
}

fn done(result: Result<(), Failure>) -> ttrpc::Result<Empty> {
    result.map(|()| Empty::new()).map_err(refused)
}

#[async_trait]
impl Vmm for Service {
    async fn create(&self, _: &TtrpcContext, request: CreateRequest) -> ttrpc::Result<Empty> {
        done(self.make(|| Running::create(&request, &self.inherited, &self.events)))
    }

    async fn restore(&self, _: &TtrpcContext, request: RestoreRequest) -> ttrpc::Result<Empty> {
        done(self.make(|| Running::restore(&request, &self.inherited, &self.events)))
    }

    async fn save(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        done(self.save())
    }

    async fn resume(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        done(self.with(|running| {
            running.machine().resume();
            Ok(())
        }))
    }

    async fn pause(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        done(self.with(|running| {
            running.machine().pause();
            Ok(())
        }))
    }

    async fn add_disk(&self, _: &TtrpcContext, disk: Disk) -> ttrpc::Result<Empty> {
        let sent = self.sent();
        done(sent.and_then(|file| self.with(|running| running.add_disk(file, &disk))))
    }

    async fn add_nic(&self, _: &TtrpcContext, nic: Nic) -> ttrpc::Result<Empty> {
        let sent = self.sent();
        done(sent.and_then(|tap| self.with(|running| running.add_nic(tap, &nic))))
    }

    async fn add_share(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        let sent = self.sent();
        done(sent.and_then(|daemon| self.with(|running| running.add_share(daemon))))
    }

    async fn remove_disk(
        &self,
        _: &TtrpcContext,
        request: RemoveDiskRequest,
    ) -> ttrpc::Result<Empty> {
        done(self.with(|running| running.remove_disk(&request.serial)))
    }

    async fn remove_nic(
        &self,
        _: &TtrpcContext,
        request: RemoveNicRequest,
    ) -> ttrpc::Result<Empty> {
        done(self.with(|running| running.remove_nic(&request.mac)))
    }

    async fn set_balloon(
        &self,
        _: &TtrpcContext,
        request: BalloonRequest,
    ) -> ttrpc::Result<BalloonResponse> {
        let bytes = self.with(|running| Ok(running.set_balloon(request.bytes)));
        Ok(BalloonResponse {
            bytes: bytes.map_err(refused)?,
            ..Default::default()
        })
    }

    async fn next_event(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Event> {
        let next = self.events.next().await;
        next.ok_or_else(|| refused("The machine has ended".into()))
    }

    async fn describe(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Description> {
        let lines = self.with(|running| Ok(running.machine().describe()?));
        Ok(Description {
            lines: lines.map_err(refused)?,
            ..Default::default()
        })
    }

    async fn stop(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.stop();
        Ok(Empty::new())
    }
}

/// A poisoned lock means that a thread has panicked; what it guards is still whole.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
