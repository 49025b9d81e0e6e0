//! The ends of an actor, and the decision that follows each. Pure.

use std::time::Duration;

/// The first back-off is at most this.
pub const BACKOFF_FIRST: Duration = Duration::from_millis(50);
/// No back-off is longer: a broker that answers again is found within a second.
pub const BACKOFF_CAP: Duration = Duration::from_secs(1);
/// After this time up, the back-off starts again at its first step; older crashes are forgotten.
pub const HEALTHY: Duration = Duration::from_mins(1);
/// An actor that crashes (panics or stalls) this often within [`HEALTHY`] is given up.
pub const CRASHES_MAX: usize = 5;
/// The time between two heartbeats, and the longest that an answer may take.
pub const HEARTBEAT: Duration = Duration::from_secs(3);
/// An actor that misses this many heartbeats in a row has stalled.
pub const MISSES_MAX: u8 = 2;
/// An actor that was asked to finish is killed after this time.
pub const DRAIN_MAX: Duration = Duration::from_secs(4);

/// An actor that has not started after this time waits for a thread that is blocked.
pub const START_MAX: Duration = Duration::from_secs(10);

/// How an actor ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// As it was asked to.
    Stopped,
    /// Something that it depends on failed, such as its broker.
    Failed(String),
    /// Its own code panicked.
    Panicked(String),
    /// It was alive and made no progress.
    Stalled(String),
    /// It was asked to finish, and took longer than [`DRAIN_MAX`].
    Unfinished,
}

impl Exit {
    /// Why it was not as it should be, if it was not.
    pub(super) fn reason(&self) -> Option<&str> {
        match self {
            Self::Stopped => None,
            Self::Failed(why) | Self::Panicked(why) | Self::Stalled(why) => Some(why),
            Self::Unfinished => Some("did not finish in time"),
        }
    }
}

/// The state last asked of an actor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DesiredState {
    Running,
    Restarted,
    Paused,
}

/// The step after an [`Exit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RestartDecision {
    StartNow,
    BackOff,
    Pause,
    GiveUp,
}

impl RestartDecision {
    /// The table of the supervisor's documentation. `crashes` counts the last minute's, with this
    /// one.
    pub(super) fn after(exit: &Exit, desired: DesiredState, crashes: usize) -> Self {
        match (desired, exit) {
            (DesiredState::Paused, _) => Self::Pause,
            (DesiredState::Restarted, _) => Self::StartNow,
            (DesiredState::Running, Exit::Panicked(_) | Exit::Stalled(_))
                if crashes >= CRASHES_MAX =>
            {
                Self::GiveUp
            }
            (DesiredState::Running, _) => Self::BackOff,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        DesiredState::{Paused, Restarted, Running},
        RestartDecision::{BackOff, GiveUp, Pause, StartNow},
        *,
    };

    #[test]
    fn each_exit_leads_to_the_decision_of_the_table() {
        let failed = || Exit::Failed("x".into());
        let panicked = || Exit::Panicked("x".into());
        let stalled = || Exit::Stalled("x".into());
        for (exit, desired, crashes, decision) in [
            (Exit::Stopped, Paused, 0, Pause),
            (failed(), Paused, 0, Pause),
            (panicked(), Paused, 9, Pause),
            (Exit::Stopped, Restarted, 0, StartNow),
            (stalled(), Restarted, 9, StartNow),
            (Exit::Unfinished, Paused, 9, Pause),
            (Exit::Unfinished, Restarted, 9, StartNow),
            (Exit::Stopped, Running, 0, BackOff),
            (failed(), Running, 0, BackOff),
            (failed(), Running, 9, BackOff),
            (panicked(), Running, 4, BackOff),
            (panicked(), Running, 5, GiveUp),
            (stalled(), Running, 4, BackOff),
            (stalled(), Running, 5, GiveUp),
        ] {
            assert_eq!(
                RestartDecision::after(&exit, desired, crashes),
                decision,
                "{exit:?} {desired:?} {crashes}"
            );
        }
    }
}
