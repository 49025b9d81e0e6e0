//! The dead letters, and the records that are parked: list, replay, drop.

use std::{collections::HashSet, fmt};

use actix_web::{HttpResponse, web};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    order_body::{OrderBody, whole_number_or_null},
    problem::{Problem, ProblemKind},
    status::AdminState,
};
use crate::{
    clock::unix_us,
    config::DEFAULT_API,
    spool::{
        Entry, EntryKey, LetterAction, LetterFilter, LetterQuery, NotSafe, Queue, Spools,
        Undelivered, Which,
    },
};

/// Dead letters in a list, unless the request asks for another number.
const LIMIT_DEFAULT: usize = 100;
/// The most dead letters in a list.
pub(super) const LIMIT_MAX: usize = 10_000;
/// A list ends with the dead letter that brings it over so many bytes.
const LIST_BYTES: usize = 8 << 20;

/// A dead letter, or a parked record, as `GET /api/dead` lists it. Times are in milliseconds since
/// the Unix epoch.
fn listed(entry: Entry, records: bool) -> Value {
    let reason = entry.reason.as_ref();
    let reason = reason.cloned().unwrap_or_default();
    let (time, at_us) = match &entry.parked {
        Some(parked) => ("next_try_ms", parked.due_us),
        None => ("dead_ms", reason.at_us),
    };
    json!({
        "id": entry.id,
        "lane": reason.lane,
        "api": entry.api.as_deref().unwrap_or(DEFAULT_API),
        // The API's last answer.
        "status": Some(reason.status).filter(|status| *status > 0),
        "answer": reason.answer,
        "attempts": reason.attempts,
        // Given up, rather than refused.
        "given_up": reason.given_up,
        "accepted_ms": entry.record().origin.map(|origin| origin.at_us / 1000),
        time: at_us / 1000,
        "record": records.then(|| String::from_utf8_lossy(&entry.body)),
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListQuery {
    limit: Option<usize>,
    #[serde(default)]
    parked: bool,
    api: Option<String>,
    /// Without the records themselves, if false.
    records: Option<bool>,
    /// The [`ListPlace`] behind which the list begins.
    after: Option<String>,
    // A filter, which a query cannot have in one.
    id: Option<String>,
    lane: Option<String>,
    status: Option<u32>,
    given_up: Option<bool>,
    since_ms: Option<u64>,
    until_ms: Option<u64>,
    text: Option<String>,
}

impl ListQuery {
    /// At `at_ms`, which is its end if it has a member and no earlier end: an order until then has
    /// as many letters, whatever dies during the search.
    fn filter(&self, at_ms: u64) -> LetterFilter {
        let body = FilterBody {
            id: self.id.clone(),
            lane: self.lane.clone(),
            status: self.status,
            given_up: self.given_up,
            since_ms: self.since_ms,
            until_ms: self.until_ms,
            text: self.text.clone(),
        };
        let mut filter = LetterFilter::from(body);
        if !filter.is_empty() {
            let now = at_ms.saturating_mul(1000);
            filter.until_us = Some(filter.until_us.map_or(now, |until| until.min(now)));
        }
        filter
    }
}

/// A [`LetterFilter`] as an order has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FilterBody {
    id: Option<String>,
    lane: Option<String>,
    #[serde(default, deserialize_with = "whole_number_or_null")]
    status: Option<u32>,
    given_up: Option<bool>,
    #[serde(default, deserialize_with = "whole_number_or_null")]
    since_ms: Option<u64>,
    #[serde(default, deserialize_with = "whole_number_or_null")]
    until_ms: Option<u64>,
    text: Option<String>,
}

impl From<FilterBody> for LetterFilter {
    fn from(body: FilterBody) -> Self {
        let micros = |ms: u64| ms.saturating_mul(1000);
        Self {
            id: body.id,
            lane: body.lane,
            api: None,
            status: body.status,
            given_up: body.given_up,
            since_us: body.since_ms.map(micros),
            until_us: body.until_ms.map(micros),
            text: body.text,
        }
    }
}

/// The end of a list, from where another one goes on.
struct ListPlace {
    /// The disk, by its number among those that are asked.
    disk: usize,
    /// The count of the first list, so that the others need not read all again.
    matching: u64,
    key: EntryKey,
}

impl fmt::Display for ListPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}", self.disk, self.matching, self.key)
    }
}

impl ListPlace {
    fn parse(text: &str) -> Result<Self, Problem> {
        let place = || {
            let mut parts = text.splitn(3, '-');
            Some(Self {
                disk: parts.next()?.parse().ok()?,
                matching: parts.next()?.parse().ok()?,
                key: EntryKey::parse(parts.next()?)?,
            })
        };
        let detail = "after is the next of an earlier answer";
        place().ok_or_else(|| Problem::bad_request(ProblemKind::Query, detail))
    }
}

/// The disks that have the records of this API; without a name, of all. The second is the name if
/// others are there too.
fn disks(state: &AdminState, api: Option<String>) -> Result<(Spools, Option<String>), Problem> {
    let Some(name) = api else {
        return Ok((state.apis.spools().clone(), None));
    };
    let disk = state.apis.disk_of(&name);
    let disk = disk.ok_or_else(|| no_api(&name))?;
    Ok((disk.spools, disk.is_shared.then_some(name)))
}

/// An API that is neither configured nor has a disk of its own must have records.
async fn check_known(state: &AdminState, disks: &Spools, name: &str) -> Result<(), Problem> {
    if state.apis.names().any(|known| known == name) {
        return Ok(());
    }
    for of in [Undelivered::Dead, Undelivered::Parked] {
        if count(disks, of, Some(name.to_owned())).await? > 0 {
            return Ok(());
        }
    }
    Err(no_api(name))
}

fn no_api(name: &str) -> Problem {
    let detail = format!("There is no API {name:?}, configured or with records on disk");
    Problem::bad_request(ProblemKind::Selection, detail)
}

pub(super) async fn list(
    state: web::Data<AdminState>,
    query: web::Query<ListQuery>,
) -> Result<HttpResponse, Problem> {
    let limit = query.limit.unwrap_or(LIMIT_DEFAULT).min(LIMIT_MAX);
    let of = undelivered(query.parked);
    let (disks, api) = disks(&state, query.api.clone())?;
    let at_ms = unix_us() / 1000;
    let filter = LetterFilter {
        api: api.clone(),
        ..query.filter(at_ms)
    };
    let records = query.records.unwrap_or(true);
    let after = query.after.as_deref().map(ListPlace::parse).transpose()?;
    // All that match are known, or counted without reading them.
    let counts = after.is_none() && !filter.is_empty();
    let mut matching = after.as_ref().map_or(0, |after| after.matching);
    let first = after.as_ref().map_or(0, |after| after.disk);
    let mut end = after.map(|after| (after.disk, after.key));
    let (mut entries, mut bytes) = (Vec::new(), 0);
    let mut has_more = false;
    for (disk, spool) in disks.iter().enumerate().skip(first) {
        if has_more && !counts {
            break;
        }
        let query = LetterQuery {
            filter: filter.clone(),
            max: limit - entries.len(),
            bytes_max: LIST_BYTES.saturating_sub(bytes),
            bodies: records,
            after: end.filter(|end| end.0 == disk).map(|end| end.1),
            counts,
        };
        let found = spool.search(of, query).await.map_err(spool_fails)?;
        matching += found.matching;
        has_more |= found.has_more;
        bytes += found.bytes;
        if let Some(key) = found.last {
            end = Some((disk, key));
        }
        let found = found.entries.into_iter();
        entries.extend(found.map(|entry| listed(entry, records)));
    }
    let found = disks.stats();
    let (name, mut total) = match of {
        Undelivered::Dead => ("dead", found.records(Queue::Dead)),
        Undelivered::Parked => ("parked", found.parked()),
    };
    if let Some(api) = api {
        total = count(&disks, of, Some(api.clone())).await?;
        if total == 0 {
            check_known(&state, &disks, &api).await?;
        }
    }
    if filter.is_empty() {
        matching = total;
    }
    let next = end.filter(|_| has_more);
    let next = next.map(|(disk, key)| ListPlace {
        disk,
        matching,
        key,
    });
    Ok(HttpResponse::Ok().json(json!({
        "at_ms": at_ms,
        "total": total,
        "matching": matching,
        "next": next.map(|place| place.to_string()),
        name: entries,
    })))
}

/// The number of records for `api`.
async fn count(disks: &Spools, of: Undelivered, api: Option<String>) -> Result<u64, Problem> {
    let query = LetterQuery {
        filter: LetterFilter {
            api,
            ..LetterFilter::default()
        },
        counts: true,
        ..LetterQuery::default()
    };
    let mut all = 0;
    for spool in disks.iter() {
        let found = spool.search(of, query.clone()).await;
        all += found.map_err(spool_fails)?.matching;
    }
    Ok(all)
}

const fn undelivered(is_parked: bool) -> Undelivered {
    if is_parked {
        Undelivered::Parked
    } else {
        Undelivered::Dead
    }
}

/// The records of a request: `{"ids":[…]}`, `{"all":true}` or `{"filter":{…}}`, of the parked ones
/// with `"parked":true`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Selection {
    ids: Option<HashSet<String>>,
    #[serde(default)]
    all: bool,
    filter: Option<OrderBody<FilterBody>>,
    /// The most records of a filter.
    #[serde(default, deserialize_with = "whole_number_or_null")]
    limit: Option<u64>,
    #[serde(default)]
    parked: bool,
    /// Only those of this API.
    api: Option<String>,
}

impl Selection {
    pub(super) fn which(self) -> Result<(Undelivered, Which), Problem> {
        let of = undelivered(self.parked);
        let filter = self.filter.map(|OrderBody(filter)| filter.into());
        let filter = filter.filter(|filter| *filter != LetterFilter::default());
        if self.limit.is_some() && filter.is_none() {
            return Err(Problem::bad_request(
                ProblemKind::Selection,
                "A limit goes with a filter: all, and ids, have none",
            ));
        }
        match (self.ids, self.all, filter) {
            (Some(ids), false, None) => Ok((of, Which::Ids { ids, api: None })),
            (None, true, None) => Ok((of, Which::All)),
            (None, false, Some(filter)) => {
                let max = self.limit.unwrap_or(u64::MAX);
                Ok((of, Which::Matching { filter, max }))
            }
            _ => Err(Problem::bad_request(
                ProblemKind::Selection,
                "Either ids, all, or a filter with a member, as in {\"all\":true}",
            )),
        }
    }
}

pub(super) async fn replay(
    state: web::Data<AdminState>,
    web::Json(OrderBody(selection)): web::Json<OrderBody<Selection>>,
) -> Result<HttpResponse, Problem> {
    order(LetterAction::Replay, state, selection).await
}

pub(super) async fn drop_dead(
    state: web::Data<AdminState>,
    web::Json(OrderBody(selection)): web::Json<OrderBody<Selection>>,
) -> Result<HttpResponse, Problem> {
    order(LetterAction::Drop, state, selection).await
}

async fn order(
    action: LetterAction,
    state: web::Data<AdminState>,
    selection: Selection,
) -> Result<HttpResponse, Problem> {
    let (disks, api) = disks(&state, selection.api.clone())?;
    let (of, which) = selection.which()?;
    let which = match &api {
        Some(name) => which.of_api(name),
        None => which,
    };
    let (asked, searched) = (state.clone(), disks.clone());
    // Done and counted though the operator has hung up.
    let ordered = actix_rt::spawn(async move {
        let mut all = 0;
        for spool in disks.iter() {
            let mut order = spool.order(action, of, which.after(all));
            while let Some(done) = order.next().await.map_err(|why| (why, all))? {
                if action == LetterAction::Drop {
                    state.ledger.dropped(done);
                }
                all += done;
            }
        }
        Ok(all)
    });
    let name = match action {
        LetterAction::Replay => "replayed",
        LetterAction::Drop => "dropped",
    };
    let ordered = ordered.await.unwrap_or(Err((NotSafe::Closed, 0)));
    let done = ordered.map_err(|(why, done)| spool_fails(why).with(name, done))?;
    if done == 0
        && let Some(api) = api
    {
        check_known(&asked, &searched, &api).await?;
    }
    Ok(HttpResponse::Ok().json(json!({name: done})))
}

fn spool_fails(why: NotSafe) -> Problem {
    Problem::unavailable(ProblemKind::Spool, why.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(query: &str) -> Option<LetterFilter> {
        let query = web::Query::<ListQuery>::from_query(query).ok()?;
        Some(query.filter(7))
    }

    #[test]
    fn a_query_has_an_end_if_it_has_a_filter() {
        let until = |query| filter(query).map(|filter| filter.until_us);
        assert_eq!(until("status=422"), Some(Some(7000)));
        assert_eq!(until("status=422&until_ms=6"), Some(Some(6000)));
        assert_eq!(until("until_ms=9"), Some(Some(7000)), "no later one");
        assert_eq!(until("limit=5&parked=true"), Some(None));
    }

    #[test]
    fn a_query_with_an_unknown_member_is_refused() {
        assert_eq!(filter("state=422"), None);
        assert!(filter("status=422&records=false&api=a&given_up=true&since_ms=1").is_some());
    }
}
