//! Follows the requests of a connection through its bytes (RFC 9112), and finds what another server
//! may read differently.
//!
//! The HTTP library takes lines that end with LF alone, and chunk extensions and trailers of any
//! length and content. A proxy that reads them in another way sees other requests than this node does,
//! so they are refused (RFC 9112, 11.2). What the library refuses is left to it.

use memchr::memchr;

/// How much of a line is kept: more than any field that frames a request is long.
const LINE_START: usize = 64;
/// The most characters of a field's name. The library panics at 65,536.
pub const NAME_MAX: usize = 256;
/// The most bytes of the line before a chunk, with its extensions. Hardly a client sends any.
const CHUNK_LINE_MAX: usize = 256;
/// The most bytes of all trailers.
const TRAILERS_MAX: usize = 8 << 10;
/// Bytes that a chunk may have beside its data, and those that all may have beyond that: as Go's
/// server does it.
const CHUNK_OVERHEAD: u64 = 16;
const OVERHEAD_MAX: u64 = 16 << 10;

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FramingFault {
    BareLf,
    Fragment,
    LongName,
    LongFraming,
    Upgrade,
    ChunkLine,
    Trailer,
}

impl FramingFault {
    /// Whether the head of the request is at fault, so that nobody else answers.
    pub const fn is_of_head(self) -> bool {
        matches!(
            self,
            Self::BareLf | Self::Fragment | Self::LongName | Self::LongFraming | Self::Upgrade
        )
    }

    pub const fn detail(self) -> &'static str {
        match self {
            Self::BareLf => "A line of the head ends with LF alone; each ends with CRLF",
            Self::Fragment => "The target of the request has a #, and may have none",
            Self::LongName => "The name of a header has more than 256 characters",
            Self::LongFraming => "A Content-Length, Transfer-Encoding or Upgrade is too long",
            Self::Upgrade => "This node speaks no WebSocket",
            Self::ChunkLine => "The line before a chunk is malformed or too long",
            Self::Trailer => "A trailer is malformed, or the trailers are too long",
        }
    }
}

/// The place in the bytes of a connection.
pub struct Framing {
    place: Place,
    line: Line,
    body: BodyFraming,
    /// Bytes of chunk lines beyond what their data allows.
    overhead: u64,
    /// Bytes of the trailers.
    trailers: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Before a request, where empty lines may be.
    Start,
    Head,
    /// In a body that has so many bytes left.
    Body(u64),
    ChunkLine,
    /// In a chunk, whose data and line end have so many bytes left.
    Chunk(u64),
    Trailers,
    /// The rest is no request, or the library refuses it.
    Unknown,
}

/// The framing of the body, as the head says it.
#[derive(Clone, Copy, Default)]
struct BodyFraming {
    length: Option<u64>,
    is_chunked: bool,
    is_connect: bool,
    is_upgrade: bool,
}

/// A field that says how the body is framed.
enum FramingField {
    Length,
    Coding,
    Upgrade,
}

impl FramingField {
    fn of(name: &[u8]) -> Option<Self> {
        let is = |known: &str| name.eq_ignore_ascii_case(known.as_bytes());
        match name.len() {
            7 if is("upgrade") => Some(Self::Upgrade),
            14 if is("content-length") => Some(Self::Length),
            17 if is("transfer-encoding") => Some(Self::Coding),
            _ => None,
        }
    }
}

/// The line that comes.
struct Line {
    start: [u8; LINE_START],
    length: usize,
    last: u8,
    /// The place of the first one.
    colon: Option<usize>,
    has_hash: bool,
}

impl Line {
    const fn new() -> Self {
        Self {
            start: [0; LINE_START],
            length: 0,
            last: 0,
            colon: None,
            has_hash: false,
        }
    }

    /// Begins another line, which is written over this one.
    const fn clear(&mut self) {
        self.length = 0;
        self.last = 0;
        self.colon = None;
        self.has_hash = false;
    }

    fn extend(&mut self, bytes: &[u8]) {
        let Some(last) = bytes.last() else { return };
        let kept = self.length.min(LINE_START);
        let more = bytes.len().min(LINE_START - kept);
        self.start[kept..kept + more].copy_from_slice(&bytes[..more]);
        if self.colon.is_none() {
            self.colon = memchr(b':', bytes).map(|at| self.length + at);
        }
        self.length += bytes.len();
        self.last = *last;
    }

    /// The beginning of the line, or all of it, without CR.
    fn start(&self) -> &[u8] {
        let all = &self.start[..self.length.min(LINE_START)];
        if self.is_whole() {
            all.strip_suffix(b"\r").unwrap_or(all)
        } else {
            all
        }
    }

    const fn is_whole(&self) -> bool {
        self.length <= LINE_START
    }

    /// There is nothing before CR.
    const fn is_empty(&self) -> bool {
        self.length == 1
    }
}

impl Default for Framing {
    fn default() -> Self {
        Self {
            place: Place::Start,
            line: Line::new(),
            body: BodyFraming::default(),
            overhead: 0,
            trailers: 0,
        }
    }
}

impl Framing {
    /// Goes on by `bytes`.
    ///
    /// # Errors
    /// The fault, and how many of the bytes are good. The request is not whole without the others.
    pub fn follow(&mut self, bytes: &[u8]) -> Result<(), (usize, FramingFault)> {
        let mut at = 0;
        while at < bytes.len() {
            let rest = &bytes[at..];
            match &mut self.place {
                Place::Unknown => return Ok(()),
                Place::Body(left) | Place::Chunk(left) => {
                    let passed = usize::try_from(*left).unwrap_or(usize::MAX).min(rest.len());
                    *left -= passed as u64;
                    at += passed;
                    match self.place {
                        Place::Body(0) => self.begin(Place::Start),
                        Place::Chunk(0) => self.begin(Place::ChunkLine),
                        _ => {}
                    }
                }
                _ => {
                    let end = memchr(b'\n', rest);
                    let piece = &rest[..end.unwrap_or(rest.len())];
                    if end.is_some() && self.is_plain_field(piece) {
                        at += piece.len() + 1;
                        continue;
                    }
                    if self.place == Place::Trailers && !self.may_go_on(piece) {
                        return Err((at, FramingFault::Trailer));
                    }
                    // The library drops a fragment, and another server may not (RFC 9112, 3.2).
                    if self.place == Place::Start && memchr(b'#', piece).is_some() {
                        self.line.has_hash = true;
                    }
                    self.line.extend(piece);
                    self.check_length()
                        .map_err(|(more, fault)| (at + piece.len() - more, fault))?;
                    if end.is_some() {
                        self.end_of_line()
                            .map_err(|fault| (at + piece.len(), fault))?;
                    }
                    at += piece.len() + usize::from(end.is_some());
                }
            }
        }
        Ok(())
    }

    /// No request is under way: the last one is whole, and no byte of the next one is there.
    pub fn is_between_requests(&self) -> bool {
        self.place == Place::Start && self.line.length == 0
    }

    fn begin(&mut self, place: Place) {
        self.place = place;
        self.line.clear();
    }

    /// Whether `line` is a whole field that is neither at fault nor frames the body, as most are: it
    /// need not be kept.
    fn is_plain_field(&self, line: &[u8]) -> bool {
        let name = &line[..line.len().min(NAME_MAX + 1)];
        self.place == Place::Head
            && self.line.length == 0
            && line.last() == Some(&b'\r')
            && memchr(b':', name).is_some_and(|colon| FramingField::of(&name[..colon]).is_none())
    }

    /// Whether the line of a trailer may go on by `piece` (RFC 9110, 5.6.2 and 5.5). The library
    /// checks the fields of the head itself.
    fn may_go_on(&self, piece: &[u8]) -> bool {
        let Line { last, colon, .. } = self.line;
        let mut is_value = colon.is_some();
        // The end of the line is no part of the piece.
        piece.is_empty()
            || last != b'\r'
                && piece.iter().enumerate().all(|(at, &byte)| {
                    let length = self.line.length + at;
                    match byte {
                        b'\r' => at + 1 == piece.len() && (is_value || length == 0),
                        b':' if !is_value => {
                            is_value = true;
                            (1..=NAME_MAX).contains(&length)
                        }
                        _ if is_value => byte == b'\t' || !byte.is_ascii_control(),
                        _ => byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte),
                    }
                })
    }

    /// The line so far is not too long.
    ///
    /// # Errors
    /// The fault, and how many bytes of the line come behind those that it may have.
    fn check_length(&self) -> Result<(), (usize, FramingFault)> {
        let Line { length, colon, .. } = self.line;
        let (checked, max, fault) = match self.place {
            Place::Head => (colon.unwrap_or(length), NAME_MAX, FramingFault::LongName),
            Place::ChunkLine => (length, CHUNK_LINE_MAX, FramingFault::ChunkLine),
            Place::Trailers => (length, TRAILERS_MAX - self.trailers, FramingFault::Trailer),
            _ => return Ok(()),
        };
        if checked > max {
            Err((length - max, fault))
        } else {
            Ok(())
        }
    }

    fn end_of_line(&mut self) -> Result<(), FramingFault> {
        let is_whole_line = self.line.last == b'\r';
        match self.place {
            Place::Start | Place::Head if !is_whole_line => return Err(FramingFault::BareLf),
            Place::Start if self.line.has_hash => return Err(FramingFault::Fragment),
            Place::ChunkLine if !is_whole_line => return Err(FramingFault::ChunkLine),
            Place::Trailers if !is_whole_line => return Err(FramingFault::Trailer),
            _ => {}
        }
        let next = match self.place {
            Place::Start | Place::Trailers if self.line.is_empty() => Place::Start,
            Place::Start => {
                self.body = BodyFraming {
                    is_connect: self.line.start().starts_with(b"CONNECT "),
                    ..BodyFraming::default()
                };
                Place::Head
            }
            Place::Head if self.line.is_empty() => self.end_of_head()?,
            Place::Head => self.field()?,
            Place::ChunkLine => self.chunk()?,
            Place::Trailers if self.line.colon.is_none() => return Err(FramingFault::Trailer),
            Place::Trailers => {
                self.trailers += self.line.length;
                Place::Trailers
            }
            others => others,
        };
        self.begin(next);
        Ok(())
    }

    /// Reads a field that frames the body.
    fn field(&mut self) -> Result<Place, FramingFault> {
        let start = self.line.start();
        let Some(colon) = memchr(b':', start) else {
            return Ok(Place::Head);
        };
        let (name, value) = (&start[..colon], start[colon + 1..].trim_ascii());
        let Some(field) = FramingField::of(name) else {
            return Ok(Place::Head);
        };
        if !self.line.is_whole() {
            return Err(FramingFault::LongFraming);
        }
        let body = &mut self.body;
        match field {
            FramingField::Length => {
                let text = str::from_utf8(value).ok();
                body.length = text.and_then(|text| text.parse().ok());
                if body.length.is_none() {
                    return Ok(Place::Unknown);
                }
            }
            FramingField::Coding => body.is_chunked |= value.eq_ignore_ascii_case(b"chunked"),
            FramingField::Upgrade => body.is_upgrade |= value.eq_ignore_ascii_case(b"websocket"),
        }
        Ok(Place::Head)
    }

    fn end_of_head(&mut self) -> Result<Place, FramingFault> {
        let BodyFraming {
            length,
            is_chunked,
            is_connect,
            is_upgrade,
        } = self.body;
        self.overhead = 0;
        self.trailers = 0;
        Ok(match length {
            _ if is_chunked => Place::ChunkLine,
            // The library would take all that comes for the body.
            _ if is_upgrade => return Err(FramingFault::Upgrade),
            None if is_connect => Place::Unknown,
            None | Some(0) => Place::Start,
            Some(length) => Place::Body(length),
        })
    }

    fn chunk(&mut self) -> Result<Place, FramingFault> {
        let start = self.line.start();
        let digits = start.iter().take_while(|byte| byte.is_ascii_hexdigit());
        let digits = digits.count();
        if digits == LINE_START {
            return Err(FramingFault::ChunkLine);
        }
        let size = str::from_utf8(&start[..digits]).unwrap_or_default();
        let Ok(size) = u64::from_str_radix(size, 16) else {
            return Ok(Place::Unknown);
        };
        let line = self.line.length as u64 + 1;
        let allowed = CHUNK_OVERHEAD.saturating_add(size.saturating_mul(2));
        self.overhead = (self.overhead + line).saturating_sub(allowed);
        if self.overhead > OVERHEAD_MAX {
            return Err(FramingFault::ChunkLine);
        }
        Ok(match size {
            0 => Place::Trailers,
            _ => Place::Chunk(size.saturating_add(2)),
        })
    }
}

#[cfg(test)]
mod tests;
