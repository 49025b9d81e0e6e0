//! TLS at ingest and at the admin side: who gets a connection, and certificates that change while the
//! node runs.

use std::{
    cell::Cell,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    rc::Rc,
    sync::Arc,
};

use awc::{
    Connector,
    http::{StatusCode, Version},
};
use futures_util::StreamExt as _;
use rustls::{
    ClientConfig, RootCertStore, SupportedProtocolVersion,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
    version::{TLS12, TLS13},
};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    http2::client::Http2Connection,
    ingest::RECORD,
    support::{
        api::Api,
        eventually,
        lanes::grpc_variables,
        node::{Node, PATIENCE},
        process::{self, free_port},
        tls::Authority,
    },
};

type Variables = Vec<(String, String)>;

/// The certificate and the key of a server, in a folder of their own.
pub struct Files(TempDir);

impl Files {
    pub fn new(authority: &Authority) -> Self {
        let files = Self(tempfile::tempdir().expect("a temporary folder"));
        files.renew(authority);
        files
    }

    /// Puts another certificate and its key in their place.
    fn renew(&self, authority: &Authority) {
        let (cert, key) = authority.issue("localhost");
        for (name, content) in [("cert.pem", cert), ("key.pem", key)] {
            let next = self.0.path().join("next");
            fs::write(&next, content).expect("room");
            fs::rename(&next, self.0.path().join(name)).expect("our folder");
        }
    }

    fn cert(&self) -> PathBuf {
        self.0.path().join("cert.pem")
    }

    fn key(&self) -> PathBuf {
        self.0.path().join("key.pem")
    }

    /// The variables by which `section` speaks TLS.
    pub fn variables(&self, section: &str) -> Variables {
        let variable = |name, path: PathBuf| (format!("{section}__{name}"), shown(&path));
        vec![
            variable("TLS_CERT_FILE", self.cert()),
            variable("TLS_KEY_FILE", self.key()),
        ]
    }
}

fn shown(path: &Path) -> String {
    path.to_str().expect("a plain path").to_owned()
}

/// A client's TLS that trusts `authority`, presents a certificate of `own` if there is one, and
/// speaks these protocols over it.
pub fn client_tls(
    authority: &Authority,
    own: Option<&Authority>,
    versions: &[&'static SupportedProtocolVersion],
    protocols: &[&str],
) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    let root = CertificateDer::from_pem_slice(authority.cert().as_bytes());
    roots.add(root.expect("PEM")).expect("a certificate");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider);
    let builder = builder
        .with_protocol_versions(versions)
        .expect("known ones");
    let builder = builder.with_root_certificates(roots);
    let mut config = match own {
        None => builder.with_no_client_auth(),
        Some(own) => {
            let (cert, key) = own.issue("a-client");
            let cert = CertificateDer::from_pem_slice(cert.as_bytes()).expect("PEM");
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("PEM");
            let config = builder.with_client_auth_cert(vec![cert], key);
            config.expect("a certificate and its key")
        }
    };
    let protocols = protocols.iter();
    config.alpn_protocols = protocols.map(|&name| name.into()).collect();
    Arc::new(config)
}

pub fn client(tls: Arc<ClientConfig>) -> awc::Client {
    let connector = Connector::new().rustls_0_23(tls).timeout(PATIENCE);
    let client = awc::Client::builder().timeout(PATIENCE);
    client.connector(connector).finish()
}

/// The status of the answer to a record; `None` if there is no answer.
pub async fn post(client: &awc::Client, scheme: &str, node: &Node) -> Option<StatusCode> {
    let url = format!("{scheme}://localhost:{}/", node.ingest);
    let request = client.post(url).content_type("application/json");
    Some(request.send_body(RECORD).await.ok()?.status())
}

async fn started(api: &Api, variables: &[Variables]) -> Node {
    let variables = [&[grpc_variables()], variables].concat().concat();
    let node = Node::start(&api.url(), &variables).await;
    node.lane_is("grpc", "up", PATIENCE).await;
    node
}

/// Whether `openssl` gets a connection, and what it says of it.
async fn handshake(port: u16, arguments: &[&str]) -> (bool, String) {
    let mut openssl = Command::new("openssl");
    openssl
        .args(["s_client", "-connect", &format!("127.0.0.1:{port}")])
        .args(["-cipher", "ALL:@SECLEVEL=0"])
        .args(arguments)
        .stdin(Stdio::null());
    let ended = tokio::task::spawn_blocking(move || openssl.output());
    let output = ended.await.expect("no panic").expect("it runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.success(), text)
}

#[actix_rt::test]
async fn records_come_over_tls_1_2_and_1_3_and_over_nothing_older() {
    let Some(authority) = Authority::new() else {
        return;
    };
    let (api, files) = (Api::start(), Files::new(&authority));
    let node = started(&api, &[files.variables("INGEST")]).await;
    for version in [&TLS12, &TLS13] {
        let client = client(client_tls(&authority, None, &[version], &[]));
        let status = post(&client, "https", &node).await;
        assert_eq!(status, Some(StatusCode::ACCEPTED), "{version:?}");
    }
    let plain = awc::Client::default();
    assert_eq!(post(&plain, "http", &node).await, None);
    let stranger = Authority::new().expect("it is installed");
    let untrusting = client(client_tls(&stranger, None, &[&TLS13], &[]));
    assert_eq!(post(&untrusting, "https", &node).await, None);
    for (version, is_spoken) in [
        ("-tls1", false),
        ("-tls1_1", false),
        ("-tls1_2", true),
        ("-tls1_3", true),
    ] {
        let (is_connected, told) = handshake(node.ingest, &[version]).await;
        assert_eq!(is_connected, is_spoken, "{version}: {told}");
    }
    for (offered, expected) in [
        ("h2,http/1.1", "h2"),
        ("http/1.1,h2", "h2"),
        ("http/1.1", "http/1.1"),
    ] {
        let (_, told) = handshake(node.ingest, &["-alpn", offered]).await;
        let expected = format!("ALPN protocol: {expected}");
        assert!(told.contains(&expected), "{offered}: {told}");
    }
    node.at_rest(PATIENCE).await;
    assert_eq!(api.count(), 2);
}

#[actix_rt::test]
async fn with_a_client_ca_only_its_clients_get_in() {
    let (Some(authority), Some(clients)) = (Authority::new(), Authority::new()) else {
        return;
    };
    let (api, files) = (Api::start(), Files::new(&authority));
    let client_ca = files.0.path().join("client-ca.pem");
    fs::write(&client_ca, clients.cert()).expect("room");
    let required = vec![("INGEST__CLIENT_CA_FILE".to_owned(), shown(&client_ca))];
    let long = vec![("INGEST__KEEP_ALIVE".to_owned(), "10m".to_owned())];
    let node = started(&api, &[files.variables("INGEST"), required, long]).await;
    for version in [&TLS12, &TLS13] {
        for (own, status) in [
            (Some(&clients), Some(StatusCode::ACCEPTED)),
            (Some(&authority), None),
            (None, None),
        ] {
            let client = client(client_tls(&authority, own, &[version], &[]));
            assert_eq!(post(&client, "https", &node).await, status, "{version:?}");
        }
    }
    let own = Some(&clients);
    let kept = client_tls(&authority, own, &[&TLS13], &["h2"]);
    let mut kept = Http2Connection::open(node.ingest, kept).await;
    let kept_plain = client_tls(&authority, own, &[&TLS13], &["http/1.1"]);
    let mut kept_plain = connect(node.ingest, &kept_plain).await;
    let get = || http::Request::get("https://localhost/");
    // With one more, nobody loses a connection.
    let both = [clients.cert(), authority.cert()].concat();
    fs::write(&client_ca, both).expect("room");
    eventually("the file counts", PATIENCE, async || {
        let client = client(client_tls(&authority, Some(&authority), &[&TLS13], &[]));
        post(&client, "https", &node).await
    })
    .await;
    let answer = kept.ask(get(), "").await.expect("an answer");
    assert_eq!(answer.status, 200);
    let request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    kept_plain.write_all(request).await.expect("it is open");
    let read = kept_plain.read(&mut [0; 4096]).await.expect("an answer");
    assert!(read > 0);
    // Connections need another one, those that are open too.
    fs::write(&client_ca, authority.cert()).expect("room");
    let ended = timeout(PATIENCE, kept.ended()).await;
    ended.expect("it ends").ok();
    let ended = timeout(PATIENCE, kept_plain.read(&mut [0; 4096])).await;
    assert!(!matches!(ended.expect("it ends"), Ok(1..)));
    let (before, after) = (Some(&clients), Some(&authority));
    eventually("the file counts", PATIENCE, async || {
        let client = client(client_tls(&authority, after, &[&TLS13], &[]));
        post(&client, "https", &node).await
    })
    .await;
    let client = client(client_tls(&authority, before, &[&TLS13], &[]));
    assert_eq!(post(&client, "https", &node).await, None);
    node.at_rest(PATIENCE).await;
    assert_eq!(api.count(), 4);
}

pub async fn connect(port: u16, tls: &Arc<ClientConfig>) -> TlsStream<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await;
    let name = ServerName::try_from("localhost").expect("a name");
    let connecting = TlsConnector::from(Arc::clone(tls)).connect(name, stream.expect("a socket"));
    connecting.await.expect("a handshake")
}

/// The certificate that a new connection gets.
async fn served(node: &Node, tls: &Arc<ClientConfig>) -> Vec<u8> {
    let stream = connect(node.ingest, tls).await;
    let (_, session) = stream.get_ref();
    session.peer_certificates().expect("a certificate")[0].to_vec()
}

#[actix_rt::test]
async fn a_new_certificate_under_load_fails_no_request_and_a_wrong_one_changes_nothing() {
    let Some(authority) = Authority::new() else {
        return;
    };
    let (api, files) = (Api::start(), Files::new(&authority));
    let node = Rc::new(started(&api, &[files.variables("INGEST")]).await);
    let tls = client_tls(&authority, None, &[&TLS12, &TLS13], &[]);
    let (is_over, posted) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(0)));
    let load = [(); 4].map(|()| {
        let (node, tls) = (Rc::clone(&node), Arc::clone(&tls));
        let (is_over, posted) = (Rc::clone(&is_over), Rc::clone(&posted));
        actix_rt::spawn(async move {
            while !is_over.get() {
                // Some requests over one connection, then another connection.
                let client = client(Arc::clone(&tls));
                for _ in 0..20 {
                    let status = post(&client, "https", &node).await;
                    assert_eq!(status, Some(StatusCode::ACCEPTED));
                    posted.set(posted.get() + 1);
                }
            }
        })
    });
    let mut before = served(&node, &tls).await;
    for _ in 0..3 {
        files.renew(&authority);
        before = eventually("the new certificate is served", PATIENCE, async || {
            let now = served(&node, &tls).await;
            (now != before).then_some(now)
        })
        .await;
    }
    let unusable = r#"waypost_file_unusable{key="ingest.tls_cert_file"}"#;
    let (cert, key) = authority.issue("localhost");
    for (file, content, why) in [
        (
            files.cert(),
            "no certificate",
            "holds no certificate in PEM",
        ),
        (
            files.cert(),
            cert.as_str(),
            "is not the key of the certificate",
        ),
        (files.key(), "no key", "holds no private key in PEM"),
        (
            files.key(),
            key.as_str(),
            "is not the key of the certificate",
        ),
    ] {
        let kept = fs::read(&file).expect("it is there");
        fs::write(&file, content).expect("room");
        eventually("the status tells", PATIENCE, async || {
            let status = node.status().await;
            let told = status["files"][0]["last_error"].as_str()?;
            told.contains(why).then_some(())
        })
        .await;
        assert_eq!(node.metric(unusable).await, "1");
        assert_eq!(served(&node, &tls).await, before, "{why}");
        fs::write(&file, kept).expect("room");
        eventually("all is well", PATIENCE, async || {
            let status = node.status().await;
            status["files"][0]["last_error"].is_null().then_some(())
        })
        .await;
        assert_eq!(node.metric(unusable).await, "0");
    }
    is_over.set(true);
    for client in load {
        client.await.expect("each request is answered with 202");
    }
    node.at_rest(PATIENCE).await;
    assert_eq!(api.count(), posted.get());
    for line in key.lines().filter(|line| !line.starts_with('-')) {
        assert!(!node.log().contains(line));
    }
}

#[actix_rt::test]
async fn handshakes_that_never_end_are_closed_and_leave_room_for_others() {
    let Some(authority) = Authority::new() else {
        return;
    };
    let (api, files) = (Api::start(), Files::new(&authority));
    let limits = [("MAX_CONNECTIONS", "8"), ("HEADER_TIMEOUT", "1s")];
    let limits = limits.map(|(key, value)| (format!("INGEST__{key}"), value.to_owned()));
    let node = started(&api, &[files.variables("INGEST"), limits.into()]).await;
    let ended = |reason| {
        let metric = "waypost_connections_ended_total";
        format!(r#"{metric}{{side="ingest",reason="{reason}"}}"#)
    };
    let mut silent = Vec::new();
    for _ in 0..32 {
        let stream = TcpStream::connect(("127.0.0.1", node.ingest)).await;
        silent.push(stream.expect("the system takes it"));
    }
    let client = client(client_tls(&authority, None, &[&TLS13], &[]));
    let status = post(&client, "https", &node).await;
    assert_eq!(status, Some(StatusCode::ACCEPTED));
    for mut stream in silent {
        let mut rest = Vec::new();
        let closed = timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
        closed.expect("it is closed").ok();
    }
    // A connection that was kept may have ended meanwhile.
    node.status().await;
    assert_ne!(node.metric(&ended("handshake_late")).await, "0");
    assert_ne!(node.metric(&ended("handshake_evicted")).await, "0");
    node.at_rest(PATIENCE).await;
}

/// A node whose admin side speaks TLS.
struct TlsAdmin {
    child: Child,
    url: String,
}

impl Drop for TlsAdmin {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn waypost(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_waypost"));
    command.args(arguments).env_remove("PUBSUB_EMULATOR_HOST");
    command.output().expect("it runs")
}

#[actix_rt::test]
async fn the_admin_side_is_open_to_other_machines_that_have_a_certificate() {
    let (Some(authority), Some(clients)) = (Authority::new(), Authority::new()) else {
        return;
    };
    let files = Files::new(&authority);
    let path = |name: &str, content: &str| {
        let path = files.0.path().join(name);
        fs::write(&path, content).expect("room");
        shown(&path)
    };
    let ca = path("ca.pem", authority.cert());
    let client_ca = path("client-ca.pem", clients.cert());
    let (cert, key) = clients.issue("an-operator");
    let (cert, key) = (path("client.pem", &cert), path("client-key.pem", &key));
    let port = free_port();
    let mut variables = files.variables("ADMIN");
    variables.extend([
        ("ADMIN__CLIENT_CA_FILE".into(), client_ca),
        ("ADMIN__LISTEN".into(), format!("0.0.0.0:{port}")),
        ("INGEST__LISTEN".into(), "127.0.0.1:0".into()),
        ("LANES__GRPC__LISTEN".into(), "127.0.0.1:0".into()),
        ("SPOOL__DIR".into(), shown(&files.0.path().join("data"))),
    ]);
    let child = process::start(env!("CARGO_BIN_EXE_waypost"), |command| {
        let variables = variables.iter();
        let variables = variables.map(|(key, value)| (format!("WAYPOST_{key}"), value));
        command.arg("run").envs(variables).stderr(Stdio::null());
    });
    let node = TlsAdmin {
        child: child.expect("it starts"),
        url: format!("https://localhost:{port}"),
    };
    let list = ["dead", "list", "--admin", &node.url, "--ca-file", &ca];
    let with_cert = [&list[..], &["--cert-file", &cert, "--key-file", &key]].concat();
    eventually("the node answers", PATIENCE, async || {
        waypost(&with_cert).status.success().then_some(())
    })
    .await;
    let mut watchers = Vec::new();
    // Without a certificate, probes alone are answered.
    for (version, protocols, http) in [
        (&TLS12, &[][..], Version::HTTP_11),
        (&TLS13, &[], Version::HTTP_11),
        (&TLS13, &["h2"], Version::HTTP_2),
    ] {
        let operator = client(client_tls(
            &authority,
            Some(&clients),
            &[version],
            protocols,
        ));
        let url = format!("{}/api/events", node.url);
        let mut answer = operator.get(url).send().await.expect("a connection");
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(answer.version(), http);
        let first = answer.next().await.expect("an event").expect("a piece");
        assert!(!first.is_empty());
        watchers.push(answer);
        let nobody = client_tls(&authority, None, &[version], protocols);
        let get = async |path: &str| {
            // Nobody keeps a connection.
            let nobody = client(Arc::clone(&nobody));
            let answer = nobody.get(format!("{}{path}", node.url)).send().await;
            let mut answer = answer.expect("a connection");
            (answer.status(), answer.json::<Value>().await.ok())
        };
        for probe in ["/healthz", "/readyz"] {
            let (status, problem) = get(probe).await;
            assert_ne!(status, StatusCode::UNAUTHORIZED, "{problem:?}");
        }
        for path in ["/", "/metrics", "/api/status", "/api/nothing", "/nothing"] {
            let (status, problem) = get(path).await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{path}");
            let problem = problem.expect("JSON");
            assert_eq!(problem["type"], "urn:waypost:problem:certificate", "{path}");
        }
        // One with a wrong certificate gets no connection.
        let stranger = client(client_tls(
            &authority,
            Some(&authority),
            &[version],
            protocols,
        ));
        let answer = stranger.get(format!("{}/healthz", node.url)).send().await;
        assert!(answer.is_err(), "{answer:?}");
    }
    let untrusting = ["dead", "list", "--admin", &node.url];
    let no_key = [&list[..], &["--cert-file", &cert]].concat();
    let no_cert = [&list[..], &["--cert-file", &key, "--key-file", &key]].concat();
    // Those who watch need a certificate that still counts.
    path("client-ca.pem", authority.cert());
    for mut watcher in watchers {
        let events = async { while let Some(Ok(_)) = watcher.next().await {} };
        timeout(PATIENCE, events).await.expect("it ends");
    }
    for (arguments, status) in [
        (&list[..], 1),
        (&untrusting, 1),
        (&no_key, 2),
        (&no_cert, 2),
    ] {
        let output = waypost(arguments);
        assert_eq!(output.status.code(), Some(status), "{output:?}");
    }
}

#[test]
fn each_file_that_is_missing_or_wrong_is_named_by_its_line() {
    let (Some(authority), Some(stranger)) = (Authority::new(), Authority::new()) else {
        return;
    };
    let files = Files::new(&authority);
    let folder = files.0.path();
    let (_, other_key) = stranger.issue("localhost");
    fs::write(folder.join("other.pem"), &other_key).expect("room");
    fs::write(folder.join("text.pem"), "this is a secret").expect("room");
    let config = folder.join("waypost.toml");
    for section in ["ingest", "admin"] {
        for (cert, key, client_ca, mistake) in [
            ("cert.pem", "key.pem", "cert.pem", None),
            (
                "cert.pem",
                "",
                "",
                Some((2, "tls_cert_file: needs tls_key_file")),
            ),
            (
                "",
                "key.pem",
                "",
                Some((3, "tls_key_file: needs tls_cert_file")),
            ),
            ("", "", "cert.pem", Some((4, "client_ca_file: is for TLS"))),
            ("none.pem", "key.pem", "", Some((2, "tls_cert_file: "))),
            ("cert.pem", "none.pem", "", Some((3, "tls_key_file: "))),
            ("text.pem", "key.pem", "", Some((2, "tls_cert_file: "))),
            ("key.pem", "key.pem", "", Some((2, "tls_cert_file: "))),
            ("cert.pem", "text.pem", "", Some((3, "tls_key_file: "))),
            ("cert.pem", "cert.pem", "", Some((3, "tls_key_file: "))),
            ("cert.pem", "other.pem", "", Some((3, "tls_key_file: "))),
            (
                "cert.pem",
                "key.pem",
                "key.pem",
                Some((4, "client_ca_file: ")),
            ),
        ] {
            let line = |name: &str, file: &str| match file {
                "" => "\n".to_owned(),
                file => format!("{name} = \"{}\"\n", shown(&folder.join(file))),
            };
            let lines = [
                line("tls_cert_file", cert),
                line("tls_key_file", key),
                line("client_ca_file", client_ca),
            ];
            fs::write(&config, format!("[{section}]\n{}", lines.concat())).expect("room");
            let output = waypost(&["check", "--config", &shown(&config)]);
            let told = [&output.stdout[..], &output.stderr].concat();
            let told = String::from_utf8_lossy(&told);
            match mistake {
                None => assert!(output.status.success(), "{told}"),
                Some((line, what)) => {
                    assert_eq!(output.status.code(), Some(2), "{told}");
                    let expected = format!("{}:{line}: {section}.{what}", config.display());
                    assert!(told.starts_with(&expected), "{told}");
                    assert_eq!(told.lines().count(), 1, "{told}");
                }
            }
            assert!(!told.contains("this is a secret"), "{told}");
            for secret in other_key.lines().filter(|line| !line.starts_with('-')) {
                assert!(!told.contains(secret), "{told}");
            }
        }
    }
}
