//! Streams of events that leave the HTTP library behind their head.
//!
//! A connection of HTTP/1.1 in the hands of actix-http has buffers for requests and answers, and the room for a
//! request under way: about 15 KiB. A stream of events needs none of them. So its handler answers with
//! a head alone, which says that the connection ends behind this answer, and hands over the body. When
//! the library closes the connection, a small task takes it, and writes pieces that all readers share.

use std::{
    cell::RefCell,
    convert::Infallible,
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use actix_web::{
    HttpRequest, HttpResponse, HttpResponseBuilder,
    http::{Version, header},
};
use bytes::Bytes;
use futures_util::{
    Stream, StreamExt as _,
    future::{LocalBoxFuture, OptionFuture},
    stream,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    time::{Instant, sleep_until},
};

use super::{events::PING, problem::Problem};

const LAST_CHUNK: &[u8] = b"0\r\n\r\n";
/// The most bytes that a client may send behind its last request, which nobody answers.
const UNREAD_MAX: usize = 16 << 10;
/// The pings to a client that sends no more, to know whether it still reads.
const PROBES: u32 = 2;
const PROBE_EVERY: Duration = Duration::from_secs(1);

/// The body behind the head.
struct LongBody {
    pieces: Pin<Box<dyn Stream<Item = Bytes>>>,
    /// A client of HTTP/1.0 knows no chunks: its body ends with the connection.
    is_chunked: bool,
}

/// The body that a connection is to have, once there is one. Clones share it.
#[derive(Clone, Default)]
pub struct Handover(Rc<RefCell<Option<LongBody>>>);

impl Handover {
    /// An answer of this version whose body the connection has to itself, until it ends or the client
    /// leaves.
    pub fn answer(
        &self,
        version: Version,
        mut head: HttpResponseBuilder,
        pieces: impl Stream<Item = Bytes> + 'static,
    ) -> HttpResponse {
        let is_chunked = version >= Version::HTTP_11;
        let pieces = Box::pin(pieces);
        *self.0.borrow_mut() = Some(LongBody { pieces, is_chunked });
        if is_chunked {
            head.insert_header((header::TRANSFER_ENCODING, "chunked"));
        }
        let nothing = stream::empty::<Result<Bytes, Problem>>();
        let mut answer = head.force_close().streaming(nothing);
        // The library would write the last chunk at once.
        answer.head_mut().no_chunking(true);
        answer
    }
}

/// An answer to this request without an end, of which the connection is told by [`Handover`] if it is
/// of HTTP/1.
pub fn long_answer(
    request: &HttpRequest,
    mut head: HttpResponseBuilder,
    pieces: impl Stream<Item = Bytes> + 'static,
) -> HttpResponse {
    match request.conn_data::<Handover>() {
        Some(handover) => handover.answer(request.version(), head, pieces),
        None => head.streaming(pieces.map(Ok::<_, Infallible>)),
    }
}

/// A stream that outlives the HTTP library if it has a long answer to give.
pub struct HandoverStream<S> {
    /// `None` once it is handed over.
    stream: Option<S>,
    handover: Handover,
    /// Ready once the client may not read on.
    revoked: Option<LocalBoxFuture<'static, ()>>,
}

impl<S> HandoverStream<S> {
    /// A long answer ends when `revoked` does.
    pub fn new(stream: S, revoked: Option<LocalBoxFuture<'static, ()>>) -> Self {
        Self {
            stream: Some(stream),
            handover: Handover::default(),
            revoked,
        }
    }

    /// The stream under it.
    pub const fn get_ref(&self) -> Option<&S> {
        self.stream.as_ref()
    }

    /// Takes the long answer of its connection.
    pub fn handover(&self) -> Handover {
        self.handover.clone()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for HandoverStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Some(stream) => Pin::new(stream).poll_read(context, into),
            None => Poll::Ready(Ok(())),
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + 'static> AsyncWrite for HandoverStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Some(stream) => Pin::new(stream).poll_write(context, bytes),
            None => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Some(stream) => Pin::new(stream).poll_flush(context),
            None => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let body = this.handover.0.borrow_mut().take();
        match (body, &mut this.stream) {
            (Some(body), stream) => {
                if let Some(stream) = stream.take() {
                    let revoked = OptionFuture::from(this.revoked.take());
                    actix_rt::spawn(async move {
                        tokio::select! {
                            biased;
                            Some(()) = revoked => {}
                            // Its end is that of the client, which is no event of the node.
                            _ = carry(stream, body) => {}
                        }
                    });
                }
                Poll::Ready(Ok(()))
            }
            (None, Some(stream)) => Pin::new(stream).poll_shutdown(context),
            (None, None) => Poll::Ready(Ok(())),
        }
    }
}

/// The piece with its length (RFC 9112, 7.1). One write makes one packet of it.
fn chunk(piece: &[u8]) -> Vec<u8> {
    let length = format!("{:x}\r\n", piece.len());
    [length.as_bytes(), piece, b"\r\n"].concat()
}

/// Writes the body until it ends, the client leaves or sends more than [`UNREAD_MAX`], or it takes
/// nothing for too long.
async fn carry<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, body: LongBody) -> io::Result<()> {
    let LongBody {
        mut pieces,
        is_chunked,
    } = body;
    let mut unread = [0; 64];
    let mut left = UNREAD_MAX;
    // A client that is gone and one that only sends no more look the same until it is written to. The
    // system tells at the second write.
    let mut probes_left = 0;
    let mut probe_at = Instant::now();
    let mut has_said_all = false;
    loop {
        let piece = tokio::select! {
            biased;
            piece = pieces.next() => piece,
            () = sleep_until(probe_at), if probes_left > 0 => {
                probes_left -= 1;
                probe_at = Instant::now() + PROBE_EVERY;
                Some(Bytes::from_static(PING))
            }
            read = stream.read(&mut unread), if !has_said_all => {
                let read = read?;
                if read == 0 {
                    has_said_all = true;
                    probes_left = PROBES;
                    probe_at = Instant::now();
                }
                left = left.checked_sub(read).ok_or(io::ErrorKind::InvalidData)?;
                continue;
            }
        };
        let Some(piece) = piece else { break };
        if is_chunked {
            stream.write_all(&chunk(&piece)).await?;
        } else {
            stream.write_all(&piece).await?;
        }
        stream.flush().await?;
    }
    if is_chunked {
        stream.write_all(LAST_CHUNK).await?;
    }
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{
        io::{DuplexStream, duplex},
        time::{sleep, timeout},
    };

    use super::*;

    fn pieces(count: usize) -> impl Stream<Item = Bytes> {
        stream::iter((0..count).map(|_| Bytes::from_static(b"piece")))
    }

    #[actix_rt::test]
    async fn the_body_follows_when_the_library_closes_the_stream() {
        for (version, end) in [
            (Version::HTTP_10, "piece".repeat(100)),
            (Version::HTTP_11, "5\r\npiece\r\n".repeat(100) + "0\r\n\r\n"),
        ] {
            let (ours, mut client) = duplex(64);
            let mut stream = HandoverStream::new(ours, None);
            stream.write_all(b"head ").await.unwrap();
            let handover = stream.handover();
            drop(handover.answer(version, HttpResponse::Ok(), pieces(100)));
            stream.shutdown().await.unwrap();
            drop(stream);
            let mut read = String::new();
            client.read_to_string(&mut read).await.unwrap();
            assert_eq!(read, format!("head {end}"));
        }
    }

    #[actix_rt::test]
    async fn a_body_ends_with_its_client_and_without_one_the_stream_is_shut() {
        let (ours, client) = duplex(64);
        let mut stream = HandoverStream::new(ours, None);
        let held = Rc::new(());
        let kept = Rc::clone(&held);
        let silent = stream::once(async move {
            std::future::pending::<()>().await;
            drop(kept);
            Bytes::new()
        });
        let handover = stream.handover();
        drop(handover.answer(Version::HTTP_11, HttpResponse::Ok(), silent));
        stream.shutdown().await.unwrap();
        assert_eq!(Rc::strong_count(&held), 2);
        drop(client);
        timeout(Duration::from_secs(20), async {
            while Rc::strong_count(&held) > 1 {
                tokio::task::yield_now().await;
            }
        })
        .await
        .expect("the body is dropped");

        let (ours, mut client) = duplex(64);
        let mut stream = HandoverStream::new(ours, None);
        stream.shutdown().await.unwrap();
        assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0);
    }

    /// A stream that is handed over with a body of these pieces, as its client sees it behind the head.
    async fn carried(
        pieces: impl Stream<Item = Bytes> + 'static,
        revoked: Option<LocalBoxFuture<'static, ()>>,
    ) -> DuplexStream {
        let (ours, client) = duplex(64);
        let mut stream = HandoverStream::new(ours, revoked);
        let handover = stream.handover();
        drop(handover.answer(Version::HTTP_10, HttpResponse::Ok(), pieces));
        stream.shutdown().await.unwrap();
        client
    }

    /// A piece a minute, without an end.
    fn slow_pieces() -> impl Stream<Item = Bytes> {
        stream::repeat(()).then(|()| async {
            sleep(Duration::from_mins(1)).await;
            Bytes::from_static(b"piece")
        })
    }

    #[actix_rt::test]
    async fn a_client_that_sends_no_more_reads_on() {
        tokio::time::pause();
        let mut client = carried(slow_pieces(), None).await;
        client.shutdown().await.unwrap();
        let expected = [PING, PING, b"piece", b"piece"].concat();
        let mut read = vec![0; expected.len()];
        client.read_exact(&mut read).await.unwrap();
        assert_eq!(read, expected);
    }

    #[actix_rt::test]
    async fn a_client_that_sends_without_end_loses_its_stream() {
        let mut client = carried(stream::pending(), None).await;
        let mut sent = 0;
        while client.write_all(&[b'x'; 64]).await.is_ok() {
            sent += 64;
            assert!(sent < 1 << 20, "it is read without end");
        }
        assert!(sent >= UNREAD_MAX, "{sent}");
    }

    #[actix_rt::test]
    async fn a_stream_ends_when_its_client_may_not_read_on() {
        tokio::time::pause();
        let revoked = Box::pin(sleep(Duration::from_secs(90)));
        let mut client = carried(slow_pieces(), Some(revoked)).await;
        let mut read = String::new();
        let reading = client.read_to_string(&mut read);
        let ended = timeout(Duration::from_hours(1), reading).await;
        ended.expect("it ends").unwrap();
        assert_eq!(read, "piece");
    }
}
