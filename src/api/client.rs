//! One kept-alive HTTP/1.1 connection: what records are POSTed through, and what a node is asked through.
//!
//! Whoever waits for an answer does the connection's work meanwhile, so that an answer wakes one task and not two.

use std::{
    error::Error,
    future::poll_fn,
    io,
    net::{SocketAddr, ToSocketAddrs as _},
    pin::{Pin, pin},
    sync::Arc,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request, Response, Uri,
    body::Incoming,
    client::conn::http1::{self, SendRequest},
    header::{self, HeaderName, HeaderValue, InvalidHeaderValue},
};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const USER_AGENT: &str = concat!("waypost/", env!("CARGO_PKG_VERSION"));

/// Where requests go.
#[derive(Clone, Debug)]
pub struct Target {
    host: String,
    port: u16,
    /// The header `Host`.
    authority: HeaderValue,
    /// Path and query.
    path: Uri,
    tls: Option<Arc<ClientConfig>>,
}

impl Target {
    /// Reads `url`, and trusts the public roots if it is one of HTTPS.
    ///
    /// # Errors
    /// When `url` is no `http://` or `https://` URL.
    pub fn with_public_roots(url: &str) -> Result<Self, String> {
        Self::parse(url, || {
            Arc::new(
                ClientConfig::builder()
                    .with_root_certificates(public_roots())
                    .with_no_client_auth(),
            )
        })
    }

    /// Reads `url`; `tls` is asked for if it is one of HTTPS.
    ///
    /// # Errors
    /// When `url` is no `http://` or `https://` URL.
    pub fn parse(url: &str, tls: impl FnOnce() -> Arc<ClientConfig>) -> Result<Self, String> {
        let uri: Uri = url
            .parse()
            .map_err(|why| format!("{url} is not a URL: {why}"))?;
        let is_tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(format!("{url} is not an http:// or https:// URL")),
        };
        let authority = uri
            .authority()
            .ok_or_else(|| format!("{url} names no host"))?;
        // A query may follow the host at once; a request line begins its path with `/`.
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let path = if path.starts_with('/') {
            path.parse::<Uri>()
        } else {
            format!("/{path}").parse()
        };
        // A login is not a part of `Host` (RFC 9110, 7.2).
        let named = authority.as_str().rsplit('@').next().unwrap_or_default();
        Ok(Self {
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: authority
                .port_u16()
                .unwrap_or(if is_tls { 443 } else { 80 }),
            authority: named.parse().map_err(|why| format!("{url}: {why}"))?,
            path: path.map_err(|why| format!("{url}: {why}"))?,
            tls: is_tls.then(tls),
        })
    }

    /// A GET.
    #[must_use]
    pub fn get(&self) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::default());
        *request.uri_mut() = self.path.clone();
        let headers = request.headers_mut();
        headers.insert(header::HOST, self.authority.clone());
        headers.insert(header::USER_AGENT, HeaderValue::from_static(USER_AGENT));
        request
    }

    /// A POST of JSON, under `key` if there is one.
    ///
    /// # Errors
    /// When the key cannot be a header.
    pub fn post(
        &self,
        body: Bytes,
        key: Option<&str>,
    ) -> Result<Request<Full<Bytes>>, InvalidHeaderValue> {
        let mut request = self.get();
        *request.method_mut() = Method::POST;
        *request.body_mut() = Full::new(body);
        let headers = request.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        if let Some(key) = key {
            headers.insert(IDEMPOTENCY_KEY, key.parse()?);
        }
        Ok(request)
    }

    /// How a POST of JSON begins, as it is sent (RFC 9112, 3 and 5): all up to its length, its key and the empty line.
    #[must_use]
    pub fn head(&self) -> Vec<u8> {
        let Self {
            path, authority, ..
        } = self;
        let begin = format!(
            "POST {path} HTTP/1.1\r\nuser-agent: {USER_AGENT}\r\ncontent-type: application/json\r\nhost: "
        );
        [begin.as_bytes(), authority.as_bytes(), b"\r\n"].concat()
    }

    /// A new connection. Its box keeps it from making every future that holds it large.
    ///
    /// # Errors
    /// When there is nobody, or no trust.
    pub async fn open(&self) -> Result<Box<Connection>, Failure> {
        let (sender, work) = http1::handshake(TokioIo::new(self.dial().await?)).await?;
        Ok(Box::new(Connection {
            sender,
            work: Some(work),
        }))
    }

    /// A new socket, on which nobody has spoken yet.
    async fn dial(&self) -> io::Result<Box<dyn Socket>> {
        let stream = TcpStream::connect((&*self.host, self.port)).await?;
        stream.set_nodelay(true)?;
        self.secure(stream).await
    }

    /// Where it is. Looks a name up, and blocks the thread meanwhile.
    ///
    /// # Errors
    /// When the name is not known.
    pub fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        let found = (&*self.host, self.port).to_socket_addrs();
        Ok(found
            .map_err(|why| io::Error::new(why.kind(), format!("{}: {why}", self.host)))?
            .collect())
    }

    /// A connection to it, with TLS if its URL asks for that.
    ///
    /// # Errors
    /// When there is no trust, or it breaks before that is clear.
    pub async fn secure<'s>(&self, stream: impl Socket + 's) -> io::Result<Box<dyn Socket + 's>> {
        Ok(match &self.tls {
            None => Box::new(stream),
            Some(tls) => {
                let name = ServerName::try_from(self.host.clone()).map_err(io::Error::other)?;
                Box::new(
                    TlsConnector::from(Arc::clone(tls))
                        .connect(name, stream)
                        .await?,
                )
            }
        })
    }
}

pub(super) fn public_roots() -> RootCertStore {
    RootCertStore {
        roots: webpki_roots::TLS_SERVER_ROOTS.to_vec(),
    }
}

type Work = http1::Connection<TokioIo<Box<dyn Socket>>, Full<Bytes>>;

/// A TCP connection, with TLS or without.
pub trait Socket: AsyncRead + AsyncWrite + Unpin {}

impl<S: AsyncRead + AsyncWrite + Unpin> Socket for S {}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("cannot connect: {0}")]
    Connect(#[from] io::Error),
    #[error("{0}")]
    Header(#[from] InvalidHeaderValue),
    #[error("{}", innermost(.0))]
    Exchange(#[from] hyper::Error),
}

impl Failure {
    /// The other side has closed the connection, and may have done so before it had the request.
    #[must_use]
    pub fn is_disconnect(&self) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
        let Self::Exchange(why) = self else {
            return false;
        };
        let socket = why
            .source()
            .and_then(|why| why.downcast_ref::<io::Error>())
            .map(io::Error::kind);
        let is_cut = matches!(
            socket,
            Some(BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
        );
        is_cut || why.is_canceled() || why.is_closed() || why.is_incomplete_message()
    }
}

/// The cause that names the trouble of the socket.
fn innermost(error: &(dyn Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(cause) = innermost.source() {
        innermost = cause;
    }
    innermost.to_string()
}

/// An open connection. One exchange at a time; a future of one that is dropped leaves the connection unfit for another.
pub struct Connection {
    sender: SendRequest<Full<Bytes>>,
    /// To be polled while anything is awaited; `None` once the connection has ended.
    work: Option<Work>,
}

impl Connection {
    /// Resolves with the head of the answer.
    ///
    /// # Errors
    /// When the connection breaks first.
    pub async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, Failure> {
        let exchange = async {
            self.sender.ready().await?;
            self.sender.send_request(request).await
        };
        Ok(working(&mut self.work, exchange).await?)
    }

    /// The next piece of an answer's body; `None` at its end.
    pub async fn read(&mut self, body: &mut Incoming) -> Option<Result<Bytes, Failure>> {
        let frame = working(&mut self.work, body.frame()).await?;
        // Trailers say nothing to us.
        Some(
            frame
                .map(|frame| frame.into_data().unwrap_or_default())
                .map_err(Failure::from),
        )
    }
}

/// Resolves with `wait`; the connection goes on with its work meanwhile.
async fn working<T, W: Future + Unpin>(work: &mut Option<W>, wait: impl Future<Output = T>) -> T {
    let mut wait = pin!(wait);
    poll_fn(|context| {
        // How it ends, whoever waits hears.
        if work
            .as_mut()
            .is_some_and(|work| Pin::new(work).poll(context).is_ready())
        {
            *work = None;
        }
        wait.as_mut().poll(context)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_a_url_with_scheme_and_host() {
        let parse = |url| Target::parse(url, || unreachable!("nothing here is trusted"));
        for (url, host, port, authority, path) in [
            (
                "http://127.0.0.1:8000",
                "127.0.0.1",
                8000,
                "127.0.0.1:8000",
                "/",
            ),
            (
                "http://me:secret@node.example/nats",
                "node.example",
                80,
                "node.example",
                "/nats",
            ),
            ("http://[::1]/a?b=c", "::1", 80, "[::1]", "/a?b=c"),
            (
                "http://node.example?b=c",
                "node.example",
                80,
                "node.example",
                "/?b=c",
            ),
        ] {
            let target = parse(url).unwrap();
            assert_eq!((&*target.host, target.port), (host, port), "{url}");
            let head = String::from_utf8(target.head()).unwrap();
            assert!(
                head.starts_with(&format!("POST {path} HTTP/1.1\r\n")),
                "{url}: {head}"
            );
            assert!(
                head.ends_with(&format!("\r\nhost: {authority}\r\n")),
                "{url}: {head}"
            );
            assert_eq!(
                (target.authority, target.path),
                (authority.parse().unwrap(), path.parse().unwrap()),
                "{url}"
            );
        }
        for url in [
            "node:8000",
            "127.0.0.1:8000",
            "/nats",
            "ftp://node/",
            "http://",
        ] {
            parse(url).expect_err(url);
        }
        let roots = || {
            Arc::new(
                ClientConfig::builder()
                    .with_root_certificates(RootCertStore::empty())
                    .with_no_client_auth(),
            )
        };
        let target = Target::parse("https://node.example", roots).unwrap();
        assert_eq!((target.port, target.tls.is_some()), (443, true));
    }
}
