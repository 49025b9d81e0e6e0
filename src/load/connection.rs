//! One user's connection: kept alive, opened when there is none.
//!
//! It speaks as much of HTTP/1.1 (RFC 9112) as a load needs: a POST, and an answer that is read to its end and thrown away. A user
//! that waits between two records finds nothing of a client library in the processor's caches, and the library then costs more than
//! the kernel.

use std::{io, time::Duration};

use bytes::{Buf, BytesMut};
use futures_util::FutureExt as _;
use httparse::{EMPTY_HEADER, Header, Response, Status};
use hyper::StatusCode;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf, split},
    time::timeout,
};

use crate::http::client::{Socket, Target};

/// A request that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(30);
/// What is read of an answer at a time.
const READ: usize = 8 << 10;
/// The longest head of an answer, and line between two chunks.
const HEAD_MAX: usize = 64 << 10;
const HEADERS_MAX: usize = 100;

/// The status, or why there was none.
pub(super) type Answer = Result<StatusCode, String>;

pub(super) struct Connection<'t> {
    target: &'t Target,
    /// How each request begins.
    begin: Vec<u8>,
    /// All of the present one but the record.
    head: Vec<u8>,
    kept: Option<Kept>,
}

struct Kept {
    answers: Answers<ReadHalf<Box<dyn Socket>>>,
    requests: WriteHalf<Box<dyn Socket>>,
}

impl<'t> Connection<'t> {
    pub fn new(target: &'t Target) -> Self {
        Self { target, begin: target.head(), head: Vec::new(), kept: None }
    }

    /// Posts `record`, under `key` if there is one, and reads the answer to its end.
    pub async fn post(&mut self, key: Option<&str>, record: &[u8]) -> Answer {
        self.head.clear();
        self.head.extend_from_slice(&self.begin);
        if let Some(key) = key {
            self.head.extend_from_slice(format!("idempotency-key: {key}\r\n").as_bytes());
        }
        self.head.extend_from_slice(format!("content-length: {}\r\n\r\n", record.len()).as_bytes());
        // Whatever cuts it short leaves no connection that is half through an answer.
        let mut kept = self.kept.take();
        // What comes unasked is no answer to what is asked next (RFC 9112, 9.2).
        kept.take_if(|kept| !kept.answers.are_silent());
        let exchange = async {
            if let Some(kept) = kept {
                match self.exchange(kept, record).await {
                    // The server may have closed it while it was idle: the key keeps a second try from being a second record.
                    Err(_) if key.is_some() => {}
                    answer => return answer.map_err(|why| why.to_string()),
                }
            }
            let socket = self.target.dial().await.map_err(|why| format!("cannot connect: {why}"))?;
            let (answers, requests) = split(socket);
            let fresh = Kept { answers: Answers { from: answers, read: BytesMut::new() }, requests };
            self.exchange(fresh, record).await.map_err(|why| why.to_string())
        };
        timeout(TIMEOUT, exchange).await.unwrap_or_else(|_| Err(format!("no answer within {TIMEOUT:?}")))
    }

    async fn exchange(&mut self, mut open: Kept, record: &[u8]) -> io::Result<StatusCode> {
        let (status, is_kept) = {
            let answer = open.answers.next();
            tokio::pin!(answer);
            let sending = async {
                open.requests.write_all_buf(&mut Buf::chain(&*self.head, record)).await?;
                open.requests.flush().await
            };
            tokio::select! {
                biased;
                sent = sending => match (sent, answer.await) {
                    (Ok(()), answer) => answer?,
                    // Who does not want to read on may have said why.
                    (Err(_), Ok((status, _))) => (status, false),
                    (Err(why), Err(_)) => return Err(why),
                },
                // It has come before the server had all of the request.
                answer = &mut answer => (answer?.0, false),
            }
        };
        if is_kept {
            self.kept = Some(open);
        }
        Ok(status)
    }
}

/// Reads the answers of one connection.
struct Answers<R> {
    from: R,
    /// What was read and not looked at.
    read: BytesMut,
}

struct Head {
    status: StatusCode,
    length: Length,
    /// The connection outlives the answer.
    goes_on: bool,
}

/// Where the body of an answer ends (RFC 9112, 6.3).
#[derive(Debug, PartialEq, Eq)]
enum Length {
    Of(u64),
    Chunks,
    /// With the connection.
    Open,
}

impl<R: AsyncRead + Unpin> Answers<R> {
    /// The status of the next answer, once its body was read, and whether another may follow.
    async fn next(&mut self) -> io::Result<(StatusCode, bool)> {
        loop {
            let Head { status, length, goes_on } = self.part(head).await?;
            match status {
                StatusCode::SWITCHING_PROTOCOLS => return Err(invalid("another protocol, which nobody has asked for")),
                // The one that counts comes after it.
                _ if status.is_informational() => continue,
                _ => {}
            }
            match length {
                Length::Of(bytes) => self.skip(bytes).await?,
                Length::Chunks => self.skip_chunks().await?,
                Length::Open => self.skip_all().await?,
            }
            return Ok((status, goes_on && length != Length::Open));
        }
    }

    /// Nothing has come since the last answer, not even the end.
    fn are_silent(&mut self) -> bool {
        self.read.is_empty() && self.more().now_or_never().is_none()
    }

    /// What `parse` makes of the next bytes, once it has as many as it needs.
    async fn part<T>(&mut self, parse: impl Fn(&[u8]) -> Parsed<T>) -> io::Result<T> {
        loop {
            if let Some((length, part)) = parse(&self.read)? {
                self.read.advance(length);
                return Ok(part);
            }
            if self.read.len() > HEAD_MAX {
                return Err(invalid(format_args!("longer than {HEAD_MAX} bytes")));
            }
            self.more().await?;
        }
    }

    async fn skip_chunks(&mut self) -> io::Result<()> {
        loop {
            match self.part(chunk).await? {
                0 => break,
                bytes => self.skip(bytes).await?,
            }
            if self.part(line).await? > 0 {
                return Err(invalid("a chunk is longer than it says"));
            }
        }
        // Trailers, up to an empty line.
        while self.part(line).await? > 0 {}
        Ok(())
    }

    async fn skip(&mut self, mut bytes: u64) -> io::Result<()> {
        loop {
            let here = usize::try_from(bytes).map_or(self.read.len(), |bytes| bytes.min(self.read.len()));
            self.read.advance(here);
            bytes -= here as u64;
            if bytes == 0 {
                return Ok(());
            }
            self.more().await?;
        }
    }

    /// Up to the end of the connection.
    async fn skip_all(&mut self) -> io::Result<()> {
        loop {
            self.read.clear();
            match self.more().await {
                Err(end) if end.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                more => more?,
            }
        }
    }

    async fn more(&mut self) -> io::Result<()> {
        self.read.reserve(READ);
        match self.from.read_buf(&mut self.read).await? {
            0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection was closed before the answer's end")),
            _ => Ok(()),
        }
    }
}

fn invalid(why: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not an answer in HTTP/1.1: {why}"))
}

/// A part of an answer and how many bytes it takes; nothing while they are not all here.
type Parsed<T> = io::Result<Option<(usize, T)>>;

fn head(read: &[u8]) -> Parsed<Head> {
    let mut headers = [EMPTY_HEADER; HEADERS_MAX];
    let mut answer = Response::new(&mut headers);
    let Status::Complete(end) = answer.parse(read).map_err(invalid)? else { return Ok(None) };
    let status = StatusCode::from_u16(answer.code.unwrap_or_default()).map_err(invalid)?;
    let values = |name| values(answer.headers, name);
    let length = match status {
        StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED => Length::Of(0),
        _ => length(values("transfer-encoding").last(), values("content-length"))?,
    };
    let is_last = values("connection").any(|value| is_listed(value, "close"))
        // Somebody on the way may see another end.
        || values("transfer-encoding").next().and(values("content-length").next()).is_some();
    Ok(Some((end, Head { status, length, goes_on: answer.version == Some(1) && !is_last })))
}

fn length<'h>(coding: Option<&[u8]>, lengths: impl Iterator<Item = &'h [u8]>) -> io::Result<Length> {
    if let Some(coding) = coding {
        let last = coding.rsplit(|byte| *byte == b',').next().unwrap_or_default();
        return Ok(if is_listed(last, "chunked") { Length::Chunks } else { Length::Open });
    }
    let mut lengths = lengths.map(|text| {
        // A number may have no sign here.
        let text = str::from_utf8(text).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))?;
        text.parse().ok()
    });
    match lengths.next() {
        None => Ok(Length::Open),
        Some(Some(bytes)) if lengths.all(|other| other == Some(bytes)) => Ok(Length::Of(bytes)),
        Some(_) => Err(invalid("its length is none")),
    }
}

fn values<'h>(headers: &'h [Header], name: &str) -> impl Iterator<Item = &'h [u8]> {
    headers.iter().filter(move |header| header.name.eq_ignore_ascii_case(name)).map(|header| header.value)
}

/// Whether `word` is in a list that is separated by commas.
fn is_listed(list: &[u8], word: &str) -> bool {
    list.split(|byte| *byte == b',').any(|item| item.trim_ascii().eq_ignore_ascii_case(word.as_bytes()))
}

/// The line before a chunk: its length, 0 after the last.
fn chunk(read: &[u8]) -> Parsed<u64> {
    match httparse::parse_chunk_size(read).map_err(|_| invalid("a chunk has no length"))? {
        Status::Complete(chunk) => Ok(Some(chunk)),
        Status::Partial => Ok(None),
    }
}

/// How long the next line is without its end.
#[expect(clippy::unnecessary_wraps, reason = "a part may be wrong")]
fn line(read: &[u8]) -> Parsed<usize> {
    let end = memchr::memchr(b'\n', read);
    Ok(end.map(|end| (end + 1, read[..end].strip_suffix(b"\r").unwrap_or(&read[..end]).len())))
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind::{self, InvalidData, UnexpectedEof};

    use futures_util::future::join;
    use tokio::{io::duplex, net::TcpListener};

    use super::*;

    /// What comes of `bytes`, of which so many are there at a time: each answer, and whether another may follow.
    async fn answers(bytes: &str, together: usize) -> Vec<Result<(u16, bool), ErrorKind>> {
        let (mut server, from) = duplex(together);
        let serve = async move { server.write_all(bytes.as_bytes()).await };
        let read = async move {
            let (mut answers, mut told) = (Answers { from, read: BytesMut::new() }, Vec::new());
            while told.last().is_none_or(|last| matches!(last, Ok((_, true)))) {
                let answer = answers.next().await;
                told.push(answer.map(|(status, goes_on)| (status.as_u16(), goes_on)).map_err(|why| why.kind()));
            }
            told
        };
        // Who has read enough reads no more.
        join(serve, read).await.1
    }

    #[tokio::test]
    async fn an_answer_ends_where_it_says_however_it_is_cut() {
        let refused = "HTTP/1.1 503 Slow down\r\nContent-Length: 0\r\n\r\n";
        for (bytes, wanted) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", vec![Ok((200, true)), Ok((503, true))]),
            ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 \r\n\r\n", vec![Ok((204, true)), Ok((503, true))]),
            (
                "HTTP/1.1 202 OK\r\ntransfer-encoding: gzip, Chunked\r\n\r\n5;a=b\r\nhello\r\n1\r\n!\r\n0\r\na: b\r\n\r\n",
                vec![Ok((202, true)), Ok((503, true))],
            ),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\n.",
                vec![Ok((200, true)), Ok((503, true))],
            ),
            ("HTTP/1.1 200 OK\r\nConnection: a, close\r\ncontent-length: 0\r\n\r\n", vec![Ok((200, false))]),
            ("HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n", vec![Ok((200, false))]),
            ("HTTP/1.1 500 No\r\n\r\nto the end", vec![Ok((500, false))]),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n", vec![Ok((200, false))]),
            ("HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n..", vec![Err(InvalidData)]),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nz\r\n", vec![Err(InvalidData)]),
            ("HTTP/1.1 200 OK\r\ncontent-length: +1\r\n\r\n.", vec![Err(InvalidData)]),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhello\r\n0\r\n\r\n", vec![Err(InvalidData)]),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 9\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
                vec![Ok((200, false))],
            ),
            ("HTTP/1.1 101 Switching\r\nupgrade: h2c\r\n\r\n", vec![Err(InvalidData)]),
            ("SSH-2.0-OpenSSH\r\n", vec![Err(InvalidData)]),
        ] {
            let goes_on = matches!(wanted[0], Ok((_, true)));
            let (bytes, mut wanted) = (format!("{bytes}{refused}"), wanted);
            if goes_on {
                wanted.push(Err(UnexpectedEof));
            }
            for together in [1, 3, 4096] {
                assert_eq!(answers(&bytes, together).await, wanted, "{bytes:?}, {together} bytes at a time");
            }
        }
    }

    #[tokio::test]
    async fn a_connection_on_which_something_has_come_unasked_is_not_used_again() {
        let (mut server, from) = duplex(100);
        let mut answers = Answers { from, read: BytesMut::new() };
        let ok = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
        server.write_all(ok.as_bytes()).await.unwrap();
        answers.next().await.unwrap();
        assert!(answers.are_silent());
        server.write_all(b"HTTP/1.1 408 Late\r\n").await.unwrap();
        assert!(!answers.are_silent());

        let (server, from) = duplex(100);
        let mut answers = Answers { from, read: BytesMut::new() };
        assert!(answers.are_silent());
        drop(server);
        assert!(!answers.are_silent(), "it was closed");
    }

    #[tokio::test]
    async fn an_answer_that_nobody_asked_for_is_not_taken_for_that_of_the_next_record() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = Target::with_public_roots(&format!("http://{}/", listener.local_addr().unwrap())).unwrap();
        let ok = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
        let serve = async {
            let mut open = Vec::new();
            for answer in [format!("{ok}HTTP/1.1 503 Late\r\ncontent-length: 0\r\n\r\n"), ok.to_owned()] {
                let (mut connection, _) = listener.accept().await.unwrap();
                connection.read_u8().await.unwrap();
                connection.write_all(answer.as_bytes()).await.unwrap();
                open.push(connection);
            }
            open
        };
        let mut user = Connection::new(&target);
        let post = async { [user.post(None, b"{}").await, user.post(None, b"{}").await] };
        let (_open, answers) = timeout(TIMEOUT, join(serve, post)).await.expect("a second connection");
        assert_eq!(answers, [Ok(StatusCode::OK), Ok(StatusCode::OK)]);
    }

    #[tokio::test]
    async fn an_answer_without_an_end_is_not_kept_in_memory() {
        for endless in ["HTTP/1.1 200 OK\r\na: ", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\na: "] {
            let bytes = endless.to_owned() + &"x".repeat(2 * HEAD_MAX);
            assert_eq!(answers(&bytes, 1000).await, [Err(InvalidData)], "{endless:?}");
        }
    }
}
