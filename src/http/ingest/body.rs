//! The body of a request: how long it may take, how large it may be, and its content coding.

use std::{
    fmt,
    io::{self, Read},
    sync::Arc,
    time::Duration,
};

use actix_web::{
    error::PayloadError,
    http::{
        StatusCode,
        header::{self, HeaderMap},
    },
    web,
};
use bytes::{Bytes, BytesMut};
use flate2::bufread::MultiGzDecoder;
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};

use super::refusal::too_large;
use crate::{
    config::BODY_MAX,
    http::problem::{Problem, ProblemKind},
};

/// The largest window of zstd, as a power of two: 8 MiB (RFC 9659, 3).
const ZSTD_WINDOW_LOG_MAX: u32 = 23;
/// Bytes of bodies on their way: a few of the longest that may be allowed.
const ROOM: usize = 2 * BODY_MAX;
/// The bytes of a body for which there is always room.
const OWN_MAX: usize = 16 << 10;
/// How long a body that waits does not notice that the room has become short.
const SHORT_WAIT: Duration = Duration::from_secs(5);
/// The codings that an answer to another one offers.
const CODINGS: &str = "gzip, zstd";

/// A piece of a body, as it arrives.
type Piece = Result<Bytes, PayloadError>;

/// The limits of a request's body.
#[derive(Clone, Debug)]
pub struct BodyLimits {
    /// Bytes: as they arrive, and decoded.
    pub max: usize,
    /// A body arrives within this time, and a second more for each `min_rate` bytes of it.
    pub timeout: Duration,
    pub min_rate: u64,
    pub room: BodyRoom,
}

/// The bytes of bodies that are on their way, 16 KiB of each apart: many that come slowly take no
/// more memory. Clones share them.
#[derive(Clone, Debug)]
pub struct BodyRoom(Arc<Semaphore>);

impl Default for BodyRoom {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(ROOM)))
    }
}

impl BodyRoom {
    /// Bodies on their way have half of it.
    fn is_short(&self) -> bool {
        self.0.available_permits() < ROOM / 2
    }

    /// Takes room in `taken` for a body that has brought `received` bytes.
    ///
    /// A body may have as many bytes as are then free: the more bodies are on their way, the fewer each
    /// of them may have, and a few clients leave room for the others.
    fn take(
        &self,
        received: usize,
        taken: &mut Option<OwnedSemaphorePermit>,
    ) -> Result<(), Problem> {
        let has = taken.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let wants = received.saturating_sub(OWN_MAX);
        let more = wants.saturating_sub(has);
        if more == 0 {
            return Ok(());
        }
        let free = self.0.available_permits();
        let is_fair = wants <= free.saturating_sub(more);
        let more = u32::try_from(more).ok().filter(|_| is_fair);
        let room = more.and_then(|more| Arc::clone(&self.0).try_acquire_many_owned(more).ok());
        let Some(room) = room else {
            let detail = format!(
                "Not taken: bodies on their way to this node have left {free} of {ROOM} bytes, and a body may \
                 have no more than it leaves to others"
            );
            return Err(Problem::unavailable(ProblemKind::Unavailable, detail));
        };
        match taken {
            Some(taken) => taken.merge(room),
            None => *taken = Some(room),
        }
        Ok(())
    }
}

/// The coding of a body (RFC 9110, 8.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coding {
    Identity,
    Gzip,
    Zstd,
}

impl Coding {
    /// The coding that the headers name: one at most, beside `identity`.
    pub(super) fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        let unsupported = || {
            let detail = format!(
                "The body has a content coding that is not supported; supported is one of: {CODINGS}"
            );
            Problem::unsupported(ProblemKind::Encoding, detail)
                .with_header(header::ACCEPT_ENCODING, CODINGS)
        };
        let mut coding = Self::Identity;
        for line in headers.get_all(header::CONTENT_ENCODING) {
            for name in line.to_str().map_err(|_| unsupported())?.split(',') {
                let named = match name.trim().to_ascii_lowercase().as_str() {
                    "" | "identity" => continue,
                    "gzip" | "x-gzip" => Self::Gzip,
                    "zstd" => Self::Zstd,
                    _ => return Err(unsupported()),
                };
                if coding != Self::Identity {
                    return Err(unsupported());
                }
                coding = named;
            }
        }
        Ok(coding)
    }

    /// The content of an encoded `body`. Nothing of it is kept beyond `max` bytes.
    fn decode(self, body: Bytes, max: usize) -> Result<Bytes, Problem> {
        let decoded = match self {
            Self::Identity => return Ok(body),
            Self::Gzip => read_up_to(max, MultiGzDecoder::new(&*body)),
            Self::Zstd => {
                let decoder = zstd::stream::read::Decoder::with_buffer(&*body);
                decoder.and_then(|mut decoder| {
                    decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                    read_up_to(max, decoder)
                })
            }
        };
        let decoded = decoded.map_err(|why| {
            let detail = format!("The body is no complete {self}: {why}");
            Problem::bad_request(ProblemKind::Encoding, detail)
        })?;
        decoded.ok_or_else(|| larger_than(max, " when it is decoded"))
    }
}

impl fmt::Display for Coding {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Identity => "identity",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        })
    }
}

/// All that `from` has; `None` if that is more than `max` bytes.
fn read_up_to(max: usize, from: impl Read) -> io::Result<Option<Bytes>> {
    let one_more = u64::try_from(max).unwrap_or(u64::MAX).saturating_add(1);
    let mut content = Vec::new();
    from.take(one_more).read_to_end(&mut content)?;
    Ok((content.len() <= max).then(|| content.into()))
}

fn larger_than(max: usize, when: &str) -> Problem {
    too_large(format!("The request is larger than {max} bytes{when}"))
}

impl BodyLimits {
    /// Whether a body may come that is as long as the headers say: nobody has to send one in vain.
    pub fn check_length(&self, headers: &HeaderMap) -> Result<(), Problem> {
        let length = headers.get(header::CONTENT_LENGTH);
        let length = length.and_then(|length| length.to_str().ok()?.trim().parse::<u64>().ok());
        let is_larger = length.is_some_and(|length| length > self.max as u64);
        if is_larger {
            Err(larger_than(self.max, ""))
        } else {
            Ok(())
        }
    }

    /// The content of a body that has this coding.
    pub(super) async fn read(&self, body: web::Payload, coding: Coding) -> Result<Bytes, Problem> {
        let body = self.receive(body).await?;
        coding.decode(body, self.max)
    }

    /// The body as it arrives, within the limits. One that comes in one piece is not copied.
    pub async fn receive(&self, mut body: web::Payload) -> Result<Bytes, Problem> {
        let began = Instant::now();
        let mut first = Bytes::new();
        let mut all = BytesMut::new();
        let mut room = None;
        loop {
            let received = first.len() + all.len();
            // Usually it is there, and no timer is needed.
            let next = match body.next().now_or_never() {
                Some(next) => next,
                None => {
                    self.room.take(received, &mut room)?;
                    self.wait_for(&mut body, began, received).await?
                }
            };
            let Some(piece) = next else { break };
            let piece = piece.map_err(|why| {
                let why = match why {
                    PayloadError::Incomplete(_) => "it ended early, or is no chunks".into(),
                    other => other.to_string(),
                };
                let detail = format!("The body did not arrive: {why}");
                Problem::bad_request(ProblemKind::Body, detail)
            })?;
            if received + piece.len() > self.max {
                return Err(larger_than(self.max, ""));
            }
            if received == 0 {
                first = piece;
                continue;
            }
            self.room.take(received + piece.len(), &mut room)?;
            if !first.is_empty() {
                all.extend_from_slice(&first);
                first = Bytes::new();
            }
            all.extend_from_slice(&piece);
        }
        Ok(if all.is_empty() { first } else { all.freeze() })
    }

    /// The next piece of a body that has brought so many bytes since it `began`.
    async fn wait_for(
        &self,
        body: &mut web::Payload,
        began: Instant,
        received: usize,
    ) -> Result<Option<Piece>, Problem> {
        loop {
            let now = Instant::now();
            let end = began + self.time_for(received);
            if end <= now {
                return Err(self.too_slow());
            }
            // The room may become short meanwhile.
            let next = timeout_at(end.min(now + SHORT_WAIT), body.next());
            if let Ok(next) = next.await {
                return Ok(next);
            }
        }
    }

    /// The time that a body may take which has brought so many bytes. They gain nothing while the room
    /// is short: who holds it must go on sending.
    fn time_for(&self, received: usize) -> Duration {
        if self.room.is_short() {
            return self.timeout;
        }
        let received = u64::try_from(received).unwrap_or(u64::MAX);
        self.timeout + Duration::from_secs(received / self.min_rate.max(1))
    }

    fn too_slow(&self) -> Problem {
        let Self {
            timeout, min_rate, ..
        } = self;
        let detail = format!(
            "The body did not come in time: it may take {timeout:?}, and a second more for each \
             {min_rate} bytes unless bodies on their way have half of their room"
        );
        Problem::new(StatusCode::REQUEST_TIMEOUT, ProblemKind::Slow, detail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_body_has_room_and_each_other_one_has_no_more_than_is_left() {
        let room = BodyRoom::default();
        let mut all = Vec::new();
        let mut sizes = Vec::new();
        for _ in 0..100 {
            let (mut received, mut taken) = (0, None);
            while received < BODY_MAX && room.take(received + 1024, &mut taken).is_ok() {
                received += 1024;
            }
            sizes.push(received);
            all.push(taken);
        }
        assert_eq!(sizes[0], BODY_MAX);
        assert!(
            sizes[1] > BODY_MAX / 2 && sizes[2] > BODY_MAX / 4,
            "{sizes:?}"
        );
        assert!(sizes.iter().all(|size| *size >= OWN_MAX), "{sizes:?}");
        assert!(room.is_short());
        drop(all);
        assert_eq!(room.0.available_permits(), ROOM);
    }
}
