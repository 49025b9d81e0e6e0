//! The dead letters, and the records that are parked.

use serde_json::{Map, Value, json};

use super::{
    super::{body, reading},
    Paths, QUERY, SELECTION, SPOOL, query,
    reads::with_parameters,
    text, whole, with,
};
use crate::{http::dead_letters::LIMIT_MAX, lane_id::LaneId};

/// The end of a list, from where another one goes on.
const PLACE: &str = "^[0-9]{1,9}-[0-9]{1,19}-[0-9]{1,9}-[0-9]{1,9}-[0-9]{1,9}$";

impl Paths<'_> {
    pub(super) fn letters(&self) -> Value {
        let dead = reading(
            "The dead letters, or the records that are parked.",
            "listDead",
            letters(),
            &[&with(&self.own, &[QUERY, SELECTION, SPOOL])],
        );
        with_parameters(dead, &self.list_query())
    }

    /// The parameters of a list of dead letters.
    fn list_query(&self) -> Value {
        let mut all = members_of_a_filter();
        all.insert("limit".into(), whole(u64::MAX));
        all.insert("parked".into(), json!({ "type": "boolean" }));
        all.insert("records".into(), json!({ "type": "boolean" }));
        let place = json!({ "type": "string", "pattern": PLACE });
        all.insert("after".into(), place);
        all.insert("api".into(), json!({ "type": "string", "enum": self.apis }));
        let all = all.into_iter();
        all.map(|(name, schema)| query(&name, &schema)).collect()
    }

    /// The records of an order: those with these ids, all, or those that a filter matches.
    pub(super) fn selection(&self) -> Value {
        let nothing = || json!({ "type": "null" });
        let or_null = |schema: &Value| json!({ "anyOf": [nothing(), schema] });
        let members = members_of_a_filter();
        let members: Map<_, _> = members
            .iter()
            .map(|(name, of)| (name.clone(), or_null(of)))
            .collect();
        let filter = json!({
            "type": "object",
            "additionalProperties": false,
            "properties": members,
            // One member is not null.
            "not": { "additionalProperties": nothing() },
        });
        let nulls = members.keys().map(|name| (name.clone(), nothing()));
        let nulls: Map<_, _> = nulls.collect();
        // Without a member that is not null, a filter is none.
        let no_filter = or_null(&json!({
            "type": "object",
            "additionalProperties": false,
            "properties": nulls,
        }));
        let ids = json!({ "type": "array", "items": { "type": "string" } });
        let apis: Vec<_> = self
            .apis
            .iter()
            .copied()
            .map(Value::from)
            .chain([Value::Null])
            .collect();
        let order = |required: &str, ids: Value, all: Value, filter: Value, limit: Value| {
            json!({
                "type": "object",
                "required": [required],
                "additionalProperties": false,
                "properties": {
                    "ids": ids,
                    "all": all,
                    "filter": filter,
                    "limit": limit,
                    "parked": { "type": "boolean" },
                    "api": { "enum": apis },
                },
            })
        };
        let (no, yes) = (json!({ "const": false }), json!({ "const": true }));
        json!({ "oneOf": [
            order("ids", ids, no.clone(), no_filter.clone(), nothing()),
            order("all", nothing(), yes, no_filter, nothing()),
            order("filter", nothing(), no, filter, or_null(&whole(u64::MAX))),
        ] })
    }
}

/// The filters that choose dead letters.
fn members_of_a_filter() -> Map<String, Value> {
    let members = [
        ("id", text()),
        ("lane", text()),
        ("status", whole(u32::MAX.into())),
        ("given_up", json!({ "type": "boolean" })),
        ("since_ms", whole(u64::MAX)),
        ("until_ms", whole(u64::MAX)),
        ("text", text()),
    ];
    members
        .map(|(name, schema)| (name.to_owned(), schema))
        .into_iter()
        .collect()
}

/// The answer with dead letters, or with parked records.
fn letters() -> Value {
    let lanes: Vec<_> = LaneId::ALL.into_iter().map(LaneId::name).collect();
    let count = json!({ "type": "integer", "minimum": 0 });
    let count_or_null = json!({ "type": ["integer", "null"], "minimum": 0 });
    let text = text();
    let letter = |time: &str| {
        json!({
            "type": "object",
            "additionalProperties": false,
            "required": [
                "id", "lane", "api", "status", "answer", "attempts", "given_up", "accepted_ms",
                time, "record",
            ],
            "properties": {
                "id": text,
                "lane": { "type": ["string", "null"], "examples": lanes },
                "api": text,
                "status": count_or_null,
                "answer": text,
                "attempts": count,
                "given_up": { "type": "boolean" },
                "accepted_ms": count_or_null,
                time: count,
                "record": { "type": ["string", "null"] },
            },
        })
    };
    let list = |name: &str, time: &str| {
        json!({
            "type": "object",
            "additionalProperties": false,
            "required": ["at_ms", "total", "matching", "next", name],
            "properties": {
                "at_ms": count,
                "total": count,
                "matching": count,
                "next": { "type": ["string", "null"], "pattern": PLACE },
                name: { "type": "array", "maxItems": LIMIT_MAX, "items": letter(time) },
            },
        })
    };
    let either = [list("dead", "dead_ms"), list("parked", "next_try_ms")];
    body(
        "The oldest ones.",
        "application/json",
        json!({ "oneOf": either }),
    )
}
