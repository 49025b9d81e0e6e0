//! A side of a node beside its document.

use std::{collections::BTreeSet, fs};

use awc::http::{Method, header};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::python::python;

/// A side of a node, and its document.
pub struct Side {
    port: u16,
    pub document: Value,
    /// Status and kind of each answer that was seen, with the path of the document.
    pub seen: BTreeSet<(String, u16, String)>,
}

/// A request, the path of the document that it is of, and the status that it gets.
pub struct Asked<'a> {
    pub method: &'static str,
    pub path: &'a str,
    pub of: &'a str,
    pub headers: &'a [(&'a str, &'a str)],
    pub body: &'a str,
    pub status: u16,
}

impl Side {
    /// Reads the document of the side at this port, with these headers.
    pub async fn new(port: u16, headers: &[(&str, &str)]) -> Self {
        let url = format!("http://127.0.0.1:{port}/openapi.json");
        let mut request = awc::Client::default().get(url);
        for (name, value) in headers {
            request = request.insert_header((*name, *value));
        }
        let mut answer = request.send().await.expect("an answer");
        let body = answer.body().limit(1 << 20).await.expect("a body");
        let document = serde_json::from_slice(&body).expect("JSON");
        Self {
            port,
            document,
            seen: BTreeSet::new(),
        }
    }

    /// Sends the request. Its answer is one of the document's.
    pub async fn ask(&mut self, asked: Asked<'_>) {
        let Asked {
            method,
            path,
            of,
            headers,
            body,
            status,
        } = asked;
        let what = format!("{method} {path} {headers:?} {body}");
        let url = format!("http://127.0.0.1:{}{path}", self.port);
        let named: Method = method.parse().expect("a method");
        let mut request = awc::Client::default().request(named, url);
        for (name, value) in headers {
            request = request.append_header((*name, *value));
        }
        let answer = request.send_body(body.to_owned()).await;
        let mut answer = answer.unwrap_or_else(|why| panic!("{what}: {why}"));
        let content = answer.body().limit(4 << 20).await.expect("a body");
        let shown = String::from_utf8_lossy(&content);
        assert_eq!(answer.status().as_u16(), status, "{what}: {shown}");
        let told = &self.document["paths"][of][method.to_ascii_lowercase()]["responses"];
        let told = &told[status.to_string()];
        assert!(told.is_object(), "{what}: {status} is not in the document");
        let promised = told["headers"].as_object();
        for (name, header) in promised.into_iter().flatten() {
            let is_there = answer.headers().contains_key(&**name);
            assert!(is_there || header["required"] != true, "{what}: {name}");
        }
        let media_type = answer.headers().get(header::CONTENT_TYPE);
        let media_type = media_type.map_or("", |value| value.to_str().expect("ASCII"));
        if method == "HEAD" || told["content"].is_null() {
            assert!(told["content"].is_null() && content.is_empty(), "{what}");
            return;
        }
        let content_told = &told["content"][media_type]["schema"];
        assert!(
            content_told.is_object(),
            "{what}: {media_type} is not in the document"
        );
        let mut kind = String::new();
        if media_type.contains("json") {
            let value: Value = serde_json::from_slice(&content).expect("JSON");
            self.fits(content_told, &value, &what);
            let urn = value["type"].as_str().unwrap_or_default();
            let name = urn.rsplit(':').next().unwrap_or_default();
            name.clone_into(&mut kind);
        }
        self.seen.insert((of.to_owned(), status, kind));
    }

    pub fn fits(&self, schema: &Value, value: &Value, what: &str) {
        let schema = json!({ "components": self.document["components"], "allOf": [schema] });
        let schema = jsonschema::validator_for(&schema).expect("a schema");
        let errors: Vec<_> = schema
            .iter_errors(value)
            .map(|why| why.to_string())
            .collect();
        assert!(errors.is_empty(), "{what}: {value}: {errors:?}");
    }

    /// Status and kind of each problem of a POST that the document tells.
    pub fn told(&self, path: &str) -> BTreeSet<(u16, String)> {
        let answers = &self.document["paths"][path]["post"]["responses"];
        let answers = answers.as_object().expect("answers").iter();
        let problems = answers.flat_map(|(status, answer)| {
            let problem = &answer["content"]["application/problem+json"]["schema"];
            let types = problem["properties"]["type"]["enum"].as_array();
            let kinds = types.into_iter().flatten();
            kinds.map(|urn| {
                let urn = urn.as_str().expect("text");
                let kind = urn.rsplit(':').next().unwrap_or_default();
                (status.parse().expect("a status"), kind.to_owned())
            })
        });
        problems.collect()
    }

    pub fn seen(&self, path: &str) -> BTreeSet<(u16, String)> {
        let seen = self
            .seen
            .iter()
            .filter(|(of, _, kind)| of == path && !kind.is_empty());
        seen.map(|(_, status, kind)| (*status, kind.clone()))
            .collect()
    }

    /// `openapi-spec-validator` finds nothing.
    pub fn is_valid(&self) {
        let Some(mut python) = python("openapi") else {
            return;
        };
        let folder = TempDir::new().expect("a temporary folder");
        let file = folder.path().join("openapi.json");
        fs::write(&file, self.document.to_string()).expect("room");
        let output = python
            .args(["-m", "openapi_spec_validator"])
            .arg(file)
            .output();
        let output = output.expect("python3 is there");
        assert!(output.status.success(), "{output:?}");
    }
}
