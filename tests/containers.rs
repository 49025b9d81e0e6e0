//! The files in `docker/` agree with the program: each name, variable, port, path and command line
//! there is one that Waypost, or the service beside it, has. No test needs a Docker daemon.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use clap::Parser as _;
use serde::Deserialize;
use waypost::{cli::Cli, config::Config, lane_id::LaneId};

const LANES: [LaneId; 4] = [LaneId::Grpc, LaneId::Nats, LaneId::Rabbitmq, LaneId::Pubsub];
const NODES: [&str; 2] = ["node-a", "node-b"];

/// The part of the Compose specification that our files use. Other keys fail the test.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Service {
    extends: Option<Extends>,
    image: Option<String>,
    build: Option<Build>,
    command: Vec<String>,
    environment: BTreeMap<String, String>,
    user: Option<String>,
    hostname: Option<String>,
    ports: Vec<String>,
    volumes: Vec<String>,
    tmpfs: Vec<String>,
    depends_on: BTreeMap<String, Dependency>,
    healthcheck: Option<HealthCheck>,
    read_only: bool,
    init: bool,
    cap_drop: Vec<String>,
    security_opt: Vec<String>,
    restart: Option<String>,
    stop_grace_period: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Extends {
    Here(String),
    There { file: String, service: String },
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Build {
    context: String,
    dockerfile: String,
    args: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Dependency {
    condition: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct HealthCheck {
    test: Vec<String>,
    interval: Option<String>,
    timeout: Option<String>,
    start_period: Option<String>,
}

#[derive(Deserialize)]
struct File {
    services: BTreeMap<String, Service>,
    #[serde(default)]
    volumes: BTreeMap<String, Option<()>>,
}

/// A compose file with its variables and extended services resolved.
struct Stack {
    lanes: Vec<LaneId>,
    services: BTreeMap<String, Service>,
    volumes: BTreeSet<String>,
}

/// The text of a file beside the compose files.
fn text(name: &str) -> String {
    let path = folder().join(name);
    fs::read_to_string(&path).unwrap_or_else(|why| panic!("{}: {why}", path.display()))
}

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/docker"))
}

/// The lines of a file, without comments and blank lines.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

fn pins() -> BTreeMap<String, String> {
    lines(&text(".env"))
        .map(|line| line.split_once('=').expect("NAME=value"))
        .map(|(k, v)| (k.into(), v.into()))
        .collect()
}

fn parse(name: &str) -> File {
    let filled = pins().iter().fold(text(name), |text, (pin, value)| {
        text.replace(&format!("${{{pin}}}"), value)
    });
    for line in lines(&filled) {
        assert!(
            !line.contains('$'),
            "{name}: no such variable in .env: {line}"
        );
    }
    serde_saphyr::from_str(&filled).unwrap_or_else(|why| panic!("{name}: {why}"))
}

/// As Compose does it: a service's own values override those that it extends, lists are joined, and
/// `depends_on` is not inherited.
fn resolve(service: &Service, name: &str) -> Service {
    let (file, of) = match &service.extends {
        None => return service.clone(),
        Some(Extends::Here(of)) => (name, of),
        Some(Extends::There { file, service }) => (file.as_str(), service),
    };
    let there = parse(file);
    let base = there
        .services
        .get(of)
        .unwrap_or_else(|| panic!("{name}: {file} has no {of}"));
    let mut whole = Service {
        depends_on: BTreeMap::new(),
        ..resolve(base, file)
    };
    let own = service.clone();
    whole.healthcheck = own.healthcheck.or(whole.healthcheck);
    whole.image = own.image.or(whole.image);
    whole.build = own.build.or(whole.build);
    whole.user = own.user.or(whole.user);
    whole.hostname = own.hostname.or(whole.hostname);
    whole.restart = own.restart.or(whole.restart);
    whole.stop_grace_period = own.stop_grace_period.or(whole.stop_grace_period);
    if !own.command.is_empty() {
        whole.command = own.command;
    }
    whole.read_only |= own.read_only;
    whole.init |= own.init;
    whole.environment.extend(own.environment);
    whole.ports.extend(own.ports);
    whole.volumes.extend(own.volumes);
    whole.tmpfs.extend(own.tmpfs);
    whole.cap_drop.extend(own.cap_drop);
    whole.security_opt.extend(own.security_opt);
    whole.depends_on = own.depends_on;
    whole
}

fn stacks() -> BTreeMap<String, Stack> {
    let each = LANES
        .into_iter()
        .map(|lane| (lane.name(), vec![lane]))
        .chain([("all", LANES.to_vec())]);
    each.map(|(name, lanes)| {
        let name = format!("compose.{name}.yaml");
        let file = parse(&name);
        let services = file
            .services
            .iter()
            .map(|(of, service)| (of.clone(), resolve(service, &name)))
            .collect();
        (
            name,
            Stack {
                lanes,
                services,
                volumes: file.volumes.into_keys().collect(),
            },
        )
    })
    .collect()
}

/// Calls `check` for each service of each stack, with a name for messages.
fn each_service(mut check: impl FnMut(&str, &Stack, &Service)) {
    for (file, stack) in &stacks() {
        for (name, service) in &stack.services {
            check(&format!("{file}: {name}"), stack, service);
        }
    }
}

/// The arguments of each instruction of that name in the Dockerfile.
fn dockerfile(instruction: &str) -> Vec<String> {
    let whole = text("Dockerfile").replace("\\\n", " ");
    lines(&whole)
        .filter_map(|line| line.split_once(char::is_whitespace))
        .filter(|(name, _)| *name == instruction)
        .map(|(_, arguments)| arguments.trim().to_owned())
        .collect()
}

/// The variables of the image, overridden by those of the service.
fn environment(service: &Service) -> BTreeMap<String, String> {
    let image = dockerfile("ENV").join(" ");
    let image = image
        .split_whitespace()
        .map(|pair| pair.split_once('=').expect("NAME=value"));
    let all = image
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .chain(service.environment.clone());
    // A file of the container is a file of the repository that is mounted there.
    let source = |value: String| {
        let mut files = mounts(service).filter(|(source, _)| source.starts_with('.'));
        let file = files.find(|(_, target)| *target == value);
        file.map_or(value.clone(), |(source, _)| {
            folder().join(source).display().to_string()
        })
    };
    all.map(|(name, value)| (name, source(value))).collect()
}

/// The configuration of a node. An invalid one fails the test.
fn configuration(service: &Service) -> Config {
    Config::load(None, &environment(service), &[]).unwrap_or_else(|mistakes| panic!("{mistakes:?}"))
}

/// The value of `--flag value` or `--flag=value`.
fn flag<'s>(service: &'s Service, flag: &str) -> Option<&'s str> {
    let words = &service.command;
    let joined = words
        .iter()
        .find_map(|word| word.strip_prefix(flag)?.strip_prefix('='));
    joined.or_else(|| {
        Some(
            words
                .get(words.iter().position(|word| word == flag)? + 1)?
                .as_str(),
        )
    })
}

fn port(address: &str) -> u16 {
    address
        .rsplit(':')
        .next()
        .and_then(|port| port.trim_end_matches('/').parse().ok())
        .expect("an address ends in a port")
}

/// The first value of a line `key value` or `key: value`.
fn settings<'t>(text: &'t str, key: &'t str) -> impl Iterator<Item = &'t str> {
    lines(text)
        .filter_map(move |line| line.strip_prefix(key)?.strip_prefix([':', ' ']))
        .filter_map(|rest| rest.split_whitespace().next())
}

/// The ports that the service listens on.
fn listens(name: &str, service: &Service) -> BTreeSet<u16> {
    match name {
        _ if NODES.contains(&name) => {
            let config = configuration(service);
            let grpc = config.lanes.grpc.map(|grpc| grpc.listen);
            let all = [Some(config.ingest.listen), Some(config.admin.listen), grpc]
                .into_iter()
                .flatten();
            let open = all.inspect(|address| {
                assert!(address.ip().is_unspecified(), "{name} is deaf at {address}");
            });
            open.map(|address| address.port()).collect()
        }
        "sink" => [port(flag(service, "--listen").expect("it says where"))].into(),
        "balancer" => settings(&text("haproxy.cfg"), "bind").map(port).collect(),
        "nats" => {
            let conf = text("nats.conf");
            settings(&conf, "port")
                .chain(settings(&conf, "http_port"))
                .map(port)
                .collect()
        }
        "pubsub" => [port(flag(service, "--host-port").expect("it says where"))].into(),
        // The defaults of their images.
        "rabbitmq" => [5672].into(),
        "locust" => [8089].into(),
        "prometheus" => [9090].into(),
        "grafana" => [3000].into(),
        _ => panic!("{name}: its ports are not known here"),
    }
}

/// The name of the service that `url` names. Fails unless the service listens on that port.
fn leads_to<'u>(stack: &Stack, url: &'u str) -> &'u str {
    let (_, rest) = url.split_once("://").expect("a URL");
    let authority = rest.split('/').next().unwrap_or_default();
    let authority = authority.rsplit('@').next().unwrap_or_default();
    let (host, port) = authority.split_once(':').expect("host and port");
    let service = stack
        .services
        .get(host)
        .unwrap_or_else(|| panic!("{url}: there is no {host}"));
    assert!(
        listens(host, service).contains(&port.parse().expect("a port")),
        "{url}: {host} listens elsewhere"
    );
    host
}

/// Source and target of each mount.
fn mounts(service: &Service) -> impl Iterator<Item = (&str, &str)> {
    service.volumes.iter().map(|mount| {
        let mut parts = mount.split(':');
        (
            parts.next().unwrap_or_default(),
            parts.next().unwrap_or_else(|| panic!("{mount}: no target")),
        )
    })
}

fn lies_on_a_volume(service: &Service, path: &Path) -> bool {
    mounts(service).any(|(source, target)| !source.starts_with('.') && path.starts_with(target))
}

#[test]
fn every_image_is_pinned_in_the_env_file_and_nowhere_else() {
    let pins = pins();
    let mut used = BTreeSet::new();
    for file in fs::read_dir(folder()).expect("the folder is there") {
        let name = file
            .expect("the folder can be read")
            .file_name()
            .into_string()
            .expect("plain names");
        if name == ".env" {
            continue;
        }
        let text = text(&name);
        for (pin, image) in pins.iter().filter(|(pin, _)| pin.ends_with("_IMAGE")) {
            let (repository, tag) = image
                .rsplit_once(':')
                .unwrap_or_else(|| panic!("{pin} has no tag"));
            assert!(
                tag.contains(|c: char| c.is_ascii_digit()),
                "{pin}: {tag} moves"
            );
            assert!(
                !text.contains(&format!("{repository}:{tag}")),
                "{name} repeats {image}"
            );
            if text.contains(&format!("${{{pin}}}")) {
                used.insert(pin.clone());
            }
        }
        for line in lines(&text).filter(|line| name.contains(".yaml") && line.starts_with("image:"))
        {
            assert!(
                line.starts_with("image: ${") && line.ends_with("_IMAGE}"),
                "{name}: {line}"
            );
        }
    }
    let all: BTreeSet<_> = pins
        .into_keys()
        .filter(|pin| pin.ends_with("_IMAGE"))
        .collect();
    assert_eq!(used, all, "each pin has its use");
    let version = format!("waypost:{}", env!("CARGO_PKG_VERSION"));
    assert!(
        text(".env").contains(&format!("WAYPOST_IMAGE={version}\n")),
        "the image has the package's version"
    );
}

/// The services that a node's API and brokers are.
fn needs<'c>(config: &'c Config, stack: &Stack) -> BTreeSet<&'c str> {
    let lanes = &config.lanes;
    let urls = [
        Some(&*config.api.url),
        lanes.nats.as_ref().map(|nats| &*nats.url),
        lanes.rabbitmq.as_ref().map(|rabbitmq| &*rabbitmq.url),
        lanes
            .pubsub
            .as_ref()
            .and_then(|pubsub| pubsub.endpoint.as_deref()),
    ];
    urls.into_iter()
        .flatten()
        .map(|url| leads_to(stack, url))
        .collect()
}

/// The services that a node's gRPC peers are.
fn peers<'c>(config: &'c Config, stack: &Stack) -> Vec<&'c str> {
    let urls = config.lanes.grpc.iter().flat_map(|grpc| &grpc.peers);
    urls.map(|url| leads_to(stack, url)).collect()
}

#[test]
fn nodes_are_configured_validly_for_the_lanes_of_their_file_and_reach_what_they_name() {
    for (file, stack) in &stacks() {
        for node in NODES {
            let service = &stack.services[node];
            assert!(
                service.command.is_empty(),
                "{file}: {node} runs what the image runs"
            );
            let config = configuration(service);
            let lanes: BTreeSet<_> = config
                .lanes
                .in_order()
                .into_iter()
                .map(|(lane, _)| lane)
                .collect();
            assert_eq!(
                lanes,
                stack.lanes.iter().copied().collect(),
                "{file}: {node}"
            );

            assert!(
                peers(&config, stack)
                    .iter()
                    .all(|peer| NODES.contains(peer)),
                "{file}: {node}"
            );
            assert_eq!(
                service
                    .depends_on
                    .keys()
                    .map(String::as_str)
                    .collect::<BTreeSet<_>>(),
                needs(&config, stack),
                "{file}: {node}"
            );
            assert!(
                lies_on_a_volume(service, &config.spool.dir),
                "{file}: the records of {node} are on no volume"
            );
        }
    }
}

#[test]
fn every_command_line_is_one_that_waypost_takes() {
    let words = |instruction: &str| -> Vec<String> {
        let [words] = &dockerfile(instruction)[..] else {
            panic!("one {instruction}")
        };
        serde_json::from_str(words).expect("a list of words")
    };
    let entry = words("ENTRYPOINT");
    assert_eq!(entry, ["waypost"]);
    each_service(|name, _, service| {
        if service.build.is_none() {
            return;
        }
        let command = if service.command.is_empty() {
            words("CMD")
        } else {
            service.command.clone()
        };
        Cli::try_parse_from(entry.iter().chain(&command))
            .unwrap_or_else(|why| panic!("{name}: {why}"));
        if let Some(db) = flag(service, "--db") {
            assert!(
                lies_on_a_volume(service, Path::new(db)),
                "{name}: {db} is on no volume"
            );
        }
    });
}

#[test]
fn published_ports_are_listened_on_and_stay_on_this_machine() {
    for (file, stack) in &stacks() {
        let mut taken = BTreeSet::new();
        for (name, service) in &stack.services {
            let listens = listens(name, service);
            for published in &service.ports {
                let parts: Vec<_> = published.split(':').collect();
                let [address, outer, inner] = parts[..] else {
                    panic!("{file}: {name}: {published}: address:outer:inner")
                };
                assert_eq!(
                    address, "127.0.0.1",
                    "{file}: {name}: {published} is open to the network"
                );
                assert!(taken.insert(outer.to_owned()), "{file}: {outer} twice");
                assert!(
                    listens.contains(&port(inner)),
                    "{file}: {name} does not listen on {inner}"
                );
            }
        }
    }
}

#[test]
fn mounted_files_exist_and_named_volumes_are_declared_and_used() {
    for (file, stack) in &stacks() {
        let mut used = BTreeSet::new();
        for (name, service) in &stack.services {
            for (source, _) in mounts(service) {
                if source.starts_with('.') {
                    assert!(
                        folder().join(source).is_file(),
                        "{file}: {name}: no file {source}"
                    );
                } else {
                    assert!(
                        used.insert(source.to_owned()),
                        "{file}: {source} has two users"
                    );
                }
            }
        }
        assert_eq!(used, stack.volumes, "{file}");
    }
}

#[test]
fn services_that_others_wait_for_have_a_health_check_at_their_own_port() {
    let image = dockerfile("HEALTHCHECK");
    for (file, stack) in &stacks() {
        for (name, service) in &stack.services {
            for (other, Dependency { condition }) in &service.depends_on {
                assert_eq!(condition, "service_healthy", "{file}: {name}");
                assert!(
                    stack.services.contains_key(other),
                    "{file}: {name} waits for {other}, which is not there"
                );
            }
            let own = service
                .healthcheck
                .as_ref()
                .map(|check| check.test.join(" "))
                .filter(|test| !test.is_empty());
            let test = own.or_else(|| NODES.contains(&name.as_str()).then(|| image.join(" ")));
            let test = test.unwrap_or_else(|| panic!("{file}: {name} has no health check"));
            let at = ["127.0.0.1:", "/dev/tcp/127.0.0.1/"]
                .into_iter()
                .find_map(|before| {
                    let digits = test.split(before).nth(1)?;
                    digits
                        .split(|c: char| !c.is_ascii_digit())
                        .next()?
                        .parse()
                        .ok()
                });
            match at {
                Some(port) => assert!(
                    listens(name, service).contains(&port),
                    "{file}: {name}: {test}"
                ),
                None => assert!(
                    test.contains("rabbitmq-diagnostics"),
                    "{file}: {name}: {test}"
                ),
            }
        }
    }
}

#[test]
fn no_container_has_rights_or_a_writable_root() {
    each_service(|name, _, service| {
        assert!(service.read_only, "{name}: its root can be written to");
        assert_eq!(service.cap_drop, ["ALL"], "{name}");
        assert_eq!(service.security_opt, ["no-new-privileges:true"], "{name}");
    });
}

#[test]
fn the_dockerfile_agrees_with_the_program() {
    let defaults = Config::default();
    let config = configuration(&Service::default());
    let served = configuration(&stacks()["compose.all.yaml"].services["node-a"]);
    let sink = &stacks()["compose.all.yaml"].services["sink"];
    let grpc = waypost::config::GrpcConfig::default().listen.port();
    let ports: BTreeSet<_> = [
        defaults.ingest.listen.port(),
        config.admin.listen.port(),
        grpc,
    ]
    .into();
    let ports = &ports | &listens("sink", sink);
    let exposed = dockerfile("EXPOSE").join(" ");
    assert_eq!(
        exposed
            .split_whitespace()
            .map(port)
            .collect::<BTreeSet<_>>(),
        ports
    );
    assert!(
        config.admin.listen.ip().is_loopback(),
        "nobody outside gives an order without a token"
    );
    assert_eq!(config.admin.listen.port(), served.admin.listen.port());
    assert_eq!(
        dockerfile("VOLUME"),
        [config.spool.dir.to_str().expect("plain")]
    );

    let user = dockerfile("USER");
    let (id, _) = user[0].split_once(':').expect("user and group");
    assert!(id.parse::<u32>().expect("a number") > 0, "not root");

    let build = stacks()
        .remove("compose.grpc.yaml")
        .and_then(|mut stack| stack.services.remove("sink")?.build)
        .expect("built");
    assert_eq!(
        folder()
            .join(build.context)
            .join(build.dockerfile)
            .canonicalize()
            .ok(),
        folder().join("Dockerfile").canonicalize().ok()
    );
    assert_eq!(
        dockerfile("ARG").into_iter().collect::<BTreeSet<_>>(),
        build.args.into_keys().collect()
    );
    assert_eq!(dockerfile("FROM"), ["${BUILDER} AS build", "${BASE}"]);

    let ignore = fs::read_to_string(folder().join("../.dockerignore")).expect("it is there");
    for part in lines(&ignore).filter_map(|line| line.strip_prefix('!')) {
        assert!(
            folder().join("..").join(part).exists(),
            ".dockerignore: there is no {part}"
        );
    }
}

#[test]
fn the_balancer_sends_to_the_nodes_and_asks_whether_they_are_ready() {
    let config = text("haproxy.cfg");
    for (file, stack) in &stacks() {
        let servers: Vec<_> = lines(&config)
            .filter_map(|line| line.strip_prefix("server "))
            .collect();
        assert_eq!(servers, NODES.map(|node| format!("{node} {node}:8000")));
        for node in NODES {
            leads_to(stack, &format!("http://{node}:8000"));
            let admin = configuration(&stack.services[node]).admin.listen.port();
            assert!(
                config.contains(&format!("check port {admin} ")),
                "{file}: {node}"
            );
        }
        assert!(config.contains("uri /readyz"));
    }
}

#[test]
fn brokers_keep_what_they_confirm() {
    each_service(|name, _, service| match name.rsplit(' ').next() {
        Some("nats") => {
            let conf = text("nats.conf");
            assert_eq!(
                settings(&conf, "sync_interval").collect::<Vec<_>>(),
                ["always"]
            );
            let store = settings(&conf, "store_dir").next().expect("it is on disk");
            assert!(lies_on_a_volume(service, Path::new(store)), "{name}");
        }
        Some("rabbitmq") => {
            assert!(
                service.hostname.is_some(),
                "{name}: the data belong to a name"
            );
            assert!(
                lies_on_a_volume(service, Path::new("/var/lib/rabbitmq")),
                "{name}"
            );
        }
        _ => {}
    });
}

#[test]
fn locust_finds_its_files_and_the_balancer() {
    for (file, stack) in &stacks() {
        let locust = &stack.services["locust"];
        let mounted: Vec<_> = mounts(locust).map(|(_, target)| target).collect();
        let named = [
            flag(locust, "--locustfile"),
            locust.environment.get("TRAFFIC").map(String::as_str),
        ];
        assert!(
            named
                .into_iter()
                .all(|path| path.is_some_and(|path| mounted.contains(&path))),
            "{file}: {mounted:?}"
        );
        leads_to(stack, flag(locust, "--host").expect("it says where"));
    }
}

/// The part of `prometheus.yaml` that names nodes and files.
#[derive(Deserialize)]
struct PrometheusConfig {
    rule_files: Vec<String>,
    scrape_configs: Vec<ScrapeConfig>,
}

#[derive(Deserialize)]
struct ScrapeConfig {
    job_name: String,
    authorization: Credentials,
    static_configs: Vec<Targets>,
}

#[derive(Deserialize)]
struct Credentials {
    credentials_file: String,
}

#[derive(Deserialize)]
struct Targets {
    targets: Vec<String>,
}

#[test]
fn prometheus_scrapes_the_admin_side_of_both_nodes_with_their_token() {
    let config: PrometheusConfig =
        serde_saphyr::from_str(&text("prometheus.yaml")).expect("it is YAML");
    let [scrape] = &config.scrape_configs[..] else {
        panic!("one job")
    };
    assert!(
        text("alerts.yaml").contains(&format!("up{{job=\"{}\"}}", scrape.job_name)),
        "the alerts are about its job"
    );
    for (file, stack) in &stacks() {
        let prometheus = &stack.services["prometheus"];
        let mounted = |source: &str| {
            let found = mounts(prometheus).find(|(from, _)| *from == source);
            found.map(|(_, target)| target)
        };
        let config_file = flag(prometheus, "--config.file");
        assert_eq!(mounted("./prometheus.yaml"), config_file, "{file}");
        let folder = Path::new(config_file.expect("it says where")).parent();
        for rules in &config.rule_files {
            let target = mounted(&format!("./{rules}")).map(Path::new);
            assert_eq!(target, folder.map(|folder| folder.join(rules)).as_deref());
        }
        let token = mounted("./admin-token");
        assert_eq!(
            token,
            Some(&*scrape.authorization.credentials_file),
            "{file}"
        );
        let storage = flag(prometheus, "--storage.tsdb.path").expect("it says where");
        assert!(lies_on_a_volume(prometheus, Path::new(storage)), "{file}");

        let mut scraped: Vec<_> = scrape.static_configs[0].targets.iter().collect();
        scraped.sort_unstable();
        for (node, target) in NODES.into_iter().zip(scraped) {
            let port = configuration(&stack.services[node]).admin.listen.port();
            assert_eq!(*target, format!("{node}:{port}"), "{file}");
        }
    }
}

#[test]
fn grafana_finds_the_dashboard_and_prometheus() {
    let sources = text("grafana-datasource.yaml");
    let providers = text("grafana-dashboards.yaml");
    let url = settings(&sources, "url").next().expect("a URL");
    let path = settings(&providers, "path").next().expect("a path");
    for (file, stack) in &stacks() {
        assert_eq!(leads_to(stack, url), "prometheus", "{file}");
        let grafana = &stack.services["grafana"];
        let home = &grafana.environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"];
        let dashboard = mounts(grafana).find(|(from, _)| *from == "./grafana-dashboard.json");
        let (_, target) = dashboard.expect("it is mounted");
        assert_eq!(target, home, "{file}");
        assert!(Path::new(target).starts_with(path), "{file}");
    }
}
