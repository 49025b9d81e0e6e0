//! The slots of a lane: each POST is made in one. A record that the API fails at leaves its slot
//! until its next try, so that others go on.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The most deliveries that a lane hands over, however many records a POST may have.
const BATCHED_MAX: usize = 1024;
/// The most records that wait outside of the slots. Any other that fails keeps its slot.
const OUTSIDE_MAX: usize = 1024;
/// Retries take at most this part of the slots: the rest is for records that have not failed.
const RETRY_SHARE: usize = 4;

/// How much a lane sends to the API at a time.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// POSTs in flight.
    pub posts: usize,
    /// Records of a POST; with more than one, its body is a JSON array.
    pub batch: usize,
}

impl Limits {
    /// Deliveries that the lane may hand over.
    pub fn deliveries(self) -> usize {
        let batched = self.posts.saturating_mul(self.batch).min(BATCHED_MAX);
        self.posts.max(batched)
    }
}

/// The bounds of a lane's deliveries and POSTs. The lane, and each forwarder of it, share them.
#[derive(Clone)]
pub struct PostSlots {
    /// One permit per delivery that the forwarder has and that is not outside: the lane pulls no
    /// more than that.
    pub deliveries: Arc<Semaphore>,
    /// One per POST; the same as `deliveries` if a POST has one record.
    pub posts: Arc<Semaphore>,
    outside: Arc<Semaphore>,
    retries: Arc<Semaphore>,
    deliveries_max: u32,
    outside_max: u32,
}

/// The part of the slots that a record, or a batch, holds until it is settled.
pub struct PostSlot<'s> {
    slots: &'s PostSlots,
    /// The slot, and the permit that came with it; `None` outside.
    held: Option<(OwnedSemaphorePermit, Option<OwnedSemaphorePermit>)>,
    /// The place outside, kept during retries.
    outside: Option<OwnedSemaphorePermit>,
}

impl PostSlots {
    pub fn new(limits: Limits) -> Self {
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        let deliveries_max = limits.deliveries();
        let deliveries = semaphore(deliveries_max);
        let posts = match limits.batch {
            1 => Arc::clone(&deliveries),
            _ => semaphore(limits.posts),
        };
        // A lane that waits for a message holds one delivery's permit: no retry would get another.
        let outside_max = if deliveries_max > 1 { OUTSIDE_MAX } else { 0 };
        Self {
            deliveries,
            posts,
            outside: semaphore(outside_max),
            retries: semaphore((limits.posts / RETRY_SHARE).max(1)),
            deliveries_max: u32::try_from(deliveries_max).unwrap_or(u32::MAX),
            outside_max: u32::try_from(outside_max).unwrap_or(u32::MAX),
        }
    }

    /// Resolves when the forwarder has no delivery, if the lane hands over no more.
    pub async fn all_free(&self) {
        // Those outside first: each needs a slot for its next try.
        let outside = self.outside.acquire_many(self.outside_max).await;
        drop(self.deliveries.acquire_many(self.deliveries_max).await);
        drop(outside);
    }
}

impl<'s> PostSlot<'s> {
    /// `delivery` is the permit of the only delivery, unless the slot is that permit.
    pub fn new(
        slots: &'s PostSlots,
        slot: OwnedSemaphorePermit,
        delivery: Option<OwnedSemaphorePermit>,
    ) -> Self {
        Self {
            slots,
            held: Some((slot, delivery)),
            outside: None,
        }
    }

    /// Leaves the slot to others, if there is a place outside.
    pub fn leave(&mut self) {
        if self.outside.is_none() {
            let Ok(place) = Arc::clone(&self.slots.outside).try_acquire_owned() else {
                return;
            };
            self.outside = Some(place);
        }
        self.held = None;
    }

    /// Waits for a slot for the next POST, if it was left.
    pub async fn enter(&mut self) {
        if self.held.is_some() {
            return;
        }
        let retry = Arc::clone(&self.slots.retries).acquire_owned().await;
        // They are never closed.
        if let Ok(slot) = Arc::clone(&self.slots.posts).acquire_owned().await {
            self.held = Some((slot, retry.ok()));
        }
    }
}
