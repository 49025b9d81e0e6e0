//! Server-sent events, as the streams of a node have them.

use crate::api::client::AnswerStream;

/// A longer event is none of a node.
const EVENT_MAX: usize = 16 << 20;

/// An event; a comment between two events is one without a name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerEvent {
    pub name: String,
    pub id: Option<String>,
    pub data: String,
}

/// The events of an answer.
pub struct EventStream {
    answer: AnswerStream,
    events: EventParser,
}

impl EventStream {
    pub fn new(answer: AnswerStream) -> Self {
        Self {
            answer,
            events: EventParser::default(),
        }
    }

    /// The next event, or a comment that says that the node lives.
    ///
    /// # Errors
    /// When the stream ends, or is none of events.
    pub async fn next(&mut self) -> Result<ServerEvent, String> {
        loop {
            if let Some(event) = self.events.next()? {
                return Ok(event);
            }
            match self.answer.next().await {
                Some(Ok(piece)) => self.events.add(&piece),
                Some(Err(failure)) => return Err(failure.to_string()),
                None => return Err("the node has ended the stream".into()),
            }
        }
    }
}

/// Cuts pieces of a stream into events.
#[derive(Default)]
struct EventParser {
    /// The text that has come, and how much of it is read.
    text: Vec<u8>,
    read: usize,
    event: ServerEvent,
    /// The event has a line.
    has_begun: bool,
}

impl EventParser {
    fn add(&mut self, piece: &[u8]) {
        self.text.drain(..self.read);
        self.read = 0;
        self.text.extend_from_slice(piece);
    }

    /// The next event that is whole.
    fn next(&mut self) -> Result<Option<ServerEvent>, String> {
        while let Some(line) = self.line() {
            let line = String::from_utf8(line).map_err(|why| format!("no events: {why}"))?;
            if line.is_empty() {
                if std::mem::take(&mut self.has_begun) {
                    return Ok(Some(std::mem::take(&mut self.event)));
                }
                continue;
            }
            self.has_begun = true;
            let (field, value) = line.split_once(':').unwrap_or((&line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "event" => value.clone_into(&mut self.event.name),
                "id" => self.event.id = Some(value.into()),
                "data" => {
                    if !self.event.data.is_empty() {
                        self.event.data.push('\n');
                    }
                    self.event.data.push_str(value);
                }
                _ => {}
            }
        }
        let left = self.text.len() - self.read + self.event.data.len();
        if left > EVENT_MAX {
            return Err(format!("an event is longer than {EVENT_MAX} bytes"));
        }
        Ok(None)
    }

    /// The next line that is whole, without its end.
    fn line(&mut self) -> Option<Vec<u8>> {
        let rest = &self.text[self.read..];
        let end = memchr::memchr(b'\n', rest)?;
        let line = rest[..end].strip_suffix(b"\r").unwrap_or(&rest[..end]);
        let line = line.to_vec();
        self.read += end + 1;
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_cut_out_of_pieces_of_any_size() {
        let text = "retry: 1000\n\nevent: change\nid: run-7\ndata: {\"a\":\ndata: 1}\n\n: ping\n\n\
                    event: status\r\nid: run-8\r\ndata: é\r\n\r\ndata: half";
        let expected = [
            ServerEvent::default(),
            ServerEvent {
                name: "change".into(),
                id: Some("run-7".into()),
                data: "{\"a\":\n1}".into(),
            },
            ServerEvent::default(),
            ServerEvent {
                name: "status".into(),
                id: Some("run-8".into()),
                data: "é".into(),
            },
        ];
        for size in [1, 2, 7, text.len()] {
            let mut reader = EventParser::default();
            let mut found = Vec::new();
            for piece in text.as_bytes().chunks(size) {
                reader.add(piece);
                while let Some(event) = reader.next().unwrap() {
                    found.push(event);
                }
            }
            assert_eq!(found, expected, "{size}");
        }
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut reader = EventParser::default();
        reader.add(&vec![b'x'; EVENT_MAX + 1]);
        assert!(reader.next().is_err());
        let mut reader = EventParser::default();
        reader.add(b"data: \xff\n\n");
        assert!(reader.next().is_err());
    }
}
