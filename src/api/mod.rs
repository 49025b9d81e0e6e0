//! The POST to the API: a record or a batch goes out, one answer comes back.

pub mod answer;
pub mod client;
pub mod content;
pub mod gate;
pub mod limit;
pub mod rate;

use std::{
    fmt,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use awc::{
    ClientResponse,
    http::{
        StatusCode,
        header::{self, HeaderMap, HeaderValue},
    },
};
use bytes::Bytes;
use rustls::{
    ClientConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tokio::time::timeout;

use self::client::{Endpoint, HttpClient, public_roots, read};
use crate::{
    api::answer::{Answer, FailureClass},
    config,
    record::TraceHeaders,
    secrets::{SigningKeys, WatchedFile, only_token},
};

/// The most bytes of an answer's body that a dead letter keeps.
const EXCERPT_MAX: usize = 1024;
/// The beginning of the excerpt of a 410.
const GONE: &str = "the API is gone: it asks for no more POSTs\n";
/// An answer is read to its end, so that its connection can serve again, but no further than this.
const ANSWER_MAX: usize = 64 << 10;

/// The settings of the API, read once from the configuration and its files.
#[derive(Clone)]
pub struct Settings {
    endpoint: Endpoint,
    timeout: Duration,
    /// POSTs that may be in flight.
    concurrency: usize,
    retry_statuses: config::RetryStatuses,
}

/// The most deliveries that a lane hands over, however many records a POST may have.
const BATCHED_MAX: usize = 1024;

/// How much a lane sends to an API at a time.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// POSTs in flight.
    pub posts: usize,
    /// Records of a POST; with more than one, its body is a JSON array.
    pub batch: usize,
}

impl Limits {
    /// Deliveries that the lane may hand over.
    pub fn deliveries(self) -> usize {
        let batched = self.posts.saturating_mul(self.batch).min(BATCHED_MAX);
        self.posts.max(batched)
    }
}

/// The configuration of the API cannot be used. The text names the URL or the file.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ApiError(String);

impl Settings {
    /// `section` of the configuration is `config`.
    ///
    /// # Errors
    /// When the URL or a file that is named cannot be used.
    pub fn read(section: &str, config: &config::ApiConfig) -> Result<Self, ApiError> {
        let tls = Arc::new(client_tls(config.ca_file.as_deref(), None)?);
        let authorization = config.token_file.as_deref().map(|file| {
            let token = only_token(file).map_err(ApiError)?;
            bearer(&token)
        });
        let authorization = authorization.transpose()?;
        let endpoint = Endpoint::parse(&config.url, || tls).map_err(ApiError)?;
        let signing_keys = config.signing_key_file.as_deref().map(|path| {
            let named = path.to_owned();
            let key = format!("{section}.signing_key_file");
            WatchedFile::open(key, [path], move |_| SigningKeys::read(&named))
        });
        let signing_keys = signing_keys.transpose().map_err(ApiError)?.map(Arc::new);
        Ok(Self {
            endpoint: endpoint
                .with_authorization(authorization)
                .with_signing_keys(signing_keys),
            timeout: config.timeout,
            concurrency: config.concurrency,
            retry_statuses: config.retry_statuses.clone(),
        })
    }
}

impl Settings {
    /// The keys that sign the POSTs, if there are any.
    pub const fn signing_keys(&self) -> Option<&Arc<WatchedFile<SigningKeys>>> {
        self.endpoint.signing_keys()
    }

    /// The status of the answer to a GET, which may take up to `patience`.
    ///
    /// # Errors
    /// When no connection is open within `patience`, or no answer can be read.
    pub async fn ask(&self, patience: Duration) -> Result<StatusCode, client::Failure> {
        self.endpoint.status(patience).await
    }
}

fn unusable(file: &Path, why: impl fmt::Display) -> ApiError {
    ApiError(format!("{}: {why}", file.display()))
}

/// The header `Authorization` with this token.
///
/// # Errors
/// When the token has characters that no header takes.
pub fn bearer(token: &str) -> Result<HeaderValue, ApiError> {
    let value = HeaderValue::from_str(&format!("Bearer {token}"));
    let mut value = value.map_err(|why| ApiError(why.to_string()))?;
    value.set_sensitive(true);
    Ok(value)
}

/// Trusts the public roots, and the certificates in `ca_file`. `identity` is the certificate chain that
/// the client presents, and its key.
///
/// # Errors
/// When a file cannot be used.
pub fn client_tls(
    ca_file: Option<&Path>,
    identity: Option<(&Path, &Path)>,
) -> Result<ClientConfig, ApiError> {
    let mut roots = public_roots();
    if let Some(file) = ca_file {
        let certificates =
            CertificateDer::pem_file_iter(file).map_err(|why| unusable(file, why))?;
        let public = roots.len();
        for certificate in certificates {
            let certificate = certificate.map_err(|why| unusable(file, why))?;
            roots.add(certificate).map_err(|why| unusable(file, why))?;
        }
        if roots.len() == public {
            return Err(unusable(file, "holds no certificate"));
        }
    }
    let builder = ClientConfig::builder().with_root_certificates(roots);
    let Some((cert, key_file)) = identity else {
        return Ok(builder.with_no_client_auth());
    };
    let chain = CertificateDer::pem_file_iter(cert).and_then(Iterator::collect);
    let chain = chain.map_err(|_| unusable(cert, "holds no certificate in PEM"))?;
    let key = PrivateKeyDer::from_pem_file(key_file);
    let key = key.map_err(|_| unusable(key_file, "holds no private key in PEM"))?;
    let config = builder.with_client_auth_cert(chain, key);
    config.map_err(|_| unusable(key_file, "is not the key of the certificate"))
}

/// A client of the API. It lives on one thread.
pub struct Api {
    client: HttpClient,
    timeout: Duration,
    retry_statuses: config::RetryStatuses,
}

impl Api {
    pub fn new(settings: &Settings) -> Self {
        let timeout = settings.timeout;
        let client = HttpClient::new(settings.endpoint.clone(), settings.concurrency, timeout);
        Self {
            client,
            timeout,
            retry_statuses: settings.retry_statuses.clone(),
        }
    }

    /// POSTs `body` under `id`. The time-out of the configuration covers connecting, sending and
    /// the whole answer.
    pub async fn post(&self, body: Bytes, id: &str, trace: Option<&TraceHeaders>) -> Answer {
        let headers = HeaderMap::new();
        self.post_with(body, id, trace, &headers).await
    }

    /// The same with these `headers` beside those of every POST.
    pub async fn post_with(
        &self,
        body: Bytes,
        id: &str,
        trace: Option<&TraceHeaders>,
        headers: &HeaderMap,
    ) -> Answer {
        let mut head = None;
        let mut excerpt = Vec::new();
        let finish = async |response: ClientResponse| {
            let status = response.status();
            head = Some((status, retry_after(status, response.headers())));
            let keep = if status.is_success() { 0 } else { EXCERPT_MAX };
            // An operator can correct the URL by it. The redirect is not followed.
            if status.is_redirection()
                && let Some(location) = response.headers().get(header::LOCATION)
            {
                excerpt.extend_from_slice(b"Location: ");
                excerpt.extend_from_slice(location.as_bytes());
                excerpt.push(b'\n');
                excerpt.truncate(keep);
            }
            // Standard Webhooks: whoever answers so wants no more.
            if status == StatusCode::GONE {
                excerpt.extend_from_slice(GONE.as_bytes());
            }
            let body = read(response, ANSWER_MAX, |piece| {
                excerpt.extend_from_slice(&piece[..piece.len().min(keep - excerpt.len())]);
            });
            // The status decides. A body that is cut short or too long costs its connection and
            // nothing else.
            body.await.ok();
            Ok(())
        };
        let exchange = self.client.post(&body, Some(id), trace, headers, finish);
        let ended = timeout(self.timeout, exchange).await;
        match (head, ended) {
            (Some((status, retry_after)), _) => Answer::Status {
                status: status.as_u16(),
                is_retryable: self.retry_statuses.contains(status.as_u16()),
                retry_after,
                excerpt: String::from_utf8_lossy(excerpt.trim_ascii_end()).into_owned(),
            },
            (None, Ok(Err(failure))) => Answer::NoAnswer {
                class: failure.class(),
                why: failure.to_string(),
            },
            (None, _) => Answer::NoAnswer {
                class: FailureClass::Timeout,
                why: format!("no answer within {:?}", self.timeout),
            },
        }
    }
}

/// `Retry-After` of an answer that is not a success: seconds or a date (RFC 9110, 10.2.3).
///
/// The header has one value. A server and a proxy before it may each add one; the longest pause
/// suits both.
pub(super) fn retry_after(status: StatusCode, headers: &HeaderMap) -> Option<Duration> {
    if status.is_success() {
        return None;
    }
    let lines = headers.get_all(header::RETRY_AFTER);
    let pauses = lines.filter_map(|line| pause(line.to_str().ok()?.trim()));
    pauses.max()
}

/// The longest pause that `text` asks for.
fn pause(text: &str) -> Option<Duration> {
    match httpdate::parse_http_date(text) {
        // A date that has passed asks for no pause.
        Ok(date) => Some(date.duration_since(SystemTime::now()).unwrap_or_default()),
        Err(_) => text
            .split(',')
            .filter_map(|part| seconds(part.trim()))
            .max(),
    }
}

/// The digits of `text` as seconds. A number without end is a pause without end. A fraction is not
/// valid, but what it asks for is clear; it is rounded up.
fn seconds(text: &str) -> Option<Duration> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|at| at.is_ascii_digit());
    if !is_number(whole) || !is_number(fraction) {
        return None;
    }
    // The only failure of digits is a number over 64 bits.
    let whole = whole.parse().unwrap_or(u64::MAX);
    let rest = u64::from(fraction.bytes().any(|digit| digit != b'0'));
    Some(Duration::from_secs(whole.saturating_add(rest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_read_as_seconds_or_date() {
        let read = |status: u16, lines: &[&str]| {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(header::RETRY_AFTER, HeaderValue::from_str(line).unwrap());
            }
            retry_after(StatusCode::from_u16(status).unwrap(), &headers)
        };
        let digits = "9".repeat(100);
        for (lines, seconds) in [
            (&["7"][..], 7),
            (&[" 0 "], 0),
            (&["007"], 7),
            (&["18446744073709551615"], u64::MAX),
            (&["18446744073709551616"], u64::MAX),
            (&["18446744073709551615.5"], u64::MAX),
            (&[&digits], u64::MAX),
            (&["1.0"], 1),
            (&["1.5"], 2),
            (&["0.001"], 1),
            (&["5, 120"], 120),
            (&["120,soon, 5"], 120),
            (&["5", "120", "7"], 120),
            (&["soon", "5"], 5),
            (&["Sun, 06 Nov 1994 08:49:37 GMT"], 0),
            (&["Sunday, 06-Nov-94 08:49:37 GMT"], 0),
            (&["Sun Nov  6 08:49:37 1994"], 0),
            (&["Sun, 06 Nov 1994 08:49:37 GMT", "5"], 5),
        ] {
            let pause = Some(Duration::from_secs(seconds));
            assert_eq!(read(503, lines), pause, "{lines:?}");
        }
        let soon = httpdate::fmt_http_date(SystemTime::now() + Duration::from_mins(1));
        let pause = read(429, &[&soon]).unwrap();
        assert!((58..=60).contains(&pause.as_secs()), "{pause:?}");
        for nothing in [
            "soon", "-1", "+1", "1.", ".5", "1.5.2", "1e3", "1 2", "", ",",
        ] {
            assert_eq!(read(503, &[nothing]), None, "{nothing}");
        }
        assert_eq!(read(200, &["7"]), None);
    }
}
