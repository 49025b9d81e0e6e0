//! The live page of a real node, as browsers, terminals and strangers ask for it. What its script
//! does is for a browser to show.

use std::{fs, io::Read as _};

use awc::http::{
    Method,
    header::{self, HeaderMap, HeaderName},
};
use flate2::read::GzDecoder;
use serde_json::{Value, json};

use crate::support::{
    api::{Api, Conduct},
    eventually,
    lanes::grpc_variables,
    node::{Node, PATIENCE},
    process::free_port,
    traffic,
};

/// The page and its files, with their types.
const FILES: [(&str, &str); 3] = [
    ("/", "text/html; charset=utf-8"),
    ("/page.css", "text/css; charset=utf-8"),
    ("/page.js", "text/javascript; charset=utf-8"),
];
/// The most bytes of all files on the wire.
const SIZE_MAX: usize = 60 << 10;
const GZIP: (HeaderName, &str) = (header::ACCEPT_ENCODING, "gzip, deflate, br, zstd");
const TEXT: (HeaderName, &str) = (header::ACCEPT, "text/plain");
const SITE: &str = "sec-fetch-site";
const MODE: &str = "sec-fetch-mode";
const DEST: &str = "sec-fetch-dest";

struct Answer {
    status: u16,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Answer {
    fn header(&self, name: impl AsRef<str>) -> &str {
        let value = self.headers.get(name.as_ref());
        value.map_or("", |value| value.to_str().expect("text"))
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("text")
    }
}

async fn ask(node: &Node, path: &str, headers: &[(&str, &str)]) -> Answer {
    send(node, Method::GET, path, headers).await
}

async fn send(node: &Node, method: Method, path: &str, headers: &[(&str, &str)]) -> Answer {
    let url = format!("http://127.0.0.1:{}{path}", node.admin);
    let client = awc::Client::builder().timeout(PATIENCE).finish();
    let mut request = client.request(method, url);
    for header in headers {
        request = request.insert_header(*header);
    }
    let answer = request.send().await;
    let mut answer = answer.unwrap_or_else(|why| panic!("{path}: {why}"));
    let body = answer.body().await.expect("a body");
    Answer {
        status: answer.status().as_u16(),
        headers: answer.headers().clone(),
        body: body.to_vec(),
    }
}

async fn node(api: &Api) -> Node {
    let node = Node::start(&api.url(), &grpc_variables()).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    node
}

fn unpacked(gzip: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    let read = GzDecoder::new(gzip).read_to_end(&mut plain);
    read.expect("gzip");
    plain
}

#[actix_rt::test]
async fn the_page_is_small_and_loads_nothing_from_elsewhere() {
    let api = Api::start();
    let node = node(&api).await;
    let gzip = (GZIP.0.as_str(), GZIP.1);
    let mut size = 0;
    for (path, media_type) in FILES {
        let packed = ask(&node, path, &[gzip]).await;
        assert_eq!(
            (packed.status, packed.header("content-type")),
            (200, media_type)
        );
        assert_eq!(packed.header("content-encoding"), "gzip", "{path}");
        assert!(
            packed
                .headers
                .get_all("vary")
                .any(|vary| vary == "accept-encoding")
        );
        size += packed.body.len();
        let plain = ask(&node, path, &[]).await;
        assert_eq!(plain.header("content-encoding"), "", "{path}");
        let refused = ask(&node, path, &[(gzip.0, "gzip;q=0, br")]).await;
        assert_eq!(refused.header("content-encoding"), "", "{path}");
        if path != "/" {
            assert_eq!(unpacked(&packed.body), plain.body, "{path}");
        }
        let policy = plain.header("content-security-policy");
        for part in [
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "connect-src 'self'",
            "frame-ancestors 'none'",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
        ] {
            assert!(
                policy.split("; ").any(|found| found == part),
                "{path} {part}: {policy}"
            );
        }
        assert!(
            !policy.contains("unsafe") && !policy.contains("http"),
            "{policy}"
        );
        for (name, value) in [
            ("cross-origin-opener-policy", "same-origin"),
            ("cross-origin-resource-policy", "same-origin"),
            ("referrer-policy", "no-referrer"),
            ("x-content-type-options", "nosniff"),
        ] {
            assert_eq!(plain.header(name), value, "{path} {name}");
        }
    }
    assert!(size <= SIZE_MAX, "{size} bytes");
    let page = ask(&node, "/", &[]).await;
    assert_eq!(page.header("cache-control"), "no-store");
    let page = page.text();
    let links = ["href=\"", "src=\""].map(|name| page.split(name).skip(1));
    let links = links.into_iter().flatten();
    let links: Vec<_> = links.filter_map(|rest| rest.split('"').next()).collect();
    assert!(links.len() >= 4, "{links:?}");
    for link in links {
        let is_own = link.starts_with("page.") || link.starts_with("data:image/svg+xml,");
        assert!(is_own || link.starts_with('#'), "{link}");
    }
    // The policy would refuse these.
    for inline in ["<style", " style=", " onclick="] {
        assert!(!page.contains(inline), "{inline}");
    }
}

#[actix_rt::test]
async fn a_browser_that_has_a_file_is_told_so() {
    let api = Api::start();
    let node = node(&api).await;
    for (path, _) in &FILES[1..] {
        let first = ask(&node, path, &[]).await;
        let tag = first.header("etag").to_owned();
        assert_eq!(first.header("cache-control"), "no-cache", "{path}");
        let several = format!("\"other\", {tag}");
        for has in [&*tag, &several, "*"] {
            let headers = [("if-none-match", has), (GZIP.0.as_str(), GZIP.1)];
            let again = ask(&node, path, &headers).await;
            assert_eq!((again.status, again.body.len()), (304, 0), "{path} {has}");
            assert_eq!(again.header("etag"), tag, "{path}");
            assert!(again.header("content-security-policy").contains("'none'"));
        }
        let other = ask(&node, path, &[("if-none-match", "\"other\"")]).await;
        assert_eq!((other.status, other.body), (200, first.body), "{path}");
    }
}

/// The pointers and texts of the values on the page that have this format.
fn values<'p>(page: &'p str, format: &str) -> Vec<(&'p str, &'p str)> {
    let values = page.split("data-v=\"").skip(1).filter_map(|rest| {
        let (pointers, rest) = rest.split_once('"')?;
        let rest = rest.strip_prefix(&format!(" data-f=\"{format}\""))?;
        let (_, rest) = rest.split_once('>')?;
        let (text, _) = rest.split_once('<')?;
        Some((pointers, text))
    });
    values.collect()
}

#[actix_rt::test]
async fn without_scripts_the_page_says_what_the_status_says() {
    let api = Api::start();
    api.behave(|_, post| match &post.key {
        Some(key) if key.starts_with("bad") => Conduct::Answer(422),
        _ => Conduct::Answer(200),
    });
    let nobody = format!("nats://127.0.0.1:{}", free_port());
    let lanes = [grpc_variables(), vec![("LANES__NATS__URL".into(), nobody)]].concat();
    let node = Node::start(&api.url(), &lanes).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    for number in 0..1234 {
        let key = if number < 3 { "bad" } else { "good" };
        let key = format!("{key}-{number}");
        node.post("/grpc", &key, traffic()[0].clone())
            .await
            .expect("an answer");
    }
    node.at_rest(PATIENCE).await;
    node.order("grpc", "drain").await;
    let status = node.status().await;
    let page = ask(&node, "/", &[]).await;
    let page = page.text();
    let counts = values(page, "count");
    let sum = |pointers: &str| -> u64 {
        let parts = pointers
            .split(' ')
            .filter_map(|pointer| status.pointer(pointer));
        parts.map(|value| value.as_u64().expect("a count")).sum()
    };
    for (pointers, text) in &counts {
        let shown = text.replace(',', "");
        if status.pointer(pointers).is_none_or(Value::is_null) && !pointers.contains(' ') {
            assert_eq!(shown, "–", "{pointers}");
        } else {
            assert_eq!(shown, sum(pointers).to_string(), "{pointers}");
        }
    }
    for shown in [
        ("/ledger/accepted", "1,234"),
        ("/ledger/delivered", "1,231"),
        ("/ledger/dead", "3"),
        ("/ledger/accepted /ledger/recovered", "1,234"),
    ] {
        assert!(counts.contains(&shown), "{shown:?}: {counts:?}");
    }
    let texts = values(page, "text");
    for shown in [
        ("/node", status["node"].as_str().expect("a name")),
        ("/lanes/0/state", "drained"),
        ("/lanes/0/ordered/action", "drain"),
        ("/lanes/0/ordered/by", "127.0.0.1"),
        ("/api/state", "up"),
        ("/api/url", &api.url()),
        ("/balanced", "yes"),
    ] {
        assert!(texts.contains(&shown), "{shown:?}: {texts:?}");
    }
    // Its state may be another one meanwhile.
    let why = status
        .pointer("/lanes/1/last_error")
        .and_then(Value::as_str);
    assert!(
        texts
            .iter()
            .any(|(pointer, text)| *pointer == "/lanes/1/last_error" && Some(*text) == why)
    );
    for warning in status["warnings"].as_array().expect("a list") {
        let what = warning["what"].as_str().expect("a text");
        assert!(page.contains(what), "{what}");
    }
    let about: Vec<_> = status["warnings"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|warning| &warning["about"])
        .collect();
    assert_eq!(about, ["dead letters", "nats", "lanes", "grpc"], "{status}");
    // The box and the row of a lane that a warning is about; a notice colours nothing.
    for (shown, times) in [
        (r#"data-about="nats" data-level="warning""#, 2),
        (r#"data-about="grpc" data-level="""#, 2),
    ] {
        assert_eq!(page.matches(shown).count(), times, "{shown}");
    }

    let text = ask(&node, "/", &[(TEXT.0.as_str(), TEXT.1)]).await;
    assert_eq!(text.header("content-type"), "text/plain; charset=utf-8");
    for line in [
        "accepted               1,234",
        "dead                       3",
        "Drained by 127.0.0.1",
        "grpc  drained",
    ] {
        assert!(text.text().contains(line), "{line}: {}", text.text());
    }
    assert!(!text.text().contains("<span"), "{}", text.text());
}

/// The history once it has `records`, and the sum of its rates of delivery.
async fn passed_of_all(node: &Node, records: u32) -> (Value, f64) {
    let at_rest_ms = node.status().await["recent"]["at_ms"].as_u64();
    eventually("the last second has ended", PATIENCE, async || {
        let (status, history) = node.get("/api/history?range=5m").await?;
        assert_eq!(status, 200, "{history}");
        let rates = history["lanes"][0]["delivered_per_s"].as_array()?.iter();
        let passed: f64 = rates.filter_map(Value::as_f64).sum();
        assert!(
            passed < f64::from(records) * 1.01,
            "{records} have passed: {history}"
        );
        (history["at_ms"].as_u64() > at_rest_ms).then_some((history, passed))
    })
    .await
}

#[actix_rt::test]
async fn the_history_counts_what_has_passed() {
    let api = Api::start();
    let node = node(&api).await;
    let mut number = 0_u32;
    let mut passed_before = 0.0;
    let history = eventually("fifty records are history", PATIENCE, async || {
        for _ in 0..50 {
            number += 1;
            let key = format!("key-{number}");
            node.post("/", &key, traffic()[0].clone())
                .await
                .expect("an answer");
        }
        node.at_rest(PATIENCE).await;
        let (history, passed) = passed_of_all(&node, number).await;
        // Each rate is of a second, or of a little more. On a busy machine one is of much more, and
        // less than what has passed: then the next fifty show it.
        let of_these = passed - passed_before;
        passed_before = passed;
        (of_these > 45.0).then_some(history)
    })
    .await;
    assert_eq!(history["step_s"], 1);
    let seconds = history["node"]["accepted_per_s"].as_array().map(Vec::len);
    for pointer in [
        "/node/delivered_per_s",
        "/node/waiting",
        "/lanes/0/publish_ms/p50",
        "/lanes/0/delivery_ms/p99",
    ] {
        let values = history.pointer(pointer).and_then(Value::as_array);
        assert_eq!(values.map(Vec::len), seconds, "{pointer}: {history}");
    }
    // Since the start, there is one; of the last second, in which nothing passed, there is none.
    let p50 = history.pointer("/lanes/0/publish_ms/p50");
    let p50 = p50.and_then(Value::as_array).expect("a list");
    assert!(p50.iter().any(|ms| ms.as_f64() > Some(0.0)), "{history}");
    eventually("a second without a record", PATIENCE, async || {
        let status = node.status().await;
        let of_lane = |pointer: &str| status.pointer(pointer).and_then(Value::as_f64);
        let since_start = of_lane("/lanes/0/publish_ms/p50")?;
        let recent = of_lane("/recent/lanes/0/publish_ms/p50")?;
        (since_start > 0.0 && recent == 0.0).then_some(())
    })
    .await;
    for (range, step) in [("1h", 10), ("all", 10)] {
        let (_, history) = node
            .get(&format!("/api/history?range={range}"))
            .await
            .expect("an answer");
        assert_eq!(history["step_s"], step, "{history}");
    }
    for wrong in ["range=2h", "range=5m&other=1"] {
        let (status, problem) = node
            .get(&format!("/api/history?{wrong}"))
            .await
            .expect("an answer");
        assert_eq!(status, 400, "{wrong}: {problem}");
    }
    let packed = ask(&node, "/api/history", &[(GZIP.0.as_str(), GZIP.1)]).await;
    assert_eq!(packed.header("content-encoding"), "gzip");
}

#[actix_rt::test]
async fn a_client_that_prefers_plain_text_gets_it() {
    let api = Api::start();
    let node = node(&api).await;
    for (accept, media_type) in [
        ("text/plain", FILES_TEXT),
        ("text/plain, text/html;q=0.5", FILES_TEXT),
        ("text/plain, */*;q=0.1", FILES_TEXT),
        ("text/html, text/plain", FILES[0].1),
        ("text/plain;q=0.5, text/html", FILES[0].1),
        (
            "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
            FILES[0].1,
        ),
        ("*/*", FILES[0].1),
    ] {
        let answer = ask(&node, "/", &[("accept", accept)]).await;
        assert_eq!(answer.header("content-type"), media_type, "{accept}");
        assert!(answer.headers.get_all("vary").any(|vary| vary == "accept"));
    }
}

const FILES_TEXT: &str = "text/plain; charset=utf-8";

#[actix_rt::test]
async fn hostile_text_is_shown_as_text() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("waypost.toml");
    fs::write(&file, "").expect("it is written");
    let api = Api::start();
    let node = Node::start_with_config(&api.url(), &grpc_variables(), &file).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let hostile = r#""</span><script>alert(1)</script>\u001b[31m" = 1"#;
    fs::write(&file, format!("[api]\n{hostile}\n")).expect("it is written");
    let (status, problem) = node.tell("/api/reload", json!({})).await;
    assert_eq!(status, 422, "{problem}");
    let page = ask(&node, "/", &[]).await;
    let page = page.text();
    assert!(
        page.contains("&lt;script&gt;alert(1)&lt;/script&gt;"),
        "{page}"
    );
    assert!(!page.contains("<script>alert"), "{page}");
    let text = ask(&node, "/", &[(TEXT.0.as_str(), TEXT.1)]).await;
    let text = text.text();
    assert!(text.contains("<script>alert(1)</script>"), "{text}");
    assert!(
        text.chars()
            .all(|letter| letter == '\n' || !letter.is_control()),
        "{text:?}"
    );
}

#[actix_rt::test]
async fn a_foreign_page_may_have_a_link_to_the_page_and_no_more() {
    let api = Api::start();
    let node = node(&api).await;
    let foreign = [(SITE, "cross-site")];
    let link = [(SITE, "cross-site"), (MODE, "navigate"), (DEST, "document")];
    let frame = [(SITE, "cross-site"), (MODE, "navigate"), (DEST, "iframe")];
    let script = [(SITE, "cross-site"), (MODE, "no-cors"), (DEST, "script")];
    let other_name = [("host", "evil.example.com")];
    let link_by_name = [other_name[0], link[0], link[1], link[2]];
    for (path, _) in FILES {
        for (headers, status) in [
            (&foreign[..], 403),
            (&[("origin", "https://evil.example.com")], 403),
            (&frame, 403),
            (&script, 403),
            (&other_name, 421),
            (&link_by_name, 421),
            (&link, 200),
            (&[(SITE, "none")], 200),
            (&[(SITE, "same-origin")], 200),
        ] {
            let answer = ask(&node, path, headers).await;
            assert_eq!(answer.status, status, "{path} {headers:?}");
            let allows = |name: &HeaderName| name.as_str().starts_with("access-control");
            assert!(!answer.headers.keys().any(allows), "{path}");
        }
        let posted = send(&node, Method::POST, path, &[]).await;
        assert_eq!(
            (posted.status, posted.header("allow")),
            (405, "GET, HEAD"),
            "{path}"
        );
    }
    // A link leads to the page, and not to the API.
    let answer = ask(&node, "/api/status", &link).await;
    assert_eq!(answer.status, 403);
}
