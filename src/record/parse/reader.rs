//! Reads the members of one record as the parser comes to them.

use std::fmt;

use serde::{
    Deserialize,
    de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Unexpected, Visitor},
};
use serde_json::value::RawValue;

use super::Invalid;
use crate::record::{
    limits::{self, HALF_A_PAIR},
    number::whole_number,
    pointer::{PointerNode, PointerSet, Values},
    schema::Schema,
};

/// Reads one record. Keeps the current field, for errors, and the values of `path` members and of
/// `pointers`.
pub(super) struct Reader<'p, 't> {
    /// The fields that the schema wants.
    fields: &'static [(&'static str, FieldCheck)],
    pointers: &'p PointerSet,
    field: Option<&'static str>,
    pub(super) paths: Vec<&'t str>,
    pub(super) values: Values<'t>,
}

impl<'p> Reader<'p, '_> {
    pub(super) fn new(schema: &Schema, pointers: &'p PointerSet) -> Self {
        Self {
            fields: match schema {
                Schema::Case => &FIELDS[..],
                Schema::Any | Schema::File(_) => &[],
            },
            pointers,
            field: None,
            paths: Vec::new(),
            values: Values::default(),
        }
    }

    pub(super) fn invalid(&self, why: &serde_json::Error) -> Invalid {
        // Line and column have fields of their own.
        let text = why.to_string();
        let detail = text
            .rsplit_once(" at line ")
            .map_or(&*text, |(text, _)| text);
        // The parser finds it in names, and `limits` in values.
        let is_half = HALF_PAIR.contains(&detail);
        let detail = if is_half { HALF_A_PAIR } else { detail }.to_owned();
        // `1e400` is JSON (RFC 8259, 6) and no value of a field.
        if why.is_data() || self.field.is_some() && detail == OUT_OF_RANGE {
            Invalid::Schema {
                field: self.field.map(|field| format!("/{field}")),
                detail,
            }
        } else {
            Invalid::Malformed {
                line: why.line(),
                column: why.column(),
                detail,
            }
        }
    }
}

/// The texts of the parser's errors for half of a surrogate pair.
const HALF_PAIR: [&str; 2] = [
    "lone leading surrogate in hex escape",
    "unexpected end of hex escape",
];
/// The text of the parser's error for a number that no float can hold.
const OUT_OF_RANGE: &str = "number out of range";
/// The highest age.
const AGE_MAX: i64 = 150;

/// The fields of schema `case`, in the order of [`MemberKey`].
const FIELDS: [(&str, FieldCheck); 5] = [
    ("name", FieldCheck::NonEmptyText),
    ("location", FieldCheck::NonEmptyText),
    ("age", FieldCheck::Age),
    ("infectedtype", FieldCheck::Text),
    ("state", FieldCheck::Text),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum MemberKey {
    Name,
    Location,
    Age,
    InfectedType,
    State,
    Path,
    Other,
}

/// Reads the name of a member, and what the pointers want of it.
struct MemberName<'p>(&'p PointerSet);

impl<'de, 'p> DeserializeSeed<'de> for MemberName<'p> {
    type Value = (MemberKey, Option<&'p PointerNode>);

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_identifier(self)
    }
}

impl<'p> Visitor<'_> for MemberName<'p> {
    type Value = (MemberKey, Option<&'p PointerNode>);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a member's name")
    }

    fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
        let key = match name {
            "name" => MemberKey::Name,
            "location" => MemberKey::Location,
            "age" => MemberKey::Age,
            "infectedtype" => MemberKey::InfectedType,
            "state" => MemberKey::State,
            "path" => MemberKey::Path,
            _ => MemberKey::Other,
        };
        Ok((key, self.0.member(name)))
    }
}

impl<'de> Visitor<'de> for &mut Reader<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let fields = self.fields;
        let mut seen = [false; FIELDS.len()];
        while let Some((key, wanted)) = map.next_key_seed(MemberName(self.pointers))? {
            if let Some((name, check)) = fields.get(key as usize) {
                self.field = Some(name);
                if std::mem::replace(&mut seen[key as usize], true) {
                    return Err(A::Error::custom("given twice"));
                }
                if let Some(node) = wanted {
                    let text = map.next_value::<&'de RawValue>()?.get();
                    let mut json = serde_json::Deserializer::from_str(text);
                    let checked = check.deserialize(&mut json);
                    let checked = checked.and_then(|()| node.capture(text, &mut self.values));
                    checked.map_err(A::Error::custom)?;
                } else {
                    map.next_value_seed(*check)?;
                }
                self.field = None;
            } else if key == MemberKey::Path {
                self.paths.push(map.next_value::<&'de RawValue>()?.get());
            } else if let Some(node) = wanted {
                let text = map.next_value::<&'de RawValue>()?.get();
                let captured = node.capture(text, &mut self.values);
                captured.map_err(A::Error::custom)?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        if let Some(((name, _), _)) = fields.iter().zip(seen).find(|(_, seen)| !seen) {
            self.field = Some(name);
            return Err(A::Error::custom("missing"));
        }
        Ok(())
    }
}

/// Checks the value of a field without copying it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum FieldCheck {
    Text,
    NonEmptyText,
    /// An integer from 0 to 150.
    Age,
}

impl<'de> DeserializeSeed<'de> for FieldCheck {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        if self != Self::Age {
            return json.deserialize_any(self);
        }
        // The digits as they came: read as a number, `0` and `1e-400` would be the same float.
        let value = <&RawValue>::deserialize(json)?.get();
        if whole_number(value).is_some_and(|age| (0..=AGE_MAX).contains(&age)) {
            return Ok(());
        }
        let found = limits::shown(value);
        let found = match value.as_bytes()[0] {
            b'{' => Unexpected::Map,
            b'[' => Unexpected::Seq,
            b'"' => Unexpected::Other("a string"),
            _ => Unexpected::Other(&found),
        };
        Err(D::Error::invalid_value(found, &self))
    }
}

impl Visitor<'_> for FieldCheck {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "a string",
            Self::NonEmptyText => "a non-empty string",
            Self::Age => "an integer from 0 to 150",
        })
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        match self {
            Self::Text => Ok(()),
            Self::NonEmptyText if !text.is_empty() => Ok(()),
            Self::NonEmptyText => Err(E::invalid_value(Unexpected::Str(text), &self)),
            Self::Age => Err(E::invalid_type(Unexpected::Str(text), &self)),
        }
    }
}
