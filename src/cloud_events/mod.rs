//! CloudEvents 1.0.2: the attributes of an event, whose data is a record.
//!
//! | file | what | specification |
//! | --- | --- | --- |
//! | this | which attributes an event has, and its key | core, "Context Attributes" |
//! | `attribute` | names and values | core, "Naming Conventions" and "Type System" |
//! | `header_value` | values in HTTP headers | HTTP binding, 3.1.3.2 |
//! | `json` | an event, or many, as JSON | JSON format, 2 to 4 |
//! | `outgoing` | the event that the API gets | both |
//! | `text` | attributes on their way through brokers and disks | ours |
//!
//! The published libraries do not code header values as 1.0.2 says, so these rules are our own.

mod attribute;
pub mod header_value;
mod json;
mod outgoing;
mod text;

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use ring::digest::{SHA256, digest};

pub use self::{
    attribute::{AttributeValue, is_json},
    json::{InvalidJsonEvent, JsonEvent, parse_batch, parse_event},
    outgoing::{EventMode, event_of},
    text::may_be_event,
};

/// The most bytes of an event's attributes as one text. It is a header in every lane: RabbitMQ gets
/// all headers of a message in one frame of 8 KiB, and many HTTP servers take no more either.
pub const ATTRIBUTES_MAX: usize = 6 << 10;
/// The attributes that a node adds before it POSTs an event, perhaps to another node.
const ADDED: [&str; 2] = [outgoing::PATH, outgoing::DATA_TYPE];
/// Bytes of [`ATTRIBUTES_MAX`] that are kept free for each of [`ADDED`].
const ADDED_MAX: usize = 64;
/// The most attributes of an event: many HTTP servers take no more than 100 headers.
pub const COUNT_MAX: usize = 64;
/// The most characters of a name in an error.
const NAME_SHOWN_MAX: usize = 64;
/// The most characters of a key.
const KEY_MAX: usize = 255;
/// Attributes that each event has (core, "REQUIRED Attributes").
pub const REQUIRED: [&str; 4] = ["specversion", "id", "source", "type"];

/// The attributes of an event, each as the specification wants it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventAttributes {
    values: BTreeMap<String, AttributeValue>,
    /// As one text.
    bytes: usize,
}

/// Why these are not the attributes of an event.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("attribute `{name}`: {detail}")]
pub struct InvalidAttribute {
    /// The attribute that is wrong or missing; of a long name, the begin.
    pub name: String,
    /// The mistake, and the allowed values.
    pub detail: String,
}

impl InvalidAttribute {
    fn new(name: &str, detail: impl Into<String>) -> Self {
        let mut shown: String = name.chars().take(NAME_SHOWN_MAX).collect();
        if shown.len() < name.len() {
            shown.push('…');
        }
        Self {
            name: shown,
            detail: detail.into(),
        }
    }
}

impl EventAttributes {
    /// Adds an attribute.
    ///
    /// # Errors
    /// If the name or the value is not allowed, or the name is there already (core, "Context
    /// Attributes").
    pub fn insert(&mut self, name: &str, value: AttributeValue) -> Result<(), InvalidAttribute> {
        let checked = attribute::check(name, &value);
        checked.map_err(|detail| InvalidAttribute::new(name, detail))?;
        self.bytes += text::part(name, &value).len() + 1;
        if self.bytes > ATTRIBUTES_MAX {
            let detail = format!(
                "with it, the attributes have more than {ATTRIBUTES_MAX} bytes; that many are allowed"
            );
            return Err(InvalidAttribute::new(name, detail));
        }
        match self.values.insert(name.to_owned(), value) {
            None if self.count() > COUNT_MAX => {
                let detail = format!(
                    "with it, the event has more than {COUNT_MAX} attributes; that many are allowed"
                );
                Err(InvalidAttribute::new(name, detail))
            }
            None => Ok(()),
            Some(_) => Err(InvalidAttribute::new(
                name,
                "is there twice; allowed is each attribute once",
            )),
        }
    }

    /// The attributes that count for [`COUNT_MAX`].
    fn count(&self) -> usize {
        let added = ADDED.iter().filter(|name| self.values.contains_key(**name));
        self.values.len() - added.count()
    }

    /// Returns the attributes of an event that comes in, if all that are required are there, and there
    /// is room for those that a node adds.
    ///
    /// # Errors
    /// Names the first one that is missing, or the longest.
    pub fn complete_with_room(self) -> Result<Self, InvalidAttribute> {
        let max = ATTRIBUTES_MAX - ADDED.len() * ADDED_MAX;
        let complete = self.complete()?;
        if complete.bytes <= max {
            return Ok(complete);
        }
        let sizes = complete.values.iter().map(|(name, value)| {
            let size = text::part(name, value).len() + 1;
            let own = if ADDED.contains(&&**name) {
                ADDED_MAX
            } else {
                0
            };
            (size.saturating_sub(own), name)
        });
        let bytes: usize = sizes.clone().map(|(size, _)| size).sum();
        match sizes.max() {
            Some((_, longest)) if bytes > max => {
                let detail = format!(
                    "is the longest of attributes that have more than {max} bytes, {ADDED_MAX} of {} and \
                     {} each apart; that many are allowed",
                    outgoing::PATH,
                    outgoing::DATA_TYPE
                );
                Err(InvalidAttribute::new(longest, detail))
            }
            _ => Ok(complete),
        }
    }

    /// Returns the attributes if all that are required are there.
    ///
    /// # Errors
    /// Names the first one that is missing.
    pub fn complete(self) -> Result<Self, InvalidAttribute> {
        let missing = REQUIRED
            .iter()
            .find(|name| !self.values.contains_key(**name));
        match missing {
            None => Ok(self),
            Some(name) => Err(InvalidAttribute::new(
                name,
                "is missing; an event has specversion, id, source and type",
            )),
        }
    }

    /// The canonical text of an attribute.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(AttributeValue::text)
    }

    /// The idempotency key of the event: 1 to 255 visible ASCII characters. Two events have the
    /// same one if and only if `source` and `id` are the same (core, "id").
    ///
    /// It is `source|id`, each coded as in a header. `|` is no character of a URI-reference, so the
    /// first one ends the source. A longer key is `sha256:` and the digest of that text in
    /// hexadecimal: it has no `|`, so it is no short key.
    pub fn key(&self) -> Arc<str> {
        let coded = |name| header_value::encode(self.get(name).unwrap_or_default());
        let key = format!("{}|{}", coded("source"), coded("id"));
        if key.len() <= KEY_MAX {
            return key.into();
        }
        let digest = digest(&SHA256, key.as_bytes());
        let digest = Bytes::copy_from_slice(digest.as_ref());
        format!("sha256:{digest:x}").into()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::record::is_visible_ascii;

    fn event(source: &str, id: &str) -> EventAttributes {
        let mut event = EventAttributes::default();
        for (name, value) in [
            ("specversion", "1.0"),
            ("type", "t"),
            ("source", source),
            ("id", id),
        ] {
            event.insert(name, AttributeValue::text_of(value)).unwrap();
        }
        event.complete().unwrap()
    }

    #[test]
    fn a_key_is_source_and_id_as_in_headers() {
        for (source, id, key) in [
            ("/cases", "1", "/cases|1"),
            ("/a%20b", "é \"|%", "/a%2520b|%C3%A9%20%22|%25"),
            ("urn:a", "b|c", "urn:a|b|c"),
        ] {
            assert_eq!(&*event(source, id).key(), key);
        }
        // `printf '/cases|%0250d' 0 | sha256sum`
        let long = event("/cases", &"0".repeat(250)).key();
        let digest = "8aed34fc4200d6cbaac108a44abd3e780c0e6c50001d4efabe561a936e81fcc8";
        assert_eq!(*long, format!("sha256:{digest}"));
        assert_eq!(event("/cases", &"0".repeat(248)).key().len(), KEY_MAX);
    }

    #[test]
    fn each_required_attribute_is_missed() {
        for missing in REQUIRED {
            let mut event = event("/a", "1");
            event.values.remove(missing);
            assert_eq!(event.complete().unwrap_err().name, missing);
        }
    }

    #[test]
    fn an_attribute_is_there_once_and_all_have_a_bound() {
        let mut event = event("/a", "1");
        let twice = event.insert("id", AttributeValue::text_of("1"));
        assert_eq!(twice.unwrap_err().name, "id");
        let room = ATTRIBUTES_MAX - event.bytes - "note=&".len();
        let mut full = event.clone();
        let note = |length| AttributeValue::text_of(&"x".repeat(length));
        full.insert("note", note(room)).unwrap();
        assert!(event.insert("note", note(room + 1)).is_err());
    }

    #[test]
    fn an_event_that_is_taken_in_is_taken_in_by_the_next_node_too() {
        let taken = |length: usize, media_type: Option<&str>| {
            let mut event = event("/a", "1");
            let note = AttributeValue::text_of(&"x".repeat(length));
            event.insert("note", note)?;
            if let Some(media_type) = media_type {
                let value = AttributeValue::text_of(media_type);
                event.insert(outgoing::DATA_TYPE, value)?;
            }
            event.complete_with_room()
        };
        let long = format!("application/{}+json", "x".repeat(200));
        for media_type in [None, Some("application/json"), Some(&long)] {
            let most = (0..ATTRIBUTES_MAX).rfind(|length| taken(*length, media_type).is_ok());
            let event = taken(most.unwrap(), media_type).unwrap();
            let mut sent = event.clone();
            let path = AttributeValue::text_of("RabbitMQ");
            sent.values.insert(outgoing::PATH.into(), path);
            if media_type.is_none() {
                let json = AttributeValue::text_of("application/json");
                sent.values.insert(outgoing::DATA_TYPE.into(), json);
            }
            let mut next = EventAttributes::default();
            for (name, value) in &sent.values {
                next.insert(name, value.clone()).unwrap();
            }
            assert!(next.complete_with_room().is_ok(), "{media_type:?}");
            assert!(text::may_be_event(&sent.to_text()), "{media_type:?}");
        }
        assert_eq!(taken(6100, None).unwrap_err().name, "note");
    }

    #[test]
    fn an_event_has_a_bound_of_attributes_and_an_error_the_begin_of_a_name() {
        let mut event = event("/a", "1");
        for at in REQUIRED.len()..COUNT_MAX {
            event
                .insert(&format!("x{at}"), AttributeValue::text_of("1"))
                .unwrap();
        }
        assert!(EventAttributes::from_text(&event.to_text()).is_some());
        let more = event.insert("note", AttributeValue::text_of("1"));
        assert_eq!(more.unwrap_err().name, "note");
        let long = event.insert(&"É".repeat(1000), AttributeValue::text_of("1"));
        let why = long.unwrap_err();
        assert_eq!(why.name, "É".repeat(NAME_SHOWN_MAX) + "…");
    }

    proptest! {
        #[test]
        fn each_split_of_a_text_into_source_and_id_has_a_key_of_its_own(
            parts in proptest::collection::vec(proptest::sample::select(&["%7C", "%25", "/", "a"]), 3..8),
            splits in (1..8_usize, 1..8_usize),
            is_long in any::<bool>(),
        ) {
            let end = if is_long { "x".repeat(250) } else { "x".to_owned() };
            let key = |at: usize| {
                let (source, id) = parts.split_at(at.min(parts.len()));
                event(&format!("s{}", source.concat()), &format!("{}{end}", id.concat())).key()
            };
            let (one, other) = (key(splits.0), key(splits.1));
            for key in [&one, &other] {
                prop_assert!(key.len() <= KEY_MAX && is_visible_ascii(key));
            }
            let is_same = splits.0.min(parts.len()) == splits.1.min(parts.len());
            prop_assert_eq!(one == other, is_same);
        }
    }
}
