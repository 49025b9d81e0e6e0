//! The schema of accepted records.

use serde::{Deserialize, Serialize};

/// The schema of `case`, as its parser checks it.
const CASE: &str = include_str!("case.schema.json");
const ANY: &str = r#"{"$schema":"https://json-schema.org/draft/2020-12/schema","type":"object"}"#;

/// The schema that every accepted record has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schema {
    /// `name`, `location` (non-empty strings), `age` (integer 0 to 150), `infectedtype`, `state`
    /// (strings), and any other member.
    Case,
    /// Any JSON object.
    Any,
}

impl Schema {
    /// The same as a JSON Schema.
    pub const fn to_json(self) -> &'static str {
        match self {
            Self::Case => CASE,
            Self::Any => ANY,
        }
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
}
