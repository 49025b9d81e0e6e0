//! TLS on the connections that a server takes, by files that are read again while it runs.

use std::{future::pending, io, sync::Arc, time::Duration};

use rustls::pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{FileHealth, ServerTls, TlsFiles, WatchedFile};

/// The certificate of a server, and whose certificates let a client in. Clones share them.
#[derive(Clone, Debug)]
pub struct ServingTls(Arc<WatchedFile<ServerTls>>);

impl ServingTls {
    /// Reads the files, of which `key` of the configuration names the first.
    ///
    /// # Errors
    /// If they cannot be used.
    pub fn open(key: &str, files: TlsFiles) -> Result<Self, String> {
        let named = files.clone();
        let file = WatchedFile::open(key, named.paths(), move |before| {
            let read = ServerTls::read(&files, before);
            read.map_err(|why| why.to_string())
        });
        Ok(Self(Arc::new(file?)))
    }

    pub fn health(&self) -> &Arc<FileHealth> {
        self.0.health()
    }

    /// Reads the files again and again.
    pub async fn keep_reading(self) {
        self.0.keep_reading().await;
    }

    /// The server's own certificate, as it was read last.
    pub fn certificate(&self) -> CertificateDer<'static> {
        self.0.get().certificate.clone()
    }

    /// Ends once the files do not permit a client any more that has presented this chain.
    pub async fn until_revoked(&self, chain: &[CertificateDer<'static>]) {
        let mut changes = self.0.changes();
        // They may have changed during the handshake.
        while changes.borrow_and_update().permits(chain) {
            if changes.changed().await.is_err() {
                return pending().await;
            }
        }
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
