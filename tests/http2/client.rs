//! A client of HTTP/2: by the library, and frame by frame.

use std::{
    future::{Future, poll_fn},
    sync::Arc,
    task::Poll,
    time::Duration,
};

use actix_rt::task::JoinHandle;
use bytes::{Bytes, BytesMut};
use futures_util::FutureExt as _;
use h2::{
    Ping, SendStream,
    client::{ResponseFuture, SendRequest, handshake},
};
use http::{HeaderMap, Request, StatusCode, request::Builder};
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf, split},
    net::TcpStream,
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::support::node::PATIENCE;

pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// A connection with a negotiated HTTP/2.
pub struct Http2Connection {
    requests: SendRequest<Bytes>,
    driver: JoinHandle<Result<(), h2::Error>>,
    pings: mpsc::UnboundedSender<tokio::sync::oneshot::Sender<()>>,
}

pub async fn tls_stream(port: u16, tls: Arc<ClientConfig>) -> TlsStream<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await;
    let name = ServerName::try_from("localhost").expect("a name");
    let connecting = TlsConnector::from(tls).connect(name, stream.expect("a socket"));
    let stream = connecting.await.expect("a handshake");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    stream
}

impl Http2Connection {
    pub async fn open(port: u16, tls: Arc<ClientConfig>) -> Self {
        let stream = tls_stream(port, tls).await;
        let (requests, mut connection) = handshake(stream).await.expect("HTTP/2");
        let mut ping_pong = connection.ping_pong().expect("the first call");
        let driver = actix_rt::spawn(connection);
        let (pings, mut asked) = mpsc::unbounded_channel::<tokio::sync::oneshot::Sender<()>>();
        actix_rt::spawn(async move {
            while let Some(answer) = asked.recv().await {
                if ping_pong.ping(Ping::opaque()).await.is_ok() {
                    answer.send(()).ok();
                }
            }
        });
        Self {
            requests,
            driver,
            pings,
        }
    }

    /// Sends a request and its body, at once.
    pub fn begin(
        &self,
        request: Builder,
        body: Option<Bytes>,
    ) -> impl Future<Output = Result<Answer, h2::Error>> + use<> {
        let mut requests = self.requests.clone();
        let request = request.body(()).expect("a request");
        let sent = requests.send_request(request, body.is_none());
        async move {
            let (answer, stream) = sent?;
            let sending = async move {
                if let Some(body) = body {
                    send_all(stream, body).await;
                }
            };
            // An answer may come before the body has left.
            let sending = actix_rt::spawn(sending);
            let answer = whole(answer).await;
            sending.abort();
            answer
        }
    }

    pub async fn ask(
        &mut self,
        request: Builder,
        body: impl Into<String>,
    ) -> Result<Answer, h2::Error> {
        let answer = self.begin(request, Some(Bytes::from(body.into())));
        timeout(PATIENCE, answer).await.expect("an answer in time")
    }

    /// Sends the head of a request, whose body is to come.
    pub fn begin_body(
        &self,
        request: Builder,
    ) -> (
        impl Future<Output = Result<Answer, h2::Error>> + use<>,
        SendStream<Bytes>,
    ) {
        let mut requests = self.requests.clone();
        let request: Request<()> = request.body(()).expect("a request");
        let (answer, stream) = requests.send_request(request, false).expect("it is open");
        (whole(answer), stream)
    }

    /// Sends a body only when it is asked for. Whether it was.
    pub async fn ask_and_wait(&mut self, request: Builder, body: &'static str) -> (bool, Answer) {
        let request = request.header("expect", "100-continue");
        let request = request.body(()).expect("a request");
        let mut requests = self.requests.clone();
        let (mut answer, mut stream) = requests.send_request(request, false).expect("it is open");
        let asked = poll_fn(|context| match answer.poll_informational(context) {
            Poll::Ready(Some(Ok(told))) => Poll::Ready(told.status() == StatusCode::CONTINUE),
            Poll::Ready(_) => Poll::Ready(false),
            Poll::Pending => Poll::Pending,
        });
        let asked = timeout(PATIENCE, asked).await.expect("a word in time");
        if asked {
            stream.send_data(body.into(), true).expect("it is open");
        }
        (asked, whole(answer).await.expect("an answer"))
    }

    /// Sends a body byte by byte until the answer is there.
    pub async fn trickle(&self, request: Builder) -> Answer {
        let (answer, mut body) = self.begin_body(request);
        let trickling = actix_rt::spawn(async move {
            while body.send_data(Bytes::from_static(b" "), false).is_ok() {
                sleep(Duration::from_millis(50)).await;
            }
        });
        let answer = timeout(PATIENCE, answer).await.expect("an answer in time");
        trickling.abort();
        answer.expect("an answer")
    }

    /// Waits until the node has read all that was sent before.
    pub async fn round_trip(&self) {
        let (answer, answered) = tokio::sync::oneshot::channel();
        self.pings.send(answer).expect("it is open");
        let answered = timeout(PATIENCE, answered).await.expect("in time");
        answered.expect("the connection is open");
    }

    /// Whether the node has ended it, or wants no more streams.
    pub fn is_over(&mut self) -> bool {
        let ready = poll_fn(|context| self.requests.poll_ready(context)).now_or_never();
        self.driver.is_finished() || matches!(ready, Some(Err(_)))
    }

    /// Waits for its end.
    pub async fn ended(self) -> Result<(), h2::Error> {
        self.driver.await.expect("no panic")
    }
}

async fn send_all(mut stream: SendStream<Bytes>, mut body: Bytes) {
    while !body.is_empty() {
        stream.reserve_capacity(body.len());
        let room = poll_fn(|context| stream.poll_capacity(context)).await;
        let Some(Ok(room)) = room else { return };
        let piece = body.split_to(room.min(body.len()));
        if stream.send_data(piece, false).is_err() {
            return;
        }
    }
    stream.send_data(Bytes::new(), true).ok();
}

async fn whole(answer: ResponseFuture) -> Result<Answer, h2::Error> {
    let (head, mut stream) = answer.await?.into_parts();
    let mut body = BytesMut::new();
    while let Some(piece) = stream.data().await {
        let piece = piece?;
        stream.flow_control().release_capacity(piece.len())?;
        body.extend_from_slice(&piece);
    }
    Ok(Answer {
        status: head.status,
        headers: head.headers,
        body: body.freeze(),
    })
}

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

/// A frame (RFC 9113, 4.1).
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a frame is small");
    let mut frame = length.to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// Headers, without compression (RFC 7541, 6.2.2).
pub fn fields(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            let length = u8::try_from(text.len()).expect("short");
            assert!(length < 127, "one byte of length");
            block.push(length);
            block.extend(text.as_bytes());
        }
    }
    block
}

/// The head of a request.
pub fn head(method: &str, path: &str) -> Vec<u8> {
    fields(&[
        (":method", method),
        (":scheme", "https"),
        (":path", path),
        (":authority", "localhost"),
    ])
}

/// A connection that breaks the rules.
pub struct RawConnection {
    pub reader: RawReader,
    pub writer: WriteHalf<TlsStream<TcpStream>>,
}

pub struct RawReader(ReadHalf<TlsStream<TcpStream>>);

/// The type, the flags and the stream of a frame that the node has sent, and what is in it.
pub type RawFrame = (u8, u8, u32, Vec<u8>);

impl RawConnection {
    /// `settings` are pairs of an identifier and a value.
    pub async fn open(port: u16, tls: Arc<ClientConfig>, settings: &[(u16, u32)]) -> Self {
        let (reader, mut writer) = split(tls_stream(port, tls).await);
        let mut payload = Vec::new();
        for (name, value) in settings {
            payload.extend(name.to_be_bytes());
            payload.extend(value.to_be_bytes());
        }
        let mut first = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        first.extend(frame(SETTINGS, 0, 0, &payload));
        writer.write_all(&first).await.expect("room");
        Self {
            reader: RawReader(reader),
            writer,
        }
    }

    /// Sends `piece` again and again until the node ends the connection, or `times` times. The error
    /// code of its GOAWAY; `None` if it just closes.
    pub async fn flood(self, piece: Vec<u8>, times: usize) -> Option<u32> {
        let Self { reader, mut writer } = self;
        let writing = actix_rt::spawn(async move {
            for _ in 0..times {
                if writer.write_all(&piece).await.is_err() {
                    break;
                }
            }
            // It stays open.
            writer
        });
        let code = reader.until_closed().await;
        writing.abort();
        code
    }
}

impl RawReader {
    /// `None` at the end.
    pub async fn frame(&mut self) -> Option<RawFrame> {
        let mut head = [0; 9];
        self.0.read_exact(&mut head).await.ok()?;
        let [a, b, c, kind, flags, stream @ ..] = head;
        let length = u32::from_be_bytes([0, a, b, c]);
        let mut payload = vec![0; usize::try_from(length).expect("24 bits")];
        self.0.read_exact(&mut payload).await.ok()?;
        Some((kind, flags, u32::from_be_bytes(stream), payload))
    }

    /// Waits for a frame of this type.
    pub async fn next(&mut self, wanted: u8) -> Option<RawFrame> {
        loop {
            let frame = timeout(PATIENCE, self.frame()).await.expect("a frame")?;
            if frame.0 == wanted {
                return Some(frame);
            }
        }
    }

    /// The error code of the last GOAWAY before the end, which has to come.
    pub async fn until_closed(mut self) -> Option<u32> {
        let reading = async {
            let mut code = None;
            while let Some((kind, .., payload)) = self.frame().await {
                if kind == GOAWAY {
                    code = payload[4..8].try_into().ok().map(u32::from_be_bytes);
                }
            }
            code
        };
        timeout(PATIENCE, reading).await.expect("it is closed")
    }
}
