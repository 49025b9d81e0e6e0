//! The schema of accepted records.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Serialize, Serializer};

use super::schema_file::SchemaFile;

/// The schema of `case`, as its parser checks it.
const CASE: &str = include_str!("case.schema.json");
const ANY: &str = r#"{"$schema":"https://json-schema.org/draft/2020-12/schema","type":"object"}"#;

/// The schema that every accepted record has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Schema {
    /// `name`, `location` (non-empty strings), `age` (integer 0 to 150), `infectedtype`, `state`
    /// (strings), and any other member.
    Case,
    /// Any JSON object.
    Any,
    /// Any JSON object that a JSON Schema allows.
    File(Arc<SchemaFile>),
}

impl Schema {
    /// The same as a JSON Schema.
    pub fn to_json(&self) -> &str {
        match self {
            Self::Case => CASE,
            Self::Any => ANY,
            Self::File(file) => file.text(),
        }
    }
}

impl fmt::Display for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Case => "case",
            Self::Any => "any",
            Self::File(file) => file.path(),
        })
    }
}

impl FromStr for Schema {
    type Err = String;

    /// `case`, `any`, or the path of a file, which is read and compiled.
    fn from_str(text: &str) -> Result<Self, String> {
        let file = |why: String| {
            format!("{why}; allowed is \"case\", \"any\" or the path of a JSON Schema file")
        };
        match text {
            "case" => Ok(Self::Case),
            "any" => Ok(Self::Any),
            "" => Err(file("is empty".into())),
            path => SchemaFile::read(path)
                .map(|read| Self::File(read.into()))
                .map_err(file),
        }
    }
}

impl Serialize for Schema {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        output.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::record::parse;

    #[test]
    fn the_json_schema_of_case_has_the_bounds_of_its_parser() {
        let schema: Value = serde_json::from_str(CASE).unwrap();
        let record = |name: &str, value: Value| {
            let mut record = serde_json::json!({
                "name": "a", "location": "b", "age": 1, "infectedtype": "", "state": ""
            });
            record[name] = value;
            record
        };
        let is_taken =
            |record: &Value| parse(&record.to_string().into(), &Schema::Case.into()).is_ok();
        let required = schema["required"].as_array().unwrap();
        assert_eq!(
            required.len(),
            schema["properties"].as_object().unwrap().len()
        );
        for name in required {
            let name = name.as_str().unwrap();
            let mut without = record("age", 1.into());
            without.as_object_mut().unwrap().remove(name);
            assert!(!is_taken(&without), "{name} is required");
            let property = &schema["properties"][name];
            let may_be_empty = property["minLength"] != 1;
            match property["type"].as_str().unwrap() {
                "string" => {
                    assert_eq!(is_taken(&record(name, "".into())), may_be_empty, "{name}");
                    assert!(!is_taken(&record(name, 1.into())), "{name}");
                }
                _ => {
                    let [least, most] =
                        ["minimum", "maximum"].map(|key| property[key].as_i64().unwrap());
                    for (age, expected) in [
                        (least - 1, false),
                        (least, true),
                        (most, true),
                        (most + 1, false),
                    ] {
                        assert_eq!(is_taken(&record(name, age.into())), expected, "{age}");
                    }
                }
            }
        }
        assert!(is_taken(&record("more", 1.into())));
    }

    #[test]
    fn the_json_schema_of_case_and_its_parser_take_the_same_numbers() {
        let schema: Value = serde_json::from_str(CASE).unwrap();
        let schema = jsonschema::validator_for(&schema).unwrap();
        for (age, expected) in [
            ("0", true),
            ("150", true),
            ("136.0", true),
            ("1e1", true),
            ("1.5E+2", true),
            ("0.0", true),
            ("-0.0", true),
            ("1.5", false),
            ("151.0", false),
            ("-1.0", false),
            ("151", false),
            ("-1", false),
            ("1e300", false),
        ] {
            let record = format!(
                "{{\"name\":\"a\",\"location\":\"b\",\"age\":{age},\"infectedtype\":\"\",\"state\":\"\"}}"
            );
            let value: Value = serde_json::from_str(&record).unwrap();
            assert_eq!(schema.is_valid(&value), expected, "{age}");
            let read = parse(&record.into(), &Schema::Case.into());
            assert_eq!(read.is_ok(), expected, "{age}");
        }
    }
}
