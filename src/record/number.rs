//! Numbers of JSON.

/// The whole number that the JSON value `text` is. It does not count how it is written: `136`, `136.0`
/// and `1.36e2` are one number, as in JSON Schema. `None` for any other value, and for one that is not
/// of 64 bits.
pub fn whole_number(text: &str) -> Option<i64> {
    if let Ok(number) = text.parse() {
        return Some(number);
    }
    let (sign, number) = text.strip_prefix('-').map_or((1, text), |rest| (-1, rest));
    let (number, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = [whole, fraction].concat();
    if digits.is_empty() || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let significant = digits.trim_end_matches('0');
    if significant.is_empty() {
        return Some(0);
    }
    let zeros = i64::try_from(digits.len() - significant.len()).ok()?;
    let places = i64::try_from(fraction.len()).ok()?;
    // It has as many zeros at its end; with fewer than none, it is not whole.
    let zeros = exponent.parse::<i64>().ok()?.checked_add(zeros - places)?;
    let factor = 10_i64.checked_pow(u32::try_from(zeros).ok()?)?;
    let number: i64 = significant.parse().ok()?;
    number.checked_mul(factor)?.checked_mul(sign)
}

#[cfg(test)]
mod tests {
    use super::whole_number;

    #[test]
    fn a_whole_number_is_the_same_however_it_is_written() {
        for (text, expected) in [
            ("136", Some(136)),
            ("136.0", Some(136)),
            ("136.000", Some(136)),
            ("1.36e2", Some(136)),
            ("1.36E+2", Some(136)),
            ("13600e-2", Some(136)),
            ("0.00136e5", Some(136)),
            ("-7.0", Some(-7)),
            ("0", Some(0)),
            ("-0", Some(0)),
            ("-0.0", Some(0)),
            ("0e99999999999999999999", Some(0)),
            ("100", Some(100)),
            ("1e18", Some(1_000_000_000_000_000_000)),
            ("136.5", None),
            ("42.00000000000000000000000001", None),
            ("1.36e1", None),
            ("-1e-400", None),
            ("1e-1", None),
            ("1e19", None),
            ("1e400", None),
            ("1e99999999999999999999", None),
            ("99999999999999999999", None),
            ("null", None),
            ("true", None),
            ("{}", None),
            ("[1]", None),
            ("\"1\"", None),
            ("", None),
        ] {
            assert_eq!(whole_number(text), expected, "{text}");
        }
    }
}
