//! The POST to the API: one record, one answer.

use std::{fs, io, path::Path, sync::Arc, time::Duration};

use awc::{
    Client, ClientResponse, Connector,
    error::{ConnectError, PayloadError, SendRequestError},
    http::{
        StatusCode, Uri,
        header::{self, HeaderMap, HeaderName, HeaderValue},
    },
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use rustls::{ClientConfig, RootCertStore, pki_types::CertificateDer, pki_types::pem::PemObject as _};
use tokio::time::{Instant, timeout_at};

use crate::{config, delivery::Answer};

/// A kept-alive connection rests no longer than this. Servers close theirs after five seconds or more, and a POST that
/// meets the close has no answer.
const IDLE_MAX: Duration = Duration::from_secs(4);
/// How much of the answer to a POST that was not taken is kept.
const EXCERPT_MAX: usize = 1024;
/// An answer is read to its end, so that its connection can serve again, but no further than this.
const ANSWER_MAX: usize = 64 << 10;

/// What is read from the configuration and its files, once.
#[derive(Clone)]
pub struct Settings {
    url: Uri,
    timeout: Duration,
    concurrency: usize,
    authorization: Option<HeaderValue>,
    tls: Arc<ClientConfig>,
}

/// The configuration of the API cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("{url} is not a URL: {why}")]
    Url { url: String, why: String },
    #[error("{file}: {why}")]
    File { file: String, why: String },
}

impl Settings {
    /// # Errors
    /// When the URL or a file that is named cannot be used.
    pub fn read(config: &config::Api) -> Result<Self, ApiError> {
        let url = config.url.parse().map_err(|why| ApiError::Url { url: config.url.clone(), why: format!("{why}") })?;
        Ok(Self {
            url,
            timeout: config.timeout,
            concurrency: config.concurrency,
            authorization: config.token_file.as_deref().map(bearer).transpose()?,
            tls: Arc::new(tls(config.ca_file.as_deref())?),
        })
    }
}

fn unusable(file: &Path, why: impl ToString) -> ApiError {
    ApiError::File { file: file.display().to_string(), why: why.to_string() }
}

fn bearer(file: &Path) -> Result<HeaderValue, ApiError> {
    let token = fs::read_to_string(file).map_err(|why| unusable(file, why))?;
    if token.trim().is_empty() {
        return Err(unusable(file, "holds no token"));
    }
    let mut value = HeaderValue::from_str(&format!("Bearer {}", token.trim())).map_err(|why| unusable(file, why))?;
    value.set_sensitive(true);
    Ok(value)
}

/// Trusts the public roots, and the certificates in `ca_file`.
fn tls(ca_file: Option<&Path>) -> Result<ClientConfig, ApiError> {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    if let Some(file) = ca_file {
        let certificates = CertificateDer::pem_file_iter(file).map_err(|why| unusable(file, why))?;
        let public = roots.len();
        for certificate in certificates {
            let certificate = certificate.map_err(|why| unusable(file, why))?;
            roots.add(certificate).map_err(|why| unusable(file, why))?;
        }
        if roots.len() == public {
            return Err(unusable(file, "holds no certificate"));
        }
    }
    Ok(ClientConfig::builder().with_root_certificates(roots).with_no_client_auth())
}

/// A client of the API with its own connections. It lives on one thread.
pub struct Api {
    client: Client,
    url: Uri,
    timeout: Duration,
}

impl Api {
    #[must_use]
    pub fn new(settings: &Settings) -> Self {
        let Settings { url, timeout, concurrency, authorization, tls } = settings.clone();
        let connector = Connector::new().limit(concurrency).timeout(timeout).conn_keep_alive(IDLE_MAX).rustls_0_23(tls);
        let mut client = Client::builder()
            .connector(connector)
            // The time-out of `post` covers the whole exchange; this one would end with the answer's head.
            .disable_timeout()
            .disable_redirects()
            .add_default_header((header::CONTENT_TYPE, "application/json"));
        if let Some(token) = authorization {
            client = client.add_default_header((header::AUTHORIZATION, token));
        }
        Self { client: client.finish(), url, timeout }
    }

    /// POSTs `body` under `id`. The time-out of the configuration covers connecting, sending and the whole answer.
    pub async fn post(&self, body: Bytes, id: &str, traceparent: Option<&str>) -> Answer {
        let deadline = Instant::now() + self.timeout;
        let head = async {
            match self.send(body.clone(), id, traceparent).await {
                // A kept-alive connection that the API closed meanwhile: once more, on another. The id makes it safe.
                Err(failure) if is_disconnect(&failure) => self.send(body, id, traceparent).await,
                result => result,
            }
        };
        let mut response = match timeout_at(deadline, head).await {
            Ok(Ok(response)) => response,
            Ok(Err(failure)) => return Answer::NoAnswer(failure.to_string()),
            Err(_) => return Answer::NoAnswer(format!("no answer within {:?}", self.timeout)),
        };
        let status = response.status();
        let mut excerpt = Vec::new();
        let mut read = 0;
        // The status decides. A body that is cut short, too long or late costs its connection and nothing else.
        while read <= ANSWER_MAX
            && let Ok(Some(Ok(chunk))) = timeout_at(deadline, response.next()).await
        {
            read += chunk.len();
            if !status.is_success() {
                excerpt.extend_from_slice(&chunk[..chunk.len().min(EXCERPT_MAX - excerpt.len())]);
            }
        }
        Answer::Status {
            status: status.as_u16(),
            retry_after: retry_after(status, response.headers()),
            excerpt: String::from_utf8_lossy(&excerpt).into_owned(),
        }
    }

    /// Resolves with the answer's head.
    async fn send(
        &self,
        body: Bytes,
        id: &str,
        traceparent: Option<&str>,
    ) -> Result<ClientResponse<impl Stream<Item = Result<Bytes, PayloadError>> + use<>>, SendRequestError> {
        let mut request = self.client.post(&self.url).insert_header((IDEMPOTENCY_KEY, id));
        // The record goes without a trace rather than not at all.
        if let Some(traceparent) = traceparent.and_then(|text| HeaderValue::from_str(text).ok()) {
            request = request.insert_header((TRACEPARENT, traceparent));
        }
        request.send_body(body).await
    }
}

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

fn is_disconnect(failure: &SendRequestError) -> bool {
    match failure {
        SendRequestError::Connect(ConnectError::Disconnected) => true,
        SendRequestError::Send(failure) => {
            matches!(failure.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
        }
        _ => false,
    }
}

/// `Retry-After` as seconds or as a date (RFC 9110, 10.2.3), of an answer that is not a success.
fn retry_after(status: StatusCode, headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER).filter(|_| !status.is_success())?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    // A date that has passed asks for no pause.
    Some(date.duration_since(std::time::SystemTime::now()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn retry_after_is_read_as_seconds_or_date() {
        let read = |status: u16, text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RETRY_AFTER, HeaderValue::from_str(text).unwrap());
            retry_after(StatusCode::from_u16(status).unwrap(), &headers)
        };
        assert_eq!(read(503, "7"), Some(Duration::from_secs(7)));
        assert_eq!(read(429, " 0 "), Some(Duration::ZERO));
        assert_eq!(read(503, "Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        let soon = httpdate::fmt_http_date(SystemTime::now() + Duration::from_mins(1));
        let pause = read(503, &soon).unwrap();
        assert!((58..=60).contains(&pause.as_secs()), "{pause:?}");
        for text in ["soon", "-1", "1.5", ""] {
            assert_eq!(read(503, text), None, "{text}");
        }
        assert_eq!(read(200, "7"), None);
    }
}
