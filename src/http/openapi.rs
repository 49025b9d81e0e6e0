//! `GET /openapi.json`: each side of a node as it is configured, as OpenAPI 3.1.
//!
//! The kinds of problems and the types of answers are those of the program, so that neither can be
//! one that it does not have.

pub mod admin;
pub mod ingest;
#[cfg(test)]
mod tests;

use actix_web::{HttpResponse, http::header::ContentType, web};
use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::problem::{MEDIA_TYPE, ProblemKind};

/// The document of a side. It is as the node is configured, so it is made once.
#[derive(Clone)]
pub struct ApiDocument(Bytes);

impl ApiDocument {
    pub fn new(document: &Value) -> Self {
        Self(document.to_string().into())
    }
}

/// `GET /openapi.json`.
pub async fn describe(document: web::Data<ApiDocument>) -> HttpResponse {
    HttpResponse::Ok()
        .content_type(ContentType::json())
        .body(document.0.clone())
}

/// The problems of an operation: each status with the kinds that it may have.
type Problems<'p> = &'p [(u16, &'p [ProblemKind])];

/// Any request may end with one of these before a handler sees it.
const EARLY: Problems<'_> = &[
    (400, &[ProblemKind::Request]),
    (408, &[ProblemKind::Slow]),
    (431, &[ProblemKind::LargeHead]),
];

/// A document without paths.
fn document(title: &str, description: &str) -> Value {
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": title,
            "description": description,
            "version": env!("CARGO_PKG_VERSION"),
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "servers": [{ "url": "/" }],
        "security": [],
        "paths": {},
        "components": { "schemas": { "Problem": problem_schema() } },
    })
}

/// Any problem (RFC 9457).
fn problem_schema() -> Value {
    let place = json!({ "type": "integer", "minimum": 0 });
    let text = json!({ "type": "string" });
    let kinds: Vec<_> = ProblemKind::ALL.into_iter().map(ProblemKind::uri).collect();
    json!({
        "type": "object",
        "required": ["type", "title", "status", "detail"],
        "additionalProperties": false,
        "properties": {
            "type": { "type": "string", "enum": kinds },
            "title": text,
            "status": { "type": "integer", "minimum": 400, "maximum": 599 },
            "detail": text,
            "line": place,
            "column": place,
            "index": place,
            "field": { "type": "string", "description": "A JSON pointer." },
            "header": text,
            "reasons": { "type": "array", "items": { "type": "object" } },
            "violated-policies": { "type": "array", "items": text },
            "replayed": place,
            "dropped": place,
        },
    })
}

/// The answers of an operation: `answer`, and its problems. Kinds that have the same status are one
/// answer. An answer to HEAD has no body.
fn answers(status: u16, answer: Value, problems: &[Problems<'_>], is_head: bool) -> Value {
    let mut all = Map::new();
    all.insert(status.to_string(), answer);
    let mut problems: Vec<_> = problems.concat();
    problems.sort_by_key(|(status, _)| *status);
    for same in problems.chunk_by(|(one, _), (other, _)| one == other) {
        let status = same[0].0;
        let kinds: Vec<_> = same.iter().flat_map(|(_, kinds)| *kinds).copied().collect();
        all.insert(status.to_string(), problem(status, &kinds, is_head));
    }
    Value::Object(all)
}

fn problem(status: u16, kinds: &[ProblemKind], is_head: bool) -> Value {
    let names: Vec<_> = kinds.iter().map(|kind| kind.name()).collect();
    let mut answer = json!({ "description": format!("A problem: {}.", names.join(", ")) });
    if !is_head {
        let types: Vec<_> = kinds.iter().copied().map(ProblemKind::uri).collect();
        answer["content"] = json!({ MEDIA_TYPE: { "schema": {
            "allOf": [{ "$ref": "#/components/schemas/Problem" }],
            "properties": { "status": { "const": status }, "type": { "enum": types } },
        } } });
    }
    let headers = headers_of(status, kinds);
    if !headers.is_empty() {
        answer["headers"] = Value::Object(headers);
    }
    answer
}

/// The headers of a problem.
fn headers_of(status: u16, kinds: &[ProblemKind]) -> Map<String, Value> {
    let text = json!({ "type": "string" });
    let (name, is_required, schema) = match status {
        401 => ("WWW-Authenticate", true, text),
        // The codings that the node decodes, if it does not decode this one.
        415 if kinds.contains(&ProblemKind::Encoding) => ("Accept-Encoding", false, text),
        429 | 503 => (
            "Retry-After",
            // No time is known after which a node is ready.
            !kinds.contains(&ProblemKind::Unready),
            json!({ "type": "integer", "minimum": 1 }),
        ),
        _ => return Map::new(),
    };
    let header = json!({ "required": is_required, "schema": schema });
    [(name.to_owned(), header)].into_iter().collect()
}

/// An answer with a body of this media type.
fn body(description: &str, media_type: &str, schema: Value) -> Value {
    json!({
        "description": description,
        "content": { media_type: { "schema": schema } },
    })
}

/// The operations of a path that can only be read.
fn reading(summary: &str, id: &str, answer: Value, problems: &[Problems<'_>]) -> Value {
    let mut without_body = answer.clone();
    if let Some(answer) = without_body.as_object_mut() {
        answer.remove("content");
    }
    json!({
        "get": {
            "operationId": id,
            "summary": summary,
            "responses": answers(200, answer, problems, false),
        },
        "head": {
            "operationId": format!("{id}Head"),
            "summary": format!("{summary} Without a body."),
            "responses": answers(200, without_body, problems, true),
        },
    })
}

/// The path of the document itself.
fn own_path(problems: &[Problems<'_>]) -> Value {
    let schema = json!({
        "type": "object",
        "required": ["openapi", "info", "paths"],
        "properties": { "openapi": { "const": "3.1.0" } },
    });
    let answer = body("This document.", "application/json", schema);
    reading("The description of this API.", "describe", answer, problems)
}

/// The methods of an operation that everybody may read.
const READ_METHODS: [&str; 2] = ["get", "head"];

/// The ways to meet one demand, by their names.
type Ways<'w> = &'w [(&'w str, Value)];

/// Asks each operation but `open` for all `demands`, each of which has one way or more to be met.
fn guard(document: &mut Value, demands: &[Ways<'_>], open: &[&str]) {
    if demands.is_empty() {
        return;
    }
    for (name, way) in demands.concat() {
        document["components"]["securitySchemes"][name] = way;
    }
    // The members of a requirement belong together; one of the requirements is to be met.
    let mut requirements = vec![Map::new()];
    for ways in demands {
        requirements = requirements
            .iter()
            .flat_map(|others| {
                ways.iter().map(|(name, _)| {
                    let mut all = others.clone();
                    all.insert((*name).to_owned(), json!([]));
                    all
                })
            })
            .collect();
    }
    document["security"] = json!(requirements);
    for path in open {
        for method in READ_METHODS {
            document["paths"][*path][method]["security"] = json!([]);
        }
    }
}
