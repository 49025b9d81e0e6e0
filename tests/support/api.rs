//! A test API: a real HTTP server that keeps every POST and answers as the test says.

use std::{
    collections::{BTreeMap, HashMap},
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, MutexGuard, mpsc},
    thread,
    time::Duration,
};

use actix_web::{
    App, HttpRequest, HttpResponse, HttpResponseBuilder, HttpServer,
    dev::ServerHandle,
    http::{StatusCode, header},
    web,
};
use futures_util::stream;

use super::process::free_port;

/// A POST as the API received it.
#[derive(Clone, Debug)]
pub struct Post {
    pub key: Option<String>,
    pub path: String,
    pub content_type: Option<String>,
    /// `Content-Encoding`.
    pub encoding: Option<String>,
    pub traceparent: Option<String>,
    pub tracestate: Option<String>,
    pub authorization: Option<String>,
    /// `webhook-id`, `webhook-timestamp` and `webhook-signature`.
    pub webhook: [Option<String>; 3],
    /// The headers that begin with `ce-`.
    pub event: BTreeMap<String, String>,
    pub body: web::Bytes,
    /// The client's address; one per connection.
    pub peer: Option<SocketAddr>,
}

/// The API's reaction to a POST.
#[derive(Clone, Debug)]
pub enum Conduct {
    Answer(u16),
    AnswerWith {
        status: u16,
        headers: Vec<(&'static str, String)>,
        body: Vec<u8>,
    },
    Hang,
    /// Sends the head and half of the body, then closes.
    CutAnswer,
}

type Judge = Box<dyn Fn(usize, &Post) -> Conduct + Send>;

struct State {
    posts: Vec<Post>,
    /// The number of 2xx answers per key.
    taken: HashMap<String, u32>,
    /// The number of POSTs so far.
    count: usize,
    /// The number of POSTs in flight, and the most so far.
    in_flight: usize,
    most: usize,
    keeps_posts: bool,
    delay: Duration,
    judge: Judge,
    /// It answers no POST any more: the server takes a moment to end.
    is_stopped: bool,
}

/// A running API; dropping it stops it.
pub struct Api {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    server: Option<ServerHandle>,
}

impl Api {
    /// Answers 200 until `behave` says otherwise.
    pub fn start() -> Self {
        let state = State {
            posts: Vec::new(),
            taken: HashMap::new(),
            count: 0,
            in_flight: 0,
            most: 0,
            keeps_posts: true,
            delay: Duration::ZERO,
            judge: Box::new(|_, _| Conduct::Answer(200)),
            is_stopped: false,
        };
        let state = Arc::new(Mutex::new(state));
        // A port that the system hands out could be another test's while this API is stopped.
        let listener = TcpListener::bind(("127.0.0.1", free_port())).expect("a free port");
        let address = listener.local_addr().expect("a bound socket");
        let server = Some(serve(listener, Arc::clone(&state)));
        Self {
            address,
            state,
            server,
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// From now on, `judge` decides by the number of the POST, from 0, and the POST.
    pub fn behave(&self, judge: impl Fn(usize, &Post) -> Conduct + Send + 'static) {
        self.state().judge = Box::new(judge);
    }

    /// Waits this long before each answer.
    pub fn delay(&self, delay: Duration) {
        self.state().delay = delay;
    }

    pub fn posts(&self) -> Vec<Post> {
        self.state().posts.clone()
    }

    pub fn count(&self) -> usize {
        self.state().count
    }

    /// The most POSTs that were in flight at the same time.
    pub fn most_at_a_time(&self) -> usize {
        self.state().most
    }

    /// From now on keeps only the keys of POSTs, for a long load.
    pub fn keep_keys_only(&self) {
        self.state().keeps_posts = false;
    }

    /// The number of 2xx answers per record.
    pub fn taken(&self) -> HashMap<String, u32> {
        self.state().taken.clone()
    }

    /// The `keys` that never got a 2xx.
    pub fn misses<'k>(&self, keys: impl Iterator<Item = &'k String>) -> Vec<&'k String> {
        let state = self.state();
        keys.filter(|key| !state.taken.contains_key(*key)).collect()
    }

    /// Waits until `count` POSTs have come.
    pub async fn wait_for(&self, count: usize, patience: Duration) {
        super::eventually(&format!("{count} POSTs"), patience, async || {
            (self.count() >= count).then_some(())
        })
        .await;
    }

    /// Refuses connections from now on.
    pub async fn stop(&mut self) {
        self.state().is_stopped = true;
        if let Some(server) = self.server.take() {
            server.stop(false).await;
        }
    }

    /// Serves again on the same port.
    pub fn start_again(&mut self) {
        let listener = TcpListener::bind(self.address).expect("the port is still free");
        self.state().is_stopped = false;
        self.server = Some(serve(listener, Arc::clone(&self.state)));
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            // `stop` gives the order at once; its future only waits for the end.
            drop(server.stop(false));
        }
    }
}

/// Serves on its own thread, so that the API answers while the test's thread is busy.
fn serve(listener: TcpListener, state: Arc<Mutex<State>>) -> ServerHandle {
    let (started, handle) = mpsc::channel();
    thread::spawn(move || {
        actix_rt::System::new().block_on(async move {
            let server = HttpServer::new(move || {
                let state = Arc::clone(&state);
                App::new()
                    .app_data(web::PayloadConfig::new(16 << 20))
                    .default_service(web::to(move |request: HttpRequest, body: web::Bytes| {
                        answer(Arc::clone(&state), request, body)
                    }))
            });
            let server = server
                .workers(1)
                .disable_signals()
                .listen(listener)
                .expect("a bound socket")
                .run();
            started.send(server.handle()).expect("the test waits");
            server.await.expect("the API runs to its end");
        });
    });
    handle.recv().expect("the API starts")
}

/// A POST in flight.
struct PostInFlight(Arc<Mutex<State>>);

impl Drop for PostInFlight {
    fn drop(&mut self) {
        lock(&self.0).in_flight -= 1;
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state
        .lock()
        .expect("no test panics while it holds the state")
}

impl Post {
    fn new(request: &HttpRequest, body: web::Bytes) -> Self {
        let header = |name: &str| {
            let value = request.headers().get(name)?;
            Some(value.to_str().expect("visible ASCII").to_owned())
        };
        Self {
            key: header("Idempotency-Key"),
            path: request.path().to_owned(),
            content_type: header("Content-Type"),
            encoding: header("Content-Encoding"),
            traceparent: header("traceparent"),
            tracestate: header("tracestate"),
            authorization: header("Authorization"),
            webhook: ["id", "timestamp", "signature"]
                .map(|part| header(&format!("webhook-{part}"))),
            event: event(request),
            body,
            peer: request.peer_addr(),
        }
    }
}

fn event(request: &HttpRequest) -> BTreeMap<String, String> {
    let headers = request.headers().iter();
    let attributes = headers.filter(|(name, _)| name.as_str().starts_with("ce-"));
    let text = |value: &header::HeaderValue| value.to_str().expect("visible ASCII").to_owned();
    attributes
        .map(|(name, value)| (name.to_string(), text(value)))
        .collect()
}

impl State {
    /// Counts a POST and decides its answer.
    fn judge(&mut self, post: Post) -> Conduct {
        let conduct = (self.judge)(self.count, &post);
        self.count += 1;
        let is_taken = match &conduct {
            Conduct::Answer(status) | Conduct::AnswerWith { status, .. } => {
                (200..300).contains(status)
            }
            Conduct::Hang | Conduct::CutAnswer => false,
        };
        if let Some(key) = post.key.clone().filter(|_| is_taken) {
            *self.taken.entry(key).or_default() += 1;
        }
        if self.keeps_posts {
            self.posts.push(post);
        }
        conduct
    }
}

impl PostInFlight {
    fn begin(state: Arc<Mutex<State>>) -> Self {
        {
            let mut counts = lock(&state);
            counts.in_flight += 1;
            counts.most = counts.most.max(counts.in_flight);
        }
        Self(state)
    }
}

async fn answer(state: Arc<Mutex<State>>, request: HttpRequest, body: web::Bytes) -> HttpResponse {
    if lock(&state).is_stopped {
        std::future::pending::<()>().await;
    }
    let in_flight = PostInFlight::begin(state);
    let post = Post::new(&request, body);
    let (conduct, delay) = {
        let mut state = lock(&in_flight.0);
        (state.judge(post), state.delay)
    };
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
    match conduct {
        Conduct::Answer(status) => response(status).finish(),
        Conduct::AnswerWith {
            status,
            headers,
            body,
        } => {
            let mut response = response(status);
            for header in headers {
                response.append_header(header);
            }
            response.body(body)
        }
        Conduct::Hang => std::future::pending().await,
        Conduct::CutAnswer => {
            let half = stream::iter([
                Ok(web::Bytes::from_static(b"half")),
                Err(std::io::Error::other("cut")),
            ]);
            HttpResponse::Ok().no_chunking(8).streaming(half)
        }
    }
}

fn response(status: u16) -> HttpResponseBuilder {
    HttpResponse::build(StatusCode::from_u16(status).expect("a status"))
}
