//! The server: the service, its health and its descriptors on one socket, and connections that can
//! be cut.

use std::{
    error::Error,
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{
    FutureExt as _, StreamExt as _,
    future::{BoxFuture, ready},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;
use tonic::transport::{
    Server,
    server::{Connected, TcpConnectInfo, TcpIncoming},
};
use tracing::debug;

use super::{
    CONNECTION_WINDOW, KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT, MAX_MESSAGE, Phase, STREAM_WINDOW,
    reached, service::Service,
};
use crate::{
    proto::{self, waypost_server::WaypostServer},
    secrets::ServingTls,
};

/// How long a TLS handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// The most handshakes at a time; other connections wait to be accepted.
const HANDSHAKES_MAX: usize = 1024;

/// Returns a future that serves until [`Phase::Closing`], and then until the open calls have ended
/// or [`Phase::Cut`] is reached. It stops listening when it stops serving.
///
/// # Errors
/// If the descriptors of the service are malformed.
pub(super) fn serve(
    listener: TcpListener,
    tls: Option<ServingTls>,
    service: Service,
    phase: watch::Receiver<Phase>,
) -> Result<impl Future<Output = ()> + Send, Box<dyn Error>> {
    let mut server = Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    let descriptors = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
    };
    let (health, health_service) = tonic_health::server::health_reporter();
    let router = server
        .add_service(WaypostServer::new(service).max_decoding_message_size(MAX_MESSAGE))
        .add_service(health_service)
        .add_service(descriptors().build_v1()?)
        // Older tools ask for the alpha version.
        .add_service(descriptors().build_v1alpha()?);

    let cut = phase.clone();
    let connections = TcpIncoming::from(listener)
        .with_nodelay(Some(true))
        .map(move |tcp| {
            let (tls, cut) = (tls.clone(), cut.clone());
            async move {
                let tcp = match tcp {
                    Ok(tcp) => tcp,
                    Err(why) => return Some(Err(why)),
                };
                let connect_info = tcp.connect_info();
                let stream = match tls {
                    None => Either::Left(tcp),
                    Some(tls) => {
                        let accepted = tls.accept(tcp, HANDSHAKE_TIMEOUT).await;
                        let why = |why: &io::Error| debug!(reason = %why, "no TLS connection");
                        Either::Right(Box::new(accepted.inspect_err(why).ok()?))
                    }
                };
                Some(Ok(ServerConnection {
                    stream,
                    connect_info,
                    cut: reached(cut, Phase::Cut).boxed(),
                }))
            }
        })
        .buffer_unordered(HANDSHAKES_MAX)
        .filter_map(ready);
    Ok(async move {
        health.set_serving::<WaypostServer<Service>>().await;
        let closing = async {
            reached(phase, Phase::Closing).await;
            health.set_not_serving::<WaypostServer<Service>>().await;
            health
                .set_service_status("", tonic_health::ServingStatus::NotServing)
                .await;
        };
        if let Err(error) = router
            .serve_with_incoming_shutdown(connections, closing)
            .await
        {
            tracing::error!(reason = %error, "the gRPC server has failed");
        }
    })
}

/// A connection that ends at [`Phase::Cut`] even if its calls are open. A graceful shutdown waits
/// for calls, which a client may keep open for ever.
struct ServerConnection {
    stream: Either<TcpStream, Box<TlsStream<TcpStream>>>,
    connect_info: TcpConnectInfo,
    cut: BoxFuture<'static, ()>,
}

impl AsyncRead for ServerConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // An HTTP/2 connection always has a read under way, so no other method needs this check.
        if self.cut.poll_unpin(cx).is_ready() {
            self.cut = std::future::ready(()).boxed();
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for ServerConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Connected for ServerConnection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.connect_info.clone()
    }
}
