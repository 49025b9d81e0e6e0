//! `waypost top`: nodes in a terminal, live.

mod columns;
mod draw;
mod feed;
mod node_lines;
mod pages;
mod state;
mod theme;

use std::{
    io::{self, IsTerminal as _},
    panic::resume_unwind,
    process::ExitCode,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use ratatui::{
    DefaultTerminal,
    crossterm::{
        event::{self, Event, KeyEventKind},
        execute, queue,
        terminal::{BeginSynchronizedUpdate, EndSynchronizedUpdate},
    },
};
use serde_json::json;
use tokio::{
    sync::mpsc,
    task::{JoinError, JoinSet},
    time::interval,
};

use self::{
    draw::draw,
    feed::{NodeNews, follow},
    state::{LaneOrder, TopState, Wanted},
    theme::Theme,
};
use super::{
    admin::{AccessArgs, AdminClient},
    output::failed,
    signals::Signals,
};

/// The ages on the screen change this often.
const TICK: Duration = Duration::from_millis(500);
/// How often the thread of the keys looks whether the command has ended.
const KEY_PATIENCE: Duration = Duration::from_millis(100);
/// News and keys that wait to be shown.
const WAITING_MAX: usize = 64;
/// Dead letters that are shown.
const LETTERS_SHOWN: usize = 200;

const EXAMPLES: &str = "\
Examples:
  waypost top
  waypost top --admin http://10.0.0.7:8001 --admin http://10.0.0.8:8001

Keys: ? shows them all; q ends it.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The admin address of a node; may be given again [default: `http://127.0.0.1:8001`]
    #[arg(long = "admin", help_heading = "Node", value_name = "URL")]
    admins: Vec<String>,
    #[command(flatten)]
    access: AccessArgs,
}

/// Shows the nodes until a key or a signal ends it. The terminal is then as it was, also after a
/// panic.
pub async fn top(args: Args) -> Result<(), ExitCode> {
    let nodes = if args.admins.is_empty() {
        vec![args.access.client(None)?]
    } else {
        let clients = args.admins.iter().map(|url| args.access.client(Some(url)));
        clients.collect::<Result<_, _>>()?
    };
    if !io::stdout().is_terminal() {
        let why = "the output is no terminal; `waypost status` prints the state of a node";
        return Err(failed(why));
    }
    let mut signals = Signals::take()?;
    // It restores the terminal in a panic.
    let mut terminal =
        ratatui::try_init().map_err(|why| failed(format_args!("the terminal: {why}")))?;
    let _restored = Restored;
    let nodes: Vec<_> = nodes.into_iter().map(Rc::new).collect();
    let (news, mut heard) = mpsc::channel(WAITING_MAX);
    let mut tasks = JoinSet::new();
    for (at, node) in nodes.iter().enumerate() {
        tasks.spawn_local(follow(Rc::clone(node), at, news.clone()));
    }
    let mut keys = Keys::read();
    let urls = nodes.iter().map(|node| node.url().to_owned());
    let mut state = TopState::new(urls.collect());
    let theme = Theme::of_environment();
    let mut ticks = interval(TICK);
    loop {
        fail::fail_point!("top");
        let shown = show(&mut terminal, &mut state, theme);
        shown.map_err(|why| failed(format_args!("the terminal: {why}")))?;
        let wanted = tokio::select! {
            // First: a panic has restored the terminal, so nothing more is drawn.
            biased;
            Some(ended) = tasks.join_next() => {
                go_on_with_panic(ended);
                Wanted::Nothing
            }
            _ = signals.next() => return Ok(()),
            event = keys.next() => match event {
                // Its terminal has gone.
                None => return Ok(()),
                Some(Event::Key(key)) if key.kind == KeyEventKind::Press => {
                    state.told = None;
                    state.press(key)
                }
                // A new size is drawn.
                Some(_) => Wanted::Nothing,
            },
            Some((at, news)) = heard.recv() => {
                state.hear(at, news);
                Wanted::Nothing
            }
            _ = ticks.tick() => Wanted::Nothing,
        };
        match wanted {
            Wanted::Nothing => {}
            Wanted::Quit => return Ok(()),
            Wanted::Order(order) => {
                tasks.spawn_local(give(Rc::clone(&nodes[order.of.node]), order, news.clone()));
            }
            Wanted::Letters(at) => {
                tasks.spawn_local(ask_letters(Rc::clone(&nodes[at]), at, news.clone()));
            }
        }
    }
}

/// A panic of a task is one of the command.
fn go_on_with_panic(ended: Result<(), JoinError>) {
    if let Err(Ok(panic)) = ended.map_err(JoinError::try_into_panic) {
        resume_unwind(panic);
    }
}

/// The terminal is as it was once this is dropped.
struct Restored;

impl Drop for Restored {
    fn drop(&mut self) {
        // If it has gone, there is nothing to restore.
        ratatui::try_restore().ok();
    }
}

/// The keys, which a thread reads: reading them blocks.
struct Keys {
    events: mpsc::Receiver<Event>,
    has_ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Keys {
    fn read() -> Self {
        let (sender, events) = mpsc::channel(WAITING_MAX);
        let has_ended = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&has_ended);
        let thread = thread::spawn(move || {
            while !ended.load(Relaxed) {
                fail::fail_point!("top-keys");
                let event = match event::poll(KEY_PATIENCE) {
                    Ok(true) => event::read(),
                    Ok(false) => continue,
                    Err(why) => Err(why),
                };
                if event.is_err() || event.is_ok_and(|event| sender.blocking_send(event).is_err()) {
                    return;
                }
            }
        });
        Self {
            events,
            has_ended,
            thread: Some(thread),
        }
    }

    /// The next one; `None` if there are no more. A panic of the thread is one of the command.
    async fn next(&mut self) -> Option<Event> {
        let event = self.events.recv().await;
        // It has dropped the sender, so it ends.
        if event.is_none()
            && let Some(thread) = self.thread.take()
            && let Err(panic) = thread.join()
        {
            resume_unwind(panic);
        }
        event
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        self.has_ended.store(true, Relaxed);
    }
}

fn show(terminal: &mut DefaultTerminal, state: &mut TopState, theme: Theme) -> io::Result<()> {
    let _whole = WholeFrame::begin()?;
    terminal.draw(|frame| draw(frame, state, theme))?;
    Ok(())
}

/// While it lives, a terminal that can shows nothing of what is written, and then all at once.
struct WholeFrame;

impl WholeFrame {
    fn begin() -> io::Result<Self> {
        queue!(io::stdout(), BeginSynchronizedUpdate)?;
        Ok(Self)
    }
}

impl Drop for WholeFrame {
    fn drop(&mut self) {
        // The next frame fails too, and tells why.
        execute!(io::stdout(), EndSynchronizedUpdate).ok();
    }
}

type NewsSender = mpsc::Sender<(usize, NodeNews)>;

/// Gives the order, and tells its outcome.
async fn give(node: Rc<AdminClient>, order: LaneOrder, news: NewsSender) {
    let LaneOrder { of, action } = order;
    let lane = &of.lane;
    let path = format!("/api/lanes/{lane}/{action}");
    let answer = node.ask(&path, Some(&json!({}))).await;
    let told = answer.map(|_| format!("{action} of lane {lane}: done"));
    news.send((of.node, NodeNews::Told(told))).await.ok();
}

async fn ask_letters(node: Rc<AdminClient>, at: usize, news: NewsSender) {
    let path = format!("/api/dead?limit={LETTERS_SHOWN}&records=false");
    let letters = node.ask(&path, None).await;
    news.send((at, NodeNews::Letters(letters))).await.ok();
}
