//! HTTP/2 on a connection that has negotiated it by TLS (RFC 9113).
//!
//! actix-http's own dispatcher bounds neither the streams of a connection nor the size of their
//! headers, and has no time for anything. This one hands each stream to the same service as HTTP/1.1:
//!
//! | what a client may do | its bound |
//! | --- | --- |
//! | open streams | [`STREAMS_MAX`] a connection, and all streams together twice as many as connections, of which each gets some |
//! | send headers | [`HEAD_MAX`] bytes and `HEADERS_MAX` lines of a request, [`HEADS_MAX`] bytes of all that have no answer; `CONTINUATION` frames by the library |
//! | send a body that nobody reads yet | the windows |
//! | break streams off | [`BROKEN_MAX`] more than it lets end; in one go, by the library |
//! | have streams refused | [`REFUSED_MAX`] more than get an answer, and as many again while the connection ends; those beyond [`STREAMS_MAX`] by the library |
//! | open no stream, or not end its head | `header_timeout` for the first one, then `keep_alive` |
//! | not take its answer | `WRITE_PATIENCE`, for the stream and for the connection |
//! | keep streams open on a connection that ends | [`ENDING_MAX`] |
//! | send small or empty frames | the library's budget of `DATA`; the rest by the times above |
//!
//! The body of a request has the times and limits of its handler.

mod answer;
mod request;
mod room;

use std::{
    future::{Future, poll_fn},
    io,
    net::SocketAddr,
    pin::pin,
    time::Duration,
};

use actix_http::{Request, Response};
use actix_server::GracefulShutdownSignal;
use actix_service::Service;
use actix_web::{
    Error, ResponseError as _,
    body::{BoxBody, MessageBody},
    dev::ServiceResponse,
};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use h2::{
    Reason, RecvStream,
    server::{Builder, Connection, SendResponse},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, copy, sink},
    select,
    time::{Instant, sleep, timeout},
};

use self::{
    answer::send,
    request::{BodyDemand, head_size, service_request},
    room::{HeadPlace, HeadRoom, StreamPlace, StreamRoom},
};
use super::{
    LINGER, ServerLimits,
    early_ends::{EarlyEnd, EarlyEnds, RefusedStream},
    log_bad_request,
    problem::Problem,
    write_patience,
};

/// The most streams of a connection: no fewer are recommended (RFC 9113, 6.5.2).
const STREAMS_MAX: u32 = 100;
/// The most bytes of a request's headers, of which few on the wire may stand for all. No browser or
/// proxy sends so many.
const HEAD_MAX: u32 = 32 << 10;
/// The most bytes of memory for the heads of a connection's requests that have no answer: about 10 KiB
/// for each of its streams, as 30 headers take. The largest head alone has room.
const HEADS_MAX: usize = 1 << 20;
/// The most bytes of a body, and of all bodies of a connection, that wait to be read. A client at 100
/// ms may send 2.5 MB a second on one stream.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;
/// The most bytes of a stream's answer that wait for the connection.
const SEND_BUFFER: usize = 64 << 10;
/// A client that gives up may break off all its streams.
const BROKEN_MAX: u32 = STREAMS_MAX;
/// A client that has no place may send all its streams again some times. No rate counts them: they are no
/// requests yet.
const REFUSED_MAX: u32 = 10 * STREAMS_MAX;

/// How long the streams of a connection that takes no other ones may go on. A body that comes more
/// slowly is sent again, on another connection.
const ENDING_MAX: Duration = Duration::from_mins(2);
/// The most bytes that are read behind the end of a connection.
const READ_ON_MAX: u64 = 1 << 20;
/// The last answer of a connection leaves so long before its end.
const LAST_LEAD: Duration = Duration::from_millis(100);

/// The client of a connection.
#[derive(Clone, Copy)]
pub struct Http2Client {
    pub address: Option<SocketAddr>,
    /// It has presented one that counts.
    pub has_certificate: bool,
}

/// The parts of a server thread for its connections of HTTP/2.
pub struct Http2<S> {
    service: S,
    limits: ServerLimits,
    room: StreamRoom,
    stopping: GracefulShutdownSignal,
    ends: EarlyEnds,
}

/// The end of a stream.
enum StreamEnd {
    Answered,
    /// Answered, and the client is to keep no connection.
    Last,
    /// The client has broken it off, or did not take its answer.
    Broken,
}

/// Whether a connection takes more streams.
#[derive(Clone, Copy, PartialEq, Eq)]
enum StreamIntake {
    Open,
    /// The client has been told to open no more. Those on their way are answered.
    Ending,
    /// It has had its time.
    Refusing,
}

/// Reads what a client still sends, until it has seen the end. The system would reset a connection with
/// bytes unread, and a client that is told so while it sends reads no more answers (RFC 9112, 9.6).
async fn read_on(stream: impl AsyncRead + Unpin) -> io::Result<u64> {
    // Its buffer is not in the future, which each connection would have room for.
    copy(&mut stream.take(READ_ON_MAX), &mut sink()).await
}

impl<S, B> Http2<S>
where
    S: Service<Request, Response = ServiceResponse<B>, Error = Error>,
    B: MessageBody,
{
    /// All connections of the thread together have as many streams as they may be connections, beside
    /// the first one of each.
    pub fn new(
        service: S,
        limits: ServerLimits,
        connections: usize,
        stopping: GracefulShutdownSignal,
        ends: EarlyEnds,
    ) -> Self {
        Self {
            service,
            limits,
            room: StreamRoom::new(connections),
            stopping,
            ends,
        }
    }

    /// Serves a connection until it ends.
    ///
    /// # Errors
    /// If the client breaks a rule or a limit of the protocol, or the connection is lost.
    pub async fn serve<T: AsyncRead + AsyncWrite + Unpin>(
        &self,
        mut stream: T,
        client: Http2Client,
    ) -> io::Result<()> {
        let opened = timeout(self.limits.header_timeout, builder().handshake(&mut stream));
        let connection = select! {
            opened = opened => opened,
            () = self.stopping.notified() => return Ok(()),
        };
        let late = |_| {
            self.ends.count(EarlyEnd::HeadLate);
            io::Error::new(io::ErrorKind::TimedOut, "no HTTP/2 in time")
        };
        let mut connection = connection.map_err(late)?.map_err(io::Error::other)?;
        self.serve_streams(&mut connection, client)
            .await
            .map_err(io::Error::other)?;
        // The last frames leave.
        let closed = poll_fn(|context| connection.poll_closed(context));
        timeout(LINGER, closed).await.ok();
        drop(connection);
        timeout(LINGER, read_on(&mut stream)).await.ok();
        Ok(())
    }

    async fn serve_streams<T: AsyncRead + AsyncWrite + Unpin>(
        &self,
        connection: &mut Connection<T, Bytes>,
        client: Http2Client,
    ) -> Result<(), h2::Error> {
        let mut stopping = pin!(self.stopping.notified());
        // While there is no stream, or the connection ends.
        let mut timer = pin!(sleep(self.limits.header_timeout));
        let mut intake = StreamIntake::Open;
        let mut breaks_left = BROKEN_MAX;
        let mut refusals_left = REFUSED_MAX;
        let mut streams = FuturesUnordered::new();
        let heads = HeadRoom::new();
        let mut has_begun = false;
        // Some clients read no answer that comes with the end of its connection.
        let mut lead = pin!(sleep(LAST_LEAD));
        let mut has_last = false;
        loop {
            let mut ends = false;
            select! {
                biased;
                () = &mut stopping, if intake == StreamIntake::Open => ends = true,
                Some(end) = streams.next() => {
                    match end {
                        StreamEnd::Broken => breaks_left -= 1,
                        StreamEnd::Answered | StreamEnd::Last => {
                            breaks_left = BROKEN_MAX.min(breaks_left + 1);
                            refusals_left = REFUSED_MAX.min(refusals_left + 1);
                        }
                    }
                    if breaks_left == 0 {
                        self.ends.count(EarlyEnd::StreamsBroken);
                        connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                        return Ok(());
                    }
                    if matches!(end, StreamEnd::Last) && !has_last {
                        has_last = true;
                        lead.as_mut().reset(Instant::now() + LAST_LEAD);
                    }
                    if streams.is_empty() {
                        match intake {
                            StreamIntake::Open => {
                                timer.as_mut().reset(Instant::now() + self.limits.keep_alive);
                            }
                            StreamIntake::Ending => {}
                            // The end of the last answer may still be on its way. Without one, the
                            // connection has ended by itself before.
                            StreamIntake::Refusing => {
                                timer.as_mut().reset(Instant::now() + write_patience());
                            }
                        }
                    }
                }
                () = &mut lead, if has_last && intake == StreamIntake::Open => ends = true,
                () = &mut timer, if streams.is_empty() || intake != StreamIntake::Open => {
                    match intake {
                        StreamIntake::Open => {
                            ends = true;
                            if !has_begun {
                                self.ends.count(EarlyEnd::HeadLate);
                            }
                        }
                        StreamIntake::Ending if !streams.is_empty() => {
                            intake = StreamIntake::Refusing;
                            timer.as_mut().reset(Instant::now() + ENDING_MAX);
                        }
                        StreamIntake::Ending | StreamIntake::Refusing => {
                            connection.abrupt_shutdown(Reason::NO_ERROR);
                            return Ok(());
                        }
                    }
                }
                accepted = connection.accept() => {
                    let Some(accepted) = accepted else { return Ok(()) };
                    let (request, mut respond) = accepted?;
                    has_begun = true;
                    match self.admit(&request, intake, streams.len(), &heads) {
                        Ok(places) => {
                            streams.push(self.answer(request, respond, client, places));
                        }
                        Err(why) => {
                            self.ends.count_refused(why);
                            // The client may send it again, to another connection.
                            respond.send_reset(Reason::REFUSED_STREAM);
                            refusals_left -= 1;
                        }
                    }
                }
            }
            if refusals_left == 0 && intake != StreamIntake::Open {
                self.ends.count(EarlyEnd::StreamsRefused);
                connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                return Ok(());
            }
            // An honest client goes on by another connection, and loses nothing.
            if (ends || refusals_left == 0) && intake == StreamIntake::Open {
                refusals_left = REFUSED_MAX;
                intake = StreamIntake::Ending;
                connection.graceful_shutdown();
                timer.as_mut().reset(Instant::now() + LINGER);
            }
        }
    }

    /// The places of a request, on a connection that has `open` streams.
    fn admit(
        &self,
        request: &http::Request<RecvStream>,
        intake: StreamIntake,
        open: usize,
        heads: &HeadRoom,
    ) -> Result<(StreamPlace, HeadPlace), RefusedStream> {
        if intake == StreamIntake::Refusing {
            return Err(RefusedStream::Ending);
        }
        let head = heads.take(head_size(request));
        let head = head.ok_or(RefusedStream::LargeHeads)?;
        let place = self.room.take(open).ok_or(RefusedStream::NoPlace)?;
        Ok((place, head))
    }

    /// Has the service answer the request of a stream. It hears of it if the client breaks that off:
    /// its future is dropped.
    async fn answer(
        &self,
        request: http::Request<RecvStream>,
        mut respond: SendResponse<Bytes>,
        client: Http2Client,
        (_place, head): (StreamPlace, HeadPlace),
    ) -> StreamEnd {
        let is_head = request.method() == http::Method::HEAD;
        let demand = BodyDemand::of(&request);
        let request = match service_request(request, client, demand.clone()) {
            Ok(request) => request,
            Err(problem) => {
                log_bad_request(client.address, &problem);
                return send(problem_response(&problem), &mut respond, is_head).await;
            }
        };
        let mut answering = pin!(self.service.call(request));
        let answered = poll_fn(|context| {
            let answer = answering.as_mut().poll(context);
            if answer.is_pending() {
                if demand.is_due() {
                    // It fails where the stream has ended, which the next line sees.
                    respond.send_informational(continues()).ok();
                }
                return respond.poll_reset(context).map(|_| None);
            }
            answer.map(Some)
        });
        match answered.await {
            None => StreamEnd::Broken,
            Some(Ok(answer)) => {
                // The head goes with its request. The answer may take long.
                let answer = answer.into();
                drop(head);
                send(answer, &mut respond, is_head).await
            }
            Some(Err(error)) => send(Response::from(error), &mut respond, is_head).await,
        }
    }
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEAD_MAX)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buffer_size(SEND_BUFFER);
    builder
}

fn continues() -> http::Response<()> {
    let mut response = http::Response::new(());
    *response.status_mut() = http::StatusCode::CONTINUE;
    response
}

fn problem_response(problem: &Problem) -> Response<BoxBody> {
    problem.error_response().into()
}

#[cfg(test)]
mod tests;
