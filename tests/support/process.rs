//! Child processes that die with the test binary, however it ends.

use std::{
    net::TcpListener,
    process::{Child, Command},
    sync::{LazyLock, Mutex, mpsc},
};

use std::os::unix::process::CommandExt as _;

/// A port of 127.0.0.1 that nobody listens on. The system hands it out again late, so a server may bind it next.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("loopback has free ports").port()
}

type Order = (Command, mpsc::Sender<std::io::Result<Child>>);

/// The kernel ends a child when the *thread* that started it ends, and test threads end with their test; so one thread
/// that lives as long as the binary starts them all.
static STARTER: LazyLock<Mutex<mpsc::Sender<Order>>> = LazyLock::new(|| {
    let (orders, inbox) = mpsc::channel::<Order>();
    std::thread::spawn(move || {
        for (mut command, started) in inbox {
            started.send(command.spawn()).ok();
        }
    });
    Mutex::new(orders)
});

/// Starts `program`, in a process group of its own, to be killed when the test binary ends. The caller keeps the `Child`
/// and may configure arguments, environment and stdio through `set_up`.
pub fn start(program: &str, set_up: impl FnOnce(&mut Command)) -> std::io::Result<Child> {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", program]).process_group(0);
    set_up(&mut command);
    let (started, answer) = mpsc::channel();
    STARTER.lock().expect("the lock is never held over a panic").send((command, started)).expect("the starter lives");
    answer.recv().expect("the starter answers")
}

/// Sends `signal` ("TERM", "STOP", "CONT", "KILL") to one process.
pub fn signal(child: &Child, signal: &str) {
    let status = Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status();
    assert!(status.expect("kill runs").success(), "kill -{signal} {}", child.id());
}
