use std::sync::mpsc::{self, Receiver, Sender};

use super::*;

/// An output that takes what it is told to take.
struct Pipe {
    /// The answer to each write that comes; without one, it waits. `usize` bytes at most are taken.
    answers: Receiver<io::Result<usize>>,
    taken: Sender<Vec<u8>>,
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Ok(answer) = self.answers.recv() else {
            // The test is over.
            loop {
                thread::park();
            }
        };
        let taken = bytes.len().min(answer?);
        self.taken.send(bytes[..taken].to_vec()).unwrap();
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Rig {
    output: Arc<LogOutput>,
    answers: Sender<io::Result<usize>>,
    taken: Receiver<Vec<u8>>,
}

impl Rig {
    fn new() -> Self {
        Self::with_loss_line(|lines| format!("{lines} lost\n").into_bytes())
    }

    fn with_loss_line(loss: fn(u64) -> Vec<u8>) -> Self {
        let (answers, asked) = mpsc::channel();
        let (sender, taken) = mpsc::channel();
        let output = Arc::new(LogOutput::default());
        let writer = Arc::clone(&output);
        let pipe = Pipe {
            answers: asked,
            taken: sender,
        };
        thread::spawn(move || writer.run(pipe, loss));
        Self {
            output,
            answers,
            taken,
        }
    }

    fn log(&self, line: &str) {
        (&*self.output).write_all(line.as_bytes()).unwrap();
    }

    fn answers(&self, answers: impl IntoIterator<Item = io::Result<usize>>) {
        for answer in answers {
            self.answers.send(answer).unwrap();
        }
    }

    /// The text of the output, once it ends with `text`.
    fn has(&self, text: &str) -> String {
        let mut all = Vec::new();
        while !all.ends_with(text.as_bytes()) {
            let more = self.taken.recv_timeout(Duration::from_secs(30));
            all.extend(more.unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&all))));
        }
        String::from_utf8(all).unwrap()
    }

    fn loses(&self, lost: u64, refuses: bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.output.status() != (LogStatus { lost, refuses }) {
            assert!(Instant::now() < deadline, "{:?}", self.output.status());
            thread::sleep(Duration::from_millis(1));
        }
    }
}

fn broken() -> io::Result<usize> {
    Err(ErrorKind::StorageFull.into())
}

const ALL: io::Result<usize> = Ok(usize::MAX);

#[test]
fn an_output_that_takes_nothing_holds_up_no_line_and_tells_those_that_are_lost_in_their_place() {
    let rig = Rig::new();
    let line = format!("{}\n", "x".repeat(1023));
    let numbered = |number: usize| format!("{number:06}{}", &line[6..]);
    let all = 3_000;
    // The output has the first one, and does not take it.
    rig.log(&numbered(0));
    while !rig.output.queue.lock().waiting.is_empty() {
        thread::yield_now();
    }
    for number in 1..all {
        rig.log(&numbered(number));
    }
    let kept = usize::try_from(WAITING_MAX).unwrap() / line.len();
    let lost = (all - kept) as u64;
    let refuses = true;
    assert_eq!(rig.output.status(), LogStatus { lost, refuses });
    rig.answers([ALL, ALL, ALL]);
    let told = format!("{lost} lost\n");
    let text = rig.has(&told);
    let expected: String = (0..kept).map(numbered).collect();
    assert!(text == expected + &told, "{} bytes", text.len());
    rig.loses(lost, false);
    rig.log("after\n");
    rig.answers([ALL]);
    assert_eq!(rig.has("after\n"), "after\n");
}

#[test]
fn an_output_that_fails_is_tried_again_and_its_lines_stay_whole() {
    let rig = Rig::new();
    rig.log("one\ntwo\nthree\n");
    rig.answers([Ok(6), broken()]);
    rig.loses(2, true);
    // It is tried again although nothing comes.
    rig.answers([broken()]);
    rig.loses(2, true);
    rig.answers([ALL, ALL]);
    assert_eq!(rig.has("lost\n"), "one\ntw\n2 lost\n");
    rig.loses(2, false);
    rig.log("four\n");
    rig.answers([Err(ErrorKind::Interrupted.into()), Ok(2), ALL]);
    assert_eq!(rig.has("four\n"), "four\n");
}

#[test]
fn an_output_that_fails_refuses_lines_until_it_takes_one_if_the_level_hides_the_loss() {
    let rig = Rig::with_loss_line(|_| Vec::new());
    rig.log("one\n");
    rig.answers([broken()]);
    rig.loses(1, true);
    thread::sleep(2 * RETRY);
    rig.loses(1, true);
    rig.log("two\n");
    rig.answers([ALL]);
    assert_eq!(rig.has("two\n"), "two\n");
    rig.loses(1, false);
}

#[test]
fn a_stuck_output_is_waited_for_once() {
    let rig = Rig::new();
    let (sender, is_done) = mpsc::channel();
    let output = Arc::clone(&rig.output);
    thread::spawn(move || {
        for _ in 0..200 {
            output.print(b"mistake\n");
        }
        sender.send(()).unwrap();
    });
    is_done.recv_timeout(Duration::from_secs(30)).unwrap();
    rig.answers((0..200).map(|_| ALL));
    rig.has(&"mistake\n".repeat(199));
}

#[test]
fn an_output_that_would_block_is_waited_for_and_loses_nothing() {
    let rig = Rig::new();
    rig.log("one\n");
    rig.answers([Err(ErrorKind::WouldBlock.into()), Ok(1), ALL]);
    assert_eq!(rig.has("one\n"), "one\n");
    rig.loses(0, false);
}

#[test]
fn a_flush_waits_for_the_last_line_and_a_stuck_output_ends_the_wait() {
    let rig = Rig::new();
    rig.log("one\n");
    rig.output.flush(Duration::from_millis(10));
    assert!(rig.taken.try_recv().is_err());
    rig.answers([ALL]);
    assert_eq!(rig.has("one\n"), "one\n");
    while rig.output.queue.lock().ended == 0 {
        thread::yield_now();
    }
    rig.log("two\n");
    rig.answers([ALL]);
    rig.output.flush(Duration::from_secs(30));
    // No wait: a flush returns after the line is written.
    assert_eq!(rig.taken.try_recv().unwrap(), b"two\n");
    rig.output.flush(Duration::from_secs(30));
}

#[test]
fn lines_of_several_threads_stay_whole_and_each_thread_s_in_order() {
    let rig = Rig::new();
    rig.answers((0..10_000).map(|_| ALL));
    thread::scope(|scope| {
        for name in ["a", "b", "c"] {
            let rig = &rig.output;
            scope.spawn(move || {
                for number in 0..1_000 {
                    let mut output = &**rig;
                    output
                        .write_all(format!("{name} {number}\n").as_bytes())
                        .unwrap();
                }
            });
        }
    });
    rig.output.flush(Duration::from_secs(30));
    let text: Vec<u8> = rig.taken.try_iter().flatten().collect();
    let text = String::from_utf8(text).unwrap();
    for name in ["a", "b", "c"] {
        let own = text.lines().filter_map(|line| line.strip_prefix(name));
        let numbers: Vec<usize> = own.map(|rest| rest.trim().parse().unwrap()).collect();
        assert_eq!(numbers, (0..1_000).collect::<Vec<_>>());
    }
    assert_eq!(text.lines().count(), 3_000);
}
