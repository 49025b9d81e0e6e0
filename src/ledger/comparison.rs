//! Finds the records of a lane that are gone from its broker.
//!
//! A record that has come into a lane and has not come out of it here is in the broker, in this
//! node's hands, or gone. The broker says how many messages it has, whoever published them. So of
//! the records that are outstanding, at least those are gone that exceed this number.
//!
//! The counts move while the broker answers. What is outstanding is counted before the question,
//! and what has ended meanwhile is subtracted after the answer, so the result is never too high.
//! The lower of two comparisons counts: a broker that has just recovered may not know all of its
//! messages yet.
//!
//! Records that are gone were *handed over* if another node may have taken them, else they are
//! *missing*. A node that consumes may have taken any. One that has left took no more records than
//! were outstanding at any time since: it took them before that time, and they do not end here.

use std::time::Duration;

use tokio::time::Instant;

use super::{Counts, LaneLedger};

/// A node that was last seen this long before may have taken records since: it is seen only when
/// the broker is asked.
const UNSEEN: Duration = Duration::from_secs(10);

/// The records of a lane that the broker and this node still have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Present {
    /// The most records of this node that the broker and this node can have.
    pub records: u64,
    /// Another node takes records from the broker.
    pub is_shared: bool,
    /// See [`Backlog::is_exact`](crate::transport::Backlog::is_exact).
    pub is_exact: bool,
}

/// A change that an operator should know of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// So many records are missing, more than before.
    Missing(u64),
    /// None is missing any more.
    NoneMissing,
}

/// The earlier comparisons of a lane.
#[derive(Default)]
pub struct Comparison {
    last: Option<Observed>,
    /// When another node was last seen.
    shared_at: Option<Instant>,
    /// The most records that other nodes can have taken.
    taken_max: u64,
    /// Missing records of the last finding.
    reported: u64,
    /// The most records that were handed over at any time.
    handed_over_max: u64,
}

#[derive(Clone, Copy)]
struct Observed {
    /// At least so many records were gone.
    gone: u64,
    counts: Counts,
}

impl Comparison {
    /// `outstanding` records are so now, and another node consumes, or not.
    fn observe_others(&mut self, is_shared: bool, outstanding: u64, now: Instant) {
        if is_shared {
            self.shared_at = Some(now);
        }
        let may_take = self.shared_at.is_some_and(|at| now - at <= UNSEEN);
        self.taken_max = if may_take {
            u64::MAX
        } else {
            self.taken_max.min(outstanding)
        };
    }
}

impl LaneLedger {
    /// The records that were ever found to be handed over. Unlike their present number, which a
    /// record lowers that comes out here all the same, this one never falls.
    pub const fn handed_over_ever(&self) -> u64 {
        self.comparison.handed_over_max
    }

    /// Compares the counts with what is `present`. `before` are the counts from before the broker
    /// was asked.
    pub(super) fn compare(
        &mut self,
        before: &Counts,
        present: Present,
        now: Instant,
    ) -> Option<Finding> {
        let ended_since = self.counts.ended() - before.ended();
        let gone = before
            .outstanding()
            .saturating_sub(present.records + ended_since);
        let counts = self.counts;
        let outstanding = counts.outstanding();
        let least_outstanding = outstanding.min(before.outstanding());
        self.comparison
            .observe_others(present.is_shared, least_outstanding, now);
        let missing_before = counts.missing();
        let observed = Observed { gone, counts };
        let last = self.comparison.last.replace(observed)?;
        self.count_gone(gone.min(last.gone));
        let stands_still =
            before.moves() == last.counts.moves() && before.moves() == counts.moves();
        self.count_gone_at_most(if stands_still && present.is_exact && !present.is_shared {
            gone.max(last.gone)
        } else {
            outstanding.max(last.counts.outstanding())
        });
        let handed_over = self.counts.handed_over();
        let most = &mut self.comparison.handed_over_max;
        *most = handed_over.max(*most);
        self.finding(missing_before)
    }

    /// At least so many records are gone.
    fn count_gone(&mut self, at_least: u64) {
        let counts = &mut self.counts;
        let new = at_least.saturating_sub(counts.gone_elsewhere + counts.gone_missing);
        let takeable = self.comparison.taken_max;
        let taken = new.min(takeable.saturating_sub(counts.gone_elsewhere));
        counts.gone_elsewhere += taken;
        counts.gone_missing += new - taken;
    }

    /// Some records that were counted as gone are there, or came out.
    fn count_gone_at_most(&mut self, most: u64) {
        let counts = &mut self.counts;
        let there = (counts.gone_elsewhere + counts.gone_missing).saturating_sub(most);
        let found = there.min(counts.gone_missing);
        counts.gone_missing -= found;
        counts.gone_elsewhere -= there - found;
    }

    /// A loss may come to light in parts: it is reported once its number stands still.
    fn finding(&mut self, missing_before: u64) -> Option<Finding> {
        let missing = self.counts.missing();
        let reported = &mut self.comparison.reported;
        if missing > *reported && missing == missing_before {
            *reported = missing;
            Some(Finding::Missing(missing))
        } else if missing == 0 && *reported > 0 {
            *reported = 0;
            Some(Finding::NoneMissing)
        } else {
            // A later loss is reported though this one stays.
            *reported = missing.min(*reported);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A lane, its broker and the time.
    struct Fixture {
        lane: LaneLedger,
        present: Present,
        now: Instant,
    }

    impl Fixture {
        fn new(accepted: u64, records: u64, is_shared: bool) -> Self {
            let mut lane = LaneLedger::default();
            lane.counts.accepted = accepted;
            Self {
                lane,
                present: Present {
                    records,
                    is_shared,
                    is_exact: true,
                },
                now: Instant::now(),
            }
        }

        /// Nothing moves while the broker answers.
        fn compare(&mut self) -> Option<Finding> {
            let before = self.lane.counts;
            self.compare_from(before)
        }

        fn compare_from(&mut self, before: Counts) -> Option<Finding> {
            self.now += Duration::from_secs(2);
            self.lane.compare(&before, self.present, self.now)
        }

        /// In flight, handed over, missing.
        fn counts(&self) -> (u64, u64, u64) {
            let counts = self.lane.counts;
            (counts.in_flight(), counts.handed_over(), counts.missing())
        }
    }

    #[test]
    fn what_is_gone_was_handed_over_where_others_consume_and_is_missing_elsewhere() {
        for (records, is_shared, expected) in [
            (10, false, (10, 0, 0)),
            (12, true, (10, 0, 0)),
            (4, true, (4, 6, 0)),
            (4, false, (4, 0, 6)),
            (0, true, (0, 10, 0)),
            (0, false, (0, 0, 10)),
        ] {
            let mut fixture = Fixture::new(10, records, is_shared);
            fixture.compare();
            assert_eq!(fixture.counts(), (10, 0, 0), "one comparison is not enough");
            fixture.compare();
            assert_eq!(fixture.counts(), expected, "{records} {is_shared}");
        }
    }

    #[test]
    fn what_may_be_on_its_way_is_no_proof_that_a_record_is_there() {
        let mut fixture = Fixture::new(10, 4, false);
        fixture.compare();
        fixture.compare();
        assert_eq!(fixture.counts(), (4, 0, 6));
        (fixture.present.records, fixture.present.is_exact) = (1280, false);
        fixture.compare();
        fixture.compare();
        assert_eq!(fixture.counts(), (4, 0, 6));
        fixture.present.is_exact = true;
        fixture.compare();
        fixture.compare();
        assert_eq!(fixture.counts(), (10, 0, 0));
    }

    #[test]
    fn what_moves_while_the_broker_answers_is_not_gone() {
        let mut fixture = Fixture::new(10, 10, false);
        fixture.compare();
        // All are delivered and acked, and others come, before the broker answers.
        let before = fixture.lane.counts;
        fixture.lane.counts.delivered += 10;
        fixture.lane.counts.accepted += 3;
        fixture.present.records = 0;
        fixture.compare_from(before);
        fixture.compare_from(before);
        assert_eq!(fixture.counts(), (3, 0, 0));
    }

    #[test]
    fn a_loss_is_reported_once_and_so_is_its_end() {
        let mut fixture = Fixture::new(10, 4, false);
        assert_eq!([(); 2].map(|()| fixture.compare()), [None, None]);
        assert_eq!(fixture.compare(), Some(Finding::Missing(6)));
        fixture.present.records = 0;
        assert_eq!([(); 2].map(|()| fixture.compare()), [None, None]);
        assert_eq!(fixture.compare(), Some(Finding::Missing(10)));
        assert_eq!([(); 9].map(|()| fixture.compare()), [None; 9]);
        // They are published again, and wait.
        fixture.present.records = 10;
        assert_eq!(fixture.compare(), None);
        assert_eq!(fixture.compare(), Some(Finding::NoneMissing));
        assert_eq!(fixture.counts(), (10, 0, 0));
    }

    #[test]
    fn a_record_that_comes_out_all_the_same_is_not_gone() {
        for is_shared in [true, false] {
            let mut fixture = Fixture::new(10, 4, is_shared);
            fixture.compare();
            fixture.compare();
            for left in (0..6).rev() {
                fixture.lane.counts.delivered += 1;
                fixture.present.records = fixture.present.records.saturating_sub(1);
                let (in_flight, handed_over, missing) = fixture.counts();
                assert!(in_flight + handed_over + missing == 4 + left);
            }
            fixture.lane.counts.delivered += 4;
            assert_eq!(fixture.counts(), (0, 0, 0));
            fixture.compare();
            fixture.compare();
            fixture.lane.counts.accepted += 5;
            assert_eq!(fixture.counts(), (5, 0, 0), "{is_shared}");
        }
    }

    #[test]
    fn a_node_that_was_there_while_they_were_in_flight_may_have_taken_records() {
        // It leaves after the first comparison.
        let mut fixture = Fixture::new(10, 10, true);
        fixture.compare();
        fixture.present = Present {
            records: 0,
            is_shared: false,
            ..fixture.present
        };
        fixture.compare();
        fixture.compare();
        assert_eq!(fixture.counts(), (0, 10, 0));
        // Long after it has left, and with nothing in flight meanwhile, others are missing.
        for _ in 0..10 {
            fixture.compare();
        }
        fixture.lane.counts.accepted += 3;
        fixture.compare();
        fixture.compare();
        assert_eq!(fixture.counts(), (0, 10, 3));
    }

    #[test]
    fn under_a_steady_load_a_node_that_has_left_takes_no_more() {
        let mut fixture = Fixture::new(10, 10, true);
        fixture.compare();
        // It takes four, and leaves. Records come and end for a while, some always in flight.
        fixture.present = Present {
            records: 6,
            is_shared: false,
            ..fixture.present
        };
        for _ in 0..10 {
            fixture.compare();
            fixture.lane.counts.accepted += 100;
            fixture.lane.counts.delivered += 100;
        }
        assert_eq!(fixture.counts(), (6, 4, 0));
        fixture.lane.counts.accepted += 1000;
        fixture.present.records = 0;
        fixture.compare();
        fixture.compare();
        let (in_flight, handed_over, missing) = fixture.counts();
        assert_eq!(
            (in_flight, missing >= 1000),
            (0, true),
            "{handed_over} {missing}"
        );
    }

    #[test]
    fn the_count_of_what_was_ever_handed_over_does_not_fall() {
        let mut fixture = Fixture::new(10, 4, true);
        fixture.compare();
        fixture.compare();
        assert_eq!(fixture.lane.handed_over_ever(), 6);
        // They come out all the same.
        fixture.lane.counts.delivered += 10;
        fixture.compare();
        fixture.compare();
        assert_eq!(fixture.counts(), (0, 0, 0));
        assert_eq!(fixture.lane.handed_over_ever(), 6);
        fixture.lane.counts.accepted += 9;
        fixture.present.records = 0;
        fixture.compare();
        fixture.compare();
        assert_eq!(fixture.lane.handed_over_ever(), 9);
    }
}
