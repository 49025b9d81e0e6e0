use futures_util::FutureExt as _;
use tempfile::TempDir;

use super::*;
use crate::lane_id::LaneId;

const NATS: Receipt = Receipt::Lane(LaneId::Nats);
const WINDOW: Duration = Duration::from_mins(10);

fn record(key: &str, body: &'static str) -> Record {
    Record {
        id: key.into(),
        body: body.into(),
        trace: None,
        origin: None,
        api: None,
        event: None,
    }
}

async fn first(store: &IdempotencyStore, key: &str) -> Reservation {
    match store.claim(&record(key, "{}")).await {
        Claim::New(reservation) => reservation,
        Claim::Duplicate(receipt) => panic!("duplicate: {receipt:?}"),
        Claim::Reused => panic!("reused"),
    }
}

async fn duplicate(store: &IdempotencyStore, key: &str) -> Receipt {
    match store.claim(&record(key, "{}")).await {
        Claim::New(_) => panic!("new"),
        Claim::Duplicate(receipt) => receipt,
        Claim::Reused => panic!("reused"),
    }
}

async fn is_reused(store: &IdempotencyStore, key: &str) -> bool {
    let other = record(key, r#"{"other":1}"#);
    matches!(store.claim(&other).await, Claim::Reused)
}

#[tokio::test]
async fn a_key_that_comes_again_gets_its_first_receipt_also_after_a_restart() {
    let folder = TempDir::new().unwrap();
    let store = IdempotencyStore::open(folder.path(), WINDOW).unwrap();
    first(&store, "a").await.complete(NATS).await;
    first(&store, "b").await.complete(Receipt::Spool).await;
    assert_eq!(duplicate(&store, "a").await, NATS);
    for _ in 0..3 {
        // As after a kill: nothing is closed.
        let store = IdempotencyStore::open(folder.path(), WINDOW).unwrap();
        assert_eq!(
            (duplicate(&store, "a").await, duplicate(&store, "b").await),
            (NATS, Receipt::Spool)
        );
    }
}

#[tokio::test]
async fn a_key_of_another_record_is_reused_under_way_and_later_and_after_a_restart() {
    let folder = TempDir::new().unwrap();
    let store = IdempotencyStore::open(folder.path(), WINDOW).unwrap();
    let one = first(&store, "a").await;
    // At once: the answer does not depend on the end of the other request.
    assert_eq!(is_reused(&store, "a").now_or_never(), Some(true));
    one.complete(NATS).await;
    assert!(is_reused(&store, "a").await);
    let store = IdempotencyStore::open(folder.path(), WINDOW).unwrap();
    assert!(is_reused(&store, "a").await);
    assert_eq!(duplicate(&store, "a").await, NATS);
}

#[tokio::test]
async fn a_key_that_was_not_taken_is_free_for_another_record() {
    let folder = TempDir::new().unwrap();
    let store = IdempotencyStore::open(folder.path(), WINDOW).unwrap();
    drop(first(&store, "a").await);
    assert!(!is_reused(&store, "a").await);
}

#[tokio::test]
async fn a_key_that_an_older_version_wrote_counts_as_new() {
    let folder = TempDir::new().unwrap();
    let mut bytes = Vec::new();
    let mut line = KeyLine::new("a", RecordDigest::of(b"{}"), NATS);
    line.digest.clear();
    append(&mut bytes, &line);
    fs::write(folder.path().join("keys.young"), &bytes).unwrap();
    let store = IdempotencyStore::open(folder.path(), WINDOW).unwrap();
    first(&store, "a").await.complete(NATS).await;
    assert!(is_reused(&store, "a").await);
}

#[test]
fn a_key_with_its_receipt_takes_no_more_than_forty_bytes() {
    assert_eq!(size_of::<(Fingerprint, CompletedKey)>(), 40);
}

#[tokio::test]
async fn a_key_whose_request_is_under_way_waits_for_its_end() {
    let folder = TempDir::new().unwrap();
    let store = IdempotencyStore::open(folder.path(), WINDOW).unwrap();
    let one = first(&store, "a").await;
    assert!(store.claim(&record("a", "{}")).now_or_never().is_none());
    let (again, ()) = tokio::join!(duplicate(&store, "a"), one.complete(NATS));
    assert_eq!(again, NATS);
}

#[tokio::test]
async fn a_key_whose_request_was_not_taken_is_free_again() {
    let folder = TempDir::new().unwrap();
    let store = IdempotencyStore::open(folder.path(), WINDOW).unwrap();
    let one = first(&store, "a").await;
    let (again, ()) = tokio::join!(first(&store, "a"), async { drop(one) });
    again.complete(NATS).await;
    assert_eq!(duplicate(&store, "a").await, NATS);
}

#[tokio::test]
async fn memory_is_bounded_and_the_last_keys_are_known() {
    let folder = TempDir::new().unwrap();
    let store = IdempotencyStore::open(folder.path(), WINDOW).unwrap();
    let all: Vec<_> = (0..2 * KEYS_MAX + 10).map(|key| key.to_string()).collect();
    for some in all.chunks(BATCH) {
        futures_util::future::join_all(
            some.iter()
                .map(async |key| first(&store, key).await.complete(NATS).await),
        )
        .await;
    }
    let known = {
        let table = store.table.lock();
        table.completed.len()
    };
    assert!(known <= 2 * KEYS_MAX + BATCH, "{known}");
    for known in [all.len() - 1, all.len() - KEYS_MAX] {
        assert_eq!(duplicate(&store, &all[known]).await, NATS);
    }
    first(&store, &all[0]).await;
}

#[test]
fn memory_is_bounded_though_the_thread_hangs() {
    let mut table = KeyTable::new(WINDOW);
    let completed = CompletedKey::new(RecordDigest::of(b"{}"), NATS, unix_us());
    let mut last = None;
    for key in 0..2 * YOUNG_MAX + 10 {
        let key = table.hasher.fingerprint(key);
        table.insert(key, completed);
        last = Some(key);
    }
    assert!(table.completed.len() <= 2 * YOUNG_MAX);
    assert!(last.is_some_and(|key| table.completed.get(&key).is_some()));
}

#[tokio::test]
async fn a_folder_that_takes_nothing_costs_no_start_and_no_key_that_is_there() {
    let folder = TempDir::new().unwrap();
    first(&IdempotencyStore::open(folder.path(), WINDOW).unwrap(), "a")
        .await
        .complete(NATS)
        .await;
    fs::rename(
        folder.path().join("keys.young"),
        folder.path().join("keys.old"),
    )
    .unwrap();
    // It can be neither read nor written.
    fs::create_dir(folder.path().join("keys.young")).unwrap();
    let store = IdempotencyStore::open(folder.path(), WINDOW).unwrap();
    assert_eq!(duplicate(&store, "a").await, NATS);
    first(&store, "b").await.complete(NATS).await;
    assert_eq!(duplicate(&store, "b").await, NATS);
}

#[tokio::test]
async fn what_is_too_old_does_not_pile_up_over_restarts() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("keys.young");
    let mut bytes = Vec::new();
    let mut line = KeyLine::new("old", RecordDigest::of(b"{}"), NATS);
    line.at_us = 1;
    append(&mut bytes, &line);
    fs::write(&file, &bytes).unwrap();
    let store = IdempotencyStore::open(folder.path(), WINDOW).unwrap();
    first(&store, "old").await;
    first(&store, "new").await.complete(NATS).await;
    let mut lines = Vec::new();
    read(&file, |line| lines.push(line.key)).unwrap();
    assert_eq!(lines, ["new"]);
}

#[tokio::test]
async fn a_key_is_free_when_its_window_is_over_here_and_after_a_restart() {
    let folder = TempDir::new().unwrap();
    let window = Duration::from_secs(1);
    let store = IdempotencyStore::open(folder.path(), window).unwrap();
    first(&store, "a").await.complete(NATS).await;
    let until_free = async {
        while !matches!(store.claim(&record("a", "{}")).await, Claim::New(_)) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(Duration::from_mins(1), until_free).await.unwrap();
    let store = IdempotencyStore::open(folder.path(), window).unwrap();
    first(&store, "a").await;
    // The file has it still: with a longer window, it is known.
    let store = IdempotencyStore::open(folder.path(), WINDOW).unwrap();
    assert_eq!(duplicate(&store, "a").await, NATS);
}

#[tokio::test]
async fn damage_costs_the_keys_that_it_hits() {
    let folder = TempDir::new().unwrap();
    let store = IdempotencyStore::open(folder.path(), WINDOW).unwrap();
    for key in ["a", "b", "c"] {
        first(&store, key).await.complete(NATS).await;
    }
    let file = folder.path().join("keys.young");
    let mut bytes = fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&file, bytes).unwrap();
    let store = IdempotencyStore::open(folder.path(), WINDOW).unwrap();
    assert_eq!(
        (duplicate(&store, "a").await, duplicate(&store, "c").await),
        (NATS, NATS)
    );
    first(&store, "b").await;

    // The last entry was half written when the process was killed; the next run goes on behind
    // it.
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 3]).unwrap();
    first(&IdempotencyStore::open(folder.path(), WINDOW).unwrap(), "d")
        .await
        .complete(NATS)
        .await;
    let store = IdempotencyStore::open(folder.path(), WINDOW).unwrap();
    assert_eq!(
        (duplicate(&store, "a").await, duplicate(&store, "d").await),
        (NATS, NATS)
    );
    first(&store, "c").await;
}
