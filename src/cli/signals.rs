//! The signals that a node takes. None of them ends it without a drain.

use std::process::ExitCode;

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tracing::info;

use super::output::failed;

/// Signals that may wait for the node. A signal that finds no room waits for it.
const WAITING_MAX: usize = 16;

/// The request of a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    Stop,
    Reload,
    Nothing,
}

/// The signals, in the order in which they come.
pub struct Signals(mpsc::Receiver<(&'static str, Wish)>);

impl Signals {
    /// Takes the signals from now on: those that come before [`Signals::next`] wait.
    ///
    /// # Errors
    /// The exit status, after the reason is told.
    pub fn take() -> Result<Self, ExitCode> {
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        for (kind, name, wish) in [
            (SignalKind::terminate(), "SIGTERM", Wish::Stop),
            (SignalKind::interrupt(), "SIGINT", Wish::Stop),
            (SignalKind::quit(), "SIGQUIT", Wish::Stop),
            (SignalKind::hangup(), "SIGHUP", Wish::Reload),
            (SignalKind::user_defined1(), "SIGUSR1", Wish::Nothing),
            (SignalKind::user_defined2(), "SIGUSR2", Wish::Nothing),
        ] {
            let mut signals = signal(kind)
                .map_err(|why| failed(format_args!("cannot wait for {name}: {why}")))?;
            let sender = sender.clone();
            actix_rt::spawn(async move {
                while signals.recv().await.is_some() && sender.send((name, wish)).await.is_ok() {}
            });
        }
        Ok(Self(receiver))
    }

    /// The next signal that asks for anything, with its name. The others are logged.
    pub async fn next(&mut self) -> (&'static str, Wish) {
        loop {
            match self.0.recv().await {
                Some((signal, Wish::Nothing)) => info!(signal, "the signal has no effect"),
                Some(asked) => return asked,
                // The senders live as long as the runtime.
                None => std::future::pending().await,
            }
        }
    }
}
