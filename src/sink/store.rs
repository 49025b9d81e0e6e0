//! The database of a sink and its thread.

use std::{collections::BTreeMap, path::PathBuf, sync::mpsc, time::Duration};

use parking_lot::Mutex;
use rusqlite::{Connection, params};
use serde::Serialize;
use serde_json::value::RawValue;
use tokio::sync::oneshot;

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
        let (path, records, redeliveries): (String, u64, u64) =
            (row.get(0)?, row.get(1)?, row.get(2)?);
        stats.records += records;
        stats.redeliveries += redeliveries;
        stats.paths.insert(path, records);
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
        let committed = commit(&mut database, &batch).map_err(|why| why.to_string());
        if let Ok(news) = &committed {
            let records = batch.iter().flat_map(|(records, _)| records);
            let mut stats = stats.lock();
            for (record, is_new) in records.zip(news.iter().flatten()) {
                if *is_new {
                    stats.records += 1;
                    *stats.paths.entry(record.path.clone()).or_default() += 1;
                } else {
                    stats.redeliveries += 1;
                }
            }
        }
        for (at, (_, answer)) in batch.into_iter().enumerate() {
            let count = |news: &Vec<Vec<bool>>| news[at].iter().filter(|is_new| **is_new).count();
            drop(answer.send(committed.as_ref().map(count).map_err(Clone::clone)));
        }
    }
}

/// Stores the records of a batch of requests. Tells of each record of each request whether it is
/// new.
fn commit<A>(
    database: &mut Connection,
    batch: &[(Vec<NewRecord>, A)],
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
        for (records, _) in batch {
            let mut new = Vec::with_capacity(records.len());
            for NewRecord { id, path, record } in records {
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
fn newest(database: &Connection, limit: usize) -> rusqlite::Result<Vec<StoredRecord>> {
    let mut rows = database.prepare_cached(
        "SELECT id, record, redeliveries, at_ms FROM records ORDER BY seq DESC LIMIT ?1",
    )?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let records = rows.query_map([limit], |row| {
        let record: String = row.get(1)?;
        let record = RawValue::from_string(record).map_err(|why| {
            rusqlite::Error::FromSqlConversionFailure(1, rusqlite::types::Type::Text, Box::new(why))
        })?;
        Ok(StoredRecord {
            id: row.get(0)?,
            record,
            redeliveries: row.get(2)?,
            at_ms: row.get(3)?,
        })
    })?;
    records.collect()
}
