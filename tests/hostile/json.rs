//! JSON by the classes of `JSONTestSuite`: texts that every parser takes, that none takes, and those
//! that parsers differ on. Each value is a member of a record.

use super::{
    Case, TAKEN, class,
    json_values::{
        GOOD_NUMBERS, GOOD_STRUCTURES, GOOD_TEXTS, HALF_PAIRS, LARGE_NUMBERS, NO_ARRAYS, NO_JSON,
        NO_NUMBERS, NO_OBJECTS, NO_RECORDS, NO_STRUCTURES, NO_TEXTS, NO_UTF8, RECORDS, TWICE,
    },
    open, request,
};

pub fn cases() -> Vec<Case> {
    let member = |value: &[u8]| body([b"{\"a\":", value, b"}"].concat());
    [
        class(
            "numbers",
            TAKEN,
            GOOD_NUMBERS.iter().map(|text| member(text.as_bytes())),
        ),
        class(
            "texts",
            TAKEN,
            GOOD_TEXTS.iter().map(|text| member(text.as_bytes())),
        ),
        class(
            "structures",
            TAKEN,
            GOOD_STRUCTURES.iter().map(|text| member(text.as_bytes())),
        ),
        class(
            "no arrays",
            open(400),
            NO_ARRAYS.iter().map(|text| member(text.as_bytes())),
        ),
        class(
            "no numbers",
            open(400),
            NO_NUMBERS.iter().map(|text| member(text.as_bytes())),
        ),
        class(
            "no texts",
            open(400),
            NO_TEXTS.iter().map(|text| member(text.as_bytes())),
        ),
        class(
            "no objects",
            open(400),
            NO_OBJECTS.iter().map(|text| member(text.as_bytes())),
        ),
        class(
            "no structures",
            open(400),
            NO_STRUCTURES.iter().map(|text| member(text)),
        ),
        class(
            "half of a surrogate pair",
            open(400),
            HALF_PAIRS.iter().map(|text| member(text.as_bytes())),
        ),
        class(
            "no UTF-8",
            open(400),
            NO_UTF8.iter().map(|text| member(text)),
        ),
        class(
            "numbers that a double does not hold",
            TAKEN,
            LARGE_NUMBERS.iter().map(|text| member(text.as_bytes())),
        ),
        class(
            "a name twice",
            open(422),
            TWICE.iter().map(|text| member(text.as_bytes())),
        ),
        class(
            "as deep as it may be",
            TAKEN,
            [nested(1), nested(63)].map(|text| member(text.as_bytes())),
        ),
        class(
            "too deep",
            open(422),
            [nested(64), nested(500), nested(60_000)].map(|text| member(text.as_bytes())),
        ),
        class(
            "no record",
            open(422),
            NO_RECORDS.iter().map(|text| body(*text)),
        ),
        class("no JSON", open(400), NO_JSON.iter().map(|text| body(*text))),
        class("records", TAKEN, RECORDS.iter().map(|text| body(*text))),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn body(text: impl AsRef<[u8]>) -> Vec<u8> {
    request("POST / HTTP/1.1", "", text)
}

fn nested(depth: usize) -> String {
    format!("{}{}", "[".repeat(depth), "]".repeat(depth))
}
