//! The operator's side.

mod letters;
mod orders;
mod reads;
#[cfg(test)]
pub(super) mod tests;

use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Value, json};

use super::{EARLY, Problems, Ways, document, guard};
use crate::http::problem::ProblemKind;

const DESCRIPTION: &str = "Tells how a node does, and takes orders. An order is a JSON object, and is \
    of the same site: a foreign Host or Origin is refused.";

/// The Host or the Origin is foreign.
const FOREIGN: Problems<'_> = &[
    (400, &[ProblemKind::Host]),
    (403, &[ProblemKind::Origin]),
    (421, &[ProblemKind::Host]),
];
const SUPERVISOR: Problems<'_> = &[(500, &[ProblemKind::Supervisor])];
const NOT_FOUND: Problems<'_> = &[(404, &[ProblemKind::NotFound])];
const QUERY: Problems<'_> = &[(400, &[ProblemKind::Query])];
const SPOOL: Problems<'_> = &[(503, &[ProblemKind::Spool])];
const SELECTION: Problems<'_> = &[(400, &[ProblemKind::Selection])];
const UNREADY: Problems<'_> = &[(503, &[ProblemKind::Unready])];

/// The settings of a node that its operators see.
pub struct AdminSide<'s> {
    pub lanes: &'s [&'s str],
    /// The names that are configured, or have records on disk.
    pub apis: &'s [&'s str],
    pub needs_token: bool,
    pub needs_certificate: bool,
    pub is_read_only: bool,
}

impl AdminSide<'_> {
    /// The document.
    pub fn document(&self) -> Value {
        let mut all = document("Waypost admin", DESCRIPTION);
        let mut types = SchemaSettings::draft2020_12()
            .with(|settings| {
                settings.definitions_path = "/components/schemas".into();
                settings.meta_schema = None;
            })
            .for_serialize()
            .into_generator();
        let tokens = [
            ("token", json!({ "type": "http", "scheme": "bearer" })),
            ("password", json!({ "type": "http", "scheme": "basic" })),
        ];
        let certificates = [("certificate", json!({ "type": "mutualTLS" }))];
        let mut demands: Vec<Ways<'_>> = Vec::new();
        let mut kinds = Vec::new();
        if self.needs_token {
            demands.push(&tokens);
            kinds.push(ProblemKind::Token);
        }
        if self.needs_certificate {
            demands.push(&certificates);
            kinds.push(ProblemKind::Certificate);
        }
        let unauthorized = [(401, &kinds[..])];
        let unauthorized = if kinds.is_empty() {
            &[]
        } else {
            &unauthorized[..]
        };
        let read_only: Problems<'_> = &[(403, &[ProblemKind::ReadOnly])];
        let paths = Paths {
            lanes: self.lanes,
            apis: self.apis,
            open: [EARLY, unauthorized],
            own: [EARLY, unauthorized, FOREIGN],
            order: if self.is_read_only { read_only } else { &[] },
        };
        let mut operations = paths.reads(&mut types);
        operations.extend(paths.orders(&mut types));
        all["paths"] = Value::Object(operations);
        let definitions = types.take_definitions(true);
        if let Some(schemas) = all["components"]["schemas"].as_object_mut() {
            schemas.extend(definitions);
        }
        guard(&mut all, &demands, &["/healthz", "/readyz"]);
        all
    }
}

/// Makes the paths.
struct Paths<'s> {
    lanes: &'s [&'s str],
    apis: &'s [&'s str],
    /// The problems of each operation.
    open: [Problems<'s>; 2],
    /// The same of one that is for this site only.
    own: [Problems<'s>; 3],
    /// The other parts of an order.
    order: Problems<'s>,
}

/// The problems of an operation: those of its side, and more.
fn with<'p>(all: &[Problems<'p>], more: &[Problems<'p>]) -> Vec<(u16, &'p [ProblemKind])> {
    [all, more].concat().concat()
}

/// The schema of an answer's type.
fn schema<T: JsonSchema>(types: &mut SchemaGenerator) -> Value {
    types.subschema_for::<T>().to_value()
}

fn whole(maximum: u64) -> Value {
    json!({ "type": "integer", "minimum": 0, "maximum": maximum })
}

fn text() -> Value {
    json!({ "type": "string" })
}

/// A parameter of a query, which may be left out.
fn query(name: &str, schema: &Value) -> Value {
    json!({ "name": name, "in": "query", "schema": schema })
}
