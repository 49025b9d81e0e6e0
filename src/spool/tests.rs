use std::{
    collections::HashSet,
    io::Write as _,
    pin::pin,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    task::{self, Wake},
    time::Duration,
};

use bytes::Bytes;
use futures_util::FutureExt as _;
use tempfile::TempDir;
use tokio::{sync::OwnedSemaphorePermit, time::timeout};

use super::*;
use crate::{
    lane_id::LaneSet,
    record::{Origin, Record, TraceHeaders},
};

const NATS: LaneId = LaneId::Nats;

fn entry(id: &str) -> Entry {
    let record = Record {
        id: id.into(),
        body: Bytes::from_static(b"{\"a\":1}"),
        trace: TraceHeaders::read(
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03",
            Some("congo=t61rcWkgMzE"),
        ),
        origin: Some(Origin {
            run: "run".into(),
            at_us: 7,
        }),
        api: None,
        event: Some("id=1&source=/&specversion=1.0&type=t".into()),
    };
    Entry::new(&record, None)
}

fn dead(id: &str) -> Entry {
    let reason = DeathReason {
        lane: "nats".into(),
        status: 422,
        answer: "no".into(),
        attempts: 3,
        ..DeathReason::default()
    };
    Entry {
        reason: Some(reason),
        ..entry(id)
    }
}

fn open(folder: &TempDir) -> Spool {
    Spool::open(folder.path(), 1 << 30).unwrap()
}

/// The thread before lets go of the folder a moment after its last answer.
async fn open_again(folder: impl AsRef<Path>) -> Spool {
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    loop {
        match Spool::open(folder.as_ref(), 1 << 30) {
            Ok(spool) => return spool,
            Err(why) => assert!(std::time::Instant::now() < deadline, "{why}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn put(spool: &Spool, queue: Queue, ids: &[&str]) {
    for id in ids {
        spool.put(queue, &entry(id)).await.unwrap();
    }
}

async fn take(spool: &Spool, queue: Queue) -> Vec<String> {
    spool
        .take(queue, 100)
        .await
        .into_iter()
        .map(|(_, entry)| entry.id)
        .collect()
}

fn which(ids: &[&str]) -> Which {
    Which::Ids {
        ids: ids.iter().map(ToString::to_string).collect(),
        api: None,
    }
}

#[tokio::test]
async fn entries_are_kept_as_they_were_in_their_queues_over_a_restart() {
    let folder = TempDir::new().unwrap();
    let spool = open(&folder);
    put(&spool, Queue::Waiting, &["a", "b"]).await;
    put(&spool, Queue::Pinned(LaneId::Nats), &["c"]).await;
    put(&spool, Queue::Carried, &["d"]).await;
    assert_eq!(spool.stats().found_carried, 0);
    let (key, first) = spool.take(Queue::Waiting, 1).await.remove(0);
    assert_eq!((&first, first.record()), (&entry("a"), entry("a").record()));
    spool.settle(key);
    spool.close().await;
    assert_eq!(
        spool.put(Queue::Waiting, &entry("e")).await,
        Err(NotSafe::Closed)
    );
    drop(spool);

    let spool = open_again(&folder).await;
    let held = spool.stats();
    assert_eq!(
        (
            held.waiting(),
            held.records(Queue::Carried),
            held.found_carried
        ),
        (2, 1, 1)
    );
    let taken = spool.take(Queue::Waiting, 100).await;
    assert_eq!((taken.len(), &taken[0].1), (1, &entry("b")));
    assert_eq!(take(&spool, Queue::Waiting).await, [""; 0]);
    assert_eq!(take(&spool, Queue::Pinned(LaneId::Nats)).await, ["c"]);
    assert_eq!(take(&spool, Queue::Carried).await, ["d"]);
    spool.rewind(Queue::Carried);
    assert_eq!(take(&spool, Queue::Carried).await, ["d"]);
}

#[tokio::test]
async fn one_process_has_a_folder_at_a_time() {
    let folder = TempDir::new().unwrap();
    let spool = open(&folder);
    let second = Spool::open(folder.path(), 1 << 30).map(|_| ()).unwrap_err();
    assert!(
        matches!(&second, OpenError::InUse(used) if used == folder.path()),
        "{second}"
    );
    spool.close().await;
    drop(spool);
    open_again(&folder).await;
}

#[tokio::test]
async fn a_folder_that_cannot_be_used_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let why = Spool::open(&file.path().join("data"), 1 << 30)
        .map(|_| ())
        .unwrap_err()
        .to_string();
    assert!(why.contains(&file.path().display().to_string()), "{why}");
}

#[actix_rt::test]
async fn a_full_spool_refuses_and_takes_again_when_there_is_room() {
    let folder = TempDir::new().unwrap();
    let spool = Spool::open(folder.path(), 2 << 20).unwrap();
    let big = Entry {
        body: Bytes::from(vec![b'x'; 200 << 10]),
        ..entry("big")
    };
    let mut keys = Vec::new();
    let why = loop {
        match spool.put(Queue::Waiting, &big).await {
            Ok(key) => keys.push(key),
            Err(why) => break why,
        }
        assert!(keys.len() < 20, "never full");
    };
    assert_eq!(why, NotSafe::Full);
    assert!(keys.len() >= 9, "{}", keys.len());
    // It would find no place in an empty one either.
    let never = Entry {
        body: Bytes::from(vec![b'x'; 16 << 20]),
        ..dead("never")
    };
    assert_eq!(
        spool.put(Queue::Waiting, &never).await,
        Err(NotSafe::TooLarge)
    );
    // A record that the API refuses still has room to leave.
    let dead_letter = Entry {
        body: Bytes::from(vec![b'x'; 100 << 10]),
        ..dead("letter")
    };
    spool.put(Queue::Dead, &dead_letter).await.unwrap();
    // So has a record that a lane takes from the disk, and no other.
    let writer = CopyWriter::new(NATS, spool.clone());
    let mut copies = Vec::new();
    for moved in [false, true] {
        copies.push(writer.put(&dead_letter, moved).await.err());
    }
    assert_eq!(copies, [Some(NotSafe::Full), None]);
    for key in keys {
        spool.settle(key);
    }
    // Answered after the settled entries are removed.
    assert_eq!(spool.take(Queue::Carried, 1).await, []);
    spool.put(Queue::Waiting, &big).await.unwrap();
}

/// Occupies the thread, so that it takes the requests of `meanwhile` at once.
async fn while_busy(spool: &Spool, meanwhile: impl AsyncFnOnce()) {
    let busy = spool.run(|_| thread::sleep(Duration::from_millis(50)));
    tokio::join!(busy, meanwhile()).0.unwrap();
}

#[tokio::test]
async fn what_is_gone_is_in_the_files_for_a_while_and_counts_as_no_live_bytes() {
    const BODY: u64 = 10_000;
    let folder = TempDir::new().unwrap();
    // Seven entries fill a file.
    let spool = Spool::open(folder.path(), 1 << 20).unwrap();
    let large = Entry {
        body: vec![b'x'; 10_000].into(),
        ..entry("large")
    };
    for queue in [Queue::Carried, Queue::Kept(NATS)] {
        let mut most = 0;
        let mut before = None;
        for _ in 0..20 {
            let key = spool.put(queue, &large).await.unwrap();
            if let Some(before) = before.replace(key) {
                spool.settle(before);
            }
            // The thread has done all that it was asked to before.
            spool.oldest().await;
            spool.oldest().await;
            let stats = spool.stats();
            most = most.max(stats.bytes);
            let (live, kept) = (stats.live_bytes, stats.kept_bytes[NATS as usize]);
            let (own, other) = if queue == Queue::Carried {
                (live, kept)
            } else {
                (kept, live)
            };
            assert!((BODY..3 * BODY).contains(&own), "{queue:?}: {stats:?}");
            // About the one that has stayed in the other queue.
            assert!(other < 2 * BODY, "{queue:?}: {stats:?}");
        }
        assert!(most > 6 * BODY, "{queue:?}: {most}");
    }
}

#[tokio::test]
async fn a_spool_whose_disk_stalls_refuses_until_it_answers() {
    let folder = TempDir::new().unwrap();
    let spool = open(&folder);
    put(&spool, Queue::Waiting, &["a"]).await;
    assert!(!spool.stats().refuses);
    let (thaw, frozen) = std::sync::mpsc::channel::<()>();
    let stall = spool.run(move |store| {
        let long_ago = std::time::Instant::now().checked_sub(Duration::from_mins(1));
        store.busy.set(long_ago);
        frozen.recv().unwrap_err();
    });
    let refuses = async |refuses: bool| {
        let wait = async {
            while spool.stats().refuses != refuses {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let changed = timeout(Duration::from_secs(20), wait).await;
        assert!(changed.is_ok(), "refuses: {refuses}");
    };
    let watch = async {
        refuses(true).await;
        drop(thaw);
    };
    tokio::join!(stall, watch).0.unwrap();
    refuses(false).await;
}

/// Records that the gRPC lane carries wait for the API.
#[tokio::test]
async fn the_oldest_record_is_one_that_waits_for_a_lane() {
    let folder = TempDir::new().unwrap();
    let spool = open(&folder);
    let lanes: LaneSet = [NATS, LaneId::Grpc].into_iter().collect();
    let parked = [Queue::Parked(0), Queue::Held(NATS), Queue::Dead];
    for queue in [Queue::Carried, Queue::Kept(NATS)]
        .into_iter()
        .chain(parked)
    {
        put(&spool, queue, &["other"]).await;
        assert_eq!(spool.oldest().await, None, "{queue:?}");
    }
    for queue in [Queue::of(lanes), Queue::Pinned(NATS), Queue::Waiting] {
        let key = spool.put(queue, &entry("waits")).await.unwrap();
        let oldest = spool.oldest().await.expect("it waits");
        assert_eq!(oldest.id, "waits", "{queue:?}");
        assert_eq!(spool.remove(key).await, Ok(true));
    }
}

#[actix_rt::test]
async fn only_copies_that_were_there_are_let_out() {
    let folder = TempDir::new().unwrap();
    let spool = open(&folder);
    let writer = CopyWriter::new(NATS, spool.clone());
    while_busy(&spool, async || {
        let [before, after] = ["before", "after"].map(entry);
        let read = async { spool.read_kept(NATS, None) };
        let (before, (), after) =
            futures_util::join!(writer.put(&before, false), read, writer.put(&after, false),);
        assert!(before.is_ok() && after.is_ok());
    })
    .await;
    assert_eq!(take(&spool, Queue::Kept(NATS)).await, ["before"]);
    assert_eq!(spool.stats().kept(NATS), 2);
}

#[actix_rt::test]
async fn a_copy_that_nobody_waits_for_is_removed() {
    let folder = TempDir::new().unwrap();
    let spool = open(&folder);
    let copy = entry("a");
    for (number, (is_written, has_writer)) in
        [(false, false), (false, true), (true, false), (true, true)]
            .into_iter()
            .enumerate()
    {
        let what = format!("written: {is_written}, with its writer: {has_writer}");
        let mut writer = Some(CopyWriter::new(NATS, spool.clone()));
        while_busy(&spool, async || {
            let mut put = Box::pin(writer.as_ref().unwrap().put(&copy, false));
            assert_eq!(put.as_mut().now_or_never(), None);
            if is_written {
                spool.oldest().await;
            }
        })
        .await;
        if !has_writer {
            writer = None;
        }
        let written = number as u64 + 1;
        until(&what, &spool, |stats| stats.committed == written).await;
        until(&what, &spool, |stats| stats.kept(NATS) == 0).await;
        drop(writer);
    }
}

/// The connection of a lane ends while the thread is about to answer, or in the midst of it.
#[actix_rt::test]
async fn a_copy_that_is_answered_while_its_writer_goes_is_removed() {
    let folder = TempDir::new().unwrap();
    let spool = open(&folder);
    let copy = entry("a");
    for written in 1..=1000 {
        let writer = CopyWriter::new(NATS, spool.clone());
        assert_eq!(writer.put(&copy, false).now_or_never(), None);
        // It is counted just before it is answered.
        while spool.stats().committed < written {
            std::hint::spin_loop();
        }
        drop(writer);
        // The task that takes the answers ends.
        tokio::task::yield_now().await;
    }
    until("all are answered", &spool, |stats| stats.kept(NATS) == 0).await;
}

#[actix_rt::test]
async fn a_copy_is_refused_when_the_spool_has_ended() {
    let folder = TempDir::new().unwrap();
    let spool = open(&folder);
    let writer = CopyWriter::new(NATS, spool.clone());
    let copy = entry("a");
    let (is_busy, busy) = oneshot::channel();
    let (go_on, goes_on) = std::sync::mpsc::channel();
    let end = spool.run(move |_| -> () {
        is_busy.send(()).unwrap();
        goes_on.recv().unwrap();
        panic!("the thread ends while a copy waits");
    });
    let put = async {
        busy.await.unwrap();
        let mut put = Box::pin(writer.put(&copy, false));
        assert_eq!(put.as_mut().now_or_never(), None);
        go_on.send(()).unwrap();
        put.await
    };
    assert_eq!(
        tokio::join!(end, put),
        (Err(NotSafe::Closed), Err(NotSafe::Closed))
    );
    assert_eq!(writer.put(&copy, false).await, Err(NotSafe::Closed));
}

#[tokio::test]
async fn many_puts_at_once_are_all_kept() {
    let folder = TempDir::new().unwrap();
    let spool = open(&folder);
    let entries: Vec<_> = (0..2000).map(|id| entry(&id.to_string())).collect();
    let puts = futures_util::future::join_all(
        entries.iter().map(|entry| spool.put(Queue::Waiting, entry)),
    )
    .await;
    assert!(puts.iter().all(Result::is_ok));
    drop(spool);
    let spool = open_again(&folder).await;
    let ids: HashSet<_> = spool
        .take(Queue::Waiting, 5000)
        .await
        .into_iter()
        .map(|(_, entry)| entry.id)
        .collect();
    assert_eq!(ids.len(), 2000);
}

#[tokio::test]
async fn a_record_is_counted_before_its_put_is_answered() {
    let folder = TempDir::new().unwrap();
    let spool = open(&folder);
    for number in 1..=500 {
        put(&spool, Queue::Waiting, &["a"]).await;
        assert_eq!(spool.stats().waiting(), number);
    }
}

#[tokio::test]
async fn dead_letters_are_listed_replayed_and_dropped_by_their_ids() {
    let folder = TempDir::new().unwrap();
    let spool = open(&folder);
    for id in ["a", "b", "c", "d"] {
        spool.put(Queue::Dead, &dead(id)).await.unwrap();
    }
    assert_eq!(
        spool.list(Undelivered::Dead, 2).await.unwrap(),
        [dead("a"), dead("b")]
    );
    assert_eq!(
        spool
            .replay(Undelivered::Dead, which(&["b", "nobody"]))
            .await,
        Ok(1)
    );
    assert_eq!(spool.forget(Undelivered::Dead, which(&["c"])).await, Ok(1));
    let left: Vec<_> = spool
        .list(Undelivered::Dead, 10)
        .await
        .unwrap()
        .into_iter()
        .map(|entry| entry.id)
        .collect();
    assert_eq!(left, ["a", "d"]);
    let held = spool.stats();
    assert_eq!((held.records(Queue::Dead), held.waiting()), (2, 1));
    let (_, replayed) = spool.take(Queue::Waiting, 10).await.remove(0);
    assert_eq!(
        (replayed.id.as_str(), &replayed.body, &replayed.reason),
        ("b", &entry("b").body, &None)
    );
    assert_ne!(
        replayed.origin,
        entry("b").origin,
        "to the ledger it is another record"
    );
    spool.close().await;
    drop(spool);

    let spool = open_again(&folder).await;
    assert_eq!(spool.replay(Undelivered::Dead, Which::All).await, Ok(2));
    assert_eq!(spool.forget(Undelivered::Dead, Which::All).await, Ok(0));
    assert_eq!(take(&spool, Queue::Waiting).await, ["b", "a", "d"]);
}

/// A request that is sent just when the thread ends may stay in the channel, unanswered.
#[tokio::test]
async fn nobody_waits_for_a_thread_that_has_ended() {
    let (requests, _unread) = mpsc::unbounded_channel();
    let (_store, stats) = watch::channel(SpoolStats::default());
    let (thread, running) = watch::channel(());
    let spool = Spool {
        found_copies: Arc::default(),
        max: 0,
        search_turn: Arc::new(Semaphore::new(1)),
        settled: SettledKeys::default(),
        requests,
        stats,
        refuses: watch::channel(false).1,
        readable: Arc::default(),
        running,
        busy: BusySince::default(),
        folder: Path::new("").into(),
    };
    drop(thread);
    let answer = timeout(Duration::from_secs(20), spool.list(Undelivered::Dead, 1)).await;
    assert_eq!(answer.expect("an answer"), Err(NotSafe::Closed));
}

fn id(next: Option<(EntryKey, Entry, OwnedSemaphorePermit)>) -> String {
    next.expect("the spool lives").1.id
}

#[tokio::test]
async fn a_tail_waits_for_a_record_of_its_own_queue_or_for_the_end() {
    const SOON: Duration = Duration::from_secs(10);
    let folder = TempDir::new().unwrap();
    let spool = open(&folder);
    let mut tail = spool.tail(Queue::Waiting, Arc::new(Semaphore::new(100)));
    put(&spool, Queue::Carried, &["a"]).await;
    spool.put(Queue::Dead, &dead("b")).await.unwrap();
    let early = timeout(Duration::from_millis(50), tail.next()).await;
    assert!(early.is_err(), "it reads its own queue only");
    assert_eq!(spool.replay(Undelivered::Dead, Which::All).await, Ok(1));
    let next = timeout(SOON, tail.next()).await.expect("an entry");
    let key = next.as_ref().unwrap().0;
    assert_eq!(id(next), "b");

    spool.rewind(Queue::Waiting);
    let next = timeout(SOON, tail.next()).await;
    assert_eq!(
        id(next.expect("a queue that is not empty is read again")),
        "b"
    );
    spool.settle(key);
    put(&spool, Queue::Carried, &["c"]).await;
    assert!(
        timeout(Duration::from_millis(50), tail.next())
            .await
            .is_err()
    );
    spool.close().await;
    let end = timeout(SOON, tail.next()).await;
    assert!(end.expect("it ends").is_none());
}

/// Counts how often a task is woken.
#[derive(Default)]
struct WakeCount(AtomicUsize);

impl Wake for WakeCount {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Relaxed);
    }
}

/// The node has a reader for each of many queues, and each wake-up costs a call and a poll.
#[tokio::test]
async fn a_tail_sleeps_while_other_queues_grow() {
    let folder = TempDir::new().unwrap();
    let spool = open(&folder);
    let mut tail = spool.tail(Queue::Waiting, Arc::new(Semaphore::new(100)));
    let count = Arc::new(WakeCount::default());
    let waker = Arc::clone(&count).into();
    let mut context = task::Context::from_waker(&waker);
    let mut next = pin!(tail.next());
    let mut has_more = || next.as_mut().poll(&mut context).is_ready();
    assert!(!has_more());
    // The thread has answered that there is nothing.
    spool.oldest().await;
    assert!(!has_more());
    let before = count.0.load(Relaxed);
    for _ in 0..3 {
        put(&spool, Queue::Carried, &["a"]).await;
        spool.put(Queue::Kept(NATS), &entry("b")).await.unwrap();
    }
    spool.oldest().await;
    assert_eq!(count.0.load(Relaxed), before);
    put(&spool, Queue::Waiting, &["c"]).await;
    spool.oldest().await;
    assert_eq!(count.0.load(Relaxed), before + 1);
}

#[tokio::test]
async fn a_tail_yields_no_more_than_its_window_and_a_new_one_begins_anew() {
    let folder = TempDir::new().unwrap();
    let spool = open(&folder);
    let ids: Vec<_> = (0..150).map(|number| number.to_string()).collect();
    for number in &ids {
        spool.put(Queue::Waiting, &entry(number)).await.unwrap();
    }
    let window = Arc::new(Semaphore::new(100));
    let mut tail = spool.tail(Queue::Waiting, Arc::clone(&window));
    let mut yielded = Vec::new();
    while let Ok(next) = timeout(Duration::from_millis(500), tail.next()).await {
        yielded.push(next.expect("the spool lives"));
    }
    assert_eq!(yielded.len(), 64, "the rest of the window is no batch");
    yielded.truncate(32);
    assert_eq!(id(tail.next().await), "64");
    assert_eq!(window.available_permits(), 5, "one permit for each");
    for (key, ..) in yielded.drain(..10) {
        spool.settle(key);
    }
    drop((tail, yielded));
    let mut tail = spool.tail(Queue::Waiting, window);
    for expected in &ids[10..] {
        assert_eq!(&id(tail.next().await), expected);
    }
}

/// Something that happens to the folder or its files, and its repair.
type Accident = (&'static str, fn(&Path), fn(&Path));

fn files_of(folder: &Path, name: &str) -> Vec<PathBuf> {
    let files = fs::read_dir(folder).unwrap();
    let files = files.map(|file| file.unwrap().path());
    let is_named = |file: &PathBuf| file.file_name().unwrap().to_str().unwrap().contains(name);
    files.filter(is_named).collect()
}

fn aside(folder: &Path) -> PathBuf {
    folder.with_added_extension("aside")
}

fn make(folder: &Path) {
    fs::create_dir(folder).unwrap();
}

const ACCIDENTS: [Accident; 7] = [
    (
        "the folder is removed",
        |at| fs::remove_dir_all(at).unwrap(),
        make,
    ),
    (
        "the folder is moved away",
        |at| fs::rename(at, aside(at)).unwrap(),
        make,
    ),
    (
        "the folder is moved away for a while",
        |at| fs::rename(at, aside(at)).unwrap(),
        |at| fs::rename(aside(at), at).unwrap(),
    ),
    (
        "the folder is replaced",
        |at| {
            fs::rename(at, aside(at)).unwrap();
            make(at);
        },
        |_| {},
    ),
    (
        "all files are removed",
        |at| {
            for file in files_of(at, "") {
                fs::remove_file(file).unwrap();
            }
        },
        |_| {},
    ),
    (
        "the file is removed",
        |at| {
            for file in files_of(at, "waiting-") {
                fs::remove_file(file).unwrap();
            }
        },
        |_| {},
    ),
    (
        "the file is replaced by a copy",
        |at| {
            for file in files_of(at, "waiting-") {
                fs::copy(&file, at.join("copy")).unwrap();
                fs::rename(at.join("copy"), file).unwrap();
            }
        },
        |_| {},
    ),
];

async fn until(what: &str, spool: &Spool, holds: impl Fn(&SpoolStats) -> bool) {
    let mut stats = spool.watch_stats();
    let held = timeout(Duration::from_secs(20), stats.wait_for(holds)).await;
    assert!(held.is_ok(), "{what}: {:?}", spool.stats());
}

/// After `accident` nothing is safe until `repair`. Then what was safe is there, also after a
/// restart, and what was refused is not.
async fn survives(what: &str, folder: &Path, accident: fn(&Path), repair: fn(&Path)) {
    let spool = Spool::open(folder, 1 << 30).unwrap();
    put(&spool, Queue::Waiting, &["settled", "a"]).await;
    let (first, entry) = spool.take(Queue::Waiting, 1).await.remove(0);
    assert_eq!(entry.id, "settled", "{what}");
    spool.settle(first);
    accident(folder);
    let refused = spool.put(Queue::Waiting, &self::entry("refused")).await;
    assert!(
        matches!(refused, Err(NotSafe::Disk(_))),
        "{what}: {refused:?}"
    );
    until(what, &spool, |stats| stats.refuses).await;
    repair(folder);
    until(what, &spool, |stats| !stats.refuses).await;
    put(&spool, Queue::Waiting, &["b"]).await;
    spool.close().await;
    drop(spool);
    let spool = open_again(folder).await;
    assert_eq!(spool.stats().records(Queue::Waiting), 2, "{what}");
    assert_eq!(take(&spool, Queue::Waiting).await, ["a", "b"], "{what}");
    spool.close().await;
}

#[tokio::test]
async fn nothing_is_safe_in_a_folder_that_the_next_start_does_not_find_and_what_is_open_returns() {
    let each = ACCIDENTS.map(async |(what, accident, repair)| {
        let above = TempDir::new().unwrap();
        survives(what, &above.path().join("data"), accident, repair).await;
    });
    futures_util::future::join_all(each).await;
}

#[tokio::test]
async fn an_idle_spool_notices_that_its_folder_is_gone() {
    for (what, accident, repair) in ACCIDENTS {
        let above = TempDir::new().unwrap();
        let folder = above.path().join("data");
        let spool = Spool::open(&folder, 1 << 30).unwrap();
        put(&spool, Queue::Waiting, &["a"]).await;
        accident(&folder);
        until(what, &spool, |stats| stats.refuses).await;
        repair(&folder);
        until(what, &spool, |stats| !stats.refuses).await;
    }
}

fn mount(arguments: &[&str]) -> bool {
    let mount = std::process::Command::new(arguments[0])
        .args(&arguments[1..])
        .output();
    mount.is_ok_and(|output| output.status.success())
}

#[tokio::test]
async fn a_folder_whose_volume_is_unmounted_is_used_again_once_a_volume_is_there() {
    let above = TempDir::new().unwrap();
    let folder = above.path().join("data");
    make(&folder);
    let at = folder.to_str().unwrap();
    let volume = ["mount", "-t", "tmpfs", "none", at];
    if !mount(&volume) {
        // Past the capture of the test's output.
        let why =
            "DID NOT RUN: a_folder_whose_volume_is_unmounted: this user may not mount a volume";
        return writeln!(std::io::stderr(), "{why}").unwrap();
    }
    let spool = Spool::open(&folder, 1 << 30).unwrap();
    put(&spool, Queue::Waiting, &["a"]).await;
    assert!(mount(&["umount", "-l", at]));
    until("unmounted", &spool, |stats| stats.refuses).await;
    // Some probes later, it has not moved to the disk under the mount point.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(spool.stats().refuses);
    assert_eq!(files_of(&folder, "lock"), [""; 0].map(PathBuf::from));
    assert!(mount(&volume));
    until("mounted", &spool, |stats| !stats.refuses).await;
    put(&spool, Queue::Waiting, &["b"]).await;
    spool.close().await;
    drop(spool);
    let spool = open_again(&folder).await;
    assert_eq!(take(&spool, Queue::Waiting).await, ["a", "b"]);
    spool.close().await;
    drop(spool);
    assert!(mount(&["umount", "-l", at]));
}
