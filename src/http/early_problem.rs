//! Problems for requests that end before a handler sees them: malformed, or with too large a head.
//!
//! actix-http answers these itself, without a body, and has no hook for it. So the stream under it
//! puts a problem into that answer on its way out.
//!
//! actix-http asks for the body of a request with `Expect: 100-continue` before the handler is called.
//! If the handler has its answer without the body, the stream leaves that out.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll, ready},
    time::SystemTime,
};

use actix_web::{ResponseError as _, http::StatusCode};
use bytes::{Buf as _, Bytes};
use memchr::memmem;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    log_bad_request,
    problem::{MEDIA_TYPE, Problem, ProblemKind},
};

const END_OF_HEAD: &[u8] = b"\r\n\r\n";
const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
const NO_BODY: &[u8] = b"content-length: 0\r\n";

/// The stream of a connection that HTTP/1.1 is spoken on.
pub struct EarlyProblemStream<S> {
    stream: S,
    client: Option<SocketAddr>,
    /// The rest of an answer with a problem, which goes out instead of one without.
    answer: Bytes,
}

impl<S> EarlyProblemStream<S> {
    pub const fn new(stream: S, client: Option<SocketAddr>) -> Self {
        Self {
            stream,
            client,
            answer: Bytes::new(),
        }
    }

    /// The stream under it.
    pub const fn get_ref(&self) -> &S {
        &self.stream
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for EarlyProblemStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for EarlyProblemStream<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.answer.is_empty() {
            // The final answer is there already.
            if bytes.len() > CONTINUE.len() && bytes.starts_with(CONTINUE) {
                return Poll::Ready(Ok(CONTINUE.len()));
            }
            let Some((at, problem)) = early_answer(bytes) else {
                return Pin::new(&mut this.stream).poll_write(context, bytes);
            };
            let (others, head) = bytes.split_at(at);
            if !others.is_empty() {
                return Pin::new(&mut this.stream).poll_write(context, others);
            }
            log_bad_request(this.client, &problem);
            this.answer = with_problem(head, &problem);
        }
        // The caller offers the same bytes until they count as written.
        while this.answer.has_remaining() {
            let written = ready!(Pin::new(&mut this.stream).poll_write(context, &this.answer))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            this.answer.advance(written);
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// The problem of the answer that ends `bytes`, and where that answer begins, if actix-http has
/// made it. It is always the last one of its connection. Our handlers send these statuses with a
/// body only.
fn early_answer(bytes: &[u8]) -> Option<(usize, Problem)> {
    if !bytes.ends_with(END_OF_HEAD) {
        return None;
    }
    let at = memmem::rfind(bytes, b"HTTP/1.")?;
    let head = &bytes[at..];
    memmem::find(head, NO_BODY)?;
    let problem = match head.get(8..13)? {
        b" 400 " => Problem::bad_request(
            ProblemKind::Request,
            "The request line, a header or the length of the body is malformed",
        ),
        b" 431 " => Problem::new(
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            ProblemKind::LargeHead,
            "The head of the request is larger than 128 KiB or has more than 96 headers",
        ),
        _ => return None,
    };
    Some((at, problem))
}

/// A whole answer with `problem`, after which the connection ends.
pub fn last_answer(problem: &Problem) -> Bytes {
    let status = problem.status_code();
    let date = httpdate::fmt_http_date(SystemTime::now());
    let head = format!("HTTP/1.1 {status}\r\n");
    let end = format!("connection: close\r\ndate: {date}\r\n\r\n");
    with_problem(
        &[head.as_bytes(), NO_BODY, end.as_bytes()].concat(),
        problem,
    )
}

/// An answer that has `problem` as its body and is else as `head` says.
fn with_problem(head: &[u8], problem: &Problem) -> Bytes {
    let body = problem.body();
    let length = format!("content-length: {}\r\n", body.len());
    let media_type = format!("content-type: {MEDIA_TYPE}\r\n");
    let at = memmem::find(head, NO_BODY).unwrap_or(head.len());
    let (before, rest) = head.split_at(at);
    let after = rest.strip_prefix(NO_BODY).unwrap_or(rest);
    let parts = [
        before,
        length.as_bytes(),
        media_type.as_bytes(),
        after,
        body.as_bytes(),
    ];
    parts.concat().into()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    const HEAD: &str = "\r\ncontent-length: 0\r\ndate: now\r\n\r\n";

    /// The bytes that leave a stream which takes `room` of them at a time.
    async fn sent(room: usize, bytes: &str) -> String {
        let (ours, mut clients) = duplex(room);
        let mut stream = EarlyProblemStream::new(ours, None);
        let write = async move {
            stream.write_all(bytes.as_bytes()).await.unwrap();
            stream.shutdown().await.unwrap();
        };
        let mut out = String::new();
        let ((), read) = tokio::join!(write, clients.read_to_string(&mut out));
        read.unwrap();
        out
    }

    #[tokio::test]
    async fn an_early_answer_gets_its_problem_however_it_is_written() {
        let ok = "HTTP/1.1 202 Accepted\r\ncontent-length: 2\r\n\r\n{}";
        for (status, kind) in [("400 Bad", "request"), ("431 Big", "large-head")] {
            for (before, room) in [("", 1), ("", 7), ("", 4096), (ok, 1), (ok, 4096)] {
                let out = sent(room, &format!("{before}HTTP/1.1 {status}{HEAD}")).await;
                let early = out.strip_prefix(before).expect("the answers before it");
                let (head, body) = early.split_once("\r\n\r\n").expect("a body");
                let lines: Vec<_> = head.lines().collect();
                let length = format!("content-length: {}", body.len());
                let media_type = "content-type: application/problem+json";
                let status = format!("HTTP/1.1 {status}");
                assert_eq!(lines, [&*status, &*length, media_type, "date: now"]);
                let problem: serde_json::Value = serde_json::from_str(body).unwrap();
                assert_eq!(problem["type"], format!("urn:waypost:problem:{kind}"));
                assert!(status.contains(&problem["status"].to_string()));
            }
        }
    }

    #[tokio::test]
    async fn a_body_is_asked_for_only_before_the_answer() {
        let asks = "HTTP/1.1 100 Continue\r\n\r\n";
        let answer = "HTTP/1.1 413 Large\r\ncontent-length: 2\r\n\r\n{}";
        assert_eq!(sent(4096, asks).await, asks);
        assert_eq!(sent(4096, &format!("{asks}{answer}")).await, answer);
        let behind = format!("{answer}{asks}");
        assert_eq!(sent(4096, &behind).await, behind);
    }

    #[tokio::test]
    async fn other_answers_pass_as_they_are() {
        for answer in [
            "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            "HTTP/1.1 100 Continue\r\n\r\n",
            "HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n",
            "HTTP/1.1 400 No\r\ncontent-length: 2\r\n\r\n{}",
            "HTTP/1.1 400 No\r\ncontent-length: 4\r\n\r\n\r\n\r\n",
            "HTTP/1.1 400 No\r\ncontent-length: 0\r\n",
            "HTTP/1.1 40",
            "\r\n\r\n",
            "{}",
        ] {
            assert_eq!(sent(3, answer).await, answer);
        }
    }
}
