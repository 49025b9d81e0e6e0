//! Opening a connection: servers, credentials, TLS.

use std::{fs, path::Path, time::Duration};

use async_nats::{Client, ConnectOptions, Event, ServerAddr};
use percent_encoding::percent_decode_str;
use tokio::sync::watch;

use super::{REQUEST_TIMEOUT, cannot};
use crate::{config, transport::TransportError};

/// How long one server may take to let us in, when there are others to try.
const SERVER_TIMEOUT: Duration = Duration::from_secs(3);
/// A peer that is silent for three of these is gone.
const PING: Duration = Duration::from_secs(3);

/// Connects to one of the servers. What ends the connection later is told to `lost`, once.
pub async fn open(
    settings: &config::Nats,
    lost: watch::Sender<Option<String>>,
) -> Result<Client, TransportError> {
    let servers = servers(&settings.url)?;
    let mut options = ConnectOptions::new()
        .name("waypost")
        .connection_timeout(SERVER_TIMEOUT)
        .request_timeout(Some(REQUEST_TIMEOUT))
        .ping_interval(PING)
        // The lane connects anew, to the servers that are configured; a client that has lost its server tries each once, and
        // ends. It counts its first connection too, and takes 0 for no limit.
        .max_reconnects(servers.len())
        .ignore_discovered_servers()
        .event_callback(move |event| {
            if let Event::Disconnected | Event::Closed | Event::LameDuckMode = event {
                super::lose(&lost, event.to_string());
            }
            std::future::ready(())
        });
    options = match credentials(settings, &servers)? {
        Credentials::None => options,
        Credentials::Token(token) => options.token(token),
        Credentials::User { name, password } => options.user_and_password(name, password),
        Credentials::Jwt(text) => options.credentials(&text).map_err(cannot)?,
    };
    if let Some(file) = &settings.ca_file {
        // Who names whom to trust does not want to be talked down to plain text.
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

/// Files come before the URL: the client takes none from there by itself.
fn credentials(
    settings: &config::Nats,
    servers: &[ServerAddr],
) -> Result<Credentials, TransportError> {
    let user = servers
        .iter()
        .find_map(|server| Some((decoded(server.username()?), server.password().map(decoded))));
    if let Some(file) = &settings.creds_file {
        return Ok(Credentials::Jwt(read(file)?));
    }
    if let Some(file) = &settings.token_file {
        return Ok(Credentials::Token(read(file)?.trim().to_owned()));
    }
    match (user, &settings.password_file) {
        (None, None) => Ok(Credentials::None),
        (None, Some(_)) => Err(cannot("password_file needs a user in the URL")),
        (Some((name, _)), Some(file)) => Ok(Credentials::User {
            name,
            password: read(file)?.trim().to_owned(),
        }),
        (Some((name, Some(password))), None) => Ok(Credentials::User { name, password }),
        (Some((token, None)), None) => Ok(Credentials::Token(token)),
    }
}

fn read(file: &Path) -> Result<String, TransportError> {
    fs::read_to_string(file).map_err(|why| cannot(format!("{}: {why}", file.display())))
}

/// A URL's user or password, without its percent-encoding.
fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn of(
        url: &str,
        change: impl FnOnce(&mut config::Nats),
    ) -> Result<Credentials, TransportError> {
        let mut settings = config::Nats {
            url: url.into(),
            ..config::Nats::default()
        };
        change(&mut settings);
        credentials(&settings, &servers(url)?)
    }

    fn user(name: &str, password: &str) -> Credentials {
        Credentials::User {
            name: name.into(),
            password: password.into(),
        }
    }

    #[test]
    fn credentials_come_from_a_file_or_else_from_the_url() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "secret").unwrap();
        let path = || Some(file.path().into());
        assert_eq!(of("nats://h", |_| {}), Ok(Credentials::None));
        assert_eq!(of("nats://h,nats://u:p@i", |_| {}), Ok(user("u", "p")));
        assert_eq!(
            of("nats://u%40x:p%3a%c3%b1%@h", |_| {}),
            Ok(user("u@x", "p:ñ%"))
        );
        assert_eq!(
            of("nats://token@h", |_| {}),
            Ok(Credentials::Token("token".into()))
        );
        assert_eq!(
            of("nats://u:p@h", |s| s.password_file = path()),
            Ok(user("u", "secret"))
        );
        assert_eq!(
            of("nats://u:p@h", |s| s.token_file = path()),
            Ok(Credentials::Token("secret".into()))
        );
        assert_eq!(
            of("nats://h", |s| s.creds_file = path()),
            Ok(Credentials::Jwt("secret\n".into()))
        );
        assert!(of("nats://h", |s| s.password_file = path()).is_err());
        assert!(of("nats://u@h", |s| s.password_file = Some("/nowhere".into())).is_err());
        assert!(of("http://h", |_| {}).is_err());
    }
}
