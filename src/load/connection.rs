//! One user's connection: kept alive, opened when there is none.
//!
//! It speaks as much of HTTP/1.1 (RFC 9112) as a load needs: a POST, and an answer that is read to its end and thrown away. A user
//! that waits between two records finds nothing of a client library in the processor's caches, and the library then costs more than
//! the kernel.

use std::{
    io::{self, ErrorKind, Write as _},
    net::SocketAddr,
};

use bytes::{Buf, BytesMut};
use futures_util::FutureExt as _;
use httparse::{EMPTY_HEADER, Header, Response, Status};
use hyper::StatusCode;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf, split};

use super::reactor::Reactor;
use crate::api::client::{Socket, Target};

/// What is read of an answer at a time.
const READ: usize = 4 << 10;
/// The longest head of an answer, and line between two chunks.
const HEAD_MAX: usize = 64 << 10;
const HEADERS_MAX: usize = 100;

/// The status, or why there was none.
pub(super) type Answer = Result<StatusCode, String>;

/// Where the connections of all users lead.
pub(super) struct Server<'l> {
    target: &'l Target,
    reactor: &'l Reactor,
    addresses: Vec<SocketAddr>,
}

/// One user's.
pub(super) struct Connection<'l> {
    server: &'l Server<'l>,
    /// Of the user.
    number: usize,
    /// How each request begins.
    begin: Vec<u8>,
    /// The next one.
    request: Vec<u8>,
    /// It may be sent twice.
    is_keyed: bool,
    kept: Option<Kept<'l>>,
}

struct Kept<'l> {
    answers: Answers<ReadHalf<Box<dyn Socket + 'l>>>,
    requests: WriteHalf<Box<dyn Socket + 'l>>,
}

impl<'l> Server<'l> {
    /// Looks its name up, once for all connections.
    ///
    /// # Errors
    /// When the name is not known.
    pub fn find(target: &'l Target, reactor: &'l Reactor) -> io::Result<Self> {
        Ok(Self {
            target,
            reactor,
            addresses: target.addresses()?,
        })
    }

    /// A connection of user `number`: the users are spread over the addresses, and where nobody listens the next is tried.
    async fn dial(&self, number: usize) -> io::Result<Box<dyn Socket + 'l>> {
        let (before, after) = self
            .addresses
            .split_at(number % self.addresses.len().max(1));
        let mut failure = ErrorKind::AddrNotAvailable.into();
        for address in after.iter().chain(before) {
            match self.reactor.connect(*address).await {
                Ok(socket) => return self.target.secure(socket).await,
                Err(why) => failure = why,
            }
        }
        Err(failure)
    }
}

impl<'l> Connection<'l> {
    /// Of user `number`. It is opened with the first record.
    pub fn new(server: &'l Server<'l>, number: usize) -> Self {
        Self {
            server,
            number,
            begin: server.target.head(),
            request: Vec::new(),
            is_keyed: false,
            kept: None,
        }
    }

    /// What is posted next: `record`, under a key of the run and its number if it has one. So nothing is left to do when it is
    /// due but to send it.
    pub fn prepare(&mut self, key: Option<(&str, usize)>, record: &[u8]) {
        self.request.clear();
        self.request.extend_from_slice(&self.begin);
        self.is_keyed = key.is_some();
        if let Some((run, number)) = key {
            write!(self.request, "idempotency-key: {run}-{number}\r\n")
                .expect("memory takes all that is written");
        }
        write!(self.request, "content-length: {}\r\n\r\n", record.len())
            .expect("memory takes all that is written");
        self.request.extend_from_slice(record);
    }

    /// Posts what was prepared, and reads the answer to its end. Whatever cuts it short leaves no connection that is half
    /// through an answer.
    pub async fn post(&mut self) -> Answer {
        let mut kept = self.kept.take();
        // What comes unasked is no answer to what is asked next (RFC 9112, 9.2).
        kept.take_if(|kept| !kept.answers.are_silent());
        if let Some(kept) = kept {
            match self.exchange(kept).await {
                // The server may have closed it while it was idle: the key keeps a second try from being a second record.
                Err(_) if self.is_keyed => {}
                answer => return answer.map_err(|why| why.to_string()),
            }
        }
        let socket = self
            .server
            .dial(self.number)
            .await
            .map_err(|why| format!("cannot connect: {why}"))?;
        let (answers, requests) = split(socket);
        let fresh = Kept {
            answers: Answers::new(answers),
            requests,
        };
        self.exchange(fresh).await.map_err(|why| why.to_string())
    }

    async fn exchange(&mut self, mut open: Kept<'l>) -> io::Result<StatusCode> {
        let (status, is_kept) = {
            let answer = open.answers.next();
            tokio::pin!(answer);
            let sending = async {
                open.requests.write_all(&self.request).await?;
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
    /// What is read next goes here first.
    next: Box<[u8]>,
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
    fn new(from: R) -> Self {
        Self {
            from,
            read: BytesMut::new(),
            next: vec![0; READ].into(),
        }
    }

    /// The status of the next answer, once its body was read, and whether another may follow.
    async fn next(&mut self) -> io::Result<(StatusCode, bool)> {
        loop {
            let Head {
                status,
                length,
                goes_on,
            } = self.part(head).await?;
            match status {
                StatusCode::SWITCHING_PROTOCOLS => {
                    return Err(invalid("another protocol, which nobody has asked for"));
                }
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
            let here =
                usize::try_from(bytes).map_or(self.read.len(), |bytes| bytes.min(self.read.len()));
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
                Err(end) if end.kind() == ErrorKind::UnexpectedEof => return Ok(()),
                more => more?,
            }
        }
    }

    async fn more(&mut self) -> io::Result<()> {
        let length = self.from.read(&mut self.next).await?;
        if length == 0 {
            let why = "the connection was closed before the answer's end";
            return Err(io::Error::new(ErrorKind::UnexpectedEof, why));
        }
        self.read.extend_from_slice(&self.next[..length]);
        Ok(())
    }
}

fn invalid(why: impl std::fmt::Display) -> io::Error {
    io::Error::new(
        ErrorKind::InvalidData,
        format!("not an answer in HTTP/1.1: {why}"),
    )
}

/// A part of an answer and how many bytes it takes; nothing while they are not all here.
type Parsed<T> = io::Result<Option<(usize, T)>>;

fn head(read: &[u8]) -> Parsed<Head> {
    let mut headers = [EMPTY_HEADER; HEADERS_MAX];
    let mut answer = Response::new(&mut headers);
    let Status::Complete(end) = answer.parse(read).map_err(invalid)? else {
        return Ok(None);
    };
    let status = StatusCode::from_u16(answer.code.unwrap_or_default()).map_err(invalid)?;
    let values = |name| values(answer.headers, name);
    let length = match status {
        StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED => Length::Of(0),
        _ => length(values("transfer-encoding").last(), values("content-length"))?,
    };
    let is_last = values("connection").any(|value| is_listed(value, "close"))
        // Somebody on the way may see another end.
        || values("transfer-encoding").next().and(values("content-length").next()).is_some();
    Ok(Some((
        end,
        Head {
            status,
            length,
            goes_on: answer.version == Some(1) && !is_last,
        },
    )))
}

fn length<'h>(
    coding: Option<&[u8]>,
    lengths: impl Iterator<Item = &'h [u8]>,
) -> io::Result<Length> {
    if let Some(coding) = coding {
        let last = coding
            .rsplit(|byte| *byte == b',')
            .next()
            .unwrap_or_default();
        return Ok(if is_listed(last, "chunked") {
            Length::Chunks
        } else {
            Length::Open
        });
    }
    let mut lengths = lengths.map(|text| {
        // A number may have no sign here.
        let text = str::from_utf8(text)
            .ok()
            .filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))?;
        text.parse().ok()
    });
    match lengths.next() {
        None => Ok(Length::Open),
        Some(Some(bytes)) if lengths.all(|other| other == Some(bytes)) => Ok(Length::Of(bytes)),
        Some(_) => Err(invalid("its length is none")),
    }
}

fn values<'h>(headers: &'h [Header], name: &str) -> impl Iterator<Item = &'h [u8]> {
    headers
        .iter()
        .filter(move |header| header.name.eq_ignore_ascii_case(name))
        .map(|header| header.value)
}

/// Whether `word` is in a list that is separated by commas.
fn is_listed(list: &[u8], word: &str) -> bool {
    list.split(|byte| *byte == b',')
        .any(|item| item.trim_ascii().eq_ignore_ascii_case(word.as_bytes()))
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
    Ok(end.map(|end| {
        (
            end + 1,
            read[..end]
                .strip_suffix(b"\r")
                .unwrap_or(&read[..end])
                .len(),
        )
    }))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{
            ErrorKind::{InvalidData, UnexpectedEof},
            Read as _,
        },
        net::TcpListener,
        sync::Arc,
        thread,
        time::Duration,
    };

    use futures_util::future::join;
    use tokio::io::duplex;

    use super::*;

    /// What comes of `bytes`, of which so many are there at a time: each answer, and whether another may follow.
    async fn answers(bytes: &str, together: usize) -> Vec<Result<(u16, bool), ErrorKind>> {
        let (mut server, from) = duplex(together);
        let serve = async move { server.write_all(bytes.as_bytes()).await };
        let read = async move {
            let (mut answers, mut told) = (Answers::new(from), Vec::new());
            while told.last().is_none_or(|last| matches!(last, Ok((_, true)))) {
                let answer = answers.next().await;
                told.push(
                    answer
                        .map(|(status, goes_on)| (status.as_u16(), goes_on))
                        .map_err(|why| why.kind()),
                );
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
            (
                "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
                vec![Ok((200, true)), Ok((503, true))],
            ),
            (
                "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 \r\n\r\n",
                vec![Ok((204, true)), Ok((503, true))],
            ),
            (
                "HTTP/1.1 202 OK\r\ntransfer-encoding: gzip, Chunked\r\n\r\n5;a=b\r\nhello\r\n1\r\n!\r\n0\r\na: b\r\n\r\n",
                vec![Ok((202, true)), Ok((503, true))],
            ),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\n.",
                vec![Ok((200, true)), Ok((503, true))],
            ),
            (
                "HTTP/1.1 200 OK\r\nConnection: a, close\r\ncontent-length: 0\r\n\r\n",
                vec![Ok((200, false))],
            ),
            (
                "HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n",
                vec![Ok((200, false))],
            ),
            ("HTTP/1.1 500 No\r\n\r\nto the end", vec![Ok((500, false))]),
            (
                "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
                vec![Ok((200, false))],
            ),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n..",
                vec![Err(InvalidData)],
            ),
            (
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nz\r\n",
                vec![Err(InvalidData)],
            ),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: +1\r\n\r\n.",
                vec![Err(InvalidData)],
            ),
            (
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhello\r\n0\r\n\r\n",
                vec![Err(InvalidData)],
            ),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 9\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
                vec![Ok((200, false))],
            ),
            (
                "HTTP/1.1 101 Switching\r\nupgrade: h2c\r\n\r\n",
                vec![Err(InvalidData)],
            ),
            ("SSH-2.0-OpenSSH\r\n", vec![Err(InvalidData)]),
        ] {
            let goes_on = matches!(wanted[0], Ok((_, true)));
            let (bytes, mut wanted) = (format!("{bytes}{refused}"), wanted);
            if goes_on {
                wanted.push(Err(UnexpectedEof));
            }
            for together in [1, 3, 4096] {
                assert_eq!(
                    answers(&bytes, together).await,
                    wanted,
                    "{bytes:?}, {together} bytes at a time"
                );
            }
        }
    }

    #[tokio::test]
    async fn a_connection_on_which_something_has_come_unasked_is_not_used_again() {
        let (mut server, from) = duplex(100);
        let mut answers = Answers::new(from);
        let ok = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
        server.write_all(ok.as_bytes()).await.unwrap();
        answers.next().await.unwrap();
        assert!(answers.are_silent());
        server.write_all(b"HTTP/1.1 408 Late\r\n").await.unwrap();
        assert!(!answers.are_silent());

        let (server, from) = duplex(100);
        let mut answers = Answers::new(from);
        assert!(answers.are_silent());
        drop(server);
        assert!(!answers.are_silent(), "it was closed");
    }

    #[test]
    fn an_answer_that_nobody_asked_for_is_not_taken_for_that_of_the_next_record() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target =
            Target::with_public_roots(&format!("http://{}/", listener.local_addr().unwrap()))
                .unwrap();
        let ok = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
        let serve = thread::spawn(move || {
            let answers = [
                format!("{ok}HTTP/1.1 503 Late\r\ncontent-length: 0\r\n\r\n"),
                ok.to_owned(),
            ];
            // Both stay open.
            answers.map(|answer| {
                let (mut connection, _) = listener.accept().unwrap();
                connection.read_exact(&mut [0]).unwrap();
                connection.write_all(answer.as_bytes()).unwrap();
                connection
            })
        });
        let reactor = Reactor::new(1, Duration::ZERO, Arc::default()).unwrap();
        let server = Server::find(&target, &reactor).unwrap();
        let user = async {
            let mut connection = Connection::new(&server, 0);
            for _ in 0..2 {
                connection.prepare(None, b"{}");
                assert_eq!(connection.post().await, Ok(StatusCode::OK));
            }
        };
        reactor
            .run(vec![Box::pin(user)], Duration::from_secs(1), || ())
            .unwrap();
        serve.join().expect("two connections");
    }

    #[tokio::test]
    async fn an_answer_without_an_end_is_not_kept_in_memory() {
        for endless in [
            "HTTP/1.1 200 OK\r\na: ",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\na: ",
        ] {
            let bytes = endless.to_owned() + &"x".repeat(2 * HEAD_MAX);
            assert_eq!(
                answers(&bytes, 1000).await,
                [Err(InvalidData)],
                "{endless:?}"
            );
        }
    }
}
