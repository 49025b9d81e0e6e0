//! The exporter: POSTs spans to a collector as OTLP (http/protobuf), from a thread of its own. A
//! collector that is slow or away costs spans, which are counted, and nothing else.

use std::{
    io::{self, Write as _},
    sync::{Arc, Weak, atomic::Ordering::Relaxed},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use awc::{
    ClientResponse,
    http::{
        StatusCode,
        header::{self, HeaderMap, HeaderName, HeaderValue},
    },
};
use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse},
    common::v1::{InstrumentationScope, any_value::Value},
    resource::v1::Resource,
    trace::v1::{ResourceSpans, ScopeSpans},
};
use prost::Message as _;
use schemars::JsonSchema;
use serde::Serialize;
use tokio::time::{self, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use tracing_mutex::parkinglot::Mutex;

use super::{
    Destinations, LossReason, TraceSettings, Tracer,
    destination::destinations,
    queue::SpanQueue,
    span::{Span, pair},
};
use crate::{
    api::{
        client::{self, Endpoint, HttpClient},
        client_tls,
    },
    backoff::Backoff,
    config::{Config, masked_url},
};

/// The schema of the names of spans and attributes.
const SCHEMA: &str = "https://opentelemetry.io/schemas/1.44.0";
/// Bytes of a collector's answer.
const ANSWER_MAX: usize = 64 << 10;
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_CAP: Duration = Duration::from_secs(5);
/// A node that stops waits this long for its last spans.
const CLOSE_PATIENCE: Duration = Duration::from_secs(1);
const THREAD: &str = "traces";

/// The exporter of a node, or none if traces are off. Clones are one.
#[derive(Clone, Default)]
pub struct Exporter(Option<Arc<RunningExporter>>);

struct RunningExporter {
    tracer: Tracer,
    queue: Arc<SpanQueue>,
    /// The URL without its login.
    url: String,
    sampler: (&'static str, f64),
    last_error: Mutex<Option<String>>,
    closing: CancellationToken,
    /// The thread has done what it could.
    closed: CancellationToken,
}

/// The thread ends with the last handle, if not before.
impl Drop for RunningExporter {
    fn drop(&mut self) {
        self.closing.cancel();
    }
}

/// The traces in `GET /api/status`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct TraceStatus {
    url: String,
    sampler: &'static str,
    ratio: f64,
    exported: u64,
    lost: u64,
    /// Why the last POST failed; null if it has not.
    last_error: Option<String>,
}

impl Exporter {
    /// Starts the exporter if `config` names a collector. `run` is this run of the node. A mistake in
    /// a variable is told in the log: it stops no record.
    pub fn start(config: &Config, run: &str) -> Self {
        let otlp = config.telemetry.otlp.as_deref();
        let (settings, ignored) = TraceSettings::read(otlp, &config.otel);
        for variable in ignored {
            let reason = variable.why;
            warn!(variable = variable.name, reason, "the variable is ignored");
        }
        let Some(settings) = settings else {
            return Self::default();
        };
        let endpoint = match endpoint(&settings) {
            Ok(endpoint) => endpoint,
            Err(reason) => {
                warn!(reason, "traces are off: the collector cannot be asked");
                return Self::default();
            }
        };
        let url = masked_url(settings.url.as_str());
        let sampler = settings.sampler.clone();
        let queue = Arc::new(SpanQueue::new(settings.queue_max, settings.batch_max));
        let running = Arc::new(RunningExporter {
            tracer: Tracer::new(Arc::clone(&queue), sampler.clone()),
            queue: Arc::clone(&queue),
            url: url.clone(),
            sampler: (sampler.name, sampler.ratio),
            last_error: Mutex::default(),
            closing: CancellationToken::new(),
            closed: CancellationToken::new(),
        });
        let resource = resource(&settings, run);
        let destinations = destinations(&config.lanes);
        // Weak, so that the thread ends with the last handle.
        let shared = Arc::downgrade(&running);
        let (closing, closed) = (running.closing.clone(), running.closed.clone());
        let begun = thread::Builder::new().name(THREAD.into()).spawn(move || {
            let _closed = closed.drop_guard();
            let run = async {
                let client = HttpClient::new(endpoint, 1, settings.timeout);
                let task = Task {
                    client,
                    settings,
                    resource,
                    destinations,
                    queue,
                    closing,
                    shared,
                    lost: 0,
                    is_told: false,
                };
                task.run().await;
            };
            match actix_rt::Runtime::new() {
                Ok(runtime) => runtime.block_on(run),
                Err(why) => warn!(reason = %why, "traces are off: their thread cannot work"),
            }
        });
        if let Err(why) = begun {
            warn!(reason = %why, "traces are off: their thread cannot be started");
            return Self::default();
        }
        info!(
            url,
            sampler = sampler.name,
            ratio = sampler.ratio,
            "traces are exported"
        );
        Self(Some(running))
    }

    pub fn tracer(&self) -> Tracer {
        let running = self.0.as_ref();
        running.map_or_else(Tracer::default, |running| running.tracer.clone())
    }

    /// `None` if traces are off.
    pub fn status(&self) -> Option<TraceStatus> {
        let running = self.0.as_ref()?;
        let (sampler, ratio) = running.sampler;
        Some(TraceStatus {
            url: running.url.clone(),
            sampler,
            ratio,
            exported: self.exported(),
            lost: LossReason::ALL.iter().map(|why| self.lost(*why)).sum(),
            last_error: running.last_error.lock().clone(),
        })
    }

    /// The spans that the collector has taken.
    pub fn exported(&self) -> u64 {
        let running = self.0.as_ref();
        running.map_or(0, |running| running.queue.exported.load(Relaxed))
    }

    /// The spans that were lost for this reason.
    pub fn lost(&self, why: LossReason) -> u64 {
        let running = self.0.as_ref();
        running.map_or(0, |running| running.queue.lost(why))
    }

    /// POSTs the spans that wait, as far as that takes no longer than a moment.
    pub async fn close(&self) {
        if let Some(running) = &self.0 {
            running.closing.cancel();
            timeout(CLOSE_PATIENCE, running.closed.cancelled())
                .await
                .ok();
        }
    }
}

/// The collector.
fn endpoint(settings: &TraceSettings) -> Result<Endpoint, String> {
    let mut headers = HeaderMap::new();
    let protobuf = HeaderValue::from_static("application/x-protobuf");
    headers.insert(header::CONTENT_TYPE, protobuf);
    if settings.compresses {
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    for (name, value) in &settings.headers {
        // Not the name: of `Authorization: Bearer …` it would show the token.
        let unusable = || "OTEL_EXPORTER_OTLP_HEADERS has what cannot be a header";
        let name = HeaderName::try_from(name.as_str()).map_err(|_| unusable())?;
        let value = HeaderValue::try_from(value.as_str()).map_err(|_| unusable())?;
        headers.insert(name, value);
    }
    let identity = settings.identity.as_ref();
    let identity = identity.map(|(chain, key)| (chain.as_path(), key.as_path()));
    let tls = client_tls(settings.ca_file.as_deref(), identity).map_err(|why| why.to_string())?;
    let url = settings.url.as_str();
    let endpoint = Endpoint::parse(url, || Arc::new(tls));
    let endpoint = endpoint.map_err(|why| why.replace(url, &masked_url(url)))?;
    Ok(endpoint.with_headers(headers))
}

/// The attributes of this node in its spans.
fn resource(settings: &TraceSettings, run: &str) -> Resource {
    let host = gethostname::gethostname().to_string_lossy().into_owned();
    let own = [
        ("service.name", "waypost"),
        ("service.version", env!("CARGO_PKG_VERSION")),
        ("service.instance.id", run),
        ("host.name", &host),
    ];
    let is_set = |name: &str| settings.resource.iter().any(|(set, _)| set == name);
    let own = own.iter().filter(|(name, _)| !is_set(name));
    let own = own.map(|(name, value)| (*name, *value));
    let set = settings.resource.iter();
    let set = set.map(|(name, value)| (name.as_str(), value.as_str()));
    let attributes = own.chain(set);
    let attributes = attributes.map(|(name, value)| pair(name, Value::StringValue(value.into())));
    Resource {
        attributes: attributes.collect(),
        ..Resource::default()
    }
}

/// The work of the exporter's thread.
struct Task {
    client: HttpClient,
    settings: TraceSettings,
    resource: Resource,
    destinations: Destinations,
    queue: Arc<SpanQueue>,
    closing: CancellationToken,
    shared: Weak<RunningExporter>,
    /// The spans that were lost by the last POST.
    lost: u64,
    /// It is logged that spans are lost.
    is_told: bool,
}

/// Why a POST of spans failed.
struct ExportError {
    why: String,
    /// Another try may succeed.
    passes: bool,
}

impl Task {
    /// Ends soon after the exporter is closed, whether the collector answers or not.
    async fn run(mut self) {
        let closing = self.closing.clone();
        let too_late = async {
            closing.cancelled().await;
            sleep(CLOSE_PATIENCE).await;
        };
        tokio::select! {
            () = self.export_all() => {}
            () = too_late => {}
        }
    }

    /// Exports the spans until the exporter is closed.
    async fn export_all(&mut self) {
        let mut due = time::Instant::now() + self.settings.delay;
        loop {
            let is_closing = tokio::select! {
                biased;
                () = self.closing.cancelled() => true,
                () = self.queue.is_due.notified() => false,
                () = sleep_until(due) => false,
            };
            let is_due = due <= time::Instant::now();
            let mut takes_all = is_closing || is_due;
            if is_due {
                due = time::Instant::now() + self.settings.delay;
            }
            loop {
                let spans = self.queue.take(takes_all);
                if spans.is_empty() {
                    break;
                }
                self.export(spans).await;
                takes_all = is_closing;
            }
            if is_closing {
                return;
            }
        }
    }

    /// POSTs `spans` until the collector has taken them, or there is no hope.
    async fn export(&mut self, spans: Vec<Span>) {
        let count = spans.len() as u64;
        let give_up_at = time::Instant::now() + self.settings.export_timeout;
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_CAP);
        let body = match self.body(&spans) {
            Ok(body) => body,
            Err(why) => {
                self.queue.lose(LossReason::NotExported, count);
                return self.tell(Some(why.to_string()));
            }
        };
        drop(spans);
        loop {
            let ExportError { why, passes } = match self.post(&body).await {
                Ok(rejected) => {
                    let rejected = rejected.min(count);
                    self.queue.exported.fetch_add(count - rejected, Relaxed);
                    self.queue.lose(LossReason::Rejected, rejected);
                    let why = (rejected > 0).then(|| "it has rejected spans".to_owned());
                    return self.tell(why);
                }
                Err(failure) => failure,
            };
            let pause = backoff.next_delay();
            let is_over = time::Instant::now() + pause >= give_up_at;
            if !passes || is_over || self.closing.is_cancelled() {
                self.queue.lose(LossReason::NotExported, count);
                return self.tell(Some(why));
            }
            self.tell(Some(why));
            tokio::select! {
                () = sleep(pause) => {}
                () = self.closing.cancelled() => {}
            }
        }
    }

    /// POSTs once. Returns the number of spans that the collector has rejected.
    async fn post(&self, body: &Bytes) -> Result<u64, ExportError> {
        let none = HeaderMap::new();
        let finish = async |response: ClientResponse| {
            let status = response.status();
            let mut answer = Vec::new();
            client::read(response, ANSWER_MAX, |piece| {
                answer.extend_from_slice(piece);
            })
            .await?;
            Ok((status, answer))
        };
        let exchange = self.client.post(body, None, None, &none, finish);
        let failed = |why: String, passes| ExportError { why, passes };
        let (status, answer) = match timeout(self.settings.timeout, exchange).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(why)) => return Err(failed(why.to_string(), true)),
            Err(_) => {
                let why = format!("no answer within {:?}", self.settings.timeout);
                return Err(failed(why, true));
            }
        };
        if !status.is_success() {
            // The statuses that OTLP tries again after.
            let passes = matches!(
                status,
                StatusCode::TOO_MANY_REQUESTS
                    | StatusCode::BAD_GATEWAY
                    | StatusCode::SERVICE_UNAVAILABLE
                    | StatusCode::GATEWAY_TIMEOUT
            );
            return Err(failed(format!("the collector answers {status}"), passes));
        }
        // A 2xx with another body says no more than that.
        let answer = ExportTraceServiceResponse::decode(&*answer).unwrap_or_default();
        let rejected = answer.partial_success.map_or(0, |part| part.rejected_spans);
        Ok(u64::try_from(rejected).unwrap_or_default())
    }

    fn body(&self, spans: &[Span]) -> io::Result<Bytes> {
        let now = Instant::now();
        let unix = SystemTime::now().duration_since(UNIX_EPOCH);
        let unix = unix.unwrap_or_default();
        let unix_ns = |at: Instant| {
            let at = unix.saturating_sub(now.saturating_duration_since(at));
            u64::try_from(at.as_nanos()).unwrap_or(u64::MAX)
        };
        let limits = self.settings.limits;
        let spans = spans.iter();
        let spans = spans.map(|span| span.to_otlp(&self.destinations, limits, unix_ns));
        let scope = InstrumentationScope {
            name: "waypost".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            ..InstrumentationScope::default()
        };
        let request = ExportTraceServiceRequest {
            resource_spans: vec![ResourceSpans {
                resource: Some(self.resource.clone()),
                scope_spans: vec![ScopeSpans {
                    scope: Some(scope),
                    spans: spans.collect(),
                    schema_url: SCHEMA.into(),
                }],
                schema_url: SCHEMA.into(),
            }],
        };
        let plain = request.encode_to_vec();
        if !self.settings.compresses {
            return Ok(plain.into());
        }
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(&plain)?;
        encoder.finish().map(Into::into)
    }

    /// Notes how the last POST has ended. The log has a line for the first spans that are lost, and
    /// one for the end of that.
    fn tell(&mut self, failure: Option<String>) {
        let lost = LossReason::ALL
            .iter()
            .map(|why| self.queue.lost(*why))
            .sum();
        let loses = lost > self.lost;
        self.lost = lost;
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        if loses && !self.is_told {
            self.is_told = true;
            let reason = failure.as_deref();
            let reason = reason.unwrap_or("they come faster than the collector takes them");
            warn!(
                url = shared.url,
                reason,
                "spans of traces are lost, and no record is: see whether the collector runs, takes \
                 OTLP over http/protobuf at this URL, and keeps up, or record fewer traces \
                 (OTEL_TRACES_SAMPLER)"
            );
        } else if self.is_told && !loses && failure.is_none() {
            self.is_told = false;
            info!(
                url = shared.url,
                spans = lost,
                "the collector takes spans again"
            );
        }
        *shared.last_error.lock() = failure;
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::{fs, net::TcpListener};

    use super::*;

    fn threads() -> usize {
        let tasks = fs::read_dir("/proc/self/task").expect("Linux has it");
        let names =
            tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
        names.filter(|name| name.trim_end() == THREAD).count()
    }

    /// Until there are so many threads.
    async fn has_threads(count: usize) {
        let ended = timeout(Duration::from_secs(20), async {
            while threads() != count {
                sleep(Duration::from_millis(10)).await;
            }
        });
        ended
            .await
            .unwrap_or_else(|_| panic!("{} threads", threads()));
    }

    #[actix_rt::test]
    async fn the_thread_ends_with_the_node_though_the_collector_never_answers() {
        // It takes connections, and says nothing.
        let collector = TcpListener::bind("127.0.0.1:0").expect("a port");
        let mut config = Config::default();
        let url = format!("http://{}/", collector.local_addr().unwrap());
        config.telemetry.otlp = Some(url.into());
        for closes in [true, false] {
            let exporter = Exporter::start(&config, "run");
            let tracer = exporter.tracer();
            drop(tracer.request(|| None, || ("http", "/", "/")));
            has_threads(1).await;
            if closes {
                exporter.close().await;
                has_threads(0).await;
            }
            drop(exporter);
            has_threads(0).await;
        }
    }
}
