//! The address of the service, and the credentials for it.

use google_cloud_auth::credentials::{self, Credentials, anonymous, service_account};

use super::TransportError;
use crate::{config, transport::secret::read_secret};

const SERVICE: &str = "https://pubsub.googleapis.com";

#[derive(Clone)]
pub(super) struct Access {
    pub endpoint: String,
    pub credentials: Credentials,
    pub is_emulator: bool,
}

impl Access {
    /// # Errors
    /// If there are no credentials, or they cannot be read.
    pub async fn new(config: &config::PubsubConfig) -> Result<Self, TransportError> {
        let endpoint = endpoint(config.endpoint.as_deref());
        // The service itself speaks TLS only.
        let is_emulator = !is_tls(&endpoint);
        let credentials = if is_emulator {
            anonymous::Builder::new().build()
        } else if let Some(path) = &config.credentials_file {
            let failed = |why: String| {
                TransportError::Connect(format!("credentials file {}: {why}", path.display()))
            };
            let key = read_secret(path).await?;
            let key = serde_json::from_str(&key).map_err(|why| failed(why.to_string()))?;
            service_account::Builder::new(key)
                .build()
                .map_err(|why| failed(why.to_string()))?
        } else {
            let built = credentials::Builder::default().build();
            built.map_err(|e| TransportError::Connect(format!("default credentials: {e}")))?
        };
        Ok(Self {
            endpoint,
            credentials,
            is_emulator,
        })
    }
}

/// A bare `host:port` names an emulator, as `PUBSUB_EMULATOR_HOST` does.
pub(super) fn endpoint(configured: Option<&str>) -> String {
    match configured.map(|endpoint| endpoint.trim_end_matches('/')) {
        None => SERVICE.into(),
        Some(url) if url.contains("://") => url.into(),
        Some(host) => format!("http://{host}"),
    }
}

/// A scheme may be in upper case (RFC 3986, 3.1).
fn is_tls(endpoint: &str) -> bool {
    let scheme = endpoint.split_once("://").map(|(scheme, _)| scheme);
    scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case("https"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn https_is_tls_in_any_case_and_nothing_else_is() {
        for (endpoint, expected) in [
            (SERVICE, true),
            ("HTTPS://pubsub.googleapis.com", true),
            ("http://localhost:8085", false),
            ("HTTP://localhost:8085", false),
        ] {
            assert_eq!(is_tls(endpoint), expected, "{endpoint}");
        }
    }

    #[test]
    fn an_endpoint_may_leave_out_its_scheme() {
        for (configured, url) in [
            (None, "https://pubsub.googleapis.com"),
            (Some("localhost:8085"), "http://localhost:8085"),
            (Some("http://127.0.0.1:8085/"), "http://127.0.0.1:8085"),
            (
                Some("https://europe-west1-pubsub.googleapis.com"),
                "https://europe-west1-pubsub.googleapis.com",
            ),
        ] {
            assert_eq!(endpoint(configured), url);
        }
    }

    #[tokio::test]
    async fn a_credentials_file_that_is_not_there_is_named() {
        let config = config::PubsubConfig {
            credentials_file: Some("/nowhere/key.json".into()),
            ..config::PubsubConfig::default()
        };
        let Err(TransportError::Connect(why)) = Access::new(&config).await else {
            panic!("it read a file that is not there")
        };
        assert!(why.contains("/nowhere/key.json"), "{why}");
    }
}
