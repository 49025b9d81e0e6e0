//! TLS handshakes: how many there are at a time, and that none holds up the server's end.

use std::{cell::RefCell, collections::BTreeMap, io, rc::Rc, time::Duration};

use actix_server::GracefulShutdownSignal;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    select,
    sync::oneshot,
};
use tokio_rustls::server::TlsStream;

use super::early_ends::{EarlyEnd, EarlyEnds};
use crate::secrets::ServingTls;

/// The most handshakes of a thread. Each takes some 20 KiB, and an honest one less than a second.
const HANDSHAKES_MAX: usize = 1024;

/// The handshakes of one thread. When there are too many, the oldest one ends: so a flood of clients
/// that never answer ends its own, and an honest client, which answers at once, gets in.
pub struct Handshakes {
    running: Rc<RefCell<RunningHandshakes>>,
    max: usize,
    stopping: GracefulShutdownSignal,
    ends: EarlyEnds,
}

/// By their numbers, in the order in which they began. A handshake hears its end when the sender is
/// dropped.
#[derive(Default)]
struct RunningHandshakes {
    next: u64,
    ends: BTreeMap<u64, oneshot::Sender<()>>,
}

/// The place of a handshake. Dropped, it is free.
struct HandshakePlace {
    number: u64,
    running: Rc<RefCell<RunningHandshakes>>,
}

impl Drop for HandshakePlace {
    fn drop(&mut self) {
        self.running.borrow_mut().ends.remove(&self.number);
    }
}

impl Handshakes {
    /// They take half of `connections` at most, and end when the server is `stopping`.
    pub fn new(connections: usize, stopping: GracefulShutdownSignal, ends: EarlyEnds) -> Self {
        Self {
            running: Rc::default(),
            max: (connections / 2).clamp(1, HANDSHAKES_MAX),
            stopping,
            ends,
        }
    }

    /// Waits for the client's handshake.
    ///
    /// # Errors
    /// If it fails, is not over within `patience`, or has to end before.
    pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        tls: &ServingTls,
        stream: S,
        patience: Duration,
    ) -> io::Result<TlsStream<S>> {
        let (_place, ended) = self.begin();
        select! {
            biased;
            accepted = tls.accept(stream, patience) => accepted.inspect_err(|why| {
                if why.kind() == io::ErrorKind::TimedOut {
                    self.ends.count(EarlyEnd::HandshakeLate);
                }
            }),
            _ = ended => {
                let max = self.max;
                Err(io::Error::other(format!("more than {max} handshakes at a time")))
            }
            () = self.stopping.notified() => Err(io::Error::other("the server stops")),
        }
    }

    fn begin(&self) -> (HandshakePlace, oneshot::Receiver<()>) {
        let mut running = self.running.borrow_mut();
        if running.ends.len() >= self.max && running.ends.pop_first().is_some() {
            self.ends.count(EarlyEnd::HandshakeEvicted);
        }
        let number = running.next;
        running.next += 1;
        let (end, ended) = oneshot::channel();
        running.ends.insert(number, end);
        let running = Rc::clone(&self.running);
        (HandshakePlace { number, running }, ended)
    }
}
