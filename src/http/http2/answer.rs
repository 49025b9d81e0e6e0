//! Sends an answer on a stream of HTTP/2.

use std::{
    future::{Future as _, poll_fn},
    pin::{Pin, pin},
    task::Poll,
    time::SystemTime,
};

use actix_http::{Response, ResponseHead};
use actix_web::{
    body::{BodySize, MessageBody},
    http::{ConnectionType, StatusCode},
};
use bytes::Bytes;
use h2::{Reason, SendStream, server::SendResponse};
use http::{
    HeaderName, HeaderValue,
    header::{CONNECTION, CONTENT_LENGTH, DATE, TRANSFER_ENCODING, UPGRADE},
};
use tokio::time::{Instant, Sleep, sleep};

use super::StreamEnd;
use crate::http::write_patience;

/// The most bytes that a stream asks room for at a time, so that all get some.
const PIECE: usize = 16 << 10;

/// The answer did not arrive.
struct BrokenStream;

impl From<h2::Error> for BrokenStream {
    fn from(_: h2::Error) -> Self {
        Self
    }
}

/// Sends `response`. It returns once all of it has left for the connection.
pub async fn send<B: MessageBody>(
    response: Response<B>,
    respond: &mut SendResponse<Bytes>,
    is_head: bool,
) -> StreamEnd {
    let is_last = response.head().connection_type() == ConnectionType::Close;
    let (response, body) = response.into_parts();
    match send_parts(response.head(), body, respond, is_head).await {
        Ok(()) if is_last => StreamEnd::Last,
        Ok(()) => StreamEnd::Answered,
        Err(BrokenStream) => StreamEnd::Broken,
    }
}

async fn send_parts<B: MessageBody>(
    head: &ResponseHead,
    body: B,
    respond: &mut SendResponse<Bytes>,
    is_head: bool,
) -> Result<(), BrokenStream> {
    let size = match head.status {
        StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED => BodySize::None,
        _ => body.size(),
    };
    let is_whole = is_head || size.is_eof();
    let mut stream = respond.send_response(response_of(head, size), is_whole)?;
    if is_whole {
        return Ok(());
    }
    let mut left = match size {
        BodySize::Sized(left) => Some(left),
        BodySize::None | BodySize::Stream => None,
    };
    let mut body = pin!(body);
    while let Some(mut piece) = next_piece(body.as_mut(), &mut stream).await? {
        let mut late = pin!(sleep(write_patience()));
        let mut taken = 0;
        while !piece.is_empty() {
            let room = room(&mut stream, piece.len(), late.as_mut()).await?;
            let part = piece.split_to(room.min(piece.len()));
            // A client that takes a byte at a time gets no more time for it.
            taken += part.len();
            if taken >= PIECE {
                taken = 0;
                late.as_mut().reset(Instant::now() + write_patience());
            }
            left = left.map(|left| left.saturating_sub(part.len() as u64));
            let is_end = left == Some(0);
            stream.send_data(part, is_end)?;
            if is_end {
                return Ok(());
            }
        }
    }
    stream.send_data(Bytes::new(), true)?;
    Ok(())
}

/// The next piece of the body; `None` at its end.
async fn next_piece<B: MessageBody>(
    mut body: Pin<&mut B>,
    stream: &mut SendStream<Bytes>,
) -> Result<Option<Bytes>, BrokenStream> {
    let next = poll_fn(|context| match body.as_mut().poll_next(context) {
        Poll::Ready(piece) => Poll::Ready(Ok(piece)),
        Poll::Pending => stream.poll_reset(context).map(|_| Err(BrokenStream)),
    });
    match next.await?.transpose() {
        Ok(piece) => Ok(piece),
        Err(_) => {
            stream.send_reset(Reason::INTERNAL_ERROR);
            Err(BrokenStream)
        }
    }
}

/// The number of `wanted` bytes that the client takes now. It has to take some before `late`.
async fn room(
    stream: &mut SendStream<Bytes>,
    wanted: usize,
    mut late: Pin<&mut Sleep>,
) -> Result<usize, BrokenStream> {
    stream.reserve_capacity(wanted.min(PIECE));
    let room = poll_fn(|context| {
        loop {
            let room = stream.capacity();
            if room > 0 {
                return Poll::Ready(Ok(room));
            }
            match stream.poll_capacity(context) {
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(Some(Err(_)) | None) => return Poll::Ready(Err(BrokenStream)),
                Poll::Pending if late.as_mut().poll(context).is_ready() => {
                    return Poll::Ready(Err(BrokenStream));
                }
                Poll::Pending => return Poll::Pending,
            }
        }
    });
    let room = room.await;
    if room.is_err() {
        stream.send_reset(Reason::CANCEL);
    }
    room
}

fn response_of(head: &ResponseHead, size: BodySize) -> http::Response<()> {
    let mut response = http::Response::new(());
    if let Ok(status) = http::StatusCode::from_u16(head.status.as_u16()) {
        *response.status_mut() = status;
    }
    *response.version_mut() = http::Version::HTTP_2;
    let headers = response.headers_mut();
    for (name, value) in head.headers() {
        let name = HeaderName::from_bytes(name.as_str().as_bytes());
        let value = HeaderValue::from_bytes(value.as_bytes());
        // Both have the same rules for them.
        let (Ok(name), Ok(value)) = (name, value) else {
            continue;
        };
        // Those of a connection of HTTP/1.1 (RFC 9113, 8.2.2).
        let is_of_connection = [CONNECTION, TRANSFER_ENCODING, UPGRADE].contains(&name);
        if !is_of_connection && name != CONTENT_LENGTH {
            headers.append(name, value);
        }
    }
    if let BodySize::Sized(length) = size {
        headers.insert(CONTENT_LENGTH, length.into());
    }
    if !headers.contains_key(DATE)
        && let Ok(now) = HeaderValue::from_str(&httpdate::fmt_http_date(SystemTime::now()))
    {
        headers.insert(DATE, now);
    }
    response
}
