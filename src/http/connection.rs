//! A client's connection: TLS, and the version of HTTP that it negotiates.

use std::{future::pending, io, net::SocketAddr, pin::Pin};

use actix_http::{Protocol, Request, error::DispatchError};
use actix_server::GracefulShutdownSignal;
use actix_service::Service;
use actix_web::{
    Error,
    body::MessageBody,
    dev::{Extensions, ServiceResponse},
};
use futures_util::FutureExt as _;
use rustls::pki_types::CertificateDer;
use tokio::{
    net::TcpStream,
    select,
    time::{Instant, timeout_at},
};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;
use tracing::debug;

use super::{
    ClientCertificate, ServerLimits,
    checked_stream::CheckedStream,
    early_ends::EarlyEnds,
    early_problem::EarlyProblemStream,
    handover::HandoverStream,
    handshakes::Handshakes,
    http2::{Http2, Http2Client},
    write_patience,
};
use crate::secrets::ServingTls;

type PlainStream = Pin<Box<TimeoutStream<TcpStream>>>;
type ClientStream = Either<PlainStream, Box<TlsStream<PlainStream>>>;
/// The stream under HTTP/1.1.
pub type Http1Stream = CheckedStream<EarlyProblemStream<HandoverStream<ClientStream>>>;

/// The parts of a server thread for its connections.
pub struct Connections<H, S> {
    pub tls: Option<ServingTls>,
    pub limits: ServerLimits,
    pub handshakes: Handshakes,
    pub http1: H,
    pub http2: Http2<S>,
    pub stopping: GracefulShutdownSignal,
    pub ends: EarlyEnds,
}

impl<H, S, B> Connections<H, S>
where
    H: Service<(Http1Stream, Protocol, Option<SocketAddr>), Response = (), Error = DispatchError>,
    S: Service<Request, Response = ServiceResponse<B>, Error = Error>,
    B: MessageBody,
{
    /// Serves a connection until it ends, or the client's certificate counts no more.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn serve(&self, stream: TcpStream) -> Result<(), DispatchError> {
        let client = stream.peer_addr().ok();
        let opened = self.open(stream).await;
        let stream = opened.inspect_err(|why| log_end(client, "no TLS connection", why))?;
        let chain = presented(&stream);
        let revoked = async {
            match (&self.tls, &chain) {
                (Some(tls), Some(chain)) => tls.until_revoked(chain).await,
                _ => pending().await,
            }
        };
        select! {
            // A client whose certificate counts no more is not served again.
            biased;
            () = revoked => {
                let client = client.map(tracing::field::display);
                debug!(client, "the client's certificate counts no more");
                Ok(())
            }
            served = self.speak(stream, client) => served,
        }
    }

    /// Opens what HTTP is spoken on: the connection, or TLS on it.
    async fn open(&self, stream: TcpStream) -> io::Result<ClientStream> {
        // An answer in several pieces does not wait for the client's acknowledgement of the first
        // one. It fails only for a connection that has ended.
        stream.set_nodelay(true).ok();
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(write_patience()));
        let stream = Box::pin(stream);
        let Some(tls) = &self.tls else {
            return Ok(Either::Left(stream));
        };
        let patience = self.limits.header_timeout;
        let accepted = self.handshakes.accept(tls, stream, patience).await?;
        Ok(Either::Right(Box::new(accepted)))
    }

    async fn speak(
        &self,
        stream: ClientStream,
        address: Option<SocketAddr>,
    ) -> Result<(), DispatchError> {
        if speaks_http2(&stream) {
            let client = Http2Client {
                address,
                has_certificate: presented(&stream).is_some(),
            };
            let served = self.http2.serve(stream, client).await;
            return Ok(served.inspect_err(|why| log_end(address, "HTTP/2 ended", why))?);
        }
        let timeout = self.limits.header_timeout;
        let since = Instant::now();
        // The library has 16 KiB of buffers for a connection, so none is its own before it has a request.
        // A late client, and one that is left when the server stops, get their end from the library.
        select! {
            _ = timeout_at(since + timeout, readable(&stream)) => {}
            () = self.stopping.notified() => {}
        }
        // A stream that is handed over is beyond the reach of [`Self::serve`].
        let revoked = self.tls.clone().zip(presented(&stream));
        let revoked = revoked
            .map(|(tls, chain)| async move { tls.until_revoked(&chain).await }.boxed_local());
        let stream = HandoverStream::new(stream, revoked);
        let stream = EarlyProblemStream::new(stream, address);
        let stream = CheckedStream::new(stream, address, since, timeout, self.ends.clone());
        self.http1.call((stream, Protocol::Http1, address)).await
    }
}

/// Waits until the client has sent something, or is gone.
async fn readable(stream: &ClientStream) -> io::Result<()> {
    match stream {
        Either::Left(plain) => plain.get_ref().readable().await,
        Either::Right(tls) => {
            let (plain, session) = tls.get_ref();
            // It may have come with the end of the handshake.
            if session.wants_read() {
                plain.get_ref().readable().await?;
            }
            Ok(())
        }
    }
}

/// Notes with a connection of HTTP/1.1 what its requests need to know.
pub fn note(connection: &Http1Stream, extensions: &mut Extensions) {
    extensions.insert(connection.state());
    let stream = connection.get_ref().get_ref();
    extensions.insert(stream.handover());
    if stream.get_ref().and_then(presented).is_some() {
        extensions.insert(ClientCertificate);
    }
}

/// The certificates that the client has presented, its own first. One that does not count has no
/// connection.
fn presented(stream: &ClientStream) -> Option<Vec<CertificateDer<'static>>> {
    let Either::Right(tls) = stream else {
        return None;
    };
    let chain = tls.get_ref().1.peer_certificates()?;
    Some(chain.iter().map(|one| one.clone().into_owned()).collect())
}

fn speaks_http2(stream: &ClientStream) -> bool {
    matches!(stream, Either::Right(tls) if tls.get_ref().1.alpn_protocol() == Some(b"h2"))
}

fn log_end(client: Option<SocketAddr>, what: &str, why: &io::Error) {
    debug!(client = client.map(tracing::field::display), reason = %why, "{what}");
}
