//! The destination and the choice of traces: `[telemetry]` and the variables of the OpenTelemetry
//! specification. A variable goes before the key. One that cannot be used is ignored, as the
//! specification asks, and named in the log.

use std::{collections::BTreeMap, fmt, path::PathBuf, time::Duration};

use percent_encoding::percent_decode_str;
use url::Url;

use super::sampler::Sampler;

/// The beginning of the variables' names.
pub const PREFIX: &str = "OTEL_";
/// The path of a collector that takes traces.
const TRACES_PATH: &str = "v1/traces";
/// The collector of this machine, for who asks for `otlp` and names none.
const LOCAL: &str = "http://localhost:4318";

/// The variables that begin with [`PREFIX`]. Their values may be secrets.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct OtelVariables(pub BTreeMap<String, String>);

impl fmt::Debug for OtelVariables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// Traces that are on.
#[derive(Clone, PartialEq)]
pub struct TraceSettings {
    /// The URL that spans are POSTed to.
    pub url: Url,
    pub headers: Vec<(String, String)>,
    /// PEM certificates that the collector's may be signed by, beside the public ones.
    pub ca_file: Option<PathBuf>,
    /// PEM certificate chain and key of this client.
    pub identity: Option<(PathBuf, PathBuf)>,
    pub compresses: bool,
    /// The longest time of one POST.
    pub timeout: Duration,
    pub sampler: Sampler,
    /// The attributes of this node in its spans.
    pub resource: Vec<(String, String)>,
    /// Spans that may wait, and spans of a POST.
    pub queue_max: usize,
    pub batch_max: usize,
    /// The longest time that spans wait for a POST.
    pub delay: Duration,
    /// Spans are POSTed again and again for this long.
    pub export_timeout: Duration,
    pub limits: SpanLimits,
}

/// The most of a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpanLimits {
    pub attributes: usize,
    /// Characters of an attribute's text.
    pub value_length: usize,
    pub links: usize,
}

/// A variable that has no effect, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IgnoredVariable {
    pub name: String,
    pub why: String,
}

impl TraceSettings {
    /// The settings, or `None` if traces are off. `otlp` is `[telemetry].otlp`.
    pub fn read(
        otlp: Option<&str>,
        variables: &OtelVariables,
    ) -> (Option<Self>, Vec<IgnoredVariable>) {
        let mut reader = VariableReader {
            variables: &variables.0,
            ignored: Vec::new(),
        };
        let settings = reader.settings(otlp);
        (settings, reader.ignored)
    }
}

struct VariableReader<'v> {
    variables: &'v BTreeMap<String, String>,
    ignored: Vec<IgnoredVariable>,
}

impl<'v> VariableReader<'v> {
    fn settings(&mut self, otlp: Option<&str>) -> Option<TraceSettings> {
        if self.is_disabled() {
            return None;
        }
        let url = self.url(otlp)?;
        if let Some((name, protocol)) = self.of_exporter("PROTOCOL")
            && protocol != "http/protobuf"
        {
            self.ignore(
                &name,
                format!("{protocol:?} is not spoken; http/protobuf is"),
            );
        }
        let compression = self.of_exporter("COMPRESSION");
        if let Some((name, other)) = &compression
            && !matches!(*other, "gzip" | "none")
        {
            self.ignore(name, format!("{other:?} is not known; gzip and none are"));
        }
        let file = |found: Option<(String, &str)>| found.map(|(_, file)| file.into());
        let certificate = file(self.of_exporter("CLIENT_CERTIFICATE"));
        let key = file(self.of_exporter("CLIENT_KEY"));
        let batch_max = self.number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512, 1);
        let queue_max = self.number("OTEL_BSP_MAX_QUEUE_SIZE", 2048, 1);
        let span_limit = |reader: &mut Self, what: &str, default| {
            let general = reader.number(&format!("OTEL_ATTRIBUTE_{what}_LIMIT"), default, 0);
            reader.number(&format!("OTEL_SPAN_ATTRIBUTE_{what}_LIMIT"), general, 0)
        };
        Some(TraceSettings {
            url,
            headers: self.headers(),
            ca_file: file(self.of_exporter("CERTIFICATE")),
            identity: certificate.zip(key),
            compresses: compression.is_some_and(|(_, name)| name == "gzip"),
            timeout: self.timeout(),
            sampler: self.sampler(),
            resource: self.resource(),
            queue_max,
            batch_max: batch_max.min(queue_max),
            delay: self.millis("OTEL_BSP_SCHEDULE_DELAY", 5000),
            export_timeout: self.millis("OTEL_BSP_EXPORT_TIMEOUT", 30_000),
            limits: SpanLimits {
                attributes: span_limit(self, "COUNT", 128),
                value_length: span_limit(self, "VALUE_LENGTH", usize::MAX),
                links: self.number("OTEL_SPAN_LINK_COUNT_LIMIT", 128, 0),
            },
        })
    }

    /// The variable's value. An empty one counts as unset.
    fn text(&self, name: &str) -> Option<&'v str> {
        let text = self.variables.get(name)?.trim();
        (!text.is_empty()).then_some(text)
    }

    /// The name and value of a variable of the exporter: the one for traces goes first.
    fn of_exporter(&self, what: &str) -> Option<(String, &'v str)> {
        let names = ["OTEL_EXPORTER_OTLP_TRACES_", "OTEL_EXPORTER_OTLP_"];
        let mut names = names.iter().map(|beginning| format!("{beginning}{what}"));
        names.find_map(|name| {
            let text = self.text(&name)?;
            Some((name, text))
        })
    }

    fn ignore(&mut self, name: &str, why: impl Into<String>) {
        self.ignored.push(IgnoredVariable {
            name: name.into(),
            why: why.into(),
        });
    }

    fn is_disabled(&mut self) -> bool {
        let text = self.text("OTEL_SDK_DISABLED").unwrap_or("false");
        let is_true = text.eq_ignore_ascii_case("true");
        if !is_true && !text.eq_ignore_ascii_case("false") {
            let why = format!("{text:?} is neither true nor false");
            self.ignore("OTEL_SDK_DISABLED", why);
        }
        is_true || self.exporters().is_some_and(|asked| !asked)
    }

    /// Whether the exporters that are asked for, if any are, have ours among them.
    fn exporters(&self) -> Option<bool> {
        let names = self.text("OTEL_TRACES_EXPORTER")?;
        Some(names.split(',').any(|name| name.trim() == "otlp"))
    }

    /// The first usable URL; `None` if none is named.
    fn url(&mut self, otlp: Option<&str>) -> Option<Url> {
        let own = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
        let shared = "OTEL_EXPORTER_OTLP_ENDPOINT";
        for (name, text, is_base) in [
            (own, self.text(own), false),
            (shared, self.text(shared), true),
        ] {
            let Some(text) = text else { continue };
            match collector_url(text, is_base) {
                Some(url) => return Some(url),
                None => self.ignore(name, "is no http:// or https:// URL"),
            }
        }
        // The configuration has checked the key.
        let local = (self.exporters() == Some(true)).then_some(LOCAL);
        collector_url(otlp.or(local)?, true)
    }

    fn headers(&mut self) -> Vec<(String, String)> {
        let Some((name, text)) = self.of_exporter("HEADERS") else {
            return Vec::new();
        };
        pairs(text).unwrap_or_else(|| {
            self.ignore(&name, "is no list of name=value, separated by commas");
            Vec::new()
        })
    }

    fn timeout(&mut self) -> Duration {
        let found = self.of_exporter("TIMEOUT");
        let name = found.map_or_else(|| "OTEL_EXPORTER_OTLP_TIMEOUT".into(), |(name, _)| name);
        self.millis(&name, 10_000)
    }

    fn sampler(&mut self) -> Sampler {
        let variable = "OTEL_TRACES_SAMPLER";
        let Some(name) = self.text(variable) else {
            return Sampler::default();
        };
        let argument = "OTEL_TRACES_SAMPLER_ARG";
        let ratio = self.text(argument).map_or(Some(1.0), |text| {
            let ratio = text.parse().ok();
            ratio.filter(|ratio| (0.0..=1.0).contains(ratio))
        });
        if ratio.is_none() && name.ends_with("ratio") {
            self.ignore(argument, "is no number from 0 to 1");
        }
        Sampler::named(name, ratio.unwrap_or(1.0)).unwrap_or_else(|| {
            self.ignore(variable, format!("there is no sampler {name:?} here"));
            Sampler::default()
        })
    }

    fn resource(&mut self) -> Vec<(String, String)> {
        let variable = "OTEL_RESOURCE_ATTRIBUTES";
        let mut resource = match self.text(variable).map(pairs) {
            Some(Some(pairs)) => pairs,
            Some(None) => {
                self.ignore(variable, "is no list of name=value, separated by commas");
                Vec::new()
            }
            None => Vec::new(),
        };
        if let Some(service) = self.text("OTEL_SERVICE_NAME") {
            resource.retain(|(name, _)| name != "service.name");
            resource.push(("service.name".into(), service.into()));
        }
        resource
    }

    fn millis(&mut self, name: &str, default: u64) -> Duration {
        let default = usize::try_from(default).unwrap_or(usize::MAX);
        Duration::from_millis(self.number(name, default, 1) as u64)
    }

    fn number(&mut self, name: &str, default: usize, least: usize) -> usize {
        let Some(text) = self.text(name) else {
            return default;
        };
        let number = text.parse().ok().filter(|number| *number >= least);
        number.unwrap_or_else(|| {
            self.ignore(name, format!("{text:?} is no whole number from {least} on"));
            default
        })
    }
}

/// The URL that a collector takes spans at. `text` is that URL, or the base of the URLs of all signals.
fn collector_url(text: &str, is_base: bool) -> Option<Url> {
    let mut url = Url::parse(text).ok()?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return None;
    }
    if is_base {
        let path = format!("{}/{TRACES_PATH}", url.path().trim_end_matches('/'));
        url.set_path(&path);
    }
    Some(url)
}

/// A list `name=value,name=value`, whose values are percent-encoded; `None` if it is not one.
fn pairs(text: &str) -> Option<Vec<(String, String)>> {
    let parts = text.split(',').filter(|part| !part.trim().is_empty());
    let pairs = parts.map(|part| {
        let (name, value) = part.split_once('=')?;
        let value = percent_decode_str(value.trim()).decode_utf8().ok()?;
        let name = name.trim();
        (!name.is_empty()).then(|| (name.to_owned(), value.into_owned()))
    });
    pairs.collect()
}

#[cfg(test)]
mod tests;
