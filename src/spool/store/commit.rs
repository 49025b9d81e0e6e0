//! Group commit: the puts of a moment are appended, share a sync, and are answered.

use std::{
    thread,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use super::{BATCH, Store};
use crate::spool::{
    EntryKey, NotSafe, Queue, SpoolRequest, frame,
    log::Log,
    put::{PutAnswer, PutKind, PutResult},
};

/// Dead letters and moved entries may go beyond the spool's size by this part of it.
const RESERVE: u64 = 16;
/// Group commit: while fewer puts wait than shared the last sync, the sync waits for the time of
/// this many syncs, and at most [`GROUP_WAIT_MAX`]. Clients that were just answered are about to
/// send again.
const GROUP_SYNCS: u32 = 2;
const GROUP_WAIT_MAX: Duration = Duration::from_millis(1);

impl Store {
    /// Adds the requests of the next moment if fewer puts wait than shared the last sync.
    pub(super) fn commit_group(
        &self,
        inbox: &mut mpsc::UnboundedReceiver<SpoolRequest>,
        requests: &mut Vec<SpoolRequest>,
    ) {
        let is_put = |request: &&SpoolRequest| matches!(request, SpoolRequest::Put { .. });
        let waiting = requests.iter().filter(is_put).count();
        if (1..self.last_group).contains(&waiting) {
            // Once, because each wake-up costs a part of what the group saves.
            thread::sleep((GROUP_SYNCS * self.sync_took).min(GROUP_WAIT_MAX));
            let room = BATCH.saturating_sub(requests.len());
            requests.extend(std::iter::from_fn(|| inbox.try_recv().ok()).take(room));
        }
    }

    pub(super) fn room(&self) -> u64 {
        let logs = self.logs.iter().filter(|log| log.has_files());
        self.max.saturating_sub(logs.map(Log::bytes).sum())
    }

    pub(super) fn append(
        &mut self,
        queue: Queue,
        payload: &[u8],
        kind: PutKind,
        room: &mut u64,
    ) -> Result<EntryKey, NotSafe> {
        self.place.check_not_lost()?;
        let size = (frame::HEAD + payload.len()) as u64;
        // A dead letter makes room: its record leaves the spool. So does what replaces an entry.
        let reserve = if queue == Queue::Dead || kind == PutKind::Moved {
            self.max / RESERVE
        } else {
            0
        };
        if payload.len() > frame::PAYLOAD_MAX {
            return Err(NotSafe::TooLarge);
        }
        if size > *room + reserve {
            return Err(NotSafe::Full);
        }
        let appended = self.logs[queue.at()].append(payload, kind == PutKind::Held);
        let position = appended.map_err(|why| {
            self.fails(&why);
            NotSafe::Disk(why.to_string())
        })?;
        *room = room.saturating_sub(size);
        Ok(EntryKey {
            queue: queue.at(),
            position,
        })
    }

    /// Makes what was appended durable, and answers all puts.
    pub(super) fn commit(&mut self, mut puts: Vec<(PutResult, PutAnswer)>) {
        let began = Instant::now();
        let failures: Vec<_> = self.logs.iter_mut().map(|log| log.commit().err()).collect();
        let group = puts.iter().filter(|(appended, _)| appended.is_ok()).count();
        if group > 0 {
            match failures.iter().flatten().next() {
                Some(why) => self.fails(why),
                None => self.works(),
            }
            self.last_group = group;
            self.sync_took = began.elapsed();
            self.commit_time += self.sync_took;
            if self.failing {
                self.check_place();
            }
        }
        let mut safe = [0; Queue::COUNT];
        for (put, _) in &mut puts {
            let Ok(key) = put else { continue };
            match &failures[key.queue] {
                None => safe[key.queue] += 1,
                Some(why) => *put = Err(NotSafe::Disk(why.to_string())),
            }
        }
        for records in safe.into_iter().filter(|records| *records > 0) {
            self.commits += 1;
            self.committed += records;
        }
        if !puts.is_empty() {
            // A caller may ask for the stats at once.
            self.report();
        }
        self.answer(puts);
    }

    fn answer(&mut self, puts: Vec<(PutResult, PutAnswer)>) {
        let mut copies: Vec<(_, Vec<_>)> = Vec::new();
        for (put, answer) in puts {
            match answer {
                // The caller may be gone. What was put waits to be read like any other entry.
                PutAnswer::One(answer) => drop(answer.send(put)),
                PutAnswer::Copies(answers) => {
                    let mut writers = copies.iter_mut();
                    match writers.find(|(writer, _)| answers.same_channel(writer)) {
                        Some((_, puts)) => puts.push(put),
                        None => copies.push((answers, vec![put])),
                    }
                }
            }
        }
        for (answers, puts) in copies {
            // Nobody else would ever remove a copy whose caller is gone.
            if let Err(unheard) = answers.send(puts) {
                for key in unheard.0.into_iter().flatten() {
                    self.remove(key);
                }
            }
        }
    }
}
