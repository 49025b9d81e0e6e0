//! The POST to the API: one record, or one batch, and one answer.

pub mod answer;
pub mod client;

use std::{cell::RefCell, fs, path::Path, pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    HeaderMap, Request, Response, StatusCode,
    body::Incoming,
    header::{self, HeaderName, HeaderValue},
};
use rustls::{ClientConfig, pki_types::CertificateDer, pki_types::pem::PemObject as _};
use tokio::time::{Instant, timeout_at};

use self::client::{Connection, Failure, Target, public_roots};
use crate::{api::answer::Answer, config};

/// A kept-alive connection that has rested for longer is not used again, and closed at the next POST. Servers close theirs after
/// five seconds or more, and a POST that meets the close has no answer.
const IDLE_MAX: Duration = Duration::from_secs(4);
/// How much of the answer to a POST that was not taken is kept.
const EXCERPT_MAX: usize = 1024;
/// An answer is read to its end, so that its connection can serve again, but no further than this.
const ANSWER_MAX: usize = 64 << 10;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// What is read from the configuration and its files, once.
#[derive(Clone)]
pub struct Settings {
    target: Target,
    timeout: Duration,
    authorization: Option<HeaderValue>,
}

/// The configuration of the API cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("{0}")]
    Url(String),
    #[error("{file}: {why}")]
    File { file: String, why: String },
}

impl Settings {
    /// # Errors
    /// When the URL or a file that is named cannot be used.
    pub fn read(config: &config::Api) -> Result<Self, ApiError> {
        let tls = Arc::new(tls(config.ca_file.as_deref())?);
        Ok(Self {
            target: Target::parse(&config.url, || tls).map_err(ApiError::Url)?,
            timeout: config.timeout,
            authorization: config.token_file.as_deref().map(bearer).transpose()?,
        })
    }
}

fn unusable(file: &Path, why: impl ToString) -> ApiError {
    ApiError::File {
        file: file.display().to_string(),
        why: why.to_string(),
    }
}

fn bearer(file: &Path) -> Result<HeaderValue, ApiError> {
    let token = fs::read_to_string(file).map_err(|why| unusable(file, why))?;
    if token.trim().is_empty() {
        return Err(unusable(file, "holds no token"));
    }
    let mut value = HeaderValue::from_str(&format!("Bearer {}", token.trim()))
        .map_err(|why| unusable(file, why))?;
    value.set_sensitive(true);
    Ok(value)
}

/// Trusts the public roots, and the certificates in `ca_file`.
fn tls(ca_file: Option<&Path>) -> Result<ClientConfig, ApiError> {
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
    Ok(ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth())
}

/// A client of the API with its own connections, as many as there are POSTs at a time. It lives on one thread.
pub struct Api {
    settings: Settings,
    /// Connections between two POSTs, the one that rests since last at the end.
    kept: RefCell<Vec<Kept>>,
}

struct Kept {
    connection: Box<Connection>,
    since: Instant,
}

impl Api {
    #[must_use]
    pub fn new(settings: &Settings) -> Self {
        Self {
            settings: settings.clone(),
            kept: RefCell::default(),
        }
    }

    /// POSTs `body` under `id`. The time-out of the configuration covers connecting, sending and the whole answer.
    pub async fn post(&self, body: Bytes, id: &str, traceparent: Option<&str>) -> Answer {
        let mut answer = None;
        {
            let exchange = pin!(async {
                let (mut connection, mut response) = match self.head(&body, id, traceparent).await {
                    Ok(head) => head,
                    Err(failure) => return answer = Some(Answer::NoAnswer(failure.to_string())),
                };
                // The status decides. A body that is cut short, too long or late costs its connection and nothing else.
                let status = response.status();
                let retry_after = retry_after(status, response.headers());
                answer = Some(Answer::Status {
                    status: status.as_u16(),
                    retry_after,
                    excerpt: String::new(),
                });
                let (mut excerpt, mut read) = (Vec::new(), 0);
                let is_whole = loop {
                    let Some(piece) = connection.read(response.body_mut()).await else {
                        break true;
                    };
                    let Ok(piece) = piece else { break false };
                    read += piece.len();
                    if read > ANSWER_MAX {
                        break false;
                    }
                    if !status.is_success() {
                        excerpt.extend_from_slice(
                            &piece[..piece.len().min(EXCERPT_MAX - excerpt.len())],
                        );
                        let excerpt = String::from_utf8_lossy(&excerpt).into_owned();
                        answer = Some(Answer::Status {
                            status: status.as_u16(),
                            retry_after,
                            excerpt,
                        });
                    }
                };
                if is_whole {
                    self.kept.borrow_mut().push(Kept {
                        connection,
                        since: Instant::now(),
                    });
                }
            });
            // What has been heard by then counts.
            timeout_at(Instant::now() + self.settings.timeout, exchange)
                .await
                .ok();
        }
        answer.unwrap_or_else(|| {
            Answer::NoAnswer(format!("no answer within {:?}", self.settings.timeout))
        })
    }

    /// Resolves with the answer's head.
    async fn head(
        &self,
        body: &Bytes,
        id: &str,
        traceparent: Option<&str>,
    ) -> Result<(Box<Connection>, Response<Incoming>), Failure> {
        // Rare, and not to make the future of every POST larger.
        let open = || Box::pin(self.settings.target.open());
        let mut connection = match self.kept() {
            Some(kept) => kept,
            None => open().await?,
        };
        match connection.send(self.request(body, id, traceparent)?).await {
            // The API may have closed it before it had the request: once more, on another. The id makes it safe.
            Err(failure) if failure.is_disconnect() => connection = open().await?,
            response => return Ok((connection, response?)),
        }
        let response = connection
            .send(self.request(body, id, traceparent)?)
            .await?;
        Ok((connection, response))
    }

    fn request(
        &self,
        body: &Bytes,
        id: &str,
        traceparent: Option<&str>,
    ) -> Result<Request<Full<Bytes>>, Failure> {
        let mut request = self.settings.target.post(body.clone(), Some(id))?;
        // The record goes without a trace rather than not at all.
        if let Some(traceparent) = traceparent.and_then(|text| HeaderValue::from_str(text).ok()) {
            request.headers_mut().insert(TRACEPARENT, traceparent);
        }
        if let Some(authorization) = &self.settings.authorization {
            request
                .headers_mut()
                .insert(header::AUTHORIZATION, authorization.clone());
        }
        Ok(request)
    }

    fn kept(&self) -> Option<Box<Connection>> {
        let mut kept = self.kept.borrow_mut();
        // Those that have rested longest come first.
        let stale = kept
            .iter()
            .take_while(|kept| kept.since.elapsed() >= IDLE_MAX)
            .count();
        kept.drain(..stale);
        Some(kept.pop()?.connection)
    }
}

/// `Retry-After` as seconds or as a date (RFC 9110, 10.2.3), of an answer that is not a success.
fn retry_after(status: StatusCode, headers: &HeaderMap) -> Option<Duration> {
    let text = headers
        .get(header::RETRY_AFTER)
        .filter(|_| !status.is_success())?
        .to_str()
        .ok()?
        .trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    // A date that has passed asks for no pause.
    Some(
        date.duration_since(std::time::SystemTime::now())
            .unwrap_or_default(),
    )
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
        assert_eq!(
            read(503, "Sun, 06 Nov 1994 08:49:37 GMT"),
            Some(Duration::ZERO)
        );
        let soon = httpdate::fmt_http_date(SystemTime::now() + Duration::from_mins(1));
        let pause = read(503, &soon).unwrap();
        assert!((58..=60).contains(&pause.as_secs()), "{pause:?}");
        for text in ["soon", "-1", "1.5", ""] {
            assert_eq!(read(503, text), None, "{text}");
        }
        assert_eq!(read(200, "7"), None);
    }
}
