//! The references of a schema: which of them an error is about, and what a record can cost through
//! them.

use std::collections::HashSet;

use serde_json::Value;

use super::limits::push;

/// The members that lead to other schemas.
const REFERENCES: [&str; 4] = ["/$ref", "/$dynamicRef", "/$recursiveRef", "/$schema"];
/// Their errors hold the errors of all of their schemas, for each value inside of them.
const ALTERNATIVES: [&str; 2] = ["anyOf", "oneOf"];
/// They can check one value by two schemas. If both lead back, each level of a record doubles the
/// work of the search for an error.
const FORKS: [&str; 11] = [
    "allOf",
    "anyOf",
    "contains",
    "dependencies",
    "dependentSchemas",
    "if",
    "not",
    "oneOf",
    "patternProperties",
    "unevaluatedItems",
    "unevaluatedProperties",
];
/// They check the values inside of a value, as the schema that a reference beside them leads to does.
const CHILDREN: [&str; 5] = [
    "additionalItems",
    "additionalProperties",
    "items",
    "prefixItems",
    "properties",
];
/// The longest record that is searched with [`ALTERNATIVES`]: an error of each of its values fits
/// into a few MiB.
const SEARCHED_MAX: usize = 8 << 10;
/// References that lead on to each other; more count as a circle.
const CHAIN_MAX: usize = 64;

/// The longest record of which the rule that it breaks can be searched in bounded time and memory.
/// Whether it breaks one is known without a search, for any record.
pub(super) fn searched_max(schema: &Value) -> usize {
    if has_member(schema, &FORKS) || has_forked_reference(schema) {
        let is_recursive = leads_back(schema, schema, &mut Vec::new(), &mut HashSet::new());
        if is_recursive {
            return 0;
        }
    }
    if has_member(schema, &ALTERNATIVES) {
        SEARCHED_MAX
    } else {
        usize::MAX
    }
}

/// A member of one of `names` anywhere, be it a keyword or not.
fn has_member(value: &Value, names: &[&str]) -> bool {
    any_object(value, &|members| {
        names.iter().any(|name| members.contains_key(*name))
    })
}

fn has_forked_reference(schema: &Value) -> bool {
    any_object(schema, &|members| {
        members.contains_key("$ref") && CHILDREN.iter().any(|name| members.contains_key(*name))
    })
}

fn any_object(value: &Value, is_one: &impl Fn(&serde_json::Map<String, Value>) -> bool) -> bool {
    match value {
        Value::Array(items) => items.iter().any(|item| any_object(item, is_one)),
        Value::Object(members) => {
            is_one(members) || members.values().any(|value| any_object(value, is_one))
        }
        _ => false,
    }
}

/// Whether a reference inside of `value` leads back to itself, or may. `open` are the references
/// that led to `value`, `done` those that are known to lead to none.
fn leads_back<'s>(
    schema: &'s Value,
    value: &'s Value,
    open: &mut Vec<&'s str>,
    done: &mut HashSet<&'s str>,
) -> bool {
    let members = match value {
        Value::Array(items) => {
            return items
                .iter()
                .any(|item| leads_back(schema, item, open, done));
        }
        Value::Object(members) => members,
        _ => return false,
    };
    members
        .iter()
        .any(|(name, member)| match (name.as_str(), member) {
            ("$ref", Value::String(to)) => {
                let to = to.as_str();
                if done.contains(to) {
                    return false;
                }
                // Other names than pointers may lead anywhere.
                let target = to.strip_prefix('#').and_then(|to| schema.pointer(to));
                let Some(target) = target else { return true };
                if open.contains(&to) || open.len() == CHAIN_MAX {
                    return true;
                }
                open.push(to);
                let is_circle = leads_back(schema, target, open, done);
                open.pop();
                done.insert(to);
                is_circle
            }
            ("$dynamicRef" | "$recursiveRef", Value::String(_)) => true,
            // The pointers inside of it count from here.
            ("$id" | "id", Value::String(_)) if !std::ptr::eq(value, schema) => true,
            _ => leads_back(schema, member, open, done),
        })
}

/// The pointer to the reference that an error is about: its text has the end of what is not there.
pub(super) fn broken_reference(schema: &Value, error: &str) -> Option<String> {
    let mut open = vec![(String::new(), schema)];
    while let Some((pointer, value)) = open.pop() {
        let inside = |token: &str| {
            let mut pointer = pointer.clone();
            push(&mut pointer, token);
            pointer
        };
        match value {
            Value::Object(members) => {
                open.extend(members.iter().map(|(name, value)| (inside(name), value)));
            }
            Value::Array(items) => {
                let items = items.iter().enumerate();
                open.extend(items.map(|(at, item)| (inside(&at.to_string()), item)));
            }
            Value::String(text) if REFERENCES.iter().any(|name| pointer.ends_with(name)) => {
                let (document, place) = text.split_once('#').unwrap_or((text, ""));
                let missing = if document.is_empty() { place } else { document };
                if !missing.is_empty() && error.contains(&format!("{missing}'")) {
                    return Some(pointer);
                }
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use serde_json::json;

    use super::*;
    use crate::record::{Invalid, SchemaFile};

    fn read(text: &str) -> SchemaFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        SchemaFile::read(file.path().to_str().unwrap()).unwrap()
    }

    #[test]
    fn a_search_is_bounded_where_alternatives_or_a_circle_multiply_it() {
        for (schema, expected) in [
            (json!({"type": "object"}), usize::MAX),
            (json!({"allOf": [{"not": {"required": ["a"]}}]}), usize::MAX),
            // A circle of one way: a tree.
            (
                json!({"properties": {"inner": {"items": {"$ref": "#"}}}}),
                usize::MAX,
            ),
            (
                json!({"properties": {"a": {"anyOf": [{}, {}]}}}),
                SEARCHED_MAX,
            ),
            // Two references to one schema are no circle.
            (
                json!({
                    "properties": {
                        "a": {"$ref": "#/$defs/b"},
                        "c": {"oneOf": [{"$ref": "#/$defs/b"}, {"$ref": "#/$defs/d"}]}
                    },
                    "$defs": {"b": {"$ref": "#/$defs/d"}, "d": {"type": "string"}}
                }),
                SEARCHED_MAX,
            ),
            (
                json!({"properties": {"a": {"oneOf": [{"$ref": "#"}, {}]}}}),
                0,
            ),
            (
                json!({
                    "not": {"$ref": "#/$defs/a"},
                    "$defs": {
                        "a": {"items": {"$ref": "#/$defs/b"}},
                        "b": {"items": {"$ref": "#/$defs/a"}}
                    }
                }),
                0,
            ),
            (
                json!({
                    "$ref": "#/$defs/a",
                    "properties": {"x": {"$ref": "#"}},
                    "$defs": {"a": {"properties": {"x": {"$ref": "#"}}}}
                }),
                0,
            ),
            (json!({"allOf": [{"$ref": "#name"}]}), 0),
            (json!({"allOf": [{"items": {"$dynamicRef": "#"}}]}), 0),
            (
                json!({"anyOf": [{"$id": "https://example.com/a", "items": {}}]}),
                0,
            ),
        ] {
            assert_eq!(searched_max(&schema), expected, "{schema}");
        }
    }

    #[test]
    fn a_deep_record_is_refused_whatever_its_schema_multiplies() {
        let of = |op: &str| {
            format!(
                r##"{{"properties":{{"op":{{"const":"{op}"}},"args":{{"items":{{"$ref":"#"}}}}}},
                    "required":["op","args"]}}"##
            )
        };
        let leaf = r#"{"properties":{"n":{"type":"integer"}},"required":["n"]}"#;
        let alternatives = [&*of("and"), &of("or"), &of("not"), leaf].join(",");
        let expression = read(&format!(r#"{{"oneOf":[{alternatives}]}}"#));
        let tree =
            read(r##"{"properties":{"n":{"type":"integer"},"args":{"items":{"$ref":"#"}}}}"##);
        let depth = 50;
        let nested = |leaf: &str| {
            let begin = r#"{"op":"and","args":["#.repeat(depth);
            [&begin, leaf, &"]}".repeat(depth)].concat()
        };
        let (right, wrong) = (nested(r#"{"n":1}"#), nested(r#"{"n":"1"}"#));
        for (schema, pointer, part) in [
            (expression, String::new(), "does not fit the schema"),
            (tree, "/args/0".repeat(depth) + "/n", "\"integer\""),
        ] {
            assert_eq!(schema.check(&right), Ok(()));
            let Err(Invalid::Schema { field, detail }) = schema.check(&wrong) else {
                panic!("{wrong} is taken");
            };
            assert_eq!(field, Some(pointer), "{detail}");
            assert!(detail.contains(part), "{detail}");
        }
    }
}
