//! `waypost check --connect`, and the messages of connections that fail.

use std::process::{Command, Output};

use serde_json::Value;

use crate::support::{
    api::{Api, Conduct},
    lanes::{Lane, Nats, Pubsub, Rabbitmq, grpc_variables},
    node::{Node, PATIENCE},
    process::free_port,
    rig::Rig as _,
};

/// The exit status and what is told.
fn check(api: &str, variables: &[(String, String)]) -> (Option<i32>, String) {
    let variables = variables.iter();
    let Output { status, stderr, .. } = Command::new(env!("CARGO_BIN_EXE_waypost"))
        .args(["check", "--connect", "--api", api])
        .env_clear()
        .envs(variables.map(|(name, value)| (format!("WAYPOST_{name}"), value)))
        .output()
        .expect("the program runs");
    (status.code(), String::from_utf8(stderr).expect("text"))
}

/// What `check` tells of a lane that is there, and of one whose stream, queue or topic is not.
async fn looks_and_creates_nothing<L: Lane>() {
    let Some(mut system) = L::start().await else {
        return;
    };
    let api = Api::start();
    let variables = system.variables();
    // The second look finds what the first has left.
    for _ in 0..2 {
        let (status, told) = check(&api.url(), &variables);
        assert_eq!(status, Some(0), "{told}");
        let missing = " is missing: a node creates it";
        for part in [
            &format!("lanes.{}: ok", L::NAME),
            missing,
            "not tried: to publish",
        ] {
            assert!(told.contains(part), "{part}: {told}");
        }
        assert!(!told.contains(" fits"), "{told}");
    }
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is(L::NAME, "up", PATIENCE).await;
    let (status, told) = check(&api.url(), &variables);
    assert_eq!(status, Some(0), "{told}");
    assert!(
        told.contains(" fits") && !told.contains("missing"),
        "{told}"
    );
    assert!(told.contains("a confirm outlives a power cut: "), "{told}");
    let lane = node.lane(L::NAME).await;
    assert_eq!(
        (&lane["state"], &lane["last_error"]),
        (&"up".into(), &Value::Null)
    );
    assert_eq!(lane["attempts"], 1, "{lane}");
    assert!(
        api.posts().iter().all(|post| post.key.is_none()),
        "a GET is no POST"
    );
}

#[actix_rt::test]
async fn a_look_at_nats_creates_nothing() {
    looks_and_creates_nothing::<Nats>().await;
}

#[actix_rt::test]
async fn a_look_at_rabbitmq_creates_nothing() {
    looks_and_creates_nothing::<Rabbitmq>().await;
}

#[actix_rt::test]
async fn a_look_at_pubsub_creates_nothing() {
    looks_and_creates_nothing::<Pubsub>().await;
}

#[actix_rt::test]
async fn a_look_at_grpc_works_beside_a_running_node_and_asks_each_peer() {
    let api = Api::start();
    let variables = grpc_variables();
    let (status, told) = check(&api.url(), &variables);
    assert_eq!(status, Some(0), "{told}");
    assert!(told.contains("served, and called itself"), "{told}");
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    let (status, told) = check(&api.url(), &variables);
    assert_eq!(status, Some(0), "{told}");
    assert!(told.contains("a node serves there"), "{told}");

    let peer = format!("http://{}", variables[0].1);
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let with_peers = |peers: &str| {
        let peers = [("LANES__GRPC__PEERS".to_owned(), peers.to_owned())];
        check(&api.url(), &[&grpc_variables()[..], &peers].concat())
    };
    let (status, told) = with_peers(&peer);
    assert_eq!(status, Some(0), "{told}");
    assert!(told.contains(&format!("peer {peer} is healthy")), "{told}");
    let (status, told) = with_peers(&format!("{peer},{nobody}"));
    assert_eq!(status, Some(1), "{told}");
    assert!(told.contains(&format!("peer {nobody}: ")), "{told}");

    // Another program has the address.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = taken.local_addr().unwrap().to_string();
    let (status, told) = check(
        &api.url(),
        &[("LANES__GRPC__LISTEN".into(), listen.clone())],
    );
    assert_eq!(status, Some(1), "{told}");
    assert!(
        told.contains(&listen) && told.contains("another process"),
        "{told}"
    );
}

#[actix_rt::test]
async fn a_look_at_the_api_posts_nothing_and_says_what_it_saw() {
    let api = Api::start();
    for (answer, warned) in [
        (200, ""),
        (405, ""),
        (401, "token_file"),
        (404, "the path of"),
    ] {
        api.behave(move |_, _| Conduct::Answer(answer));
        let (status, told) = check(&api.url(), &grpc_variables());
        assert_eq!(status, Some(0), "{told}");
        let line = told
            .lines()
            .find(|line| line.starts_with("api: ok"))
            .unwrap();
        assert!(
            line.contains(&answer.to_string()) && line.contains(&api.url()),
            "{line}"
        );
        assert!(line.contains("not tried: a POST"), "{line}");
        assert_eq!(line.contains("warning"), !warned.is_empty(), "{line}");
        assert!(line.contains(warned), "{line}");
    }
    assert!(api.posts().iter().all(|post| post.body.is_empty()));
    let nobody = format!("http://127.0.0.1:{}/", free_port());
    let (status, told) = check(&nobody, &grpc_variables());
    assert_eq!(status, Some(1), "{told}");
    assert!(
        told.contains(&format!("api: {nobody}: cannot connect")),
        "{told}"
    );
}

/// Each of `cases` is a URL of the lane, and a part of the remedy.
fn names_address_and_remedy(lane: &str, cases: &[(String, &str)]) {
    let api = Api::start();
    for (url, remedy) in cases {
        let name = format!("LANES__{}__URL", lane.to_uppercase());
        let (status, told) = check(&api.url(), &[(name, url.clone())]);
        assert_eq!(status, Some(1), "{url}: {told}");
        let rest = url.split("127.0.0.1:").nth(1).unwrap();
        let number: String = rest.chars().take_while(char::is_ascii_digit).collect();
        let mut lines = told.lines();
        let failure = lines.find(|line| line.starts_with("lanes.")).unwrap();
        for part in [&format!("127.0.0.1:{number}"), *remedy] {
            assert!(failure.contains(part), "{url}: {part} is not in {failure}");
        }
        assert!(!failure.contains("secret"), "{failure}");
    }
}

#[actix_rt::test]
async fn a_connection_to_nats_that_fails_names_its_address_and_a_remedy() {
    let login = ["--user", "u", "--pass", "secret"];
    let (Some(open), Some(closed)) = (Nats::start().await, Nats::with(&login).await) else {
        return;
    };
    let [open, closed] = [open, closed].map(|server| (server.address(), server));
    names_address_and_remedy(
        "nats",
        &[
            (
                format!("nats://127.0.0.1:{}", free_port()),
                "start it, or correct the address",
            ),
            (format!("tls://{}", open.0), "speaks no TLS at this port"),
            (
                format!("nats://{}", closed.0),
                "correct the user and password",
            ),
            (format!("nats://u:secrets@{}", closed.0), "creds_file"),
        ],
    );
}

#[actix_rt::test]
async fn a_connection_to_rabbitmq_that_fails_names_its_address_and_a_remedy() {
    let Some(mut rabbit) = Rabbitmq::start().await else {
        return;
    };
    let url = rabbit.config().url;
    let mut cases = vec![
        (
            url.replace("guest@", "secret@"),
            "correct the user and password",
        ),
        (url.replace("/%2f", "/"), "`/%2f` is the default"),
        (url.replace("/%2f", "/other"), "`/%2f` is the default"),
        (
            url.replace("amqp://", "amqps://"),
            "speaks no TLS at this port",
        ),
        (
            format!("amqp://127.0.0.1:{}/%2f", free_port()),
            "start it, or correct the address",
        ),
    ];
    if let Some((port, _)) = rabbit.tls() {
        let to_tls = format!("amqp://guest:guest@127.0.0.1:{port}/%2f");
        cases.push((to_tls, "use amqps://"));
    }
    names_address_and_remedy("rabbitmq", &cases);
}
