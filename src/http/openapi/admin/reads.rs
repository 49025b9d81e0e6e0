//! The reads of an operator.

use prometheus_client::encoding::prometheus_text;
use schemars::SchemaGenerator;
use serde_json::{Map, Value, json};

use super::{
    super::{EARLY, Problems, body, own_path, reading},
    NOT_FOUND, Paths, QUERY, SUPERVISOR, UNREADY, query, schema, text, with,
};
use crate::{
    history::{Columns, HistoryRange},
    http::{events, metrics::OPEN_METRICS, problem::ProblemKind, status::Status},
    ledger::ToldStep,
    routing::explain::ToldChoice,
};

const JSON: &str = "application/json";
const PLAIN: &str = "text/plain; charset=utf-8";
const STREAMS: Problems<'_> = &[(503, &[ProblemKind::Streams])];
const SCRAPE: Problems<'_> = &[(500, &[ProblemKind::Metrics, ProblemKind::Supervisor])];

impl Paths<'_> {
    pub(super) fn reads(&self, types: &mut SchemaGenerator) -> Map<String, Value> {
        let own = with(&self.own, &[SUPERVISOR]);
        let status = body("The status.", JSON, schema::<Status<'static>>(types));
        let mut metrics = body("The metrics.", prometheus_text::CONTENT_TYPE, text());
        metrics["content"][OPEN_METRICS] = json!({ "schema": text() });
        let mut page = body(
            "The page, for a browser.",
            "text/html; charset=utf-8",
            text(),
        );
        page["content"][PLAIN] = json!({ "schema": text() });
        let probe = |what: &str| body(what, PLAIN, text());
        let up = reading(
            "Whether the process works.",
            "health",
            probe("It works."),
            &[EARLY],
        );
        let ready = reading(
            "Whether a new record can be made safe.",
            "ready",
            probe("One can."),
            &[EARLY, SUPERVISOR, UNREADY],
        );
        let scrape = with(&self.open, &[SCRAPE]);
        let all = [
            ("/", reading("The live page.", "page", page, &[&own])),
            ("/page.css", self.file("Its styles.", "styles", "text/css")),
            (
                "/page.js",
                self.file("Its script.", "script", "text/javascript"),
            ),
            ("/healthz", up),
            ("/readyz", ready),
            (
                "/metrics",
                reading("The metrics.", "metrics", metrics, &[&scrape]),
            ),
            ("/openapi.json", own_path(&self.own)),
            (
                "/api/status",
                reading("The status.", "status", status, &[&own]),
            ),
            ("/api/events", self.events()),
            ("/api/tap", self.tap()),
            ("/api/history", self.history(types)),
            ("/api/explain", self.explain(types)),
            ("/api/dead", self.letters()),
        ];
        let all = all.into_iter();
        all.map(|(path, of)| (path.to_owned(), of)).collect()
    }

    /// A file of the page, which browsers keep.
    fn file(&self, summary: &str, id: &str, media_type: &str) -> Value {
        let tag = json!({ "ETag": { "required": true, "schema": text() } });
        let mut answer = body(
            "A file of the page.",
            &format!("{media_type}; charset=utf-8"),
            text(),
        );
        answer["headers"] = tag.clone();
        let kept = json!({ "description": "The client has it.", "headers": tag });
        let known = json!([{
            "name": "If-None-Match", "in": "header", "schema": text(),
            "description": "The ETag of the file that the client has.",
        }]);
        let mut file = with_parameters(reading(summary, id, answer, &self.own), &known);
        for method in ["get", "head"] {
            file[method]["responses"]["304"] = kept.clone();
        }
        file
    }

    fn events(&self) -> Value {
        let after = json!([
            {
                "name": "after", "in": "query", "schema": text(),
                "description": "The id of the last event that was read.",
            },
            {
                "name": "Last-Event-ID", "in": "header", "schema": text(),
                "description": "The same, as a browser sends it.",
            },
        ]);
        self.stream(
            "One status a second, and each change.",
            "events",
            "Events named status, change and missed, without an end.",
            QUERY,
            &after,
        )
    }

    fn tap(&self) -> Value {
        let sample = json!({ "type": "integer", "minimum": 1, "maximum": u64::MAX });
        let mut sample = query("sample", &sample);
        sample["description"] = "One of so many records.".into();
        let lane = query("lane", &json!({ "type": "string", "enum": self.lanes }));
        self.stream(
            "The records as they pass.",
            "tap",
            "Events named record and missed, without an end.",
            &[QUERY, NOT_FOUND].concat(),
            &json!([lane, sample]),
        )
    }

    /// A stream of events. Only GET takes one of the places for readers.
    fn stream(
        &self,
        summary: &str,
        id: &str,
        description: &str,
        problems: Problems<'_>,
        parameters: &Value,
    ) -> Value {
        let events = json!({
            "description": description,
            "content": { events::MEDIA_TYPE: {} },
        });
        let all = with(&self.own, &[problems, STREAMS]);
        let mut stream = with_parameters(reading(summary, id, events, &[&all]), parameters);
        if let Some(answers) = stream["head"]["responses"].as_object_mut() {
            answers.remove("503");
        }
        stream
    }

    fn history(&self, types: &mut SchemaGenerator) -> Value {
        let columns = schema::<Columns<Vec<f64>>>(types);
        let columns = body("Each value by intervals, the oldest first.", JSON, columns);
        let history = reading(
            "What has passed, by intervals.",
            "history",
            columns,
            &[&with(&self.own, &[QUERY])],
        );
        let range = query("range", &schema::<HistoryRange>(types));
        with_parameters(history, &json!([range]))
    }

    fn explain(&self, types: &mut SchemaGenerator) -> Value {
        let choice = schema::<ToldChoice<'static>>(types);
        let step = schema::<ToldStep>(types);
        let told = json!({
            "type": "object",
            "required": ["id", "choices", "steps"],
            "additionalProperties": false,
            "properties": {
                "id": text(),
                "choices": { "type": "array", "items": choice },
                "steps": { "type": "array", "items": step },
            },
        });
        let told = body(
            "The choices for the record, and its steps, in their order.",
            JSON,
            told,
        );
        let explain = reading(
            "Why a record took its lane, and its steps.",
            "explain",
            told,
            &[&with(&self.own, &[QUERY, NOT_FOUND])],
        );
        let id = json!([{
            "name": "id", "in": "query", "required": true,
            "schema": { "type": "string", "minLength": 1 },
        }]);
        with_parameters(explain, &id)
    }
}

/// The operations of a path, with these parameters.
pub(super) fn with_parameters(mut operations: Value, parameters: &Value) -> Value {
    for method in ["get", "head"] {
        operations[method]["parameters"] = parameters.clone();
    }
    operations
}
