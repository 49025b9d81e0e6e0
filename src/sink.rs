//! The reference API: keeps each record once by its `Idempotency-Key`, and counts the redeliveries.
//!
//! A thread of its own owns the database and commits what has come in meanwhile at once, so that many records share one
//! transaction. An answer leaves only after the commit.

use std::{
    collections::BTreeMap,
    io,
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::Duration,
};

use actix_web::{
    App, HttpRequest, HttpResponse, HttpServer, dev::ServerHandle, http::StatusCode, web,
};
use percent_encoding::percent_decode_str;
use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};
use serde_json::{json, value::RawValue};
use tokio::sync::oneshot;
use tracing::error;

use crate::{clock::unix_us, http::problem::Problem};

/// Bytes of one request.
const BODY_MAX: usize = 16 << 20;
/// Requests that wait for the database; more wait in their connections.
const QUEUE: usize = 4096;
/// Records in one transaction.
const COMMIT_MAX: usize = 1024;
/// Records that one `GET /records` lists, unless it asks for fewer.
const LIST_DEFAULT: usize = 100;
const LIST_MAX: usize = 10_000;

/// A running sink.
pub struct Sink {
    address: SocketAddr,
    server: ServerHandle,
    stats: Arc<Mutex<Stats>>,
}

/// What a sink has got.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Different records.
    pub records: u64,
    /// Records that came again.
    pub redeliveries: u64,
    /// Different records by their `path`.
    pub paths: BTreeMap<String, u64>,
}

impl Sink {
    /// Serves on `listener`; keeps its records in the file `db`, or in memory.
    ///
    /// # Errors
    /// When the database cannot be opened or the server cannot be started.
    pub fn start(listener: TcpListener, db: Option<PathBuf>) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let database = open(db).map_err(io::Error::other)?;
        let stats = Arc::new(Mutex::new(read_stats(&database).map_err(io::Error::other)?));
        let (orders, inbox) = mpsc::sync_channel(QUEUE);
        let kept = Arc::clone(&stats);
        thread::Builder::new()
            .name("sink-db".into())
            .spawn(move || serve(database, &inbox, &kept))?;
        let desk = web::Data::new(Desk {
            orders,
            stats: Arc::clone(&stats),
        });
        let server = HttpServer::new(move || {
            App::new()
                .app_data(desk.clone())
                .app_data(web::PayloadConfig::new(BODY_MAX))
                .configure(routes)
        });
        let server = server
            .workers(1)
            .shutdown_timeout(1)
            .disable_signals()
            .listen(listener)?
            .run();
        let handle = server.handle();
        actix_rt::spawn(async move {
            if let Err(failure) = server.await {
                error!(%failure, "sink ended");
            }
        });
        Ok(Self {
            address,
            server: handle,
            stats,
        })
    }

    /// Where it serves.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    #[must_use]
    pub fn stats(&self) -> Stats {
        self.stats
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Answers what is under way, and ends.
    pub async fn stop(self) {
        self.server.stop(true).await;
    }
}

/// What the handlers need.
struct Desk {
    orders: mpsc::SyncSender<Order>,
    stats: Arc<Mutex<Stats>>,
}

/// Work for the database's thread.
enum Order {
    /// The answer is how many of them are new.
    Store(Vec<Item>, oneshot::Sender<Result<usize, String>>),
    List(usize, oneshot::Sender<Result<Vec<Listed>, String>>),
}

struct Item {
    id: String,
    path: String,
    record: String,
}

/// One row of `GET /records`.
#[derive(Serialize)]
struct Listed {
    id: String,
    record: Box<RawValue>,
    redeliveries: u64,
    /// Milliseconds since the Unix epoch.
    at_ms: i64,
}

fn routes(app: &mut web::ServiceConfig) {
    // Every path takes records, those that also answer questions included: the URL of an API may have any path.
    let records = |path: &str, allowed: &'static str| {
        let elsewise =
            web::to(async move || Err::<HttpResponse, _>(Problem::method_not_allowed(allowed)));
        web::resource(path)
            .route(web::post().to(take))
            .default_service(elsewise)
    };
    app.service(
        records("/healthz", "GET, POST")
            .route(web::get().to(async || HttpResponse::Ok().body("ok\n"))),
    )
    .service(records("/stats", "GET, POST").route(web::get().to(stats)))
    .service(records("/records", "GET, POST").route(web::get().to(list)))
    .service(records("/{any:.*}", "POST"));
}

async fn take(
    desk: web::Data<Desk>,
    request: HttpRequest,
    body: Result<web::Bytes, actix_web::Error>,
) -> Result<HttpResponse, Problem> {
    let bad = |kind, detail: &str| Problem::new(StatusCode::BAD_REQUEST, kind, detail);
    let body = body.map_err(|why| {
        Problem::new(
            why.as_response_error().status_code(),
            "body",
            why.to_string(),
        )
    })?;
    let key = request
        .headers()
        .get("Idempotency-Key")
        .and_then(|key| key.to_str().ok());
    let key = key.filter(|key| !key.is_empty()).ok_or_else(|| {
        bad(
            "idempotency-key",
            "A record needs an Idempotency-Key of visible ASCII characters",
        )
    })?;
    let items = items(key, &body).map_err(|why| bad("json", &why))?;
    let count = items.len();
    let (answer, stored) = oneshot::channel();
    let new = send(&desk, Order::Store(items, answer), stored).await?;
    let status = if new > 0 {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    Ok(HttpResponse::build(status).json(json!({"stored": new, "redelivered": count - new})))
}

async fn stats(desk: web::Data<Desk>) -> HttpResponse {
    HttpResponse::Ok().json(&*desk.stats.lock().unwrap_or_else(PoisonError::into_inner))
}

async fn list(
    desk: web::Data<Desk>,
    query: Result<web::Query<Limit>, actix_web::Error>,
) -> Result<HttpResponse, Problem> {
    let query =
        query.map_err(|why| Problem::new(StatusCode::BAD_REQUEST, "query", why.to_string()))?;
    let limit = query.limit.unwrap_or(LIST_DEFAULT).min(LIST_MAX);
    let (answer, listed) = oneshot::channel();
    Ok(HttpResponse::Ok().json(send(&desk, Order::List(limit, answer), listed).await?))
}

#[derive(Deserialize)]
struct Limit {
    limit: Option<usize>,
}

async fn send<T>(
    desk: &Desk,
    order: Order,
    answer: oneshot::Receiver<Result<T, String>>,
) -> Result<T, Problem> {
    let problem =
        |why: &str| Problem::new(StatusCode::SERVICE_UNAVAILABLE, "database", why).retry_after(1);
    desk.orders
        .try_send(order)
        .map_err(|_| problem("The database has too much to do"))?;
    answer
        .await
        .map_err(|_| problem("The database has ended"))?
        .map_err(|why| problem(&why))
}

/// The records of a body: one object under `key`, or each of an array's under its own of the keys that `key` lists, as
/// Waypost's batches have them, or else under `key/<index>`.
fn items(key: &str, body: &[u8]) -> Result<Vec<Item>, String> {
    #[derive(Deserialize)]
    struct Tagged {
        #[serde(default)]
        path: String,
    }
    let item = |id: String, record: &RawValue| {
        // A derived reader would take an array for the fields of a struct.
        if !record.get().starts_with('{') {
            return Err("a record is a JSON object".to_owned());
        }
        let Tagged { path } = serde_json::from_str(record.get()).map_err(|why| why.to_string())?;
        Ok(Item {
            id,
            path,
            record: record.get().to_owned(),
        })
    };
    let whole: &RawValue = serde_json::from_slice(body).map_err(|why| why.to_string())?;
    if !whole.get().starts_with('[') {
        return Ok(vec![item(key.to_owned(), whole)?]);
    }
    let records: Vec<&RawValue> =
        serde_json::from_str(whole.get()).map_err(|why| why.to_string())?;
    let keys: Vec<_> = key
        .split(',')
        .map(|key| percent_decode_str(key.trim()).decode_utf8_lossy())
        .collect();
    let has_own = keys.len() == records.len();
    let id = |at: usize| {
        if has_own {
            keys[at].to_string()
        } else {
            format!("{key}/{at}")
        }
    };
    records
        .into_iter()
        .enumerate()
        .map(|(at, record)| item(id(at), record))
        .collect()
}

fn open(db: Option<PathBuf>) -> rusqlite::Result<Connection> {
    let database = match db {
        Some(file) => Connection::open(file)?,
        None => Connection::open_in_memory()?,
    };
    database.busy_timeout(Duration::from_secs(5))?;
    database.pragma_update(None, "journal_mode", "WAL")?;
    // A commit is on disk before its answer leaves.
    database.pragma_update(None, "synchronous", "FULL")?;
    database.execute_batch(
        "CREATE TABLE IF NOT EXISTS records (
           seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, path TEXT NOT NULL, record TEXT NOT NULL,
           redeliveries INTEGER NOT NULL DEFAULT 0, at_ms INTEGER NOT NULL)",
    )?;
    Ok(database)
}

fn read_stats(database: &Connection) -> rusqlite::Result<Stats> {
    let mut stats = Stats::default();
    let mut rows =
        database.prepare("SELECT path, COUNT(*), SUM(redeliveries) FROM records GROUP BY path")?;
    let mut rows = rows.query([])?;
    while let Some(row) = rows.next()? {
        let (path, records, redeliveries): (String, u64, u64) =
            (row.get(0)?, row.get(1)?, row.get(2)?);
        stats.records += records;
        stats.redeliveries += redeliveries;
        stats.paths.insert(path, records);
    }
    Ok(stats)
}

/// The database's thread. Ends when the last handler has.
fn serve(mut database: Connection, inbox: &mpsc::Receiver<Order>, stats: &Mutex<Stats>) {
    while let Ok(first) = inbox.recv() {
        let mut batch = Vec::new();
        let mut size = 0;
        let mut next = Some(first);
        while let Some(order) = next {
            match order {
                Order::Store(items, answer) => {
                    size += items.len();
                    batch.push((items, answer));
                }
                // A client that has hung up needs no answer.
                Order::List(limit, answer) => {
                    drop(answer.send(listed(&database, limit).map_err(|why| why.to_string())));
                }
            }
            next = (size < COMMIT_MAX).then(|| inbox.try_recv().ok()).flatten();
        }
        let news = commit(&mut database, &batch);
        if let Ok(news) = &news {
            let mut stats = stats.lock().unwrap_or_else(PoisonError::into_inner);
            for (item, new) in batch
                .iter()
                .flat_map(|(items, _)| items)
                .zip(news.iter().flatten())
            {
                if *new {
                    stats.records += 1;
                    *stats.paths.entry(item.path.clone()).or_default() += 1;
                } else {
                    stats.redeliveries += 1;
                }
            }
        }
        for (at, (_, answer)) in batch.into_iter().enumerate() {
            let result = match &news {
                Ok(news) => Ok(news[at].iter().filter(|new| **new).count()),
                Err(why) => Err(why.to_string()),
            };
            drop(answer.send(result));
        }
    }
}

/// Whether each record of each request was new.
fn commit<A>(
    database: &mut Connection,
    batch: &[(Vec<Item>, A)],
) -> rusqlite::Result<Vec<Vec<bool>>> {
    let transaction = database.transaction()?;
    let mut news = Vec::with_capacity(batch.len());
    {
        let mut insert = transaction.prepare_cached(
            "INSERT OR IGNORE INTO records (id, path, record, at_ms) VALUES (?1, ?2, ?3, ?4)",
        )?;
        let mut again = transaction
            .prepare_cached("UPDATE records SET redeliveries = redeliveries + 1 WHERE id = ?1")?;
        let now = i64::try_from(unix_us() / 1000).unwrap_or(i64::MAX);
        for (items, _) in batch {
            let mut new = Vec::with_capacity(items.len());
            for Item { id, path, record } in items {
                new.push(insert.execute(params![id, path, record, now])? == 1);
                if new.last() == Some(&false) {
                    again.execute(params![id])?;
                }
            }
            news.push(new);
        }
    }
    transaction.commit()?;
    Ok(news)
}

/// The newest records, newest first.
fn listed(database: &Connection, limit: usize) -> rusqlite::Result<Vec<Listed>> {
    let mut rows = database.prepare_cached(
        "SELECT id, record, redeliveries, at_ms FROM records ORDER BY seq DESC LIMIT ?1",
    )?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let listed = rows.query_map([limit], |row| {
        let record: String = row.get(1)?;
        let record = RawValue::from_string(record).map_err(|why| {
            rusqlite::Error::FromSqlConversionFailure(1, rusqlite::types::Type::Text, Box::new(why))
        })?;
        Ok(Listed {
            id: row.get(0)?,
            record,
            redeliveries: row.get(2)?,
            at_ms: row.get(3)?,
        })
    })?;
    listed.collect()
}
