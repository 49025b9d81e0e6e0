//! What follows the end of an actor. Pure.

use super::{CRASHES_MAX, Exit};

/// What was last asked of an actor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DesiredState {
    Running,
    Restarted,
    Paused,
}

/// What follows an [`Exit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RestartDecision {
    StartNow,
    BackOff,
    Pause,
    GiveUp,
}

impl RestartDecision {
    /// The table of the supervisor's documentation. `crashes` counts those of the last minute, this one included.
    pub(super) fn after(exit: &Exit, wish: DesiredState, crashes: usize) -> Self {
        match (wish, exit) {
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
    use super::*;

    #[test]
    fn what_follows_an_end_is_this_table() {
        let failed = || Exit::Failed("x".into());
        let panicked = || Exit::Panicked("x".into());
        let stalled = || Exit::Stalled("x".into());
        for (exit, wish, crashes, next) in [
            (
                Exit::Stopped,
                DesiredState::Paused,
                0,
                RestartDecision::Pause,
            ),
            (failed(), DesiredState::Paused, 0, RestartDecision::Pause),
            (panicked(), DesiredState::Paused, 9, RestartDecision::Pause),
            (
                Exit::Stopped,
                DesiredState::Restarted,
                0,
                RestartDecision::StartNow,
            ),
            (
                stalled(),
                DesiredState::Restarted,
                9,
                RestartDecision::StartNow,
            ),
            (
                Exit::Stopped,
                DesiredState::Running,
                0,
                RestartDecision::BackOff,
            ),
            (failed(), DesiredState::Running, 0, RestartDecision::BackOff),
            (failed(), DesiredState::Running, 9, RestartDecision::BackOff),
            (
                panicked(),
                DesiredState::Running,
                4,
                RestartDecision::BackOff,
            ),
            (
                panicked(),
                DesiredState::Running,
                5,
                RestartDecision::GiveUp,
            ),
            (
                stalled(),
                DesiredState::Running,
                4,
                RestartDecision::BackOff,
            ),
            (stalled(), DesiredState::Running, 5, RestartDecision::GiveUp),
        ] {
            assert_eq!(
                RestartDecision::after(&exit, wish, crashes),
                next,
                "{exit:?} {wish:?} {crashes}"
            );
        }
    }
}
