//! Dead letters, and parked records in the hands of an operator: the work of the spool's thread.

use std::{io, time::Instant};

use prost::Message as _;

use super::{BATCH, Store};
use crate::{
    clock::unix_us,
    record::Origin,
    spool::{Entry, EntryKey, LetterFilter, NotSafe, Queue, Undelivered, Which},
};

/// The most records of the next batch, after so many.
fn batch(which: &Which, done: u64) -> usize {
    let left = which.max() - done;
    usize::try_from(left).map_or(BATCH, |left| left.min(BATCH))
}

impl Store {
    /// Up to `max` of the records that `which` names.
    fn find(&mut self, of: Undelivered, which: &Which, max: usize) -> Vec<(EntryKey, Entry)> {
        let mut found = Vec::new();
        for queue in of.queues().into_iter().map(Queue::at) {
            if found.len() == max {
                break;
            }
            self.logs[queue].visit(|position, payload| {
                if let Ok(entry) = Entry::decode(&*payload)
                    && which.contains(&entry)
                {
                    found.push((EntryKey { queue, position }, entry));
                }
                found.len() < max
            });
        }
        found
    }

    pub fn list(&mut self, of: Undelivered, max: usize) -> Vec<Entry> {
        let found = self.find(of, &Which::All, max);
        found.into_iter().map(|(_, entry)| entry).collect()
    }

    /// Up to `max` of those that match, and the number of all of them.
    pub fn search(
        &mut self,
        of: Undelivered,
        filter: &LetterFilter,
        max: usize,
    ) -> (Vec<Entry>, u64) {
        let mut found = Vec::new();
        let mut matching = 0;
        for queue in of.queues() {
            self.logs[queue.at()].visit(|_, payload| {
                if let Ok(entry) = Entry::decode(&*payload)
                    && filter.matches(&entry)
                {
                    matching += 1;
                    if found.len() < max {
                        found.push(entry);
                    }
                }
                true
            });
        }
        (found, matching)
    }

    pub fn replay(&mut self, of: Undelivered, which: &Which) -> Result<u64, NotSafe> {
        let disk = |why: io::Error| NotSafe::Disk(why.to_string());
        self.place.check_not_lost()?;
        let mut replayed = 0;
        loop {
            let found = self.find(of, which, batch(which, replayed));
            if found.is_empty() {
                return Ok(replayed);
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
            replayed += self.settle_all(found);
        }
    }

    pub fn forget(&mut self, of: Undelivered, which: &Which) -> u64 {
        let mut forgotten = 0;
        loop {
            let found = self.find(of, which, batch(which, forgotten));
            if found.is_empty() {
                return forgotten;
            }
            forgotten += self.settle_all(found);
        }
    }

    /// Settles the entries. They count as gone, though a disk that fails may bring them back at a
    /// later start.
    fn settle_all(&mut self, found: Vec<(EntryKey, Entry)>) -> u64 {
        let count = found.len() as u64;
        for (key, _) in found {
            self.remove(key);
        }
        self.flush(true);
        // The caller may read the stats as soon as it has its answer.
        self.report();
        count
    }
}
