//! The slots of a lane and an API: each POST is made in one. A record that the API fails at leaves
//! its slot until its next try, so that others go on.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::api::Limits;

/// The most records that wait outside of the slots. Any other that fails keeps its slot.
const OUTSIDE_MAX: usize = 1024;
/// The most entries of the disk that are read at once.
const READ_MAX: u32 = 64;
/// Retries take at most this part of the slots: the rest is for records that have not failed.
const RETRY_SHARE: usize = 4;

/// Of all APIs of a lane together, the most records that have a place: they, and those that wait for
/// one, are fewer than a broker hands out.
const SHARED_MAX: usize = 1024;
/// If there are several APIs, the deliveries of a lane that may wait for a place of theirs.
const WAITING_MAX: usize = 256;

/// The bounds of a lane's deliveries and POSTs for one API. Each forwarder of the lane shares them.
#[derive(Clone)]
pub struct PostSlots {
    /// One permit per delivery that the forwarder has and that is not outside.
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

/// The bounds of what a lane pulls. The lane, and each forwarder of it, share them.
#[derive(Clone)]
pub struct LaneWindow {
    /// One permit per delivery that the lane hands over and that has no place yet: the lane pulls no
    /// more than that. Those of its only API, if there is one.
    pub deliveries: Arc<Semaphore>,
    /// Of each API.
    slots: Vec<PostSlots>,
    /// A POST may have many records.
    pub is_batched: bool,
}

impl LaneWindow {
    /// `apis` are the limits of each API of the node, of which there is at least one.
    pub fn new(apis: &[Limits]) -> Self {
        let count = apis.len();
        let slots = apis.iter().map(|limits| PostSlots::new(*limits, count));
        let slots: Vec<_> = slots.collect();
        let deliveries = match &*slots {
            [only] => Arc::clone(&only.deliveries),
            _ => Arc::new(Semaphore::new(WAITING_MAX)),
        };
        Self {
            deliveries,
            slots,
            is_batched: apis.iter().any(|limits| limits.batch > 1),
        }
    }

    /// The bounds for each API, in their order.
    pub fn slots(&self) -> impl Iterator<Item = &PostSlots> {
        self.slots.iter()
    }

    /// Resolves when the forwarder has no delivery, if the lane hands over no more.
    pub async fn all_free(&self) {
        if let [only] = &*self.slots {
            return only.all_free().await;
        }
        // The waiting ones first: each gets a place, or goes to disk.
        let all = u32::try_from(WAITING_MAX).unwrap_or(u32::MAX);
        let waiting = self.deliveries.acquire_many(all).await;
        for slots in &self.slots {
            slots.all_free().await;
        }
        drop(waiting);
    }
}

impl PostSlots {
    /// `apis` is the number of APIs that share the lane.
    fn new(limits: Limits, apis: usize) -> Self {
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        let share = match apis {
            1 => usize::MAX,
            _ => SHARED_MAX / apis,
        };
        // Some of the share are for records outside.
        let deliveries_max = limits.deliveries().min((share - share / 4).max(1));
        let deliveries = semaphore(deliveries_max);
        let posts = match limits.batch {
            1 => Arc::clone(&deliveries),
            _ => semaphore(limits.posts),
        };
        // A lane that waits for a message holds one delivery's permit: no retry would get another.
        let outside_max = match deliveries_max {
            0 | 1 => 0,
            _ => OUTSIDE_MAX.min(share - deliveries_max),
        };
        Self {
            deliveries,
            posts,
            outside: semaphore(outside_max),
            retries: semaphore((limits.posts / RETRY_SHARE).max(1)),
            deliveries_max: u32::try_from(deliveries_max).unwrap_or(u32::MAX),
            outside_max: u32::try_from(outside_max).unwrap_or(u32::MAX),
        }
    }

    /// Entries of the disk to read at once: there are more permits than that for deliveries.
    pub fn read_at_once(&self) -> u32 {
        (self.deliveries_max / 4).clamp(1, READ_MAX)
    }

    async fn all_free(&self) {
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
