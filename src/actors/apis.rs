//! The APIs of a node. Each has a client, a limit, a breaker, parked records and dead letters of its
//! own, so that one that is away costs the others nothing.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::error;
use tracing_mutex::parkinglot::Mutex;

use super::{dead_letters::DeadLetters, held::HeldRecords, parking::Parking};
use crate::{
    api::{ApiError, Limits, Settings, content::PostForm, limit::AdaptiveLimit, rate::RateLimit},
    breaker::{ApiBreakers, Breaker},
    changes::ChangeLog,
    config::{ApiConfig, Config, DEFAULT_API},
    ledger::ApiCounts,
    spool::{OpenError, Queue, Spool, SpoolStats, Spools},
};

/// The folder of the APIs' spools, in that of the node's.
const FOLDER: &str = "apis";

/// Why the APIs cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ApisError {
    #[error("spool: {0}")]
    Spool(#[from] OpenError),
    #[error("api: {0}")]
    Api(#[from] ApiError),
    #[error("{}: {source}", .folder.display())]
    Folder { folder: PathBuf, source: io::Error },
}

/// The parts of one API that all lanes share.
#[derive(Clone)]
pub struct SharedApi {
    /// Its name in `[apis.NAME]`; `None` for `[api]`.
    pub name: Option<Arc<str>>,
    pub url: Arc<str>,
    pub settings: Settings,
    pub limits: Limits,
    pub form: PostForm,
    /// POSTs in flight for each lane.
    pub limit: Arc<Mutex<AdaptiveLimit>>,
    pub rate: Arc<RateLimit>,
    pub breaker: Arc<Breaker>,
    pub counts: Arc<ApiCounts>,
    pub dead_letters: DeadLetters,
    pub parking: Parking,
    /// `None` if it is the only API: then a record that it does not take stays in its lane.
    pub held: Option<HeldRecords>,
}

impl SharedApi {
    /// The parts of the API that `config` describes. Its dead letters, and records that are parked,
    /// are in `spool`.
    ///
    /// # Errors
    /// If a file that is named cannot be used.
    pub fn new(
        name: Option<Arc<str>>,
        config: &ApiConfig,
        spool: Spool,
        held: Option<HeldRecords>,
        run: &Arc<str>,
    ) -> Result<Self, ApisError> {
        let section = name
            .as_ref()
            .map_or_else(|| "api".into(), |name| format!("apis.{name}"));
        let url: Arc<str> = config.url.to_string().into();
        let dead_letters = DeadLetters {
            spool,
            give_up_after: config.give_up_after,
        };
        Ok(Self {
            name,
            settings: Settings::read(&section, config)?,
            limits: Limits {
                posts: config.concurrency,
                batch: config.batch,
            },
            form: PostForm::new(config.cloudevents),
            limit: Arc::new(Mutex::new(AdaptiveLimit::new(
                config.concurrency,
                Instant::now(),
            ))),
            breaker: Arc::new(Breaker::new(Arc::clone(&url))),
            rate: Arc::new(RateLimit::new(Arc::clone(&url), config.rate)),
            url,
            counts: Arc::default(),
            parking: Parking::new(dead_letters.clone(), Arc::clone(run)),
            dead_letters,
            held,
        })
    }

    /// The same API, whose outages go to `log`.
    #[must_use]
    fn with_change_log(self, log: &ChangeLog) -> Self {
        let breaker = Breaker::new(Arc::clone(&self.url)).with_change_log(log.clone());
        Self {
            breaker: Arc::new(breaker),
            ..self
        }
    }

    /// The name in metrics and in answers of the admin side.
    pub fn shown_name(&self) -> &str {
        self.name.as_deref().unwrap_or(DEFAULT_API)
    }

    /// Bytes that count for its `spool_max`.
    pub fn disk_bytes(&self) -> u64 {
        let held = self.held.as_ref();
        held.map_or(0, |held| held.spool().stats().bytes)
    }

    /// The counts of its disk for it alone: the node's own spool has more than that of `[api]`.
    pub fn stats(&self) -> SpoolStats {
        let own = self.dead_letters.spool.stats();
        match (&self.name, &self.held) {
            (None, Some(held)) => {
                let held = held.spool().stats();
                own.without_held() + held
            }
            _ => own,
        }
    }
}

/// The disk that has the dead letters of an API, and its records that are parked or held.
pub struct ApiDisk {
    pub spools: Spools,
    /// It also has records of APIs that are not configured: they wait in the node's own spool.
    pub is_shared: bool,
}

/// The APIs of a node, and the records of those that are not configured. Clones share them.
#[derive(Clone)]
pub struct Apis(Arc<KnownApis>);

struct KnownApis {
    /// The first is `[api]`.
    all: Vec<SharedApi>,
    /// Records for an API that is not configured: they wait in the node's own spool.
    unclaimed: HeldRecords,
    /// The spools of APIs that are not configured any more, with what they have left.
    removed: Vec<(String, Spool)>,
    spools: Spools,
    stopping: CancellationToken,
}

impl Apis {
    /// Opens the APIs of `config`. `own` is the node's spool.
    ///
    /// # Errors
    /// If a folder, or a file that is named, cannot be used.
    pub fn open(
        config: &Config,
        own: &Spool,
        run: &Arc<str>,
        log: &ChangeLog,
    ) -> Result<Self, ApisError> {
        let folder = config.spool.dir.join(FOLDER);
        let found = folders(&folder).map_err(|source| ApisError::Folder {
            folder: folder.clone(),
            source,
        });
        let mut names = found?;
        let is_only = config.apis.is_empty();
        if !is_only {
            names.insert(DEFAULT_API.into());
            names.extend(config.apis.keys().cloned());
        }
        let mut spools = Vec::new();
        let mut all = Vec::new();
        let mut removed = Vec::new();
        for name in names {
            let of_it = match &*name {
                DEFAULT_API => Some(&config.api),
                other => config.apis.get(other),
            };
            let max = of_it.map_or(config.spool.max, |api| api.spool_max);
            let spool = Spool::open(&folder.join(&name), max)?;
            spools.push(spool.clone());
            let Some(of_it) = of_it else {
                removed.push((name, spool));
                continue;
            };
            let held = HeldRecords::new(spool.clone(), name.as_str().into(), Arc::clone(run));
            let (name, letters) = match &*name {
                DEFAULT_API => (None, own.clone()),
                other => (Some(other.into()), spool),
            };
            all.push(SharedApi::new(name, of_it, letters, Some(held), run)?);
        }
        match all.iter().position(|api| api.name.is_none()) {
            Some(at) => all[..=at].rotate_right(1),
            None => all.push(SharedApi::new(None, &config.api, own.clone(), None, run)?),
        }
        let all = all
            .into_iter()
            .map(|api| api.with_change_log(log))
            .collect();
        tell_of_removed(&removed);
        Ok(Self(Arc::new(KnownApis {
            all,
            unclaimed: HeldRecords::new(own.clone(), "unclaimed".into(), Arc::clone(run)),
            removed,
            spools: Spools::new(own.clone(), spools),
            stopping: CancellationToken::new(),
        })))
    }

    /// `api` is the only one. `own` is the node's spool.
    pub fn only(api: SharedApi, own: &Spool, run: &Arc<str>) -> Self {
        Self(Arc::new(KnownApis {
            all: vec![api],
            unclaimed: HeldRecords::new(own.clone(), "unclaimed".into(), Arc::clone(run)),
            removed: Vec::new(),
            spools: Spools::new(own.clone(), []),
            stopping: CancellationToken::new(),
        }))
    }

    /// All, the first of which is `[api]`.
    pub fn all(&self) -> &[SharedApi] {
        &self.0.all
    }

    /// `[api]`
    pub fn default_api(&self) -> &SharedApi {
        &self.0.all[0]
    }

    /// The one of this name, as in [`SharedApi::name`].
    pub fn get(&self, name: Option<&str>) -> Option<&SharedApi> {
        self.0.all.iter().find(|api| api.name.as_deref() == name)
    }

    pub fn limits(&self) -> Vec<Limits> {
        self.0.all.iter().map(|api| api.limits).collect()
    }

    pub fn breakers(&self) -> ApiBreakers {
        let all = self.0.all.iter();
        ApiBreakers::new(all.map(|api| (api.name.clone(), Arc::clone(&api.breaker))))
    }

    /// Takes records for APIs that are not configured.
    pub fn unclaimed(&self) -> &HeldRecords {
        &self.0.unclaimed
    }

    /// Records for APIs that are not configured, dead letters apart.
    pub fn unclaimed_records(&self) -> u64 {
        let removed = self.0.removed.iter();
        let removed: u64 = removed.map(|(_, spool)| spool.stats().parked()).sum();
        self.0.unclaimed.spool().stats().held() + removed
    }

    /// The disk of an API. `None` if there is none of this name, configured or with records on disk.
    pub fn disk_of(&self, name: &str) -> Option<ApiDisk> {
        let own = self.0.unclaimed.spool();
        let is_shared = own.stats().held() > 0;
        let of = |spool: Spool, others: Option<Spool>| ApiDisk {
            spools: Spools::new(spool, others),
            is_shared,
        };
        let shared = || is_shared.then(|| own.clone());
        if let Some(api) = self.0.all.iter().find(|api| api.shown_name() == name) {
            let spool = api.dead_letters.spool.clone();
            let held = || api.held.as_ref().map(|held| held.spool().clone());
            let others = if api.name.is_none() { held() } else { shared() };
            return Some(of(spool, others));
        }
        let removed = self.0.removed.iter().find(|(removed, _)| removed == name);
        match removed {
            Some((_, spool)) => Some(of(spool.clone(), shared())),
            None => shared().map(|own| of(own, None)),
        }
    }

    /// The APIs that are configured or have a disk of their own.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let all = self.0.all.iter().map(SharedApi::shown_name);
        all.chain(self.0.removed.iter().map(|(removed, _)| &**removed))
    }

    pub fn spools(&self) -> &Spools {
        &self.0.spools
    }

    /// Whether a record of this API would find no room on disk if it had to be held.
    pub fn is_full(&self, name: Option<&str>) -> bool {
        let held = self.get(name).and_then(|api| api.held.as_ref());
        held.is_some_and(HeldRecords::is_nearly_full)
    }

    /// Begins no POST of a record on disk from now on.
    pub fn stop(&self) {
        self.0.stopping.cancel();
    }

    /// Cancelled when the node stops.
    pub fn stopping(&self) -> &CancellationToken {
        &self.0.stopping
    }

    /// Gives the records that waited for an API which is configured now to that API.
    pub fn claim(&self) {
        let unclaimed = &self.0.unclaimed;
        for lane in unclaimed.lanes() {
            let apis = self.clone();
            actix_rt::spawn(async move {
                let unclaimed = &apis.0.unclaimed;
                let held_by = |name: Option<&str>| apis.get(name)?.held.as_ref();
                unclaimed.move_all(lane, held_by).await;
            });
        }
    }
}

/// The names of the folders in `folder`, which may be absent.
fn folders(folder: &Path) -> io::Result<BTreeSet<String>> {
    let entries = match fs::read_dir(folder) {
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        entries => entries?,
    };
    let mut names = BTreeSet::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            names.extend(entry.file_name().into_string().ok());
        }
    }
    Ok(names)
}

fn tell_of_removed(removed: &[(String, Spool)]) {
    for (api, spool) in removed {
        let found = spool.stats();
        let (waiting, dead) = (found.parked() + found.waiting(), found.records(Queue::Dead));
        if waiting + dead > 0 {
            error!(
                api,
                waiting,
                dead,
                "the disk has records for an API that is not configured any more: they stay there \
                 until [apis.NAME] is back"
            );
        }
    }
}
