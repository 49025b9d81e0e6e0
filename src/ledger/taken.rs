//! The records of other runs that ended at this node, by run.

use std::{collections::HashMap, sync::Arc};

use crate::record::Record;

/// Runs that are remembered: more than the nodes of a broker. The one that was quiet for longest is
/// forgotten first.
const RUNS_MAX: usize = 256;

/// Counts of records by the run that had accepted them.
#[derive(Default)]
pub struct TakenOver {
    runs: HashMap<Arc<str>, Run>,
    records: u64,
}

#[derive(Default)]
struct Run {
    records: u64,
    /// The upper bound of those that are not counted: see [`Taken`].
    uncounted_max: u64,
    /// [`TakenOver::records`] when this run was seen last.
    last: u64,
}

/// The records of one run that ended here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    pub records: u64,
    /// The most that were taken over and not counted, because this node was killed.
    pub uncounted_max: u64,
}

impl TakenOver {
    /// Counts a record unless `own` had accepted it, or no run had. Returns whether it counted.
    pub(super) fn count(&mut self, record: &Record, own: &str) -> bool {
        let origin = record.origin.as_ref().filter(|origin| *origin.run != *own);
        origin.is_some_and(|origin| {
            let one = Taken {
                records: 1,
                uncounted_max: 0,
            };
            self.add(&origin.run, one);
            true
        })
    }

    pub(super) fn add(&mut self, run: &Arc<str>, taken: Taken) {
        self.records += taken.records;
        if !self.runs.contains_key(run) {
            if self.runs.len() >= RUNS_MAX {
                let quiet = self.runs.values().map(|run| run.last).min();
                self.runs.retain(|_, run| Some(run.last) != quiet);
            }
            self.runs.insert(Arc::clone(run), Run::default());
        }
        if let Some(known) = self.runs.get_mut(run) {
            known.records += taken.records;
            known.uncounted_max += taken.uncounted_max;
            known.last = self.records;
        }
    }

    /// Each run, and how many of its records ended here.
    pub fn by_run(&self) -> impl Iterator<Item = (&str, Taken)> {
        let taken = |run: &Run| Taken {
            records: run.records,
            uncounted_max: run.uncounted_max,
        };
        self.runs
            .iter()
            .map(move |(name, run)| (&**name, taken(run)))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::record::Origin;

    fn of(run: Option<&str>) -> Record {
        Record {
            id: "a".into(),
            body: Bytes::from_static(b"{}"),
            trace: None,
            origin: run.map(|run| Origin {
                run: run.into(),
                at_us: 1,
            }),
            api: None,
            event: None,
        }
    }

    #[test]
    fn records_of_other_runs_count_by_run_and_memory_is_bounded() {
        let mut taken = TakenOver::default();
        for run in [Some("own"), Some("a"), None, Some("b"), Some("a")] {
            taken.count(&of(run), "own");
        }
        let runs = taken.by_run();
        let mut runs: Vec<_> = runs.map(|(run, taken)| (run, taken.records)).collect();
        runs.sort_unstable();
        assert_eq!(runs, [("a", 2), ("b", 1)]);
        for run in 0..2 * RUNS_MAX {
            taken.count(&of(Some(&run.to_string())), "own");
            taken.count(&of(Some("b")), "own");
        }
        assert_eq!(taken.by_run().count(), RUNS_MAX);
        let kept = taken.by_run().find(|(run, _)| *run == "b");
        let kept = kept.map(|(_, taken)| taken.records);
        assert_eq!(kept, Some(1 + 2 * RUNS_MAX as u64));
    }
}
