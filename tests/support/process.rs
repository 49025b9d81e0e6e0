//! Child processes that end with the test binary, even if it is killed.

use std::{
    fs,
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        LazyLock, Mutex,
        atomic::{AtomicU16, Ordering::Relaxed},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use std::os::unix::process::CommandExt as _;

/// A free port of 127.0.0.1 for a server. It is below the ports that the system gives to clients,
/// so no connection takes it before the server starts or while it is down.
pub fn free_port() -> u16 {
    const PORTS: std::ops::Range<u16> = 10_000..32_000;
    static NEXT: LazyLock<AtomicU16> = LazyLock::new(|| AtomicU16::new(fastrand::u16(..)));
    loop {
        let port = PORTS.start + NEXT.fetch_add(1, Relaxed) % (PORTS.end - PORTS.start);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

type SpawnRequest = (Command, mpsc::Sender<std::io::Result<Child>>);

/// The kernel ends a child when the *thread* that started it ends. Test threads end with their
/// test, so one thread that lives as long as the binary starts all children.
static STARTER: LazyLock<Mutex<mpsc::Sender<SpawnRequest>>> = LazyLock::new(|| {
    let (requests, inbox) = mpsc::channel::<SpawnRequest>();
    thread::spawn(move || {
        for (mut command, started) in inbox {
            started.send(command.spawn()).ok();
        }
    });
    Mutex::new(requests)
});

/// Starts `program` in its own process group. It is killed when the test binary ends. `set_up`
/// configures arguments, environment and stdio; the caller keeps the `Child`.
pub fn start(program: &str, set_up: impl FnOnce(&mut Command)) -> std::io::Result<Child> {
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--", program])
        .process_group(0);
    set_up(&mut command);
    let (started, answer) = mpsc::channel();
    STARTER
        .lock()
        .expect("the lock is never held over a panic")
        .send((command, started))
        .expect("the starter lives");
    answer.recv().expect("the starter answers")
}

/// Sends `signal` ("TERM", "STOP", "CONT", "KILL") to one process. For "STOP" it returns when all
/// threads have stopped: the others run on until the thread that takes the signal gets a processor.
pub fn signal(child: &Child, signal: &str) {
    let status = Command::new("kill")
        .args([&format!("-{signal}"), &child.id().to_string()])
        .status();
    assert!(
        status.expect("kill runs").success(),
        "kill -{signal} {}",
        child.id()
    );
    let deadline = Instant::now() + Duration::from_secs(30);
    while signal == "STOP" && !has_stopped(child.id()) {
        assert!(
            Instant::now() < deadline,
            "process {} does not stop",
            child.id()
        );
        thread::sleep(Duration::from_millis(1));
    }
}

fn has_stopped(process: u32) -> bool {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("a child's threads");
    let mut states =
        tasks.map(|task| fs::read_to_string(task.expect("a thread").path().join("stat")));
    // The state follows the name in parentheses. A thread that has ended has no file.
    states.all(|stat| {
        stat.ok()
            .and_then(|stat| Some(stat.rsplit_once(") ")?.1.starts_with('T')))
            .unwrap_or(true)
    })
}

/// Whether the thread of that name has anything to do. One that was woken has, before it runs; one
/// of a process that has ended has nothing.
pub fn thread_is_busy(child: &Child, name: &str) -> bool {
    let Ok(tasks) = fs::read_dir(format!("/proc/{}/task", child.id())) else {
        return false;
    };
    let mut stats =
        tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("stat")).ok());
    stats.any(|stat| {
        let after = stat.split_once(&format!("({name}) "));
        after.is_some_and(|(_, state)| state.starts_with(['R', 'D']))
    })
}

/// Runs the program with these arguments and no environment. Returns the exit status, the standard
/// output and the standard error.
pub async fn waypost(arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_waypost"));
    command.args(arguments).env_clear().stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.output())
        .await
        .unwrap()
        .expect("it runs");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

/// A memory limit, page cache included, beyond which the kernel ends a process: a Linux control
/// group.
pub struct MemoryLimit(PathBuf);

impl MemoryLimit {
    /// `None` without root or a writable hierarchy.
    pub fn new(bytes: u64) -> Option<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let group = |prefix: &str| {
            own.lines()
                .find_map(|line| line.split_once(prefix))
                .map(|(_, path)| path.to_owned())
        };
        let versions = [
            (":memory:", "/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            ("0::", "/sys/fs/cgroup", "memory.max"),
        ];
        versions.into_iter().find_map(|(prefix, root, file)| {
            let name = format!("waypost-test-{:x}", fastrand::u64(..));
            let folder = PathBuf::from(format!("{root}{}/{name}", group(prefix)?));
            fs::create_dir(&folder).ok()?;
            let limit = Self(folder);
            fs::write(limit.0.join(file), bytes.to_string()).ok()?;
            Some(limit)
        })
    }

    /// Limits `child` from now on.
    pub fn add(&self, child: &Child) {
        fs::write(self.0.join("cgroup.procs"), child.id().to_string()).expect("the group is ours");
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        // An empty folder may stay.
        fs::remove_dir(&self.0).ok();
    }
}
