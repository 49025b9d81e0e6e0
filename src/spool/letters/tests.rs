use std::{fs, path::PathBuf, pin::pin};

use bytes::Bytes;
use futures_util::future::join_all;
use tempfile::TempDir;

use super::*;
use crate::spool::{DeathReason, Queue};

/// More than some slices.
const MANY: usize = 10_000;

fn dead(id: &str) -> Entry {
    Entry {
        id: id.into(),
        body: Bytes::from_static(b"{}"),
        reason: Some(DeathReason {
            status: 422,
            ..DeathReason::default()
        }),
        ..Entry::default()
    }
}

async fn spool(folder: &TempDir, letters: &[Entry]) -> Spool {
    let spool = Spool::open(folder.path(), 1 << 30).unwrap();
    let puts = letters.iter().map(|entry| spool.put(Queue::Dead, entry));
    for put in join_all(puts).await {
        put.unwrap();
    }
    spool
}

fn many() -> Vec<Entry> {
    (0..MANY).map(|number| dead(&number.to_string())).collect()
}

fn refused() -> LetterFilter {
    LetterFilter {
        status: Some(422),
        ..LetterFilter::default()
    }
}

fn query(max: usize, bodies: bool) -> LetterQuery {
    LetterQuery {
        filter: refused(),
        max,
        bodies,
    }
}

async fn ids(spool: &Spool) -> Vec<String> {
    let letters = spool.list(Undelivered::Dead, usize::MAX).await.unwrap();
    letters.into_iter().map(|entry| entry.id).collect()
}

/// Puts that are answered before `work` is.
async fn puts_during(spool: &Spool, work: impl Future<Output = u64>) -> u32 {
    let mut work = pin!(work);
    let mut puts = 0;
    let entry = dead("put");
    loop {
        tokio::select! {
            biased;
            done = &mut work => {
                assert_eq!(done, MANY as u64);
                return puts;
            }
            put = spool.put(Queue::Carried, &entry) => {
                put.unwrap();
                puts += 1;
            }
        }
    }
}

#[tokio::test]
async fn puts_are_answered_between_the_slices_of_a_search_or_an_order() {
    let folder = TempDir::new().unwrap();
    let spool = spool(&folder, &many()).await;
    let search = async {
        let found = spool.search(Undelivered::Dead, query(10, true)).await;
        let (found, matching) = found.unwrap();
        assert_eq!(found, many()[..10]);
        matching
    };
    let puts = puts_during(&spool, search).await;
    assert!(puts > 2, "{puts} during a search");
    let replay = async { spool.replay(Undelivered::Dead, Which::All).await.unwrap() };
    let puts = puts_during(&spool, replay).await;
    assert!(puts > 2, "{puts} during a replay");
    assert_eq!(spool.stats().waiting(), MANY as u64);
}

#[tokio::test]
async fn an_order_leaves_letters_that_come_after_its_start() {
    let folder = TempDir::new().unwrap();
    let spool = spool(&folder, &many()).await;
    let mut order = spool.order(LetterAction::Drop, Undelivered::Dead, Which::All);
    let mut all = order.next().await.unwrap().unwrap();
    assert!((1..MANY as u64).contains(&all), "{all} in a slice");
    spool.put(Queue::Dead, &dead("late")).await.unwrap();
    while let Some(done) = order.next().await.unwrap() {
        all += done;
    }
    assert_eq!((all, ids(&spool).await), (MANY as u64, vec!["late".into()]));
}

#[tokio::test]
async fn a_close_waits_for_no_order() {
    let folder = TempDir::new().unwrap();
    let spool = spool(&folder, &many()).await;
    let mut order = spool.order(LetterAction::Drop, Undelivered::Dead, Which::All);
    let done = order.next().await.unwrap().unwrap();
    spool.close().await;
    assert_eq!(order.next().await, Err(NotSafe::Closed));
    assert_eq!(spool.stats().records(Queue::Dead), MANY as u64 - done);
}

#[tokio::test]
async fn a_slice_has_few_bytes_and_a_list_without_bodies_none() {
    let folder = TempDir::new().unwrap();
    let big = |number: u32| Entry {
        body: Bytes::from(vec![b'x'; 200 << 10]),
        ..dead(&number.to_string())
    };
    let letters: Vec<_> = (0..100).map(big).collect();
    let spool = spool(&folder, &letters).await;
    for (bodies, size) in [(true, 200 << 10), (false, 0)] {
        let found = spool.search(Undelivered::Dead, query(99, bodies)).await;
        let (found, matching) = found.unwrap();
        assert_eq!((found.len(), matching), (99, 100));
        assert!(found.iter().all(|entry| entry.body.len() == size));
    }
    let mut order = spool.order(LetterAction::Replay, Undelivered::Dead, Which::All);
    let done = order.next().await.unwrap().unwrap();
    assert!(done < 50, "{done} letters of 200 KiB in a slice");
}

#[tokio::test(start_paused = true)]
async fn a_search_waits_a_while_for_its_turn() {
    let folder = TempDir::new().unwrap();
    let spool = spool(&folder, &[]).await;
    let turn = spool.search_turn.acquire().await.unwrap();
    let second = spool.search(Undelivered::Dead, query(1, true)).await;
    assert_eq!(second, Err(NotSafe::Busy));
    drop(turn);
    let third = spool.search(Undelivered::Dead, query(1, true)).await;
    assert_eq!(third, Ok((Vec::new(), 0)));
}

#[tokio::test]
async fn a_file_that_cannot_be_read_fails_a_search_and_an_order() {
    let folder = TempDir::new().unwrap();
    let spool = spool(&folder, &[dead("a"), dead("b")]).await;
    let file = fs::read_dir(folder.path()).unwrap();
    let mut logs = file.map(|file| file.unwrap().path()).filter(|path| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.starts_with("dead-") && name.ends_with(".log")
    });
    let log: PathBuf = logs.next().unwrap();
    let away = folder.path().join("away");
    fs::rename(&log, &away).unwrap();
    let failed = spool.search(Undelivered::Dead, query(1, true)).await;
    assert!(matches!(failed, Err(NotSafe::Disk(_))), "{failed:?}");
    let failed = spool.list(Undelivered::Dead, 1).await;
    assert!(matches!(failed, Err(NotSafe::Disk(_))), "{failed:?}");
    for failed in [
        spool.replay(Undelivered::Dead, Which::All).await,
        spool.forget(Undelivered::Dead, Which::All).await,
    ] {
        assert!(matches!(failed, Err(NotSafe::Disk(_))), "{failed:?}");
    }
    fs::rename(&away, &log).unwrap();
    assert_eq!(ids(&spool).await, ["a", "b"]);
}
