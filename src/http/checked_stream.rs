//! Checks what clients send, before the HTTP library reads it.
//!
//! actix-http has a timer for the first head of a connection only, so that a client could send the
//! next one byte by byte and hold its connection for ever. The stream of a connection sees when a
//! head begins, and the service when one is complete. Both together time each head. What the library
//! takes and other servers do not is found by [`Framing`].

use std::{
    cell::Cell,
    io,
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use actix_web::http::StatusCode;
use bytes::{Buf as _, Bytes};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep_until},
};

use super::{
    LINGER,
    early_ends::{EarlyEnd, EarlyEnds},
    early_problem::last_answer,
    framing::{Framing, FramingFault},
    log_bad_request,
    problem::{Problem, ProblemKind},
};

/// The state of a connection's request. Clones share it.
#[derive(Clone)]
pub struct HeadState(Rc<States>);

struct States {
    phase: Cell<RequestPhase>,
    end: Cell<ConnectionEnd>,
}

#[derive(Clone, Copy)]
enum RequestPhase {
    /// No head has come since the last answer, which was then. The rest of a body that nobody wanted
    /// may come.
    Idle(Instant),
    /// A head comes since then.
    Head(Instant),
    /// The service has a request.
    Service,
}

/// Whether the connection goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ConnectionEnd {
    Open,
    /// The last answer has been given.
    Closing,
    /// Another request has come behind the last answer.
    Beyond,
}

impl HeadState {
    /// The first head of a connection begins with the connection.
    fn new(since: Instant) -> Self {
        Self(Rc::new(States {
            phase: Cell::new(RequestPhase::Head(since)),
            end: Cell::new(ConnectionEnd::Open),
        }))
    }

    /// The service has a request: its head is complete. False if it comes behind the last answer, and
    /// is none (RFC 9112, 9.6); then the stream ends.
    pub fn complete(&self) -> bool {
        let is_one = self.0.end.get() == ConnectionEnd::Open;
        if is_one {
            self.0.phase.set(RequestPhase::Service);
        } else {
            self.0.end.set(ConnectionEnd::Beyond);
        }
        is_one
    }

    /// The service has answered. The connection may go on, or this was the last answer.
    pub fn answered(&self, goes_on: bool) {
        self.0.phase.set(RequestPhase::Idle(Instant::now()));
        if !goes_on {
            self.0.end.set(ConnectionEnd::Closing);
        }
    }
}

/// A stream that ends for its reader when a head takes too long, or at a fault. The client gets a
/// problem then.
pub struct CheckedStream<S> {
    stream: S,
    client: Option<SocketAddr>,
    timeout: Duration,
    ends: EarlyEnds,
    state: HeadState,
    /// It never fires later than the deadline of the head that comes. A request costs no timer: one
    /// that fires too early is set again.
    timer: Pin<Box<Sleep>>,
    framing: Framing,
    has_ended: bool,
    /// The rest of the problem.
    answer: Bytes,
    /// The client has all that it gets.
    is_shut: bool,
}

impl<S> CheckedStream<S> {
    /// The stream of a connection that has been open `since` then.
    pub fn new(
        stream: S,
        client: Option<SocketAddr>,
        since: Instant,
        timeout: Duration,
        ends: EarlyEnds,
    ) -> Self {
        Self {
            stream,
            client,
            timeout,
            ends,
            state: HeadState::new(since),
            timer: Box::pin(sleep_until(since + timeout)),
            framing: Framing::default(),
            has_ended: false,
            answer: Bytes::new(),
            is_shut: false,
        }
    }

    /// The stream under it.
    pub const fn get_ref(&self) -> &S {
        &self.stream
    }

    /// The service of the connection keeps it up to date.
    pub fn state(&self) -> HeadState {
        self.state.clone()
    }

    /// Some bytes have come. Returns how many of them the reader gets.
    fn check(&mut self, bytes: &[u8]) -> usize {
        match self.state.0.phase.get() {
            RequestPhase::Idle(_) if self.framing.is_between_requests() => {
                self.state.0.phase.set(RequestPhase::Head(Instant::now()));
            }
            RequestPhase::Idle(since) | RequestPhase::Head(since)
                if since.elapsed() >= self.timeout =>
            {
                self.end_late();
                return 0;
            }
            RequestPhase::Idle(_) | RequestPhase::Head(_) | RequestPhase::Service => {}
        }
        match self.framing.follow(bytes) {
            Ok(()) => bytes.len(),
            Err((good, fault)) => {
                // A body that ends early is a problem of the handler's.
                self.end(fault.is_of_head().then(|| malformed(fault)).as_ref());
                good
            }
        }
    }

    /// Ready once the head that comes, or the rest of a body, is too late.
    fn poll_late(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let since = match self.state.0.phase.get() {
            RequestPhase::Idle(_) if self.framing.is_between_requests() => return Poll::Pending,
            RequestPhase::Idle(since) | RequestPhase::Head(since) => since,
            // An answer wakes nobody who reads, so it looks again after a while.
            RequestPhase::Service => Instant::now(),
        };
        let deadline = since + self.timeout;
        loop {
            ready!(self.timer.as_mut().poll(context));
            if Instant::now() >= deadline {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(deadline);
        }
    }

    /// A request that comes is answered. One that has its answer gets no second one.
    fn end_late(&mut self) {
        let is_head = matches!(self.state.0.phase.get(), RequestPhase::Head(_));
        self.ends.count(EarlyEnd::HeadLate);
        self.end(is_head.then(late).as_ref());
    }

    /// Nothing more is read. The problem leaves when the reader closes the stream, behind the answers
    /// before it.
    fn end(&mut self, problem: Option<&Problem>) {
        self.has_ended = true;
        if let Some(problem) = problem {
            log_bad_request(self.client, problem);
            self.answer = last_answer(problem);
        }
    }
}

fn late() -> Problem {
    Problem::new(
        StatusCode::REQUEST_TIMEOUT,
        ProblemKind::Slow,
        "The head of the request did not come in time",
    )
}

fn malformed(fault: FramingFault) -> Problem {
    Problem::bad_request(ProblemKind::Request, fault.detail())
}

impl<S: AsyncWrite + Unpin> CheckedStream<S> {
    /// Tells the client that nothing more comes.
    fn poll_shut(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_shutdown(context))?;
        self.is_shut = true;
        self.timer.as_mut().reset(Instant::now() + LINGER);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> CheckedStream<S> {
    /// Reads what the client still sends, for a while: it may not see its answer if the connection ends
    /// with bytes unread (RFC 9112, 9.6).
    fn poll_linger(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let mut bytes = [0; 4096];
        while self.timer.as_mut().poll(context).is_pending() {
            let mut unread = ReadBuf::new(&mut bytes);
            let read = ready!(Pin::new(&mut self.stream).poll_read(context, &mut unread));
            if read.is_err() || unread.filled().is_empty() {
                break;
            }
        }
        Poll::Ready(())
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for CheckedStream<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.has_ended {
            return Poll::Ready(Ok(()));
        }
        if this.is_shut {
            // The answers are with the client.
            ready!(this.poll_linger(context));
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let before = into.filled().len();
        match Pin::new(&mut this.stream).poll_read(context, into) {
            Poll::Ready(Ok(())) if into.filled().len() > before => {
                let good = this.check(&into.filled()[before..]);
                into.set_filled(before + good);
                Poll::Ready(Ok(()))
            }
            Poll::Pending => {
                ready!(this.poll_late(context));
                this.end_late();
                Poll::Ready(Ok(()))
            }
            ended @ Poll::Ready(_) => ended,
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for CheckedStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(Pin::new(&mut this.stream).poll_flush(context))?;
        // The reader flushes when all answers are written, and has a request that is none.
        if !this.is_shut && this.state.0.end.get() == ConnectionEnd::Beyond {
            ready!(this.poll_shut(context))?;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // Behind the last answer there is no request to answer. Its body may still come.
        if this.state.0.end.get() != ConnectionEnd::Open {
            this.answer.clear();
        }
        while this.answer.has_remaining() {
            let written = ready!(Pin::new(&mut this.stream).poll_write(context, &this.answer))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            this.answer.advance(written);
        }
        if !this.is_shut {
            ready!(this.poll_shut(context))?;
        }
        if this.has_ended {
            ready!(this.poll_linger(context));
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests;
