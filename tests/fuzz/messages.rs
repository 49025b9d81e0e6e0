//! Messages of brokers, one record or a bundle of them.

use proptest::{collection::vec, prelude::*, sample::Index, string::string_regex};
use prost::Message as _;
use waypost::{
    proto,
    record::{Origin, Record, TraceHeaders},
    transport::Message,
};

use super::{
    cases, changed,
    checks::messages::{check_bundles, check_foreign},
};

/// The place of the header that counts the records of a bundle.
const BUNDLE: usize = 4;

fn visible(most: usize) -> impl Strategy<Value = String> {
    string_regex(&format!("[!-~]{{1,{most}}}")).expect("an expression")
}

fn origin() -> impl Strategy<Value = Origin> {
    (visible(20), any::<u64>()).prop_map(|(run, at_us)| Origin {
        run: run.into(),
        at_us,
    })
}

fn trace() -> impl Strategy<Value = TraceHeaders> {
    let parent = string_regex("00-[1-9a-f][0-9a-f]{31}-[1-9a-f][0-9a-f]{15}-0[0-3]");
    let state = string_regex("[a-z][a-z0-9]{0,9}=[!-+\\--<>-~]{1,40}").expect("an expression");
    let both = (parent.expect("an expression"), proptest::option::of(state));
    both.prop_map(|(parent, state)| {
        let read = TraceHeaders::read(&parent, state.as_deref());
        read.expect("a valid context")
    })
}

fn body() -> impl Strategy<Value = Vec<u8>> {
    let object = string_regex(r#"\{("a" ?: ?[0-9]{1,3})? ?\}"#).expect("an expression");
    prop_oneof![
        object.prop_map(String::into_bytes),
        vec(any::<u8>(), 0..200)
    ]
}

fn record() -> impl Strategy<Value = Record> {
    let optional = (
        proptest::option::of(trace()),
        proptest::option::weighted(0.9, origin()),
        proptest::option::of(visible(10)),
    );
    let own = (visible(40), body());
    (own, optional, any::<bool>()).prop_map(|((id, body), (trace, origin, api), is_event)| Record {
        id: id.into(),
        body: body.into(),
        trace,
        origin,
        api: api.map(Into::into),
        event: is_event.then(|| "id=1&source=/&specversion=1.0&type=t".into()),
    })
}

/// Bytes that are a bundle, or nearly, and the number of its records.
fn wire() -> impl Strategy<Value = (Vec<u8>, usize)> {
    let bundle = vec(record(), 0..4).prop_map(|records| {
        let count = records.len();
        let records = records
            .iter()
            .map(|record| proto::Record::from(&Message::from(record)));
        let bundle = proto::Bundle {
            records: records.collect(),
        };
        (bundle.encode_to_vec(), count)
    });
    let piece = (any::<Index>(), 0..4_usize, vec(any::<u8>(), 0..4));
    let changes = prop_oneof![Just(Vec::new()), vec(piece, 1..4)];
    let nearly =
        (bundle, changes).prop_map(|((bytes, count), changes)| (changed(bytes, changes), count));
    prop_oneof![4 => nearly, 2 => body().prop_map(|body| (body, 1))]
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn records_come_out_of_bundles_as_they_went_in(
        records in vec(record(), 0..12), most in 1..8_usize, largest in 100..3000_usize
    ) {
        check_bundles(&records, most, largest);
    }

    #[test]
    fn a_message_of_anyone_is_records_that_can_be_posted(
        (body, count) in wire(),
        is_counted in proptest::bool::weighted(0.7),
        mut headers in vec((0..7_usize, prop_oneof![
            visible(30), "[1-3]", "[0-9]{1,4}", "[a-z]{1,3}/[0-9]{1,22}", any::<String>(), trace().prop_map(|trace| trace.parent().to_owned()), "[a-z]=[0-9]",
        ]), 0..6),
    ) {
        if is_counted {
            headers.insert(0, (BUNDLE, count.to_string()));
        }
        check_foreign(body, &headers);
    }
}
