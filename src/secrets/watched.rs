//! Files that are read again every second, so that a change counts without a restart.

use std::{fmt, sync::Arc, time::Duration};

use parking_lot::{Mutex, RwLock};
use serde::Serialize;
use tokio::time::sleep;
use tracing::{error, info};

/// What is removed from a file does not count any more after two of these.
const READ_AGAIN: Duration = Duration::from_secs(1);

/// Reads anew. Gets what was read before, which it may return if nothing has changed.
type Read<T> = Box<dyn Fn(Option<&T>) -> Result<T, String> + Send + Sync>;

/// What one file holds, or some files that belong together. If they cannot be used any more, what was
/// read last stays.
pub struct WatchedFile<T> {
    read: Read<T>,
    value: RwLock<Arc<T>>,
    health: Arc<FileHealth>,
}

/// How the last reading went.
#[derive(Debug)]
pub struct FileHealth {
    key: String,
    last_error: Mutex<Option<String>>,
}

/// A file in `/api/status`.
#[derive(Debug, Serialize)]
pub struct FileStatus<'s> {
    /// The key of the configuration that names it.
    pub key: &'s str,
    /// Why it could not be used the last time; null if it could.
    pub last_error: Option<String>,
}

impl FileHealth {
    pub fn status(&self) -> FileStatus<'_> {
        FileStatus {
            key: &self.key,
            last_error: self.last_error.lock().clone(),
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
    /// Reads what `key` of the configuration names.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn open(
        key: impl Into<String>,
        read: impl Fn(Option<&T>) -> Result<T, String> + Send + Sync + 'static,
    ) -> Result<Self, String> {
        Ok(Self {
            value: RwLock::new(Arc::new(read(None)?)),
            read: Box::new(read),
            health: Arc::new(FileHealth {
                key: key.into(),
                last_error: Mutex::default(),
            }),
        })
    }

    /// What was read last.
    pub fn get(&self) -> Arc<T> {
        Arc::clone(&self.value.read())
    }

    pub const fn health(&self) -> &Arc<FileHealth> {
        &self.health
    }

    /// Reads again and again.
    pub async fn keep_reading(self: Arc<Self>) {
        loop {
            sleep(READ_AGAIN).await;
            let this = Arc::clone(&self);
            let reading = tokio::task::spawn_blocking(move || (this.read)(Some(&this.get())));
            if let Ok(read) = reading.await {
                self.update(read);
            }
        }
    }

    fn update(&self, read: Result<T, String>) {
        let key = &self.health.key;
        let mut last_error = self.health.last_error.lock();
        match read {
            Ok(value) => {
                let has_changed = *self.value.read().as_ref() != value;
                if has_changed {
                    *self.value.write() = Arc::new(value);
                }
                if last_error.take().is_some() || has_changed {
                    info!(key, "a file was read again");
                }
            }
            // Once for each reason.
            Err(why) if last_error.as_ref() != Some(&why) => {
                error!(key, %why, "a file cannot be used; what was read last stays");
                *last_error = Some(why);
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

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
            WatchedFile::open("admin.token_file", move |_| read())
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
}
