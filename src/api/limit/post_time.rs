//! The time that a POST takes.

use std::time::Duration;

use tokio::time::Instant;

/// The part of one POST in the mean.
const PART: f64 = 0.05;
/// The mean says nothing about an API that gets no POSTs for longer.
const KEPT: Duration = Duration::from_mins(1);

/// The mean time of the last POSTs that the API has answered, or has let run into their time-out.
#[derive(Debug, Default)]
pub struct PostTime {
    seconds: f64,
    /// The end of the last one.
    ended: Option<Instant>,
}

impl PostTime {
    /// Adds a POST that has ended now.
    pub fn add(&mut self, took: Duration, now: Instant) {
        let took = took.as_secs_f64();
        self.seconds = if self.get(now).is_some() {
            self.seconds + (took - self.seconds) * PART
        } else {
            took
        };
        self.ended = Some(now);
    }

    /// The mean; `None` if no POST has ended lately.
    pub fn get(&self, now: Instant) -> Option<Duration> {
        let since = now.saturating_duration_since(self.ended?);
        (since < KEPT).then(|| Duration::from_secs_f64(self.seconds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_follows_the_posts_and_is_forgotten_without_any() {
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        let mut time = PostTime::default();
        assert_eq!(time.get(at(0)), None);
        time.add(Duration::from_millis(10), at(0));
        assert_eq!(time.get(at(1)), Some(Duration::from_millis(10)));
        for _ in 0..200 {
            time.add(Duration::from_secs(2), at(2));
        }
        let mean = time.get(at(3)).expect("it is recent");
        assert!(mean > Duration::from_millis(1990), "{mean:?}");
        assert_eq!(time.get(at(63)), None);
        // The times before say nothing about now.
        time.add(Duration::from_millis(10), at(63));
        assert_eq!(time.get(at(63)), Some(Duration::from_millis(10)));
    }
}
