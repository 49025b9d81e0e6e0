//! One connection to the broker and its one channel. It ends even if the broker is silent.

use std::{
    io,
    net::{Shutdown, TcpStream},
    os::fd::AsFd as _,
    pin::Pin,
    sync::Arc,
};

use futures_util::Stream;
use lapin::{
    AsyncTcpStream, Channel, ChannelStatus, Connection, ConnectionProperties, ConnectionStatus,
    Event,
    tcp::OwnedTLSConfig,
    uri::{AMQPScheme, AMQPUri},
};
use tokio::time::timeout;
use tracing_mutex::parkinglot::Mutex;
use url::{Host, Url};

use super::super::{CONNECT_TIMEOUT, TransportError, secret::read_secret};
use crate::config::{self, SecretUrl};

/// Seconds between heartbeats unless the URL says otherwise. A broker is lost after two silent
/// ones, and that is noticed half a heartbeat later at most: within the ten seconds of the
/// transports' contract.
const HEARTBEAT: u16 = 3;
/// The longest heartbeat that keeps to the ten seconds.
const HEARTBEAT_MAX: u16 = 4;
/// The longest frames, in bytes, unless the URL asks for longer ones. The client allocates 32
/// frames in each direction at connect. Bodies are split into frames, but the properties of a
/// message must fit into one.
///
/// Our own properties are short, so the shortest limit that version 4 allows is enough to publish.
pub(super) const PUBLISH_FRAME_MAX: u32 = 8 << 10;
/// The broker's own default, which limits the properties that any publisher can set. A longer frame
/// ends the connection, and its message is redelivered to the next one.
pub(super) const CONSUME_FRAME_MAX: u32 = 128 << 10;
/// The reply code of a normal close.
pub(super) const OK: u16 = 200;

/// The broker's address, credentials and trust.
pub(super) struct Target {
    uri: AMQPUri,
    tls: OwnedTLSConfig,
}

impl Target {
    /// Reads the URL and the files of `settings`.
    pub(super) async fn read(settings: &config::RabbitmqConfig) -> Result<Self, TransportError> {
        let mut uri = parse(&settings.url)
            .map_err(|why| TransportError::Connect(format!("the URL: {why}")))?;
        uri.query.heartbeat.get_or_insert(HEARTBEAT);
        if let Some(path) = &settings.password_file {
            let password = read_secret(path).await?;
            password
                .trim()
                .clone_into(&mut uri.authority.userinfo.password);
        }
        let mut tls = OwnedTLSConfig::default();
        if let Some(path) = &settings.ca_file {
            let pem = read_secret(path).await?;
            // The client ignores everything that it cannot parse, even a file of another kind.
            if !pem.contains("-----BEGIN CERTIFICATE-----") {
                return Err(TransportError::Connect(format!(
                    "{}: holds no PEM certificate",
                    path.display()
                )));
            }
            tls.cert_chain = Some(pem);
        }
        Ok(Self { uri, tls })
    }
}

/// Host, port and virtual host of `url`, for messages: never the credentials.
pub(super) fn address(url: &SecretUrl) -> String {
    let Ok(AMQPUri {
        authority, vhost, ..
    }) = parse(url)
    else {
        return url.to_string();
    };
    let hint = if vhost.is_empty() {
        " (the URL ends in `/`; the default virtual host is `/%2f`)"
    } else {
        ""
    };
    format!(
        "{}:{}, virtual host `{vhost}`{hint}",
        authority.host, authority.port
    )
}

/// Parses an AMQP URL.
fn parse(url: &str) -> Result<AMQPUri, String> {
    let mut uri: AMQPUri = url.parse()?;
    // The client's parser does not know IPv6 addresses and reads them as "localhost".
    if let Ok(Some(Host::Ipv6(address))) = Url::parse(url).as_ref().map(Url::host) {
        uri.authority.host = address.to_string();
    }
    Ok(uri)
}

/// A connection and its channel. Dropping it ends both, on this side and on the broker's.
pub(super) struct Link {
    name: &'static str,
    connection: Connection,
    pub(super) channel: Channel,
    socket: Arc<Socket>,
}

impl Link {
    /// Connects and opens the channel. The caller sets the deadline; dropping the future leaves
    /// nothing behind.
    pub(super) async fn open(
        target: &Target,
        name: &'static str,
        frame_max: u32,
    ) -> lapin::Result<Self> {
        let mut uri = target.uri.clone();
        let asked = uri.query.frame_max.unwrap_or_default();
        uri.query.frame_max = Some(asked.max(frame_max));
        let socket = Arc::<Socket>::default();
        // The link that is given up meanwhile takes the socket with it.
        let slot = Arc::downgrade(&socket);
        let tls = target.tls.clone();
        let properties = ConnectionProperties::default().with_connection_name(name.into());
        let connection = Connection::connector(
            uri,
            lapin::runtime::default_runtime()?,
            async move |uri, runtime| {
                let connected = timeout(CONNECT_TIMEOUT, async {
                    let address = (uri.authority.host.clone(), uri.authority.port);
                    let stream =
                        AsyncTcpStream::connect(&runtime, runtime.to_socket_addrs(address)).await?;
                    if let AsyncTcpStream::Plain(plain) = &stream {
                        let handle = plain.get_ref().as_fd().try_clone_to_owned()?;
                        let slot = slot.upgrade().ok_or(io::ErrorKind::ConnectionAborted)?;
                        slot.0.lock().replace(handle.into());
                    }
                    match uri.scheme {
                        AMQPScheme::AMQP => Ok(stream),
                        AMQPScheme::AMQPS => {
                            stream.into_tls(&uri.authority.host, tls.as_ref()).await
                        }
                    }
                });
                Ok(connected
                    .await
                    .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?)
            },
            properties,
        )
        .await?;
        let channel = connection.create_channel().await?;
        Ok(Self {
            name,
            connection,
            channel,
            socket,
        })
    }

    /// A channel for a question that the broker may answer by closing it.
    pub(super) async fn new_channel(&self) -> lapin::Result<Channel> {
        self.connection.create_channel().await
    }

    pub(super) fn events(&self) -> Pin<Box<dyn Stream<Item = Event> + Send>> {
        Box::pin(self.connection.events_listener())
    }

    pub(super) fn watch(&self) -> Watch {
        Watch {
            name: self.name,
            connection: self.connection.status().clone(),
            channel: self.channel.status().clone(),
        }
    }

    /// The agreed limit of a frame, in bytes.
    pub(super) fn frame_max(&self) -> usize {
        usize::try_from(self.connection.configuration().frame_max()).unwrap_or(usize::MAX)
    }

    /// The agreed settings that weaken the guarantee.
    pub(super) fn warnings(&self) -> Vec<String> {
        let warning = match self.connection.configuration().heartbeat() {
            0 => "heartbeats are off: a broker that falls silent is not noticed".to_owned(),
            1..=HEARTBEAT_MAX => return Vec::new(),
            s => format!("a heartbeat of {s} s: a silent broker is noticed after twice as long"),
        };
        vec![warning]
    }

    /// Closes the channel, then the connection. The close of a channel stays behind the acks before
    /// it; that of a connection overtakes them.
    pub(super) async fn close(&self) {
        // An error means that the channel or connection is closed already.
        self.channel.close(OK, "closing".into()).await.ok();
        self.connection.close(OK, "closing".into()).await.ok();
    }

    /// Ends the connection without the broker's help.
    pub(super) fn cut(&self) {
        self.socket.cut();
    }
}

/// The state of a [`Link`] that another owns.
pub(super) struct Watch {
    pub(super) name: &'static str,
    connection: ConnectionStatus,
    channel: ChannelStatus,
}

impl Watch {
    pub(super) fn is_up(&self) -> bool {
        self.connection.connected() && self.channel.connected()
    }
}

/// A second handle to a connection's socket, once there is one. Dropping it ends the socket. When
/// the client's thread connects and closes, it waits for the broker without a deadline. If the
/// broker is silent, only the end of the socket frees that thread.
#[derive(Default)]
struct Socket(Mutex<Option<TcpStream>>);

impl Socket {
    fn cut(&self) {
        if let Some(socket) = self.0.lock().take() {
            // This fails if the peer has closed the socket already.
            socket.shutdown(Shutdown::Both).ok();
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.cut();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_the_host_they_show() {
        for (url, host, port) in [
            ("amqp://guest:guest@127.0.0.1:5672/%2f", "127.0.0.1", 5672),
            ("amqp://broker", "broker", 5672),
            ("amqps://u:p@broker:5999/v?heartbeat=9", "broker", 5999),
            ("amqp://u:p@[::1]:5673/%2f", "::1", 5673),
            ("amqps://[fe80::2]", "fe80::2", 5671),
        ] {
            let uri = parse(url).unwrap();
            assert_eq!(
                (uri.authority.host.as_str(), uri.authority.port),
                (host, port),
                "{url}"
            );
        }
        assert!(parse("http://broker").is_err());
    }
}
