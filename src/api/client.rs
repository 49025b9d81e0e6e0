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

use std::{cell::RefCell, sync::Arc, time::Duration};

use actix_web::error::ParseError;
use awc::{
    Client, ClientRequest, ClientResponse, Connector, FrozenClientRequest,
    error::{ConnectError, SendRequestError},
    http::{
        Method, StatusCode, Uri, Version,
        header::{self, HeaderMap, HeaderName, HeaderValue, InvalidHeaderValue},
    },
};
use bytes::Bytes;
use futures_util::StreamExt as _;
use ring::digest::{SHA256, digest};
use rustls::{ClientConfig, RootCertStore};
use url::{Host, Position, Url};

use super::{answer::FailureClass, retry_after};
use crate::{
    clock::system_unix_s,
    record::TraceHeaders,
    secrets::{SigningKeys, WatchedFile},
};

/// A connection that was idle for longer is not used again.
const IDLE_MAX: Duration = Duration::from_secs(4);
/// A connection is replaced after this time, so that a new address of the server is noticed.
const LIFETIME_MAX: Duration = Duration::from_mins(5);

/// A socket takes a body of this size at once (it is the default send buffer of Linux), so the
/// answer is read even if the server closes the connection.
const SMALL_BODY: usize = 16 << 10;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
/// The most characters of a `webhook-id` that is no digest: as many as an Idempotency-Key has.
const WEBHOOK_ID_MAX: usize = 255;
const WEBHOOK_ID: HeaderName = HeaderName::from_static("webhook-id");
const WEBHOOK_TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const WEBHOOK_SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");
const USER_AGENT: &str = concat!("waypost/", env!("CARGO_PKG_VERSION"));

/// The URL that requests go to, the trusted certificates, and the token.
#[derive(Clone, Debug)]
pub struct Endpoint {
    uri: Uri,
    /// The header `Host`.
    host: HeaderValue,
    authorization: Option<HeaderValue>,
    /// More headers of each POST, in the place of those that it would have.
    headers: HeaderMap,
    tls: Option<Arc<ClientConfig>>,
    signing_keys: Option<Arc<WatchedFile<SigningKeys>>>,
}

impl Endpoint {
    /// Reads `url`. An HTTPS server must have a certificate that the public roots vouch for.
    ///
    /// # Errors
    /// When `url` is no usable `http://` or `https://` URL.
    pub fn with_public_roots(url: &str) -> Result<Self, String> {
        Self::parse(url, || {
            Arc::new(
                ClientConfig::builder()
                    .with_root_certificates(public_roots())
                    .with_no_client_auth(),
            )
        })
    }

    /// Reads `url`. `tls` makes the TLS configuration of an HTTPS URL.
    ///
    /// # Errors
    /// When `url` is no usable `http://` or `https://` URL.
    pub fn parse(text: &str, tls: impl FnOnce() -> Arc<ClientConfig>) -> Result<Self, String> {
        let mut url = Url::parse(text).map_err(|why| format!("{text} is not a URL: {why}"))?;
        let is_tls = url.scheme() == "https";
        if !is_tls && url.scheme() != "http" {
            return Err(format!("{text} is not an http:// or https:// URL"));
        }
        if is_tls && matches!(url.host(), Some(Host::Ipv6(_))) {
            return Err(format!(
                "{text}: HTTPS to an IPv6 address is not supported; use a host name"
            ));
        }
        // A login is no part of `Host` (RFC 9110, 7.2). Every HTTP URL can do without.
        url.set_username("").ok();
        url.set_password(None).ok();
        let host = &url[Position::BeforeHost..Position::AfterPort];
        Ok(Self {
            host: HeaderValue::from_str(host).map_err(|why| format!("{text}: {why}"))?,
            uri: url
                .as_str()
                .parse()
                .map_err(|why| format!("{text}: {why}"))?,
            authorization: None,
            headers: HeaderMap::new(),
            tls: is_tls.then(tls),
            signing_keys: None,
        })
    }

    /// Each request carries this header `Authorization`.
    #[must_use]
    pub fn with_authorization(mut self, value: Option<HeaderValue>) -> Self {
        self.authorization = value;
        self
    }

    /// Each POST with a key is signed, as Standard Webhooks has it.
    #[must_use]
    pub fn with_signing_keys(mut self, keys: Option<Arc<WatchedFile<SigningKeys>>>) -> Self {
        self.signing_keys = keys;
        self
    }

    pub(super) const fn signing_keys(&self) -> Option<&Arc<WatchedFile<SigningKeys>>> {
        self.signing_keys.as_ref()
    }

    /// Each POST carries these headers, in the place of those of their names that it would have.
    #[must_use]
    pub fn with_headers(mut self, headers: HeaderMap) -> Self {
        self.headers = headers;
        self
    }

    /// Sends one request over a connection of its own: a POST of `json`, or a GET. Returns the
    /// status, the pause that the server asks for before the next try, and the body.
    ///
    /// # Errors
    /// When no connection is open within `connect_timeout`, or there is no whole answer of at most
    /// `max` bytes. The answer may take any time.
    pub async fn ask(
        &self,
        json: Option<Bytes>,
        connect_timeout: Duration,
        max: usize,
    ) -> Result<(StatusCode, Option<Duration>, Vec<u8>), Failure> {
        let client = self.client(1, connect_timeout);
        let response = match json {
            Some(json) => self.post(&client).send_body(json).await?,
            None => self.request(&client, Method::GET).send().await?,
        };
        let status = response.status();
        let pause = retry_after(status, response.headers());
        let mut body = Vec::new();
        read(response, max, |piece| body.extend_from_slice(piece)).await?;
        Ok((status, pause, body))
    }

    /// Opens a stream over a connection of its own: a GET whose answer goes on for as long as the
    /// server likes.
    ///
    /// # Errors
    /// When no connection is open within `connect_timeout`, or no head of an answer can be read.
    pub async fn open(
        &self,
        connect_timeout: Duration,
        headers: HeaderMap,
    ) -> Result<AnswerStream, Failure> {
        let client = self.client(1, connect_timeout);
        let mut request = self.request(&client, Method::GET);
        for header in headers {
            request = request.insert_header(header);
        }
        let response = request.send().await?;
        Ok(AnswerStream { client, response })
    }

    /// The status of the answer to a GET. The rest of the answer is not read.
    ///
    /// # Errors
    /// When no connection is open within `connect_timeout`, or no head of an answer can be read.
    pub async fn status(&self, connect_timeout: Duration) -> Result<StatusCode, Failure> {
        let client = self.client(1, connect_timeout);
        let response = self.request(&client, Method::GET).send().await?;
        Ok(response.status())
    }

    fn client(&self, connections: usize, connect_timeout: Duration) -> Client {
        let mut connector = Connector::new()
            .limit(connections)
            .conn_keep_alive(IDLE_MAX)
            .conn_lifetime(LIFETIME_MAX)
            .timeout(connect_timeout)
            .handshake_timeout(connect_timeout);
        if let Some(tls) = &self.tls {
            connector = connector.rustls_0_23(Arc::clone(tls));
        }
        Client::builder()
            .connector(connector)
            .disable_timeout()
            .disable_redirects()
            .finish()
    }

    fn request(&self, client: &Client, method: Method) -> ClientRequest {
        let request = client
            .request(method, self.uri.clone())
            .no_decompress()
            .insert_header((header::HOST, self.host.clone()))
            .insert_header((header::USER_AGENT, HeaderValue::from_static(USER_AGENT)));
        match &self.authorization {
            Some(value) => request.insert_header((header::AUTHORIZATION, value.clone())),
            None => request,
        }
    }

    fn post(&self, client: &Client) -> ClientRequest {
        let mut post = self
            .request(client, Method::POST)
            .content_type(HeaderValue::from_static("application/json"));
        for name in self.headers.keys() {
            post.headers_mut().remove(name);
        }
        for (name, value) in &self.headers {
            post = post.append_header((name.clone(), value.clone()));
        }
        post
    }

    /// A POST whose head is built once, over a pool of its own.
    fn frozen_post(&self, connections: usize, connect_timeout: Duration) -> FrozenClientRequest {
        let client = self.client(connections, connect_timeout);
        // `parse` has checked the scheme, the host and the headers, and nothing else can fail.
        self.post(&client).freeze().expect("a valid request")
    }
}

/// An answer that is read as it comes.
pub struct AnswerStream {
    #[expect(dead_code, reason = "its connection may live as long as its client")]
    client: Client,
    response: ClientResponse,
}

impl AnswerStream {
    pub fn status(&self) -> StatusCode {
        self.response.status()
    }

    /// The next piece of the body; `None` at its end.
    ///
    /// # Errors
    /// When the connection is closed before.
    pub async fn next(&mut self) -> Option<Result<Bytes, Failure>> {
        let piece = self.response.next().await?;
        Some(piece.map_err(|why| Failure::Closed(why.to_string())))
    }
}

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
        if let (Some(keys), Some(key)) = (&self.endpoint.signing_keys, key) {
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

/// The headers that sign a POST under `key`, at this attempt's time.
fn signature(keys: &SigningKeys, key: &str, body: &[u8]) -> [(HeaderName, String); 3] {
    let id = webhook_id(key);
    let timestamp = system_unix_s();
    let signature = keys.sign(&id, timestamp, body);
    [
        (WEBHOOK_ID, id),
        (WEBHOOK_TIMESTAMP, timestamp.to_string()),
        (WEBHOOK_SIGNATURE, signature),
    ]
}

/// The id that a POST under `key` is signed with. A full stop would blur where the id ends in what is
/// signed, and the ids of a batch are longer than servers take in a line, once they are coded.
fn webhook_id(key: &str) -> String {
    let id = key.replace('%', "%25").replace('.', "%2E");
    if id.len() <= WEBHOOK_ID_MAX {
        return id;
    }
    let digest = digest(&SHA256, key.as_bytes());
    let digest = Bytes::copy_from_slice(digest.as_ref());
    format!("sha256:{digest:x}")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_webhook_id_has_no_full_stop_and_is_a_digest_if_it_is_long() {
        assert_eq!(webhook_id("a.b%c"), "a%2Eb%25c");
        let most = "k".repeat(WEBHOOK_ID_MAX);
        assert_eq!(webhook_id(&most), most);
        // `printf 'a.%0253d' 0 | sha256sum`
        let digest = webhook_id(&format!("a.{}", "0".repeat(253)));
        assert_eq!(
            digest,
            "sha256:05b23f2d3b79516a0390352a82a6ffd549b07123b744abcb4233f51327f0f0e1"
        );
    }

    #[test]
    fn an_endpoint_is_a_url_with_scheme_and_host() {
        let parse = |url| Endpoint::parse(url, || unreachable!("nothing here is trusted"));
        for (url, uri, host) in [
            (
                "http://127.0.0.1:8000",
                "http://127.0.0.1:8000/",
                "127.0.0.1:8000",
            ),
            (
                "http://me:secret@node.example/nats",
                "http://node.example/nats",
                "node.example",
            ),
            ("http://[::1]/a?b=c", "http://[::1]/a?b=c", "[::1]"),
            (
                "HTTP://Node.Example/Año nuevo?b=ñ",
                "http://node.example/A%C3%B1o%20nuevo?b=%C3%B1",
                "node.example",
            ),
            (
                "http://bücher.example/%C3%B1",
                "http://xn--bcher-kva.example/%C3%B1",
                "xn--bcher-kva.example",
            ),
            (
                "http://node.example?b=c",
                "http://node.example/?b=c",
                "node.example",
            ),
        ] {
            let endpoint = parse(url).unwrap();
            assert_eq!(endpoint.uri.to_string(), uri, "{url}");
            assert_eq!(endpoint.host, host, "{url}");
            endpoint.frozen_post(1, Duration::from_secs(1));
        }
        for url in [
            "node:8000",
            "127.0.0.1:8000",
            "/nats",
            "ftp://node/",
            "http://",
            "https://[::1]/",
        ] {
            parse(url).expect_err(url);
        }
        let no_roots = || {
            Arc::new(
                ClientConfig::builder()
                    .with_root_certificates(RootCertStore::empty())
                    .with_no_client_auth(),
            )
        };
        let endpoint = Endpoint::parse("https://node.example", no_roots).unwrap();
        assert!(endpoint.tls.is_some());
    }
}
