//! The reference API: stores each record once by its `Idempotency-Key`, and counts redeliveries.
//!
//! One thread owns the database. It commits all requests that wait in one transaction, and answers
//! them after the commit.

mod store;

use std::{
    io,
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use actix_web::{HttpRequest, HttpResponse, dev::ServerHandle, http::StatusCode, web};
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use serde_json::{json, value::RawValue};
use tokio::sync::oneshot;
use tracing_mutex::parkinglot::Mutex;

use self::store::{NewRecord, SinkAnswer, SinkRequest};
pub use self::store::{Stats, StoredRecord};
use crate::http::{
    self, ServerLimits,
    early_ends::EarlyEnds,
    problem::{Problem, ProblemKind},
};

/// How long requests in flight may take when the sink stops.
const DRAIN: Duration = Duration::from_secs(1);
/// The most bytes of one request.
const BODY_MAX: usize = 16 << 20;
/// Requests that may wait for the database; further ones are answered 503.
const QUEUE: usize = 4096;
/// The records in an answer to `GET /records` without a limit.
const LIST_DEFAULT: usize = 100;
/// The highest limit of `GET /records`.
const LIST_MAX: usize = 10_000;

/// A running sink.
pub struct Sink {
    address: SocketAddr,
    /// `None` while it is away.
    server: Option<ServerHandle>,
    state: web::Data<SinkState>,
}

impl Sink {
    /// Serves on `listener`, and stores the records in the file `db` or in memory.
    ///
    /// # Errors
    /// If the database cannot be opened, or the server cannot be started.
    pub fn start(listener: TcpListener, db: Option<PathBuf>) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let database = store::open(db).map_err(io::Error::other)?;
        let counts = store::read_stats(&database).map_err(io::Error::other)?;
        let counts = Arc::new(Mutex::new(counts));
        let (requests, inbox) = mpsc::sync_channel(QUEUE);
        let state = web::Data::new(SinkState {
            requests,
            stats: Arc::clone(&counts),
        });
        thread::Builder::new()
            .name("sink-db".into())
            .spawn(move || store::serve(database, &inbox, &counts))?;
        let server = serve(listener, &state)?;
        Ok(Self {
            address,
            server: Some(server),
            state,
        })
    }

    /// Closes its connections and takes no others, as if its machine had failed. The records stay.
    pub async fn go_away(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop(false).await;
        }
    }

    /// Serves the same address again.
    ///
    /// # Errors
    /// If the address is taken by now.
    pub fn come_back(&mut self) -> io::Result<()> {
        let listener = TcpListener::bind(self.address)?;
        self.server = Some(serve(listener, &self.state)?);
        Ok(())
    }

    /// The address that it serves.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn stats(&self) -> Stats {
        self.state.stats.lock().clone()
    }

    /// The newest records, newest first.
    ///
    /// # Errors
    /// If the database is busy or fails.
    pub async fn records(&self, limit: usize) -> Result<Vec<StoredRecord>, Problem> {
        self.state
            .ask(|answer| SinkRequest::List(limit, answer))
            .await
    }

    /// Answers the requests in flight, then ends.
    pub async fn stop(self) {
        if let Some(server) = self.server {
            server.stop(true).await;
        }
    }
}

fn serve(listener: TcpListener, state: &web::Data<SinkState>) -> io::Result<ServerHandle> {
    let state = state.clone();
    let limits = ServerLimits::of_one_thread(DRAIN);
    http::serve(listener, limits, None, &EarlyEnds::default(), move |app| {
        app.app_data(state.clone())
            .app_data(web::PayloadConfig::new(BODY_MAX))
            .configure(routes);
    })
}

/// The state that the handlers share.
struct SinkState {
    /// To the database's thread.
    requests: mpsc::SyncSender<SinkRequest>,
    stats: Arc<Mutex<Stats>>,
}

fn routes(app: &mut web::ServiceConfig) {
    // Every path takes records, since the URL of an API may have any path.
    let records = |path: &str, allowed: &'static str| {
        let not_allowed =
            web::to(async move || Err::<HttpResponse, _>(Problem::method_not_allowed(allowed)));
        web::resource(path)
            .route(web::post().to(receive))
            .default_service(not_allowed)
    };
    app.service(
        records("/healthz", "GET, POST")
            .route(web::get().to(async || HttpResponse::Ok().body("ok\n"))),
    )
    .service(records("/stats", "GET, POST").route(web::get().to(stats)))
    .service(records("/records", "GET, POST").route(web::get().to(list)))
    .service(records("/{any:.*}", "POST"));
}

async fn receive(
    state: web::Data<SinkState>,
    request: HttpRequest,
    body: Result<web::Bytes, actix_web::Error>,
) -> Result<HttpResponse, Problem> {
    let body = body.map_err(|why| {
        let status = why.as_response_error().status_code();
        Problem::new(status, ProblemKind::Body, why.to_string())
    })?;
    let key = request.headers().get("Idempotency-Key");
    let key = key
        .and_then(|key| key.to_str().ok())
        .filter(|key| !key.is_empty());
    let key = key.ok_or_else(|| {
        let detail = "A record needs an Idempotency-Key of visible ASCII characters";
        Problem::bad_request(ProblemKind::IdempotencyKey, detail)
    })?;
    let records =
        records(key, &body).map_err(|why| Problem::bad_request(ProblemKind::Json, why))?;
    let count = records.len();
    let new = state
        .ask(|answer| SinkRequest::Store(records, answer))
        .await?;
    let status = if new > 0 {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    Ok(HttpResponse::build(status).json(json!({"stored": new, "redelivered": count - new})))
}

async fn stats(state: web::Data<SinkState>) -> HttpResponse {
    HttpResponse::Ok().json(&*state.stats.lock())
}

async fn list(
    state: web::Data<SinkState>,
    query: Result<web::Query<Limit>, actix_web::Error>,
) -> Result<HttpResponse, Problem> {
    let query = query.map_err(|why| Problem::bad_request(ProblemKind::Query, why.to_string()))?;
    let limit = query.limit.unwrap_or(LIST_DEFAULT).min(LIST_MAX);
    let records = state.ask(|answer| SinkRequest::List(limit, answer)).await?;
    Ok(HttpResponse::Ok().json(records))
}

#[derive(Deserialize)]
struct Limit {
    limit: Option<usize>,
}

impl SinkState {
    /// Waits for the database's answer to a request.
    async fn ask<T>(
        &self,
        request: impl FnOnce(SinkAnswer<T>) -> SinkRequest,
    ) -> Result<T, Problem> {
        let unavailable = |why: &str| Problem::unavailable(ProblemKind::Database, why);
        let (answer, answered) = oneshot::channel();
        self.requests
            .try_send(request(answer))
            .map_err(|_| unavailable("The database has too much to do"))?;
        answered
            .await
            .map_err(|_| unavailable("The database has ended"))?
            .map_err(|why| unavailable(&why))
    }
}

/// The records of a body. An object is stored under `key`. An array's records have a key each:
/// `key` lists as many, as in Waypost's batches, or they are stored under `key/<index>`.
fn records(key: &str, body: &[u8]) -> Result<Vec<NewRecord>, String> {
    #[derive(Deserialize)]
    struct Tagged {
        #[serde(default)]
        path: String,
    }
    let read = |id: String, record: &RawValue| {
        // A derived reader takes an array as the fields of a struct.
        if !record.get().starts_with('{') {
            return Err("a record is a JSON object".to_owned());
        }
        let Tagged { path } = serde_json::from_str(record.get()).map_err(|why| why.to_string())?;
        Ok(NewRecord {
            id,
            path,
            record: record.get().to_owned(),
        })
    };
    let whole: &RawValue = serde_json::from_slice(body).map_err(|why| why.to_string())?;
    if !whole.get().starts_with('[') {
        return Ok(vec![read(key.to_owned(), whole)?]);
    }
    let records: Vec<&RawValue> =
        serde_json::from_str(whole.get()).map_err(|why| why.to_string())?;
    let keys: Vec<_> = key
        .split(',')
        .map(|key| percent_decode_str(key.trim()).decode_utf8_lossy())
        .collect();
    let has_own = keys.len() == records.len();
    let records = records.into_iter().enumerate();
    records
        .map(|(at, record)| {
            let own = has_own.then(|| keys[at].to_string());
            read(own.unwrap_or_else(|| format!("{key}/{at}")), record)
        })
        .collect()
}
