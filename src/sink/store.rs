//! The database of a sink and its thread.

use std::{collections::BTreeMap, path::PathBuf, sync::mpsc, time::Duration};

use rusqlite::{Connection, params, types::FromSqlError};
use serde::Serialize;
use serde_json::value::RawValue;
use tokio::sync::oneshot;
use tracing_mutex::parkinglot::Mutex;

use crate::clock::unix_us;

/// A transaction takes no further request once it has this many records.
const COMMIT_MAX: usize = 1024;

/// The counts of a sink.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Records that are stored.
    pub records: u64,
    /// Records that came again under the same key.
    pub redeliveries: u64,
    /// Stored records by their `path`.
    pub paths: BTreeMap<String, u64>,
}

pub type SinkAnswer<T> = oneshot::Sender<Result<T, String>>;

/// A request to the database's thread.
pub enum SinkRequest {
    /// Answered with the number of new records.
    Store(Vec<NewRecord>, SinkAnswer<usize>),
    /// Answered with this many of the newest records.
    List(usize, SinkAnswer<Vec<StoredRecord>>),
}

pub struct NewRecord {
    pub id: String,
    pub path: String,
    pub record: String,
}

/// One row of `GET /records`.
#[derive(Debug, Serialize)]
pub struct StoredRecord {
    /// The record's `Idempotency-Key`.
    pub id: String,
    /// The bytes as they were received.
    pub record: Box<RawValue>,
    redeliveries: u64,
    /// Milliseconds since the Unix epoch.
    at_ms: i64,
}

pub fn open(db: Option<PathBuf>) -> rusqlite::Result<Connection> {
    let database = match db {
        Some(file) => Connection::open(file)?,
        None => Connection::open_in_memory()?,
    };
    database.busy_timeout(Duration::from_secs(5))?;
    database.pragma_update(None, "journal_mode", "WAL")?;
    // A commit is on disk before its answer is sent.
    database.pragma_update(None, "synchronous", "FULL")?;
    database.execute_batch(
        "CREATE TABLE IF NOT EXISTS records (
           seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, path TEXT NOT NULL, record TEXT NOT NULL,
           redeliveries INTEGER NOT NULL DEFAULT 0, at_ms INTEGER NOT NULL)",
    )?;
    Ok(database)
}

pub fn read_stats(database: &Connection) -> rusqlite::Result<Stats> {
    let mut stats = Stats::default();
    let mut rows =
        database.prepare("SELECT path, COUNT(*), SUM(redeliveries) FROM records GROUP BY path")?;
    let mut rows = rows.query([])?;
    while let Some(row) = rows.next()? {
        let records: u64 = row.get(1)?;
        stats.records += records;
        stats.redeliveries += row.get::<_, u64>(2)?;
        stats.paths.insert(row.get(0)?, records);
    }
    Ok(stats)
}

/// The database's thread. It ends when the last handler has.
pub fn serve(mut database: Connection, inbox: &mpsc::Receiver<SinkRequest>, stats: &Mutex<Stats>) {
    while let Ok(first) = inbox.recv() {
        let mut batch = Vec::new();
        let mut size = 0;
        let mut next = Some(first);
        while let Some(request) = next {
            match request {
                SinkRequest::Store(records, answer) => {
                    size += records.len();
                    batch.push((records, answer));
                }
                SinkRequest::List(limit, answer) => {
                    let listed = newest(&database, limit).map_err(|why| why.to_string());
                    // A client that has hung up needs no answer.
                    drop(answer.send(listed));
                }
            }
            next = (size < COMMIT_MAX).then(|| inbox.try_recv().ok()).flatten();
        }
        // The counts change with the commit, or not at all.
        let mut counted = stats.lock().clone();
        let committed = commit(&mut database, &batch, &mut counted);
        let committed = committed.map_err(|why| why.to_string());
        if committed.is_ok() {
            *stats.lock() = counted;
        }
        for (at, (_, answer)) in batch.into_iter().enumerate() {
            drop(answer.send(committed.as_ref().map(|new| new[at]).map_err(Clone::clone)));
        }
    }
}

/// Stores the records of a batch of requests, and counts them. Returns how many records of each
/// request are new.
fn commit<A>(
    database: &mut Connection,
    batch: &[(Vec<NewRecord>, A)],
    stats: &mut Stats,
) -> rusqlite::Result<Vec<usize>> {
    let transaction = database.transaction()?;
    let mut store = transaction.prepare_cached(
        "INSERT INTO records (id, path, record, at_ms) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (id) DO UPDATE SET redeliveries = redeliveries + 1 RETURNING redeliveries",
    )?;
    let now = i64::try_from(unix_us() / 1000).unwrap_or(i64::MAX);
    let mut new = vec![0; batch.len()];
    for ((records, _), new) in batch.iter().zip(&mut new) {
        for NewRecord { id, path, record } in records {
            let redeliveries: u64 =
                store.query_row(params![id, path, record, now], |row| row.get(0))?;
            if redeliveries == 0 {
                *new += 1;
                stats.records += 1;
                *stats.paths.entry(path.clone()).or_default() += 1;
            } else {
                stats.redeliveries += 1;
            }
        }
    }
    drop(store);
    transaction.commit()?;
    Ok(new)
}

/// The newest records, newest first.
fn newest(database: &Connection, limit: usize) -> rusqlite::Result<Vec<StoredRecord>> {
    let mut rows = database.prepare_cached(
        "SELECT id, record, redeliveries, at_ms FROM records ORDER BY seq DESC LIMIT ?1",
    )?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let records = rows.query_map([limit], |row| {
        let record = RawValue::from_string(row.get(1)?);
        Ok(StoredRecord {
            id: row.get(0)?,
            record: record.map_err(FromSqlError::other)?,
            redeliveries: row.get(2)?,
            at_ms: row.get(3)?,
        })
    })?;
    records.collect()
}
