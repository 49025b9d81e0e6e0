//! Which dead letters or parked records an operator means, by what is known of them.

use memchr::memmem;

use super::Entry;
use crate::config::DEFAULT_API;

/// Each member that is set must hold; without any, all records are meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LetterFilter {
    pub id: Option<String>,
    /// The lane that the record came out of.
    pub lane: Option<String>,
    /// The API that it is for: [`DEFAULT_API`] for `[api]`.
    pub api: Option<String>,
    /// The status of the API's last answer; 0 if none came.
    pub status: Option<u32>,
    /// Given up, rather than refused.
    pub given_up: Option<bool>,
    /// The death, or the last failure, is not before this time, in microseconds since the Unix
    /// epoch.
    pub since_us: Option<u64>,
    /// It is before this time.
    pub until_us: Option<u64>,
    /// In the id, the record or the API's answer.
    pub text: Option<String>,
}

impl LetterFilter {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    pub fn matches(&self, entry: &Entry) -> bool {
        let reason = entry.reason.clone().unwrap_or_default();
        // A record that its API had no place for has failed nowhere.
        let accepted_us = entry.record().origin.map(|origin| origin.at_us);
        let at_us = match reason.at_us {
            0 => accepted_us.unwrap_or_default(),
            at_us => at_us,
        };
        let has = |text: &str| {
            let text = text.as_bytes();
            let parts = [entry.id.as_bytes(), reason.answer.as_bytes(), &entry.body];
            parts.iter().any(|part| memmem::find(part, text).is_some())
        };
        self.id.as_ref().is_none_or(|id| *id == entry.id)
            && self.lane.as_ref().is_none_or(|lane| *lane == reason.lane)
            && is_of(entry, self.api.as_deref())
            && self.status.is_none_or(|status| status == reason.status)
            && self.given_up.is_none_or(|is| is == reason.given_up)
            && self.since_us.is_none_or(|since| at_us >= since)
            && self.until_us.is_none_or(|until| at_us < until)
            && self.text.as_deref().is_none_or(has)
    }
}

/// Whether `entry` is for `api`, as in [`LetterFilter::api`].
pub(super) fn is_of(entry: &Entry, api: Option<&str>) -> bool {
    api.is_none_or(|api| api == entry.api.as_deref().unwrap_or(DEFAULT_API))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spool::entry::DeathReason;

    type Set = fn(&mut LetterFilter);

    #[test]
    fn each_member_narrows_the_choice() {
        let entry = Entry {
            id: "order/7".into(),
            body: r#"{"name":"Ana"}"#.into(),
            api: Some("slow".into()),
            reason: Some(DeathReason {
                lane: "nats".into(),
                status: 422,
                answer: "no such place".into(),
                attempts: 1,
                at_us: 1000,
                given_up: false,
            }),
            ..Entry::default()
        };
        let filter = |set: Set| {
            let mut filter = LetterFilter::default();
            set(&mut filter);
            filter
        };
        let is_empty = filter(|_| {});
        assert!(is_empty.is_empty() && is_empty.matches(&entry));
        let cases: [(Set, bool); 18] = [
            (|filter| filter.id = Some("order/7".into()), true),
            (|filter| filter.id = Some("order".into()), false),
            (|filter| filter.lane = Some("nats".into()), true),
            (|filter| filter.lane = Some("grpc".into()), false),
            (|filter| filter.api = Some("slow".into()), true),
            (|filter| filter.api = Some("default".into()), false),
            (|filter| filter.status = Some(422), true),
            (|filter| filter.status = Some(0), false),
            (|filter| filter.given_up = Some(false), true),
            (|filter| filter.given_up = Some(true), false),
            (|filter| filter.since_us = Some(1000), true),
            (|filter| filter.since_us = Some(1001), false),
            (|filter| filter.until_us = Some(1001), true),
            (|filter| filter.until_us = Some(1000), false),
            (|filter| filter.text = Some("der/7".into()), true),
            (|filter| filter.text = Some("such place".into()), true),
            (|filter| filter.text = Some("Ana".into()), true),
            (|filter| filter.text = Some("ana".into()), false),
        ];
        for (set, matches) in cases {
            let mut filter = filter(set);
            assert_eq!(filter.matches(&entry), matches, "{filter:?}");
            assert!(!filter.is_empty());
            // All of them must hold.
            filter.lane = Some("other".into());
            assert!(!filter.matches(&entry), "{filter:?}");
        }
    }

    #[test]
    fn a_record_that_has_failed_nowhere_has_the_time_of_its_acceptance() {
        let held = Entry {
            origin: Some("run/1000".into()),
            ..Entry::default()
        };
        let accepted_us = held.record().origin.map(|origin| origin.at_us);
        let since = |since_us| LetterFilter {
            since_us: Some(since_us),
            ..LetterFilter::default()
        };
        let accepted_us = accepted_us.expect("it has an origin");
        assert!(since(accepted_us).matches(&held));
        assert!(!since(accepted_us + 1).matches(&held));
    }
}
