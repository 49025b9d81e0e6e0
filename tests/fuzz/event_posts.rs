//! Events that pass a node, from a client in each mode to an API in each mode.

use std::{cell::RefCell, collections::BTreeMap};

use actix_rt::System;
use bytes::Bytes;
use percent_encoding::percent_decode_str;
use proptest::{collection::vec, prelude::*, sample::select, test_runner::TestRunner};
use serde_json::{Value, json};
use tokio::{sync::mpsc, time::timeout};
use waypost::cloud_events::parse_event;

use super::cases;
use crate::{
    ingest::RECORD,
    routing::rules,
    support::{
        api::{Api, Conduct, Post},
        lanes::grpc_variables,
        node::{Node, PATIENCE},
    },
};

/// `[api]` gets events in the binary mode, and the API of a rule in the structured one.
const APIS: &str = r#"
[api]
cloudevents = "binary"

[apis.structured]
url = "URLstructured"
cloudevents = "structured"

[[routes]]
when = { header = "x-api", equals = "structured" }
api = "structured"
"#;
const NAMES: &[&str] = &[
    "subject",
    "time",
    "dataschema",
    "note",
    "path",
    "urgent",
    "x1",
    "traceparent",
    "some_name",
    "a-b",
    "data",
    "id",
    "partitionkey",
];

/// The way of an event into the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Codes no more than it has to.
    Binary,
    /// Codes each character, with small digits.
    Coded,
    /// Within quotes.
    Quoted,
    Structured,
    Batch,
}

const WAYS: &[Way] = &[
    Way::Binary,
    Way::Coded,
    Way::Quoted,
    Way::Structured,
    Way::Batch,
];
const MODES: &[&str] = &["binary", "structured"];

fn value() -> impl Strategy<Value = String> {
    const VALUES: &[&str] = &[
        "é 😀 % \"",
        "%41",
        "%zz",
        "a&b=c",
        "",
        " ",
        "true",
        "-7",
        "2026-11-30T01:02:03Z",
        "2026-11-30 01:02:03Z",
        "urn:a",
        "https://a/b?c#d",
        "\\",
        "\"quoted\"",
        "a,b;c",
        "\u{fdd0}",
        "\u{85}",
        "\u{10ffff}",
        "\t",
        "null",
    ];
    let long = (1..3000_usize).prop_map(|length| "é%".repeat(length / 2));
    prop_oneof![
        6 => select(VALUES).prop_map(ToOwned::to_owned),
        2 => "[ -~é😀]{0,20}",
        2 => any::<String>(),
        1 => long,
    ]
}

/// The attributes beside those that each event has. One of those may be wrong.
fn attributes() -> impl Strategy<Value = BTreeMap<String, String>> {
    let name = prop_oneof![4 => select(NAMES).prop_map(ToOwned::to_owned), 1 => "[a-z0-9]{1,24}"];
    let required = select(&["specversion", "source", "type", "id"][..]);
    let wrong = proptest::option::weighted(0.2, (required, value()));
    let others = vec((name, value()), 0..4);
    (others, wrong).prop_map(|(others, wrong)| {
        let mut all: BTreeMap<String, String> = [
            ("specversion", "1.0"),
            ("source", "/cases?a=%C3%A9"),
            ("type", "org.example.é 😀 %\""),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
        all.extend(others);
        if let Some((name, value)) = wrong {
            all.insert(name.to_owned(), value);
        }
        // Content-Type has it, or the way in sets it.
        all.remove("datacontenttype");
        all
    })
}

/// The value of a header for `text`.
fn header(text: &str, way: Way) -> String {
    let mut value = String::new();
    for character in text.chars() {
        let escape = match character {
            _ if way == Way::Coded => None,
            '"' | '\\' if way == Way::Quoted => Some("\\"),
            ' ' if way == Way::Quoted => Some(""),
            '"' | '%' | ' ' => None,
            '!'..='~' => Some(""),
            _ => None,
        };
        if let Some(escape) = escape {
            value.push_str(escape);
            value.push(character);
            continue;
        }
        for byte in character.to_string().bytes() {
            let code = match way {
                Way::Coded => format!("%{byte:02x}"),
                _ => format!("%{byte:02X}"),
            };
            value.push_str(&code);
        }
    }
    match way {
        Way::Quoted => format!("\"{value}\""),
        _ => value,
    }
}

struct Rig {
    node: Node,
    http: awc::Client,
    posts: mpsc::UnboundedReceiver<Post>,
    count: usize,
}

impl Rig {
    async fn check(&mut self, mut event: BTreeMap<String, String>, way: Way, to: &'static str) {
        self.count += 1;
        // Each is a new one, but for those without an id.
        let count = self.count;
        let id = event
            .get("id")
            .map(|id| (!id.is_empty()).then(|| format!("{id}{count}")));
        let id = id.unwrap_or_else(|| Some(format!("{count} é😀%\"")));
        event.insert("id".into(), id.unwrap_or_default());
        let data: Value = serde_json::from_str(RECORD).expect("JSON");
        let members = event
            .iter()
            .map(|(name, value)| (name.clone(), json!(value)));
        let mut members: serde_json::Map<_, _> = members.collect();
        // An attribute may not have this name, so neither may a header.
        let has_data = members.insert("data".into(), data.clone()).is_some();
        if !matches!(way, Way::Structured | Way::Batch) {
            // Its header is an attribute.
            members.insert("datacontenttype".into(), json!("application/json"));
        }
        let text = Value::from(members).to_string();
        let body = Bytes::from(text);
        let text = std::str::from_utf8(&body).expect("it was text");
        let expected = parse_event(&body, text).ok().filter(|_| !has_data);
        let url = format!("http://127.0.0.1:{}/", self.node.ingest);
        let mut request = self.http.post(url).insert_header(("x-api", to));
        let sent = match way {
            Way::Structured | Way::Batch if has_data => return,
            Way::Structured => request
                .content_type("application/cloudevents+json")
                .send_body(text.to_owned()),
            Way::Batch => request
                .content_type("application/cloudevents-batch+json")
                .send_body(format!("[{text}]")),
            Way::Binary | Way::Coded | Way::Quoted => {
                for (name, value) in &event {
                    let name = format!("ce-{name}");
                    request = request.insert_header((name, header(value, way)));
                }
                request.content_type("application/json").send_body(RECORD)
            }
        };
        let mut answer = sent.await.expect("an answer");
        let status = answer.status().as_u16();
        let told = answer.body().await.expect("a body");
        let shown = format!("{way:?}: {event:?}: {status}: {told:?}");
        let Some(expected) = expected else {
            assert!(matches!(status, 400 | 431), "{shown}");
            return;
        };
        assert_eq!(status, 202, "{shown}");
        let key = expected.attributes.key();
        let came = loop {
            let came = timeout(PATIENCE, self.posts.recv()).await;
            let came = came.expect("in time").expect("the API runs");
            // An earlier one may come once more.
            if came.key.as_deref() == Some(&*key) {
                break came;
            }
        };
        event.insert("path".into(), "GRPC".into());
        if to == "structured" {
            let mut json: Value = serde_json::from_slice(&came.body).expect("JSON");
            let members = json.as_object_mut().expect("an object");
            assert_eq!(members.remove("data"), Some(data), "{shown}");
            assert_eq!(
                members.remove("datacontenttype"),
                Some(json!("application/json"))
            );
            assert_eq!(json, json!(event), "{shown}");
            return;
        }
        let is_json = matches!(way, Way::Structured | Way::Batch);
        let sent = if is_json {
            data.to_string()
        } else {
            RECORD.into()
        };
        assert_eq!(came.body, sent, "{shown}");
        let attributes = came.event.iter().map(|(name, value)| {
            let name = name.strip_prefix("ce-").expect("the prefix");
            assert!(
                value
                    .bytes()
                    .all(|byte| byte.is_ascii_graphic() && byte != b'"'),
                "{shown}"
            );
            let value = percent_decode_str(value).decode_utf8().expect("UTF-8");
            (name.to_owned(), value.into_owned())
        });
        assert_eq!(attributes.collect::<BTreeMap<_, _>>(), event, "{shown}");
    }
}

#[test]
fn an_event_of_any_mode_is_the_same_at_an_api_of_any_mode() {
    let system = System::new();
    let api = Api::start();
    api.keep_keys_only();
    let (sender, posts) = mpsc::unbounded_channel();
    api.behave(move |_, post| {
        sender.send(post.clone()).ok();
        Conduct::Answer(200)
    });
    let file = rules(&APIS.replace("URL", &api.url()));
    let mut rig = system.block_on(async {
        let node = Node::start_with_config(&api.url(), &grpc_variables(), file.path()).await;
        node.lane_is("grpc", "up", PATIENCE).await;
        let http = awc::Client::default();
        Rig {
            node,
            http,
            posts,
            count: 0,
        }
    });
    let shared = RefCell::new(&mut rig);
    let mut runner = TestRunner::new(cases());
    let case = (attributes(), select(WAYS), select(MODES));
    let checked = runner.run(&case, |(event, way, to)| {
        system.block_on(shared.borrow_mut().check(event, way, to));
        Ok(())
    });
    checked.unwrap_or_else(|why| panic!("{why}"));
}
