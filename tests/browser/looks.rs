//! The looks of the page, and its charts.

use std::time::Duration;

use serde_json::json;
use tokio::time::sleep;

use super::{LIVE, grpc_node, load};
use crate::support::{
    api::{Api, Conduct},
    browser::{Browser, PATIENCE, Window},
    eventually,
    lanes::{Lane as _, Nats, grpc_variables},
    node::Node,
    process::free_port,
    rig::Rig as _,
    traffic, wanted,
};

const WIDTHS: [u32; 4] = [360, 1280, 1440, 2560];
const SCHEMES: [&str; 2] = ["light", "dark"];

/// The list has a fixed height, so that warnings which come and go move nothing.
#[actix_rt::test]
async fn five_warnings_are_in_sight_or_counted() {
    let Some(mut browser) = Browser::start() else {
        return;
    };
    let api = Api::start();
    let nobody = |url: &str| url.replace("PORT", &free_port().to_string());
    let mut variables = grpc_variables();
    for (name, url) in [
        ("LANES__NATS__URL", "nats://127.0.0.1:PORT"),
        (
            "LANES__RABBITMQ__URL",
            "amqp://guest:guest@127.0.0.1:PORT/%2f",
        ),
    ] {
        variables.push((name.into(), nobody(url)));
    }
    api.behave(|_, _| Conduct::Answer(410));
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    node.post("/grpc", "dead", traffic()[0].clone())
        .await
        .unwrap();
    node.all_ended(1, PATIENCE).await;
    node.order("grpc", "pause").await;
    let count = "document.querySelector('#count').textContent";
    // A warning that the edge of the list cuts is not seen.
    let seen = "(() => {
        const box = document.querySelector('#list').getBoundingClientRect();
        const is = (item) => item.getBoundingClientRect().bottom <= box.bottom;
        return [...document.querySelectorAll('#list li')].filter(is).length;
    })()";
    for (width, all_seen) in [(1280, true), (360, false)] {
        let window = Window {
            width,
            ..Window::USUAL
        };
        let context = browser.context(window).await;
        let page = browser.open(context, &node).await;
        browser.wait(page, LIVE).await;
        browser.wait(page, &format!("{count} === '5'")).await;
        let seen = browser.evaluate(page, seen).await;
        let seen = seen.as_u64().expect("a number");
        let below = browser.text(page, "#more").await;
        let expected = match 5 - seen {
            0 => String::new(),
            more => format!("{more} more below"),
        };
        assert_eq!((&*below, seen == 5), (&*expected, all_seen), "{width}");
        browser.picture(page, &format!("warnings-{width}")).await;
        browser.no_shift(page).await;
    }
}

#[actix_rt::test]
async fn all_charts_have_one_range_and_one_cursor() {
    let Some(mut browser) = Browser::start() else {
        return;
    };
    let api = Api::start();
    let node = grpc_node(&api).await;
    let context = browser.context(Window::USUAL).await;
    let page = browser.open(context, &node).await;
    let _load = load(&node);
    // A time of the interval, and lines in the charts of node and lane.
    let shown = "document.querySelector('[data-h=\"/lanes/0/delivery_ms/p50\"]').textContent";
    browser
        .wait(page, &format!("{shown}.endsWith(' ms')"))
        .await;
    let drawn = "[...document.querySelectorAll('[data-chart]')].every((chart) =>
        chart.querySelector('path').getAttribute('d').split('L').length > 4)";
    browser.wait(page, drawn).await;
    let now = "document.querySelector('#cursor-time').textContent";
    assert_eq!(browser.evaluate(page, now).await, "now");
    // Two seconds back, by the keyboard.
    browser.press(page, "c").await;
    browser.press(page, "ArrowLeft").await;
    browser.press(page, "ArrowLeft").await;
    let back = browser.text(page, "#cursor-time").await;
    assert!(back.ends_with(", 2.0 s ago"), "{back}");
    let cursors = "new Set([...document.querySelectorAll('[data-chart] line')].map((line) =>
        `${line.getAttribute('x1')} ${line.getAttribute('y2')}`)).size";
    assert_eq!(browser.evaluate(page, cursors).await, 1);
    browser.picture(page, "cursor").await;
    browser.press(page, "Escape").await;
    assert_eq!(browser.evaluate(page, now).await, "now");
    // The mouse.
    browser.hover(page, "[data-chart*=publish]", 0.99).await;
    browser.wait(page, &format!("{now} !== 'now'")).await;
    let time = "[data-cursor] [data-h='/node/accepted_per_s']";
    browser
        .wait(
            page,
            &format!("document.querySelector(\"{time}\") !== null"),
        )
        .await;
    for range in ["1h", "all", "5m"] {
        browser
            .click(page, &format!("[data-range='{range}']"))
            .await;
        let pressed = format!(
            "document.querySelectorAll('[data-range][aria-pressed=true]').length === 1 &&
             document.querySelector('[data-range=\"{range}\"]').ariaPressed === 'true'"
        );
        browser.wait(page, &pressed).await;
    }
    browser.wait(page, drawn).await;
    browser.no_shift(page).await;
    browser.no_faults().await;
}

/// `SHIFT_SECONDS=60` for longer.
#[actix_rt::test]
async fn nothing_moves_while_lanes_and_api_come_and_go_under_load() {
    let (Some(mut nats), Some(mut browser)) = (Nats::start().await, Browser::start()) else {
        return;
    };
    let mut api = Api::start();
    let variables = [grpc_variables(), nats.variables()].concat();
    let node = Node::start(&api.url(), &variables).await;
    let mut pages = Vec::new();
    for width in WIDTHS {
        let window = Window {
            width,
            ..Window::USUAL
        };
        let context = browser.context(window).await;
        pages.push(browser.open(context, &node).await);
    }
    let _load = load(&node);
    let part = Duration::from_secs(wanted("SHIFT_SECONDS", 10)) / 5;
    sleep(part).await;
    // By somebody else: what the page does for its own person may move something.
    node.order("grpc", "pause").await;
    node.tell("/api/lanes/nats/weight", json!({"weight": 1000}))
        .await;
    sleep(part).await;
    node.order("grpc", "resume").await;
    nats.kill().await;
    sleep(part).await;
    api.stop().await;
    sleep(part).await;
    nats.revive().await;
    api.start_again();
    api.behave(|number, _| Conduct::Answer(if number % 10 == 0 { 422 } else { 200 }));
    sleep(part).await;
    for page in pages {
        browser.wait(page, LIVE).await;
        browser.no_shift(page).await;
    }
    browser.no_faults().await;
}

#[actix_rt::test]
async fn each_width_and_theme_is_accessible_and_fits() {
    let Some(mut browser) = Browser::start() else {
        return;
    };
    let api = Api::start();
    api.behave(|number, _| Conduct::Answer(if number % 10 == 0 { 422 } else { 200 }));
    let node = grpc_node(&api).await;
    let _load = load(&node);
    eventually("there are dead letters", PATIENCE, async || {
        (node.status().await["ledger"]["dead"].as_u64() > Some(5)).then_some(())
    })
    .await;
    for scheme in SCHEMES {
        for width in WIDTHS {
            let window = Window {
                width,
                scheme,
                ..Window::USUAL
            };
            let context = browser.context(window).await;
            let page = browser.open(context, &node).await;
            browser.wait(page, LIVE).await;
            // A list that somebody has asked for may move what is below it.
            browser.no_shift(page).await;
            browser.click(page, "#query button[type=submit]").await;
            // In place of the list that came unasked.
            let is_answered = "document.querySelector('#plan').textContent.includes(' match')";
            browser.wait(page, is_answered).await;
            browser.click(page, "#letter-list summary").await;
            browser
                .wait(page, "document.querySelector('.letter') !== null")
                .await;
            let found = browser.violations(page).await;
            assert_eq!(found, json!([]), "{scheme} {width}");
            let wide = "document.documentElement.scrollWidth";
            assert_eq!(browser.evaluate(page, wide).await, width, "{scheme}");
            // No value of a chart runs into the next chart's.
            let captions = "[...document.querySelectorAll('figcaption')].every(
                (caption) => caption.scrollWidth <= caption.clientWidth)";
            assert_eq!(
                browser.evaluate(page, captions).await,
                true,
                "{scheme} {width}"
            );
            browser.picture(page, &format!("{scheme}-{width}")).await;
            browser.close(page).await;
        }
    }
    let window = Window {
        scripts: false,
        ..Window::USUAL
    };
    let context = browser.context(window).await;
    let page = browser.open(context, &node).await;
    browser.picture(page, "no-scripts").await;
    browser.no_faults().await;
}
