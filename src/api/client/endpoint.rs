//! A URL, and how requests to it begin.

use std::{sync::Arc, time::Duration};

use awc::{
    Client, ClientRequest, ClientResponse, Connector, FrozenClientRequest,
    http::{
        Method, StatusCode, Uri,
        header::{self, HeaderMap, HeaderValue},
    },
};
use bytes::Bytes;
use futures_util::StreamExt as _;
use rustls::ClientConfig;
use url::{Host, Position, Url};

use super::{Failure, public_roots, read};
use crate::{
    api::retry_after,
    secrets::{SigningKeys, WatchedFile},
};

/// A connection that was idle for longer is not used again.
const IDLE_MAX: Duration = Duration::from_secs(4);
/// A connection is replaced after this time, so that a new address of the server is noticed.
const LIFETIME_MAX: Duration = Duration::from_mins(5);
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

    pub(in crate::api) const fn signing_keys(&self) -> Option<&Arc<WatchedFile<SigningKeys>>> {
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

    pub(super) fn client(&self, connections: usize, connect_timeout: Duration) -> Client {
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

    pub(super) fn post(&self, client: &Client) -> ClientRequest {
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
    pub(super) fn frozen_post(
        &self,
        connections: usize,
        connect_timeout: Duration,
    ) -> FrozenClientRequest {
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

#[cfg(test)]
mod tests {
    use rustls::RootCertStore;

    use super::*;

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
