//! The header `Idempotency-Key`, and the table of keys with its files.

use actix_rt::System;
use proptest::{collection::vec, option, prelude::*, sample::select, test_runner::TestRunner};

use super::{
    cases,
    checks::keys::{Damage, Event, KEY_MAX, RECEIPTS, check_key, check_table},
};

/// A line of the header: nearly a key, bare or quoted.
fn line() -> impl Strategy<Value = Vec<u8>> {
    const PIECES: &[&str] = &[
        "a", "B", "7", "/", "-", "=", ";", ",", "%20", "\\", "\"", "\\\"", "\\\\", "\\a", " ",
        "\t", "é", "\u{7f}",
    ];
    let pieces = vec(select(PIECES), 0..8).prop_map(|pieces| pieces.concat().into_bytes());
    let plain = "[!-~]{1,12}".prop_map(String::into_bytes);
    let long = (KEY_MAX - 3..KEY_MAX + 4).prop_map(|length| vec![b'k'; length]);
    // Escapes count once.
    let escaped = (KEY_MAX - 3..KEY_MAX + 4).prop_map(|length| br#"\""#.repeat(length));
    let text =
        prop_oneof![4 => pieces, 2 => plain, 1 => long, 1 => escaped, 1 => vec(any::<u8>(), 0..4)];
    let ends = select(
        &[
            ("", ""),
            ("", ""),
            ("\"", "\""),
            ("\"", "\""),
            ("\"", ""),
            ("", "\""),
        ][..],
    );
    (text, ends).prop_map(|(text, (begin, end))| [begin.as_bytes(), &text, end.as_bytes()].concat())
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn a_key_is_what_its_header_says(lines in vec(line(), 0..3)) {
        let lines: Vec<_> = lines.iter().map(Vec::as_slice).collect();
        check_key(&lines);
    }
}

fn event() -> impl Strategy<Value = Event> {
    let receipt = option::weighted(0.8, select(RECEIPTS));
    let request = (0..6_usize, 0..3_usize, receipt);
    let request = request.prop_map(|(key, record, receipt)| Event::Request {
        key,
        record,
        receipt,
    });
    let bytes = vec(any::<u8>(), 1..4);
    let damage = prop_oneof![
        (any::<u16>(), bytes).prop_map(|(at, bytes)| Damage::Bytes(at, bytes)),
        any::<u16>().prop_map(Damage::Cut),
        vec(any::<u8>(), 1..40).prop_map(Damage::Tail),
    ];
    let start = option::of((any::<bool>(), damage)).prop_map(Event::Start);
    prop_oneof![5 => request, 1 => start]
}

#[test]
fn a_key_has_its_first_receipt_or_is_new_after_a_damage() {
    let system = System::new();
    let mut runner = TestRunner::new(cases());
    let checked = runner.run(&vec(event(), 1..24), |events| {
        system.block_on(check_table(&events));
        Ok(())
    });
    checked.unwrap_or_else(|why| panic!("{why}"));
}
