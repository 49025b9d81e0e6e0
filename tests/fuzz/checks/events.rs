//! CloudEvents.

use bytes::{Bytes, BytesMut};
use serde::de::IgnoredAny;
use waypost::{
    cloud_events::{EventAttributes, JsonEvent, header_value, parse_batch, parse_event},
    record::is_visible_ascii,
};

/// An event, alone and twice in a batch, is the same on every way.
pub fn check_events(body: &[u8]) {
    let body = Bytes::copy_from_slice(body);
    if let Ok(text) = std::str::from_utf8(&body)
        && let Ok(event) = parse_event(&body, text)
    {
        check_event(&event);
    }
    let many = Bytes::from([b"[", &*body, b", ", &body, b"]"].concat());
    if let Ok(events) = parse_batch(&many, 10) {
        for text in events {
            if let Ok(event) = parse_event(&many, text) {
                check_event(&event);
            }
        }
    }
}

/// An event that was read is the same after each way that it may take.
fn check_event(event: &JsonEvent) {
    let JsonEvent { attributes, data } = event;
    let text = attributes.to_text();
    assert!(is_visible_ascii(&text));
    assert_eq!(EventAttributes::from_text(&text).as_ref(), Some(attributes));
    let key = attributes.key();
    assert!(key.len() <= 255 && is_visible_ascii(&key), "{key}");
    for (name, value) in attributes.headers() {
        let name = name.strip_prefix("ce-").expect("the prefix");
        let decoded = header_value::decode(value.as_bytes()).expect("it is coded");
        assert_eq!(Some(&*decoded), attributes.get(name));
    }
    let mut json = BytesMut::new();
    attributes.write_json(data, &mut json);
    let json = json.freeze();
    // Data in base64 may be no text, and no record then.
    let Ok(text) = std::str::from_utf8(&json) else {
        return assert!(std::str::from_utf8(data).is_err());
    };
    // The data may be of another type than an event's has to be.
    if let Ok(read) = parse_event(&json, text) {
        assert_eq!((&read.attributes, &read.data), (attributes, data));
    } else {
        assert!(
            serde_json::from_slice::<IgnoredAny>(data).is_err(),
            "{text}"
        );
    }
}

/// Attributes as text are read once, and so is the value of a header.
pub fn check_attributes(text: &[u8]) {
    if let Ok(text) = std::str::from_utf8(text)
        && let Some(event) = EventAttributes::from_text(text)
    {
        let again = event.to_text();
        assert!(is_visible_ascii(&again));
        assert_eq!(EventAttributes::from_text(&again), Some(event));
    }
    if let Ok(decoded) = header_value::decode(text) {
        let coded = header_value::encode(&decoded).to_string();
        assert_eq!(header_value::decode(coded.as_bytes()), Ok(decoded));
    }
}
