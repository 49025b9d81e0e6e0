//! The records that a command is about, as flags, as a query and as an order.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use humantime::{format_rfc3339_seconds, parse_duration, parse_rfc3339_weak};
use serde_json::{Map, Value, json};
use url::form_urlencoded;

use super::what;

#[derive(Clone, Debug, clap::Args)]
pub struct LetterArgs {
    /// Records by their id
    #[arg(
        value_name = "ID",
        conflicts_with_all = ["all", "lane", "reason", "since", "until", "text"]
    )]
    pub ids: Vec<String>,
    /// All of them; with a filter, all that match
    #[arg(long)]
    pub all: bool,
    #[command(flatten)]
    pub filter: LetterFilterArgs,
}

/// All that are set must hold.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct LetterFilterArgs {
    /// Only those that came out of this lane
    #[arg(long, value_name = "LANE", help_heading = "Filter")]
    pub lane: Option<String>,
    /// Only those with this reason: a status of the API such as 422, no-answer, refused or given-up
    #[arg(long, value_name = "REASON", value_parser = reason, help_heading = "Filter")]
    pub reason: Option<ReasonFilter>,
    /// Only those that died, or failed last, at this time or later: 2h (ago), or
    /// 2026-11-29T10:00:00Z
    #[arg(long, value_name = "TIME", value_parser = time, help_heading = "Filter")]
    pub since: Option<SystemTime>,
    /// Only those that died, or failed last, before this time
    #[arg(long, value_name = "TIME", value_parser = time, help_heading = "Filter")]
    pub until: Option<SystemTime>,
    /// Only those with this text in the id, the record or the API's answer
    #[arg(long, value_name = "TEXT", help_heading = "Filter")]
    pub text: Option<String>,
}

/// Why a record was not delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReasonFilter {
    /// The API's last answer had this status; 0 if none came.
    Status(u32),
    /// Given up, rather than refused.
    GivenUp(bool),
}

fn reason(text: &str) -> Result<ReasonFilter, String> {
    match text {
        "no-answer" => Ok(ReasonFilter::Status(0)),
        "refused" => Ok(ReasonFilter::GivenUp(false)),
        "given-up" => Ok(ReasonFilter::GivenUp(true)),
        status => status
            .parse()
            .ok()
            .filter(|status| (100..600).contains(status))
            .map(ReasonFilter::Status)
            .ok_or_else(|| "a status such as 422, no-answer, refused or given-up".into()),
    }
}

fn time(text: &str) -> Result<SystemTime, String> {
    let now = SystemTime::now();
    let ago = parse_duration(text).ok();
    let time = match ago {
        Some(ago) => now.checked_sub(ago),
        None => parse_rfc3339_weak(text).ok(),
    };
    let known = time.filter(|time| *time >= UNIX_EPOCH);
    known.ok_or_else(|| "a time ago such as 2h, or a time such as 2026-11-29T10:00:00Z".into())
}

impl LetterArgs {
    /// It says which records, by their ids or otherwise.
    pub fn names_any(&self) -> bool {
        self.all || !self.ids.is_empty() || !self.filter.members().is_empty()
    }
}

impl LetterFilterArgs {
    /// The members of the node's filter.
    pub fn members(&self) -> Map<String, Value> {
        let ms = |time: SystemTime| {
            let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
            u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
        };
        let (status, given_up) = match self.reason {
            Some(ReasonFilter::Status(status)) => (Some(status), None),
            Some(ReasonFilter::GivenUp(is)) => (None, Some(is)),
            None => (None, None),
        };
        let members = [
            ("lane", self.lane.clone().map(Value::from)),
            ("status", status.map(Value::from)),
            ("given_up", given_up.map(Value::from)),
            ("since_ms", self.since.map(|time| ms(time).into())),
            ("until_ms", self.until.map(|time| ms(time).into())),
            ("text", self.text.clone().map(Value::from)),
        ];
        let set = members.into_iter();
        set.filter_map(|(name, value)| Some((name.into(), value?)))
            .collect()
    }

    /// The records in words, such as `dead letters of lane nats, with status 422`.
    pub fn words(&self, parked: bool, api: Option<&str>) -> String {
        let shown = |time: SystemTime| format_rfc3339_seconds(time).to_string();
        let reason = self.reason.map(|reason| match reason {
            ReasonFilter::Status(0) => "without an answer".into(),
            ReasonFilter::Status(status) => format!("with status {status}"),
            ReasonFilter::GivenUp(true) => "given up".into(),
            ReasonFilter::GivenUp(false) => "refused".into(),
        });
        let words = [
            api.map(|api| format!("of API {api}")),
            self.lane.as_ref().map(|lane| format!("of lane {lane}")),
            reason,
            self.since.map(|time| format!("since {}", shown(time))),
            self.until.map(|time| format!("until {}", shown(time))),
            self.text
                .as_ref()
                .map(|text| format!("with the text {text:?}")),
        ];
        let words: Vec<_> = words.into_iter().flatten().collect();
        let what = what(parked);
        if words.is_empty() {
            format!("all {what}s")
        } else {
            format!("{what}s {}", words.join(", "))
        }
    }
}

/// Ends the filter at `at_ms`, unless its own end is earlier: what dies later is no part of it.
pub fn end_at(filter: &mut Map<String, Value>, at_ms: u64) {
    let own = filter.get("until_ms").and_then(Value::as_u64);
    let end = own.map_or(at_ms, |own| own.min(at_ms));
    filter.insert("until_ms".into(), end.into());
}

/// The path that lists at most `limit` records which match, behind `after` if it is there.
pub fn list_path(
    filter: &Map<String, Value>,
    parked: bool,
    api: Option<&str>,
    (limit, after): (usize, Option<&str>),
    with_records: bool,
) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("limit", &limit.to_string());
    query.append_pair("parked", &parked.to_string());
    query.append_pair("records", &with_records.to_string());
    query.extend_pairs(api.map(|api| ("api", api)));
    query.extend_pairs(after.map(|after| ("after", after)));
    for (name, value) in filter {
        let text = value.as_str().map_or_else(|| value.to_string(), Into::into);
        query.append_pair(name, &text);
    }
    format!("/api/dead?{}", query.finish())
}

/// The order for these records: a member such as `ids` or `filter`.
pub fn order((name, which): (&str, Value), parked: bool, api: Option<&str>) -> Value {
    let mut order = json!({"parked": parked});
    order[name] = which;
    if let Some(api) = api {
        order["api"] = api.into();
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_a_filter_a_query_and_words() {
        let filter = LetterFilterArgs {
            lane: Some("nats".into()),
            reason: reason("422").ok(),
            since: time("2026-11-29T10:00:00Z").ok(),
            until: time("2026-11-29 11:00:00").ok(),
            text: Some("a b&".into()),
        };
        let members = filter.members();
        assert_eq!(
            Value::from(members.clone()),
            json!({
                "lane": "nats", "status": 422, "since_ms": 1_795_946_400_000_u64,
                "until_ms": 1_795_950_000_000_u64, "text": "a b&",
            })
        );
        assert_eq!(
            list_path(&members, true, Some("b"), (7, Some("0-1-2-3")), false),
            "/api/dead?limit=7&parked=true&records=false&api=b&after=0-1-2-3&lane=nats\
             &since_ms=1795946400000&status=422&text=a+b%26&until_ms=1795950000000"
        );
        assert_eq!(
            filter.words(true, Some("b")),
            "parked records of API b, of lane nats, with status 422, since 2026-11-29T10:00:00Z, \
             until 2026-11-29T11:00:00Z, with the text \"a b&\""
        );
        assert_eq!(
            LetterFilterArgs::default().words(false, None),
            "all dead letters"
        );
    }

    #[test]
    fn a_reason_and_a_time_are_words_that_the_list_shows() {
        for (text, expected) in [
            ("422", Some(ReasonFilter::Status(422))),
            ("no-answer", Some(ReasonFilter::Status(0))),
            ("given-up", Some(ReasonFilter::GivenUp(true))),
            ("refused", Some(ReasonFilter::GivenUp(false))),
            ("0", None),
            ("5xx", None),
            ("", None),
        ] {
            assert_eq!(reason(text).ok(), expected, "{text}");
        }
        let ago = SystemTime::now().duration_since(time("2h").unwrap());
        let ago = ago.unwrap().as_secs();
        assert!((7_190..=7_200).contains(&ago), "{ago}");
        for wrong in ["", "yesterday", "900y", "1960-01-01T00:00:00Z"] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
    }
}
