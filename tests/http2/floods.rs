//! Clients that want to tie the node up.

use std::{cell::Cell, rc::Rc, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, future::LocalBoxFuture, future::join_all};
use h2::Reason;
use http::StatusCode;
use rustls::{ClientConfig, version::TLS13};
use tokio::{
    io::AsyncWriteExt as _,
    time::{sleep, timeout},
};

use super::{
    TlsNode,
    client::{
        CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, Http2Connection, PING,
        RST_STREAM, RawConnection, SETTINGS, frame, head,
    },
    record,
};
use crate::{
    ingest::RECORD,
    support::{api::Api, node::PATIENCE},
    tls::client_tls,
};

const NO_ERROR: u32 = 0;
const REFUSED_STREAM: u32 = 7;
const CANCEL: u32 = 8;
const ENHANCE_YOUR_CALM: u32 = 11;
/// Of each kind at a time.
const CLIENTS: usize = 4;
/// The node may take so much more memory for all of them.
const MEMORY_MAX: u64 = 64 << 20;

/// The address of a client's connection, and its kind.
#[derive(Clone)]
struct Target {
    port: u16,
    tls: Arc<ClientConfig>,
}

impl Target {
    fn of(tls: &TlsNode) -> Self {
        Self {
            port: tls.node.ingest,
            tls: client_tls(&tls.authority, None, &[&TLS13], &["h2"]),
        }
    }

    async fn raw(&self, settings: &[(u16, u32)]) -> RawConnection {
        RawConnection::open(self.port, Arc::clone(&self.tls), settings).await
    }
}

/// Some clients read nothing behind the frame that ends a connection. Nobody without a token keeps one.
pub async fn an_answer_comes_before_the_end_of_its_connection(tls: &TlsNode) {
    let RawConnection {
        mut reader,
        mut writer,
    } = Target::of(tls).raw(&[]).await;
    let request = frame(HEADERS, END_HEADERS | END_STREAM, 1, &head("GET", "/"));
    writer.write_all(&request).await.expect("room");
    let mut kinds = Vec::new();
    while kinds.last() != Some(&GOAWAY) {
        let frame = timeout(PATIENCE, reader.frame()).await.expect("a frame");
        kinds.push(frame.expect("it does not just close").0);
    }
    let body = kinds.iter().rposition(|kind| *kind == DATA);
    assert_eq!(body, kinds.len().checked_sub(2), "{kinds:?}");
}

fn stream_id(number: u32) -> u32 {
    2 * number + 1
}

/// Streams that are broken off as soon as they are opened, as fast as it goes.
async fn resets_in_one_go(target: Target) {
    let mut piece = Vec::new();
    for number in 0..20_000 {
        let stream = stream_id(number);
        piece.extend(frame(HEADERS, END_HEADERS, stream, &head("POST", "/")));
        piece.extend(frame(RST_STREAM, 0, stream, &CANCEL.to_be_bytes()));
    }
    let code = target.raw(&[]).await.flood(piece, 1).await;
    assert!(
        code.is_none_or(|code| code == ENHANCE_YOUR_CALM),
        "{code:?}"
    );
}

/// The same, each once the handler has it.
async fn resets_one_by_one(target: Target) {
    let RawConnection {
        mut reader,
        mut writer,
    } = target.raw(&[]).await;
    for number in 0..1000 {
        let stream = stream_id(number);
        let mut piece = frame(HEADERS, END_HEADERS, stream, &head("POST", "/"));
        piece.extend(frame(PING, 0, 0, &[0; 8]));
        if writer.write_all(&piece).await.is_err() || reader.next(PING).await.is_none() {
            break;
        }
        let reset = frame(RST_STREAM, 0, stream, &CANCEL.to_be_bytes());
        if writer.write_all(&reset).await.is_err() {
            break;
        }
        assert!(number < 200, "it goes on");
    }
}

/// A head of 10,000 headers.
async fn headers(target: Target) {
    let connection = Http2Connection::open(target.port, target.tls).await;
    let request = (0..10_000).fold(record(), |request, _| request.header("x", "x"));
    let answer = connection.begin(request, None).await;
    if let Ok(answer) = answer {
        assert_eq!(answer.status, 431);
    }
}

/// A head that never ends.
async fn continuations(target: Target) {
    let connection = target.raw(&[]).await;
    let mut piece = frame(HEADERS, 0, 1, &head("POST", "/"));
    for _ in 0..100_000 {
        piece.extend(frame(CONTINUATION, 0, 1, b""));
    }
    let code = connection.flood(piece, 1).await;
    assert!(
        code.is_none_or(|code| code == ENHANCE_YOUR_CALM),
        "{code:?}"
    );
}

/// A head that goes on later, or never.
async fn part_of_a_head(target: Target) {
    let connection = target.raw(&[]).await;
    let piece = frame(HEADERS, 0, 1, &head("POST", "/"));
    connection.flood(piece, 1).await;
}

/// Nothing at all.
async fn silence(target: Target) {
    let code = target.raw(&[]).await.flood(Vec::new(), 1).await;
    assert_eq!(code, Some(NO_ERROR));
}

/// Frames that ask for an answer of the protocol.
async fn pings(target: Target) {
    let connection = target.raw(&[]).await;
    let piece = frame(PING, 0, 0, &[0; 8]).repeat(1000);
    connection.flood(piece, usize::MAX).await;
}

async fn settings(target: Target) {
    let connection = target.raw(&[]).await;
    let piece = frame(SETTINGS, 0, 0, &[]).repeat(1000);
    connection.flood(piece, usize::MAX).await;
}

/// A body of nothing.
async fn empty_data(target: Target) {
    let mut connection = target.raw(&[]).await;
    let head = frame(HEADERS, END_HEADERS, 1, &head("POST", "/"));
    connection.writer.write_all(&head).await.expect("room");
    let piece = frame(DATA, 0, 1, b"").repeat(1000);
    let code = connection.flood(piece, usize::MAX).await;
    assert!(
        code.is_none_or(|code| code == ENHANCE_YOUR_CALM),
        "{code:?}"
    );
}

/// Answers that the client takes nothing of.
async fn no_window(target: Target) {
    const INITIAL_WINDOW: u16 = 4;
    let RawConnection {
        mut reader,
        mut writer,
    } = target.raw(&[(INITIAL_WINDOW, 0)]).await;
    let streams: Vec<_> = (0..50).map(stream_id).collect();
    let flags = END_HEADERS | END_STREAM;
    for stream in &streams {
        let piece = frame(HEADERS, flags, *stream, &head("GET", "/schema"));
        writer.write_all(&piece).await.expect("room");
    }
    for _ in streams {
        let (.., code) = reader.next(RST_STREAM).await.expect("it is broken off");
        assert_eq!(code, CANCEL.to_be_bytes());
    }
    reader.until_closed().await;
}

/// More streams than a connection may have.
async fn streams(target: Target) {
    let RawConnection {
        mut reader,
        mut writer,
    } = target.raw(&[]).await;
    let heads = (0..150).map(|number| {
        let head = head("POST", "/");
        frame(HEADERS, END_HEADERS, stream_id(number), &head)
    });
    let heads: Vec<_> = heads.flatten().collect();
    writer.write_all(&heads).await.expect("room");
    for _ in 0..50 {
        let (.., code) = reader.next(RST_STREAM).await.expect("one too many");
        assert_eq!(code, REFUSED_STREAM.to_be_bytes());
    }
    // The bodies of the others never come.
    reader.until_closed().await;
}

/// Streams that are refused, for ever, by a client that hears nothing.
async fn refused_streams(target: Target) {
    let connection = target.raw(&[]).await;
    let (header, byte) = kept_header();
    let heads = (0..5000).flat_map(|number| {
        let kept = if number == 0 { &header[..] } else { &[byte; 7] };
        let head = [&head("POST", "/"), kept].concat();
        frame(HEADERS, END_HEADERS, stream_id(number), &head)
    });
    let heads: Vec<_> = heads.collect();
    let code = connection.flood(heads, 1).await;
    assert_eq!(code, Some(ENHANCE_YOUR_CALM));
}

/// Bodies that come slowly, on all streams of a connection.
async fn slow_bodies(target: Target) {
    let connection = Http2Connection::open(target.port, target.tls).await;
    let answers = (0..50).map(|_| connection.trickle(record()));
    for answer in join_all(answers).await {
        assert_eq!(answer.status, StatusCode::REQUEST_TIMEOUT);
    }
}

#[actix_rt::test]
async fn floods_leave_an_honest_client_served() {
    let api = Api::start();
    let limits = [
        ("HEADER_TIMEOUT", "2s"),
        ("KEEP_ALIVE", "2s"),
        ("BODY_TIMEOUT", "2s"),
    ];
    let Some(tls) = TlsNode::start(&api.url(), &limits, "write-patience=return(1000)").await else {
        return;
    };
    let target = Target::of(&tls);
    let before = tls.node.memory();
    let floods = || -> Vec<(&str, LocalBoxFuture<'static, ()>)> {
        let target = || target.clone();
        vec![
            ("resets in one go", resets_in_one_go(target()).boxed_local()),
            (
                "resets one by one",
                resets_one_by_one(target()).boxed_local(),
            ),
            ("headers", headers(target()).boxed_local()),
            ("continuations", continuations(target()).boxed_local()),
            ("part of a head", part_of_a_head(target()).boxed_local()),
            ("silence", silence(target()).boxed_local()),
            ("pings", pings(target()).boxed_local()),
            ("settings", settings(target()).boxed_local()),
            ("empty data", empty_data(target()).boxed_local()),
            ("no window", no_window(target()).boxed_local()),
            ("streams", streams(target()).boxed_local()),
            ("refused streams", refused_streams(target()).boxed_local()),
            ("slow bodies", slow_bodies(target()).boxed_local()),
        ]
    };
    let running: Rc<Cell<usize>> = Rc::default();
    let mut hostile = Vec::new();
    for (name, flood) in (0..CLIENTS).flat_map(|_| floods()) {
        running.set(running.get() + 1);
        let counted = Rc::clone(&running);
        let ended = actix_rt::spawn(async move {
            let end = std::panic::AssertUnwindSafe(flood).catch_unwind().await;
            counted.set(counted.get() - 1);
            end.is_ok()
        });
        hostile.push((name, ended));
    }
    let mut honest = Http2Connection::open(target.port, Arc::clone(&target.tls)).await;
    let mut posted = 0;
    while running.get() > 0 {
        match honest.ask(record(), RECORD).await {
            Ok(answer) => {
                assert_eq!(answer.status, StatusCode::ACCEPTED);
                posted += 1;
            }
            // On a busy machine it may have been idle for too long.
            Err(why) if why.is_go_away() && why.reason() == Some(Reason::NO_ERROR) => {
                honest = Http2Connection::open(target.port, Arc::clone(&target.tls)).await;
            }
            Err(why) => panic!("{why}"),
        }
        sleep(Duration::from_millis(50)).await;
    }
    for (name, ended) in hostile {
        assert!(ended.await.expect("no panic"), "{name}");
    }
    let more = tls.node.peak_memory().saturating_sub(before);
    assert!(more < MEMORY_MAX, "{more} bytes more");
    assert_eq!(tls.node.at_rest(PATIENCE).await["accepted"], posted);
}

/// A header of 4 KiB that the connection keeps (RFC 7541, 6.2.1), and the byte that stands for it from
/// then on.
fn kept_header() -> (Vec<u8>, u8) {
    const LENGTH: usize = 4000;
    // The rest of an integer of more than seven bits (RFC 7541, 5.1).
    let rest = u8::try_from((LENGTH - 127) % 128 + 128).expect("seven bits");
    let last = u8::try_from((LENGTH - 127) / 128).expect("seven bits");
    let mut header = vec![0x40, 1, b'x', 0x7f, rest, last];
    header.extend([b'x'; LENGTH]);
    (header, 0x80 + 62)
}

#[actix_rt::test]
async fn a_byte_that_stands_for_a_large_header_does_not_cost_its_memory_each_time() {
    let api = Api::start();
    let Some(tls) = TlsNode::start(&api.url(), &[], "").await else {
        return;
    };
    let target = Target::of(&tls);
    let (header, byte) = kept_header();
    let before = tls.node.memory();
    let mut open = Vec::new();
    for _ in 0..32 {
        let mut client = target.raw(&[]).await;
        let heads = (0..100).flat_map(|number| {
            let kept = if number == 0 { &header[..] } else { &[byte; 7] };
            let head = [&head("POST", "/"), kept].concat();
            frame(HEADERS, END_HEADERS, stream_id(number), &head)
        });
        let mut heads: Vec<_> = heads.collect();
        heads.extend(frame(PING, 0, 0, &[0; 8]));
        client.writer.write_all(&heads).await.expect("room");
        // No body comes, so that the requests stay.
        let (mut refused, mut are_read) = (0, false);
        while refused == 0 || !are_read {
            let frame = timeout(PATIENCE, client.reader.frame()).await;
            match frame.expect("in time").expect("it is open") {
                (PING, ..) => are_read = true,
                (RST_STREAM, .., code) => {
                    assert_eq!(code, REFUSED_STREAM.to_be_bytes());
                    refused += 1;
                }
                _ => {}
            }
        }
        open.push(client);
    }
    // The node's peak is that of its start.
    let more = tls.node.memory().saturating_sub(before);
    assert!(more < 48 << 20, "{more} bytes more");
    let mut honest = Http2Connection::open(target.port, target.tls).await;
    let answer = honest.ask(record(), RECORD).await.expect("an answer");
    assert_eq!(answer.status, StatusCode::ACCEPTED);
    let refused = r#"waypost_streams_refused_total{side="ingest",reason="large_heads"}"#;
    assert_ne!(tls.node.metric(refused).await, "0");
}
