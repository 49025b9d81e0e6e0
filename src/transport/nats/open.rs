//! Opens a connection: servers, credentials, TLS.

use std::time::Duration;

use async_nats::{Client, ConnectOptions, Event, ServerAddr};
use percent_encoding::percent_decode_str;

use super::{REQUEST_TIMEOUT, cannot};
use crate::{
    config,
    transport::{TransportError, lost::Lost, secret::read_secret},
};

/// How long one server may take to accept the connection.
const SERVER_TIMEOUT: Duration = Duration::from_secs(3);
/// A server that is silent for three of these is gone.
const PING: Duration = Duration::from_secs(3);

/// Connects to one of the servers. Sets `lost` when the connection ends later.
pub async fn open(settings: &config::NatsConfig, lost: Lost) -> Result<Client, TransportError> {
    let servers = servers(&settings.url)?;
    let mut options = ConnectOptions::new()
        .name("waypost")
        .connection_timeout(SERVER_TIMEOUT)
        .request_timeout(Some(REQUEST_TIMEOUT))
        .ping_interval(PING)
        // The lane reconnects, to the configured servers only. A client that has lost its server
        // tries each once and ends. The client counts its first connection too, and 0 means no
        // limit.
        .max_reconnects(servers.len())
        .ignore_discovered_servers()
        .event_callback(move |event| {
            if let Event::Disconnected | Event::Closed | Event::LameDuckMode = event {
                lost.set(event);
            }
            std::future::ready(())
        });
    options = match credentials(settings, &servers).await? {
        Credentials::None => options,
        Credentials::Token(token) => options.token(token),
        Credentials::User { name, password } => options.user_and_password(name, password),
        Credentials::Jwt(text) => options.credentials(&text).map_err(cannot)?,
    };
    if let Some(file) = &settings.ca_file {
        // An authority file means TLS, even if the server offers plain text.
        options = options
            .require_tls(true)
            .add_root_certificates(file.to_path_buf());
    }
    if let (Some(certificate), Some(key)) = (&settings.cert_file, &settings.key_file) {
        options = options
            .require_tls(true)
            .add_client_certificate(certificate.to_path_buf(), key.to_path_buf());
    }
    options.connect(servers).await.map_err(cannot)
}

fn servers(urls: &str) -> Result<Vec<ServerAddr>, TransportError> {
    urls.split(',')
        .map(|url| url.trim().parse().map_err(cannot))
        .collect()
}

#[derive(Debug, PartialEq, Eq)]
enum Credentials {
    None,
    Token(String),
    User {
        name: String,
        password: String,
    },
    /// The text of a `.creds` file.
    Jwt(String),
}

/// Credentials from files, else from the URL, whose user the client ignores.
async fn credentials(
    settings: &config::NatsConfig,
    servers: &[ServerAddr],
) -> Result<Credentials, TransportError> {
    let user = servers
        .iter()
        .find_map(|server| Some((decoded(server.username()?), server.password().map(decoded))));
    if let Some(file) = &settings.creds_file {
        return Ok(Credentials::Jwt(read_secret(file).await?));
    }
    if let Some(file) = &settings.token_file {
        return Ok(Credentials::Token(
            read_secret(file).await?.trim().to_owned(),
        ));
    }
    match (user, &settings.password_file) {
        (None, None) => Ok(Credentials::None),
        (None, Some(_)) => Err(cannot("password_file needs a user in the URL")),
        (Some((name, _)), Some(file)) => Ok(Credentials::User {
            name,
            password: read_secret(file).await?.trim().to_owned(),
        }),
        (Some((name, Some(password))), None) => Ok(Credentials::User { name, password }),
        (Some((token, None)), None) => Ok(Credentials::Token(token)),
    }
}

/// A URL's user or password, without its percent-encoding.
fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    async fn of(
        url: &str,
        change: impl FnOnce(&mut config::NatsConfig),
    ) -> Result<Credentials, TransportError> {
        let mut settings = config::NatsConfig {
            url: url.into(),
            ..config::NatsConfig::default()
        };
        change(&mut settings);
        credentials(&settings, &servers(url)?).await
    }

    fn user(name: &str, password: &str) -> Credentials {
        Credentials::User {
            name: name.into(),
            password: password.into(),
        }
    }

    #[tokio::test]
    async fn credentials_come_from_a_file_or_else_from_the_url() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "secret").unwrap();
        let path = || Some(file.path().into());
        assert_eq!(of("nats://h", |_| {}).await, Ok(Credentials::None));
        assert_eq!(
            of("nats://h,nats://u:p@i", |_| {}).await,
            Ok(user("u", "p"))
        );
        assert_eq!(
            of("nats://u%40x:p%3a%c3%b1%@h", |_| {}).await,
            Ok(user("u@x", "p:ñ%"))
        );
        assert_eq!(
            of("nats://token@h", |_| {}).await,
            Ok(Credentials::Token("token".into()))
        );
        assert_eq!(
            of("nats://u:p@h", |s| s.password_file = path()).await,
            Ok(user("u", "secret"))
        );
        assert_eq!(
            of("nats://u:p@h", |s| s.token_file = path()).await,
            Ok(Credentials::Token("secret".into()))
        );
        assert_eq!(
            of("nats://h", |s| s.creds_file = path()).await,
            Ok(Credentials::Jwt("secret\n".into()))
        );
        assert!(of("nats://h", |s| s.password_file = path()).await.is_err());
        assert!(
            of("nats://u@h", |s| s.password_file = Some("/nowhere".into()))
                .await
                .is_err()
        );
        assert!(of("http://h", |_| {}).await.is_err());
    }
}
