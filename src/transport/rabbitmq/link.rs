//! One connection to the broker, with its one channel, and what it takes to be sure that it ends.

use std::{
    io,
    net::{Shutdown, TcpStream},
    os::fd::AsFd as _,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::Stream;
use lapin::{
    AsyncTcpStream, Channel, ChannelStatus, Connection, ConnectionProperties, ConnectionStatus,
    ErrorKind, Event,
    options::QueueDeclareOptions,
    protocol::{AMQPErrorKind, AMQPHardError},
    tcp::OwnedTLSConfig,
    types::{FieldTable, ShortString},
    uri::{AMQPScheme, AMQPUri},
};
use tokio::{net, time::timeout};

use super::super::{CONNECT_TIMEOUT, TransportError};
use crate::config;

/// Seconds between heartbeats unless the URL says otherwise. A silent broker is given up after two of them, and noticed
/// half of one later at most: within the ten seconds of the transports' contract.
const HEARTBEAT: u16 = 3;
/// The longest heartbeat that keeps to the ten seconds.
const HEARTBEAT_MAX: u16 = 4;
/// The longest frame, in bytes, of a connection that is [`Frames::Short`], unless the URL says otherwise: the least that
/// version 4 allows. Bodies take several, but all properties of a message are in one.
const SHORT: u32 = 8 << 10;
/// The same of one that is [`Frames::Long`], unless the URL says more. A connection keeps room for 32 frames each way from its
/// start, so a server must not name the length; and no longer frame than 32 short ones is ever recognized as one.
const LONG: u32 = 32 * SHORT;
const OK: u16 = 200;
/// How long the server may take to say its version, and how many bytes it may need until then.
const GREETING_TIMEOUT: Duration = Duration::from_secs(2);
const GREETING_MAX: usize = 4096;

/// Where the broker is and how to speak with it.
pub(super) struct Target {
    uri: AMQPUri,
    tls: OwnedTLSConfig,
}

impl Target {
    /// Reads the URL and the files of `settings`.
    pub(super) async fn read(settings: &config::Rabbitmq) -> Result<Self, TransportError> {
        let mut uri = parse(&settings.url)
            .map_err(|why| TransportError::Connect(format!("the URL: {why}")))?;
        uri.query.heartbeat.get_or_insert(HEARTBEAT);
        if let Some(path) = &settings.password_file {
            let password = read_text(path).await?;
            password
                .trim_end_matches(['\r', '\n'])
                .clone_into(&mut uri.authority.userinfo.password);
        }
        let mut tls = OwnedTLSConfig::default();
        if let Some(path) = &settings.ca_file {
            let pem = read_text(path).await?;
            // The client skips what it cannot parse, so a file of the wrong kind would pass unseen.
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

    /// Host and port, for messages: never the credentials.
    pub(super) fn address(&self) -> String {
        format!("{}:{}", self.uri.authority.host, self.uri.authority.port)
    }

    /// What the server says of its version in its greeting, which the client keeps to itself; asking costs a connection,
    /// and a line in the server's log. `None` over TLS, or where the server says none: nothing depends on it.
    pub(super) async fn server_version(&self) -> Option<String> {
        let greeted = timeout(GREETING_TIMEOUT, async {
            let stream =
                net::TcpStream::connect((&*self.uri.authority.host, self.uri.authority.port))
                    .await?;
            stream.writable().await?;
            stream.try_write(b"AMQP\0\0\x09\x01")?;
            let mut greeting = Vec::with_capacity(GREETING_MAX);
            loop {
                stream.readable().await?;
                match stream.try_read_buf(&mut greeting) {
                    Ok(0) => return Ok(None),
                    Ok(_) => {}
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    Err(e) => return Err(e),
                }
                let version = version_in(&greeting);
                if version.is_some() || greeting.len() >= GREETING_MAX {
                    return Ok(version);
                }
            }
        });
        let plain = self.uri.scheme == AMQPScheme::AMQP;
        if plain {
            greeted.await.ok()?.ok()?
        } else {
            None
        }
    }
}

/// Parses an AMQP URL.
fn parse(url: &str) -> Result<AMQPUri, String> {
    let mut uri: AMQPUri = url.parse()?;
    // The parser knows no IPv6 addresses, and takes "localhost" in their place.
    let authority = url.split_once("://").map_or("", |(_, rest)| {
        rest.split(['/', '?']).next().unwrap_or_default()
    });
    let host = authority
        .rsplit_once('@')
        .map_or(authority, |(_, host)| host);
    if let Some((address, _)) = host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        address.clone_into(&mut uri.authority.host);
    }
    Ok(uri)
}

/// The `version` among the server's properties, once it is there whole. It is a "long string": its length in four bytes.
fn version_in(greeting: &[u8]) -> Option<String> {
    const KEY: &[u8] = b"\x07versionS";
    let at = greeting.windows(KEY.len()).position(|bytes| bytes == KEY)?;
    let (length, rest) = greeting[at + KEY.len()..].split_first_chunk::<4>()?;
    let version = rest.get(..u32::from_be_bytes(*length) as usize)?;
    std::str::from_utf8(version).ok().map(str::to_owned)
}

async fn read_text(path: &std::path::Path) -> Result<String, TransportError> {
    let owned = path.to_owned();
    tokio::task::spawn_blocking(move || std::fs::read_to_string(owned))
        .await
        .unwrap_or_else(|e| Err(io::Error::other(e)))
        .map_err(|e| TransportError::Connect(format!("{}: {e}", path.display())))
}

/// How long the frames of a connection may be.
#[derive(Clone, Copy)]
pub(super) enum Frames {
    /// All that this side sends fits, and most of what others do.
    Short,
    Long,
}

/// Whether a connection has failed because its frames may not be as long as what came.
pub(super) fn are_too_short(why: &lapin::Error) -> bool {
    let failure = AMQPErrorKind::Hard(AMQPHardError::FRAMEERROR);
    matches!(why.kind(), ErrorKind::ProtocolError(why) if *why.kind() == failure)
}

/// A connection and its channel. Dropped, it is gone, on this side and on the broker's.
pub(super) struct Link {
    name: &'static str,
    connection: Connection,
    pub(super) channel: Channel,
    socket: Socket,
}

impl Link {
    /// Connects and opens the channel. Has no deadline of its own; dropped, it leaves nothing behind.
    pub(super) async fn open(
        target: &Target,
        name: &'static str,
        frames: Frames,
    ) -> lapin::Result<Self> {
        let mut uri = target.uri.clone();
        let asked = uri.query.frame_max;
        uri.query.frame_max = Some(match frames {
            Frames::Short => asked.unwrap_or(SHORT),
            Frames::Long => asked.map_or(LONG, |asked| asked.max(LONG)),
        });
        let socket = Socket::default();
        let slot = Arc::clone(&socket.0);
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
                        keep(&slot, plain.get_ref().as_fd().try_clone_to_owned()?.into())?;
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

    /// Whether the queue is there. It is asked on a channel of its own, which the broker closes if it is not.
    pub(super) async fn has_queue(&self, queue: &ShortString) -> bool {
        let options = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        let Ok(channel) = self.connection.create_channel().await else {
            return false;
        };
        let found = channel
            .queue_declare(queue.clone(), options, FieldTable::default())
            .await
            .is_ok();
        if found {
            // An error means that it is closed already.
            channel.close(OK, "asked".into()).await.ok();
        }
        found
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

    /// The longest frame that both sides agreed on, in bytes.
    pub(super) fn frame_max(&self) -> usize {
        usize::try_from(self.connection.configuration().frame_max()).unwrap_or(usize::MAX)
    }

    /// Where the settings that both sides agreed on weaken the guarantee.
    pub(super) fn warnings(&self) -> Vec<String> {
        match self.connection.configuration().heartbeat() {
            0 => vec!["heartbeats are off: a broker that falls silent is not noticed".to_owned()],
            s if s > HEARTBEAT_MAX => vec![format!(
                "a heartbeat of {s} s: a broker that falls silent is noticed after {} s only",
                2 * u32::from(s)
            )],
            _ => Vec::new(),
        }
    }

    /// Closes the channel, then the connection. The channel comes first: its close is in order with the
    /// acknowledgements before it, that of the connection overtakes them.
    pub(super) async fn close(&self) {
        // An error here means that it is closed already.
        self.channel.close(OK, "closing".into()).await.ok();
        self.connection.close(OK, "closing".into()).await.ok();
    }

    /// Ends the connection without the broker's help.
    pub(super) fn cut(&self) {
        self.socket.cut();
    }
}

/// Looks at a link that somebody else owns.
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

/// A second handle on the socket of a connection. The client's own thread waits for the broker's answer without a deadline
/// when it connects and when it closes; only the end of its socket frees it from a broker that has fallen silent.
#[derive(Default)]
struct Socket(Arc<Mutex<Slot>>);

#[derive(Default)]
enum Slot {
    #[default]
    Unopened,
    Open(TcpStream),
    Cut,
}

impl Socket {
    fn cut(&self) {
        let slot = std::mem::replace(
            &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner),
            Slot::Cut,
        );
        if let Slot::Open(socket) = slot {
            // It fails on a socket that the peer has closed, which is as good.
            socket.shutdown(Shutdown::Both).ok();
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.cut();
    }
}

/// Puts the socket into its slot, unless nobody wants the connection any more.
fn keep(slot: &Mutex<Slot>, socket: TcpStream) -> io::Result<()> {
    let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
    if matches!(*slot, Slot::Cut) {
        return Err(io::ErrorKind::ConnectionAborted.into());
    }
    *slot = Slot::Open(socket);
    Ok(())
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

    #[test]
    fn a_version_is_read_from_a_greeting_once_it_is_whole() {
        let greeting = b"\x01\0\0\x07productS\0\0\0\x08RabbitMQ\x07versionS\0\0\0\x063.10.8\0\0";
        assert_eq!(version_in(greeting).as_deref(), Some("3.10.8"));
        assert_eq!(version_in(&greeting[..greeting.len() - 3]), None);
        assert_eq!(version_in(b""), None);
    }
}
