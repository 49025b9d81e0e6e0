//! Dead letters: the work of the spool's thread.

use std::io;

use prost::Message as _;
use tracing::warn;

use super::{BATCH, Store};
use crate::{
    clock::unix_us,
    record::Origin,
    spool::{Entry, NotSafe, Queue, Which, log::Position},
};

impl Store {
    /// Up to `max` of the dead letters that `which` names.
    fn find(&mut self, which: &Which, max: usize) -> Vec<(Position, Entry)> {
        let mut found = Vec::new();
        self.logs[Queue::Dead.at()].visit(|key, payload| {
            if let Ok(entry) = Entry::decode(&*payload)
                && which.contains(&entry.id)
            {
                found.push((key, entry));
            }
            found.len() < max
        });
        found
    }

    pub fn list(&mut self, max: usize) -> Vec<Entry> {
        let found = self.find(&Which::All, max);
        found.into_iter().map(|(_, entry)| entry).collect()
    }

    pub fn replay(&mut self, which: &Which) -> Result<u64, NotSafe> {
        let disk = |why: io::Error| NotSafe::Disk(why.to_string());
        self.place.check_not_lost()?;
        let mut replayed = 0;
        loop {
            let found = self.find(which, BATCH);
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
                    origin: Some(origin.to_text()),
                    ..entry.clone()
                };
                waiting
                    .append(&entry.encode_to_vec(), false)
                    .map_err(disk)?;
            }
            waiting.commit().map_err(disk)?;
            self.commits += 1;
            self.committed += found.len() as u64;
            fail::fail_point!("spool-replay");
            replayed += self.remove(found);
        }
    }

    pub fn forget(&mut self, which: &Which) -> u64 {
        let mut forgotten = 0;
        loop {
            let found = self.find(which, BATCH);
            if found.is_empty() {
                return forgotten;
            }
            forgotten += self.remove(found);
        }
    }

    /// Settles dead letters. They count as gone, though a disk that fails may bring them back at a
    /// later start.
    fn remove(&mut self, found: Vec<(Position, Entry)>) -> u64 {
        let dead = &mut self.logs[Queue::Dead.at()];
        let count = found.len() as u64;
        for (key, _) in found {
            dead.settle(key);
        }
        if let Err(why) = dead.flush(true) {
            warn!(%why, "dead letters that were removed may come again");
        }
        // The caller may read the stats as soon as it has its answer.
        self.report();
        count
    }
}
