//! A request of HTTP/2 as the service reads it.

use std::{
    cell::Cell,
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use actix_http::{Payload, Request, error::PayloadError};
use actix_web::{
    HttpMessage as _,
    http::{
        Method, StatusCode, Version,
        header::{self, HeaderMap, HeaderName, HeaderValue},
    },
};
use bytes::Bytes;
use futures_util::Stream;
use h2::RecvStream;
use http::request::Parts;

use super::Http2Client;
use crate::{
    config::HEADERS_MAX,
    http::{
        ClientCertificate,
        framing::FramingFault,
        framing::NAME_MAX,
        problem::{Problem, ProblemKind},
    },
};

/// About what a header takes beside its name and value: actix's map has room for four values of each
/// name.
pub(super) const HEADER_COST: usize = 256;

/// About the memory that the head of a request takes. A client may send a byte for a header of 4 KiB
/// that it has sent before (RFC 7541, 6.1).
pub fn head_size(request: &http::Request<RecvStream>) -> usize {
    let target = request.uri();
    let path = target
        .path_and_query()
        .map_or(0, |path| path.as_str().len());
    let host = target.authority().map_or(0, |host| host.as_str().len());
    let headers = request
        .headers()
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + HEADER_COST);
    path + host + headers.sum::<usize>()
}

/// Whether a client waits to be asked for its body (RFC 9110, 10.1.1). Clones share it.
#[derive(Clone)]
pub struct BodyDemand(Rc<Cell<Demand>>);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Demand {
    /// The client waits, and nobody wants the body yet.
    Waiting,
    Due,
    Over,
}

impl BodyDemand {
    pub fn of(request: &http::Request<RecvStream>) -> Self {
        let expected = request.headers().get(http::header::EXPECT);
        let waits =
            expected.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
        let waits = waits && !request.body().is_end_stream();
        let demand = if waits { Demand::Waiting } else { Demand::Over };
        Self(Rc::new(Cell::new(demand)))
    }

    /// The handler reads.
    fn wanted(&self) {
        if self.0.get() == Demand::Waiting {
            self.0.set(Demand::Due);
        }
    }

    /// Whether the client is to be asked now. It is asked once.
    pub fn is_due(&self) -> bool {
        let is_due = self.0.get() == Demand::Due;
        if is_due {
            self.0.set(Demand::Over);
        }
        is_due
    }
}

/// The body of a stream. What is read makes room for more.
struct StreamBody {
    stream: RecvStream,
    demand: BodyDemand,
}

impl Stream for StreamBody {
    type Item = Result<Bytes, PayloadError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.demand.wanted();
        let piece = ready!(self.stream.poll_data(context));
        Poll::Ready(piece.map(|piece| {
            let read = piece.and_then(|piece| {
                let window = self.stream.flow_control();
                window.release_capacity(piece.len())?;
                Ok(piece)
            });
            read.map_err(|why| PayloadError::Io(io::Error::other(why)))
        }))
    }
}

/// The request for the service.
///
/// # Errors
/// The problem of one that HTTP/1.1 would not take either.
pub fn service_request(
    request: http::Request<RecvStream>,
    client: Http2Client,
    demand: BodyDemand,
) -> Result<Request, Problem> {
    let (parts, stream) = request.into_parts();
    let payload = if stream.is_end_stream() {
        Payload::None
    } else {
        let body = StreamBody { stream, demand };
        Payload::Stream {
            payload: Box::pin(body) as _,
        }
    };
    let mut request = Request::with_payload(payload);
    let head = request.head_mut();
    head.headers = headers(&parts)?;
    head.method = Method::from_bytes(parts.method.as_str().as_bytes()).map_err(|_| malformed())?;
    head.uri = parts.uri.to_string().parse().map_err(|_| malformed())?;
    head.version = Version::HTTP_2;
    head.peer_addr = client.address;
    if client.has_certificate {
        request.extensions_mut().insert(ClientCertificate);
    }
    Ok(request)
}

/// The headers, with the host in `Host` (RFC 9113, 8.3.1).
fn headers(parts: &Parts) -> Result<HeaderMap, Problem> {
    if parts.headers.len() > HEADERS_MAX {
        return Err(Problem::new(
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            ProblemKind::LargeHead,
            format!("The head of the request has more than {HEADERS_MAX} headers"),
        ));
    }
    // The library looks at the first one.
    let lengths = parts.headers.get_all(http::header::CONTENT_LENGTH);
    if lengths.iter().nth(1).is_some() {
        let detail = "The request has more than one Content-Length";
        return Err(Problem::bad_request(ProblemKind::Request, detail));
    }
    let mut headers = HeaderMap::with_capacity(parts.headers.len() + 1);
    for (name, value) in &parts.headers {
        if name.as_str().len() > NAME_MAX {
            let detail = FramingFault::LongName.detail();
            return Err(Problem::bad_request(ProblemKind::Request, detail));
        }
        let name = HeaderName::from_bytes(name.as_str().as_bytes()).map_err(|_| malformed())?;
        let value = HeaderValue::from_bytes(value.as_bytes()).map_err(|_| malformed())?;
        headers.append(name, value);
    }
    let hosts = headers.get_all(header::HOST).count();
    match (parts.uri.authority(), hosts) {
        (Some(authority), 0) => {
            let host = HeaderValue::from_str(authority.as_str()).map_err(|_| malformed())?;
            headers.insert(header::HOST, host);
        }
        (_, 1) => {}
        _ => {
            let detail = "The request names no host, or more than one";
            return Err(Problem::bad_request(ProblemKind::Request, detail));
        }
    }
    Ok(headers)
}

fn malformed() -> Problem {
    Problem::bad_request(
        ProblemKind::Request,
        "The method, the target or a header of the request is malformed",
    )
}
