//! The files of the node's own servers.

use super::{AdminConfig, GrpcConfig, IngestConfig, ReadableFile};
use crate::secrets::{TlsFiles, WithoutCertificate};

impl IngestConfig {
    /// The files of its TLS, if it speaks TLS.
    pub fn tls(&self) -> Option<TlsFiles> {
        tls(
            &self.tls_cert_file,
            &self.tls_key_file,
            &self.client_ca_file,
        )
    }
}

impl GrpcConfig {
    /// The files of its TLS, if it speaks TLS.
    pub fn tls(&self) -> Option<TlsFiles> {
        let files = tls(&self.cert_file, &self.key_file, &None)?;
        Some(TlsFiles {
            protocols: &["h2"],
            ..files
        })
    }
}

impl AdminConfig {
    /// The files of its TLS, if it speaks TLS.
    pub fn tls(&self) -> Option<TlsFiles> {
        let files = tls(
            &self.tls_cert_file,
            &self.tls_key_file,
            &self.client_ca_file,
        )?;
        // Probes have none.
        Some(TlsFiles {
            without_certificate: WithoutCertificate::Connection,
            ..files
        })
    }
}

#[expect(clippy::ref_option, reason = "the fields of a section")]
fn tls(
    cert: &Option<ReadableFile>,
    key: &Option<ReadableFile>,
    client_ca: &Option<ReadableFile>,
) -> Option<TlsFiles> {
    Some(TlsFiles {
        cert: cert.as_deref()?.to_owned(),
        key: key.as_deref()?.to_owned(),
        client_ca: client_ca.as_deref().map(ToOwned::to_owned),
        without_certificate: WithoutCertificate::NoConnection,
        protocols: &["h2", "http/1.1"],
    })
}
