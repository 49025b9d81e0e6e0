//! The file that keeps what this node has taken over, for its later runs: the runs that have handed
//! those records over go on, and compare.
//!
//! It is text: first `running` or `ended`, then a line for each lane and run. It is written soon
//! after a change, so a node that is killed has taken over a few records more than it says.

use std::{
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{task::spawn_blocking, time::sleep};
use tracing::warn;
use tracing_mutex::parkinglot::Mutex;

use super::{Ledger, taken::Taken};
use crate::lane_id::LaneId;

const NAME: &str = "taken_over";
/// Changes within this share a write.
const LINGER: Duration = Duration::from_millis(20);
/// A lane takes no more records over before the file is written, unless its disk is slow.
const UNCOUNTED_MAX: u64 = 1024;

/// Clones share the file.
#[derive(Clone)]
pub struct TakenFile(Arc<Inner>);

struct Inner {
    path: PathBuf,
    ledger: Arc<Ledger>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    is_closed: bool,
    /// The last write has failed.
    fails: bool,
}

impl TakenFile {
    /// Adds what earlier runs in `folder` have taken over to the counts of `ledger`.
    pub fn open(folder: &Path, ledger: &Arc<Ledger>) -> Self {
        let path = folder.join(NAME);
        let file = Self(Arc::new(Inner {
            path,
            ledger: Arc::clone(ledger),
            state: Mutex::default(),
        }));
        match fs::read_to_string(&file.0.path) {
            Ok(text) if read(&text, ledger).is_some() => file.0.write(false),
            Ok(_) => warn!(
                file = %file.0.path.display(),
                "the file is damaged: what this node has taken over before is not known"
            ),
            Err(why) if why.kind() == io::ErrorKind::NotFound => {}
            Err(why) => warn!(file = %file.0.path.display(), reason = %why, "cannot be read"),
        }
        file
    }

    /// Writes the changes, for ever.
    pub async fn keep(self) {
        loop {
            self.0.ledger.taken_over.notified().await;
            sleep(LINGER).await;
            let inner = Arc::clone(&self.0);
            // An error means that the runtime ends.
            spawn_blocking(move || inner.write(false)).await.ok();
        }
    }

    /// Writes the last counts. Later changes are not kept.
    pub fn close(&self) {
        self.0.write(true);
    }
}

impl Inner {
    fn write(&self, is_last: bool) {
        let mut state = self.state.lock();
        if state.is_closed {
            return;
        }
        state.is_closed = is_last;
        let text = text(&self.ledger, is_last);
        let draft = self.path.with_extension("new");
        let written = fs::write(&draft, text).and_then(|()| fs::rename(&draft, &self.path));
        if let Err(why) = &written
            && !state.fails
        {
            warn!(file = %self.path.display(), reason = %why, "cannot write what was taken over");
        }
        state.fails = written.is_err();
    }
}

fn text(ledger: &Ledger, is_last: bool) -> String {
    let mut text = String::from(if is_last { "ended\n" } else { "running\n" });
    for lane in LaneId::ALL {
        for (
            run,
            Taken {
                records,
                uncounted_max,
            },
        ) in ledger.lane(lane).taken_over.by_run()
        {
            // A string takes all that is written. No run has a space in its name.
            writeln!(text, "{lane} {run} {records} {uncounted_max}").ok();
        }
    }
    text
}

/// `None` if it is not a whole file.
fn read(text: &str, ledger: &Ledger) -> Option<()> {
    let mut lines = text.strip_suffix('\n')?.lines();
    let more = match lines.next()? {
        "ended" => 0,
        "running" => UNCOUNTED_MAX,
        _ => return None,
    };
    let read_line = |line: &str| {
        let [lane, run, records, uncounted_max] =
            line.split(' ').collect::<Vec<_>>().try_into().ok()?;
        let taken = Taken {
            records: records.parse().ok()?,
            uncounted_max: uncounted_max.parse::<u64>().ok()? + more,
        };
        Some((LaneId::from_name(lane)?, run.into(), taken))
    };
    let runs: Vec<(_, Arc<str>, _)> = lines.map(read_line).collect::<Option<_>>()?;
    for (lane, run, taken) in runs {
        ledger.lane(lane).taken_over.add(&run, taken);
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tempfile::TempDir;

    use super::*;
    use crate::record::{Origin, Record};

    fn run(folder: &TempDir) -> (Arc<Ledger>, TakenFile) {
        let ledger = Arc::new(Ledger::new(Record::new_id()));
        let file = TakenFile::open(folder.path(), &ledger);
        (ledger, file)
    }

    fn deliver(ledger: &Ledger, id: &str) {
        let record = Record {
            id: id.into(),
            body: Bytes::from_static(b"{}"),
            trace: None,
            origin: Some(Origin {
                run: "other".into(),
                at_us: 1,
            }),
            api: None,
            event: None,
        };
        ledger.delivered(LaneId::Nats, [&record]);
    }

    fn taken(ledger: &Ledger) -> Option<Taken> {
        let lane = ledger.lane(LaneId::Nats);
        lane.taken_over.by_run().next().map(|(_, taken)| taken)
    }

    #[tokio::test]
    async fn a_later_run_knows_what_was_taken_over_and_what_a_kill_leaves_uncounted() {
        let folder = TempDir::new().unwrap();
        let (ledger, file) = run(&folder);
        assert_eq!(taken(&ledger), None);
        let keeping = tokio::spawn(file.clone().keep());
        deliver(&ledger, "a");
        deliver(&ledger, "b");
        // Killed once it is written.
        while !folder.path().join(NAME).exists() {
            sleep(LINGER).await;
        }
        keeping.abort();

        let (ledger, file) = run(&folder);
        let mut expected = Taken {
            records: 2,
            uncounted_max: UNCOUNTED_MAX,
        };
        assert_eq!(taken(&ledger), Some(expected));
        deliver(&ledger, "c");
        file.close();
        deliver(&ledger, "too late");

        let (ledger, _) = run(&folder);
        expected.records = 3;
        assert_eq!(taken(&ledger), Some(expected));
        // Killed again, before anything was taken over.
        let (ledger, _) = run(&folder);
        expected.uncounted_max += UNCOUNTED_MAX;
        assert_eq!(taken(&ledger), Some(expected));
    }

    #[test]
    fn a_damaged_file_counts_nothing_by_half() {
        let half = "ended\nnats run 1 0\n";
        for text in [
            "",
            "ended",
            "begun\n",
            &half[..half.len() - 1],
            &[half, "nats other 1\n"].concat(),
            &[half, "nats other 1 x\n"].concat(),
            &[half, "pigeon other 1 0\n"].concat(),
        ] {
            let ledger = Ledger::new("run".into());
            assert_eq!(read(text, &ledger), None, "{text:?}");
            assert_eq!(taken(&ledger), None, "{text:?}");
        }
    }
}
