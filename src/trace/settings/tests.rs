use super::*;

/// Name and value.
type Variable = (&'static str, &'static str);
type Found = (Option<TraceSettings>, Vec<IgnoredVariable>);

fn read(otlp: Option<&str>, variables: &[(&str, &str)]) -> Found {
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    let variables = OtelVariables(variables.iter().map(owned).collect());
    TraceSettings::read(otlp, &variables)
}

#[test]
fn traces_are_off_unless_a_collector_is_named() {
    const BASE: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318/x/");
    const OWN: (&str, &str) = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://t/in");
    for (otlp, variables, url) in [
        (None, &[][..], None),
        (Some("http://key"), &[], Some("http://key/v1/traces")),
        (
            Some("http://key"),
            &[BASE],
            Some("http://c:4318/x/v1/traces"),
        ),
        (Some("http://key"), &[BASE, OWN], Some("https://t/in")),
        (None, &[("OTEL_EXPORTER_OTLP_ENDPOINT", " ")], None),
        (None, &[("OTEL_TRACES_SAMPLER", "always_on")], None),
        (
            None,
            &[("OTEL_TRACES_EXPORTER", "otlp")],
            Some("http://localhost:4318/v1/traces"),
        ),
        (None, &[BASE, ("OTEL_TRACES_EXPORTER", "none")], None),
        (None, &[BASE, ("OTEL_TRACES_EXPORTER", "zipkin")], None),
        (None, &[BASE, ("OTEL_SDK_DISABLED", "TRUE")], None),
        (
            None,
            &[BASE, ("OTEL_SDK_DISABLED", "false")],
            Some("http://c:4318/x/v1/traces"),
        ),
    ] {
        let (settings, ignored) = read(otlp, variables);
        let found = settings.map(|settings| settings.url.to_string());
        assert_eq!(found.as_deref(), url, "{otlp:?} {variables:?}");
        assert_eq!(ignored, [], "{variables:?}");
    }
}

/// The settings as text, but for those that `read` leaves at their defaults.
fn shown(settings: &TraceSettings) -> String {
    let TraceSettings {
        headers,
        ca_file,
        identity,
        compresses,
        timeout,
        sampler,
        resource,
        queue_max,
        batch_max,
        delay,
        export_timeout,
        limits,
        url: _,
    } = settings;
    format!(
        "{headers:?} {ca_file:?} {identity:?} {compresses} {timeout:?} {} {} {resource:?} \
         {queue_max} {batch_max} {delay:?} {export_timeout:?} {} {} {}",
        sampler.name, sampler.ratio, limits.attributes, limits.value_length, limits.links
    )
}

/// Variables, and the text that changes by them in what [`shown`] shows.
const EFFECTS: &[(&[Variable], &str, &str)] = &[
    (
        &[("OTEL_EXPORTER_OTLP_HEADERS", "a=b%20c, d=")],
        "[] None None",
        r#"[("a", "b c"), ("d", "")] None None"#,
    ),
    (
        &[
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=b"),
            ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "e=f"),
        ],
        "[] None None",
        r#"[("e", "f")] None None"#,
    ),
    (
        &[("OTEL_EXPORTER_OTLP_CERTIFICATE", "ca")],
        "None None",
        r#"Some("ca") None"#,
    ),
    (
        &[
            ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "cert"),
            ("OTEL_EXPORTER_OTLP_CLIENT_KEY", "key"),
        ],
        "None None",
        r#"None Some(("cert", "key"))"#,
    ),
    (
        &[("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")],
        "false",
        "true",
    ),
    (&[("OTEL_EXPORTER_OTLP_TIMEOUT", "7")], " 10s", " 7ms"),
    (
        &[
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "7"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "8"),
        ],
        " 10s",
        " 8ms",
    ),
    (
        &[("OTEL_TRACES_SAMPLER", "always_off")],
        "parentbased_always_on 1",
        "always_off 0",
    ),
    (
        &[
            ("OTEL_TRACES_SAMPLER", "traceidratio"),
            ("OTEL_TRACES_SAMPLER_ARG", "0.25"),
        ],
        "parentbased_always_on 1",
        "traceidratio 0.25",
    ),
    (
        &[
            ("OTEL_RESOURCE_ATTRIBUTES", "service.name=x,a=b%2Cc"),
            ("OTEL_SERVICE_NAME", "y"),
        ],
        "[] 2048",
        r#"[("a", "b,c"), ("service.name", "y")] 2048"#,
    ),
    (&[("OTEL_BSP_MAX_QUEUE_SIZE", "600")], "2048 512", "600 512"),
    (&[("OTEL_BSP_MAX_QUEUE_SIZE", "60")], "2048 512", "60 60"),
    (
        &[("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "9")],
        "2048 512",
        "2048 9",
    ),
    (&[("OTEL_BSP_SCHEDULE_DELAY", "9")], " 5s", " 9ms"),
    (&[("OTEL_BSP_EXPORT_TIMEOUT", "9")], " 30s", " 9ms"),
    (
        &[("OTEL_ATTRIBUTE_COUNT_LIMIT", "9")],
        " 128 1844",
        " 9 1844",
    ),
    (
        &[
            ("OTEL_ATTRIBUTE_COUNT_LIMIT", "9"),
            ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "8"),
        ],
        " 128 1844",
        " 8 1844",
    ),
    (
        &[("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "9")],
        "18446744073709551615",
        "9",
    ),
    (
        &[("OTEL_SPAN_LINK_COUNT_LIMIT", "9")],
        "551615 128",
        "551615 9",
    ),
];

#[test]
fn each_variable_has_its_effect() {
    let (plain, _) = read(Some("http://c"), &[]);
    let plain = shown(&plain.unwrap());
    let defaults = "[] None None false 10s parentbased_always_on 1 [] 2048 512 5s 30s 128 \
                    18446744073709551615 128";
    assert_eq!(plain, defaults);
    for (variables, old, new) in EFFECTS {
        let (settings, ignored) = read(Some("http://c"), variables);
        let expected = plain.replacen(old, new, 1);
        assert_ne!(expected, plain, "{variables:?}");
        assert_eq!(shown(&settings.unwrap()), expected, "{variables:?}");
        assert_eq!(ignored, [], "{variables:?}");
    }
}

#[test]
fn a_variable_that_cannot_be_used_is_named_and_changes_nothing() {
    let (plain, _) = read(Some("http://c"), &[]);
    for (name, value) in [
        ("OTEL_SDK_DISABLED", "1"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "ftp://c"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "nonsense"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
        ("OTEL_RESOURCE_ATTRIBUTES", "=x"),
        ("OTEL_TRACES_SAMPLER", "jaeger_remote"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
        ("OTEL_BSP_SCHEDULE_DELAY", "-1"),
        ("OTEL_SPAN_LINK_COUNT_LIMIT", "many"),
    ] {
        let (settings, ignored) = read(Some("http://c"), &[(name, value)]);
        assert!(settings == plain, "{name}");
        let names: Vec<_> = ignored.iter().map(|ignored| &*ignored.name).collect();
        assert_eq!(names, [name]);
    }
    let ratio = [
        ("OTEL_TRACES_SAMPLER", "traceidratio"),
        ("OTEL_TRACES_SAMPLER_ARG", "1.5"),
    ];
    let (settings, ignored) = read(Some("http://c"), &ratio);
    assert_eq!(settings.map(|settings| settings.sampler.ratio), Some(1.0));
    assert_eq!(ignored[0].name, "OTEL_TRACES_SAMPLER_ARG");
}
