//! The HTTP client: a thin layer over `awc` that POSTs records and asks a node questions.
//!
//! awc leaves these cases to its user, and this file handles them:
//! - A pool has a limit, and a request beyond it waits. The limit is the number of requests that
//!   may be in flight.
//! - Servers close a connection that is idle for five seconds or more. Ours is not used again after
//!   `IDLE_MAX`.
//! - A server may close a connection while a request is on its way. A POST that has an
//!   `Idempotency-Key` is sent once more, over a new connection.
//! - A server may refuse a large request before it has read the body, and close. awc fails to write
//!   the rest of the body and drops the answer. The second try asks for permission before it sends
//!   the body (`Expect: 100-continue`), and so gets the answer.
//! - A body that is cut short ends like a whole one. [`read`] compares its length with
//!   `Content-Length`.
//! - awc returns an interim answer (1xx), or a head without a length, as a whole answer and keeps
//!   the connection. The rest would be read as the answer to the next request, so all kept
//!   connections are closed. An interim answer is an error: what follows it cannot be read.
//! - awc follows redirects, and its time-out ends with the head. Both are off; the caller has one
//!   time-out for the exchange.

mod endpoint;
mod signature;

use std::{cell::RefCell, time::Duration};

use actix_web::error::ParseError;
use awc::{
    ClientResponse, FrozenClientRequest,
    error::{ConnectError, SendRequestError},
    http::{
        StatusCode, Version,
        header::{self, HeaderMap, HeaderName, HeaderValue, InvalidHeaderValue},
    },
};
use bytes::Bytes;
use futures_util::StreamExt as _;
use rustls::RootCertStore;

pub use self::endpoint::{AnswerStream, Endpoint};
use self::signature::signature;
use super::answer::FailureClass;
use crate::record::TraceHeaders;

/// A socket takes a body of this size at once (it is the default send buffer of Linux), so the
/// answer is read even if the server closes the connection.
const SMALL_BODY: usize = 16 << 10;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

pub(super) fn public_roots() -> RootCertStore {
    RootCertStore {
        roots: webpki_roots::TLS_SERVER_ROOTS.to_vec(),
    }
}

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("{0}")]
    Header(#[from] InvalidHeaderValue),
    #[error("cannot connect: {0}")]
    Connect(ConnectError),
    /// The server closed the connection, before it had the request or after.
    #[error("the connection was closed: {0}")]
    Closed(String),
    #[error("the answer cannot be used: {0}")]
    Unusable(String),
}

impl Failure {
    pub(super) const fn class(&self) -> FailureClass {
        match self {
            Self::Connect(ConnectError::Timeout) => FailureClass::Timeout,
            Self::Connect(_) => FailureClass::Connect,
            Self::Closed(_) => FailureClass::Closed,
            Self::Header(_) | Self::Unusable(_) => FailureClass::Unusable,
        }
    }
}

impl From<SendRequestError> for Failure {
    fn from(why: SendRequestError) -> Self {
        match why {
            // awc uses this for an open connection that ends before the answer.
            SendRequestError::Connect(ConnectError::Disconnected) => {
                Self::Closed("no answer came".into())
            }
            SendRequestError::Connect(why) => Self::Connect(why),
            SendRequestError::Send(why) | SendRequestError::Response(ParseError::Io(why)) => {
                Self::Closed(why.to_string())
            }
            why => Self::Unusable(why.to_string()),
        }
    }
}

/// POSTs JSON to one endpoint over connections that it keeps. It lives on one thread.
pub struct HttpClient {
    endpoint: Endpoint,
    connections: usize,
    connect_timeout: Duration,
    /// The POST with the headers that all POSTs share, and the pool that it is sent over.
    post: RefCell<FrozenClientRequest>,
}

impl HttpClient {
    /// A client that opens at most `connections`; a request beyond them waits.
    pub fn new(endpoint: Endpoint, connections: usize, connect_timeout: Duration) -> Self {
        let post = RefCell::new(endpoint.frozen_post(connections, connect_timeout));
        Self {
            endpoint,
            connections,
            connect_timeout,
            post,
        }
    }

    /// POSTs `body` with these `headers` beside those of the key and the trace context, and gives
    /// the answer to `finish`, which may read its body. If the connection is
    /// closed before `finish` has ended, and `key` makes that safe, both are done once more over a
    /// new connection.
    ///
    /// # Errors
    /// When no answer can come, or `finish` fails.
    pub async fn post<T>(
        &self,
        body: &Bytes,
        key: Option<&str>,
        trace: Option<&TraceHeaders>,
        headers: &HeaderMap,
        mut finish: impl AsyncFnMut(ClientResponse) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut is_second_try = false;
        loop {
            let asks_first = is_second_try && body.len() > SMALL_BODY;
            let ended = match self.send(body, key, trace, headers, asks_first).await {
                Ok(response) => finish(response).await,
                Err(failure) => Err(failure),
            };
            match ended {
                Err(Failure::Closed(_)) if key.is_some() && !is_second_try => {
                    is_second_try = true;
                    // A server that has closed one kept connection has most often closed all.
                    self.close_kept();
                }
                ended => return ended,
            }
        }
    }

    async fn send(
        &self,
        body: &Bytes,
        key: Option<&str>,
        trace: Option<&TraceHeaders>,
        headers: &HeaderMap,
        asks_first: bool,
    ) -> Result<ClientResponse, Failure> {
        let mut headers = headers.clone();
        headers.reserve(2);
        if let Some(key) = key {
            headers.insert(IDEMPOTENCY_KEY, HeaderValue::from_str(key)?);
        }
        if let (Some(keys), Some(key)) = (self.endpoint.signing_keys(), key) {
            for (name, value) in signature(&keys.get(), key, body) {
                headers.insert(name, HeaderValue::from_str(&value)?);
            }
        }
        // The record goes without a trace rather than not at all.
        if let Some(trace) = trace
            && let Ok(parent) = HeaderValue::from_str(trace.parent())
        {
            headers.insert(TRACEPARENT, parent);
            let state = trace.state().map(HeaderValue::from_str);
            if let Some(Ok(state)) = state {
                headers.insert(TRACESTATE, state);
            }
        }
        let sending = if asks_first {
            let client = self.endpoint.client(1, self.connect_timeout);
            let mut post = self.endpoint.post(&client);
            for header in headers {
                post = post.insert_header(header);
            }
            post.insert_header((header::EXPECT, "100-continue"))
                .send_body(body.clone())
        } else {
            self.post
                .borrow()
                .extra_headers(headers)
                .send_body(body.clone())
        };
        let response = sending.await?;
        if has_more_to_come(&response) {
            self.close_kept();
            let status = response.status();
            if status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS {
                let why = format!("it begins with {status}, and the client reads no further");
                return Err(Failure::Unusable(why));
            }
        }
        Ok(response)
    }

    /// Closes the kept connections. Requests in flight go on.
    fn close_kept(&self) {
        let post = self
            .endpoint
            .frozen_post(self.connections, self.connect_timeout);
        self.post.replace(post);
    }
}

/// awc has kept the connection as if the answer had ended with its head, and the server may send
/// more of it.
fn has_more_to_come(response: &ClientResponse) -> bool {
    let status = response.status();
    let headers = response.headers();
    let has_end = headers.contains_key(header::CONTENT_LENGTH)
        || headers.contains_key(header::TRANSFER_ENCODING)
        || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
        // Its body ends with the connection, and awc keeps no such connection.
        || response.version() == Version::HTTP_10;
    !has_end || status.is_informational()
}

/// Gives each piece of the body of `response` to `take`, up to the end, so that its connection can
/// serve again.
///
/// # Errors
/// When the body is cut short, or longer than `max` bytes. Its connection is closed then.
pub async fn read(
    mut response: ClientResponse,
    max: usize,
    mut take: impl FnMut(&[u8]),
) -> Result<(), Failure> {
    let mut length = 0;
    while let Some(piece) = response.next().await {
        let piece = piece.map_err(|why| Failure::Closed(why.to_string()))?;
        length += piece.len();
        if length > max {
            return Err(Failure::Unusable(format!("it is longer than {max} bytes")));
        }
        take(&piece);
    }
    let expected = response.headers().get(header::CONTENT_LENGTH);
    let expected = expected.and_then(|text| text.to_str().ok()?.trim().parse::<usize>().ok());
    if expected.is_some_and(|expected| length < expected) {
        return Err(Failure::Closed("the answer is cut short".into()));
    }
    Ok(())
}
