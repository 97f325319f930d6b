//! One task owns a piece of state; everything else sends it work to do. Knows nothing of pods.
//!
//! Work runs one piece at a time, in the order it was sent, and may await while it holds the state.
//! A sender that goes away does not stop what it has begun.

use futures_util::future::BoxFuture;
use tokio::sync::{mpsc, oneshot};

type Job<S> = Box<dyn for<'a> FnOnce(&'a mut S) -> BoxFuture<'a, ()> + Send>;

/// Work that may wait to be taken before senders have to wait themselves.
const QUEUE: usize = 64;

/// The owner's task has ended (only at the end of the process).
#[derive(Debug, thiserror::Error)]
#[error("The task that owns this state has ended")]
pub struct Gone;

/// Handle to a task that owns an `S`.
pub struct Owner<S> {
    jobs: mpsc::Sender<Job<S>>,
}

impl<S> std::fmt::Debug for Owner<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Owner")
    }
}

impl<S> Clone for Owner<S> {
    fn clone(&self) -> Self {
        Self {
            jobs: self.jobs.clone(),
        }
    }
}

impl<S: Send + 'static> Owner<S> {
    /// Starts the task. It ends when the last handle is dropped.
    #[must_use]
    pub fn spawn(mut state: S) -> Self {
        let (jobs, mut queue) = mpsc::channel::<Job<S>>(QUEUE);
        tokio::spawn(async move {
            while let Some(job) = queue.recv().await {
                job(&mut state).await;
            }
        });
        Self { jobs }
    }

    /// Runs `work` on the state and returns what it returned.
    ///
    /// # Errors
    /// [`Gone`] when the owner's task has ended.
    pub async fn call<R, F>(&self, work: F) -> Result<R, Gone>
    where
        R: Send + 'static,
        F: for<'a> FnOnce(&'a mut S) -> BoxFuture<'a, R> + Send + 'static,
    {
        let (done, result) = oneshot::channel();
        let job: Job<S> = Box::new(move |state| {
            Box::pin(async move {
                // The caller may have gone; what was begun is finished all the same.
                let _ = done.send(work(state).await);
            })
        });
        self.jobs.send(job).await.map_err(|_| Gone)?;
        result.await.map_err(|_| Gone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_runs_in_order_and_survives_its_caller() {
        let owner = Owner::spawn(Vec::new());
        let (hold, held) = oneshot::channel::<()>();
        let first = owner.clone();
        let caller = tokio::spawn(async move {
            first
                .call(|v: &mut Vec<u8>| {
                    Box::pin(async move {
                        held.await.ok();
                        v.push(1);
                    })
                })
                .await
        });
        tokio::task::yield_now().await;
        caller.abort();
        hold.send(()).ok();
        let seen = owner
            .call(|v| {
                Box::pin(async move {
                    v.push(2);
                    v.clone()
                })
            })
            .await;
        assert_eq!(seen.ok(), Some(vec![1, 2]));
    }
}
