//! Dead letters, and parked records in the hands of an operator: the work of the spool's thread.

use std::{
    io,
    time::{Duration, Instant},
};

use prost::Message as _;

use super::Store;
use crate::{
    clock::unix_us,
    record::Origin,
    spool::{
        Entry, EntryKey, NotSafe, Queue, Undelivered,
        letters::{LetterAction, LetterOrder, LetterSearch, LetterSweep},
        log::Reading,
    },
};

/// A slice ends after so many records, bytes or time: puts wait no longer than that.
const SLICE: usize = 1000;
const SLICE_BYTES: usize = 8 << 20;
const SLICE_TIME: Duration = Duration::from_millis(20);

/// The place of a queue in the order of a sweep.
fn order_of(of: Undelivered, queue: usize) -> Option<usize> {
    of.queues().into_iter().position(|one| one.at() == queue)
}

fn disk(why: io::Error) -> NotSafe {
    NotSafe::Disk(why.to_string())
}

impl Store {
    /// The next records of `sweep`, for as long as `visit` returns true and the slice lasts. It begins
    /// in the file of `from`, if there is one.
    fn sweep(
        &mut self,
        of: Undelivered,
        sweep: &mut LetterSweep,
        from: Option<EntryKey>,
        mut visit: impl FnMut(EntryKey, Entry) -> bool,
    ) -> Result<(), NotSafe> {
        let began = Instant::now();
        let mut records = 0;
        let mut bytes = 0;
        let left = sweep.left.get_or_insert_with(|| {
            let queues = of.queues().into_iter().rev().map(Queue::at);
            let lasts = queues.filter_map(|queue| Some((queue, self.logs[queue].last()?)));
            let mut left: Vec<_> = lasts.collect();
            if let Some(from) = from {
                let first = order_of(of, from.queue);
                while left
                    .pop_if(|(queue, _)| order_of(of, *queue) < first)
                    .is_some()
                {}
                if left.last().is_some_and(|(queue, _)| *queue == from.queue) {
                    sweep.reading = Reading::from(from.position);
                }
            }
            left
        });
        while let Some(&(queue, last)) = left.last() {
            let mut has_ended = false;
            let log = &mut self.logs[queue];
            let visited = log.visit(&mut sweep.reading, |position, payload| {
                if position > last {
                    return false;
                }
                records += 1;
                bytes += payload.len();
                has_ended =
                    records == SLICE || bytes >= SLICE_BYTES || began.elapsed() >= SLICE_TIME;
                // An entry of a later version stays on disk.
                if let Ok(entry) = Entry::decode(&*payload) {
                    has_ended |= !visit(EntryKey { queue, position }, entry);
                }
                !has_ended
            });
            visited.map_err(disk)?;
            if has_ended {
                return Ok(());
            }
            left.pop();
            sweep.reading = Reading::default();
        }
        Ok(())
    }

    /// A slice of a search.
    pub fn search(&mut self, search: &mut LetterSearch) -> Result<(), NotSafe> {
        let LetterSearch {
            of,
            query,
            sweep,
            found,
        } = search;
        let place = |key: EntryKey| (order_of(*of, key.queue), key.position);
        let after = query.after.map(place);
        self.sweep(*of, sweep, query.after, |key, mut entry| {
            let is_before = after.is_some_and(|after| place(key) <= after);
            if is_before || !query.filter.matches(&entry) {
                return true;
            }
            found.matching += u64::from(query.counts);
            if found.entries.len() >= query.max || found.bytes >= query.bytes_max {
                found.has_more = true;
                return query.counts;
            }
            if !query.bodies {
                entry.body.clear();
            }
            found.bytes += entry.encoded_len();
            found.last = Some(key);
            found.entries.push(entry);
            true
        })
    }

    /// A slice of an order. Returns the number of its records.
    pub fn order(&mut self, order: &mut LetterOrder) -> Result<u64, NotSafe> {
        match order.action {
            LetterAction::Replay => self.replay(order),
            LetterAction::Drop => {
                let found = self.find(order, |key, _| key)?;
                Ok(self.settle_all(found))
            }
        }
    }

    /// The records of a slice that the order names.
    fn find<T>(
        &mut self,
        order: &mut LetterOrder,
        pick: impl Fn(EntryKey, Entry) -> T,
    ) -> Result<Vec<T>, NotSafe> {
        let LetterOrder {
            of,
            which,
            left,
            sweep,
            ..
        } = order;
        let mut found = Vec::new();
        let swept = self.sweep(*of, sweep, None, |key, entry| {
            if which.contains(&entry) {
                found.push(pick(key, entry));
                *left -= 1;
            }
            *left > 0
        });
        // Those before a file that cannot be read are not held up by it: the next slice fails.
        swept.or_else(|why| if found.is_empty() { Err(why) } else { Ok(()) })?;
        Ok(found)
    }

    fn replay(&mut self, order: &mut LetterOrder) -> Result<u64, NotSafe> {
        self.place.check_not_lost()?;
        let found = self.find(order, |key, entry| (key, entry))?;
        if found.is_empty() {
            return Ok(0);
        }
        let waiting = &mut self.logs[Queue::Waiting.at()];
        for (_, entry) in &found {
            // To the ledger it is another record: the flags of the dead one do not hold for it.
            let origin = Origin {
                run: "replay".into(),
                at_us: unix_us(),
            };
            let entry = Entry {
                reason: None,
                parked: None,
                origin: Some(origin.to_text()),
                ..entry.clone()
            };
            waiting
                .append(&entry.encode_to_vec(), false)
                .map_err(disk)?;
        }
        let began = Instant::now();
        waiting.commit().map_err(disk)?;
        self.commit_time += began.elapsed();
        self.commits += 1;
        self.committed += found.len() as u64;
        fail::fail_point!("spool-replay");
        Ok(self.settle_all(found.into_iter().map(|(key, _)| key).collect()))
    }

    /// Settles the entries. They count as gone, though a disk that fails may bring them back at a
    /// later start.
    fn settle_all(&mut self, found: Vec<EntryKey>) -> u64 {
        let count = found.len() as u64;
        if count == 0 {
            return 0;
        }
        for key in found {
            self.remove(key);
        }
        self.flush(true);
        // The caller may read the stats as soon as it has its answer.
        self.report();
        count
    }
}
