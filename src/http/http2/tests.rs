use std::{cell::Cell, rc::Rc};

use actix_web::{App, HttpRequest, HttpResponse, test::init_service, web};
use futures_util::{StreamExt as _, future::pending, stream};
use h2::client::{ResponseFuture, SendRequest};
use http::StatusCode;
use tokio::{io::duplex, task::JoinHandle, time::pause};

use super::*;

/// A connection of a client.
struct Client {
    requests: SendRequest<Bytes>,
    /// The node's end of it.
    served: JoinHandle<()>,
}

/// Answers by the path, and counts.
struct Server<S> {
    http2: Rc<Http2<S>>,
    ends: EarlyEnds,
}

/// Bytes of a long answer: no more than a client takes by itself, more than a socket of [`SMALL`] does.
const BODY: usize = 40 << 10;
const SMALL: usize = 1 << 10;

const LIMITS: ServerLimits = ServerLimits::of_one_thread(Duration::ZERO);

async fn by_path(request: HttpRequest) -> HttpResponse {
    match request.path() {
        "/never" => pending().await,
        "/later" => {
            sleep(5 * LINGER).await;
            HttpResponse::Ok().body(vec![b'x'; BODY])
        }
        "/last" => HttpResponse::Ok().force_close().finish(),
        "/long" => {
            let piece = stream::once(async { Ok::<_, Error>(Bytes::from_static(b"piece")) });
            HttpResponse::Ok().streaming(piece.chain(stream::pending()))
        }
        _ => HttpResponse::Ok().finish(),
    }
}

/// A server thread for so many connections.
async fn server(
    connections: usize,
) -> Server<impl Service<Request, Response = ServiceResponse<impl MessageBody>, Error = Error>> {
    let service = init_service(App::new().default_service(web::to(by_path))).await;
    let stopping = actix_server::ServerBuilder::new().graceful_shutdown_signal();
    let ends = EarlyEnds::default();
    let http2 = Http2::new(service, LIMITS, connections, stopping, ends.clone());
    Server {
        http2: Rc::new(http2),
        ends,
    }
}

impl<S, B> Server<S>
where
    S: Service<Request, Response = ServiceResponse<B>, Error = Error> + 'static,
    B: MessageBody + 'static,
{
    async fn connect(&self) -> Client {
        self.connect_by(1 << 16, Rc::new(Cell::new(true))).await
    }

    /// By a socket of so many bytes. The client looks at it while `reads` is true.
    async fn connect_by(&self, socket: usize, reads: Rc<Cell<bool>>) -> Client {
        let (ours, clients) = duplex(socket);
        let http2 = Rc::clone(&self.http2);
        let client = Http2Client {
            address: None,
            has_certificate: false,
        };
        let served = actix_rt::spawn(async move {
            // The client may leave first.
            http2.serve(ours, client).await.ok();
        });
        let (requests, driver) = h2::client::handshake(clients).await.unwrap();
        actix_rt::spawn(async move {
            let mut driver = pin!(driver);
            // It may end by an error, as the server says.
            while !reads.get() || timeout(LOOK_EACH, driver.as_mut()).await.is_err() {
                sleep(LOOK_EACH).await;
            }
        });
        Client { requests, served }
    }
}

/// A client that does not read looks again after this time.
const LOOK_EACH: Duration = Duration::from_micros(100);

impl Client {
    /// Opens a stream whose head takes about `size` bytes.
    async fn open(&mut self, path: &str, size: usize) -> ResponseFuture {
        let mut requests = self.requests.clone().ready().await.unwrap();
        let request = http::Request::get(format!("https://a{path}"))
            .header("x", "x".repeat(size))
            .body(())
            .unwrap();
        requests.send_request(request, true).unwrap().0
    }

    /// The status of a request, or why its stream was reset.
    async fn ask(&mut self, path: &str, size: usize) -> Result<StatusCode, Option<Reason>> {
        let answer = self.open(path, size).await.await;
        answer
            .map(|answer| answer.status())
            .map_err(|why| why.reason())
    }

    /// The time that the server goes on with it.
    async fn lasts(self) -> Duration {
        let began = Instant::now();
        timeout(Duration::from_hours(1), self.served)
            .await
            .expect("it ends")
            .expect("no panic");
        began.elapsed()
    }
}

const REFUSED: Result<StatusCode, Option<Reason>> = Err(Some(Reason::REFUSED_STREAM));
const LARGE: usize = 30 << 10;

/// How many of 60 requests with large heads wait for their answers, and how many were refused.
async fn with_large_heads(client: &mut Client, path: &str) -> (Vec<ResponseFuture>, usize) {
    let (mut open, mut refused) = (Vec::new(), 0);
    for _ in 0..60 {
        let mut answer = client.open(path, LARGE).await;
        // All that comes at once has come then.
        match timeout(Duration::from_millis(1), &mut answer).await {
            Ok(Err(why)) => {
                assert_eq!(why.reason(), Some(Reason::REFUSED_STREAM));
                refused += 1;
            }
            Ok(Ok(_)) | Err(_) => open.push(answer),
        }
    }
    (open, refused)
}

#[actix_rt::test]
async fn the_heads_of_a_connection_have_a_bound_until_they_are_answered() {
    pause();
    let server = server(1000).await;
    let mut client = server.connect().await;
    let (open, refused) = with_large_heads(&mut client, "/never").await;
    assert_eq!(open.len() + refused, 60);
    let taken = open.len() * LARGE;
    assert!(
        taken <= HEADS_MAX && taken + 2 * LARGE > HEADS_MAX,
        "{taken}"
    );
    let counted = server.ends.refused(RefusedStream::LargeHeads);
    assert_eq!(counted, refused as u64);
    // Another connection has a bound of its own, and small heads fit.
    assert_eq!(
        server.connect().await.ask("/", LARGE).await,
        Ok(StatusCode::OK)
    );
    assert_eq!(client.ask("/", 1).await, Ok(StatusCode::OK));
    assert_eq!(client.ask("/", LARGE).await, REFUSED);
    drop(open);
    sleep(Duration::from_millis(1)).await;
    assert_eq!(client.ask("/", LARGE).await, Ok(StatusCode::OK));
    // An answer takes no room of the heads.
    let (open, refused) = with_large_heads(&mut client, "/long").await;
    assert_eq!((open.len(), refused), (60, 0));
}

#[test]
fn the_largest_head_has_room() {
    // A header takes 32 bytes of the list beside its name and value (RFC 9113, 6.5.2).
    let most = HEAD_MAX as usize / 33;
    let head = HEAD_MAX as usize + most * request::HEADER_COST;
    assert!(HeadRoom::new().take(head).is_some());
}

#[actix_rt::test]
async fn streams_that_have_no_place_are_refused_and_counted() {
    pause();
    let server = server(8).await;
    let mut greedy = server.connect().await;
    let mut open = Vec::new();
    for _ in 0..8 {
        open.push(greedy.open("/never", 1).await);
    }
    assert_eq!(greedy.ask("/", 1).await, REFUSED);
    let refused = server.ends.refused(RefusedStream::NoPlace);
    assert!(refused > 0);
    // Others have places left.
    let mut other = server.connect().await;
    let _first = other.open("/never", 1).await;
    assert_eq!(other.ask("/", 1).await, Ok(StatusCode::OK));
    assert_eq!(server.ends.refused(RefusedStream::NoPlace), refused);
}

#[actix_rt::test]
async fn a_silent_connection_is_counted_and_one_that_has_asked_is_not() {
    pause();
    let server = server(8).await;
    let mut asked = server.connect().await;
    assert_eq!(asked.ask("/", 1).await, Ok(StatusCode::OK));
    asked.lasts().await;
    assert_eq!(server.ends.counted(EarlyEnd::HeadLate), 0);
    server.connect().await.lasts().await;
    assert_eq!(server.ends.counted(EarlyEnd::HeadLate), 1);
}

#[actix_rt::test]
async fn a_connection_that_ends_has_a_deadline() {
    pause();
    let server = server(8).await;
    for path in ["/never", "/long"] {
        let mut client = server.connect().await;
        let _open = client.open(path, 1).await;
        assert_eq!(client.ask("/last", 1).await, Ok(StatusCode::OK));
        let lasted = client.lasts().await;
        assert!(
            lasted >= ENDING_MAX && lasted < ENDING_MAX + 10 * LINGER,
            "{lasted:?}"
        );
    }
    // It does not wait for the deadline if nothing is left.
    let mut client = server.connect().await;
    let open = client.open("/never", 1).await;
    assert_eq!(client.ask("/last", 1).await, Ok(StatusCode::OK));
    actix_rt::spawn(async move {
        sleep(10 * LINGER).await;
        drop(open);
    });
    assert!(client.lasts().await < ENDING_MAX);
}

#[actix_rt::test]
async fn the_last_answer_of_a_connection_arrives_whole() {
    pause();
    let server = server(8).await;
    let reads = Rc::new(Cell::new(true));
    let mut client = server.connect_by(SMALL, Rc::clone(&reads)).await;
    let later = client.open("/later", 1).await;
    assert_eq!(client.ask("/last", 1).await, Ok(StatusCode::OK));
    // The connection takes nothing more by now, and the other answer is yet to come.
    sleep(3 * LINGER).await;
    reads.set(false);
    sleep(5 * LINGER).await;
    assert!(
        !client.served.is_finished(),
        "the answer waits for the client"
    );
    reads.set(true);
    let mut body = later.await.expect("a head").into_body();
    let mut length = 0;
    while let Some(piece) = body.data().await {
        length += piece.expect("the rest of the answer").len();
    }
    assert_eq!(length, BODY);
    assert!(client.lasts().await < ENDING_MAX);
}

#[actix_rt::test]
async fn a_client_whose_streams_are_refused_for_long_is_sent_to_another_connection() {
    pause();
    let server = server(1).await;
    let mut greedy = server.connect().await;
    let (first, second) = (
        greedy.open("/later", 1).await,
        greedy.open("/later", 1).await,
    );
    let mut refused = 0;
    while let Ok(requests) = greedy.requests.clone().ready().await {
        greedy.requests = requests;
        assert_eq!(greedy.ask("/", 1).await, REFUSED);
        refused += 1;
        assert!(refused <= REFUSED_MAX, "it goes on");
    }
    assert_eq!(refused, REFUSED_MAX);
    assert_eq!(server.ends.counted(EarlyEnd::StreamsRefused), 0);
    for answer in [first, second] {
        let mut body = answer.await.expect("a head").into_body();
        while let Some(piece) = body.data().await {
            body.flow_control()
                .release_capacity(piece.expect("a piece").len())
                .unwrap();
        }
    }
    greedy.lasts().await;
    // Each answer makes good for a refusal.
    let mut patient = server.connect().await;
    for _ in 0..2 {
        let open = [
            patient.open("/later", 1).await,
            patient.open("/later", 1).await,
        ];
        for _ in 1..REFUSED_MAX {
            assert_eq!(patient.ask("/", 1).await, REFUSED);
        }
        drop(open);
        sleep(Duration::from_millis(1)).await;
        for _ in 1..REFUSED_MAX {
            assert_eq!(patient.ask("/", 1).await, Ok(StatusCode::OK));
        }
    }
}
