//! The HTTP that a node serves: ingest for clients, admin for operators.

mod accept;
pub mod admin;
mod checked_stream;
pub mod client_rate;
mod connection;
pub mod cors;
mod dead_letters;
pub mod early_ends;
mod early_problem;
pub mod events;
mod explain;
mod foreign;
mod framing;
mod handover;
mod handshakes;
mod history;
mod http2;
pub mod ingest;
mod metrics;
mod openapi;
mod operators;
mod order_body;
mod page;
pub mod problem;
pub mod signatures;
pub mod status;
pub mod tap;
mod target;
pub mod tokens;

use std::{
    fmt, io,
    net::{SocketAddr, TcpListener},
    rc::Rc,
    time::Duration,
};

use actix_http::{HttpService, RequestHead};
use actix_server::ServerBuilder;
use actix_service::{
    IntoServiceFactory as _, Service as _, ServiceFactory as _, fn_factory, fn_service, map_config,
};
use actix_web::{
    App, HttpMessage as _,
    dev::{AppConfig, ServerHandle, ServiceRequest, ServiceResponse},
    http::{ConnectionType, header},
    web,
};
use futures_util::future::{Either as Answering, pending, ready};
use tokio::{
    net::{TcpSocket, TcpStream},
    task::yield_now,
};
use tracing::{debug, error};

use self::{
    checked_stream::HeadState,
    connection::Connections,
    early_ends::EarlyEnds,
    handshakes::Handshakes,
    http2::Http2,
    problem::{Problem, ProblemKind},
};
use crate::secrets::ServingTls;

/// The most connections that wait to be accepted.
const BACKLOG: u32 = 1024;

/// A connection that ends before its request was read may take this long to hear the answer.
const LINGER: Duration = Duration::from_secs(1);

/// A client that takes nothing of its answer for this long loses its connection.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);

/// Binds a socket for a server. The system holds up to about twice `send_buffer` bytes that a client
/// has not taken yet, or as much as it likes.
///
/// # Errors
/// If the address is taken, or is none of this machine's.
pub fn listen(address: SocketAddr, send_buffer: Option<u32>) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    // Its connections have the same.
    if let Some(bytes) = send_buffer {
        socket.set_send_buffer_size(bytes)?;
    }
    socket.bind(address)?;
    socket.listen(BACKLOG)?.into_std()
}

/// The limits of a server.
#[derive(Clone, Copy, Debug)]
pub struct ServerLimits {
    /// Threads.
    pub workers: usize,
    /// Connections at a time; others wait to be accepted.
    pub max_connections: usize,
    /// How long the head of a request may take, and a TLS handshake before the first one.
    pub header_timeout: Duration,
    /// How long a connection may wait for its next request.
    pub keep_alive: Duration,
    /// How long requests in flight may take once the server is to stop.
    pub drain: Duration,
}

impl ServerLimits {
    /// The limits of a server for few clients.
    pub const fn of_one_thread(drain: Duration) -> Self {
        Self {
            workers: 1,
            max_connections: 1024,
            header_timeout: Duration::from_secs(5),
            keep_alive: Duration::from_secs(5),
            drain,
        }
    }
}

/// Serves until the handle says stop, over TLS if there is one, and counts the connections that it
/// ends early.
///
/// # Errors
/// If the socket cannot be served.
pub fn serve(
    socket: TcpListener,
    limits: ServerLimits,
    tls: Option<ServingTls>,
    ends: &EarlyEnds,
    routes: impl Fn(&mut web::ServiceConfig) + Clone + Send + 'static,
) -> io::Result<ServerHandle> {
    let builder = ServerBuilder::new();
    let stopping = builder.graceful_shutdown_signal();
    let connections = limits.max_connections.div_ceil(limits.workers);
    let ends = ends.clone();
    // `HttpServer` cannot wrap the stream, so its parts are put together here.
    let service = move || {
        let app = App::new()
            .configure(routes.clone())
            .wrap_fn(|request, service| {
                let state = request.conn_data::<HeadState>().cloned();
                let is_one = state.as_ref().is_none_or(HeadState::complete);
                let waits = request.head().expect();
                let connection = request.head().connection_type();
                let goes_on = connection == ConnectionType::KeepAlive;
                let answering = is_one.then(|| match check_head(request.head()) {
                    Ok(()) => Answering::Left(service.call(request)),
                    Err(problem) => {
                        let mut answer = request.error_response(problem);
                        close_behind(&mut answer);
                        Answering::Right(ready(Ok(answer)))
                    }
                });
                async move {
                    let Some(answering) = answering else {
                        // The connection ends once its stream is read again.
                        yield_now().await;
                        return pending().await;
                    };
                    let mut answer = answering.await;
                    let mut goes_on = goes_on;
                    if let Ok(answer) = &mut answer {
                        // The client may leave the body out then: what comes next may be either.
                        let may_lack_body = waits && !answer.status().is_success();
                        // The library ends that connection, and tells the client nothing.
                        if may_lack_body || connection == ConnectionType::Upgrade {
                            close_behind(answer);
                        }
                        goes_on = goes_on && answer.response().keep_alive();
                        report(answer);
                    }
                    if let Some(state) = state {
                        state.answered(goes_on);
                    }
                    answer
                }
            });
        let app = map_config(app.into_factory(), |()| AppConfig::default());
        let stopping = stopping.clone();
        let tls = tls.clone();
        let ends = ends.clone();
        async move {
            // Both versions of HTTP have the same.
            let app = Rc::new(app.new_service(()).await?);
            let shared = Rc::clone(&app);
            let handshakes = Handshakes::new(connections, stopping.clone(), ends.clone());
            let http2 = Http2::new(app, limits, connections, stopping.clone(), ends.clone());
            let ending = stopping.clone();
            let http1 = HttpService::build()
                // Each head has its time: see `checked_stream`.
                .client_request_timeout(Duration::ZERO)
                .keep_alive(limits.keep_alive)
                .client_disconnect_timeout(LINGER)
                .graceful_shutdown_signal(move || {
                    let ending = ending.clone();
                    async move { ending.notified().await }
                })
                .on_connect_ext(connection::note)
                .finish(fn_factory(move || ready(Ok::<_, ()>(Rc::clone(&shared)))));
            let http1 = http1.new_service(()).await?;
            let connections = Rc::new(Connections {
                tls,
                limits,
                handshakes,
                http1,
                http2,
                stopping,
                ends,
            });
            Ok::<_, ()>(fn_service(move |stream: TcpStream| {
                let connections = Rc::clone(&connections);
                async move { connections.serve(stream).await }
            }))
        }
    };
    let server = builder
        .workers(limits.workers)
        .max_concurrent_connections(connections)
        .shutdown_timeout(limits.drain.as_secs())
        .disable_signals()
        .listen("http", socket, move || fn_factory(service.clone()))?
        .run();
    let handle = server.handle();
    actix_rt::spawn(async move {
        if let Err(failure) = server.await {
            error!(reason = %failure, "HTTP server ended");
        }
    });
    Ok(handle)
}

/// Refuses a request that another server may take for something else.
fn check_head(head: &RequestHead) -> Result<(), Problem> {
    target::check(head)?;
    // It would read the other one (RFC 9110, 8.3).
    if head.headers().get_all(header::CONTENT_TYPE).count() > 1 {
        let detail = "The request has more than one Content-Type";
        return Err(Problem::bad_request(ProblemKind::Request, detail));
    }
    Ok(())
}

/// Noted with a connection of HTTP/1.1, or a request of HTTP/2, whose client has presented a
/// certificate that counts.
struct ClientCertificate;

/// Whether the client of a request has presented a certificate that counts.
fn has_certificate(request: &ServiceRequest) -> bool {
    request.conn_data::<ClientCertificate>().is_some()
        || request.extensions().contains::<ClientCertificate>()
}

/// Ends the connection behind this answer.
fn close_behind(answer: &mut ServiceResponse) {
    let head = answer.response_mut().head_mut();
    head.set_connection_type(ConnectionType::Close);
}

/// A test may make it shorter.
fn write_patience() -> Duration {
    fail::fail_point!("write-patience", |ms| {
        let ms = ms.and_then(|ms| ms.parse().ok());
        ms.map_or(WRITE_PATIENCE, Duration::from_millis)
    });
    WRITE_PATIENCE
}

fn report<B>(answer: &ServiceResponse<B>) {
    if answer.status().is_client_error()
        && let Some(why) = answer.response().error()
    {
        log_bad_request(answer.request().peer_addr(), why);
    }
}

/// The client's mistake, which is no event of the node.
fn log_bad_request(client: Option<SocketAddr>, why: &dyn fmt::Display) {
    let reason = without_controls(&why.to_string());
    debug!(client = client.map(tracing::field::display), %reason, "bad request");
}

/// Names that a client has chosen may have line ends, and begin a line of their own in the log.
fn without_controls(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_reason_with_names_of_a_client_is_one_line() {
        let shown = super::without_controls("field `/x\n\u{1b}[31mé\"`");
        assert_eq!(shown, "field `/x\\n\\u{1b}[31mé\"`");
    }
}
