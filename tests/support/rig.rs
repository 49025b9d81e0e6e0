//! What the contract suite needs of a message system.

use waypost::transport::Transport;

/// A message system under test.
pub trait Rig: Sized {
    type T: Transport;
    /// A confirmed message outlives a SIGKILL of the system.
    const SURVIVES_KILL: bool;
    /// `publish` resolves only when the delivery is acked or rejected: there is no broker in between.
    const CONFIRMS_ON_SETTLE: bool = false;

    /// A running system; `None`, after saying loudly why, if it cannot be had on this machine. Panics instead with `CI=true`.
    async fn start() -> Option<Self>;

    /// Settings that name a stream, queue, subscription … that nobody has used yet.
    fn settings(&mut self) -> <Self::T as Transport>::Settings;

    /// SIGKILL.
    async fn kill(&mut self);

    /// On the same ports, with the same data. Returns once it answers its protocol.
    async fn revive(&mut self);
}
