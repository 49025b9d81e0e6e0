use super::*;
use crate::record::{Tag, limits::HALF_A_PAIR};

const CASE: &str = r#"{"name":"Ñusta","location":"San Marcos","age":42,"infectedtype":"imported","state":"symptomatic"}"#;

/// Parses, and wants the values of many members. That changes neither record nor error.
fn parse_both(text: &str, schema: Schema) -> Result<Bytes, Invalid> {
    let rules = RecordRules::from(schema);
    let body = Bytes::copy_from_slice(text.as_bytes());
    let mut pointers = PointerSet::default();
    let wanted = [
        "name",
        "location",
        "age",
        "infectedtype",
        "state",
        "path",
        "a/b",
        "b",
        "mass",
    ];
    for wanted in wanted {
        pointers.add(&format!("/{wanted}").parse().unwrap());
    }
    let parsed = parse(&body, &rules);
    let with_values = parse_body(&body, &rules, &pointers);
    let detail = |why: &Invalid| why.to_string();
    assert_eq!(
        with_values
            .as_ref()
            .map(|(record, _)| record)
            .map_err(detail),
        parsed.as_ref().map_err(detail),
        "{text}"
    );
    parsed
}

fn case(text: &str) -> Result<Bytes, Invalid> {
    parse_both(text, Schema::Case)
}

fn any(text: &str) -> Result<Bytes, Invalid> {
    parse_both(text, Schema::Any)
}

#[test]
fn the_values_that_are_wanted_are_those_of_the_record() {
    let mut pointers = PointerSet::default();
    let wanted = ["/age", "/a/1/b", "/state", "/path/x", "/c"];
    let indexes = wanted.map(|pointer| pointers.add(&pointer.parse().unwrap()));
    let body = CASE.replacen('{', r#"{"a":[0, {"b" : "\u0061"}],"path":{"x":1}, "#, 1);
    let body = Bytes::from(body);
    let (record, values) = parse_body(&body, &Schema::Case.into(), &pointers).unwrap();
    let found = indexes.map(|index| values.get(index));
    let expected = [
        Some("42"),
        Some(r#""\u0061""#),
        Some(r#""symptomatic""#),
        None,
        None,
    ];
    assert_eq!(found, expected);
    assert!(!record.windows(6).any(|part| part == b"\"path\""));
}

#[test]
fn a_record_keeps_its_bytes_but_for_surrounding_white_space() {
    assert_eq!(case(CASE).unwrap(), CASE);
    assert_eq!(case(&format!(" \r\n\t{CASE}\n ")).unwrap(), CASE);
    let spaced = "{ \"a\" : [1, 2 ] , \"b\":{\"path\":\"kept\"} }";
    assert_eq!(any(spaced).unwrap(), spaced);
}

#[test]
fn a_path_that_the_client_sent_goes_at_the_top_level_only() {
    for (sent, kept) in [
        (r#"{"path":1}"#, "{}"),
        (r#"{ "path" : "x" }"#, "{  }"),
        (r#"{"a":1,"path":"x"}"#, r#"{"a":1}"#),
        (r#"{"path":"x","a":1}"#, r#"{"a":1}"#),
        (
            r#"{"a":1, "path" : {"path":":,\"}"} , "b":2}"#,
            r#"{"a":1, "b":2}"#,
        ),
        (r#"{"a":1,"p\u0061th":"x"}"#, r#"{"a":1}"#),
        (r#"{"a":{"path":1}}"#, r#"{"a":{"path":1}}"#),
        (
            r#"{"a\"path":1,"b":"\"path\":2"}"#,
            r#"{"a\"path":1,"b":"\"path\":2"}"#,
        ),
    ] {
        let body = any(sent).unwrap();
        assert_eq!(body, kept, "{sent}");
        let tagged = Tag::new("NATS").splice(&body).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&tagged).unwrap();
        assert_eq!(value["path"], "NATS", "{sent}");
    }
}

#[test]
fn half_of_a_surrogate_pair_has_one_error_in_names_and_values() {
    for half in [r"\ud800", r"\udc00", r"\ud800\ud800", r"\ud800x"] {
        for text in [
            format!(r#"{{"{half}":1}}"#),
            format!(r#"{{"a":"{half}"}}"#),
            format!(r#"{{"a":{{"{half}":1}}}}"#),
        ] {
            match any(&text) {
                Err(Invalid::Malformed { detail, .. }) => assert_eq!(detail, HALF_A_PAIR),
                other => panic!("{text}: {other:?}"),
            }
        }
        // A rule looks at it.
        let text = format!(r#"{{"a/b":"x","b":{{"{half}":1}},"name":"{half}"}}"#);
        assert!(
            matches!(any(&text), Err(Invalid::Malformed { .. })),
            "{text}"
        );
        assert!(case(&text).is_err());
    }
}

#[test]
fn malformed_json_is_told_by_line_and_column() {
    for (text, at) in [
        ("", (1, 0)),
        ("{\n\"a\": }", (2, 6)),
        ("{} x", (1, 4)),
        ("{\"a\":1,}", (1, 8)),
        ("\u{feff}{}", (1, 1)),
        ("\n \u{feff}{}", (2, 2)),
        ("{}\n{}", (2, 1)),
        ("{\n\"\\ud800\":1}", (2, 8)),
        ("{\n\"a\":\"\\ud800\"}", (2, 6)),
        ("{\n\"a\":\"\0\"}", (2, 5)),
        ("{\n\"\0\":1}", (2, 2)),
    ] {
        match any(text) {
            Err(Invalid::Malformed { line, column, .. }) => {
                assert_eq!((line, column), at, "{text:?}");
            }
            other => panic!("{text:?}: {other:?}"),
        }
    }
    let latin1 = Bytes::from_static(b"{\"a\":\n\"\xe9\"}");
    assert_eq!(
        parse(&latin1, &Schema::Any.into()),
        Err(Invalid::Malformed {
            line: 2,
            column: 2,
            detail: "not UTF-8".into()
        })
    );
}

#[test]
fn a_record_that_breaks_the_schema_is_told_by_field() {
    for (from, to, field) in [
        ("42", "151", Some("age")),
        ("42", "-1", Some("age")),
        ("42", "4.5", Some("age")),
        ("42", "\"42\"", Some("age")),
        ("42", "256", Some("age")),
        ("42", "42.5e0", Some("age")),
        ("42", "151.0", Some("age")),
        ("42", "-1.0", Some("age")),
        ("42", "-1e-400", Some("age")),
        ("42", "1e-400", Some("age")),
        ("42", "1e400", Some("age")),
        ("42", "-1e400", Some("age")),
        ("42", "99999999999999999999", Some("age")),
        ("42", "null", Some("age")),
        ("42", "true", Some("age")),
        ("42", "{}", Some("age")),
        ("42", "[42]", Some("age")),
        ("\"Ñusta\"", "1e400", Some("name")),
        ("\"symptomatic\"", "-1E+999", Some("state")),
        ("\"Ñusta\"", "\"\"", Some("name")),
        ("\"Ñusta\"", "null", Some("name")),
        ("\"San Marcos\"", "\"\"", Some("location")),
        ("\"imported\"", "1", Some("infectedtype")),
        ("\"state\"", "\"State\"", Some("state")),
        ("\"location\"", "\"name\"", Some("name")),
    ] {
        match case(&CASE.replacen(from, to, 1)) {
            Err(Invalid::Schema { field: found, .. }) => {
                let expected = field.map(|field| format!("/{field}"));
                assert_eq!(found, expected, "{from} -> {to}");
            }
            other => panic!("{from} -> {to}: {other:?}"),
        }
    }
    for text in ["[]", "1", "null", "\"{}\"", "[\"a\",\"l\",1,\"i\",\"s\"]"] {
        assert!(
            matches!(case(text), Err(Invalid::Schema { field: None, .. })),
            "{text}"
        );
    }
    for (from, to) in [
        ("imported", ""),
        ("42", "0"),
        ("42", "-0"),
        ("42", "-0.0"),
        ("42", "42.0"),
        ("42", "1.5e2"),
        ("42", "150"),
        ("42", "42,\"mass\":1e400"),
    ] {
        let text = CASE.replacen(from, to, 1);
        assert_eq!(case(&text).unwrap(), text, "{from} -> {to}");
    }
    for malformed in ["01", "+1", "1e", "- 0", "--0"] {
        let refused = case(&CASE.replacen("42", malformed, 1));
        assert!(
            matches!(refused, Err(Invalid::Malformed { .. })),
            "{malformed}: {refused:?}"
        );
    }
}
