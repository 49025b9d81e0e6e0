//! The time that the head of a request may take.
//!
//! actix-http has a timer for the first head of a connection only, so that a client could send the
//! next one byte by byte and hold its connection for ever. The stream of a connection sees when a
//! head begins, and the service when one is complete. Both together time each head.

use std::{
    cell::Cell,
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::{Duration, SystemTime},
};

use bytes::{Buf as _, Bytes};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep_until},
};

/// What a connection waits for. Clones share it.
#[derive(Clone)]
pub struct HeadState(Rc<Cell<Phase>>);

#[derive(Clone, Copy)]
enum Phase {
    /// Nothing has come since the last answer.
    Idle,
    /// A head, or the rest of a body that nobody wanted, comes since then.
    Head(Instant),
    /// The service has a request.
    Service,
}

impl HeadState {
    /// The first head of a connection begins with the connection.
    fn new() -> Self {
        Self(Rc::new(Cell::new(Phase::Head(Instant::now()))))
    }

    /// The service has a request: its head is complete.
    pub fn complete(&self) {
        self.0.set(Phase::Service);
    }

    /// The service has answered.
    pub fn answered(&self) {
        self.0.set(Phase::Idle);
    }
}

/// A stream that ends for its reader when a head takes too long. The client gets a 408 then.
pub struct HeadDeadlineStream<S> {
    stream: S,
    timeout: Duration,
    state: HeadState,
    /// It never fires later than the deadline of the head that comes. A request costs no timer: one
    /// that fires too early is set again.
    timer: Pin<Box<Sleep>>,
    is_late: bool,
    /// The rest of the 408.
    answer: Bytes,
}

impl<S> HeadDeadlineStream<S> {
    pub fn new(stream: S, timeout: Duration) -> Self {
        Self {
            stream,
            timeout,
            state: HeadState::new(),
            timer: Box::pin(sleep_until(Instant::now() + timeout)),
            is_late: false,
            answer: Bytes::new(),
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

    /// Something has come. False if it came too late.
    fn came(&self) -> bool {
        match self.state.0.get() {
            Phase::Idle => self.state.0.set(Phase::Head(Instant::now())),
            Phase::Head(began) => return began.elapsed() < self.timeout,
            Phase::Service => {}
        }
        true
    }

    /// Ready once the head that comes is too late.
    fn poll_late(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Phase::Head(began) = self.state.0.get() else {
            return Poll::Pending;
        };
        let deadline = began + self.timeout;
        loop {
            ready!(self.timer.as_mut().poll(context));
            if Instant::now() >= deadline {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(deadline);
        }
    }

    /// Nothing more is read. The answer leaves when the reader closes the stream, behind any others.
    fn end(&mut self) {
        self.is_late = true;
        let date = httpdate::fmt_http_date(SystemTime::now());
        let answer = format!(
            "HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\
             date: {date}\r\n\r\n"
        );
        self.answer = answer.into();
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for HeadDeadlineStream<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.is_late {
            return Poll::Ready(Ok(()));
        }
        let before = into.filled().len();
        match Pin::new(&mut this.stream).poll_read(context, into) {
            Poll::Ready(Ok(())) if into.filled().len() > before => {
                if !this.came() {
                    into.set_filled(before);
                    this.end();
                }
                Poll::Ready(Ok(()))
            }
            Poll::Pending => {
                ready!(this.poll_late(context));
                this.end();
                Poll::Ready(Ok(()))
            }
            ended @ Poll::Ready(_) => ended,
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for HeadDeadlineStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.answer.has_remaining() {
            let written = ready!(Pin::new(&mut this.stream).poll_write(context, &this.answer))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            this.answer.advance(written);
        }
        Pin::new(&mut this.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
        time::{advance, sleep, timeout},
    };

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(5);

    fn connection() -> (HeadDeadlineStream<DuplexStream>, DuplexStream) {
        let (ours, clients) = duplex(1024);
        (HeadDeadlineStream::new(ours, TIMEOUT), clients)
    }

    /// How long the stream goes on while a byte comes each second, up to a minute.
    async fn lasts(
        stream: &mut HeadDeadlineStream<DuplexStream>,
        client: &mut DuplexStream,
    ) -> Duration {
        let began = Instant::now();
        let read = async {
            let mut bytes = [0; 16];
            while stream.read(&mut bytes).await.unwrap() > 0 {}
        };
        let send = async {
            loop {
                client.write_all(b"x").await.unwrap();
                sleep(Duration::from_secs(1)).await;
            }
        };
        timeout(Duration::from_mins(1), async {
            tokio::select! { () = read => {}, () = send => {} }
        })
        .await
        .ok();
        began.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn each_head_has_the_same_time_from_its_first_byte_on() {
        let (mut stream, mut client) = connection();
        let state = stream.state();
        for _ in 0..3 {
            // The timer of an earlier head fires in between.
            for rest in [0, 1, 4, 7] {
                client.write_all(b"head").await.unwrap();
                let mut head = [0; 4];
                stream.read_exact(&mut head).await.unwrap();
                state.complete();
                sleep(Duration::from_secs(rest)).await;
                state.answered();
                // Nothing comes for longer than a head may take.
                let idle = timeout(2 * TIMEOUT, stream.read(&mut head)).await;
                assert!(idle.is_err(), "an idle connection has no head");
            }
        }
        assert_eq!(lasts(&mut stream, &mut client).await, TIMEOUT);
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_head_begins_with_the_connection() {
        let (mut stream, mut client) = connection();
        assert_eq!(lasts(&mut stream, &mut client).await, TIMEOUT);
        let (mut stream, _client) = connection();
        let began = Instant::now();
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(began.elapsed(), TIMEOUT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_in_service_is_not_timed() {
        let (mut stream, mut client) = connection();
        stream.state().complete();
        let minute = Duration::from_mins(1);
        assert_eq!(lasts(&mut stream, &mut client).await, minute);
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_that_never_pause_do_not_help() {
        let (mut stream, mut client) = connection();
        client.write_all(&[b'x'; 64]).await.unwrap();
        let mut byte = [0];
        assert_eq!(stream.read(&mut byte).await.unwrap(), 1);
        advance(TIMEOUT).await;
        // There is more, and nothing is waited for.
        assert_eq!(stream.read(&mut byte).await.unwrap(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_head_is_answered_behind_the_answers_before_it() {
        let (mut stream, mut client) = connection();
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
        stream.shutdown().await.unwrap();
        drop(stream);
        let mut answers = String::new();
        client.read_to_string(&mut answers).await.unwrap();
        let late = answers.strip_prefix("HTTP/1.1 200 OK\r\n\r\n").unwrap();
        assert!(
            late.starts_with("HTTP/1.1 408 Request Timeout\r\n"),
            "{late}"
        );
        assert!(late.ends_with("\r\n\r\n"), "{late}");

        let (mut stream, mut client) = connection();
        stream.shutdown().await.unwrap();
        drop(stream);
        client.read_to_string(&mut answers).await.unwrap();
        assert_eq!(answers.matches("408").count(), 1, "only a late one");
    }
}
