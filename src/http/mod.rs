//! The HTTP that a node serves: ingest for clients, admin for operators.

pub mod admin;
mod dead_letters;
pub mod ingest;
mod metrics;
pub mod problem;
pub mod status;

use std::{
    io,
    net::{SocketAddr, TcpListener},
    time::Duration,
};

use actix_web::{App, HttpServer, dev::ServerHandle, web};
use tokio::net::TcpSocket;
use tracing::error;

/// The most connections that wait to be accepted.
const BACKLOG: u32 = 1024;

/// Binds a socket for a server.
///
/// # Errors
/// If the address is taken, or is none of this machine's.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)?.into_std()
}

/// Serves until the handle says stop; requests in flight may then take up to `drain`.
///
/// # Errors
/// If the socket cannot be served.
pub fn serve(
    socket: TcpListener,
    workers: usize,
    drain: Duration,
    routes: impl Fn(&mut web::ServiceConfig) + Clone + Send + 'static,
) -> io::Result<ServerHandle> {
    let server = HttpServer::new(move || App::new().configure(routes.clone()))
        .workers(workers)
        .shutdown_timeout(drain.as_secs())
        .disable_signals()
        .listen(socket)?
        .run();
    let handle = server.handle();
    actix_rt::spawn(async move {
        if let Err(failure) = server.await {
            error!(%failure, "HTTP server ended");
        }
    });
    Ok(handle)
}
