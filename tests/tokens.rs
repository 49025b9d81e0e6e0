//! Who may come in: bearer tokens of files that change while the node runs.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    process::{Command, Output},
    time::Duration,
};

use awc::http::{Method, StatusCode, header};
use serde_json::{Value, json};
use tempfile::NamedTempFile;
use tokio::time::{Instant, sleep_until};
use waypost::config::{Config, Flag};

use crate::{
    ingest::{RECORD, Request, begun, ended, post},
    support::{
        api::Api,
        eventually,
        lanes::grpc_variables,
        node::{Node, PATIENCE},
    },
};

pub fn file(content: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().expect("a temporary file");
    file.write_all(content.as_bytes()).expect("room");
    file
}

/// A node whose `key` names the file.
pub async fn guarded_by(key: &str, api: &str, file: &NamedTempFile) -> Node {
    let path = file.path().display().to_string();
    let tokens = [(key.to_owned(), path)];
    Node::start(api, &[&grpc_variables()[..], &tokens].concat()).await
}

pub async fn guarded(api: &str, file: &NamedTempFile) -> Node {
    let node = guarded_by("INGEST__TOKENS_FILE", api, file).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    node
}

pub fn with_token(token: &str) -> Request {
    post(RECORD).with("Authorization", format!("Bearer {token}"))
}

/// The only file that is read again, as the status shows it.
pub async fn file_status(node: &Node) -> Value {
    let (_, status) = node.get("/api/status").await.expect("the node answers");
    let files = status["files"].as_array().expect("a list");
    assert_eq!(files.len(), 1, "{status}");
    files[0].clone()
}

pub const UNUSABLE: &str = r#"waypost_file_unusable{key="ingest.tokens_file"}"#;

#[actix_rt::test]
async fn without_a_token_each_request_but_health_is_401_and_takes_nothing() {
    let api = Api::start();
    let file = file("first-token\nsecond-token\n");
    let node = guarded(&api.url(), &file).await;
    let requests = || {
        [
            post(RECORD),
            post(RECORD).to("/grpc"),
            post(RECORD).to("/pigeon"),
            post(RECORD).to("/a/b"),
            post("{]"),
            post(vec![b' '; 2 << 20]),
            post(RECORD).with("Content-Encoding", "br"),
            post("").by(Method::PUT),
            post("").by(Method::GET).to("/openapi.json"),
            post("").by(Method::OPTIONS),
        ]
    };
    for request in requests() {
        let (status, headers, problem) = request.send_and_see(&node).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{problem}");
        assert_eq!(problem["type"], "urn:waypost:problem:token");
        let challenge = headers.get(header::WWW_AUTHENTICATE).expect("a challenge");
        assert_eq!(challenge, "Bearer realm=\"waypost\"");
    }
    for wrong in ["third-token", "first-toke", "first-token-", ""] {
        let (status, headers, problem) = with_token(wrong).send_and_see(&node).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{problem}");
        let challenge = headers.get(header::WWW_AUTHENTICATE).expect("a challenge");
        assert_eq!(
            challenge,
            "Bearer realm=\"waypost\", error=\"invalid_token\""
        );
    }
    for method in [Method::GET, Method::HEAD] {
        let (status, _, _) = post("").by(method).send(&node).await;
        assert_eq!(status, StatusCode::OK);
    }
    assert_eq!(node.at_rest(PATIENCE).await["accepted"], 0);
    assert_eq!(api.count(), 0);

    for token in ["first-token", "second-token"] {
        let (status, _, receipt) = with_token(token).send(&node).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{receipt}");
    }
    let (status, _, _) = with_token("first-token").to("/pigeon").send(&node).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    node.at_rest(PATIENCE).await;
    assert_eq!(api.count(), 2);
    // The token is for this node alone, and is told to nobody.
    for posted in api.posts() {
        assert!(!format!("{posted:?}").contains("-token"), "{posted:?}");
    }
    let status = node.get("/api/status").await.expect("the node answers").1;
    assert!(!status.to_string().contains("-token"));
    assert!(!node.log().contains("-token"));
}

#[actix_rt::test]
async fn a_change_of_the_file_counts_and_a_file_that_is_gone_changes_nothing() {
    let api = Api::start();
    let file = file("old");
    let node = guarded(&api.url(), &file).await;
    let well = |count| json!({"key": "ingest.tokens_file", "count": count, "last_error": null});
    assert_eq!(file_status(&node).await, well(1));
    fs::write(file.path(), "new\nother").expect("room");
    let becomes = async |token: &str, wanted: StatusCode| {
        eventually(&format!("{token}: {wanted}"), PATIENCE, async || {
            let (status, _, _) = with_token(token).send(&node).await;
            (status == wanted).then_some(())
        })
        .await;
    };
    becomes("new", StatusCode::ACCEPTED).await;
    becomes("old", StatusCode::UNAUTHORIZED).await;
    assert_eq!(node.metric(UNUSABLE).await, "0");

    // Also for a body that was on its way when its token was removed.
    let (half, rest) = RECORD.as_bytes().split_at(9);
    let head = "POST / HTTP/1.1\r\nAuthorization: Bearer other";
    let slow = begun(node.ingest, head, half, rest).await;
    becomes("other", StatusCode::ACCEPTED).await;
    let since = Instant::now();
    fs::write(file.path(), "new").expect("room");
    becomes("other", StatusCode::UNAUTHORIZED).await;
    // A check counts for a second.
    sleep_until(since + Duration::from_secs(2)).await;
    let answer = ended(slow, rest).await;
    assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
    let away = file.path().with_extension("away");
    fs::rename(file.path(), &away).expect("our folder");
    eventually("the status tells", PATIENCE, async || {
        let file = file_status(&node).await;
        file["last_error"].is_string().then_some(())
    })
    .await;
    assert_eq!(node.metric(UNUSABLE).await, "1");
    becomes("new", StatusCode::ACCEPTED).await;
    let told = "a file cannot be used; what was read last stays";
    assert_eq!(node.log().matches(told).count(), 1, "{}", node.log());

    fs::rename(&away, file.path()).expect("our folder");
    eventually("the status tells no error", PATIENCE, async || {
        (file_status(&node).await == well(1)).then_some(())
    })
    .await;
    // A file without a token is a mistake: it would lock everybody out.
    fs::write(file.path(), "\n").expect("room");
    eventually("the status tells", PATIENCE, async || {
        let file = file_status(&node).await;
        let told = file["last_error"].as_str()?.ends_with(" holds no token");
        told.then_some(())
    })
    .await;
    assert_eq!(node.metric(UNUSABLE).await, "1");
    becomes("new", StatusCode::ACCEPTED).await;
    becomes("old", StatusCode::UNAUTHORIZED).await;
}

#[actix_rt::test]
async fn a_node_does_not_start_without_a_token_in_its_file() {
    for content in ["", "two words"] {
        let file = file(content);
        let path = file.path().display().to_string();
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_waypost"))
            .args(["run", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
            .env("WAYPOST_INGEST__TOKENS_FILE", &path)
            .env("WAYPOST_SPOOL__DIR", file.path().with_extension("data"))
            .output()
            .expect("it runs");
        assert!(!output.status.success(), "{content:?}");
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(told.contains("ingest.tokens_file"), "{told}");
        assert!(told.contains(&path), "{told}");
        assert!(!told.contains("two words"), "{told}");
        fs::remove_dir_all(file.path().with_extension("data")).ok();
    }
}

/// The answer of the admin side to a request with this header, if there is one.
async fn ask_admin(node: &Node, path: &str, header: Option<&str>) -> (StatusCode, String) {
    let url = format!("http://127.0.0.1:{}{path}", node.admin);
    let client = awc::Client::builder().timeout(PATIENCE).finish();
    let method = if path.ends_with("/pause") {
        Method::POST
    } else {
        Method::GET
    };
    let mut request = client.request(method, url).content_type("application/json");
    if let Some(header) = header {
        request = request.insert_header((header::AUTHORIZATION, header));
    }
    let mut answer = request.send_body("{}").await.expect("the node answers");
    let challenge = answer.headers().get(header::WWW_AUTHENTICATE);
    let challenge = challenge.map(|value| value.to_str().expect("text").to_owned());
    let is_refused = answer.status() == StatusCode::UNAUTHORIZED;
    assert_eq!(is_refused, challenge.is_some(), "{path}: {challenge:?}");
    if let Some(challenge) = challenge {
        assert!(
            challenge.starts_with("Bearer realm=\"waypost\""),
            "{challenge}"
        );
        assert!(
            challenge.ends_with(", Basic realm=\"waypost\""),
            "{challenge}"
        );
    }
    let body = match path {
        // A stream without an end.
        "/api/events" if !is_refused => String::new(),
        _ => String::from_utf8(answer.body().await.expect("a body").to_vec()).expect("text"),
    };
    (answer.status(), body)
}

#[actix_rt::test]
async fn an_order_whose_token_is_removed_while_it_comes_is_not_carried_out() {
    let api = Api::start();
    let file = file("first-token\nsecond-token\n");
    let node = guarded_by("ADMIN__TOKEN_FILE", &api.url(), &file).await;
    let (half, rest) = b"{\"weight\": 7}".split_at(5);
    let head = "POST /api/lanes/grpc/weight HTTP/1.1\r\nAuthorization: Bearer second-token";
    let slow = begun(node.admin, head, half, rest).await;
    let since = Instant::now();
    fs::write(file.path(), "first-token\n").expect("room");
    eventually("the token is gone", PATIENCE, async || {
        let (status, _) = ask_admin(&node, "/api/status", Some("Bearer second-token")).await;
        (status == StatusCode::UNAUTHORIZED).then_some(())
    })
    .await;
    // A check counts for a second.
    sleep_until(since + Duration::from_secs(2)).await;
    let answer = ended(slow, rest).await;
    assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
    let (_, status) = ask_admin(&node, "/api/status", Some("Bearer first-token")).await;
    let status: Value = serde_json::from_str(&status).expect("JSON");
    assert_eq!(status["lanes"][0]["weight_set"], Value::Null, "{status}");
}

#[actix_rt::test]
async fn the_admin_side_answers_probes_to_all_and_the_rest_to_those_with_a_token() {
    let api = Api::start();
    let file = file("first-token\nsecond-token\n");
    let node = guarded_by("ADMIN__TOKEN_FILE", &api.url(), &file).await;
    eventually("the node is ready", PATIENCE, async || {
        let (status, _) = ask_admin(&node, "/readyz", None).await;
        (status == StatusCode::OK).then_some(())
    })
    .await;
    assert_eq!(ask_admin(&node, "/healthz", None).await.0, StatusCode::OK);
    let others = [
        "/",
        "/page.js",
        "/metrics",
        "/api/status",
        "/api/events",
        "/api/dead",
        "/api/explain?id=a",
        "/api/lanes/grpc/pause",
        "/api/lanes/pause",
        "/api/nothing",
        "/nothing",
        "/healthz/",
        "//healthz",
    ];
    let wrong = [
        "Bearer third-token",
        "Bearer first-toke",
        "Basic first-token",
    ];
    for path in others {
        for header in wrong.into_iter().map(Some).chain([None]) {
            let (status, body) = ask_admin(&node, path, header).await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{path}, {header:?}");
            let problem: Value = serde_json::from_str(&body).expect("JSON");
            assert_eq!(problem["type"], "urn:waypost:problem:token", "{path}");
        }
    }
    // Under somebody else's name, a browser is not asked for a password.
    for path in others {
        let url = format!("http://127.0.0.1:{}{path}", node.admin);
        let request = awc::Client::default().get(url);
        let answer = request
            .insert_header((header::HOST, "evil.example.com"))
            .send()
            .await;
        let answer = answer.expect("the node answers");
        let is_asked = answer.headers().contains_key(header::WWW_AUTHENTICATE);
        assert_eq!(is_asked, path == "/metrics", "{path}: {}", answer.status());
    }
    let known = Some("Bearer second-token");
    for path in others {
        let (status, _) = ask_admin(&node, path, known).await;
        assert_ne!(status, StatusCode::UNAUTHORIZED, "{path}");
    }
    let (_, status) = ask_admin(&node, "/api/status", known).await;
    let status: Value = serde_json::from_str(&status).expect("JSON");
    assert_eq!(status["lanes"][0]["state"], "paused", "{status}");
    assert_eq!(status["files"][0]["key"], "admin.token_file", "{status}");
    let (_, metrics) = ask_admin(&node, "/metrics", known).await;
    for told in [&status.to_string(), &metrics, &node.log()] {
        assert!(!told.contains("-token"), "{told}");
    }
    fs::write(file.path(), "first-token").expect("room");
    eventually("the second token is refused", PATIENCE, async || {
        let (status, _) = ask_admin(&node, "/metrics", known).await;
        (status == StatusCode::UNAUTHORIZED).then_some(())
    })
    .await;
    // A browser that asks for a user and a password.
    let login = Some("Basic bWU6Zmlyc3QtdG9rZW4=");
    let (status, page) = ask_admin(&node, "/", login).await;
    assert_eq!(status, StatusCode::OK, "{page}");
    assert!(!page.contains("-token"), "{page}");
    let first = Some("Bearer first-token");
    assert_eq!(ask_admin(&node, "/metrics", first).await.0, StatusCode::OK);
}

fn waypost(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_waypost"));
    command
        .args(arguments)
        .envs(variables.iter().copied())
        .env_remove("PUBSUB_EMULATOR_HOST");
    command.output().expect("it runs")
}

#[actix_rt::test]
async fn a_command_presents_the_token_of_a_file() {
    let api = Api::start();
    let file = file("\nfirst-token\nsecond-token\n");
    let node = guarded_by("ADMIN__TOKEN_FILE", &api.url(), &file).await;
    let admin = format!("http://127.0.0.1:{}", node.admin);
    let path = file.path().display().to_string();
    let list = ["dead", "list", "--admin", &admin];
    let by_flag = [&list[..], &["--token-file", &path]].concat();
    let variable = "WAYPOST_ADMIN__TOKEN_FILE";
    for (arguments, variables, status) in [
        (&list[..], &[][..], 1),
        (&by_flag, &[], 0),
        // It is of this machine's node, and no other node is told it.
        (&list, &[(variable, path.as_str())], 1),
        // The flag overrides the variable.
        (&by_flag, &[(variable, "/nowhere")], 0),
        (&list[..2], &[(variable, "/nowhere")], 2),
    ] {
        let output = waypost(arguments, variables);
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {told}");
        assert!(!told.contains("-token\n"), "{told}");
        if status == 1 {
            assert!(told.contains("by --token-file"), "{told}");
        }
    }
    for login in ["secret-of-mine@", "me:secret-of-mine@"] {
        let admin = format!("http://{login}127.0.0.1:{}", node.admin);
        let output = waypost(&["dead", "list", "--admin", &admin], &[]);
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{told}");
        assert!(told.contains("by --token-file"), "{told}");
        assert!(!told.contains("secret-of-mine"), "{told}");
    }
}

#[test]
fn an_admin_side_that_is_open_to_other_machines_needs_a_token() {
    let token = file("secret-of-mine");
    let token = token.path().display().to_string();
    let config = file("[admin]\nlisten = \"0.0.0.0:0\"\n");
    let config = config.path().display().to_string();
    let data = tempfile::tempdir().expect("a temporary folder");
    let data = data.path().display().to_string();
    let line = "add token_file = \"FILE\" to [admin]";
    let open = Flag {
        flag: "--admin",
        key: "admin.listen",
        value: "0.0.0.0:0".into(),
    };
    let mistakes = Config::load(None, &BTreeMap::new(), &[open]).expect_err("it is refused");
    assert!(mistakes[0].what.contains(line), "{mistakes:?}");
    for (arguments, place) in [
        (&["--config", &config][..], format!("{config}:2: ")),
        (&["--admin", "0.0.0.0:0"], "--admin: ".into()),
        (&["--admin", "[::]:0"], "--admin: ".into()),
        (&["--admin", "[::ffff:10.0.0.1]:0"], "--admin: ".into()),
    ] {
        let run = ["run", "--data", &data, "--listen", "127.0.0.1:0"];
        for command in [&["check"][..], &run] {
            let output = waypost(&[command, arguments].concat(), &[]);
            let told = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{arguments:?}: {told}");
            assert!(
                told.starts_with(&format!("{place}admin.listen: ")),
                "{told}"
            );
            assert!(told.contains(line), "{told}");
        }
        let known = [("WAYPOST_ADMIN__TOKEN_FILE", token.as_str())];
        let output = waypost(&[&["check"][..], arguments].concat(), &known);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {output:?}");
        let told = [output.stdout, output.stderr].concat();
        assert!(!String::from_utf8_lossy(&told).contains("secret-of-mine"));
    }
    for own in [
        "127.0.0.1:0",
        "127.9.9.9:0",
        "[::1]:0",
        "[::ffff:127.0.0.1]:0",
    ] {
        let output = waypost(&["check", "--admin", own], &[]);
        assert_eq!(output.status.code(), Some(0), "{own}: {output:?}");
    }
}
