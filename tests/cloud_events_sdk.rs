//! Events that the CloudEvents SDK of another language, Python's `cloudevents`, sends and reads.

use std::collections::BTreeMap;

use awc::http::StatusCode;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use crate::support::{
    api::{Api, Post},
    lanes::{Lane, Nats, Pubsub, Rabbitmq, grpc_variables},
    node::{Node, PATIENCE},
    python::answers,
    rig::Rig as _,
};

/// Makes the message of an event, or reads the event of a message, for each line of its input.
const PROGRAM: &str = r#"
import base64, json, sys
from cloudevents.core.bindings import http
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from dateutil.parser import isoparse

for line in sys.stdin:
    asked = json.loads(line)
    if "mode" in asked:
        attributes = asked["attributes"]
        attributes["time"] = isoparse(attributes["time"])
        event = CloudEvent(attributes, asked["data"])
        to = http.to_binary if asked["mode"] == "binary" else http.to_structured
        message = to(event, JSONFormat())
        body = base64.b64encode(message.body).decode()
        print(json.dumps({"headers": message.headers, "body": body}))
    else:
        body = base64.b64decode(asked["body"])
        message = http.HTTPMessage(headers=asked["headers"], body=body)
        event = http.from_http(message, JSONFormat())
        attributes = dict(event.get_attributes())
        attributes["time"] = attributes["time"].isoformat()
        print(json.dumps({"attributes": attributes, "data": event.get_data()}))
"#;

const SPECIAL: &str = "é 😀 % \" %20 \u{10fffd}";

/// Each attribute has what it may have of the special characters: `source` and `dataschema` are
/// URIs, which have them in codes.
fn attributes(lane: &str, id: &str) -> Value {
    json!({
        "specversion": "1.0",
        "id": format!("{lane} {id} {SPECIAL}"),
        "source": "/cases/%C3%A9%20%F0%9F%98%80%25%22",
        "type": format!("org.example.{SPECIAL}"),
        "subject": SPECIAL,
        "time": "2026-11-29T12:00:00.250000+01:00",
        "dataschema": "https://example.com/%C3%A9%20%F0%9F%98%80%25%22",
        "datacontenttype": "application/json; note=\"a %20 b\"",
        "note": format!(" {SPECIAL} "),
    })
}

fn data() -> Value {
    json!({
        "name": SPECIAL, "location": "Cobán", "age": 42, "infectedtype": "imported", "state": "é"
    })
}

/// A message that the SDK has made or is to read.
struct Message {
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

impl Message {
    fn from_json(made: &Value) -> Self {
        let headers = made["headers"].as_object().expect("headers").iter();
        let text = |value: &Value| value.as_str().expect("text").to_owned();
        Self {
            headers: headers
                .map(|(name, value)| (name.clone(), text(value)))
                .collect(),
            body: BASE64_STANDARD.decode(text(&made["body"])).expect("Base64"),
        }
    }

    fn of_post(post: &Post) -> Self {
        let content_type = post.content_type.clone().expect("a type");
        let mut headers = post.event.clone();
        headers.insert("content-type".into(), content_type);
        Self {
            headers,
            body: post.body.to_vec(),
        }
    }

    fn to_json(&self) -> Value {
        json!({ "headers": self.headers, "body": BASE64_STANDARD.encode(&self.body) })
    }

    async fn send(&self, node: &Node, lane: &str) {
        let url = format!("http://127.0.0.1:{}/{lane}", node.ingest);
        let mut request = awc::Client::default().post(url);
        for (name, value) in &self.headers {
            request = request.insert_header((name.as_str(), value.as_str()));
        }
        let mut answer = request
            .send_body(self.body.clone())
            .await
            .expect("an answer");
        let body = answer.body().await.expect("a body");
        assert_eq!(answer.status(), StatusCode::ACCEPTED, "{lane}: {body:?}");
    }
}

/// A batch of the events of these structured messages. The SDK makes none.
fn batch(messages: &[Message]) -> Message {
    let events: Vec<&[u8]> = messages.iter().map(|message| &*message.body).collect();
    let content_type = "application/cloudevents-batch+json".to_owned();
    Message {
        headers: BTreeMap::from([("content-type".into(), content_type)]),
        body: [b"[", &*events.join(&b','), b"]"].concat(),
    }
}

#[actix_rt::test]
async fn the_sdk_sends_and_reads_each_attribute_through_each_lane() {
    // They run until the end of the test.
    let mut nats = Nats::start().await;
    let mut rabbitmq = Rabbitmq::start().await;
    let mut pubsub = Pubsub::start().await;
    for api_mode in ["binary", "structured"] {
        let mut variables = grpc_variables();
        let mut lanes = vec![("grpc", "GRPC")];
        if let Some(lane) = &mut nats {
            lanes.push((Nats::NAME, Nats::TAG));
            variables.extend(lane.variables());
        }
        if let Some(lane) = &mut rabbitmq {
            lanes.push((Rabbitmq::NAME, Rabbitmq::TAG));
            variables.extend(lane.variables());
        }
        if let Some(lane) = &mut pubsub {
            lanes.push((Pubsub::NAME, Pubsub::TAG));
            variables.extend(lane.variables());
        }
        let api = Api::start();
        let mode = ("API__CLOUDEVENTS".to_owned(), api_mode.to_owned());
        let node = Node::start(&api.url(), &[&variables[..], &[mode]].concat()).await;
        for (lane, tag) in &lanes {
            node.lane_is(lane, "up", PATIENCE).await;
            let before = api.count();
            let ids = ["binary", "structured", "first", "second"];
            let asked = ids.map(|id| {
                let mode = if id == "binary" { id } else { "structured" };
                json!({ "mode": mode, "attributes": attributes(lane, id), "data": data() })
            });
            let Some(made) = answers("cloudevents", PROGRAM, &asked) else {
                return;
            };
            let made: Vec<_> = made.iter().map(Message::from_json).collect();
            made[0].send(&node, lane).await;
            made[1].send(&node, lane).await;
            batch(&made[2..]).send(&node, lane).await;
            api.wait_for(before + ids.len(), PATIENCE).await;
            let posts = api.posts().split_off(before);
            let asked: Vec<_> = posts
                .iter()
                .map(|post| Message::of_post(post).to_json())
                .collect();
            let mut read = answers("cloudevents", PROGRAM, &asked).expect("it is installed");
            read.sort_by_key(|event| event["attributes"]["id"].to_string());
            let mut expected = ids.map(|id| {
                let mut attributes = attributes(lane, id);
                attributes["path"] = json!(tag);
                json!({ "attributes": attributes, "data": data() })
            });
            expected.sort_by_key(|event| event["attributes"]["id"].to_string());
            assert_eq!(read, expected, "{lane}, {api_mode}");
        }
        node.at_rest(PATIENCE).await;
    }
}
