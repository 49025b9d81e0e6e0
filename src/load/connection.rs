//! One user's connection: kept alive, opened when there is none.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use hyper::StatusCode;
use rustls::{ClientConfig, RootCertStore};
use tokio::time::timeout;

use crate::http::client::{self, Failure, Target};

/// A request that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The status, or why there was none.
pub(super) type Answer = Result<StatusCode, String>;

/// Where records are posted.
///
/// # Errors
/// When `url` is no `http://` or `https://` URL.
pub fn target(url: &str) -> Result<Target, String> {
    Target::parse(url, || {
        let roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        Arc::new(ClientConfig::builder().with_root_certificates(roots).with_no_client_auth())
    })
}

pub(super) struct Connection<'t> {
    target: &'t Target,
    open: Option<Box<client::Connection>>,
}

impl<'t> Connection<'t> {
    pub fn new(target: &'t Target) -> Self {
        Self { target, open: None }
    }

    /// Posts `record`, under `key` if there is one, and reads the answer to its end.
    pub async fn post(&mut self, key: Option<&str>, record: &Bytes) -> Answer {
        // Whatever cuts it short leaves no connection that is half through an answer.
        let kept = self.open.take();
        let exchange = async {
            if let Some(kept) = kept {
                match self.exchange(kept, key, record).await {
                    // The server may have closed it while it was idle: the key keeps a second try from being a second record.
                    Err(_) if key.is_some() => {}
                    answer => return answer.map_err(|why| why.to_string()),
                }
            }
            let fresh = self.target.open().await.map_err(|why| why.to_string())?;
            self.exchange(fresh, key, record).await.map_err(|why| why.to_string())
        };
        timeout(TIMEOUT, exchange).await.unwrap_or_else(|_| Err(format!("no answer within {TIMEOUT:?}")))
    }

    async fn exchange(
        &mut self,
        mut connection: Box<client::Connection>,
        key: Option<&str>,
        record: &Bytes,
    ) -> Result<StatusCode, Failure> {
        let request = self.target.post(record.clone(), key)?;
        let mut answer = connection.send(request).await?;
        while let Some(piece) = connection.read(answer.body_mut()).await {
            piece?;
        }
        self.open = Some(connection);
        Ok(answer.status())
    }
}
