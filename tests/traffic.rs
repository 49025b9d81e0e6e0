//! `traffic.json` is what its generator writes.

use std::collections::HashSet;

use bytes::Bytes;
use waypost::record::{Schema, parse};

#[path = "../examples/traffic.rs"]
mod generator;

#[test]
fn traffic_json_is_what_its_generator_writes() {
    assert!(
        include_str!("../traffic.json") == generator::traffic(),
        "run: cargo run --example traffic > traffic.json"
    );
}

#[test]
fn traffic_json_has_a_thousand_varied_records_of_the_case_schema() {
    let records = crate::support::traffic();
    assert_eq!(records.len(), 1000);
    for record in &records {
        assert_eq!(parse(record, &Schema::Case.into()).as_ref(), Ok(record));
    }
    assert!(records.iter().collect::<HashSet<&Bytes>>().len() > 990);
}
