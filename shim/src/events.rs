//! Task events to containerd's ttrpc socket, in the order they happened. Knows no pod.
//!
//! One task sends; an event that containerd does not take (it may be restarting) is tried again before
//! the next one, for at most [`GIVE_UP`]; then it is dropped with a log line. The queue is bounded.

use std::time::Duration;

use containerd_shim::{event::Event, util::convert_to_any};
use containerd_shim_protos::{
    api::ForwardRequest,
    shim::event::Envelope,
    shim_async::{Client, EventsClient},
    ttrpc::context,
};
use tokio::sync::{mpsc, oneshot};

use crate::clock;

const QUEUE: usize = 1024;
/// How long one event is offered to a containerd that does not answer.
const GIVE_UP: Duration = Duration::from_secs(20);
const RETRY: Duration = Duration::from_millis(200);
/// containerd answers a forward in microseconds; one that hangs is treated like one that is away.
const CALL_NS: i64 = 5_000_000_000;

#[derive(Debug)]
enum Item {
    Event(Envelope),
    Flush(oneshot::Sender<()>),
}

/// Handle to the sending task.
#[derive(Debug, Clone)]
pub struct Publisher {
    queue: mpsc::Sender<Item>,
    namespace: String,
}

impl Publisher {
    /// `address` is containerd's ttrpc socket (a path, with or without `unix://`). Connects at the first
    /// event, so a containerd that is away does not stop a shim from starting.
    #[must_use]
    pub fn new(address: &str, namespace: &str) -> Self {
        let path = address.strip_prefix("unix://").unwrap_or(address);
        let (queue, items) = mpsc::channel(QUEUE);
        tokio::spawn(send_all(format!("unix://{path}"), items));
        Self {
            queue,
            namespace: namespace.to_owned(),
        }
    }

    /// Queues `event`; waits only when [`QUEUE`] events are waiting.
    pub async fn publish(&self, event: impl Event) {
        let topic = event.topic();
        let packed = match convert_to_any(Box::new(event)) {
            Ok(p) => p,
            Err(e) => return tracing::error!(topic, "Event could not be encoded: {e}"),
        };
        let envelope = Envelope {
            timestamp: Some(clock::now_timestamp()).into(),
            namespace: self.namespace.clone(),
            topic,
            event: Some(packed).into(),
            ..Default::default()
        };
        if let Err(lost) = self.queue.send(Item::Event(envelope)).await {
            tracing::error!("Event lost, the publisher has ended: {:?}", lost.0);
        }
    }

    /// Returns when every event queued so far was sent or given up.
    pub async fn flush(&self) {
        let (done, wait) = oneshot::channel();
        if self.queue.send(Item::Flush(done)).await.is_ok() {
            let _ = wait.await;
        }
    }
}

async fn send_all(address: String, mut items: mpsc::Receiver<Item>) {
    let mut client: Option<EventsClient> = None;
    while let Some(item) = items.recv().await {
        match item {
            Item::Flush(done) => {
                let _ = done.send(());
            }
            Item::Event(envelope) => {
                let sending = send_one(&address, &mut client, &envelope);
                if tokio::time::timeout(GIVE_UP, sending).await.is_err() {
                    tracing::error!(topic = envelope.topic, "containerd did not take the event");
                }
            }
        }
    }
}

async fn send_one(address: &str, client: &mut Option<EventsClient>, envelope: &Envelope) {
    let request = ForwardRequest {
        envelope: Some(envelope.clone()).into(),
        ..Default::default()
    };
    loop {
        if client.is_none() {
            *client = Client::connect(address).await.ok().map(EventsClient::new);
        }
        if let Some(c) = client {
            match c.forward(context::with_timeout(CALL_NS), &request).await {
                Ok(_) => return,
                Err(e) => {
                    tracing::debug!("Event not taken, trying again: {e}");
                    *client = None;
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use containerd_shim_protos::{
        api::Empty,
        events::task as ev,
        shim_async::{Events, create_events},
        ttrpc::{
            self,
            asynchronous::{Server, TtrpcContext},
        },
    };

    use super::*;

    struct Sink(mpsc::Sender<String>);

    #[async_trait::async_trait]
    impl Events for Sink {
        async fn forward(&self, _: &TtrpcContext, r: ForwardRequest) -> ttrpc::Result<Empty> {
            let e = &r.envelope;
            let _ = self.0.send(format!("{} {}", e.namespace, e.topic)).await;
            Ok(Empty::default())
        }
    }

    #[tokio::test]
    async fn events_arrive_in_order_though_containerd_starts_late() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let address = format!("unix://{}/c.ttrpc", dir.path().display());
        let publisher = Publisher::new(&address, "ns");
        publisher.publish(ev::TaskStart::new()).await;
        publisher.publish(ev::TaskExit::new()).await;
        let (tx, mut rx) = mpsc::channel(4);
        let mut server = Server::new()
            .bind(&address)?
            .register_service(create_events(Arc::new(Sink(tx))));
        server.start().await?;
        publisher.flush().await;
        assert_eq!(rx.recv().await.as_deref(), Some("ns /tasks/start"));
        assert_eq!(rx.recv().await.as_deref(), Some("ns /tasks/exit"));
        Ok(())
    }
}
