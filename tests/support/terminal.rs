//! A program in a terminal: a pseudo-terminal, and the screen that what it writes makes.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    num::NonZeroU16,
    process::{Child, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread,
};

use rustix::{
    pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize},
};

use crate::support::{eventually, node::PATIENCE, process};

/// "Synchronized output", as terminals call it.
const FRAME_BEGINS: &[u8] = b"\x1b[?2026h";
const FRAME_ENDS: &[u8] = b"\x1b[?2026l";

pub struct Terminal {
    program: Child,
    /// The side of the person.
    own: File,
    /// The side of the program.
    device: File,
    screen: Arc<Mutex<vt100::Parser>>,
}

impl Terminal {
    /// Runs the program with these arguments and variables in a terminal of so many columns and
    /// rows.
    pub fn run(
        arguments: &[&str],
        variables: &[(&str, &str)],
        (columns, rows): (u16, u16),
    ) -> Self {
        let own = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        unlockpt(&own).expect("it is ours");
        let device = ioctl_tiocgptpeer(&own, OpenptFlags::RDWR | OpenptFlags::NOCTTY);
        let (own, device) = (File::from(own), File::from(device.expect("its device")));
        set_size(&device, columns, rows);
        let stdio = || Stdio::from(device.try_clone().expect("a descriptor"));
        let program = process::start(env!("CARGO_BIN_EXE_waypost"), |command| {
            command
                .args(arguments)
                .env_clear()
                .env("TERM", "xterm-256color")
                .envs(variables.iter().copied())
                .stdin(stdio())
                .stdout(stdio())
                .stderr(stdio());
        });
        let screen = vt100::Parser::new(size(rows), size(columns), 0);
        let screen = Arc::new(Mutex::new(screen));
        let (shown, mut written) = (Arc::clone(&screen), own.try_clone().expect("a descriptor"));
        // It ends once no program has the device.
        thread::spawn(move || {
            let (mut piece, mut unseen) = ([0; 4096], Vec::new());
            while let Ok(length @ 1..) = written.read(&mut piece) {
                unseen.extend_from_slice(&piece[..length]);
                // A frame is seen once it is whole. The next piece may have the rest of its mark.
                let last = |mark| memchr::memmem::rfind(&unseen, mark);
                let is_cut = (1..FRAME_BEGINS.len()).any(|n| unseen.ends_with(&FRAME_BEGINS[..n]));
                if !is_cut && last(FRAME_BEGINS) <= last(FRAME_ENDS) {
                    shown.lock().unwrap().process(&unseen);
                    unseen.clear();
                }
            }
        });
        Self {
            program: program.expect("the program starts"),
            own,
            device,
            screen,
        }
    }

    /// The text of the screen, a line for each row.
    pub fn text(&self) -> String {
        let parser = self.screen.lock().unwrap();
        let screen = parser.screen();
        let (_, columns) = screen.size();
        let rows: Vec<_> = screen.rows(0, columns.get()).collect();
        rows.join("\n")
    }

    /// Reads something of the screen.
    pub fn read<T>(&self, read: impl FnOnce(&vt100::Screen) -> T) -> T {
        read(self.screen.lock().unwrap().screen())
    }

    /// Waits until the screen is as wanted, and returns its text.
    pub async fn until(&self, what: &str, is_so: impl Fn(&str) -> bool) -> String {
        let patience = PATIENCE;
        let mut wait = crate::support::Wait::new(patience);
        loop {
            let text = self.text();
            if is_so(&text) {
                return text;
            }
            assert!(
                !wait.is_over(|| what),
                "not within {patience:?}: {what}, but\n{text}"
            );
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    /// Waits until the screen shows this.
    pub async fn shows(&self, wanted: &str) -> String {
        self.until(wanted, |text| text.contains(wanted)).await
    }

    /// Presses keys.
    pub fn press(&mut self, keys: &str) {
        self.own.write_all(keys.as_bytes()).expect("it is there");
    }

    pub fn resize(&self, columns: u16, rows: u16) {
        let mut screen = self.screen.lock().unwrap();
        screen.set_size(size(rows), size(columns));
        set_size(&self.device, columns, rows);
        drop(screen);
        // It is of no session, so the kernel tells nobody.
        self.signal("WINCH");
    }

    pub fn signal(&self, signal: &str) {
        process::signal(&self.program, signal);
    }

    pub async fn ended(&mut self) -> ExitStatus {
        let program = &mut self.program;
        eventually("the program ends", PATIENCE, async || {
            program.try_wait().expect("a child's status")
        })
        .await
    }

    /// The terminal is as a shell needs it: lines are edited and echoed, what was on the screen is
    /// there again, and the cursor is seen.
    pub fn is_restored(&self) -> bool {
        let modes = tcgetattr(&self.device).expect("a terminal").local_modes;
        let has_lines = modes.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG);
        has_lines && self.read(|screen| !screen.alternate_screen() && !screen.hide_cursor())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It may have ended already.
        self.program.kill().ok();
        self.program.wait().ok();
        // The harness shows what a test prints only if the test fails.
        if thread::panicking() {
            println!("the screen:\n{}", self.text());
        }
    }
}

fn size(length: u16) -> NonZeroU16 {
    NonZeroU16::new(length).expect("a screen has rows and columns")
}

fn set_size(device: &File, columns: u16, rows: u16) {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(device, size).expect("a terminal");
}
