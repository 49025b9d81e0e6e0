//! What follows the end of an actor. Pure.

use super::{CRASHES_MAX, Exit};

/// What was last asked of an actor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    Run,
    Restart,
    Rest,
}

/// What follows an [`Exit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    StartNow,
    BackOff,
    Rest,
    GiveUp,
}

impl Next {
    /// The table of the supervisor's documentation. `crashes` counts those of the last minute, this one included.
    pub(super) fn after(exit: &Exit, wish: Wish, crashes: usize) -> Self {
        match (wish, exit) {
            (Wish::Rest, _) => Self::Rest,
            (Wish::Restart, _) => Self::StartNow,
            (Wish::Run, Exit::Panicked(_) | Exit::Stalled(_)) if crashes >= CRASHES_MAX => {
                Self::GiveUp
            }
            (Wish::Run, _) => Self::BackOff,
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
            (Exit::Stopped, Wish::Rest, 0, Next::Rest),
            (failed(), Wish::Rest, 0, Next::Rest),
            (panicked(), Wish::Rest, 9, Next::Rest),
            (Exit::Stopped, Wish::Restart, 0, Next::StartNow),
            (stalled(), Wish::Restart, 9, Next::StartNow),
            (Exit::Stopped, Wish::Run, 0, Next::BackOff),
            (failed(), Wish::Run, 0, Next::BackOff),
            (failed(), Wish::Run, 9, Next::BackOff),
            (panicked(), Wish::Run, 4, Next::BackOff),
            (panicked(), Wish::Run, 5, Next::GiveUp),
            (stalled(), Wish::Run, 4, Next::BackOff),
            (stalled(), Wish::Run, 5, Next::GiveUp),
        ] {
            assert_eq!(
                Next::after(&exit, wish, crashes),
                next,
                "{exit:?} {wish:?} {crashes}"
            );
        }
    }
}
