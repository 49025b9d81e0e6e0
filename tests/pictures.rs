//! The pictures of a real node. `tests/run pictures` makes those of the README anew.

mod screen;
mod states;

use std::{fs, path::Path, time::Duration};

use tokio::time::sleep;

use self::states::Brokers;
use crate::support::{
    api::Api,
    browser::{PATIENCE, Picture, Window},
    paced::PacedRecords,
    rig::Rig as _,
    terminal::Terminal,
    wanted,
};

/// The text of a page that hears its node.
const LIVE: &str = "document.querySelector('#live').textContent === 'Live'";
/// The part of the page that the README shows.
const TOP_OF_PAGE: u32 = 970;
const TERMINAL: (u16, u16) = (118, 19);

/// The pace of the load, by the seconds since its begin: up and down, as users are.
fn waves(seconds: f64) -> f64 {
    320.0 + 90.0 * (seconds / 23.0).sin() + 40.0 * (seconds / 7.0).sin()
}

#[actix_rt::test]
#[ignore = "writes files of the repository: tests/run pictures"]
async fn of_the_page_and_of_top_while_a_broker_is_down() {
    let Some(mut brokers) = Brokers::start().await else {
        return;
    };
    let api = Api::start();
    api.delay(Duration::from_millis(5));
    let node = brokers.node(&api).await;
    let browser = &mut brokers.browser;
    let mut pages = Vec::new();
    for scheme in ["light", "dark"] {
        let window = Window {
            scheme,
            ..Window::USUAL
        };
        let context = browser.context(window).await;
        let page = browser.open(context, &node).await;
        browser.wait(page, LIVE).await;
        pages.push((scheme, page));
    }
    let admin = format!("http://127.0.0.1:{}", node.admin);
    let terminal = Terminal::run(&["top", "--admin", &admin], &[], TERMINAL);
    let _load = PacedRecords::start(&node, "user", waves);
    // The charts of the page show five minutes.
    let minutes = wanted("PICTURES_MINUTES", 4);
    sleep(Duration::from_mins(minutes)).await;
    brokers.nats.kill().await;
    node.lane_is_away("nats", PATIENCE).await;
    // The outage has an age, and a trend is known.
    sleep(Duration::from_secs(25)).await;
    node.lane_is("nats", "backoff", PATIENCE).await;

    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/pictures");
    fs::create_dir_all(&folder).expect("a folder");
    for (scheme, page) in pages {
        let path = folder.join(format!("page-{scheme}.png"));
        brokers
            .browser
            .save(page, &path, Picture::Top(TOP_OF_PAGE))
            .await;
    }
    terminal.shows("backoff").await;
    let top = terminal.read(screen::svg);
    fs::write(folder.join("top.svg"), top).expect("a file");
}
