//! Dead letters on the page, and the way of a record.

use awc::http::StatusCode;

use super::{LIVE, grpc_node, load};
use crate::support::{
    api::{Api, Conduct},
    browser::{Browser, PATIENCE, Window},
    eventually,
    lanes::grpc_variables,
    node::Node,
    traffic,
};

#[actix_rt::test]
async fn ten_thousand_dead_letters_are_planned_replayed_watched_and_cancelled() {
    const LETTERS: usize = 10_000;
    const TOGETHER: usize = 500;
    let Some(mut browser) = Browser::start() else {
        return;
    };
    let api = Api::start();
    api.keep_keys_only();
    api.behave(|_, _| Conduct::Answer(422));
    let mut variables = grpc_variables();
    // A busy machine would spool some, and an id that comes by both ways dies twice.
    variables.push(("ROUTER__PUBLISH_TIMEOUT".into(), "60s".into()));
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let records = traffic();
    for batch in 0..LETTERS / TOGETHER {
        let body = [b"[", &*records[..TOGETHER].join(&b","[..]), b"]"].concat();
        let (status, receipt) = node
            .post("/", &format!("batch-{batch}"), body.into())
            .await
            .expect("an answer");
        assert_eq!(status, StatusCode::ACCEPTED, "{receipt}");
    }
    node.all_ended(LETTERS, PATIENCE).await;
    let context = browser.context(Window::USUAL).await;
    let page = browser.open(context, &node).await;
    browser.wait(page, LIVE).await;

    let id = "batch-7/7";
    browser.press(page, "/").await;
    browser.fill(page, "#find-id", id).await;
    browser.press(page, "Enter").await;
    let way = "document.querySelector('#found').textContent";
    browser
        .wait(
            page,
            &format!(
                "{way}.includes('Its way') && {way}.includes('Why it took it') && {way}.includes('It is a dead letter')"
            ),
        )
        .await;

    // Unasked, what is dead is shown.
    let all = "10,000 of 10,000 dead letters match; the oldest 200 are shown.";
    browser.shows(page, "#plan", all).await;
    browser.fill(page, "[name=status]", "422").await;
    browser.click(page, "#query button[type=submit]").await;
    browser
        .shows(
            page,
            "#plan",
            "10,000 of 10,000 dead letters match; the oldest 200 are shown.",
        )
        .await;
    browser.click(page, "#letter-list summary").await;
    browser
        .click(page, "#letter-list .letter >> text=Its way")
        .await;
    let first = browser.text(page, "#letter-list summary span").await;
    let is_its = format!("document.querySelector('#find-id').value === '{first}'");
    browser.wait(page, &is_its).await;
    browser.picture(page, "plan").await;
    api.behave(|_, _| Conduct::Answer(200));
    browser.click(page, "#replay").await;
    browser
        .shows(page, "#question-yes", "Replay 10,000 dead letters")
        .await;
    // A run must last until it is cancelled.
    let slow = "{
        const { fetch } = window;
        window.pause = 500;
        window.fetch = async (...what) => {
            await new Promise((go) => setTimeout(go, window.pause));
            return fetch(...what);
        };
    }";
    browser.evaluate(page, slow).await;
    browser.click(page, "#question-yes").await;
    let progress = "document.querySelector('#progress')";
    browser
        .wait(page, &format!("!{progress}.hidden && {progress}.value > 0"))
        .await;
    browser.picture(page, "run").await;
    browser.click(page, "#cancel").await;
    browser.evaluate(page, "window.pause = 0").await;
    let said = "document.querySelector('#said-text').textContent";
    let cancelled = browser
        .wait(
            page,
            &format!("{progress}.hidden && {said}.startsWith('Replay cancelled after ') && {said}"),
        )
        .await;
    let cancelled = cancelled.as_str().expect("a text");
    let done = cancelled
        .split(' ')
        .nth(3)
        .expect("a count")
        .replace(',', "");
    let done: usize = done.parse().expect("a count");
    assert!(done > 0 && done < LETTERS, "{cancelled}");
    let left = eventually("the replayed ones are delivered", PATIENCE, async || {
        let ledger = node.status().await["ledger"].clone();
        (ledger["delivered"] == done).then_some(ledger["dead"].clone())
    })
    .await;
    assert_eq!(left, LETTERS - done);

    browser
        .wait(page, "!document.querySelector('#replay').disabled")
        .await;
    browser.click(page, "#replay").await;
    browser.click(page, "#question-yes").await;
    browser
        .wait(
            page,
            &format!("{progress}.hidden && {said}.startsWith('Replay done: ')"),
        )
        .await;
    node.all_ended(LETTERS, PATIENCE).await;
    assert_eq!(api.taken().len(), LETTERS);
    browser
        .shows(page, "#plan", "0 of 0 dead letters match.")
        .await;
    browser.no_faults().await;
}

#[actix_rt::test]
async fn the_way_of_a_record_that_passes_is_a_click_away() {
    let Some(mut browser) = Browser::start() else {
        return;
    };
    let api = Api::start();
    let node = grpc_node(&api).await;
    let context = browser.context(Window::USUAL).await;
    let page = browser.open(context, &node).await;
    browser.wait(page, LIVE).await;
    let _load = load(&node);
    browser.click(page, "#find-next").await;
    let rows = "document.querySelectorAll('#found tbody tr').length === 12";
    browser.wait(page, rows).await;
    let shown = browser.text(page, "#found tbody tr").await;
    assert!(shown.contains(r#""path":"GRPC""#), "{shown}");
    let id = browser.text(page, "#found tbody button").await;
    browser.click(page, "#found tbody button").await;
    let way = "document.querySelector('#found').textContent";
    let is_told =
        format!("{way}.includes('Its way') && {way}.includes('delivered: the API has it')");
    browser.wait(page, &is_told).await;
    let is_its = format!("document.querySelector('#find-id').value === '{id}'");
    browser.wait(page, &is_its).await;
    browser.no_faults().await;
}
