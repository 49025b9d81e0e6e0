//! The orders.

use schemars::SchemaGenerator;
use serde_json::{Map, Value, json};

use super::{
    super::{Problems, answers, body},
    NOT_FOUND, Paths, SELECTION, SPOOL, SUPERVISOR, UNREADY, schema, whole,
};
use crate::{
    actors::supervisor::Action,
    config::WEIGHT_MAX,
    control::ReloadReport,
    http::{problem::ProblemKind, status::LaneStatus},
};

const ORDER: Problems<'_> = &[
    (400, &[ProblemKind::Body, ProblemKind::Json]),
    (408, &[ProblemKind::Slow]),
    (413, &[ProblemKind::TooLarge]),
    (415, &[ProblemKind::MediaType]),
    (503, &[ProblemKind::Unavailable]),
];
const CONFIGURATION: Problems<'_> = &[(422, &[ProblemKind::Configuration])];

impl Paths<'_> {
    pub(super) fn orders(&self, types: &mut SchemaGenerator) -> Map<String, Value> {
        let none = json!({ "type": "object", "additionalProperties": false });
        let lane = schema::<LaneStatus<'static>>(types);
        let lanes = json!({
            "type": "object",
            "required": ["lanes"],
            "additionalProperties": false,
            "properties": { "lanes": { "type": "array", "items": lane } },
        });
        let selection = self.selection();
        let weight = json!({
            "type": "object",
            "required": ["weight"],
            "additionalProperties": false,
            "properties": { "weight": whole(WEIGHT_MAX as u64) },
        });
        let done = |name: &str| {
            json!({
                "type": "object",
                "required": [name],
                "additionalProperties": false,
                "properties": { name: whole(u64::MAX) },
            })
        };
        let command = &[NOT_FOUND, SUPERVISOR, UNREADY].concat();
        let letters = &[SELECTION, SPOOL].concat();
        let reload = &[CONFIGURATION, SUPERVISOR, UNREADY].concat();
        let set = &[NOT_FOUND, SUPERVISOR].concat();
        let report = schema::<ReloadReport>(types);
        let action = path_parameter("action", &Action::ALL.map(Action::name));
        let this = path_parameter("lane", self.lanes);
        let replay = self.order(
            "Sends dead letters, or parked records, again.",
            "replay",
            &selection,
            (200, &done("replayed")),
            letters,
            &[],
        );
        let drop_letters = self.order(
            "Removes them.",
            "drop",
            &selection,
            (200, &done("dropped")),
            letters,
            &[],
        );
        let reload = self.order(
            "Reads the configuration again.",
            "reload",
            &none,
            (200, &report),
            reload,
            &[],
        );
        let command_all = self.order(
            "An order to all lanes.",
            "commandAll",
            &none,
            (202, &lanes),
            command,
            &[&action],
        );
        let command = self.order(
            "An order to a lane.",
            "command",
            &none,
            (202, &lane),
            command,
            &[&this, &action],
        );
        let set_weight = self.order(
            "Sets the weight of a lane.",
            "setWeight",
            &weight,
            (200, &lane),
            set,
            &[&this],
        );
        let all = [
            ("/api/dead/replay", replay),
            ("/api/dead/drop", drop_letters),
            ("/api/reload", reload),
            ("/api/lanes/{action}", command_all),
            ("/api/lanes/{lane}/{action}", command),
            ("/api/lanes/{lane}/weight", set_weight),
        ];
        let all = all.into_iter();
        all.map(|(path, of)| (path.to_owned(), of)).collect()
    }

    fn order(
        &self,
        summary: &str,
        id: &str,
        order: &Value,
        (status, answer): (u16, &Value),
        problems: Problems<'_>,
        parameters: &[&Value],
    ) -> Value {
        let done = body("It is done, or begun.", "application/json", answer.clone());
        let all = [&self.own[..], &[ORDER, self.order, problems]].concat();
        json!({ "post": {
            "operationId": id,
            "summary": summary,
            "parameters": parameters,
            "requestBody": {
                "required": true,
                "content": { "application/json": { "schema": order } },
            },
            "responses": answers(status, done, &all, false),
        } })
    }
}

fn path_parameter(name: &str, values: &[&str]) -> Value {
    json!({
        "name": name, "in": "path", "required": true,
        "schema": { "type": "string", "enum": values },
    })
}
