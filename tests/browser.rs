//! The live page in a browser, while things happen to its node. `PICTURES=FOLDER` saves what it looks
//! like.

mod letters;
mod looks;
mod tabs;

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{
    api::Api,
    browser::{Browser, PATIENCE, Page, Window},
    eventually,
    lanes::{Lane as _, Nats, Pubsub, Rabbitmq, grpc_variables},
    node::Node,
    paced::PacedRecords,
    rig::Rig as _,
};

/// Records a second.
const PACE: f64 = 100.0;
/// How far a rate on the page may be from the ledger's.
const RATE_OFF: f64 = 0.05;
/// The text of the connection to the node.
const LIVE: &str = "document.querySelector('#live').textContent === 'Live'";

/// A load of that many records a second.
fn load(node: &Node) -> PacedRecords {
    PacedRecords::start(node, "paced", |_| PACE)
}

async fn grpc_node(api: &Api) -> Node {
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    node
}

/// The place of a lane in the status.
async fn place_of(node: &Node, lane: &str) -> usize {
    let status = node.status().await;
    let mut lanes = status["lanes"].as_array().expect("a list").iter();
    lanes
        .position(|found| found["lane"] == lane)
        .expect("a lane")
}

/// The text of the value at a JSON pointer of the status, as a script.
fn value(pointer: &str) -> String {
    format!("document.querySelector('[data-v=\"{pointer}\"]').textContent")
}

/// Waits until the node says that `condition` holds, and then until the page does.
async fn page_follows(
    browser: &mut Browser,
    page: Page,
    node: &Node,
    what: &str,
    condition: impl Fn(&Value) -> bool,
    on_page: &str,
) {
    eventually(what, PATIENCE, async || {
        condition(&node.status().await).then_some(())
    })
    .await;
    let began = Instant::now();
    browser.wait(page, on_page).await;
    println!("{what}: on the page after {:.0?}", began.elapsed());
}

/// Waits until the rates on the page are those of the ledger.
async fn rates_hold(browser: &mut Browser, page: Page, node: &Node) {
    let lanes = node.status().await["lanes"]
        .as_array()
        .expect("a list")
        .len();
    let of_lanes = (0..lanes)
        .flat_map(|at| ["accepted", "delivered"].map(|count| format!("/lanes/{at}/{count}")));
    let pointers: Vec<_> = ["/ledger/accepted".to_owned()]
        .into_iter()
        .chain(of_lanes)
        .collect();
    eventually(
        "the rates on the page are the ledger's",
        PATIENCE,
        async || {
            let before = node.status().await;
            tokio::time::sleep(Duration::from_secs(3)).await;
            let after = node.status().await;
            for pointer in &pointers {
                let change = |pointer: &str| {
                    let value = |status: &Value| status.pointer(pointer).and_then(Value::as_f64);
                    Some(value(&after)? - value(&before)?)
                };
                let rate = change(pointer)? / change("/uptime_s")?;
                let shown = browser.text(page, &format!("[data-r='{pointer}']")).await;
                let shown: f64 = shown.strip_suffix("/s")?.replace(',', "").parse().ok()?;
                let off = (shown - rate).abs() / rate;
                println!("{pointer}: {rate:.1}/s, on the page {shown}/s");
                if off.is_nan() || off > RATE_OFF {
                    return None;
                }
            }
            Some(())
        },
    )
    .await;
}

#[actix_rt::test]
async fn the_page_of_four_lanes_shows_the_load_and_what_fails_and_recovers() {
    let (Some(mut nats), Some(mut rabbitmq), Some(mut pubsub), Some(mut browser)) = (
        Nats::start().await,
        Rabbitmq::start().await,
        Pubsub::start().await,
        Browser::start(),
    ) else {
        return;
    };
    let mut api = Api::start();
    api.keep_keys_only();
    let variables = [
        grpc_variables(),
        nats.variables(),
        rabbitmq.variables(),
        pubsub.variables(),
    ];
    let node = Node::start(&api.url(), &variables.concat()).await;
    for lane in ["grpc", "nats", "rabbitmq", "pubsub"] {
        node.lane_is(lane, "up", PATIENCE).await;
    }
    let context = browser.context(Window::USUAL).await;
    let page = browser.open(context, &node).await;
    browser.wait(page, LIVE).await;
    let _load = load(&node);
    rates_hold(&mut browser, page, &node).await;
    browser.picture(page, "load").await;

    let lane = place_of(&node, "nats").await;
    let state = value(&format!("/lanes/{lane}/state"));
    let is_up = |status: &Value| status["lanes"][lane]["state"] == "up";
    nats.kill().await;
    let is_away = format!("{state} !== 'up'");
    let what = "a broker is away";
    page_follows(
        &mut browser,
        page,
        &node,
        what,
        |status| !is_up(status),
        &is_away,
    )
    .await;
    let next_try = value(&format!("/lanes/{lane}/retry_in_s"));
    browser.wait(page, &format!("{next_try} !== '–'")).await;
    let warned =
        "[...document.querySelectorAll('#list b')].some((about) => about.textContent === 'nats')";
    browser.wait(page, warned).await;
    let coloured = |level: &str| {
        format!(
            "[...document.querySelectorAll('[data-about=nats]')].filter((shown) => shown.dataset.level === '{level}').length === 2"
        )
    };
    browser.wait(page, &coloured("warning")).await;
    browser.picture(page, "broker-away").await;
    nats.revive().await;
    let what = "the broker is back";
    page_follows(
        &mut browser,
        page,
        &node,
        what,
        is_up,
        &format!("{state} === 'up'"),
    )
    .await;
    browser.wait(page, &coloured("")).await;

    api.stop().await;
    let state = value("/api/state");
    let is_up = |status: &Value| status["api"]["state"] == "up";
    let what = "the API is down";
    page_follows(
        &mut browser,
        page,
        &node,
        what,
        |status| !is_up(status),
        &format!("{state} === 'down'"),
    )
    .await;
    let next_try = value("/api/retry_in_s");
    let first = browser
        .wait(page, &format!("{next_try} !== '–' && {next_try}"))
        .await;
    browser.wait(page, &format!("{next_try} !== {first}")).await;
    let coloured = "document.querySelector('[data-about=api]').dataset.level === 'warning'";
    browser.wait(page, coloured).await;
    browser.picture(page, "api-down").await;
    api.start_again();
    let what = "the API is back";
    page_follows(
        &mut browser,
        page,
        &node,
        what,
        is_up,
        &format!("{state} === 'up'"),
    )
    .await;
    browser.no_shift(page).await;
    browser.no_faults().await;
}

#[actix_rt::test]
async fn a_killed_node_is_live_again_without_a_reload() {
    let Some(mut browser) = Browser::start() else {
        return;
    };
    let api = Api::start();
    let mut node = grpc_node(&api).await;
    let context = browser.context(Window::USUAL).await;
    let page = browser.open(context, &node).await;
    browser.wait(page, LIVE).await;
    browser.evaluate(page, "window.isSame = true").await;
    node.signal("KILL");
    let stale = "document.querySelector('#live').textContent.startsWith('No answer for ')";
    browser.wait(page, stale).await;
    node.ended(PATIENCE).await;
    node.start_again().await;
    let began = Instant::now();
    browser.wait(page, LIVE).await;
    println!("live again after {:.0?}", began.elapsed());
    let is_same = browser.evaluate(page, "window.isSame").await;
    assert_eq!(is_same, true, "the page was loaded again");
    browser.no_faults().await;
}
