use tempfile::TempDir;

use super::*;
use crate::spool::disk::simulated::{Disk, End, Faults, watch, with};

fn open(folder: &TempDir) -> Log {
    Log::open(folder.path(), "q", SEGMENT_MAX).unwrap()
}

fn append(log: &mut Log, numbers: std::ops::Range<u32>) -> Vec<Position> {
    let keys = numbers
        .map(|number| log.append(&payload(number), false).unwrap())
        .collect();
    log.commit().unwrap();
    keys
}

/// As long as a record is, and different for each number.
fn payload(number: u32) -> Vec<u8> {
    format!("{number:-^200}").into_bytes()
}

fn number(payload: &[u8]) -> u32 {
    std::str::from_utf8(payload)
        .unwrap()
        .trim_matches('-')
        .parse()
        .unwrap()
}

fn drain(log: &mut Log) -> Vec<u32> {
    let mut numbers = Vec::new();
    while let Some((_, payload)) = log.next() {
        numbers.push(number(&payload));
    }
    numbers
}

fn files(folder: &TempDir, ending: &str) -> Vec<PathBuf> {
    let all = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = all
        .filter(|path| path.extension().is_some_and(|found| found == ending))
        .collect();
    files.sort();
    files
}

/// Enough entries for more than `segments` segments.
fn many(segments: u64) -> u32 {
    u32::try_from(segments * SEGMENT_MAX / 200 + 1).unwrap()
}

#[test]
fn entries_that_are_to_be_read_again_are_not_settled_with_all_before() {
    let folder = TempDir::new().unwrap();
    let mut log = open(&folder);
    log.read_present();
    let keys = append(&mut log, 0..3);
    assert_eq!((drain(&mut log), log.readable()), (vec![], 0));
    log.read_present();
    log.settle_through(keys[2]);
    assert_eq!((log.len(), log.readable()), (3, 3));
    let later = append(&mut log, 3..5);
    log.settle_through(later[0]);
    assert_eq!((log.len(), log.readable()), (4, 3));
    assert_eq!(drain(&mut log), [0, 1, 2]);
}

#[test]
fn entries_that_were_read_do_not_come_again_with_those_that_are_let_out_later() {
    let folder = TempDir::new().unwrap();
    let mut log = open(&folder);
    append(&mut log, 0..3);
    log.read_present();
    assert_eq!(drain(&mut log), [0, 1, 2]);
    append(&mut log, 3..5);
    log.read_present();
    append(&mut log, 5..6);
    assert_eq!(drain(&mut log), [3, 4]);
}

#[test]
fn entries_come_out_once_each_in_their_order_and_again_after_a_restart() {
    let folder = TempDir::new().unwrap();
    let mut log = open(&folder);
    let keys = append(&mut log, 0..10);
    assert_eq!(drain(&mut log), (0..10).collect::<Vec<_>>());
    assert_eq!(drain(&mut log), [0; 0]);
    append(&mut log, 10..12);
    assert_eq!(drain(&mut log), [10, 11]);
    for key in &keys[2..5] {
        log.settle(*key);
    }
    log.flush(false).unwrap();
    assert_eq!(log.len(), 9);
    drop(log);
    let mut log = open(&folder);
    assert_eq!(log.len(), 9);
    assert_eq!(drain(&mut log), [0, 1, 5, 6, 7, 8, 9, 10, 11]);
    log.rewind();
    assert_eq!(drain(&mut log).len(), 9);
    assert_eq!(log.damages(), []);
}

#[test]
fn a_file_that_a_power_cut_brings_back_is_there_at_the_next_start() {
    for (calls, seed) in (0..8).flat_map(|calls| (0..32).map(move |seed| (calls, seed))) {
        let folder = folder_in_memory();
        watch(folder.path(), seed);
        let keys = append(&mut open(&folder), 0..1);
        let mut log = open(&folder);
        log.settle(keys[0]);
        // The file is removed, and that is not durable.
        with(|disk| disk.end_after(1, End::Kill));
        log.flush(false).ok();
        drop(log);
        with(Disk::end_now);
        // The next run begins a file, perhaps with the same number.
        let mut log = open(&folder);
        with(|disk| disk.end_after(calls, End::PowerCut));
        log.append(&payload(1), false).ok();
        log.commit().ok();
        drop(log);
        with(Disk::end_now);
        let left = drain(&mut open(&folder));
        assert_eq!(
            drain(&mut open(&folder)),
            left,
            "{calls} calls, seed {seed}"
        );
    }
}

/// As in a folder that was restored from a copy, or put together of two.
#[test]
fn files_of_the_same_number_are_all_read() {
    let folder = TempDir::new().unwrap();
    for (from, settled) in [(0, 1), (10, 12), (20, 20)] {
        let other = TempDir::new().unwrap();
        let mut log = open(&other);
        let keys = append(&mut log, from..from + 3);
        log.settle(keys[settled - from as usize]);
        log.flush(true).unwrap();
        drop(log);
        for ending in ["log", "done"] {
            for file in files(&other, ending) {
                let to = folder.path().join(file.file_name().unwrap());
                fs::copy(&file, to).unwrap();
            }
        }
    }
    for _ in 0..2 {
        let mut log = open(&folder);
        assert_eq!(log.len(), 6);
        let mut all = drain(&mut log);
        all.sort_unstable();
        assert_eq!(all, [0, 2, 10, 11, 21, 22]);
        let [settled] = append(&mut log, 30..31)[..] else {
            unreachable!("one was appended")
        };
        log.settle(settled);
        log.flush(true).unwrap();
    }
}

#[test]
fn entries_are_settled_on_disk_though_a_file_before_them_cannot_go() {
    let cannot_sync = Faults {
        syncs: 100,
        ..Faults::default()
    };
    let cannot_remove = Faults {
        changes: 100,
        ..Faults::default()
    };
    for faults in [cannot_sync, cannot_remove] {
        let folder = folder_in_memory();
        watch(folder.path(), 0);
        let mut log = open(&folder);
        let first = append(&mut log, 0..1);
        log.seal();
        let keys = append(&mut log, 1..3);
        log.settle(first[0]);
        log.settle(keys[0]);
        with(|disk| disk.faults = faults);
        log.flush(false).unwrap_err();
        drop(log);
        with(|disk| disk.faults = Faults::default());
        assert_eq!(drain(&mut open(&folder)), [2], "{faults:?}");
    }
}

#[test]
fn what_is_not_committed_is_not_there() {
    let folder = TempDir::new().unwrap();
    let mut log = open(&folder);
    append(&mut log, 0..2);
    log.append(&payload(2), false).unwrap();
    assert_eq!((log.len(), drain(&mut log)), (2, vec![0, 1]));
    drop(log);
    assert_eq!(drain(&mut open(&folder)), [0, 1]);
}

#[test]
fn what_is_held_is_left_out_until_a_rewind() {
    let folder = TempDir::new().unwrap();
    let mut log = open(&folder);
    log.append(&payload(0), true).unwrap();
    append(&mut log, 1..3);
    assert_eq!((log.len(), drain(&mut log)), (3, vec![1, 2]));
    log.rewind();
    assert_eq!(drain(&mut log), [0, 1, 2]);
}

#[test]
fn a_visit_sees_everything_and_changes_nothing() {
    let folder = TempDir::new().unwrap();
    let mut log = open(&folder);
    append(&mut log, 0..5);
    assert_eq!(number(&log.next().unwrap().1), 0);
    let mut seen = Vec::new();
    let mut reading = Reading::default();
    for until in [2, 4] {
        let visit = log.visit(&mut reading, |_, payload| {
            seen.push(number(&payload));
            seen.len() < until
        });
        visit.unwrap();
    }
    assert_eq!(seen, [0, 1, 2, 3]);
    assert_eq!(drain(&mut log), [1, 2, 3, 4]);
}

#[test]
fn a_visit_of_a_file_that_cannot_be_read_fails() {
    let folder = TempDir::new().unwrap();
    let mut log = open(&folder);
    append(&mut log, 0..5);
    let file = files(&folder, "log").remove(0);
    let away = folder.path().join("away");
    fs::rename(&file, &away).unwrap();
    let mut reading = Reading::default();
    for _ in 0..2 * READ_TRIES {
        let visit = log.visit(&mut reading, |_, _| true);
        assert_eq!(visit.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
    fs::rename(&away, &file).unwrap();
    let mut seen = 0;
    let visit = log.visit(&mut reading, |_, _| {
        seen += 1;
        true
    });
    assert_eq!((visit.unwrap(), seen), ((), 5));
}

#[test]
fn many_segments_are_read_in_order_and_their_space_is_given_back() {
    let folder = TempDir::new().unwrap();
    let mut log = open(&folder);
    let count = many(3);
    let mut keys = Vec::new();
    for from in (0..count).step_by(1000) {
        keys.extend(append(&mut log, from..count.min(from + 1000)));
    }
    assert!(log.bytes() > 3 * SEGMENT_MAX);
    assert!(files(&folder, "log").len() > 3);
    for key in &keys[..keys.len() / 2] {
        log.settle(*key);
    }
    log.flush(false).unwrap();
    assert!(
        log.bytes() < 3 * SEGMENT_MAX,
        "the oldest segments are gone"
    );
    drop(log);

    let mut log = open(&folder);
    assert_eq!(log.len(), u64::from(count) - keys.len() as u64 / 2);
    assert_eq!(
        drain(&mut log),
        (u32::try_from(keys.len() / 2).unwrap()..count).collect::<Vec<_>>()
    );
    for key in keys {
        log.settle(key);
    }
    log.flush(false).unwrap();
    assert_eq!((log.len(), log.bytes()), (0, 0));
    assert_eq!(
        fs::read_dir(folder.path()).unwrap().count(),
        0,
        "nothing is left"
    );
    append(&mut log, 0..1);
    assert_eq!(drain(&mut log), [0]);
}

#[test]
fn a_lull_does_not_cost_a_file_each_time() {
    let folder = TempDir::new().unwrap();
    let mut log = open(&folder);
    for at in 0..100 {
        let keys = append(&mut log, at..at + 1);
        log.settle(keys[0]);
        log.flush(false).unwrap();
    }
    assert_eq!(files(&folder, "log").len(), 1);
    assert_eq!(log.len(), 0);
    drop(log);
    assert_eq!(
        drain(&mut open(&folder)),
        [0; 0],
        "what was settled is known to be"
    );
}

/// In memory where there is such a place: thousands of copies of damage are synced here.
fn folder_in_memory() -> TempDir {
    let memory = std::path::Path::new("/dev/shm");
    if memory.is_dir() {
        TempDir::new_in(memory)
    } else {
        TempDir::new()
    }
    .unwrap()
}

/// Each bit of a segment in turn: no entry but the one that it lies in is lost, the damage is
/// named, and a copy of it is kept.
#[test]
fn a_flipped_bit_costs_one_entry_and_is_named() {
    for sealed in [false, true] {
        let folder = folder_in_memory();
        let mut log = open(&folder);
        append(&mut log, 0..3);
        if sealed {
            log.seal();
        }
        drop(log);
        let file = files(&folder, "log").remove(0);
        let whole = fs::read(&file).unwrap();
        let frame = frame::HEAD + 200;
        for bit in 0..3 * frame * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            fs::write(&file, &bytes).unwrap();
            let hit = u32::try_from(bit / 8 / frame).unwrap();
            let mut log = open(&folder);
            let rest: Vec<_> = (0..3).filter(|&number| number != hit).collect();
            assert_eq!(drain(&mut log), rest, "bit {bit}");
            let damages = log.damages();
            assert_eq!(damages.len(), 1, "bit {bit}: {damages:?}");
            assert_eq!(
                (damages[0].at, damages[0].size),
                (u64::from(hit) * frame as u64, frame as u64),
                "bit {bit}"
            );
            let kept = damages[0].kept.as_ref().unwrap();
            assert_eq!(
                fs::read(kept).unwrap(),
                bytes[hit as usize * frame..][..frame]
            );
            assert_eq!(log.len(), 2, "bit {bit}");
        }
    }
}

#[test]
fn damage_that_cannot_be_set_aside_stays_where_it_is_until_it_can() {
    let folder = TempDir::new().unwrap();
    let mut log = open(&folder);
    append(&mut log, 0..1);
    drop(log);
    let file = files(&folder, "log").remove(0);
    let mut bytes = fs::read(&file).unwrap();
    bytes[frame::HEAD] ^= 1;
    fs::write(&file, &bytes).unwrap();
    let copy = file.with_extension("0.damaged");
    fs::create_dir(&copy).unwrap();
    let mut log = open(&folder);
    assert!(drain(&mut log).is_empty());
    assert_eq!(log.damages()[0].kept, None);
    log.flush(true).unwrap();
    assert_eq!(fs::read(&file).unwrap(), bytes, "the only copy");

    fs::remove_dir(&copy).unwrap();
    let mut log = open(&folder);
    assert_eq!(log.damages()[0].kept.as_ref(), Some(&copy));
    log.flush(true).unwrap();
    assert!(!file.exists());
    assert_eq!(fs::read(&copy).unwrap(), bytes);
    append(&mut log, 1..2);
    assert_ne!(
        files(&folder, "log"),
        [file],
        "no later copy takes its name"
    );
}

#[test]
fn a_flipped_bit_in_what_is_settled_or_in_the_seal_loses_nothing() {
    let folder = TempDir::new().unwrap();
    let mut log = open(&folder);
    let keys = append(&mut log, 0..6);
    for at in [1, 2, 4] {
        log.settle(keys[at]);
    }
    log.flush(false).unwrap();
    log.seal();
    drop(log);
    let (entries, done) = (
        files(&folder, "log").remove(0),
        files(&folder, "done").remove(0),
    );
    let (whole_entries, whole_done) = (fs::read(&entries).unwrap(), fs::read(&done).unwrap());
    for bit in 0..whole_done.len() * 8 {
        let mut bytes = whole_done.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(&done, &bytes).unwrap();
        let found = drain(&mut open(&folder));
        assert!(
            [0, 3, 5].iter().all(|number| found.contains(number)),
            "bit {bit}: {found:?}"
        );
    }
    fs::write(&done, &whole_done).unwrap();
    for bit in (whole_entries.len() - SEAL_SIZE) * 8..whole_entries.len() * 8 {
        let mut bytes = whole_entries.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(&entries, &bytes).unwrap();
        assert_eq!(drain(&mut open(&folder)), [0, 3, 5], "bit {bit}");
    }
}

#[test]
fn a_file_that_is_cut_anywhere_keeps_what_is_whole() {
    let folder = folder_in_memory();
    append(&mut open(&folder), 0..3);
    let file = files(&folder, "log").remove(0);
    let whole = fs::read(&file).unwrap();
    let frame = frame::HEAD + 200;
    for cut in (0..whole.len()).rev() {
        fs::write(&file, &whole[..cut]).unwrap();
        let mut log = open(&folder);
        let left = u32::try_from(cut / frame).unwrap();
        assert_eq!(
            drain(&mut log),
            (0..left).collect::<Vec<_>>(),
            "cut at {cut}"
        );
        assert_eq!(
            log.damages().len(),
            usize::from(cut % frame > 0),
            "cut at {cut}"
        );
        if left == 0 {
            fs::write(&file, &whole[..cut]).unwrap();
        }
    }
}

#[test]
fn zeros_that_are_written_ahead_are_neither_entries_nor_damage() {
    let folder = folder_in_memory();
    let mut log = open(&folder);
    append(&mut log, 0..3);
    append(&mut log, 3..4);
    let bytes = log.bytes();
    drop(log);
    let file = files(&folder, "log").remove(0);
    let whole = fs::read(&file).unwrap();
    let end = usize::try_from(bytes).unwrap();
    assert!(whole.len() > end, "nothing is written ahead");
    // A power cut may have left the last entry, or a part of it.
    for cut in (end - frame::HEAD - 200..=end).rev() {
        let mut left = whole.clone();
        left[cut..].fill(0);
        fs::write(&file, &left).unwrap();
        let mut log = open(&folder);
        let entries = if cut == end { 4 } else { 3 };
        assert_eq!(drain(&mut log), (0..entries).collect::<Vec<_>>(), "{cut}");
        assert!(log.bytes() <= bytes, "{cut}: {}", log.bytes());
        let damages = log.damages();
        let is_torn = cut < end && cut > end - frame::HEAD - 200;
        assert_eq!(damages.len(), usize::from(is_torn), "{cut}");
        assert!(
            damages
                .iter()
                .all(|damage| damage.at + damage.size <= cut as u64)
        );
    }
}

#[test]
fn a_sealed_segment_has_no_zeros_behind_its_seal() {
    let folder = TempDir::new().unwrap();
    let mut log = open(&folder);
    append(&mut log, 0..3);
    append(&mut log, 3..4);
    log.read_present();
    let size = fs::metadata(files(&folder, "log").remove(0)).unwrap().len();
    assert_eq!(size, log.bytes());
    drop(log);
    assert_eq!(drain(&mut open(&folder)), [0, 1, 2, 3]);
}

#[test]
fn a_copy_of_a_frame_inside_an_entry_never_passes_for_an_entry() {
    let folder = TempDir::new().unwrap();
    let mut log = open(&folder);
    // A client would have to guess the salt.
    let mut forged = Vec::new();
    frame::write(&mut forged, 0, 1, b"forged");
    log.append(&forged, false).unwrap();
    log.commit().unwrap();
    drop(log);
    let file = files(&folder, "log").remove(0);
    let mut bytes = fs::read(&file).unwrap();
    bytes[5] ^= 1;
    fs::write(&file, bytes).unwrap();
    assert!(open(&folder).next().is_none());
}

#[test]
fn a_file_that_the_disk_does_not_give_costs_no_other() {
    let folder = TempDir::new().unwrap();
    let mut log = Log::open(folder.path(), "q", 1000).unwrap();
    append(&mut log, 0..10);
    append(&mut log, 10..20);
    append(&mut log, 20..22);
    drop(log);
    let all = files(&folder, "log");
    assert_eq!(all.len(), 3);
    let mut log = Log::open(folder.path(), "q", 1000).unwrap();
    fs::remove_file(&all[1]).unwrap();
    fs::create_dir(&all[1]).unwrap();
    assert_eq!(
        drain(&mut log),
        (0..10).collect::<Vec<_>>(),
        "it is tried again first"
    );
    for _ in 1..READ_TRIES {
        assert_eq!(drain(&mut log), [0; 0]);
    }
    assert_eq!(drain(&mut log), [20, 21]);
    drop(log);
    // At a start it is known at once.
    assert_eq!(
        drain(&mut Log::open(folder.path(), "q", 1000).unwrap()),
        (0..10).chain(20..22).collect::<Vec<_>>()
    );
}

#[test]
fn half_of_what_was_settled_last_spoils_nothing_that_comes_after_it() {
    let folder = TempDir::new().unwrap();
    let mut log = open(&folder);
    let keys = append(&mut log, 0..10);
    log.settle(keys[0]);
    log.flush(false).unwrap();
    let done = files(&folder, "done").remove(0);
    let mut bytes = fs::read(&done).unwrap();
    bytes.extend_from_slice(&[7; RUN / 2]);
    fs::write(&done, bytes).unwrap();
    for key in &keys[5..] {
        log.settle(*key);
    }
    log.flush(true).unwrap();
    drop(log);
    assert_eq!(drain(&mut open(&folder)), [1, 2, 3, 4]);
}

#[test]
fn a_commit_to_a_file_that_is_gone_fails_and_what_was_safe_is_put_back() {
    let folder = TempDir::new().unwrap();
    let mut log = open(&folder);
    append(&mut log, 0..3);
    log.append(&payload(3), false).unwrap();
    // Between the last look and the commit.
    for file in files(&folder, "log") {
        fs::remove_file(file).unwrap();
    }
    log.commit().unwrap_err();
    assert!(log.is_adrift());
    assert_eq!(log.put_back().unwrap(), 3);
    assert!(!log.is_adrift());
    append(&mut log, 4..5);
    drop(log);
    assert_eq!(drain(&mut open(&folder)), [0, 1, 2, 4]);
}

#[test]
fn entries_that_are_let_out_are_not_settled_by_an_older_position() {
    let folder = TempDir::new().unwrap();
    let mut log = open(&folder);
    let keys = append(&mut log, 0..3);
    log.read_present();
    log.settle_through(keys[1]);
    assert_eq!(drain(&mut log), [0, 1, 2]);
    let later = append(&mut log, 3..5);
    log.settle_through(later[0]);
    assert_eq!(log.len(), 4, "only the later entry is settled");
}

#[test]
fn a_start_is_not_refused_though_what_is_settled_cannot_be_deleted() {
    let folder = TempDir::new().unwrap();
    let mut log = open(&folder);
    let keys = append(&mut log, 0..1);
    log.settle(keys[0]);
    log.flush(false).unwrap();
    drop(log);
    let done = files(&folder, "done").remove(0);
    let entries = fs::read(&done).unwrap();
    disk::simulated::watch(folder.path(), 0);
    disk::simulated::with(|disk| disk.faults.changes = 100);
    let mut log = open(&folder);
    assert_eq!((log.len(), drain(&mut log)), (0, vec![]));
    assert_eq!(fs::read(&done).unwrap(), entries);
    disk::simulated::with(|disk| disk.faults.changes = 0);
    log.flush(false).unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}
