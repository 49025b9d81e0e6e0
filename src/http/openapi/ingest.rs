//! The side that clients post to.

use serde_json::{Value, json};

use super::{
    EARLY, Problems, READ_METHODS, Ways, answers, body, document, guard, own_path, reading,
};
use crate::{
    cloud_events::REQUIRED,
    http::problem::ProblemKind,
    record::{Schema, batch},
};

const DESCRIPTION: &str = "Takes records. A 2xx says that a record is safe: it reaches the API at \
    least once, or is kept for an operator. What this description has no words for: a body may be \
    coded by gzip or zstd (Content-Encoding); JSON may also come as application/*+json or without a \
    Content-Type; a CloudEvent may come in the binary mode, its attributes as ce- headers and the \
    record as the body, or with its data in data_base64.";

/// An Idempotency-Key, bare or quoted as a Structured Field String.
const KEY: &str = r#"^(?:[!#-~][!-~]{0,254}|"(?:[!#-\[\]-~]|\\["\\]){1,255}")$"#;

const UNAUTHORIZED: Problems<'_> = &[(401, &[ProblemKind::Token])];
const OVER_RATE: Problems<'_> = &[(429, &[ProblemKind::QuotaExceeded])];
/// The headers that tell the client's rate (draft-ietf-httpapi-ratelimit-headers-11).
const RATE_HEADERS: [&str; 2] = ["RateLimit", "RateLimit-Policy"];
const POST: Problems<'_> = &[
    (
        400,
        &[
            ProblemKind::Body,
            ProblemKind::CloudEvent,
            ProblemKind::Encoding,
            ProblemKind::IdempotencyKey,
            ProblemKind::Json,
        ],
    ),
    (401, &[ProblemKind::Signature]),
    (413, &[ProblemKind::TooLarge]),
    (415, &[ProblemKind::Encoding, ProblemKind::MediaType]),
    (422, &[ProblemKind::KeyReused, ProblemKind::Schema]),
    (503, &[ProblemKind::Unavailable]),
];

/// The settings of a node that its clients see.
#[expect(clippy::struct_excessive_bools, reason = "each is a setting by itself")]
pub struct IngestSide<'s> {
    pub schema: &'s Schema,
    /// The name and the tag of each lane.
    pub lanes: &'s [(&'s str, &'s str)],
    pub needs_key: bool,
    pub needs_token: bool,
    /// There is no connection without one.
    pub needs_certificate: bool,
    pub needs_signature: bool,
    pub has_rate: bool,
}

impl IngestSide<'_> {
    /// The document.
    pub fn document(&self) -> Value {
        let mut all = document("Waypost ingest", DESCRIPTION);
        let schemas = &mut all["components"]["schemas"];
        schemas["Record"] = self.record();
        if !self.needs_key {
            schemas["Event"] = event();
        }
        schemas["Receipt"] = self.receipt();
        schemas["Receipts"] = receipts();
        let guarded: Vec<_> = [EARLY]
            .into_iter()
            .chain(self.needs_token.then_some(UNAUTHORIZED))
            .chain(self.has_rate.then_some(OVER_RATE))
            .collect();
        let up = json!({
            "type": "object",
            "required": ["message"],
            "properties": { "message": { "const": "ok" } },
        });
        let up = body("The node listens.", "application/json", up);
        let mut root = reading("Whether the node listens.", "ping", up, &[EARLY]);
        root["post"] = self.post("send", "Sends one record, or many.", &guarded);
        let mut pinned = self.post("sendByLane", "The same, by one lane.", &guarded);
        let lanes: Vec<_> = self.lanes.iter().map(|(name, _)| *name).collect();
        let lane = json!({
            "name": "lane", "in": "path", "required": true,
            "schema": { "type": "string", "enum": lanes },
        });
        if let Some(parameters) = pinned["parameters"].as_array_mut() {
            parameters.push(lane);
        }
        let unknown: &[Problems<'_>] = &[&[(404, &[ProblemKind::NotFound])]];
        let not_found = answers(404, Value::Null, unknown, false);
        pinned["responses"]["404"] = not_found["404"].clone();
        let schema = json!({ "type": "object" });
        let schema = body("A JSON Schema.", "application/schema+json", schema);
        let schema = reading("The schema of a record.", "schema", schema, &guarded);
        all["paths"] = json!({
            "/": root,
            "/schema": schema,
            "/openapi.json": own_path(&guarded),
            "/{lane}": { "post": pinned },
        });
        if self.has_rate {
            tell_rate(&mut all);
        }
        let tokens = [("token", json!({ "type": "http", "scheme": "bearer" }))];
        let certificates = [("certificate", json!({ "type": "mutualTLS" }))];
        let mut demands: Vec<Ways<'_>> = Vec::new();
        if self.needs_token {
            demands.push(&tokens);
        }
        if self.needs_certificate {
            demands.push(&certificates);
        }
        guard(&mut all, &demands, &["/"]);
        if self.needs_certificate {
            for method in READ_METHODS {
                all["paths"]["/"][method]["security"] = json!([{ "certificate": [] }]);
            }
        }
        all
    }

    /// The schema in force. A reference inside of a file counts from the file's root, and it may be of
    /// a draft of its own: inside of a document, both take an `$id`.
    fn record(&self) -> Value {
        let mut schema: Value = serde_json::from_str(self.schema.to_json()).unwrap_or_default();
        if let Some(members) = schema.as_object_mut() {
            let id = members.entry("$id");
            id.or_insert_with(|| "urn:waypost:schema:record".into());
        }
        schema
    }

    fn receipt(&self) -> Value {
        let tags = self.lanes.iter().map(|(_, tag)| *tag);
        let paths: Vec<_> = tags.chain(["spool"]).collect();
        json!({
            "type": "object",
            "required": ["id", "path"],
            "additionalProperties": false,
            "properties": {
                "id": {
                    "type": "string",
                    "description": "The key of the record on each hop.",
                },
                "path": {
                    "type": "string",
                    "enum": paths,
                    "description": "The tag of the lane that has confirmed the record, or spool.",
                },
            },
        })
    }

    fn post(&self, id: &str, summary: &str, problems: &[Problems<'_>]) -> Value {
        let receipt = json!({ "anyOf": [
            { "$ref": "#/components/schemas/Receipt" },
            { "$ref": "#/components/schemas/Receipts" },
        ] });
        let mut accepted = body("Each record is safe.", "application/json", receipt);
        accepted["headers"] = json!({ "Idempotent-Replayed": {
            "description": "The key got this receipt before, and nothing was sent again.",
            "schema": { "const": "true" },
        } });
        let post: Vec<_> = POST
            .iter()
            .filter(|(status, _)| *status != 401 || self.needs_signature)
            .copied()
            .collect();
        let problems: Vec<_> = problems.iter().copied().chain([&post[..]]).collect();
        json!({
            "operationId": id,
            "summary": summary,
            "parameters": self.parameters(),
            "requestBody": self.request_body(),
            "responses": answers(202, accepted, &problems, false),
        })
    }

    /// The forms of a request. If the node wants a key, events are left out: OpenAPI cannot require a
    /// parameter for some media types only.
    fn request_body(&self) -> Value {
        let record = json!({ "$ref": "#/components/schemas/Record" });
        // No `maxItems`: more are too large, as more bytes are, which no schema says either.
        let many = |of: &Value| {
            let description = format!("At most {}: more are a 413.", batch::MAX);
            json!({ "type": "array", "items": of, "description": description })
        };
        let lines = json!({ "schema": many(&record) });
        let mut content = json!({
            "application/json": { "schema": { "anyOf": [record, many(&record)] } },
            "application/x-ndjson": lines,
            "application/ndjson": lines,
            "application/jsonl": lines,
        });
        if self.needs_key {
            let description = "CloudEvents are taken too, and have a key of their own.";
            return json!({ "required": true, "content": content, "description": description });
        }
        let event = json!({ "$ref": "#/components/schemas/Event" });
        content["application/cloudevents-batch+json"] = json!({ "schema": many(&event) });
        content["application/cloudevents+json"] = json!({ "schema": event });
        json!({ "required": true, "content": content })
    }

    fn parameters(&self) -> Value {
        let text = json!({ "type": "string" });
        let mut all = vec![
            json!({
                "name": "Idempotency-Key", "in": "header", "required": self.needs_key,
                "description": "The id of the record; of a batch, the begin of its ids. An event \
                                has a key of its own.",
                "schema": { "type": "string", "pattern": KEY },
            }),
            json!({
                "name": "traceparent", "in": "header",
                "description": "W3C Trace Context. One that is malformed is left out.",
                "schema": text,
            }),
            json!({
                "name": "tracestate", "in": "header",
                "description": "W3C Trace Context. It goes with a traceparent; one that is malformed \
                                is left out.",
                "schema": text,
            }),
        ];
        if self.needs_signature {
            all.extend(
                ["webhook-id", "webhook-timestamp", "webhook-signature"].map(|name| {
                    json!({
                        "name": name, "in": "header", "required": true,
                        "description": "Standard Webhooks.",
                        "schema": text,
                    })
                }),
            );
        }
        all.into()
    }
}

/// Each answer but that of `GET /` tells the client's rate, unless it comes before the rate is known.
fn tell_rate(document: &mut Value) {
    let header =
        |is_required: bool| json!({ "required": is_required, "schema": { "type": "string" } });
    let paths = document["paths"].as_object_mut();
    for (path, operations) in paths.into_iter().flatten() {
        let operations = operations.as_object_mut();
        for (method, operation) in operations.into_iter().flatten() {
            if path == "/" && method != "post" {
                continue;
            }
            let answers = operation["responses"].as_object_mut();
            for (status, answer) in answers.into_iter().flatten() {
                let is_told = matches!(&**status, "200" | "202" | "429");
                for name in RATE_HEADERS {
                    answer["headers"][name] = header(is_told);
                }
            }
        }
    }
}

fn receipts() -> Value {
    json!({
        "type": "object",
        "required": ["accepted", "records"],
        "additionalProperties": false,
        "properties": {
            "accepted": { "type": "integer", "minimum": 0, "maximum": batch::MAX },
            "records": {
                "type": "array",
                "items": { "$ref": "#/components/schemas/Receipt" },
            },
        },
    })
}

/// An event in the structured mode, with JSON as its data. An attribute that is null is not set.
fn event() -> Value {
    // Neither control characters nor noncharacters (CloudEvents 1.0.2, "Type System").
    let nonchars = (1..=16).flat_map(|plane| [0xfffe, 0xffff].map(|end| plane << 16 | end));
    let nonchars: String = nonchars.filter_map(char::from_u32).collect();
    let plain = format!("^[^\\x00-\\x1f\\x7f-\\x9f\\ufdd0-\\ufdef\\ufffe\\uffff{nonchars}]*$");
    let token = "[!#$%&'*+.^_`|~0-9A-Za-z-]+";
    let json_type = format!("^{token}/(?:{token}[+])?[jJ][sS][oO][nN]$");
    let text = json!({ "type": "string", "minLength": 1, "pattern": plain });
    let or_null = |schema: Value| json!({ "anyOf": [{ "type": "null" }, schema] });
    json!({
        "type": "object",
        "description": "CloudEvents 1.0.2: up to 64 attributes beside path and datacontenttype. All have up \
                        to 6 KiB together, of which 64 bytes are for each of those two.",
        "required": REQUIRED.iter().copied().chain(["data"]).collect::<Vec<_>>(),
        "properties": {
            "specversion": { "const": "1.0" },
            "id": text,
            "source": { "type": "string", "minLength": 1, "format": "uri-reference" },
            "type": text,
            "subject": or_null(text.clone()),
            "time": or_null(json!({ "type": "string", "format": "date-time" })),
            "dataschema": or_null(json!({ "type": "string", "format": "uri" })),
            "datacontenttype": or_null(json!({ "type": "string", "pattern": json_type })),
            "data": { "$ref": "#/components/schemas/Record" },
        },
        "propertyNames": { "pattern": "^[a-z0-9]+$", "maxLength": 253 },
        "additionalProperties": { "anyOf": [
            { "type": "string", "pattern": plain },
            { "type": "integer", "minimum": i32::MIN, "maximum": i32::MAX },
            { "type": ["boolean", "null"] },
        ] },
    })
}

#[cfg(test)]
pub(super) mod tests {
    use actix_web::http::header::{HeaderMap, HeaderName, HeaderValue};
    use proptest::prelude::*;
    use regex::Regex;

    use super::*;
    use crate::http::ingest::idempotency_key;

    pub fn document() -> Value {
        let side = IngestSide {
            schema: &Schema::Case,
            lanes: &[("grpc", "GRPC"), ("nats", "NATS")],
            needs_key: true,
            needs_token: true,
            needs_certificate: true,
            needs_signature: true,
            has_rate: true,
        };
        side.document()
    }

    #[test]
    fn the_document_is_as_the_node_is_configured() {
        let all = document();
        let post = &all["paths"]["/{lane}"]["post"];
        assert_eq!(
            post["parameters"][6]["schema"]["enum"],
            json!(["grpc", "nats"])
        );
        // An event would be refused without a key by this description, and not by the node.
        assert_eq!(post["parameters"][0]["required"], true);
        let types = |post: &Value| post["requestBody"]["content"].as_object().unwrap().len();
        assert_eq!(types(post), 4);
        let schemas = &all["components"]["schemas"];
        let paths = &schemas["Receipt"]["properties"]["path"]["enum"];
        assert_eq!(*paths, json!(["GRPC", "NATS", "spool"]));
        assert_eq!(schemas["Record"]["title"], "case");
        let certificate = json!([{ "certificate": [] }]);
        assert_eq!(all["paths"]["/"]["get"]["security"], certificate);
        let both = json!([{ "token": [], "certificate": [] }]);
        assert_eq!(all["security"], both);

        let open = IngestSide {
            schema: &Schema::Any,
            lanes: &[("grpc", "GRPC")],
            needs_key: false,
            needs_token: false,
            needs_certificate: false,
            needs_signature: false,
            has_rate: false,
        };
        let open = open.document();
        assert_eq!(open["security"], json!([]));
        let post = &open["paths"]["/"]["post"];
        assert_eq!(types(post), 6);
        assert_eq!(post["responses"]["401"], Value::Null);
        assert_eq!(post["parameters"].as_array().unwrap().len(), 3);
    }

    proptest! {
        #[test]
        fn a_key_is_taken_if_its_pattern_fits(
            line in prop_oneof!["[!-~é ]{0,4}", "\"([!-~ ]|\\\\[ -~]){0,4}\"", "\"?[a\\\\]{250,258}\"?"]
        ) {
            let pattern = Regex::new(KEY).unwrap();
            let mut headers = HeaderMap::new();
            let value = HeaderValue::from_bytes(line.as_bytes()).unwrap();
            headers.insert(HeaderName::from_static("idempotency-key"), value);
            let key = idempotency_key(&headers);
            prop_assert_eq!(key.is_ok(), pattern.is_match(&line), "{}", line);
            if let Ok(Some(key)) = key {
                let quoted = key.replace('\\', "\\\\").replace('"', "\\\"");
                let value = HeaderValue::from_str(&format!("\"{quoted}\"")).unwrap();
                headers.insert(HeaderName::from_static("idempotency-key"), value);
                prop_assert_eq!(idempotency_key(&headers).unwrap(), Some(key));
            }
        }
    }
}
