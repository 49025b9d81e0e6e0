//! Writes a lane's tag into a record.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};

/// The tag of a lane, ready to be written into a body.
#[derive(Clone, Debug)]
pub struct Tag {
    name: Arc<str>,
    /// `"path":"NATS"}`
    ending: Arc<[u8]>,
}

impl Tag {
    /// `name` may be any text. It is escaped as JSON requires.
    pub fn new(name: &str) -> Self {
        let ending = format!("\"path\":{}}}", serde_json::Value::from(name));
        Self {
            name: name.into(),
            ending: ending.into_bytes().into(),
        }
    }

    /// The text that it was made of.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `body` with the tag as its last member. `None` if `body` does not look like a JSON object:
    /// another publisher may have put any message into the broker.
    pub fn splice(&self, body: &[u8]) -> Option<Bytes> {
        let mut tagged = BytesMut::with_capacity(body.len() + self.ending.len() + 1);
        self.splice_onto(body, &mut tagged).then(|| tagged.freeze())
    }

    /// Appends the same to `tagged`. False if `body` cannot be tagged: then nothing is written.
    pub fn splice_onto(&self, body: &[u8], tagged: &mut BytesMut) -> bool {
        let open = body.strip_suffix(b"}");
        let Some(open) = open.filter(|open| open.starts_with(b"{")) else {
            return false;
        };
        tagged.put_slice(open);
        if open.trim_ascii_end().len() > 1 {
            tagged.put_u8(b',');
        }
        tagged.put_slice(&self.ending);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tag_is_the_last_member() {
        let tag = Tag::new("NATS");
        assert_eq!(tag.splice(b"{}").unwrap(), r#"{"path":"NATS"}"#);
        assert_eq!(tag.splice(b"{ }").unwrap(), r#"{ "path":"NATS"}"#);
        assert_eq!(
            tag.splice(br#"{"a":1 }"#).unwrap(),
            r#"{"a":1 ,"path":"NATS"}"#
        );
        assert_eq!(
            Tag::new("a\"b").splice(b"{}").unwrap(),
            r#"{"path":"a\"b"}"#
        );
        for foreign in ["", "}", "[]", "null", "{", "\"}"] {
            assert_eq!(tag.splice(foreign.as_bytes()), None, "{foreign}");
        }
    }
}
