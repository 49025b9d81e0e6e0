//! A server's side of TLS 1.2 and 1.3: its certificate, and whose certificates let a client in.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use ring::digest::{Digest, SHA256, digest};
use rustls::{
    Error, RootCertStore, ServerConfig,
    crypto::ring::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject as _},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
};

/// What a `client_ca` means to a client without a certificate. One with a wrong certificate gets no
/// connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WithoutCertificate {
    NoConnection,
    /// The server looks at each request.
    Connection,
}

/// The PEM files of a server.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The certificate chain, the server's own first.
    pub cert: PathBuf,
    pub key: PathBuf,
    /// A client's certificate counts if one of these has signed it.
    pub client_ca: Option<PathBuf>,
    pub without_certificate: WithoutCertificate,
    /// The names of the protocols that the server speaks over TLS, the best first (RFC 7301).
    pub protocols: &'static [&'static str],
}

impl TlsFiles {
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        let server = [&*self.cert, &*self.key];
        server.into_iter().chain(self.client_ca.as_deref())
    }
}

/// One of the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsFile {
    Cert,
    Key,
    ClientCa,
}

/// The reason why a server's TLS cannot be as its files say.
#[derive(Debug)]
pub struct TlsFileError {
    pub file: TlsFile,
    /// It names the file, and shows nothing of what it holds.
    pub why: String,
}

impl fmt::Display for TlsFileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

/// What the files say. Clones share it.
#[derive(Clone)]
pub struct ServerTls {
    /// Of the contents of the files.
    digests: [Option<Digest>; 3],
    pub config: Arc<ServerConfig>,
    /// Whose certificates count; `None` if none is asked for.
    clients: Option<Arc<dyn ClientCertVerifier>>,
    /// The server's own.
    pub certificate: CertificateDer<'static>,
}

impl PartialEq for ServerTls {
    fn eq(&self, other: &Self) -> bool {
        same(&self.digests, &other.digests)
    }
}

fn same(one: &[Option<Digest>; 3], other: &[Option<Digest>; 3]) -> bool {
    let bytes = |digest: &Option<Digest>| digest.as_ref().map(|digest| digest.as_ref().to_vec());
    one.iter().map(bytes).eq(other.iter().map(bytes))
}

impl ServerTls {
    /// Reads the files. If they are those of `before`, it is `before`.
    ///
    /// # Errors
    /// If a file cannot be read or used, or the key is not the certificate's.
    pub fn read(files: &TlsFiles, before: Option<&Self>) -> Result<Self, TlsFileError> {
        let cert = Pem::read(TlsFile::Cert, &files.cert)?;
        let key = Pem::read(TlsFile::Key, &files.key)?;
        let client_ca = files.client_ca.as_deref();
        let client_ca = client_ca.map(|path| Pem::read(TlsFile::ClientCa, path));
        let client_ca = client_ca.transpose()?;
        let digests = [Some(&cert), Some(&key), client_ca.as_ref()];
        let digests = digests.map(|pem| pem.map(|pem| digest(&SHA256, &pem.text)));
        if let Some(before) = before.filter(|before| same(&before.digests, &digests)) {
            return Ok(before.clone());
        }
        let provider = Arc::new(default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider));
        let builder = builder.with_safe_default_protocol_versions();
        let builder = builder.map_err(|why| cert.wrong(why))?;
        let clients = match &client_ca {
            None => None,
            Some(pem) => {
                let roots = Arc::new(pem.roots()?);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider);
                let verifier = match files.without_certificate {
                    WithoutCertificate::NoConnection => verifier,
                    WithoutCertificate::Connection => verifier.allow_unauthenticated(),
                };
                Some(verifier.build().map_err(|why| pem.wrong(why))?)
            }
        };
        let builder = match &clients {
            None => builder.with_no_client_auth(),
            Some(verifier) => builder.with_client_cert_verifier(Arc::clone(verifier)),
        };
        let chain = cert.certificates()?;
        let certificate = chain[0].clone();
        let config = builder.with_single_cert(chain, key.private_key()?);
        let mut config = config.map_err(|why| match why {
            Error::InconsistentKeys(_) => {
                let cert = cert.path.display();
                key.wrong(format_args!("is not the key of the certificate in {cert}"))
            }
            Error::InvalidCertificate(why) => cert.wrong(format_args!("{why:?}")),
            _ => key.wrong("holds a key of a kind that is not supported"),
        })?;
        let protocols = files.protocols.iter();
        config.alpn_protocols = protocols.map(|&name| name.into()).collect();
        Ok(Self {
            digests,
            config: Arc::new(config),
            clients,
            certificate,
        })
    }
}

impl ServerTls {
    /// Whether a client gets in that has presented this chain, its own certificate first.
    pub fn permits(&self, chain: &[CertificateDer<'static>]) -> bool {
        let Some(clients) = &self.clients else {
            return true;
        };
        chain.split_first().is_none_or(|(own, others)| {
            let verified = clients.verify_client_cert(own, others, UnixTime::now());
            verified.is_ok()
        })
    }
}

/// The text of a file.
struct Pem<'p> {
    file: TlsFile,
    path: &'p Path,
    text: Vec<u8>,
}

impl<'p> Pem<'p> {
    fn read(file: TlsFile, path: &'p Path) -> Result<Self, TlsFileError> {
        let empty = Self {
            file,
            path,
            text: Vec::new(),
        };
        let text = fs::read(path).map_err(|why| empty.wrong(why))?;
        Ok(Self { text, ..empty })
    }

    fn wrong(&self, why: impl fmt::Display) -> TlsFileError {
        TlsFileError {
            file: self.file,
            why: format!("{}: {why}", self.path.display()),
        }
    }

    /// At least one.
    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, TlsFileError> {
        let certificates = CertificateDer::pem_slice_iter(&self.text);
        // The error may quote a line of the file.
        let certificates: Result<Vec<_>, _> = certificates.collect();
        let certificates = certificates.map_err(|_| self.wrong("is not PEM"))?;
        if certificates.is_empty() {
            return Err(self.wrong("holds no certificate in PEM"));
        }
        Ok(certificates)
    }

    fn private_key(&self) -> Result<PrivateKeyDer<'static>, TlsFileError> {
        let key = PrivateKeyDer::from_pem_slice(&self.text);
        key.map_err(|_| self.wrong("holds no private key in PEM"))
    }

    fn roots(&self) -> Result<RootCertStore, TlsFileError> {
        let mut roots = RootCertStore::empty();
        for certificate in self.certificates()? {
            roots.add(certificate).map_err(|why| self.wrong(why))?;
        }
        Ok(roots)
    }
}
