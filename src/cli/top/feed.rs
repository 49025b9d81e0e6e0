//! The events that `top` hears from a node, for as long as the command runs.

use std::{rc::Rc, time::Duration};

use serde_json::Value;
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

use crate::{cli::admin::AdminClient, summary::NodeSummary};

/// A node that says nothing for longer is away: it tells a status each second.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// The time between two attempts.
const AGAIN_AFTER: Duration = Duration::from_millis(500);

/// News from a node, or about it.
#[derive(Debug)]
pub enum NodeNews {
    Status(Box<NodeSummary>),
    Change(Value),
    /// Why nothing is heard.
    Lost(String),
    /// The answer to an order, or why there is none.
    Told(Result<String, String>),
    /// Its dead letters, as `GET /api/dead` lists them.
    Letters(Result<Value, String>),
}

/// Tells the events of the node `at`, also of its next runs. Ends with the reader of `news`.
pub async fn follow(node: Rc<AdminClient>, at: usize, news: mpsc::Sender<(usize, NodeNews)>) {
    let mut last_id = None;
    loop {
        fail::fail_point!("top-follow");
        let why = match hear(&node, at, &mut last_id, &news).await {
            Ok(()) => return,
            Err(why) => why,
        };
        if news.send((at, NodeNews::Lost(why))).await.is_err() {
            return;
        }
        sleep(AGAIN_AFTER).await;
    }
}

/// Reads one stream to its end, which is an error unless nobody reads `news`.
async fn hear(
    node: &AdminClient,
    at: usize,
    last_id: &mut Option<String>,
    news: &mpsc::Sender<(usize, NodeNews)>,
) -> Result<(), String> {
    let from = last_id.as_deref();
    let mut events = node.events("/api/events", from).await?;
    loop {
        let next = timeout(SILENCE_MAX, events.next()).await;
        let event = next.map_err(|_| format!("silent for {SILENCE_MAX:?}"))??;
        if event.id.is_some() {
            *last_id = event.id;
        }
        let read = || serde_json::from_str::<Value>(&event.data);
        let heard = match event.name.as_str() {
            "status" => {
                serde_json::from_str(&event.data).map(|status| NodeNews::Status(Box::new(status)))
            }
            "change" => read().map(NodeNews::Change),
            _ => continue,
        };
        let heard = heard.map_err(|why| format!("not an answer of a node: {why}"))?;
        if news.send((at, heard)).await.is_err() {
            return Ok(());
        }
    }
}
