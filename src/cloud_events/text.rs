//! The attributes as one text of visible ASCII, in which they pass brokers and disks.
//!
//! `id=7&note=a%20%26%20b&source=/cases&specversion=1.0&type=org.example.case&urgent:=true`: values
//! are coded as in HTTP headers, and `&` as well; `:=` is before a boolean or an integer.

use percent_encoding::{AsciiSet, utf8_percent_encode};

use super::{ATTRIBUTES_MAX, AttributeValue, EventAttributes, header_value};
use crate::record::is_visible_ascii;

const CODED: &AsciiSet = &header_value::CODED.add(b'&');

impl EventAttributes {
    /// The text; [`EventAttributes::from_text`] reads it.
    pub fn to_text(&self) -> String {
        let parts = self.values.iter().map(|(name, value)| part(name, value));
        parts.collect::<Vec<_>>().join("&")
    }

    /// The attributes of an event; `None` if `text` has none. Another publisher may have written
    /// it.
    pub fn from_text(text: &str) -> Option<Self> {
        let mut event = Self::default();
        for part in text.split('&') {
            let (name, value) = part.split_once('=')?;
            let text = header_value::decode(value.as_bytes()).ok()?;
            let (name, value) = match name.strip_suffix(':') {
                Some(name) => (name, AttributeValue::literal(&text)?),
                None => (name, AttributeValue::Text(text)),
            };
            event.insert(name, value).ok()?;
        }
        event.complete().ok()
    }
}

/// Whether `text` can be one, so that each lane takes it.
pub fn may_be_event(text: &str) -> bool {
    is_visible_ascii(text) && text.len() <= ATTRIBUTES_MAX
}

/// One attribute of the text.
pub(super) fn part(name: &str, value: &AttributeValue) -> String {
    let sign = match value {
        AttributeValue::Text(_) => "=",
        AttributeValue::Literal(_) => ":=",
    };
    format!("{name}{sign}{}", utf8_percent_encode(value.text(), CODED))
}

#[cfg(test)]
mod tests {
    use proptest::{collection::btree_map, prelude::*};

    use super::*;

    fn event(others: impl IntoIterator<Item = (String, AttributeValue)>) -> EventAttributes {
        let mut event = EventAttributes::default();
        for (name, value) in [
            ("specversion", "1.0"),
            ("type", "t"),
            ("source", "/a?b=c&d=e"),
            ("id", "7"),
        ] {
            event.insert(name, AttributeValue::text_of(value)).unwrap();
        }
        for (name, value) in others {
            event.insert(&name, value).unwrap();
        }
        event
    }

    #[test]
    fn the_text_is_as_the_documentation_says() {
        let note = ("note".to_owned(), AttributeValue::text_of("a & b"));
        let urgent = (
            "urgent".to_owned(),
            AttributeValue::literal("true").unwrap(),
        );
        let text = event([note, urgent]).to_text();
        let expected =
            "id=7&note=a%20%26%20b&source=/a?b=c%26d=e&specversion=1.0&type=t&urgent:=true";
        assert_eq!(text, expected);
    }

    #[test]
    fn what_is_no_text_of_an_event_is_none() {
        let good = event([]).to_text();
        assert!(EventAttributes::from_text(&good).is_some());
        for bad in [
            "",
            "&",
            "=",
            "id=7",
            &good.replace("id=7&", ""),
            &format!("{good}&"),
            &format!("{good}&id=7"),
            &format!("{good}&a=%zz"),
            &format!("{good}&A=1"),
            &format!("{good}&a:=x"),
            &format!("{good}&a=é"),
        ] {
            assert_eq!(EventAttributes::from_text(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn the_attributes_come_out_as_they_went_in(
            texts in btree_map("x[a-z0-9]{1,20}", "[^\\p{Cc}\\p{Cn}]*", 0..4),
            integers in btree_map("y[a-z0-9]{1,20}", any::<i32>(), 0..4),
        ) {
            let texts = texts.into_iter().map(|(name, text)| (name, AttributeValue::Text(text)));
            let integers = integers.into_iter().map(|(name, number)| {
                (name, AttributeValue::literal(&number.to_string()).unwrap())
            });
            let event = event(texts.chain(integers));
            let text = event.to_text();
            prop_assert!(text.bytes().all(|byte| byte.is_ascii_graphic()), "{}", text);
            prop_assert!(text.len() <= event.bytes);
            prop_assert_eq!(EventAttributes::from_text(&text), Some(event));
        }
    }
}
