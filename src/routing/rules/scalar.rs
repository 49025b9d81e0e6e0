//! Single values of JSON and of headers, and their order.

use std::{borrow::Cow, cmp::Ordering, fmt};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Visitor};

/// A number, compared by its value: 1, 1.0 and 1e0 are equal. Whole numbers under 2^127 are exact.
#[derive(Clone, Copy, Debug)]
pub enum Number {
    /// A whole number.
    Whole(i128),
    /// Not whole, or too large to be.
    Float(f64),
}

impl Number {
    /// The value of a JSON number.
    pub fn parse(text: &str) -> Option<Self> {
        // Rust reads more than JSON allows: `-inf`, `nan`, `+1`.
        let digits = text.strip_prefix('-').unwrap_or(text);
        if !digits.starts_with(|c: char| c.is_ascii_digit()) {
            return None;
        }
        let whole = text.parse().map(Self::Whole);
        whole
            .ok()
            .or_else(|| text.parse::<f64>().ok().map(Self::from))
    }
}

impl From<f64> for Number {
    fn from(value: f64) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "2^127 is a float")]
        const TOO_LARGE: f64 = i128::MAX as f64;
        #[expect(
            clippy::cast_possible_truncation,
            reason = "it is whole, and not too large"
        )]
        if value.fract() == 0.0 && value.abs() < TOO_LARGE {
            Self::Whole(value as i128)
        } else {
            Self::Float(value)
        }
    }
}

impl From<i64> for Number {
    fn from(value: i64) -> Self {
        Self::Whole(value.into())
    }
}

impl Ord for Number {
    fn cmp(&self, other: &Self) -> Ordering {
        match (*self, *other) {
            (Self::Whole(one), Self::Whole(other)) => one.cmp(&other),
            (Self::Float(one), Self::Float(other)) => one.total_cmp(&other),
            (Self::Float(_), Self::Whole(_)) => other.cmp(self).reverse(),
            // A float is never whole, unless it is beyond every whole number: then the cast stops
            // at the largest.
            #[expect(clippy::cast_possible_truncation, reason = "see above")]
            (Self::Whole(one), Self::Float(other)) => {
                one.cmp(&(other.floor() as i128)).then(Ordering::Less)
            }
        }
    }
}

impl PartialOrd for Number {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Number {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Number {}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(number) => number.fmt(f),
            Self::Float(number) => number.fmt(f),
        }
    }
}

/// A value that a rule compares with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scalar<'r> {
    /// JSON's `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A number.
    Number(Number),
    /// A JSON string, without escapes.
    Text(Cow<'r, str>),
    /// A header's value. It is equal to a text, to a number and to a boolean that are written so.
    Header(Cow<'r, str>),
    /// An object, an array, or a text that is no Unicode (RFC 8259, 8.2): equal to nothing.
    Other,
}

impl<'r> Scalar<'r> {
    /// The value of a JSON text that is well formed.
    pub fn read(json: &'r str) -> Self {
        match json.as_bytes().first() {
            Some(b'"') if !json.contains('\\') => Self::Text(Cow::Borrowed(json.trim_matches('"'))),
            Some(b'"') => serde_json::from_str(json)
                .map_or(Self::Other, |text: String| Self::Text(Cow::Owned(text))),
            Some(b'n') => Self::Null,
            Some(b't') => Self::Bool(true),
            Some(b'f') => Self::Bool(false),
            _ => Number::parse(json).map_or(Self::Other, Self::Number),
        }
    }

    /// The characters of a text.
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) | Self::Header(text) => Some(text),
            _ => None,
        }
    }

    /// The value of a number.
    pub fn as_number(&self) -> Option<Number> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Header(text) => Number::parse(text.trim()),
            _ => None,
        }
    }

    /// Whether it is equal to a value of the configuration.
    pub fn equals(&self, configured: &Scalar<'_>) -> bool {
        match (self, configured) {
            (Self::Text(one) | Self::Header(one), Scalar::Text(other)) => one == other,
            (Self::Bool(one), Scalar::Bool(other)) => one == other,
            (Self::Header(one), Scalar::Bool(other)) => {
                one.parse().is_ok_and(|one: bool| one == *other)
            }
            (_, Scalar::Number(other)) => self.as_number().is_some_and(|one| one == *other),
            _ => false,
        }
    }
}

impl fmt::Display for Scalar<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Bool(value) => value.fmt(f),
            Self::Number(number) => number.fmt(f),
            Self::Text(text) | Self::Header(text) => fmt::Debug::fmt(text, f),
            Self::Other => f.write_str("an object or an array"),
        }
    }
}

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        match *self {
            #[expect(
                clippy::cast_precision_loss,
                reason = "TOML has no larger whole numbers"
            )]
            Self::Whole(number) => match i64::try_from(number) {
                Ok(number) => output.serialize_i64(number),
                Err(_) => output.serialize_f64(number as f64),
            },
            Self::Float(number) => output.serialize_f64(number),
        }
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        let value = Scalar::deserialize(input)?;
        value
            .as_number()
            .ok_or_else(|| serde::de::Error::custom(format!("{value} is no number")))
    }
}

impl Serialize for Scalar<'_> {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null | Self::Other => output.serialize_unit(),
            Self::Bool(value) => output.serialize_bool(*value),
            Self::Number(number) => number.serialize(output),
            Self::Text(text) | Self::Header(text) => output.serialize_str(text),
        }
    }
}

impl<'de> Deserialize<'de> for Scalar<'static> {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        input.deserialize_any(Configured)
    }
}

/// Reads a value of the configuration.
struct Configured;

impl Visitor<'_> for Configured {
    type Value = Scalar<'static>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, a number, true or false")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        Ok(Scalar::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Scalar::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        Ok(Scalar::Number(Number::Whole(value.into())))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
        Ok(Scalar::Number(value.into()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
        Ok(Scalar::Text(value.to_owned().into()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_are_equal_by_value() {
        let number = |text| Number::parse(text).unwrap();
        for (one, other) in [("1", "1.0"), ("10", "1e1"), ("-0", "0"), ("-0.0", "0")] {
            assert_eq!(number(one), number(other));
        }
        let ascending = [
            "-1e400",
            "-1e39",
            "-9007199254740993",
            "-9007199254740992",
            "-1.5",
            "-1",
            "-0.5",
            "0",
            "5e-324",
            "0.5",
            "1",
            "1.5",
            "2",
            "9007199254740992",
            "9007199254740993",
            "170141183460469231731687303715884105727",
            "1e39",
            "1e400",
        ];
        assert!(ascending.map(number).is_sorted_by(|one, other| one < other));
        for wrong in [
            "", "inf", "-inf", "-nan", "-", "NaN", "+1", ".5", "0x1", "1 ",
        ] {
            assert!(Number::parse(wrong).is_none(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn the_order_of_numbers_is_total(
            texts in prop::collection::vec("-?[0-9]{1,40}(\\.[0-9]{1,3})?", 3)
        ) {
            let [a, b, c] = [0, 1, 2].map(|at| Number::parse(&texts[at]).unwrap());
            prop_assert_eq!(a.cmp(&b), b.cmp(&a).reverse());
            if a <= b && b <= c {
                prop_assert!(a <= c);
            }
        }
    }

    #[test]
    fn a_json_text_is_equal_to_a_value_of_its_type_only() {
        let text = |text: &'static str| Scalar::Text(text.into());
        let is = |json, configured: Scalar<'_>| Scalar::read(json).equals(&configured);
        assert!(is(r#""a\u0062\"""#, text("ab\"")));
        assert!(is("1.0", Scalar::Number(1.into())) && is("true", Scalar::Bool(true)));
        assert!(!is(r#""1""#, Scalar::Number(1.into())) && !is("1", text("1")));
        assert!(!is(r#""true""#, Scalar::Bool(true)) && !is("null", text("null")));
        assert!(!is("{}", text("{}")) && !is(r#""\ud800""#, text("\u{fffd}")));
        assert!(is(r#""""#, text("")));
        let header = |text: &'static str| Scalar::Header(text.into());
        assert!(header("1").equals(&Scalar::Number(1.into())) && header("1").equals(&text("1")));
        assert!(header("true").equals(&Scalar::Bool(true)));
    }
}
