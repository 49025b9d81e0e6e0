//! A schema that an operator has written into a file.

use std::{borrow::Cow, fmt, fs};

use bytes::Bytes;
use jsonschema::{PatternOptions, ValidationError, Validator, error::ValidationErrorKind};
use serde_json::Value;

use super::{
    limits::{DEPTH_MAX, JsonLimits, NumberRange, push, shown},
    parse::{Invalid, RecordRules, as_text, parse, place},
    pointer::{Pointer, PointerSet},
    schema::Schema,
    schema_references::{broken_reference, searched_max},
};

/// The most faults of a file that are told at once.
const FAULTS_MAX: usize = 10;
/// The most characters of an error: it may list what a record has and what a schema allows.
const DETAIL_MAX: usize = 500;

const UNSEARCHED: &str = "does not fit the schema; with its alternatives, the rule that it breaks \
                          would take too long to find";

/// A compiled JSON Schema. It reads no other file, and asks no server.
pub struct SchemaFile {
    path: String,
    text: String,
    validator: Validator,
    /// The rule that a longer record breaks is not searched.
    searched_max: usize,
}

impl SchemaFile {
    /// Reads and compiles the schema of the file at `path`.
    ///
    /// # Errors
    /// The first faults of the file, each with its line.
    pub fn read(path: &str) -> Result<Self, String> {
        let unreadable = |why: String| format!("{path:?} cannot be read: {why}");
        let found = fs::metadata(path).map_err(|why| unreadable(why.to_string()))?;
        if !found.is_file() {
            return Err(unreadable("it is no file".into()));
        }
        let body = fs::read(path).map_err(|why| unreadable(why.to_string()))?;
        let body = Bytes::from(body);
        let text = as_text(&body).map_err(|why| told(path, "", &why))?;
        // The rules for records, but for sizes: a name that is twice is a mistake here too.
        let rules = RecordRules {
            schema: Schema::Any,
            limits: JsonLimits {
                max_size: usize::MAX,
                max_depth: DEPTH_MAX,
                max_members: usize::MAX,
                numbers: NumberRange::Double,
            },
        };
        parse(&body, &rules).map_err(|why| told(path, text, &why))?;
        let schema: Value = serde_json::from_str(text).map_err(|why| format!("{path}: {why}"))?;
        let validator = compile(&schema).map_err(|faults| {
            let faults = faults
                .iter()
                .map(|(pointer, what)| located(path, text, pointer, what));
            faults.collect::<Vec<_>>().join("; ")
        })?;
        Ok(Self {
            path: path.to_owned(),
            text: text.to_owned(),
            validator,
            searched_max: searched_max(&schema),
        })
    }

    /// The path that it was read from.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The file as it was read.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Checks `record`, the JSON text of an object.
    pub(super) fn check(&self, record: &str) -> Result<(), Invalid> {
        let value: Value = serde_json::from_str(record).map_err(|why| Invalid::Schema {
            field: None,
            detail: why.to_string(),
        })?;
        if self.validator.is_valid(&value) {
            return Ok(());
        }
        if record.len() <= self.searched_max
            && let Err(broken) = self.validator.validate(&value)
        {
            return Err(invalid(record, &broken));
        }
        Err(Invalid::Schema {
            field: Some(String::new()),
            detail: UNSEARCHED.into(),
        })
    }
}

impl fmt::Debug for SchemaFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SchemaFile").field(&self.path).finish()
    }
}

impl PartialEq for SchemaFile {
    fn eq(&self, other: &Self) -> bool {
        self.path == other.path && self.text == other.text
    }
}

impl Eq for SchemaFile {}

/// A pointer into a schema, and what is wrong there.
type Fault = (String, String);

fn compile(schema: &Value) -> Result<Validator, Vec<Fault>> {
    let fault = |why: &ValidationError<'_>| {
        let found = why.instance().to_string();
        let what = why.masked_with(shown(&found)).to_string();
        let pointer = match why.kind() {
            ValidationErrorKind::Referencing(_) => {
                broken_reference(schema, &what).unwrap_or_default()
            }
            _ => why.instance_path().as_str().to_owned(),
        };
        (pointer, brief(what))
    };
    let broken: Vec<_> = match jsonschema::meta::validator_for(schema) {
        Ok(meta) => meta
            .iter_errors(schema)
            .take(FAULTS_MAX)
            .map(|why| fault(&why))
            .collect(),
        Err(why) => vec![fault(&why)],
    };
    if !broken.is_empty() {
        return Err(broken);
    }
    if !allows_objects(&schema["type"]) {
        let what = format!("{} is never a record, which is an object", schema["type"]);
        return Err(vec![("/type".into(), brief(what))]);
    }
    // Other expressions can take a time that is exponential in a client's text.
    let linear = PatternOptions::regex();
    let options = jsonschema::options().offline().with_pattern_options(linear);
    options.build(schema).map_err(|why| vec![fault(&why)])
}

fn allows_objects(types: &Value) -> bool {
    match types {
        Value::Array(types) => types.iter().any(|of| of == "object"),
        Value::String(of) => of == "object",
        _ => true,
    }
}

/// The mistake of a file whose JSON breaks a rule.
fn told(path: &str, text: &str, why: &Invalid) -> String {
    match why {
        Invalid::Malformed { .. } | Invalid::TooLarge { .. } => format!("{path}: {why}"),
        Invalid::Schema { field, detail } => {
            located(path, text, field.as_deref().unwrap_or_default(), detail)
        }
    }
}

fn located(path: &str, text: &str, pointer: &str, what: &str) -> String {
    let line = line_of(text, pointer);
    if pointer.is_empty() {
        format!("{path}:{line}: {what}")
    } else {
        format!("{path}:{line}: {pointer}: {what}")
    }
}

/// The line of the value at `pointer`.
fn line_of(text: &str, pointer: &str) -> usize {
    let value = value_at(text, pointer).unwrap_or(text);
    let (line, _) = place(
        text.as_bytes(),
        value.as_ptr() as usize - text.as_ptr() as usize,
    );
    line
}

/// The text of the value at `pointer`, as it stands in `text`.
fn value_at<'t>(text: &'t str, pointer: &str) -> Option<&'t str> {
    if pointer.is_empty() {
        return Some(text);
    }
    let mut one = PointerSet::default();
    let index = one.add(&pointer.parse::<Pointer>().ok()?);
    one.read(text).ok()?.get(index)
}

/// The error of a record that breaks a rule of the schema.
fn invalid(record: &str, broken: &ValidationError<'_>) -> Invalid {
    let mut pointer = broken.instance_path().as_str().to_owned();
    let found = value_at(record, &pointer)
        .map_or_else(|| Cow::from(broken.instance().to_string()), Cow::from);
    let found = shown(&found);
    let what = match broken.kind() {
        ValidationErrorKind::Required { property } => {
            push(&mut pointer, property.as_str().unwrap_or_default());
            "is missing".into()
        }
        ValidationErrorKind::Constant { expected_value } => {
            format!("{found} is not {expected_value}")
        }
        ValidationErrorKind::AdditionalProperties { unexpected }
        | ValidationErrorKind::UnevaluatedProperties { unexpected } => {
            push(&mut pointer, unexpected.first().map_or("", String::as_str));
            "is a member that the schema does not allow".into()
        }
        _ => broken.masked_with(found).to_string(),
    };
    Invalid::Schema {
        detail: format!(
            "{}; so says {} in the schema",
            brief(what),
            broken.schema_path()
        ),
        field: Some(pointer),
    }
}

/// The begin of a long error.
fn brief(what: String) -> String {
    match what.char_indices().nth(DETAIL_MAX) {
        None => what,
        Some((end, _)) => format!("{}…", &what[..end]),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn read(text: &str) -> Result<SchemaFile, String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let path = file.path().to_str().unwrap();
        SchemaFile::read(path).map_err(|why| why.replace(path, "FILE"))
    }

    #[test]
    fn a_fault_of_a_file_is_told_by_its_line() {
        for (text, expected) in [
            ("{\n\"type\": \"strin\"\n}", "FILE:2: /type: "),
            (
                "{\n\"properties\": {\n\"a\": {\"maxLength\": -1}}}",
                "FILE:3: /properties/a/maxLength: -1 is less than the minimum of 0",
            ),
            (
                "{\"properties\":\n{\"a\":\n{\"pattern\": \"(?=a)\"}}}",
                "FILE:3: /properties/a/pattern: ",
            ),
            (
                "{\n\"$ref\": \"https://example.com/a.json\"}",
                "FILE:2: /$ref: ",
            ),
            ("{\n\"$ref\": \"#/$defs/none\"}", "FILE:2: /$ref: "),
            (
                "{\n\"$schema\": \"https://example.com/none\"}",
                "FILE:2: /$schema: ",
            ),
            (
                "{\n\"type\": \"array\"}",
                "FILE:2: /type: \"array\" is never a record",
            ),
            ("{\n\"type\": [\"null\"]}", "FILE:2: /type: "),
            (
                "{\n\"type\": \"object\",\n\"type\": \"object\"}",
                "/type: is there twice",
            ),
            ("{\n\"type\": }", "FILE: malformed JSON at line 2, column 9"),
            (
                "{\n\"properties\": {\n\"a\": {\"$ref\": \"#/$defs/none\"},\n\"b\": {\"$ref\": \"#\"}}}",
                "FILE:3: /properties/a/$ref: ",
            ),
            ("true", "expected a JSON object"),
        ] {
            let why = read(text).unwrap_err();
            assert!(
                why.contains(expected) && why.starts_with("FILE"),
                "{text}: {why}"
            );
            assert!(!why.contains('\n') && !why.contains(": :"), "{why}");
        }
        let why = read(r#"{"type":1,"maxProperties":-1,"required":["a","a"]}"#).unwrap_err();
        assert_eq!(why.matches("FILE:1: ").count(), 3, "{why}");
        for path in ["no-such-file", "src"] {
            let why = SchemaFile::read(path).unwrap_err();
            assert!(
                why.starts_with(&format!("{path:?} cannot be read: ")),
                "{why}"
            );
        }
    }

    #[test]
    fn an_error_has_the_pointer_the_value_found_and_what_is_allowed() {
        let schema = read(
            r##"{
                "required": ["kind"],
                "properties": {
                    "kind": { "enum": ["a", "b"] },
                    "n": { "type": "number", "maximum": 10 },
                    "one": { "const": 1 },
                    "text": { "type": "string", "pattern": "^x+$", "maxLength": 200 },
                    "a/b": { "items": { "$ref": "#/$defs/small" } },
                    "open": { "additionalProperties": false, "properties": { "in": true } },
                    "either": { "anyOf": [{ "type": "null" }, { "type": "boolean" }] }
                },
                "$defs": { "small": { "type": "integer" } }
            }"##,
        )
        .unwrap();
        for (members, pointer, parts) in [
            (
                r#""n":10.50e0"#,
                "/n",
                ["10.50e0", "maximum of 10", "/properties/n/maximum"],
            ),
            (
                r#""n":"1""#,
                "/n",
                ["\"1\"", "\"number\"", "/properties/n/type"],
            ),
            (
                r#""one":2"#,
                "/one",
                ["2", "is not 1", "/properties/one/const"],
            ),
            (
                r#""text":"y""#,
                "/text",
                ["\"y\"", "^x+$", "/properties/text/pattern"],
            ),
            (
                r#""a/b":[1,true]"#,
                "/a~1b/1",
                ["true", "integer", "/$defs/small/type"],
            ),
            (
                r#""open":{"out":1}"#,
                "/open/out",
                ["not allow", "", "additionalProperties"],
            ),
            (
                r#""either":7"#,
                "/either",
                ["7", "anyOf", "/properties/either/anyOf"],
            ),
            (
                r#""kind":"c""#,
                "/kind",
                ["\"c\"", "\"a\" or \"b\"", "/properties/kind/enum"],
            ),
            ("", "/kind", ["missing", "", "/required"]),
        ] {
            let kind = if members.contains("kind") || members.is_empty() {
                String::new()
            } else {
                r#","kind":"a""#.into()
            };
            let record = format!("{{{members}{kind}}}");
            let Err(Invalid::Schema { field, detail }) = schema.check(&record) else {
                panic!("{record} is taken");
            };
            assert_eq!(field.as_deref(), Some(pointer), "{record}");
            for part in parts {
                assert!(detail.contains(part), "{record}: {detail}");
            }
        }
        assert_eq!(schema.check(r#"{"kind":"b","n":10,"more":[]}"#), Ok(()));
        let long = format!(r#"{{"kind":"a","text":"{}"}}"#, "z".repeat(10_000));
        let why = schema.check(&long).unwrap_err().to_string();
        assert!(why.len() < 2 * DETAIL_MAX, "{why}");
    }
}
