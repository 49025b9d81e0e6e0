//! What is owed to whoever waits for records to be safe: an answer for each. It is heard once all are answered, or those that owe the
//! rest are gone, so that a batch wakes its client once.

use std::{
    cell::Cell,
    future::poll_fn,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::Poll,
};

use futures_util::task::AtomicWaker;
use smallvec::SmallVec;

use super::Refused;
use crate::{delivery::Receipt, record::Record};

pub type Answer = Result<Receipt, Refused>;

/// A record that somebody waits to hear of. Dropped without an answer, whoever waits learns that nobody has it any more.
pub struct Promised {
    pub record: Record,
    /// Its place among those that set out with it.
    at: usize,
    /// There until it was answered.
    asked: Cell<Option<Arc<Asked>>>,
}

/// Who waits for the answers. Dropped, nobody does.
pub struct Answers(Arc<Asked>);

#[derive(Default)]
struct Asked {
    state: Mutex<State>,
    /// How many still have no answer, and may have one.
    owed: AtomicUsize,
    waiting: AtomicWaker,
}

#[derive(Default)]
struct State {
    answers: SmallVec<[Option<Answer>; 1]>,
    /// Nobody listens any more.
    is_over: bool,
}

/// Sends `records` out together.
#[must_use]
pub fn promise(records: impl IntoIterator<Item = Record>) -> (Vec<Promised>, Answers) {
    let asked = Arc::new(Asked::default());
    let promised = records.into_iter().enumerate().map(|(at, record)| {
        let asked = Cell::new(Some(Arc::clone(&asked)));
        Promised { record, at, asked }
    });
    let promised: Vec<_> = promised.collect();
    asked.state().answers.resize(promised.len(), None);
    asked.owed.store(promised.len(), Ordering::Release);
    (promised, Answers(asked))
}

impl Promised {
    /// Answers. Whether somebody hears it: if not, nothing was promised.
    pub fn answer(&self, answer: Answer) -> bool {
        let Some(asked) = self.asked.take() else {
            return false;
        };
        let mut state = asked.state();
        let is_heard = !state.is_over;
        if is_heard {
            state.answers[self.at] = Some(answer);
        }
        drop(state);
        asked.settled();
        is_heard
    }

    /// It has no answer yet.
    pub fn is_owed(&mut self) -> bool {
        self.asked.get_mut().is_some()
    }

    /// It has no answer yet, and somebody waits for one.
    pub fn is_awaited(&mut self) -> bool {
        self.asked
            .get_mut()
            .as_ref()
            .is_some_and(|asked| !asked.state().is_over)
    }
}

impl AsRef<Record> for Promised {
    fn as_ref(&self) -> &Record {
        &self.record
    }
}

impl Drop for Promised {
    fn drop(&mut self) {
        if let Some(asked) = self.asked.take() {
            asked.settled();
        }
    }
}

impl Answers {
    /// Resolves once there will be no further answer.
    pub async fn all(&self) {
        let all = poll_fn(|context| {
            let none_is_owed = || self.0.owed.load(Ordering::Acquire) == 0;
            if none_is_owed() {
                return Poll::Ready(());
            }
            self.0.waiting.register(context.waker());
            // The last one may have come before the waker was there.
            if none_is_owed() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        });
        all.await;
    }

    /// The answers so far, in the order of the records; what has none is answered to nobody from now on.
    #[must_use]
    pub fn end(self) -> SmallVec<[Option<Answer>; 1]> {
        let mut state = self.0.state();
        state.is_over = true;
        std::mem::take(&mut state.answers)
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        self.0.state().is_over = true;
    }
}

impl Asked {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settled(&self) {
        if self.owed.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.waiting.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures_util::FutureExt as _;

    use super::*;

    fn three() -> (Vec<Promised>, Answers) {
        promise(["a", "b", "c"].map(|id| Record {
            id: id.into(),
            body: Bytes::from_static(b"{}"),
            traceparent: None,
            origin: None,
        }))
    }

    #[test]
    fn it_is_heard_once_the_last_is_answered_or_gone() {
        let (mut promised, answers) = three();
        assert!(promised[2].answer(Ok(Receipt::Spool)));
        assert!(!promised[2].answer(Err(Refused::NoLane)), "one answer each");
        let gone = promised.remove(0);
        assert!(promised[0].answer(Err(Refused::Overloaded)));
        assert!(answers.all().now_or_never().is_none(), "one is still owed");
        drop(gone);
        assert!(answers.all().now_or_never().is_some());
        assert_eq!(
            answers.end()[..],
            [
                None,
                Some(Err(Refused::Overloaded)),
                Some(Ok(Receipt::Spool))
            ]
        );
    }

    #[test]
    fn what_comes_after_the_end_is_answered_to_nobody() {
        let (mut promised, answers) = three();
        assert!(promised[1].answer(Ok(Receipt::Spool)) && promised[0].is_awaited());
        assert_eq!(answers.end()[..], [None, Some(Ok(Receipt::Spool)), None]);
        assert!(!promised[0].answer(Ok(Receipt::Spool)));
        assert!(promised[2].is_owed() && !promised[2].is_awaited());
        let (promised, answers) = three();
        drop(answers);
        assert!(!promised[0].answer(Ok(Receipt::Spool)));
    }
}
