//! Files that are read again every second, so that a change counts without a restart.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use schemars::JsonSchema;
use serde::Serialize;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tracing::{error, info};
use tracing_mutex::parkinglot::Mutex;

use crate::file_work::{self, FILE_PATIENCE};

/// What is removed from a file does not count any more after two of these.
const READ_AGAIN: Duration = Duration::from_secs(1);

/// Reads anew. Gets what was read before, which it may return if nothing has changed.
type Read<T> = Box<dyn Fn(Option<&T>) -> Result<T, String> + Send + Sync>;

/// What one file holds, or some files that belong together. If they cannot be used any more, what was
/// read last stays.
pub struct WatchedFile<T> {
    /// Empty if they are not read again.
    paths: Vec<PathBuf>,
    read: Read<T>,
    value: watch::Sender<Arc<T>>,
    count: fn(&T) -> Option<usize>,
    health: Arc<FileHealth>,
}

/// How the last reading went.
#[derive(Debug)]
pub struct FileHealth {
    key: String,
    reading: Mutex<LastReading>,
}

#[derive(Debug, Default)]
struct LastReading {
    count: Option<usize>,
    last_error: Option<String>,
}

/// A file in `/api/status`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct FileStatus<'s> {
    /// The key of the configuration that names it.
    pub key: &'s str,
    /// How many tokens count; null if it is for something else.
    pub count: Option<usize>,
    /// Why it could not be used the last time; null if it could.
    pub last_error: Option<String>,
}

impl FileHealth {
    pub fn status(&self) -> FileStatus<'_> {
        let last = self.reading.lock();
        FileStatus {
            key: &self.key,
            count: last.count,
            last_error: last.last_error.clone(),
        }
    }
}

impl<T> fmt::Debug for WatchedFile<T> {
    /// Not what it holds.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WatchedFile")
            .field(&self.health.key)
            .finish()
    }
}

impl<T: PartialEq + Send + Sync + 'static> WatchedFile<T> {
    /// Reads the files at `paths`, of which `key` of the configuration names the first, by `read`. It
    /// is called once: what comes out of a pipe comes once.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn open<'p>(
        key: impl Into<String>,
        paths: impl IntoIterator<Item = &'p Path>,
        read: impl Fn(Option<&T>) -> Result<T, String> + Send + Sync + 'static,
    ) -> Result<Self, String> {
        let paths: Vec<_> = paths.into_iter().map(Path::to_owned).collect();
        let are_regular = paths.iter().all(|path| path.is_file());
        Ok(Self {
            paths: if are_regular { paths } else { Vec::new() },
            value: watch::Sender::new(Arc::new(read(None)?)),
            read: Box::new(read),
            count: |_| None,
            health: Arc::new(FileHealth {
                key: key.into(),
                reading: Mutex::default(),
            }),
        })
    }

    /// The status tells how many things it holds, too.
    #[must_use]
    pub fn counted(mut self, count: fn(&T) -> Option<usize>) -> Self {
        self.count = count;
        self.health.reading.lock().count = count(&self.get());
        self
    }

    /// What was read last.
    pub fn get(&self) -> Arc<T> {
        Arc::clone(&self.value.borrow())
    }

    /// Hears of each change of it.
    pub fn changes(&self) -> watch::Receiver<Arc<T>> {
        self.value.subscribe()
    }

    pub const fn health(&self) -> &Arc<FileHealth> {
        &self.health
    }

    /// Reads again and again. Ends at once if a file was a pipe: it has told all that it will.
    pub async fn keep_reading(self: Arc<Self>) {
        while !self.paths.is_empty() {
            sleep(READ_AGAIN).await;
            let this = Arc::clone(&self);
            let mut reading = match file_work::begin(move || this.read_again()) {
                Ok(reading) => reading,
                Err(why) => {
                    self.update(Err(format!("no thread can read it: {why}")));
                    continue;
                }
            };
            let read = match timeout(FILE_PATIENCE, &mut reading).await {
                Ok(read) => read,
                Err(_) => {
                    let why =
                        format!("it is not read within {FILE_PATIENCE:?}; does its disk hang?");
                    self.update(Err(why));
                    // No second thread hangs beside the first.
                    reading.await
                }
            };
            self.update(read.unwrap_or_else(|_| Err("the reading has failed".into())));
        }
    }

    fn read_again(&self) -> Result<T, String> {
        for path in &self.paths {
            // To open a pipe would wait for its writer. If nothing is there, the reading tells.
            if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
                return Err(format!("{}: is no regular file any more", path.display()));
            }
        }
        (self.read)(Some(&self.get()))
    }

    fn update(&self, read: Result<T, String>) {
        let key = &self.health.key;
        let mut last = self.health.reading.lock();
        match read {
            Ok(value) => {
                let has_changed = **self.value.borrow() != value;
                if has_changed {
                    last.count = (self.count)(&value);
                    self.value.send_replace(Arc::new(value));
                }
                if last.last_error.take().is_some() || has_changed {
                    info!(key, "a file was read again");
                }
            }
            // Once for each reason.
            Err(why) if last.last_error.as_ref() != Some(&why) => {
                error!(key, reason = %why, "a file cannot be used; what was read last stays");
                last.last_error = Some(why);
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        process::Command,
        sync::{
            atomic::{AtomicUsize, Ordering::Relaxed},
            mpsc,
        },
        thread,
    };

    use super::*;

    #[test]
    fn what_cannot_be_used_changes_nothing_and_is_told() {
        let (next, reading) = mpsc::channel::<Result<u8, String>>();
        let reading = Mutex::new(reading);
        let read = move || reading.lock().recv().unwrap();
        next.send(Err("no file".into())).unwrap();
        next.send(Ok(1)).unwrap();
        let read = Arc::new(read);
        let open = || {
            let read = Arc::clone(&read);
            WatchedFile::open("admin.token_file", [], move |_| read())
        };
        assert_eq!(open().err().as_deref(), Some("no file"));
        let file = open().unwrap();
        let last_error = || file.health().status().last_error;
        for (read, value, error) in [
            (Err("gone"), 1, Some("gone")),
            (Err("gone"), 1, Some("gone")),
            (Err("empty"), 1, Some("empty")),
            (Ok(1), 1, None),
            (Ok(2), 2, None),
            (Err("gone"), 2, Some("gone")),
        ] {
            file.update(read.map_err(str::to_owned));
            assert_eq!((*file.get(), last_error().as_deref()), (value, error));
        }
        assert_eq!(file.health().status().key, "admin.token_file");
    }

    fn mkfifo(path: &Path) {
        let made = Command::new("mkfifo").arg(path).status();
        assert!(made.expect("mkfifo runs").success());
    }

    #[actix_rt::test]
    async fn a_pipe_is_read_once_and_never_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        mkfifo(&path);
        let (pipe, writer) = (path.clone(), path.clone());
        let writer = thread::spawn(move || fs::write(writer, "secret"));
        let read =
            move |_: Option<&String>| fs::read_to_string(&pipe).map_err(|why| why.to_string());
        let file = WatchedFile::open("admin.token_file", [&*path], read).unwrap();
        writer.join().unwrap().unwrap();
        let file = Arc::new(file);
        let ended = timeout(Duration::from_secs(30), Arc::clone(&file).keep_reading()).await;
        assert!(ended.is_ok(), "it waits for the pipe");
        assert_eq!(*file.get(), "secret");
        assert_eq!(file.health().status().last_error, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reading_that_hangs_is_told_and_is_alone() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let (next, reading) = mpsc::channel();
        let (reading, begun) = (Mutex::new(reading), Arc::new(AtomicUsize::new(0)));
        let count = Arc::clone(&begun);
        let read = move |_: Option<&u8>| {
            count.fetch_add(1, Relaxed);
            reading.lock().recv().map_err(|why| why.to_string())
        };
        next.send(1).unwrap();
        let file = WatchedFile::open("admin.token_file", [path.path()], read).unwrap();
        let file = Arc::new(file);
        let keeping = tokio::spawn(Arc::clone(&file).keep_reading());
        // The time is simulated, but not that of threads.
        while begun.load(Relaxed) < 2 {
            sleep(READ_AGAIN).await;
        }
        sleep(Duration::from_mins(1)).await;
        let why = file.health().status().last_error.unwrap_or_default();
        assert!(why.contains("is not read within 5s"), "{why}");
        assert_eq!((*file.get(), begun.load(Relaxed)), (1, 2));
        next.send(2).unwrap();
        while *file.get() == 1 {
            sleep(READ_AGAIN).await;
        }
        keeping.abort();
        drop(next);
    }

    #[test]
    fn a_file_that_has_become_a_pipe_is_told_and_not_opened() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "secret").unwrap();
        let name = path.clone();
        let read =
            move |_: Option<&String>| fs::read_to_string(&name).map_err(|why| why.to_string());
        let file = WatchedFile::open("admin.token_file", [&*path], read).unwrap();
        assert_eq!(file.read_again().as_deref(), Ok("secret"));
        fs::remove_file(&path).unwrap();
        assert!(file.read_again().unwrap_err().contains("No such file"));
        mkfifo(&path);
        let why = file.read_again().unwrap_err();
        assert!(why.ends_with("is no regular file any more"), "{why}");
    }
}
