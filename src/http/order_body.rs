//! The JSON of an order.

use std::{fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, Unexpected, Visitor, value::MapAccessDeserializer},
};

/// The body of an order: an object. By itself, serde reads an array of the members too.
pub struct OrderBody<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OrderBody<T> {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        struct Object<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Object<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<M: MapAccess<'de>>(self, members: M) -> Result<T, M::Error> {
                T::deserialize(MapAccessDeserializer::new(members))
            }
        }

        input.deserialize_map(Object(PhantomData)).map(Self)
    }
}

/// Reads a whole number, however it is written: `3`, `3.0` and `3e0` are one number, as in JSON Schema.
pub fn whole_number<'de, T, D>(input: D) -> Result<T, D::Error>
where
    T: TryFrom<u64>,
    D: Deserializer<'de>,
{
    struct WholeNumber;

    impl Visitor<'_> for WholeNumber {
        type Value = u64;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a whole number from 0 on")
        }

        fn visit_u64<E: Error>(self, number: u64) -> Result<u64, E> {
            Ok(number)
        }

        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "it is whole and in the range"
        )]
        fn visit_f64<E: Error>(self, number: f64) -> Result<u64, E> {
            // Below 2^64, which a float holds exactly.
            if number.fract() == 0.0 && (0.0..18_446_744_073_709_551_616.0).contains(&number) {
                Ok(number as u64)
            } else {
                Err(E::invalid_value(Unexpected::Float(number), &self))
            }
        }
    }

    let number = input.deserialize_u64(WholeNumber)?;
    T::try_from(number).map_err(|_| D::Error::custom(format!("{number} is too large")))
}

/// The same, or null.
pub fn whole_number_or_null<'de, T, D>(input: D) -> Result<Option<T>, D::Error>
where
    T: TryFrom<u64>,
    D: Deserializer<'de>,
{
    #[derive(Deserialize)]
    #[serde(bound = "T: TryFrom<u64>")]
    struct Whole<T>(#[serde(deserialize_with = "whole_number")] T);

    let number = Option::<Whole<T>>::deserialize(input)?;
    Ok(number.map(|Whole(number)| number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_number_may_be_written_as_a_float() {
        for (text, expected) in [
            ("3", Some(3)),
            ("3.0", Some(3)),
            ("3e0", Some(3)),
            ("-0", Some(0)),
            ("-0.0", Some(0)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709549568.0", Some(18_446_744_073_709_549_568)),
            ("18446744073709551616", None),
            ("18446744073709551616.0", None),
            ("3.5", None),
            ("-1", None),
            ("-1.0", None),
            ("1e400", None),
            ("\"3\"", None),
            ("null", None),
            ("[3]", None),
        ] {
            let read = whole_number::<u64, _>(&mut serde_json::Deserializer::from_str(text));
            assert_eq!(read.ok(), expected, "{text}");
        }
    }

    #[test]
    fn a_whole_number_has_its_largest_and_may_be_null() {
        let read = |text| {
            whole_number_or_null::<u32, _>(&mut serde_json::Deserializer::from_str(text)).ok()
        };
        assert_eq!(read("4294967295.0"), Some(Some(u32::MAX)));
        assert_eq!(read("4294967296"), None);
        assert_eq!(read("null"), Some(None));
        assert_eq!(read("true"), None);
    }
}
