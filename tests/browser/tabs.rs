//! Several tabs of one browser, and pages of other origins.

use awc::http::StatusCode;
use serde_json::{Value, json};

use super::{LIVE, grpc_node, value};
use crate::support::{
    api::Api,
    browser::{Browser, PATIENCE, Page, Window},
    node::Node,
};

/// Tabs of one browser. It has six connections to a node.
const TABS: usize = 8;

#[actix_rt::test]
async fn eight_tabs_of_one_browser_stay_live() {
    let Some(mut browser) = Browser::start() else {
        return;
    };
    let api = Api::start();
    let mut node = grpc_node(&api).await;
    let context = browser.context(Window::USUAL).await;
    let mut tabs = Vec::new();
    for _ in 0..TABS {
        tabs.push(browser.open(context, &node).await);
    }
    all_follow(&mut browser, &tabs, &node, "pause", "paused").await;
    // A connection is left for what a tab asks.
    for tab in &tabs {
        let answer = "fetch('api/status').then((answer) => answer.status)";
        assert_eq!(browser.evaluate(*tab, answer).await, 200);
    }
    // The one that leads for all leaves.
    browser.close(tabs.remove(0)).await;
    all_follow(&mut browser, &tabs, &node, "resume", "up").await;
    let added = browser.open(context, &node).await;
    tabs.push(added);
    node.signal("KILL");
    node.ended(PATIENCE).await;
    node.start_again().await;
    node.lane_is("grpc", "up", PATIENCE).await;
    all_follow(&mut browser, &tabs, &node, "drain", "drained").await;
    browser.no_faults().await;
}

/// Gives the lane an order; each tab tells the change, and shows the state.
async fn all_follow(browser: &mut Browser, tabs: &[Page], node: &Node, order: &str, state: &str) {
    for tab in tabs {
        browser.wait(*tab, LIVE).await;
    }
    assert_eq!(node.order("grpc", order).await, StatusCode::ACCEPTED);
    for tab in tabs {
        let told = format!("document.querySelector('#changes').textContent.includes('{order}')");
        browser.wait(*tab, &told).await;
        let shown = value("/lanes/0/state");
        browser.wait(*tab, &format!("{shown} === '{state}'")).await;
        browser.wait(*tab, LIVE).await;
    }
}

#[actix_rt::test]
async fn a_page_of_another_origin_neither_reads_nor_pauses() {
    const TRIES: &str = "async (base) => {
        const tell = (asked) => asked.then((answer) => `${answer.type} ${answer.status}`, () => 'refused');
        const json = { 'Content-Type': 'application/json' };
        const pause = `${base}api/lanes/grpc/pause`;
        const form = Object.assign(document.createElement('form'), { action: pause, method: 'post', enctype: 'text/plain', target: 'frame' });
        form.append(Object.assign(document.createElement('input'), { name: '{}', value: '' }));
        document.body.append(Object.assign(document.createElement('iframe'), { name: 'frame' }), form);
        form.submit();
        return [
            await tell(fetch(base)),
            await tell(fetch(`${base}api/status`)),
            await tell(fetch(pause, { method: 'POST', headers: json, body: '{}' })),
            await tell(fetch(pause, { method: 'POST', mode: 'no-cors', body: '{}' })),
            await new Promise((tell) => {
                const source = new EventSource(`${base}api/events`);
                source.onopen = () => tell('opened');
                source.onerror = () => tell('refused');
            }),
        ];
    }";
    let Some(mut browser) = Browser::start() else {
        return;
    };
    let api = Api::start();
    let node = grpc_node(&api).await;
    let base = format!("http://127.0.0.1:{}/", node.admin);
    let context = browser.context(Window::USUAL).await;
    for other in [
        "http://other.example/",
        "http://127.0.0.1:9/",
        "http://localhost:9/",
    ] {
        let page = browser.serve(context, other, "<p>another origin</p>").await;
        let tries = browser
            .evaluate(page, &format!("({TRIES})('{base}')"))
            .await;
        let tries: Vec<_> = tries.as_array().expect("a list").iter().collect();
        // A request that a page sends without asking is opaque to it, and refused by the node.
        let opaque = ["opaque 0", "refused"];
        for (at, tried) in tries.iter().enumerate() {
            let allowed = if at == 3 { &opaque[..] } else { &["refused"] };
            let tried = tried.as_str().expect("a text");
            assert!(allowed.contains(&tried), "{other}: {tries:?}");
        }
    }
    let lane = node.lane("grpc").await;
    assert_eq!(
        (&lane["state"], &lane["ordered"]),
        (&json!("up"), &Value::Null)
    );
    // The same order from the page itself is obeyed.
    let page = browser.open(context, &node).await;
    browser
        .click(page, "[data-order=pause][data-lane=grpc]")
        .await;
    browser.click(page, "#question-yes").await;
    node.lane_is("grpc", "paused", PATIENCE).await;
}
