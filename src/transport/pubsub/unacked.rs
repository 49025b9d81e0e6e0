//! The deliveries that have no verdict, and the acks that are about to be sent.

use std::{collections::HashMap, sync::Arc, time::Duration};

use google_cloud_pubsub::subscriber::handler::Handler;
use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::OwnedSemaphorePermit, time::sleep};

use super::{from_service, stream::Leased};
use crate::{delivery::Verdict, transport::Incoming};

/// How long an ack waits for others, so that together they wake the client's thread once. The
/// client sends acks every 100 ms.
const LINGER: Duration = Duration::from_millis(10);

#[derive(Default)]
pub(super) struct UnackedHandlers(Mutex<Handlers>);

#[derive(Default)]
struct Handlers {
    is_closed: bool,
    next_key: u64,
    by_key: HashMap<u64, Handler>,
    /// Handlers to ack together, each with its share of the messages that may be leased.
    acked: Vec<(Handler, OwnedSemaphorePermit)>,
}

impl UnackedHandlers {
    /// `None` after [`Self::give_back`]. Delays run on `runtime`.
    pub(super) fn deliver(self: &Arc<Self>, leased: Leased, runtime: &Handle) -> Option<Incoming> {
        let Leased {
            message,
            handler,
            permit,
        } = leased;
        let attempt = handler.delivery_attempt();
        let redelivered = attempt.is_some_and(|attempt| attempt > 1);
        let key = {
            let mut handlers = self.0.lock();
            if handlers.is_closed {
                return None;
            }
            let key = handlers.next_key;
            handlers.next_key += 1;
            handlers.by_key.insert(key, handler);
            key
        };
        let unacked = Arc::clone(self);
        let runtime = runtime.clone();
        let settle = move |verdict| {
            // It is absent if `close` has given it back.
            let Some(handler) = unacked.0.lock().by_key.remove(&key) else {
                return;
            };
            match verdict {
                Verdict::Ack | Verdict::Reject => unacked.ack_soon((handler, permit), &runtime),
                Verdict::Unsettled => handler.nack(),
                // The service has no delayed nack, so the lease is extended until the delay is
                // over.
                Verdict::RetryAfter(delay) => {
                    runtime.spawn(async move {
                        sleep(delay).await;
                        handler.nack();
                        drop(permit);
                    });
                }
            }
        };
        Some(Incoming::new(from_service(message), redelivered, settle))
    }

    /// Acks at most [`LINGER`] later. If the runtime has ended, so has the stream, and the message
    /// is redelivered.
    fn ack_soon(self: &Arc<Self>, acked: (Handler, OwnedSemaphorePermit), runtime: &Handle) {
        let is_first = {
            let mut handlers = self.0.lock();
            handlers.acked.push(acked);
            handlers.acked.len() == 1
        };
        if is_first {
            let unacked = Arc::clone(self);
            runtime.spawn(async move {
                sleep(LINGER).await;
                let acked = std::mem::take(&mut unacked.0.lock().acked);
                for (handler, _) in acked {
                    handler.ack();
                }
            });
        }
    }

    /// Acks what is to be acked and nacks all other messages. Delivers nothing from now on.
    pub(super) fn give_back(&self) {
        let mut handlers = self.0.lock();
        handlers.is_closed = true;
        for (handler, _) in handlers.acked.drain(..) {
            handler.ack();
        }
        for (_, handler) in handlers.by_key.drain() {
            handler.nack();
        }
    }
}
