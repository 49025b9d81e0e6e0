//! Numbers, times and texts for people. A column has one unit.

use std::borrow::Cow;

/// With a comma after each thousand.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// In at most nine characters.
#[expect(clippy::cast_precision_loss, reason = "four digits are shown")]
pub fn short_count(number: u64) -> String {
    match number {
        0..10_000_000 => count(number),
        10_000_000..10_000_000_000 => format!("{:.1} M", number as f64 / 1e6),
        _ => format!("{:.1} G", number as f64 / 1e9),
    }
}

/// Such as `0.4 s`, `12 s`, `3 min`, `5 h` and `9 d`.
pub fn age(seconds: f64) -> String {
    match seconds.max(0.0) {
        s if s < 9.95 => format!("{s:.1} s"),
        s if s < 99.5 => format!("{s:.0} s"),
        s if s < 5_400.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.0} h", s / 3_600.0),
        s => format!("{:.0} d", s / 86_400.0),
    }
}

/// Milliseconds, without the unit.
pub fn ms(value: f64) -> String {
    match value {
        v if v < 9.995 => format!("{v:.2}"),
        v if v < 99.95 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

/// How fast a counter grows, such as `7.5/s` and `1,234/s`.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a pace is no larger than its counter"
)]
pub fn rate(by_second: f64) -> String {
    if by_second > 0.0 && by_second < 9.95 {
        format!("{by_second:.1}/s")
    } else {
        format!("{}/s", count(by_second.round() as u64))
    }
}

/// A part of 1 in percent, without the unit.
pub fn percent(part: f64) -> String {
    format!("{:.0}", 100.0 * part)
}

/// The text in one line, without what a terminal would obey.
pub fn one_line(text: &str) -> String {
    let spaced = text.split_whitespace().collect::<Vec<_>>().join(" ");
    spaced.chars().filter(|c| !c.is_control()).collect()
}

/// Lines of at most `width`: the first begins with `first`, the others with `others`.
pub fn wrapped(first: &str, others: &str, text: &str, width: usize) -> Vec<String> {
    let options = textwrap::Options::new(width)
        .initial_indent(first)
        .subsequent_indent(others);
    let lines = textwrap::wrap(text, options).into_iter();
    lines.map(Cow::into_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_to_their_columns() {
        for (number, long, short) in [
            (0, "0", "0"),
            (999, "999", "999"),
            (1_000, "1,000", "1,000"),
            (9_999_999, "9,999,999", "9,999,999"),
            (12_345_678, "12,345,678", "12.3 M"),
            (u64::MAX, "18,446,744,073,709,551,615", "18446744073.7 G"),
        ] {
            assert_eq!((&*count(number), &*short_count(number)), (long, short));
        }
        for (seconds, text) in [
            (-1.0, "0.0 s"),
            (0.44, "0.4 s"),
            (12.4, "12 s"),
            (100.0, "2 min"),
            (7_300.0, "2 h"),
            (200_000.0, "2 d"),
        ] {
            assert_eq!(age(seconds), text);
        }
        for (pace, text) in [
            (0.0, "0/s"),
            (0.04, "0.0/s"),
            (9.94, "9.9/s"),
            (9.96, "10/s"),
            (1_234.4, "1,234/s"),
        ] {
            assert_eq!(rate(pace), text);
        }
        for (value, text) in [(0.444, "0.44"), (12.34, "12.3"), (1234.5, "1234")] {
            assert_eq!(ms(value), text);
        }
    }

    #[test]
    fn a_text_of_others_gives_the_terminal_no_orders() {
        assert_eq!(one_line("a\x1b[2J\r\n  b\u{7}\u{9b}c"), "a[2J bc");
        let lines = wrapped("! nats: ", "  ", "one two three four", 16);
        assert_eq!(lines, ["! nats: one two", "  three four"]);
    }
}
