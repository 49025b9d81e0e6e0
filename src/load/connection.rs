//! One user's connection: kept alive, opened when there is none.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Request, StatusCode, Uri,
    client::conn::http1::{self, SendRequest},
    header,
};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;

/// A request that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The status, or why there was none.
pub(super) type Answer = Result<StatusCode, String>;

/// Where records are posted.
#[derive(Clone, Debug)]
pub struct Target {
    host: String,
    port: u16,
    authority: String,
    path: String,
    tls: Option<Arc<ClientConfig>>,
}

impl Target {
    /// # Errors
    /// When `url` is no `http://` or `https://` URL.
    pub fn parse(url: &str) -> Result<Self, String> {
        let uri: Uri = url.parse().map_err(|why| format!("{url} is not a URL: {why}"))?;
        let is_tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(format!("{url} is not an http:// or https:// URL")),
        };
        let authority = uri.authority().ok_or_else(|| format!("{url} names no host"))?;
        let tls = is_tls.then(|| {
            let roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
            Arc::new(ClientConfig::builder().with_root_certificates(roots).with_no_client_auth())
        });
        Ok(Self {
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: authority.port_u16().unwrap_or(if is_tls { 443 } else { 80 }),
            authority: authority.to_string(),
            path: uri.path_and_query().map_or_else(|| "/".to_owned(), ToString::to_string),
            tls,
        })
    }
}

trait Socket: AsyncRead + AsyncWrite + Unpin {}

impl<S: AsyncRead + AsyncWrite + Unpin> Socket for S {}

pub(super) struct Connection<'t> {
    target: &'t Target,
    sender: Option<SendRequest<Full<Bytes>>>,
}

impl<'t> Connection<'t> {
    pub fn new(target: &'t Target) -> Self {
        Self { target, sender: None }
    }

    /// Posts `record`, under `key` if there is one, and reads the answer to its end.
    pub async fn post(&mut self, key: Option<&str>, record: &Bytes) -> Answer {
        let exchange = async {
            if self.sender.is_some() {
                match self.exchange(key, record).await {
                    // The server may have closed it while it was idle: the key keeps a second try from being a second record.
                    Err(_) if key.is_some() => {}
                    answer => return answer,
                }
            }
            self.sender = Some(self.open().await?);
            self.exchange(key, record).await
        };
        let answer = timeout(TIMEOUT, exchange).await.unwrap_or_else(|_| Err(format!("no answer within {TIMEOUT:?}")));
        if answer.is_err() {
            self.sender = None;
        }
        answer
    }

    async fn exchange(&mut self, key: Option<&str>, record: &Bytes) -> Answer {
        let sender = self.sender.as_mut().ok_or("not connected")?;
        let mut request = Request::post(&*self.target.path)
            .header(header::HOST, &*self.target.authority)
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = key {
            request = request.header("Idempotency-Key", key);
        }
        let request = request.body(Full::new(record.clone())).map_err(|why| why.to_string())?;
        let told = |why: hyper::Error| innermost(&why);
        sender.ready().await.map_err(told)?;
        let mut answer = sender.send_request(request).await.map_err(told)?;
        while let Some(frame) = answer.body_mut().frame().await {
            frame.map_err(told)?;
        }
        Ok(answer.status())
    }

    async fn open(&self) -> Result<SendRequest<Full<Bytes>>, String> {
        let Target { host, port, tls, .. } = self.target;
        let failed = |why: std::io::Error| innermost(&why);
        let stream = TcpStream::connect((&**host, *port)).await.map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        let socket: Box<dyn Socket> = match tls {
            None => Box::new(stream),
            Some(tls) => {
                let name = ServerName::try_from(host.clone()).map_err(|why| why.to_string())?;
                let connector = TlsConnector::from(Arc::clone(tls));
                Box::new(connector.connect(name, stream).await.map_err(failed)?)
            }
        };
        let (sender, connection) = http1::handshake(TokioIo::new(socket)).await.map_err(|why| innermost(&why))?;
        // Its failure is also that of the request under way.
        actix_rt::spawn(connection);
        Ok(sender)
    }
}

/// The cause that names the trouble of the socket.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(cause) = innermost.source() {
        innermost = cause;
    }
    innermost.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_a_url_with_scheme_and_host() {
        for (url, host, port, path) in [
            ("http://127.0.0.1:8000", "127.0.0.1", 8000, "/"),
            ("https://node.example/nats", "node.example", 443, "/nats"),
            ("http://[::1]/a?b=c", "::1", 80, "/a?b=c"),
        ] {
            let target = Target::parse(url).unwrap();
            assert_eq!((&*target.host, target.port, &*target.path), (host, port, path), "{url}");
        }
        for url in ["node:8000", "127.0.0.1:8000", "/nats", "ftp://node/", "http://"] {
            Target::parse(url).expect_err(url);
        }
    }
}
