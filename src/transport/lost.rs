//! Whether a connection is lost, and why.

use std::{fmt::Display, sync::Arc};

use tokio::sync::watch;

use super::TransportError;

/// The first reason for the loss of a connection. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Lost(watch::Sender<Option<Arc<str>>>);

impl Lost {
    /// Declares the connection lost. Later reasons are consequences of the first and are ignored.
    pub(super) fn set(&self, why: impl Display) {
        self.0.send_if_modified(|first| {
            let is_first = first.is_none();
            if is_first {
                *first = Some(why.to_string().into());
            }
            is_first
        });
    }

    pub(super) fn is_set(&self) -> bool {
        self.0.borrow().is_some()
    }

    /// Resolves with the reason once the connection is lost.
    pub(super) async fn wait(&self) -> TransportError {
        let mut reason = self.0.subscribe();
        // The wait cannot fail: `self` keeps the sender.
        let why = reason.wait_for(Option::is_some).await;
        let why = why.ok().and_then(|why| why.clone());
        TransportError::Lost(why.as_deref().unwrap_or("closed").to_owned())
    }

    /// The output of `work`. Fails with the reason if the connection is lost first.
    pub(super) async fn guard<F: Future>(&self, work: F) -> Result<F::Output, TransportError> {
        if self.is_set() {
            return Err(self.wait().await);
        }
        tokio::select! {
            biased;
            output = work => Ok(output),
            lost = self.wait() => Err(lost),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_reason_of_a_loss_stays() {
        let lost = Lost::default();
        assert!(!lost.is_set());
        assert_eq!(lost.guard(async { 1 }).await, Ok(1));
        lost.clone().set("refused");
        lost.set("closed");
        assert!(lost.is_set());
        let refused = TransportError::Lost("refused".into());
        assert_eq!(lost.wait().await, refused);
        assert_eq!(lost.guard(async { 1 }).await, Err(refused));
    }
}
