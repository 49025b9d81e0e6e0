//! The orders of the admin side, by what a node answers to any body.

use std::{cell::RefCell, fmt};

use actix_rt::System;
use awc::http::StatusCode;
use proptest::{collection::vec, prelude::*, sample::select, test_runner::TestRunner};
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::{Value, value::RawValue};

use super::{TORN, cases, damaged};
use crate::{
    ingest::{RECORD, post},
    support::{
        api::{Api, Conduct},
        eventually,
        lanes::grpc_variables,
        node::{Node, PATIENCE},
    },
};

/// The most that a lane may weigh.
const WEIGHT_MAX: u64 = 1000;
/// As many die at a time.
const LETTERS: usize = 12;
const NAMES: &[&str] = &[
    "ids",
    "all",
    "filter",
    "limit",
    "parked",
    "api",
    "weight",
    "id",
    "lane",
    "status",
    "given_up",
    "since_ms",
    "until_ms",
    "text",
    "",
    "All",
    "a\\u006cl",
];
const VALUES: &[&str] = &[
    "true",
    "false",
    "null",
    "[]",
    "{}",
    "[\"a\"]",
    "[\"a\",\"a\"]",
    "[1]",
    "{\"status\":422}",
    "{\"lane\":\"grpc\"}",
    "{\"text\":\"é\",\"id\":null}",
    "{\"status\":422,\"status\":1}",
    "0",
    "-0",
    "1",
    "3.0",
    "1e1",
    "0.5",
    "1000",
    "1001",
    "-1",
    "4294967296",
    "18446744073709551615",
    "18446744073709551616",
    "\"default\"",
    "\"none\"",
    "\"\"",
    "\"\\ud800\"",
    "\"422\"",
];
const ORDERS: &[&str] = &[
    "{}",
    " {\n} ",
    "{\"weight\":3}",
    "{\"weight\":1e3}",
    "{\"ids\":[]}",
    "{\"ids\":[\"letter-0/3\",\"letter-0/4\",\"none\"],\"api\":\"default\"}",
    "{\"ids\":[\"letter-12/0\"],\"filter\":{}}",
    "{\"all\":true}",
    "{\"all\":true,\"parked\":true}",
    "{\"filter\":{\"status\":422},\"limit\":2}",
    "{\"filter\":{\"since_ms\":1.0,\"until_ms\":9e18,\"given_up\":false},\"limit\":null}",
];

/// An order, nearly one, or none.
fn order_text() -> impl Strategy<Value = Vec<u8>> {
    let member = (select(NAMES), select(VALUES));
    let members = vec(member, 0..4).prop_map(|members| {
        let members = members
            .into_iter()
            .map(|(name, value)| format!("\"{name}\": {value}"));
        format!("{{{}}}", members.collect::<Vec<_>>().join(","))
    });
    let texts = prop_oneof![
        3 => select(ORDERS).prop_map(ToOwned::to_owned),
        2 => members,
        1 => select(VALUES).prop_map(ToOwned::to_owned),
    ];
    damaged(texts, TORN)
}

/// The orders, by what their bodies may say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Nothing,
    Weight,
    Selection,
}

const PATHS: &[(&str, Kind, u16)] = &[
    ("/api/reload", Kind::Nothing, 200),
    ("/api/lanes/resume", Kind::Nothing, 202),
    ("/api/lanes/grpc/resume", Kind::Nothing, 202),
    ("/api/lanes/grpc/weight", Kind::Weight, 200),
    ("/api/lanes/grpc/weight", Kind::Weight, 200),
    ("/api/dead/replay", Kind::Selection, 200),
    ("/api/dead/replay", Kind::Selection, 200),
    ("/api/dead/drop", Kind::Selection, 200),
    ("/api/dead/drop", Kind::Selection, 200),
];

/// The members of an object, in their order.
struct Members(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct All;

        impl<'de> Visitor<'de> for All {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }

        json.deserialize_map(All)
    }
}

impl Members {
    /// `None` if it is no object, has a member twice, or one that is not of `names`.
    fn read(json: &[u8], names: &[&str]) -> Option<Self> {
        let Self(members) = serde_json::from_slice(json).ok()?;
        let mut known: Vec<_> = members.iter().map(|(name, _)| &**name).collect();
        known.sort_unstable();
        known.dedup();
        let is_right =
            known.len() == members.len() && known.iter().all(|name| names.contains(name));
        is_right.then_some(Self(members))
    }

    fn raw(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().find(|(known, _)| known == name);
        found.map(|(_, raw)| raw.get())
    }

    /// The value of a member, which is null if there is none; `None` if it is no JSON.
    fn get(&self, name: &str) -> Option<Value> {
        serde_json::from_str(self.raw(name).unwrap_or("null")).ok()
    }

    /// Whether a member is there, and not null.
    fn has(&self, name: &str) -> bool {
        self.raw(name).is_some_and(|raw| raw != "null")
    }

    /// Whether a member is missing, null, or as `is_right` says.
    fn may_be(&self, name: &str, is_right: impl Fn(&Value) -> bool) -> bool {
        let value = self.get(name);
        value.is_some_and(|value| value.is_null() || is_right(&value))
    }
}

/// A whole number, as JSON Schema has it.
fn whole(value: &Value) -> Option<u64> {
    if let Some(number) = value.as_u64() {
        return Some(number);
    }
    let number = value.as_f64()?;
    let is_whole = number.fract() == 0.0 && (0.0..2.0_f64.powi(64)).contains(&number);
    // The text of a whole float is its digits.
    is_whole.then(|| format!("{}", number.abs()).parse().ok())?
}

/// The new weight that an order has.
fn weight(json: &[u8]) -> Option<u64> {
    let members = Members::read(json, &["weight"])?;
    whole(&members.get("weight")?).filter(|weight| *weight <= WEIGHT_MAX)
}

/// Whether a filter is one, and says something.
fn filter(json: &[u8]) -> Option<bool> {
    let texts = ["id", "lane", "text"];
    let numbers = [
        ("status", u64::from(u32::MAX)),
        ("since_ms", u64::MAX),
        ("until_ms", u64::MAX),
    ];
    let names: Vec<_> = texts
        .into_iter()
        .chain(numbers.map(|(name, _)| name))
        .chain(["given_up"])
        .collect();
    let members = Members::read(json, &names)?;
    let is_right = texts
        .iter()
        .all(|name| members.may_be(name, Value::is_string))
        && numbers.iter().all(|(name, most)| {
            members.may_be(name, |value| {
                whole(value).is_some_and(|value| value <= *most)
            })
        })
        && members.may_be("given_up", Value::is_boolean);
    let says_something = names.iter().any(|name| members.has(name));
    is_right.then_some(says_something)
}

/// Whether an order chooses letters, of an API that there is.
fn selects(json: &[u8]) -> Option<bool> {
    let members = Members::read(json, &["ids", "all", "filter", "limit", "parked", "api"])?;
    let flag = |name| match members.raw(name) {
        None => Some(false),
        Some(_) => members.get(name)?.as_bool(),
    };
    let (all, _) = (flag("all")?, flag("parked")?);
    let are_ids = |value: &Value| {
        let ids = value.as_array();
        ids.is_some_and(|ids| ids.iter().all(Value::is_string))
    };
    let is_known = |value: &Value| value == "default";
    let is_right = members.may_be("ids", are_ids)
        && members.may_be("api", is_known)
        && members.may_be("limit", |value| whole(value).is_some());
    let filtered = match members.raw("filter") {
        None | Some("null") => false,
        Some(raw) => filter(raw.as_bytes())?,
    };
    let chosen = [members.has("ids"), all, filtered];
    let is_one = chosen.into_iter().filter(|chosen| *chosen).count() == 1;
    Some(is_right && is_one && (filtered || !members.has("limit")))
}

struct Rig {
    node: Node,
    http: awc::Client,
    died: usize,
}

impl Rig {
    async fn ask(&self, path: &str, body: Vec<u8>) -> (u16, String, Value) {
        let url = format!("http://127.0.0.1:{}{path}", self.node.admin);
        let request = self.http.post(url).content_type("application/json");
        let mut answer = request.send_body(body).await.expect("an answer");
        let content_type = answer.headers().get("content-type").expect("a type");
        let content_type = content_type.to_str().expect("text").to_owned();
        let body = answer.body().await.expect("a body");
        let json = serde_json::from_slice(&body).expect("JSON");
        (answer.status().as_u16(), content_type, json)
    }

    async fn letters(&self) -> u64 {
        let list = self
            .node
            .get("/api/dead?limit=0")
            .await
            .expect("it answers");
        list.1["total"].as_u64().expect("a number")
    }

    /// Has some die, if there are none and none are on their way.
    async fn add_letters(&mut self) {
        eventually("nothing is on its way", PATIENCE, async || {
            let ledger = self.node.status().await["ledger"].clone();
            let is_none = |name| ledger[name] == 0;
            ["in_flight", "spooled", "parked"]
                .into_iter()
                .all(is_none)
                .then_some(())
        })
        .await;
        if self.letters().await > 0 {
            return;
        }
        let body = format!("[{}]", [RECORD; LETTERS].join(","));
        let key = format!("letter-{}", self.died);
        let sent = post(body)
            .with("Idempotency-Key", key)
            .send(&self.node)
            .await;
        assert_eq!(sent.0, StatusCode::ACCEPTED);
        self.died += LETTERS;
        eventually("all are dead", PATIENCE, async || {
            (self.letters().await == LETTERS as u64).then_some(())
        })
        .await;
    }

    async fn check(&mut self, (path, kind, good): (&str, Kind, u16), body: Vec<u8>) {
        let shown = String::from_utf8_lossy(&body).into_owned();
        let is_order = match kind {
            Kind::Nothing => Members::read(&body, &[]).is_some(),
            Kind::Weight => weight(&body).is_some(),
            Kind::Selection => selects(&body) == Some(true),
        };
        let is_drop = path.ends_with("/drop");
        let before = if is_drop { self.letters().await } else { 0 };
        let new_weight = weight(&body);
        let (status, content_type, answer) = self.ask(path, body).await;
        let shown = format!("{path}: {shown}: {answer}");
        assert_eq!(status, if is_order { good } else { 400 }, "{shown}");
        if !is_order {
            assert_eq!(content_type, "application/problem+json", "{shown}");
            assert_eq!(answer["status"], 400, "{shown}");
            assert!(
                answer["detail"]
                    .as_str()
                    .is_some_and(|detail| !detail.is_empty())
            );
        }
        if is_order && kind == Kind::Weight {
            assert_eq!(answer["weight"].as_u64(), new_weight, "{shown}");
        }
        if is_drop {
            // A letter that is replayed meanwhile comes back by itself.
            let dropped = answer["dropped"].as_u64().unwrap_or(0);
            assert!(self.letters().await + dropped >= before, "{shown}");
            if dropped > 0 {
                self.add_letters().await;
            }
        }
    }
}

#[test]
fn an_order_with_any_body_is_carried_out_or_refused() {
    let system = System::new();
    let api = Api::start();
    api.keep_keys_only();
    api.behave(|_, _| Conduct::Answer(422));
    let mut rig = system.block_on(async {
        let node = Node::start(&api.url(), &grpc_variables()).await;
        node.lane_is("grpc", "up", PATIENCE).await;
        let http = awc::Client::default();
        let mut rig = Rig {
            node,
            http,
            died: 0,
        };
        rig.add_letters().await;
        rig
    });
    let shared = RefCell::new(&mut rig);
    let mut runner = TestRunner::new(cases());
    let checked = runner.run(&(select(PATHS), order_text()), |(order, body)| {
        system.block_on(shared.borrow_mut().check(order, body));
        Ok(())
    });
    checked.unwrap_or_else(|why| panic!("{why}"));
    let log = rig.node.log();
    assert!(!log.contains("panicked"), "{log}");
}
