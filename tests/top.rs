//! `waypost top` in real terminals of two sizes, with real nodes.

use crate::support::{
    api::{Api, Conduct},
    eventually,
    lanes::grpc_variables,
    node::{Node, PATIENCE},
    process::free_port,
    terminal::Terminal,
    traffic,
};

const SMALL: (u16, u16) = (80, 24);
const LARGE: (u16, u16) = (200, 60);
const ENTER: &str = "\r";
const ESC: &str = "\u{1b}";

fn top(nodes: &[&Node], size: (u16, u16)) -> Terminal {
    let urls = nodes.iter().map(|node| url(node));
    let arguments: Vec<_> = urls.flat_map(|url| ["--admin".to_owned(), url]).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    Terminal::run(&[&["top"], &arguments[..]].concat(), &[], size)
}

fn url(node: &Node) -> String {
    format!("http://127.0.0.1:{}", node.admin)
}

/// The line of the lane.
fn row(text: &str) -> Vec<&str> {
    let row = text.lines().find(|line| {
        let mut words = line.split_whitespace();
        words.any(|word| word == "grpc") && !line.contains("->")
    });
    row.unwrap_or_default().split_whitespace().collect()
}

#[actix_rt::test]
async fn it_shows_lanes_ledger_and_apis_on_a_small_and_on_a_large_terminal() {
    let api = Api::start();
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    for key in ["a", "b", "c"] {
        node.post("/", key, traffic()[0].clone()).await.unwrap();
    }
    node.all_ended(3, PATIENCE).await;
    for (size, has_all) in [(SMALL, false), (LARGE, true)] {
        let screen = top(&[&node], size);
        let text = screen.shows("3 accepted + 0 recovered = 3 delivered").await;
        for wanted in [
            "live  up ",
            "vwarn lane     state",
            "Waiting  0 on disk, 0 parked",
            "API      up for ",
            &api.url(),
            "q quit  / filter  s sort  Enter details  p pause  R restart  d dead  ? help",
        ] {
            assert!(text.contains(wanted), "{wanted}:\n{text}");
        }
        for word in ["weight", "restarts", "why", "pub p50", "share"] {
            assert_eq!(text.contains(word), has_all, "{word}:\n{text}");
        }
        // Its rates are known after a second.
        let text = screen.shows("0/s").await;
        assert_eq!(row(&text)[..2], ["grpc", "up"], "{text}");
    }
    // What is wrong comes first.
    let nobody = format!("http://127.0.0.1:{}/", free_port());
    let node = Node::start(&nobody, &grpc_variables()).await;
    node.post("/", "a", traffic()[0].clone()).await.unwrap();
    let screen = top(&[&node], SMALL);
    let text = screen.shows("is down, its records wait").await;
    assert!(
        text.lines().nth(1).unwrap().starts_with("WARNING api: "),
        "{text}"
    );
    assert!(text.contains("API      down for "), "{text}");
    // It follows the size of its terminal.
    screen.resize(200, 60);
    let whole = |text: &str| text.contains("weight") && text.lines().count() == 60;
    screen.until("sixty lines with all columns", whole).await;
}

#[actix_rt::test]
async fn keys_choose_sort_filter_explain_and_give_orders() {
    let api = Api::start();
    api.behave(|_, _| Conduct::Answer(422));
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    node.post("/", "a-letter", traffic()[0].clone())
        .await
        .unwrap();
    node.all_ended(1, PATIENCE).await;
    let mut screen = top(&[&node], SMALL);
    screen.shows("ERROR   dead letters: ").await;
    screen.press("?");
    screen.shows("restart the lane; asks first").await;
    screen.press(ESC);
    screen.shows("q quit").await;
    screen.press("w");
    screen.shows("-> Read why (waypost dead list)").await;
    screen.press("q");
    screen.shows("q quit").await;

    screen.press("/zebra");
    screen.until("no row", |text| row(text).is_empty()).await;
    screen.press(ENTER);
    screen.shows("Only rows with \"zebra\"").await;
    screen.press(ESC);
    screen.until("the row", |text| !row(text).is_empty()).await;
    screen.press("3");
    screen.shows("vlane").await;
    screen.press("r");
    screen.shows("^lane").await;
    screen.press("s");
    screen.shows("^state").await;

    screen.press(ENTER);
    screen.shows("Lane grpc of ").await;
    screen.press("j");
    screen.press(&"j".repeat(60));
    screen.shows("a power cut").await;
    screen.press(ESC);
    // Close together, the two would be one key.
    screen.shows("q quit").await;
    screen.press("d");
    let text = screen.shows("a-letter").await;
    assert!(
        text.contains("1 dead letter") && text.contains("422"),
        "{text}"
    );
    screen.press("q");
    screen.shows("q quit").await;

    // No order without a yes.
    screen.press("p");
    screen.shows("pause lane grpc of ").await;
    screen.press("n");
    screen.shows("No order was given").await;
    assert_eq!(node.lane("grpc").await["ordered"], serde_json::Value::Null);
    for (key, action, done) in [
        ("p", "pause", "paused"),
        ("p", "resume", "up"),
        ("R", "restart", "up"),
    ] {
        screen.press(key);
        screen.shows(&format!("{action} lane grpc of ")).await;
        screen.press("y");
        screen.shows(&format!("{action} of lane grpc: done")).await;
        let ordered = node.lane("grpc").await["ordered"]["action"].clone();
        assert_eq!(ordered, action);
        node.lane_is("grpc", done, PATIENCE).await;
        let is_shown = |text: &str| row(text).contains(&done);
        screen.until(done, is_shown).await;
    }
    screen.press("q");
    assert!(screen.ended().await.success());
}

#[actix_rt::test]
async fn it_follows_nodes_through_their_restarts() {
    let api = Api::start();
    let mut node = Node::start(&api.url(), &grpc_variables()).await;
    let other = Node::start(&api.url(), &grpc_variables()).await;
    let screen = top(&[&node, &other], LARGE);
    let lines = |text: &str, what: &str| text.lines().filter(|line| line.contains(what)).count();
    let text = screen
        .until("both are live", |text| lines(text, "  live  up") == 2)
        .await;
    for node in [&node, &other] {
        let address = format!("127.0.0.1:{}", node.admin);
        assert_eq!(lines(&text, &address), 2, "a line and a row: {text}");
    }
    node.post("/", "a", traffic()[0].clone()).await.unwrap();
    screen.shows("1 accepted + 0 recovered = 1 delivered").await;
    node.signal("KILL");
    node.ended(PATIENCE).await;
    let text = screen.shows("NO ANSWER for ").await;
    assert!(
        text.contains("ERROR   ") && text.contains("gives no answer"),
        "{text}"
    );
    assert_eq!(lines(&text, "  live  up"), 1, "{text}");
    node.start_again().await;
    let text = screen
        .until("both are live", |text| lines(text, "  live  up") == 2)
        .await;
    assert!(!text.contains("gives no answer"), "{text}");
    screen.shows("0 accepted + 0 recovered = 0 delivered").await;

    // A node that hangs is away, too.
    node.signal("STOP");
    screen.shows("NO ANSWER for ").await;
    node.signal("CONT");
    screen
        .until("both are live", |text| lines(text, "  live  up") == 2)
        .await;
}

#[actix_rt::test]
async fn the_terminal_is_restored_after_a_key_a_signal_and_a_panic() {
    let node = Node::start("http://127.0.0.1:9/", &grpc_variables()).await;
    let admin = url(&node);
    for (keys, signal) in [
        ("q", ""),
        ("\u{3}", ""),
        ("", "TERM"),
        ("", "INT"),
        ("", "HUP"),
        ("", "QUIT"),
    ] {
        let mut screen = Terminal::run(&["top", "--admin", &admin], &[], SMALL);
        screen.shows("Ledger").await;
        assert!(!screen.is_restored() && screen.read(vt100::Screen::alternate_screen));
        if signal.is_empty() {
            screen.press(keys);
        } else {
            screen.signal(signal);
        }
        let status = screen.ended().await;
        assert!(status.success(), "{keys:?}{signal}: {status}");
        eventually("it is restored", PATIENCE, async || {
            screen.is_restored().then_some(())
        })
        .await;
    }
    for fault in ["top=panic", "top-follow=panic", "top-keys=panic"] {
        let variables = [("FAILPOINTS", fault)];
        let mut screen = Terminal::run(&["top", "--admin", &admin], &variables, SMALL);
        let status = screen.ended().await;
        assert_eq!(status.code(), Some(101), "{fault}");
        // Said where it is seen.
        screen.shows("panicked at").await;
        assert!(screen.is_restored(), "{fault}");
    }
}

#[actix_rt::test]
async fn colours_are_left_out_without_a_wish_for_them_and_a_node_that_is_away_is_told() {
    let admin = format!("http://127.0.0.1:{}", free_port());
    for (variables, has_colour) in [(&[][..], true), (&[("NO_COLOR", "1")][..], false)] {
        let screen = Terminal::run(&["top", "--admin", &admin], variables, SMALL);
        screen.shows("NO ANSWER: cannot connect").await;
        let coloured = screen.read(|screen| {
            let cells = (0..24).flat_map(|row| (0..80).map(move |column| (row, column)));
            let cells = cells.filter_map(|(row, column)| screen.cell(row, column));
            let plain = vt100::Color::Default;
            cells
                .filter(|cell| cell.fgcolor() != plain || cell.bgcolor() != plain)
                .count()
        });
        assert_eq!(coloured > 0, has_colour, "{coloured}");
    }
}
