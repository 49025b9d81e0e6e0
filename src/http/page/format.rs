//! The values of a status as text. `page/js/format.js` has the same rules.

use serde_json::Value;

use crate::summary::format::age;

/// What a value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Text,
    Count,
    /// A time in seconds.
    Time,
    Milliseconds,
    /// A part of one.
    Percent,
    Bytes,
    /// A number without a unit.
    Score,
    /// So many a second.
    Rate,
}

/// The text of a value that is not there.
pub const NONE: &str = "–";

impl Format {
    /// The name that the script knows.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Count => "count",
            Self::Time => "time",
            Self::Milliseconds => "ms",
            Self::Percent => "percent",
            Self::Bytes => "bytes",
            Self::Score => "score",
            Self::Rate => "rate",
        }
    }

    pub fn text(self, value: &Value) -> String {
        match (self, value) {
            (Self::Text, Value::String(text)) if !text.is_empty() => text.clone(),
            (Self::Text, Value::Bool(is)) => (if *is { "yes" } else { "no" }).into(),
            (_, value) => value
                .as_f64()
                .map_or_else(|| NONE.into(), |number| self.number(number)),
        }
    }

    fn number(self, number: f64) -> String {
        match self {
            Self::Text | Self::Count => grouped(number),
            Self::Time => age(number),
            // No time was measured.
            Self::Milliseconds if number == 0.0 => NONE.into(),
            Self::Milliseconds => format!("{} ms", short(number)),
            Self::Percent => format!("{:.0} %", number * 100.0),
            Self::Bytes => bytes(number),
            Self::Score => short(number),
            Self::Rate => rate(number),
        }
    }
}

/// The sum of the values at `pointers`, which spaces part; null if none is there.
pub fn value_at(status: &Value, pointers: &str) -> Value {
    let mut values = pointers
        .split(' ')
        .filter_map(|pointer| status.pointer(pointer));
    let Some(first) = values.next() else {
        return Value::Null;
    };
    values.fold(first.clone(), |sum, value| {
        let add = |sum: f64| sum + value.as_f64().unwrap_or_default();
        sum.as_f64().map(add).into()
    })
}

/// A whole number, by groups of three digits.
fn grouped(number: f64) -> String {
    let plain = format!("{number:.0}");
    let mut text = String::new();
    for (at, digit) in plain.char_indices() {
        if at > 0 && (plain.len() - at).is_multiple_of(3) && !text.ends_with('-') {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn short(number: f64) -> String {
    if number < 9.995 {
        format!("{number:.2}")
    } else if number < 99.95 {
        format!("{number:.1}")
    } else {
        grouped(number)
    }
}

fn rate(rate: f64) -> String {
    if rate > 0.0 && rate < 9.95 {
        format!("{rate:.1}/s")
    } else {
        format!("{}/s", grouped(rate))
    }
}

fn bytes(bytes: f64) -> String {
    let mut size = bytes;
    let mut units = ["B", "KiB", "MiB", "GiB"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    for larger in units {
        if size < 1024.0 {
            break;
        }
        size /= 1024.0;
        unit = larger;
    }
    if unit == "B" {
        format!("{size:.0} B")
    } else {
        format!("{size:.1} {unit}")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_value_has_one_text() {
        for (format, value, text) in [
            (Format::Text, json!("up"), "up"),
            (Format::Text, json!(""), NONE),
            (Format::Text, json!(true), "yes"),
            (Format::Text, json!(null), NONE),
            (Format::Count, json!(0), "0"),
            (Format::Count, json!(999), "999"),
            (Format::Count, json!(1_234_567), "1,234,567"),
            (Format::Count, json!(-1234), "-1,234"),
            (Format::Count, json!(-123), "-123"),
            (Format::Time, json!(0.36), "0.4 s"),
            (Format::Time, json!(65.2), "65 s"),
            (Format::Time, json!(9.97), "10 s"),
            (Format::Time, json!(110), "2 min"),
            (Format::Time, json!(600), "10 min"),
            (Format::Time, json!(90_000), "25 h"),
            (Format::Time, json!(200_000), "2 d"),
            (Format::Time, json!(null), NONE),
            (Format::Milliseconds, json!(0.0), NONE),
            (Format::Milliseconds, json!(0.423), "0.42 ms"),
            (Format::Milliseconds, json!(42.34), "42.3 ms"),
            (Format::Milliseconds, json!(12_345.6), "12,346 ms"),
            (Format::Percent, json!(0.254), "25 %"),
            (Format::Bytes, json!(1023), "1023 B"),
            (Format::Bytes, json!(1536), "1.5 KiB"),
            (Format::Bytes, json!(5u64 << 30), "5.0 GiB"),
            (Format::Score, json!(1.234), "1.23"),
            (Format::Rate, json!(0), "0/s"),
            (Format::Rate, json!(1.25), "1.2/s"),
            (Format::Rate, json!(1234.5), "1,234/s"),
        ] {
            assert_eq!(format.text(&value), text, "{format:?} {value}");
        }
    }

    #[test]
    fn values_add_up() {
        let status = json!({"a": 1, "b": {"c": [2, 3]}, "text": "up"});
        assert_eq!(value_at(&status, "/a"), json!(1));
        assert_eq!(value_at(&status, "/a /b/c/0 /b/c/1"), json!(6.0));
        assert_eq!(value_at(&status, "/text"), json!("up"));
        assert_eq!(value_at(&status, "/nothing"), json!(null));
    }
}
