use jsonschema::Validator;
use proptest::{
    collection::{hash_map, vec},
    option,
    prelude::*,
    sample::select,
};

use serde_json::Map;

use super::*;
use crate::http::{dead_letters::Selection, order_body::OrderBody};

pub fn document() -> Value {
    let side = AdminSide {
        lanes: &["grpc", "nats"],
        apis: &["default"],
        needs_token: true,
        needs_certificate: true,
        is_read_only: true,
    };
    side.document()
}

#[test]
fn probes_are_for_everybody() {
    let all = document();
    assert_eq!(all["paths"]["/healthz"]["get"]["security"], json!([]));
    let open = AdminSide {
        needs_token: false,
        needs_certificate: false,
        is_read_only: false,
        lanes: &["grpc"],
        apis: &["default"],
    };
    let open = open.document();
    assert_eq!(open["security"], json!([]));
    assert_eq!(open["components"]["securitySchemes"], Value::Null);
    let status = &open["paths"]["/api/status"]["get"];
    assert_eq!(status["responses"]["401"], Value::Null);
}

#[test]
fn who_needs_a_token_and_a_certificate_needs_both() {
    let demanded = |needs_token, needs_certificate| {
        let side = AdminSide {
            needs_token,
            needs_certificate,
            is_read_only: false,
            lanes: &["grpc"],
            apis: &["default"],
        };
        side.document()["security"].clone()
    };
    let (token, password) = (json!({ "token": [] }), json!({ "password": [] }));
    assert_eq!(demanded(true, false), json!([token, password]));
    assert_eq!(demanded(false, true), json!([{ "certificate": [] }]));
    let both = json!([
        { "token": [], "certificate": [] },
        { "password": [], "certificate": [] },
    ]);
    assert_eq!(demanded(true, true), both);
}

/// The JSON of an order for dead letters, right or not.
fn order() -> impl Strategy<Value = Value> {
    let values = [
        "null",
        "true",
        "false",
        "0",
        "-1",
        "7",
        "1.5",
        "7.0",
        "-0",
        "2e1",
        "18446744073709551615",
        "4294967296",
        "\"\"",
        "\"a\"",
        "[]",
        "[\"a\"]",
        "[1]",
        "{}",
    ];
    let value =
        || select(values.to_vec()).prop_map(|text| serde_json::from_str::<Value>(text).unwrap());
    let names = [
        "id", "lane", "status", "given_up", "since_ms", "until_ms", "text", "other",
    ];
    let filter = hash_map(select(names.to_vec()), value(), 0..3);
    let filter = filter.prop_map(|members| json!(members));
    let names = ["ids", "all", "limit", "parked", "more"];
    let member = (select(names.to_vec()), value());
    (
        vec(member, 0..3),
        option::of(prop_oneof![3 => filter, 1 => value()]),
    )
        .prop_map(|(members, filter)| {
            let mut order: Map<_, _> = members
                .into_iter()
                .map(|(name, of)| (name.to_owned(), of))
                .collect();
            order.extend(filter.map(|filter| ("filter".to_owned(), filter)));
            order.into()
        })
}

proptest! {
    #[test]
    fn an_order_is_taken_if_its_schema_fits(order in order()) {
        thread_local! {
            static SCHEMA: Validator = {
                let all = document();
                let body = &all["paths"]["/api/dead/drop"]["post"]["requestBody"];
                let schema = &body["content"]["application/json"]["schema"];
                jsonschema::validator_for(schema).unwrap()
            };
        }
        let read = serde_json::from_value::<OrderBody<Selection>>(order.clone());
        let is_taken = read.is_ok_and(|OrderBody(selection)| selection.which().is_ok());
        let fits = SCHEMA.with(|schema| schema.is_valid(&order));
        prop_assert_eq!(is_taken, fits, "{}", order);
    }
}
