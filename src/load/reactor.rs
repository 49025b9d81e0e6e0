//! The one thread of a load: its users, their waits and their sockets (the reactor pattern).
//!
//! A user is a future that nobody wakes. The reactor polls it when its wait is over, when its socket has changed, and when the
//! load is stopped. While users rest, what a load costs is how often it is woken, because a processor that has slept finds nothing
//! in its caches: here when a record is answered, and when one can wait no longer for another's answer; with tokio's wheel
//! of timers once more in between.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    future::poll_fn,
    io::{self, ErrorKind, IoSlice, Read as _, Write as _},
    net::{Shutdown, SocketAddr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{
        Context,
        Poll::{self, Pending, Ready},
        Waker,
    },
    time::{Duration, Instant},
};

use mio::{Events, Interest, Token, event::Event, net::TcpStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// How many changes of sockets the kernel tells at a time.
const EVENTS: usize = 1024;

pub(super) type User<'u> = Pin<Box<dyn Future<Output = ()> + 'u>>;

pub(super) struct Reactor {
    kernel: RefCell<mio::Poll>,
    /// Of each user.
    sockets: Vec<Readiness>,
    /// When somebody is to be polled, and which user.
    waits: RefCell<BTreeSet<(Instant, usize)>>,
    /// How late a wait may end.
    slack: Duration,
    /// The user that is polled now.
    polled: Cell<usize>,
    stopped: Arc<AtomicBool>,
}

/// What a user's socket can do, until it refuses: the kernel tells of a change once.
#[derive(Default)]
struct Readiness {
    read: Cell<bool>,
    write: Cell<bool>,
    /// Its end has come, and stays readable.
    end: Cell<bool>,
}

impl Reactor {
    /// For so many users. What they rest ends early once it is `stopped`. A wait may last up to `slack` longer: each change of a
    /// socket ends one that is over, the oldest first.
    ///
    /// # Errors
    /// When the kernel has no descriptor left.
    pub fn new(users: usize, slack: Duration, stopped: Arc<AtomicBool>) -> io::Result<Self> {
        Ok(Self {
            kernel: RefCell::new(mio::Poll::new()?),
            sockets: (0..users).map(|_| Readiness::default()).collect(),
            waits: RefCell::default(),
            slack,
            polled: Cell::default(),
            stopped,
        })
    }

    /// Runs the users to their end, and calls `tick` at once and then each `period`. Whoever sets `stopped` is noticed within a
    /// `period`, and at once if it is a signal that this thread gets.
    ///
    /// # Errors
    /// When the kernel refuses to tell what has changed.
    pub fn run(
        &self,
        users: Vec<User<'_>>,
        period: Duration,
        mut tick: impl FnMut(),
    ) -> io::Result<()> {
        let mut users = Users {
            running: users.len(),
            all: users.into_iter().map(Some).collect(),
        };
        let mut events = Events::with_capacity(EVENTS);
        let (mut next_tick, mut is_stopped) = (Instant::now(), false);
        self.poll_all(&mut users);
        while users.running > 0 {
            let now = Instant::now();
            if next_tick <= now {
                next_tick = now + period;
                tick();
            }
            if !is_stopped && self.stopped.load(Relaxed) {
                is_stopped = true;
                self.poll_all(&mut users);
                continue;
            }
            self.sleep(&mut events, next_tick)?;
            // All first: what a socket could do does not count for the one that its user opens in its place.
            for event in &events {
                self.sockets[event.token().0].note(event);
            }
            for event in &events {
                self.poll_user(&mut users, event.token().0);
            }
            let now = Instant::now();
            // One for one: all that could go would be a burst, in which each waits for the others at the server.
            for _ in &events {
                self.poll_next_over(&mut users, now, Duration::ZERO);
            }
            while self.poll_next_over(&mut users, now, self.slack) {}
        }
        Ok(())
    }

    /// Until a socket has changed, waits are over, a signal comes, or `latest`.
    fn sleep(&self, events: &mut Events, latest: Instant) -> io::Result<()> {
        let end = self
            .waits
            .borrow()
            .first()
            .map_or(latest, |(end, _)| latest.min(*end + self.slack));
        match self
            .kernel
            .borrow_mut()
            .poll(events, Some(end.saturating_duration_since(Instant::now())))
        {
            Err(why) if why.kind() == ErrorKind::Interrupted => Ok(()),
            slept => slept,
        }
    }

    fn poll_all(&self, users: &mut Users<'_>) {
        for number in 0..users.all.len() {
            self.poll_user(users, number);
        }
    }

    fn poll_user(&self, users: &mut Users<'_>, number: usize) {
        let Some(user) = &mut users.all[number] else {
            return;
        };
        self.polled.set(number);
        if user
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()))
            .is_ready()
        {
            users.all[number] = None;
            users.running -= 1;
        }
    }

    /// Polls the user whose wait is over for the longest time, if it is by `late` at least; says whether there was one.
    fn poll_next_over(&self, users: &mut Users<'_>, now: Instant, late: Duration) -> bool {
        let first = self.waits.borrow().first().copied();
        let Some((end, number)) = first.filter(|(end, _)| *end + late <= now) else {
            return false;
        };
        self.waits.borrow_mut().remove(&(end, number));
        self.poll_user(users, number);
        true
    }

    /// Until then, or until the load is stopped.
    pub async fn rest(&self, end: Instant) {
        let mut until = self.until(end);
        poll_fn(|context| {
            if self.stopped.load(Relaxed) {
                Ready(())
            } else {
                Pin::new(&mut until).poll(context)
            }
        })
        .await;
    }

    /// Until then, or up to the slack longer. A user waits for one time only, whatever it does meanwhile.
    pub fn until(&self, end: Instant) -> Until<'_> {
        Until {
            reactor: self,
            end,
            number: None,
        }
    }

    /// The only socket of the user that asks for it.
    pub async fn connect(&self, address: SocketAddr) -> io::Result<TcpSocket<'_>> {
        let number = self.polled.get();
        let readiness = &self.sockets[number];
        for can in [&readiness.read, &readiness.write, &readiness.end] {
            can.set(false);
        }
        let mut stream = TcpStream::connect(address)?;
        let changes = Interest::READABLE | Interest::WRITABLE;
        self.kernel
            .borrow()
            .registry()
            .register(&mut stream, Token(number), changes)?;
        poll_fn(|_| {
            if readiness.write.get() {
                Ready(())
            } else {
                Pending
            }
        })
        .await;
        if let Some(why) = stream.take_error()? {
            return Err(why);
        }
        stream.set_nodelay(true)?;
        Ok(TcpSocket { stream, readiness })
    }
}

struct Users<'u> {
    /// Nothing where one has ended.
    all: Vec<Option<User<'u>>>,
    running: usize,
}

impl Readiness {
    fn note(&self, event: &Event) {
        let is_broken = event.is_error();
        if event.is_read_closed() || is_broken {
            self.end.set(true);
        }
        if event.is_readable() || self.end.get() {
            self.read.set(true);
        }
        if event.is_writable() || event.is_write_closed() || is_broken {
            self.write.set(true);
        }
    }
}

/// Resolves at its end.
pub(super) struct Until<'r> {
    reactor: &'r Reactor,
    end: Instant,
    /// Who waits, once it does.
    number: Option<usize>,
}

impl Future for Until<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        if self.end <= Instant::now() {
            return Ready(());
        }
        if self.number.is_none() {
            let number = self.reactor.polled.get();
            self.reactor.waits.borrow_mut().insert((self.end, number));
            self.number = Some(number);
        }
        Pending
    }
}

impl Drop for Until<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.reactor.waits.borrow_mut().remove(&(self.end, number));
        }
    }
}

/// A TCP connection of one user.
pub(super) struct TcpSocket<'r> {
    stream: TcpStream,
    readiness: &'r Readiness,
}

impl TcpSocket<'_> {
    fn write(
        &mut self,
        write: impl FnOnce(&mut TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        if !self.readiness.write.get() {
            return Pending;
        }
        match write(&mut self.stream) {
            Err(why) if why.kind() == ErrorKind::WouldBlock => {
                self.readiness.write.set(false);
                Pending
            }
            written => Ready(written),
        }
    }
}

impl AsyncRead for TcpSocket<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Readiness { read, end, .. } = self.readiness;
        if !read.get() {
            return Pending;
        }
        let room = into.initialize_unfilled();
        let wanted = room.len();
        match self.stream.read(room) {
            Ok(got) => {
                // There was no more; of what comes next the kernel tells.
                if 0 < got && got < wanted {
                    read.set(end.get());
                }
                into.advance(got);
                Ready(Ok(()))
            }
            Err(why) if why.kind() == ErrorKind::WouldBlock => {
                read.set(false);
                Pending
            }
            Err(why) => Ready(Err(why)),
        }
    }
}

impl AsyncWrite for TcpSocket<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.write(|stream| stream.write(bytes))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.write(|stream| stream.write_vectored(bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Ready(self.stream.shutdown(Shutdown::Write))
    }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, sync::mpsc, thread};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const PERIOD: Duration = Duration::from_millis(20);

    #[test]
    fn each_rests_until_its_time_and_whose_rest_ends_first_runs_first() {
        let reactor = Reactor::new(4, Duration::ZERO, Arc::default()).unwrap();
        let (reactor, began, ended) = (&reactor, Instant::now(), &RefCell::new(Vec::new()));
        let user = |(number, ms): (usize, u64)| {
            let rest = async move {
                for ms in [ms, ms + 100] {
                    let end = began + Duration::from_millis(ms);
                    reactor.rest(end).await;
                    assert!(Instant::now() >= end, "{number} at {ms} ms");
                }
                ended.borrow_mut().push(number);
            };
            Box::pin(rest) as User<'_>
        };
        reactor
            .run(
                [60, 0, 90, 30].into_iter().enumerate().map(user).collect(),
                PERIOD,
                || (),
            )
            .unwrap();
        assert_eq!(*ended.borrow(), [1, 3, 0, 2]);
        assert!(reactor.waits.borrow().is_empty());
    }

    #[test]
    fn who_may_be_late_goes_when_a_socket_changes_one_for_one() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (took, taken) = mpsc::channel();
        // Nobody's is over when it connects.
        let first = Instant::now() + 10 * PERIOD;
        let second = first + PERIOD;
        let answer = thread::spawn(move || {
            let mut socket = listener.accept().unwrap().0;
            thread::sleep(second.saturating_duration_since(Instant::now()));
            for _ in 0..2 {
                socket.write_all(b"x").unwrap();
                taken.recv().unwrap();
            }
        });
        let reactor = Reactor::new(3, 500 * PERIOD, Arc::default()).unwrap();
        let (reactor, ran) = (&reactor, &RefCell::new(Vec::new()));
        let answered = async move {
            let mut socket = reactor.connect(address).await.unwrap();
            for _ in 0..2 {
                assert_eq!(socket.read(&mut [0; 2]).await.unwrap(), 1);
                ran.borrow_mut().push("answered");
                took.send(()).unwrap();
            }
        };
        let resting = |name, end| async move {
            reactor.rest(end).await;
            ran.borrow_mut().push(name);
        };
        let users: Vec<User<'_>> = vec![
            Box::pin(answered),
            Box::pin(resting("second", second)),
            Box::pin(resting("first", first)),
        ];
        reactor.run(users, PERIOD, || ()).unwrap();
        answer.join().unwrap();
        assert_eq!(*ran.borrow(), ["answered", "first", "answered", "second"]);
    }

    #[test]
    fn who_may_be_late_stays_as_long_if_no_socket_changes() {
        let slack = 3 * PERIOD;
        let reactor = Reactor::new(1, slack, Arc::default()).unwrap();
        let end = Instant::now() + PERIOD;
        let user = async {
            reactor.rest(end).await;
            assert!(Instant::now() >= end + slack, "no socket has changed");
        };
        reactor.run(vec![Box::pin(user)], PERIOD, || ()).unwrap();
    }

    #[test]
    fn a_load_that_is_stopped_ends_rests_and_no_limit() {
        let stopped = Arc::new(AtomicBool::new(false));
        let reactor = Reactor::new(2, Duration::ZERO, Arc::clone(&stopped)).unwrap();
        let (end, far) = (
            Instant::now() + 2 * PERIOD,
            Instant::now() + Duration::from_hours(1),
        );
        let patient = async {
            reactor.rest(far).await;
            let limit = Instant::now() + 2 * PERIOD;
            reactor.until(limit).await;
            assert!(Instant::now() >= limit);
        };
        let stop = async {
            reactor.until(end).await;
            stopped.store(true, Relaxed);
        };
        let mut ticks = 0;
        reactor
            .run(vec![Box::pin(patient), Box::pin(stop)], PERIOD, || {
                ticks += 1
            })
            .unwrap();
        assert!(Instant::now() < far && reactor.waits.borrow().is_empty());
        assert!(ticks > 1, "{ticks}");
    }

    #[test]
    fn a_socket_takes_and_brings_more_than_the_kernel_holds_and_then_its_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let echo = thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let mut all = Vec::new();
            socket.read_to_end(&mut all).unwrap();
            socket.write_all(&all).unwrap();
        });
        let sent: Vec<_> = (0..=u8::MAX).cycle().take(16 << 20).collect();
        let reactor = Reactor::new(1, Duration::ZERO, Arc::default()).unwrap();
        let user = async {
            let mut socket = reactor.connect(address).await.unwrap();
            socket.write_all(&sent).await.unwrap();
            socket.shutdown().await.unwrap();
            let mut brought = Vec::new();
            socket.read_to_end(&mut brought).await.unwrap();
            assert!(brought == sent, "{} bytes of {}", brought.len(), sent.len());
        };
        reactor.run(vec![Box::pin(user)], PERIOD, || ()).unwrap();
        echo.join().unwrap();
    }

    #[test]
    fn an_end_that_has_come_with_the_last_bytes_is_read_after_them() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let serve = thread::spawn(move || listener.accept().unwrap().0.write_all(b"x").unwrap());
        let reactor = Reactor::new(1, Duration::ZERO, Arc::default()).unwrap();
        let user = async {
            let mut socket = reactor.connect(address).await.unwrap();
            serve.join().unwrap();
            // The kernel tells of both at once.
            reactor.until(Instant::now() + PERIOD).await;
            let mut brought = Vec::new();
            tokio::select! {
                biased;
                read = socket.read_to_end(&mut brought) => assert_eq!((read.unwrap(), &*brought), (1, &b"x"[..])),
                () = reactor.until(Instant::now() + 100 * PERIOD) => panic!("no end"),
            }
        };
        reactor.run(vec![Box::pin(user)], PERIOD, || ()).unwrap();
    }

    #[test]
    fn who_connects_to_nobody_is_told() {
        let address = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let reactor = Reactor::new(1, Duration::ZERO, Arc::default()).unwrap();
        let user = async {
            let failure = reactor
                .connect(address)
                .await
                .err()
                .expect("nobody listens");
            assert_eq!(failure.kind(), ErrorKind::ConnectionRefused);
        };
        reactor.run(vec![Box::pin(user)], PERIOD, || ()).unwrap();
    }
}
