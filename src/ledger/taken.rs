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

struct Run {
    records: u64,
    /// All records until then.
    last: u64,
}

impl TakenOver {
    /// Counts a record unless `own` had accepted it, or no run had.
    pub(super) fn count(&mut self, record: &Record, own: &str) {
        let Some(origin) = record.origin.as_ref().filter(|origin| *origin.run != *own) else {
            return;
        };
        self.records += 1;
        let last = self.records;
        if let Some(run) = self.runs.get_mut(&origin.run) {
            run.records += 1;
            run.last = last;
            return;
        }
        if self.runs.len() >= RUNS_MAX {
            let quiet = self.runs.values().map(|run| run.last).min();
            self.runs.retain(|_, run| Some(run.last) != quiet);
        }
        let run = Run { records: 1, last };
        self.runs.insert(Arc::clone(&origin.run), run);
    }

    /// Each run, and how many of its records ended here.
    pub fn by_run(&self) -> impl Iterator<Item = (&str, u64)> {
        self.runs.iter().map(|(run, taken)| (&**run, taken.records))
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
            traceparent: None,
            origin: run.map(|run| Origin {
                run: run.into(),
                at_us: 1,
            }),
        }
    }

    #[test]
    fn records_of_other_runs_count_by_run_and_memory_is_bounded() {
        let mut taken = TakenOver::default();
        for run in [Some("own"), Some("a"), None, Some("b"), Some("a")] {
            taken.count(&of(run), "own");
        }
        let mut runs: Vec<_> = taken.by_run().collect();
        runs.sort_unstable();
        assert_eq!(runs, [("a", 2), ("b", 1)]);
        for run in 0..2 * RUNS_MAX {
            taken.count(&of(Some(&run.to_string())), "own");
            taken.count(&of(Some("b")), "own");
        }
        assert_eq!(taken.by_run().count(), RUNS_MAX);
        let kept = taken.by_run().find(|(run, _)| *run == "b");
        assert_eq!(kept, Some(("b", 1 + 2 * RUNS_MAX as u64)));
    }
}
