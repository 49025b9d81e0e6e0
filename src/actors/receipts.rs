//! Replies to a request's records. The client is woken once: when every record has a reply, or its
//! holder was dropped.

use std::{
    cell::Cell,
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::Poll,
};

use futures_util::task::AtomicWaker;
use tracing_mutex::parkinglot::Mutex;

use crate::{
    delivery::Receipt,
    ledger::Ledger,
    record::Record,
    routing::{hash::KeyHash, rules::Assignment},
    spool::NotSafe,
};

/// A receipt, or the reason why there is none.
pub type Reply = Result<Receipt, Refused>;

/// The reason why a record was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("no lane could confirm the record")]
    NoLane,
    #[error("no lane could confirm the record, and {0}")]
    NotSafe(#[from] NotSafe),
    #[error("this node has as many records in hand as it may have")]
    Overloaded,
    /// Final. The text is the limit of each lane that the record may take.
    #[error("the record is larger, with its headers, than any lane takes: {0}")]
    TooLarge(String),
}

/// A record, and the way that it may take.
#[derive(Clone, Debug)]
pub struct AssignedRecord {
    pub record: Record,
    pub assignment: Assignment,
}

/// A record whose client waits for a reply. If it is dropped without one, nobody holds the record
/// any more, and admission sends it again.
pub struct PendingRecord {
    pub record: Record,
    /// The hash of the value by which policy `hash` chooses.
    pub key: KeyHash,
    /// Its index in the request.
    index: usize,
    /// `None` once it has its reply.
    slots: Cell<Option<Arc<ReplySlots>>>,
}

/// The client's end of a request: one slot for each of its records. Once it is dropped, replies
/// are discarded, and a record without one is refused.
pub struct Replies<'a> {
    slots: Arc<ReplySlots>,
    records: &'a [AssignedRecord],
    /// Counts the records that are refused; `None` if they are on disk.
    ledger: Option<&'a Ledger>,
}

#[derive(Default)]
struct ReplySlots {
    state: Mutex<State>,
    /// Records without a reply that somebody still holds.
    unanswered: AtomicUsize,
    client: AtomicWaker,
}

#[derive(Default)]
struct State {
    replies: Vec<Option<Reply>>,
    client_is_gone: bool,
}

impl PendingRecord {
    /// Replies once. Returns whether the client receives it.
    pub fn reply(&self, reply: Reply) -> bool {
        let Some(slots) = self.slots.take() else {
            return false;
        };
        let mut state = slots.state.lock();
        let is_heard = !state.client_is_gone;
        if is_heard {
            state.replies[self.index] = Some(reply);
        }
        drop(state);
        slots.end_one();
        is_heard
    }

    /// It has no reply yet.
    pub fn is_unanswered(&mut self) -> bool {
        self.slots.get_mut().is_some()
    }

    /// It has no reply yet, and its client still waits.
    pub fn client_waits(&mut self) -> bool {
        self.slots
            .get_mut()
            .as_ref()
            .is_some_and(|slots| !slots.state.lock().client_is_gone)
    }
}

impl AsRef<Record> for PendingRecord {
    fn as_ref(&self) -> &Record {
        &self.record
    }
}

impl Drop for PendingRecord {
    fn drop(&mut self) {
        if let Some(slots) = self.slots.take() {
            slots.end_one();
        }
    }
}

impl<'a> Replies<'a> {
    /// The slots of `records`, without a reply.
    pub fn new(records: &'a [AssignedRecord], ledger: Option<&'a Ledger>) -> Self {
        let slots = Arc::<ReplySlots>::default();
        slots.state.lock().replies.resize(records.len(), None);
        Self {
            slots,
            records,
            ledger,
        }
    }

    /// The records without a reply, to be sent: those that go together, with their assignment. The
    /// ones that an earlier call returned must be gone: see [`Replies::wait`].
    pub fn unanswered(&self) -> Vec<(&'a Assignment, Vec<PendingRecord>)> {
        let state = self.slots.state.lock();
        let missing = state.replies.iter().filter(|reply| reply.is_none());
        let missing = missing.count();
        self.slots.unanswered.store(missing, Ordering::Release);
        let mut groups: Vec<(&Assignment, Vec<PendingRecord>)> = Vec::new();
        for (index, (assigned, reply)) in self.records.iter().zip(&state.replies).enumerate() {
            if reply.is_some() {
                continue;
            }
            let AssignedRecord { record, assignment } = assigned;
            let pending = PendingRecord {
                record: record.clone(),
                key: assignment.key,
                index,
                slots: Cell::new(Some(Arc::clone(&self.slots))),
            };
            let mut known = groups.iter_mut();
            match known.find(|(other, _)| assignment.is_shared_with(other)) {
                Some((_, group)) => group.push(pending),
                None => {
                    let mut group = Vec::with_capacity(missing);
                    group.push(pending);
                    groups.push((assignment, group));
                }
            }
        }
        groups
    }

    /// Resolves when no further reply can come.
    pub async fn wait(&self) {
        let is_complete = || self.slots.unanswered.load(Ordering::Acquire) == 0;
        let complete = poll_fn(|context| {
            if is_complete() {
                return Poll::Ready(());
            }
            self.slots.client.register(context.waker());
            // The last reply may have come before the waker was registered.
            if is_complete() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        });
        complete.await;
    }

    /// The replies so far, in the order of the records. Later ones are discarded, and a second call
    /// returns none.
    pub fn close(&self) -> Vec<Option<Reply>> {
        let mut state = self.slots.state.lock();
        state.client_is_gone = true;
        let replies = std::mem::take(&mut state.replies);
        drop(state);
        if let Some(ledger) = self.ledger {
            for (assigned, reply) in self.records.iter().zip(&replies) {
                if !matches!(reply, Some(Ok(_))) {
                    ledger.refused(&assigned.record);
                }
            }
        }
        replies
    }
}

impl Drop for Replies<'_> {
    fn drop(&mut self) {
        self.close();
    }
}

impl ReplySlots {
    fn end_one(&self) {
        if self.unanswered.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.client.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures_util::FutureExt as _;

    use super::*;
    use crate::{
        lane_id::LaneId,
        record::pointer::Values,
        routing::{
            policy::{HashOn, Policy},
            rules::{RouteDefaults, Routes},
        },
    };

    fn routes() -> Routes {
        let defaults = RouteDefaults {
            policy: Policy::RoundRobin,
            hash_on: &HashOn::Id,
            lanes: &LaneId::ALL,
            apis: &[],
        };
        Routes::new(&[], &defaults).unwrap()
    }

    fn three() -> [AssignedRecord; 3] {
        let assignment = routes().assign("", &Values::default(), |_| None);
        ["a", "b", "c"].map(|id| AssignedRecord {
            record: Record {
                id: id.into(),
                body: Bytes::from_static(b"{}"),
                trace: None,
                origin: None,
                api: None,
                event: None,
            },
            assignment: assignment.clone(),
        })
    }

    fn request(records: &[AssignedRecord]) -> (Vec<PendingRecord>, Replies<'_>) {
        let replies = Replies::new(records, None);
        let mut groups = replies.unanswered();
        assert_eq!(groups.len(), 1);
        (groups.remove(0).1, replies)
    }

    #[test]
    fn records_go_together_if_they_have_one_route_and_one_lane_is_named_for_both() {
        let mut records = three();
        records[1].assignment.pinned = Some(LaneId::Nats);
        let replies = Replies::new(&records, None);
        let ids = |(_, group): &(_, Vec<PendingRecord>)| -> Vec<_> {
            group
                .iter()
                .map(|pending| pending.record.id.to_string())
                .collect()
        };
        let groups = replies.unanswered();
        assert_eq!(
            groups.iter().map(ids).collect::<Vec<_>>(),
            [vec!["a", "c"], vec!["b"]]
        );
        assert!(groups[1].1[0].reply(Ok(Receipt::Spool)));
        drop(groups);
        assert!(replies.wait().now_or_never().is_some());
        drop(replies);
        records[1].assignment = routes().assign("", &Values::default(), |_| None);
        let replies = Replies::new(&records, None);
        assert_eq!(replies.unanswered().len(), 2, "another route");
    }

    #[test]
    fn the_client_is_woken_once_the_last_record_is_answered_or_dropped() {
        let records = three();
        let (mut pending, replies) = request(&records);
        assert!(pending[2].reply(Ok(Receipt::Spool)));
        assert!(!pending[2].reply(Err(Refused::NoLane)), "one reply each");
        let dropped = pending.remove(0);
        assert!(pending[0].reply(Err(Refused::Overloaded)));
        assert!(replies.wait().now_or_never().is_none(), "one is held");
        drop(dropped);
        assert!(replies.wait().now_or_never().is_some());
        assert_eq!(
            replies.close()[..],
            [
                None,
                Some(Err(Refused::Overloaded)),
                Some(Ok(Receipt::Spool))
            ]
        );
    }

    #[test]
    fn a_reply_after_the_client_has_gone_is_not_heard() {
        let records = three();
        let (mut pending, replies) = request(&records);
        assert!(pending[1].reply(Ok(Receipt::Spool)) && pending[0].client_waits());
        assert_eq!(replies.close()[..], [None, Some(Ok(Receipt::Spool)), None]);
        assert!(!pending[0].reply(Ok(Receipt::Spool)));
        assert!(pending[2].is_unanswered() && !pending[2].client_waits());
        let (pending, replies) = request(&records);
        drop(replies);
        assert!(!pending[0].reply(Ok(Receipt::Spool)));
    }
}
