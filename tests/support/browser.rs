//! A headless Chromium, driven by `tests/browser/driver.mjs`.

use std::{
    env, fs,
    io::Write as _,
    path::Path,
    process::{Child, ChildStdin, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines},
    net::unix::pipe,
};

use super::{node::Node, process};

/// The packages that `tests/run` installs.
const MODULES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/browser");
const DRIVER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/browser/driver.mjs");
const CHROMIUM: &str = "/usr/bin/chromium";
const NODE_JS: [&str; 2] = ["/usr/bin/node", "/usr/local/bin/node"];
/// How long a page may take for what it does at once on an idle machine.
pub const PATIENCE: Duration = Duration::from_mins(1);

pub struct Browser {
    driver: Child,
    orders: ChildStdin,
    answers: Lines<BufReader<pipe::Receiver>>,
}

/// The looks of a window.
#[derive(Clone, Copy)]
pub struct Window {
    pub width: u32,
    pub scheme: &'static str,
    pub scripts: bool,
}

impl Window {
    pub const USUAL: Self = Self {
        width: 1440,
        scheme: "light",
        scripts: true,
    };
}

/// Tabs that share what a browser keeps for a user.
#[derive(Clone, Copy)]
pub struct Context(u64);

/// A tab.
#[derive(Clone, Copy)]
pub struct Page(u64);

/// The part of a page that is in a picture.
#[derive(Clone, Copy)]
pub enum Picture {
    Whole,
    /// So many pixels from its top.
    Top(u32),
}

impl Browser {
    /// `None`, after a line that names what is missing, if this machine has no browser. Panics
    /// instead with `CI=true`.
    pub fn start() -> Option<Self> {
        let node = NODE_JS.into_iter().find(|path| Path::new(path).exists());
        let node = node.filter(|_| Path::new(CHROMIUM).exists() && Path::new(MODULES).exists());
        let Some(node) = node else {
            super::missing("Chromium, Node.js or playwright-core");
            return None;
        };
        let mut driver = process::start(node, |command| {
            command
                .args([DRIVER, MODULES, CHROMIUM])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped());
        })
        .expect("the driver starts");
        let orders = driver.stdin.take().expect("it is piped");
        let answers = driver.stdout.take().expect("it is piped");
        let answers = pipe::Receiver::from_owned_fd(answers.into()).expect("it is a pipe");
        Some(Self {
            driver,
            orders,
            answers: BufReader::new(answers).lines(),
        })
    }

    async fn order(&mut self, order: &str, mut members: Value) -> Result<Value, String> {
        members["order"] = order.into();
        writeln!(self.orders, "{members}").expect("the driver reads");
        let answer = self.answers.next_line().await.expect("a pipe");
        let answer = answer.unwrap_or_else(|| panic!("the driver ended at {members}"));
        let answer: Value = serde_json::from_str(&answer).expect("JSON");
        match answer.get("failed") {
            Some(why) => Err(format!("{members}: {why}")),
            None => Ok(answer["done"].clone()),
        }
    }

    async fn done(&mut self, order: &str, members: Value) -> Value {
        let done = self.order(order, members).await;
        done.unwrap_or_else(|why| panic!("{why}"))
    }

    pub async fn context(&mut self, window: Window) -> Context {
        let Window {
            width,
            scheme,
            scripts,
        } = window;
        let members = json!({"width": width, "height": 1000, "scheme": scheme, "scripts": scripts});
        let number = self.done("context", members).await;
        Context(number.as_u64().expect("a number"))
    }

    /// Opens the live page of a node.
    pub async fn open(&mut self, context: Context, node: &Node) -> Page {
        let url = format!("http://127.0.0.1:{}/", node.admin);
        let members = json!({"context": context.0, "url": url});
        let number = self.done("open", members).await;
        Page(number.as_u64().expect("a number"))
    }

    /// Opens a page with this content as if it came from `url`.
    pub async fn serve(&mut self, context: Context, url: &str, html: &str) -> Page {
        let members = json!({"context": context.0, "url": url, "html": html});
        let number = self.done("serve", members).await;
        Page(number.as_u64().expect("a number"))
    }

    /// The value of a script, of a promise what it resolves to.
    pub async fn evaluate(&mut self, page: Page, script: &str) -> Value {
        let members = json!({"page": page.0, "script": script});
        self.done("evaluate", members).await
    }

    /// The text of an element.
    pub async fn text(&mut self, page: Page, selector: &str) -> String {
        let selector = json!(selector);
        let script = format!("document.querySelector({selector}).textContent");
        let text = self.evaluate(page, &script).await;
        text.as_str().expect("a text").to_owned()
    }

    /// The value of a script once it is true.
    pub async fn wait(&mut self, page: Page, script: &str) -> Value {
        self.wait_for(page, script, PATIENCE).await
    }

    pub async fn wait_for(&mut self, page: Page, script: &str, patience: Duration) -> Value {
        let members = json!({"page": page.0, "script": script, "timeout": patience.as_millis()});
        match self.order("wait", members).await {
            Ok(value) => value,
            Err(why) => {
                let text = self.text(page, "body").await;
                panic!("{why}\nthe page says {text}")
            }
        }
    }

    /// Waits until an element has this text.
    pub async fn shows(&mut self, page: Page, selector: &str, text: &str) {
        let (selector, text) = (json!(selector), json!(text));
        let script = format!("document.querySelector({selector}).textContent === {text}");
        self.wait(page, &script).await;
    }

    pub async fn click(&mut self, page: Page, selector: &str) {
        let members = json!({"page": page.0, "selector": selector});
        self.done("click", members).await;
    }

    pub async fn fill(&mut self, page: Page, selector: &str, text: &str) {
        let members = json!({"page": page.0, "selector": selector, "text": text});
        self.done("fill", members).await;
    }

    pub async fn press(&mut self, page: Page, key: &str) {
        let members = json!({"page": page.0, "key": key});
        self.done("press", members).await;
    }

    /// Moves the mouse to a part of the width of an element.
    pub async fn hover(&mut self, page: Page, selector: &str, part: f64) {
        let members = json!({"page": page.0, "selector": selector, "part": part});
        self.done("hover", members).await;
    }

    pub async fn close(&mut self, page: Page) {
        self.done("close", json!({"page": page.0})).await;
    }

    /// The violations that axe-core finds.
    pub async fn violations(&mut self, page: Page) -> Value {
        self.done("violations", json!({"page": page.0})).await
    }

    /// Fails if a page has logged an error, or has asked another origin.
    pub async fn no_faults(&mut self) {
        let faults = self.done("faults", json!({})).await;
        assert_eq!(faults, json!([]));
    }

    /// Fails if anything that the page had shown has moved.
    pub async fn no_shift(&mut self, page: Page) {
        let shifts = self.evaluate(page, "window.shifts").await;
        assert_eq!(shifts, json!([]));
    }

    /// Saves a picture in the folder that the variable `PICTURES` names, if it is set.
    pub async fn picture(&mut self, page: Page, name: &str) {
        if let Ok(folder) = env::var("PICTURES") {
            fs::create_dir_all(&folder).expect("a folder");
            let path = Path::new(&folder).join(format!("{name}.png"));
            self.save(page, &path, Picture::Whole).await;
        }
    }

    /// Saves a picture.
    pub async fn save(&mut self, page: Page, path: &Path, part: Picture) {
        let height = match part {
            Picture::Whole => None,
            Picture::Top(height) => Some(height),
        };
        let members = json!({"page": page.0, "path": path, "height": height});
        self.done("picture", members).await;
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The browser ends with its driver.
        self.driver.kill().ok();
        self.driver.wait().ok();
    }
}
