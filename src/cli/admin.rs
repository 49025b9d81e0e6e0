//! The client of a node's admin side, for the commands that ask a node or give it orders.

use std::{path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use awc::http::{
    StatusCode,
    header::{HeaderMap, HeaderName, HeaderValue},
};
use humantime::{format_duration, parse_duration};
use rustls::ClientConfig;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::{sleep, timeout};
use url::Url;

use super::{
    event_stream::EventStream,
    output::{failed, misused, tell},
};
use crate::{
    api::{bearer, client::Endpoint, client_tls},
    config::has_login,
    secrets::first_token,
};

/// The admin address of a node by default.
const OWN_NODE: &str = "http://127.0.0.1:8001";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest answer that is read.
const ANSWER_MAX: usize = 1 << 30;
/// The longest reason of a refusal that is read.
const REFUSAL_MAX: usize = 64 << 10;
/// The tries to get an answer of a node that is busy, and the longest pause between two.
const BUSY_TRIES: u32 = 5;
const BUSY_PAUSE_MAX: Duration = Duration::from_secs(5);

/// The flags by which a command finds its node.
#[derive(Clone, Debug, clap::Args)]
pub struct AdminArgs {
    /// The admin address of the node [default: `http://127.0.0.1:8001`]
    #[arg(
        long,
        global = true,
        display_order = 800,
        help_heading = "Node",
        value_name = "URL"
    )]
    pub admin: Option<String>,
    #[command(flatten)]
    pub access: AccessArgs,
}

/// The flags by which a command is let in to a node.
#[derive(Clone, Debug, clap::Args)]
pub struct AccessArgs {
    /// Present the first token of this file
    /// [default: without --admin, the file of `WAYPOST_ADMIN__TOKEN_FILE`, if it is set]
    #[arg(
        long,
        global = true,
        display_order = 801,
        help_heading = "Node",
        value_name = "FILE"
    )]
    pub token_file: Option<PathBuf>,
    /// Trust these PEM certificates for an https:// address, beside the public roots
    #[arg(
        long,
        global = true,
        display_order = 802,
        help_heading = "Node",
        value_name = "FILE"
    )]
    pub ca_file: Option<PathBuf>,
    /// Present this PEM certificate chain, if the node has a `client_ca_file`
    #[arg(
        long,
        global = true,
        display_order = 802,
        help_heading = "Node",
        value_name = "FILE",
        requires = "key_file"
    )]
    pub cert_file: Option<PathBuf>,
    /// The PEM key of the certificate
    #[arg(
        long,
        global = true,
        display_order = 802,
        help_heading = "Node",
        value_name = "FILE",
        requires = "cert_file"
    )]
    pub key_file: Option<PathBuf>,
    /// Fail if an answer takes longer than this
    #[arg(
        long,
        global = true,
        display_order = 803,
        help_heading = "Node",
        value_name = "TIME",
        default_value = "30s",
        value_parser = patience
    )]
    pub timeout: Duration,
}

fn patience(text: &str) -> Result<Duration, String> {
    let time = parse_duration(text).ok().filter(|time| !time.is_zero());
    time.ok_or_else(|| "a time above 0, such as 30s".into())
}

impl AdminArgs {
    /// The client of that node, or the exit status, after the mistake is told.
    pub fn client(&self) -> Result<AdminClient, ExitCode> {
        self.access.client(self.admin.as_deref())
    }
}

impl AccessArgs {
    /// The client of the node at `url`, by default that of this machine, or the exit status, after
    /// the mistake is told.
    pub fn client(&self, url: Option<&str>) -> Result<AdminClient, ExitCode> {
        let identity = self.cert_file.as_deref().zip(self.key_file.as_deref());
        let tls = client_tls(self.ca_file.as_deref(), identity);
        let tls = tls.map_err(|why| misused(format_args!("TLS: {why}")))?;
        let authorization = self.authorization(url.is_none())?;
        let url = url.unwrap_or(OWN_NODE);
        // It would be known to all who see the arguments of the process.
        if Url::parse(url).is_ok_and(|url| has_login(&url)) {
            let why = "has a login, which is never sent; name a file with a token by --token-file";
            return Err(misused(format_args!("--admin: {why}")));
        }
        let client = AdminClient::new(url, authorization, tls, self.timeout);
        client.map_err(|why| misused(format_args!("--admin: {why}")))
    }

    fn authorization(&self, is_own_node: bool) -> Result<Option<HeaderValue>, ExitCode> {
        let named = self.token_file.clone().map(|file| ("--token-file", file));
        // In the environment of a node, the node's own file. Another node is not told its token.
        let variable = "WAYPOST_ADMIN__TOKEN_FILE";
        let own = std::env::var_os(variable).filter(|file| is_own_node && !file.is_empty());
        let own = own.map(|file| (variable, file.into()));
        let Some((source, file)) = named.or(own) else {
            return Ok(None);
        };
        let token = first_token(&file);
        let header = token.and_then(|token| bearer(&token).map_err(|why| why.to_string()));
        header
            .map(Some)
            .map_err(|why| misused(format_args!("{source}: {why}")))
    }
}

/// Why a node gives no answer.
struct AskError {
    why: String,
    /// It asks for this pause before the next try.
    pause: Option<Duration>,
}

impl From<String> for AskError {
    fn from(why: String) -> Self {
        Self { why, pause: None }
    }
}

/// Asks one node.
pub struct AdminClient {
    /// As the user has named it.
    url: String,
    authorization: Option<HeaderValue>,
    tls: Arc<ClientConfig>,
    timeout: Duration,
}

impl AdminClient {
    /// A client of the node at `url` that sends this header `Authorization`. `tls` is for `https://`.
    /// A request has failed if its answer takes longer than `timeout`.
    ///
    /// # Errors
    /// When `url` is no usable `http://` or `https://` URL.
    pub fn new(
        url: &str,
        authorization: Option<HeaderValue>,
        tls: ClientConfig,
        timeout: Duration,
    ) -> Result<Self, String> {
        let tls = Arc::new(tls);
        Endpoint::parse(url, || Arc::clone(&tls))?;
        Ok(Self {
            url: url.into(),
            authorization,
            tls,
            timeout,
        })
    }

    /// The node's answer to a GET of `path`, or the exit status, after the reason is told. A node that
    /// asks for a pause, as one that is busy does, is asked some more times.
    pub async fn get(&self, path: &str) -> Result<Value, ExitCode> {
        for _ in 1..BUSY_TRIES {
            match self.try_ask(path, None).await {
                Err(AskError {
                    pause: Some(pause),
                    why,
                }) => {
                    let pause = pause.min(BUSY_PAUSE_MAX);
                    tell(format_args!(
                        "--admin {}: {why}: asked again in {}",
                        self.url,
                        format_duration(pause)
                    ));
                    sleep(pause).await;
                }
                answer => return answer.map_err(|error| self.failed(error.why)),
            }
        }
        let answer = self.ask(path, None).await;
        answer.map_err(|why| self.failed(why))
    }

    /// The node's answer to the order at `path`, or the exit status, after the reason is told.
    pub async fn order(&self, path: &str, order: &Value) -> Result<Value, ExitCode> {
        let answer = self.ask(path, Some(order)).await;
        answer.map_err(|why| self.failed(why))
    }

    /// The address of the node, as the user has named it.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The node's answer to a POST of `body`, or to a GET.
    ///
    /// # Errors
    /// When there is no answer in time, or it is a refusal.
    pub async fn ask(&self, path: &str, body: Option<&Value>) -> Result<Value, String> {
        let answer = self.try_ask(path, body).await;
        answer.map_err(|error| error.why)
    }

    async fn try_ask(&self, path: &str, body: Option<&Value>) -> Result<Value, AskError> {
        let is_order = body.is_some();
        let body = body.map(|body| body.to_string().into());
        let endpoint = self.endpoint(path)?;
        let asked = endpoint.ask(body, CONNECT_TIMEOUT, ANSWER_MAX);
        let Ok(asked) = timeout(self.timeout, asked).await else {
            let order = if is_order {
                "; the order may be carried out all the same"
            } else {
                ""
            };
            return Err(format!("{}{order}", self.too_late()).into());
        };
        let (status, pause, answer) = asked.map_err(|failure| failure.to_string())?;
        if !status.is_success() {
            let why = refusal(status, &answer);
            return Err(AskError { why, pause });
        }
        let answer = serde_json::from_slice(&answer);
        answer.map_err(|why| format!("status {status}, not an answer of a node: {why}").into())
    }

    /// The events of the node at `path`, behind the event `last_id`.
    ///
    /// # Errors
    /// When the node does not begin to answer in time, or refuses.
    pub async fn events(&self, path: &str, last_id: Option<&str>) -> Result<EventStream, String> {
        let endpoint = self.endpoint(path)?;
        let mut headers = HeaderMap::new();
        // An id of another form is none of a node.
        if let Some(id) = last_id.and_then(|id| HeaderValue::from_str(id).ok()) {
            headers.insert(HeaderName::from_static("last-event-id"), id);
        }
        let open = async {
            let opened = endpoint.open(CONNECT_TIMEOUT, headers).await;
            let mut answer = opened.map_err(|failure| failure.to_string())?;
            let status = answer.status();
            if status.is_success() {
                return Ok(EventStream::new(answer));
            }
            let mut body = Vec::new();
            while let Some(Ok(piece)) = answer.next().await
                && body.len() < REFUSAL_MAX
            {
                body.extend_from_slice(&piece);
            }
            Err(refusal(status, &body))
        };
        let opened = timeout(self.timeout, open).await;
        opened.unwrap_or_else(|_| Err(self.too_late()))
    }

    fn endpoint(&self, path: &str) -> Result<Endpoint, String> {
        let url = format!("{}{path}", self.url.trim_end_matches('/'));
        let endpoint = Endpoint::parse(&url, || Arc::clone(&self.tls))?;
        Ok(endpoint.with_authorization(self.authorization.clone()))
    }

    fn too_late(&self) -> String {
        format!("no answer within {}", format_duration(self.timeout))
    }

    /// The value in an answer. If it is not the answer of a node, says so and gives the exit status.
    pub fn read<T: DeserializeOwned>(&self, answer: Value) -> Result<T, ExitCode> {
        let read = serde_json::from_value(answer);
        read.map_err(|why| self.failed(format!("not an answer of a node: {why}")))
    }

    /// Tells why the node gives no answer. Returns the exit status.
    pub fn failed(&self, why: String) -> ExitCode {
        failed(format_args!("--admin {}: {why}", self.url))
    }
}

/// Why a node has refused.
fn refusal(status: StatusCode, answer: &[u8]) -> String {
    // A proxy before the node may refuse in another form.
    let answer = serde_json::from_slice::<Value>(answer).unwrap_or_default();
    let detail = answer["detail"].as_str().map(str::to_owned);
    let why = detail.unwrap_or_else(|| format!("status {status}"));
    if status != StatusCode::UNAUTHORIZED {
        return why;
    }
    let flags = if answer["type"] == "urn:waypost:problem:certificate" {
        "--cert-file and --key-file"
    } else {
        "--token-file"
    };
    format!("{why} (name a file with one by {flags})")
}
