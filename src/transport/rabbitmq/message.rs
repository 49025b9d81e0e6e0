//! Messages as AMQP properties and bodies.

use std::sync::Arc;

use bytes::Bytes;
use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable, ShortString},
};

use super::super::{Headers, Message, header};
use crate::record::{Record, is_visible_ascii};

/// The properties of a message. Its id is `message_id`, or a header if it has more than the 255
/// bytes of a `message_id`.
pub(super) fn to_properties(headers: &Headers) -> BasicProperties {
    const PERSISTENT: u8 = 2;
    // `None` if it is longer than 255 bytes: then it is a header.
    let message_id = ShortString::try_new(&*headers.id).ok();
    let mut table = FieldTable::default();
    for (name, value) in headers.pairs() {
        if name != header::ID || message_id.is_none() {
            let value = AMQPValue::LongString(value.into_owned().into());
            table.insert(name.into(), value);
        }
    }
    let content_type = match headers.bundle {
        None => "application/json",
        Some(_) => "application/x-protobuf",
    };
    let properties = BasicProperties::default()
        .with_delivery_mode(PERSISTENT)
        .with_content_type(content_type.into())
        .with_headers(table);
    match message_id {
        Some(id) => properties.with_message_id(id),
        None => properties,
    }
}

/// The message that the broker sent, ours or another publisher's.
pub(super) fn from_properties(properties: &BasicProperties, body: Bytes) -> Message {
    let table = properties.headers().as_ref();
    let header = |name: &str| match table?.inner().get(name)? {
        AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok(),
        AMQPValue::ShortString(text) => Some(text.as_str()),
        _ => None,
    };
    // AMQP identifies a message by nothing else. Without it, each delivery gets an id of its own: a
    // hash of the body would make one record of two that are equal.
    let other_id = || {
        let id = properties.message_id().as_ref().map(ShortString::as_str);
        id.filter(|id| is_visible_ascii(id))
            .map_or_else(Record::new_id, Arc::from)
    };
    Message {
        headers: Headers::read(header, other_id),
        body,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::TraceHeaders;

    #[test]
    fn a_message_comes_out_as_it_went_in_even_with_an_id_too_long_for_message_id() {
        for (id, bundle) in [
            ("id-1".to_owned(), None),
            ("k".repeat(255) + "/12", Some(2)),
        ] {
            let sent = Message {
                headers: Headers {
                    id: id.as_str().into(),
                    origin: None,
                    trace: TraceHeaders::read(
                        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
                        Some("congo=t61rcWkgMzE"),
                    ),
                    bundle,
                    api: None,
                    event: None,
                },
                body: Bytes::from_static(br#"{"a":1}"#),
            };
            let properties = to_properties(&sent.headers);
            assert_eq!(properties.message_id().is_some(), id.len() <= 255);
            assert_eq!(*properties.delivery_mode(), Some(2), "persistent");
            assert_eq!(from_properties(&properties, sent.body.clone()), sent);
        }
    }

    #[test]
    fn a_foreign_message_keeps_its_message_id_if_it_can_be_a_header_else_gets_a_new_id() {
        let id =
            |properties: BasicProperties| from_properties(&properties, Bytes::new()).headers.id;
        let foreign = |id: &str| BasicProperties::default().with_message_id(id.into());
        assert_eq!(&*id(foreign("theirs")), "theirs");
        for unusable in ["", "a\nb", "naïve"] {
            assert_eq!(id(foreign(unusable)).len(), 36, "{unusable:?}");
        }
        assert_eq!(id(BasicProperties::default()).len(), 36);
    }
}
