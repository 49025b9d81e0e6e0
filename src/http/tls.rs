//! TLS on the connections of a server, by files that are read again while it runs.

use std::{io, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::secrets::{FileHealth, ServerTls, TlsFiles, WatchedFile};

/// The certificate of a server, and whose certificates let a client in. Clones share them.
#[derive(Clone)]
pub struct Tls(Arc<WatchedFile<ServerTls>>);

impl Tls {
    /// Reads the files, of which `key` of the configuration names the first, and reads them again on
    /// this thread's runtime.
    ///
    /// # Errors
    /// If they cannot be used.
    pub fn open(key: &str, files: TlsFiles) -> Result<Self, String> {
        let read = move |before: Option<&ServerTls>| {
            let read = ServerTls::read(&files, before);
            read.map_err(|why| why.to_string())
        };
        let file = WatchedFile::open(key, read)?;
        let file = Arc::new(file);
        actix_rt::spawn(Arc::clone(&file).keep_reading());
        Ok(Self(file))
    }

    pub fn health(&self) -> &Arc<FileHealth> {
        self.0.health()
    }

    /// Waits for the client's handshake, with the certificate that was read last.
    ///
    /// # Errors
    /// If it fails, or is not over within `patience`.
    pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
        patience: Duration,
    ) -> io::Result<TlsStream<S>> {
        let acceptor = TlsAcceptor::from(Arc::clone(&self.0.get().config));
        let accepted = timeout(patience, acceptor.accept(stream)).await;
        accepted.unwrap_or_else(|_| {
            let why = format!("no handshake within {patience:?}");
            Err(io::Error::new(io::ErrorKind::TimedOut, why))
        })
    }
}
