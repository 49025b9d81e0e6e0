//! Dead letters and parked records in the hands of an operator: search, replay, drop.
//!
//! The thread works on a slice of them, answers, and is asked for the next one, so that other
//! requests wait for a slice at most. Records that come after the first slice are not touched.

use std::{collections::HashSet, fmt, time::Duration};

use tokio::time::timeout;

use super::{
    Entry, EntryKey, LetterFilter, NotSafe, Position, Spool, Undelivered, filter::is_of,
    log::Reading,
};

/// A search waits this long for the end of another.
const SEARCH_PATIENCE: Duration = Duration::from_secs(5);

/// A choice of records.
#[derive(Clone, Debug)]
pub enum Which {
    All,
    Ids {
        ids: HashSet<String>,
        /// As in [`LetterFilter::api`].
        api: Option<String>,
    },
    /// The oldest ones that match.
    Matching {
        filter: LetterFilter,
        max: u64,
    },
}

impl Which {
    pub(super) fn contains(&self, entry: &Entry) -> bool {
        match self {
            Self::All => true,
            Self::Ids { ids, api } => ids.contains(&entry.id) && is_of(entry, api.as_deref()),
            Self::Matching { filter, .. } => filter.matches(entry),
        }
    }

    /// Those of it that are for the API `name`, as in [`LetterFilter::api`].
    #[must_use]
    pub fn of_api(self, name: &str) -> Self {
        let of = |filter| LetterFilter {
            api: Some(name.to_owned()),
            ..filter
        };
        match self {
            Self::All => Self::Matching {
                filter: of(LetterFilter::default()),
                max: u64::MAX,
            },
            Self::Ids { ids, .. } => Self::Ids {
                ids,
                api: Some(name.to_owned()),
            },
            Self::Matching { filter, max } => Self::Matching {
                filter: of(filter),
                max,
            },
        }
    }

    /// What is left of it after so many records.
    #[must_use]
    pub fn after(&self, done: u64) -> Self {
        match self {
            Self::Matching { filter, max } => Self::Matching {
                filter: filter.clone(),
                max: max - done,
            },
            all => all.clone(),
        }
    }

    /// The most records of it.
    fn max(&self) -> u64 {
        match self {
            Self::All | Self::Ids { .. } => u64::MAX,
            Self::Matching { max, .. } => *max,
        }
    }
}

/// What happens to records that an operator has chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LetterAction {
    /// They wait for a lane again.
    Replay,
    /// They are removed for good.
    Drop,
}

/// The records that a search shows.
#[derive(Clone, Debug, Default)]
pub struct LetterQuery {
    pub filter: LetterFilter,
    /// The most of them, oldest first.
    pub max: usize,
    /// None after so many bytes: the last one may be over.
    pub bytes_max: usize,
    /// With their bodies.
    pub bodies: bool,
    /// Only those behind this place.
    pub after: Option<EntryKey>,
    /// Counts all that match. Otherwise the search ends once it knows whether there are more than
    /// it shows.
    pub counts: bool,
}

/// The records that a search has found.
#[derive(Debug, Default, PartialEq)]
pub struct FoundLetters {
    pub entries: Vec<Entry>,
    /// The bytes that count for [`LetterQuery::bytes_max`].
    pub bytes: usize,
    /// All that match behind [`LetterQuery::after`], if the query counts them.
    pub matching: u64,
    /// The place of the last one; that where the search began if there is none.
    pub last: Option<EntryKey>,
    /// There are more behind it.
    pub has_more: bool,
}

/// The progress through the records that were on disk at its start.
#[derive(Default)]
pub(super) struct LetterSweep {
    /// The queues that are left, by [`Queue::at`](super::Queue::at), the next one last, each with
    /// its last record of the start. `None` before that.
    pub left: Option<Vec<(usize, Position)>>,
    pub reading: Reading,
}

impl LetterSweep {
    fn has_ended(&self) -> bool {
        self.left.as_ref().is_some_and(Vec::is_empty)
    }
}

/// The text that a client brings back to go on behind this place.
impl fmt::Display for EntryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [segment, ordinal] = self.position.into();
        write!(f, "{}-{segment}-{ordinal}", self.queue)
    }
}

impl EntryKey {
    /// Reads what [`Display`](fmt::Display) wrote; `None` if it is something else.
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.splitn(3, '-');
        let queue = numbers.next()?.parse().ok()?;
        let segment = numbers.next()?.parse().ok()?;
        let ordinal = numbers.next()?.parse().ok()?;
        let position = Position::of(segment, ordinal);
        Some(Self { queue, position })
    }
}

pub(super) struct LetterSearch {
    pub of: Undelivered,
    pub query: LetterQuery,
    pub sweep: LetterSweep,
    pub found: FoundLetters,
}

impl LetterSearch {
    fn has_ended(&self) -> bool {
        let is_full = !self.query.counts && self.found.has_more;
        is_full || self.sweep.has_ended()
    }
}

pub(super) struct LetterOrder {
    pub action: LetterAction,
    pub of: Undelivered,
    pub which: Which,
    /// The most records that are still to come.
    pub left: u64,
    pub sweep: LetterSweep,
}

/// An order under way. Dropped, it ends after the slice under way.
pub struct LetterOrdering {
    spool: Spool,
    /// `None` once the spool has closed.
    order: Option<LetterOrder>,
}

impl LetterOrdering {
    /// The number of records of the next slice, which are replayed or dropped now; `None` after the
    /// last one.
    ///
    /// # Errors
    /// If the disk fails. Slices before that are done.
    pub async fn next(&mut self) -> Result<Option<u64>, NotSafe> {
        let mut order = self.order.take().ok_or(NotSafe::Closed)?;
        if order.left == 0 || order.sweep.has_ended() {
            self.order = Some(order);
            return Ok(None);
        }
        let slice = self.spool.run(move |store| {
            let done = store.order(&mut order);
            (order, done)
        });
        let (order, done) = slice.await?;
        self.order = Some(order);
        done.map(Some)
    }

    async fn finish(mut self) -> Result<u64, NotSafe> {
        let mut all = 0;
        while let Some(done) = self.next().await? {
            all += done;
        }
        Ok(all)
    }
}

impl Spool {
    /// The oldest dead letters, or the oldest parked records of each pause.
    pub async fn list(&self, of: Undelivered, max: usize) -> Result<Vec<Entry>, NotSafe> {
        let query = LetterQuery {
            max,
            bytes_max: usize::MAX,
            bodies: true,
            ..LetterQuery::default()
        };
        Ok(self.search(of, query).await?.entries)
    }

    /// The oldest of those that match behind a place. It reads from the file of that place on: up to
    /// the first one that it does not show, or to the end if the query counts.
    ///
    /// # Errors
    /// If the disk fails, or another search takes long.
    pub async fn search(
        &self,
        of: Undelivered,
        query: LetterQuery,
    ) -> Result<FoundLetters, NotSafe> {
        let _turn = if query.filter.is_empty() {
            None
        } else {
            let turn = timeout(SEARCH_PATIENCE, self.search_turn.acquire()).await;
            let turn = turn.map_err(|_| NotSafe::Busy)?;
            Some(turn.map_err(|_| NotSafe::Closed)?)
        };
        let found = FoundLetters {
            last: query.after,
            ..FoundLetters::default()
        };
        let mut search = LetterSearch {
            of,
            query,
            sweep: LetterSweep::default(),
            found,
        };
        loop {
            let slice = self.run(move |store| {
                let searched = store.search(&mut search);
                (search, searched)
            });
            let (after, searched) = slice.await?;
            searched?;
            if after.has_ended() {
                return Ok(after.found);
            }
            search = after;
        }
    }

    /// Replays or drops records, slice by slice. After a crash some that were replayed may be in
    /// both places.
    pub fn order(&self, action: LetterAction, of: Undelivered, which: Which) -> LetterOrdering {
        let order = LetterOrder {
            action,
            of,
            left: which.max(),
            which,
            sweep: LetterSweep::default(),
        };
        LetterOrdering {
            spool: self.clone(),
            order: Some(order),
        }
    }

    /// Lets records wait for a lane again. Returns their number. If it is not awaited, the rest
    /// stays.
    pub async fn replay(&self, of: Undelivered, which: Which) -> Result<u64, NotSafe> {
        self.order(LetterAction::Replay, of, which).finish().await
    }

    /// Removes records for good. Returns their number. If it is not awaited, the rest stays.
    pub async fn forget(&self, of: Undelivered, which: Which) -> Result<u64, NotSafe> {
        self.order(LetterAction::Drop, of, which).finish().await
    }
}

#[cfg(test)]
mod tests;
