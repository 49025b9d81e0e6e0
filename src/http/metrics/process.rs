//! The metrics of the process, under the names that the client libraries of Prometheus give them.

use procfs::{
    ProcResult, WithCurrentSystemInfo as _, boot_time_secs,
    process::{LimitValue, Process},
    ticks_per_second,
};
use prometheus_client::{
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

/// Adds them, or none where the system does not let a process read about itself.
pub(super) fn register(registry: &mut Registry) {
    let Ok(usage) = Usage::read() else {
        return;
    };
    registry.register(
        "process_cpu_seconds",
        "Processor time that the process has used, in the system and outside of it",
        ConstCounter::new(usage.cpu_s),
    );
    registry.register(
        "process_start_time_seconds",
        "Start of the process, in seconds since the Unix epoch",
        ConstGauge::new(usage.started_s),
    );
    for (name, help, value) in [
        (
            "process_resident_memory_bytes",
            "Resident memory",
            usage.resident_bytes,
        ),
        (
            "process_virtual_memory_bytes",
            "Virtual memory",
            usage.virtual_bytes,
        ),
        ("process_open_fds", "Open file descriptors", usage.open_fds),
        (
            "process_max_fds",
            "The most open file descriptors",
            usage.fds_max,
        ),
        ("process_threads", "Threads", usage.threads),
    ] {
        registry.register(name, help, ConstGauge::new(value));
    }
}

struct Usage {
    cpu_s: f64,
    started_s: f64,
    resident_bytes: u64,
    virtual_bytes: u64,
    open_fds: u64,
    fds_max: u64,
    threads: u64,
}

impl Usage {
    fn read() -> ProcResult<Self> {
        let process = Process::myself()?;
        let stat = process.stat()?;
        let fds_max = match process.limits()?.max_open_files.soft_limit {
            LimitValue::Value(most) => most,
            LimitValue::Unlimited => u64::MAX,
        };
        #[expect(clippy::cast_precision_loss, reason = "exact for millions of years")]
        let seconds = |ticks: u64| ticks as f64 / ticks_per_second() as f64;
        #[expect(clippy::cast_precision_loss, reason = "exact for millions of years")]
        let booted_s = boot_time_secs()? as f64;
        Ok(Self {
            cpu_s: seconds(stat.utime + stat.stime),
            started_s: booted_s + seconds(stat.starttime),
            resident_bytes: stat.rss_bytes().get(),
            virtual_bytes: stat.vsize,
            open_fds: process.fd_count()? as u64,
            fds_max,
            threads: u64::try_from(stat.num_threads).unwrap_or_default(),
        })
    }
}
