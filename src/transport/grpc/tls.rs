//! Endpoints of peers, and TLS on both sides.

use std::{sync::Arc, time::Duration};

use rustls::{
    CertificateError, DigitallySignedStruct, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};

use super::{CONNECTION_WINDOW, KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT, STREAM_WINDOW, Settings};
use crate::{
    secrets::ServingTls,
    transport::{TransportError, secret::read_secret},
};

/// How long a peer may take to accept a TCP connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// The TLS of a lane.
pub(super) struct Tls {
    server: Option<ServingTls>,
    authorities: Option<String>,
}

impl Tls {
    pub(super) async fn read(settings: &Settings) -> Result<Self, TransportError> {
        let config = &settings.config;
        if config.cert_file.is_some() != config.key_file.is_some() {
            let why = "cert_file and key_file go together";
            return Err(TransportError::Connect(why.into()));
        }
        let authorities = match &config.ca_file {
            Some(file) => Some(read_secret(file).await?),
            None => None,
        };
        Ok(Self {
            server: settings.server_tls.clone(),
            authorities,
        })
    }

    /// A peer's endpoint. Its certificate must come from one of the configured or public
    /// authorities.
    pub(super) fn peer(&self, uri: &str) -> Result<Endpoint, TransportError> {
        let endpoint = endpoint(uri)?;
        if endpoint.uri().scheme_str() != Some("https") {
            return Ok(endpoint);
        }
        let mut tls = ClientTlsConfig::new().with_webpki_roots();
        if let Some(authorities) = &self.authorities {
            tls = tls.ca_certificate(Certificate::from_pem(authorities));
        }
        endpoint.tls_config(tls).map_err(|e| failed(uri, &e))
    }

    /// This node's own endpoint. The certificate has the name that other nodes use, not the
    /// listener's address, so the client accepts only the certificate that this node serves.
    pub(super) fn own(&self, address: std::net::SocketAddr) -> Result<Endpoint, TransportError> {
        let Some(serving) = &self.server else {
            return endpoint(&format!("http://{address}"));
        };
        let uri = format!("https://{address}");
        let verifier = OwnCertificate {
            serving: serving.clone(),
            provider: ring::default_provider(),
        };
        endpoint(&uri)?
            .tls_config_with_verifier(ClientTlsConfig::new(), Arc::new(verifier))
            .map_err(|e| failed(&uri, &e))
    }
}

fn endpoint(uri: &str) -> Result<Endpoint, TransportError> {
    Ok(Endpoint::from_shared(uri.to_owned())
        .map_err(|e| failed(uri, &e))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW))
}

fn failed(what: &str, error: &dyn std::error::Error) -> TransportError {
    TransportError::Connect(format!("{what}: {error}"))
}

/// Accepts the certificate that this node serves. The handshake proves that the server has its key.
#[derive(Debug)]
struct OwnCertificate {
    serving: ServingTls,
    provider: CryptoProvider,
}

impl ServerCertVerifier for OwnCertificate {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if *end_entity == self.serving.certificate() {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(Error::InvalidCertificate(
                CertificateError::ApplicationVerificationFailure,
            ))
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
