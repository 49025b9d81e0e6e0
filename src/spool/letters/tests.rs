use std::{fs, path::PathBuf, pin::pin};

use bytes::Bytes;
use futures_util::future::join_all;
use tempfile::TempDir;

use super::*;
use crate::{
    lane_id::LaneId,
    spool::{DeathReason, Queue},
};

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
        bytes_max: usize::MAX,
        bodies,
        after: None,
        counts: true,
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
        let found = found.unwrap();
        assert_eq!(found.entries, many()[..10]);
        found.matching
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
        let found = found.unwrap();
        assert_eq!((found.entries.len(), found.matching), (99, 100));
        assert!(found.entries.iter().all(|entry| entry.body.len() == size));
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
    assert_eq!(third, Ok(FoundLetters::default()));
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

/// The ids on each page of a list that ends after so many records, or bytes.
async fn pages(spool: &Spool, of: Undelivered, first: LetterQuery) -> Vec<Vec<String>> {
    let (mut pages, mut after) = (Vec::new(), None);
    loop {
        let query = LetterQuery {
            after,
            ..first.clone()
        };
        let found = spool.search(of, query).await.unwrap();
        let ids = found.entries.into_iter().map(|entry| entry.id);
        pages.push(ids.collect());
        let Some(last) = found.last.filter(|_| found.has_more) else {
            return pages;
        };
        assert_eq!(EntryKey::parse(&last.to_string()), Some(last));
        after = Some(last);
    }
}

#[tokio::test]
async fn pages_have_each_letter_once_in_its_order_whatever_ends_them() {
    let folder = TempDir::new().unwrap();
    let letter = |number: u32| Entry {
        body: Bytes::from(vec![b'x'; 1000]),
        ..dead(&number.to_string())
    };
    let letters: Vec<_> = (0..100).map(letter).collect();
    let spool = spool(&folder, &letters).await;
    // Of several queues.
    for (number, queue) in Queue::parked()
        .chain([Queue::Held(LaneId::Nats)])
        .enumerate()
    {
        for at in 0..3 {
            let entry = dead(&format!("{number}-{at}"));
            spool.put(queue, &entry).await.unwrap();
        }
    }
    for (filter, counts) in [
        (LetterFilter::default(), false),
        (refused(), false),
        (refused(), true),
    ] {
        let query = |max, bytes_max| LetterQuery {
            filter: filter.clone(),
            counts,
            bytes_max,
            ..query(max, true)
        };
        for (max, bytes_max, expected) in [
            (30, usize::MAX, vec![30, 30, 30, 10]),
            (50, usize::MAX, vec![50, 50]),
            (99, 10_000, vec![10; 10]),
            (99, 1, vec![1; 100]),
        ] {
            let pages = pages(&spool, Undelivered::Dead, query(max, bytes_max)).await;
            let sizes: Vec<_> = pages.iter().map(Vec::len).collect();
            assert_eq!(sizes, expected, "{max} {bytes_max}");
            let all: Vec<_> = (0..100).map(|number| number.to_string()).collect();
            assert_eq!(pages.concat(), all);
        }
        let whole = spool.list(Undelivered::Parked, 1000).await.unwrap();
        let whole: Vec<_> = whole.into_iter().map(|entry| entry.id).collect();
        for max in 1..5 {
            let pages = pages(&spool, Undelivered::Parked, query(max, usize::MAX)).await;
            assert_eq!(pages.concat(), whole, "{max}");
        }
    }
    // All that match behind the place count.
    let first = spool
        .search(Undelivered::Dead, query(60, true))
        .await
        .unwrap();
    assert_eq!((first.matching, first.has_more), (100, true));
    let second = LetterQuery {
        after: first.last,
        ..query(60, true)
    };
    let second = spool.search(Undelivered::Dead, second).await.unwrap();
    assert_eq!(
        (second.entries.len(), second.matching, second.has_more),
        (40, 40, false)
    );
}

/// So all pages together read each file about once.
#[tokio::test]
async fn a_page_reads_no_file_before_its_place_and_none_behind_its_end() {
    let folder = TempDir::new().unwrap();
    // Seven letters fill a file.
    let spool = Spool::open(folder.path(), 1 << 20).unwrap();
    for number in 0..28 {
        let letter = Entry {
            body: Bytes::from(vec![b'x'; 10_000]),
            ..dead(&number.to_string())
        };
        spool.put(Queue::Dead, &letter).await.unwrap();
    }
    let first = spool.search(Undelivered::Dead, query(9, false)).await;
    let page = LetterQuery {
        after: first.unwrap().last,
        counts: false,
        ..query(3, false)
    };
    let files = fs::read_dir(folder.path()).unwrap();
    let mut logs: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    logs.retain(|path| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.starts_with("dead-") && name.ends_with(".log")
    });
    logs.sort();
    assert_eq!(logs.len(), 4, "{logs:?}");
    for file in [0, 2, 3] {
        fs::rename(&logs[file], folder.path().join(file.to_string())).unwrap();
    }
    let found = spool.search(Undelivered::Dead, page.clone()).await.unwrap();
    let ids: Vec<_> = found.entries.iter().map(|entry| &*entry.id).collect();
    assert_eq!((ids, found.has_more), (vec!["9", "10", "11"], true));
    let counting = LetterQuery {
        counts: true,
        ..page
    };
    let failed = spool.search(Undelivered::Dead, counting).await;
    assert!(matches!(failed, Err(NotSafe::Disk(_))), "{failed:?}");
}

#[test]
fn a_place_is_three_numbers() {
    for wrong in [
        "",
        "1",
        "1-2",
        "1-2-3-4",
        "1-2-x",
        "-1-2-3",
        "1-2-4294967296",
    ] {
        assert_eq!(EntryKey::parse(wrong), None, "{wrong}");
    }
}
