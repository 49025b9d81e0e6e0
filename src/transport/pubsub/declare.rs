//! Creates the topic and the subscription if they are missing, and checks them if they exist.

use std::{fmt::Display, time::Duration};

use google_cloud_gax::{error::rpc::Code, retry_policy::NeverRetry};
use google_cloud_pubsub::{
    Error,
    client::{SubscriptionAdmin, TopicAdmin},
    model::{ExpirationPolicy, Subscription, UpdateSubscriptionRequest},
};
use tokio::time::sleep;

use super::{Access, TransportError};
use crate::config;

/// The shortest that the service allows. A dead node's messages are redelivered after it.
const ACK_DEADLINE_S: i32 = 10;
/// The emulator's streams look their subscription up by name four times a second. A stream of a
/// subscription that was deleted must not take messages of a new one with its name.
const FORGOTTEN: Duration = Duration::from_millis(500);
/// How long an unacked message is kept.
const RETENTION: Duration = Duration::from_hours(7 * 24);

const HOUR_S: u64 = 60 * 60;

/// The topic of a subscription whose topic was deleted.
const DELETED_TOPIC: &str = "_deleted-topic_";

/// One topic and one subscription of it, which both exist, or a subscription whose topic is gone.
pub(super) struct DeclaredSubscription {
    subscriptions: SubscriptionAdmin,
    pub topic: String,
    pub name: String,
    /// The topic or the subscription is new, so an earlier stream belongs to another one.
    pub is_new: bool,
    /// The topic was deleted: see [`orphan`](super::orphan).
    pub is_orphaned: bool,
    /// A message that a node has not settled or extended for this long comes again.
    pub ack_deadline: Duration,
    /// Settings that weaken the guarantee.
    pub warnings: Vec<String>,
}

impl DeclaredSubscription {
    /// Creates what is missing. The subscription must exist before the first publish: a topic
    /// without one loses messages.
    ///
    /// # Errors
    /// If the service does not answer, or the subscription would not bring every record to this
    /// node.
    pub async fn declare(
        access: &Access,
        config: &config::PubsubConfig,
    ) -> Result<Self, TransportError> {
        let mut declared = Self::admin(access, config).await?;
        let found = declared.find_checked().await?;
        if !declared.is_orphaned {
            declared.is_new = declare_topic(access, &declared.topic).await?;
        }
        if found.is_none() {
            let created = declared.subscribe().await;
            let (created, is_new) = created.map_err(|e| declared.failed(describe(&e)))?;
            declared.is_new |= is_new;
            declared.check(&created)?;
        }
        Ok(declared)
    }

    /// Checks the topic and the subscription as [`declare`](Self::declare) does, and creates
    /// nothing. Returns what it found, and the warnings.
    pub async fn inspect(
        access: &Access,
        config: &config::PubsubConfig,
    ) -> Result<(Vec<String>, Vec<String>), TransportError> {
        let mut admin = Self::admin(access, config).await?;
        let subscription = admin.find_checked().await?;
        let Self { topic, name, .. } = &admin;
        if admin.is_orphaned {
            let gone = format!(
                "the topic of subscription {name} is gone: a node drains the subscription and \
                 creates both"
            );
            return Ok((vec![gone], Vec::new()));
        }
        let topics = topic_admin(access).await?;
        let missing =
            |what: &str, name: &str| format!("{what} {name} is missing: a node creates it");
        let found = vec![
            if has_topic(&topics, topic).await? {
                format!("topic {topic} exists")
            } else {
                missing("topic", topic)
            },
            if subscription.is_some() {
                format!("subscription {name} fits")
            } else {
                missing("subscription", name)
            },
        ];
        Ok((found, admin.warnings))
    }

    /// Looks the subscription up, and checks it if there is one.
    async fn find_checked(&mut self) -> Result<Option<Subscription>, TransportError> {
        let found = self.find().await;
        let found = found.map_err(|e| self.failed(describe(&e)))?;
        if let Some(found) = &found {
            self.is_orphaned = is_orphan(found);
            self.check(found)?;
        }
        Ok(found)
    }

    fn check(&mut self, found: &Subscription) -> Result<(), TransportError> {
        let topic = if self.is_orphaned {
            DELETED_TOPIC
        } else {
            &self.topic
        };
        self.warnings = check(found, topic).map_err(|why| self.failed(why))?;
        let deadline = u64::try_from(found.ack_deadline_seconds).unwrap_or_default();
        self.ack_deadline = Duration::from_secs(deadline);
        Ok(())
    }

    fn failed(&self, why: String) -> TransportError {
        TransportError::Connect(format!("subscription {}: {why}", self.name))
    }

    /// The client, and the names. Nothing is looked up.
    async fn admin(access: &Access, config: &config::PubsubConfig) -> Result<Self, TransportError> {
        let project = &config.project;
        let subscriptions = SubscriptionAdmin::builder()
            .with_endpoint(&*access.endpoint)
            .with_credentials(access.credentials.clone())
            .with_retry_policy(NeverRetry)
            .build();
        let name = format!("projects/{project}/subscriptions/{}", config.subscription);
        Ok(Self {
            subscriptions: subscriptions.await.map_err(client_failed)?,
            topic: format!("projects/{project}/topics/{}", config.topic),
            name,
            is_new: false,
            is_orphaned: false,
            ack_deadline: Duration::ZERO,
            warnings: Vec::new(),
        })
    }

    /// Creates the subscription. Returns it, and whether it is new.
    async fn subscribe(&self) -> Result<(Subscription, bool), Error> {
        sleep(FORGOTTEN).await;
        let mut wanted = Subscription::new()
            .set_name(&*self.name)
            .set_topic(&*self.topic)
            .set_ack_deadline_seconds(ACK_DEADLINE_S)
            // A policy without a time is "never".
            .set_expiration_policy(ExpirationPolicy::new());
        wanted.message_retention_duration = RETENTION.try_into().ok();
        let create = self.subscriptions.create_subscription();
        match create.with_request(wanted).send().await {
            // Another node has created it meanwhile.
            Err(e) if is(&e, Code::AlreadyExists) => Ok((self.find().await?.ok_or(e)?, false)),
            created => Ok((created?, true)),
        }
    }

    /// Marks a subscription whose topic was deleted: other nodes see that its retention has changed.
    /// That costs no message, and is one of the few settings that the emulator can change.
    pub async fn mark(&self) -> Result<(), Error> {
        let Some(found) = self.find().await?.filter(is_orphan) else {
            return Ok(());
        };
        let hours = retention(&found).as_secs().div_ceil(HOUR_S);
        let marked = Duration::from_secs(hours * HOUR_S - fastrand::u64(1..60));
        let mut request = UpdateSubscriptionRequest::new();
        let subscription = request.subscription.get_or_insert_default();
        subscription.name.clone_from(&self.name);
        subscription.message_retention_duration = marked.try_into().ok();
        let changes = request.update_mask.get_or_insert_default();
        changes.paths.push("message_retention_duration".into());
        let update = self.subscriptions.update_subscription();
        update.with_request(request).send().await.map(drop)
    }

    /// Deletes the subscription unless another node has done so.
    pub async fn delete_orphan(&self) -> Result<(), Error> {
        if !self.find().await?.is_some_and(|found| is_orphan(&found)) {
            return Ok(());
        }
        let request = self.subscriptions.delete_subscription();
        match request.set_subscription(&*self.name).send().await {
            Err(e) if is(&e, Code::NotFound) => Ok(()),
            deleted => deleted,
        }
    }

    /// Looks the subscription up. `None` if there is none.
    pub async fn find(&self) -> Result<Option<Subscription>, Error> {
        let request = self.subscriptions.get_subscription();
        match request.set_subscription(&*self.name).send().await {
            Err(e) if is(&e, Code::NotFound) => Ok(None),
            found => found.map(Some),
        }
    }
}

/// Returns whether the topic is new. The client for topics is dropped here, because each client has
/// a copy of all roots of trust.
async fn declare_topic(access: &Access, topic: &str) -> Result<bool, TransportError> {
    let topics = topic_admin(access).await?;
    if has_topic(&topics, topic).await? {
        return Ok(false);
    }
    match topics.create_topic().set_name(topic).send().await {
        Ok(_) => Ok(true),
        Err(e) if is(&e, Code::AlreadyExists) => Ok(false),
        Err(e) => Err(topic_failed(topic, &e)),
    }
}

async fn topic_admin(access: &Access) -> Result<TopicAdmin, TransportError> {
    let topics = TopicAdmin::builder()
        .with_endpoint(&*access.endpoint)
        .with_credentials(access.credentials.clone())
        .with_retry_policy(NeverRetry)
        .build();
    topics.await.map_err(client_failed)
}

async fn has_topic(topics: &TopicAdmin, topic: &str) -> Result<bool, TransportError> {
    match topics.get_topic().set_topic(topic).send().await {
        Ok(_) => Ok(true),
        Err(e) if is(&e, Code::NotFound) => Ok(false),
        Err(e) => Err(topic_failed(topic, &e)),
    }
}

fn topic_failed(topic: &str, e: &Error) -> TransportError {
    TransportError::Connect(format!("topic {topic}: {}", describe(e)))
}

/// Whether the topic of the subscription was deleted.
pub(super) fn is_orphan(found: &Subscription) -> bool {
    found.topic == DELETED_TOPIC
}

/// How long it keeps a message that is not acked.
fn retention(found: &Subscription) -> Duration {
    let told = found.message_retention_duration;
    let told = told.and_then(|kept| Duration::try_from(kept).ok());
    told.unwrap_or(RETENTION)
}

fn client_failed(why: impl Display) -> TransportError {
    TransportError::Connect(format!("client: {why}"))
}

fn is(e: &Error, code: Code) -> bool {
    e.status().is_some_and(|status| status.code == code)
}

/// The service's answer, or the innermost cause, which names the socket's failure without the URL.
pub(super) fn describe(e: &Error) -> String {
    if let Some(status) = e.status() {
        return format!("{}: {}", status.code, status.message);
    }
    let mut innermost: &dyn std::error::Error = e;
    while let Some(cause) = innermost.source() {
        innermost = cause;
    }
    innermost.to_string()
}

/// Warnings about settings that weaken the guarantee.
///
/// # Errors
/// If a setting keeps records from this node. The error names it.
fn check(found: &Subscription, topic: &str) -> Result<Vec<String>, String> {
    if found.topic != topic {
        return Err(format!("is on topic {}, not on {topic}", found.topic));
    }
    if found.detached {
        return Err("is detached from its topic".into());
    }
    if !found.filter.is_empty() {
        return Err(format!(
            "has the filter `{}`, which drops records",
            found.filter
        ));
    }
    let pushes = found
        .push_config
        .as_ref()
        .is_some_and(|push| !push.push_endpoint.is_empty());
    if pushes
        || found.bigquery_config.is_some()
        || found.cloud_storage_config.is_some()
        || found.bigtable_config.is_some()
    {
        return Err("delivers by push or export, not by pull".into());
    }

    let mut warnings = Vec::new();
    if let Some(policy) = &found.dead_letter_policy {
        warnings.push(format!(
            "the subscription moves a record to {} after {} attempts, where this node does not see it",
            policy.dead_letter_topic, policy.max_delivery_attempts
        ));
    }
    let kept = retention(found);
    // That of an orphan has a mark.
    if kept < RETENTION && !is_orphan(found) {
        warnings.push(format!(
            "the subscription keeps a record that is not delivered for {} only",
            humantime::format_duration(kept)
        ));
    }
    let expires = found
        .expiration_policy
        .as_ref()
        .and_then(|policy| policy.ttl)
        .and_then(|ttl| Duration::try_from(ttl).ok());
    if let Some(ttl) = expires.filter(|ttl| !ttl.is_zero()) {
        warnings.push(format!(
            "the subscription expires, with what is in it, after {} without a node",
            humantime::format_duration(ttl)
        ));
    }
    Ok(warnings)
}

#[cfg(test)]
mod tests {
    use google_cloud_pubsub::model::{BigQueryConfig, DeadLetterPolicy, PushConfig};

    use super::*;

    const TOPIC: &str = "projects/p/topics/records";

    fn ours() -> Subscription {
        let mut ours = Subscription::new()
            .set_topic(TOPIC)
            .set_expiration_policy(ExpirationPolicy::new());
        ours.message_retention_duration = RETENTION.try_into().ok();
        ours
    }

    #[test]
    fn a_subscription_that_withholds_records_is_refused_with_the_reason() {
        for (found, why) in [
            (
                ours().set_topic("projects/p/topics/other"),
                "projects/p/topics/other",
            ),
            (ours().set_topic(DELETED_TOPIC), DELETED_TOPIC),
            (ours().set_filter("attributes.a = \"b\""), "attributes.a"),
            (ours().set_detached(true), "detached"),
            (
                ours().set_push_config(PushConfig::new().set_push_endpoint("https://example.com")),
                "push",
            ),
            (ours().set_bigquery_config(BigQueryConfig::new()), "export"),
        ] {
            let told = check(&found, TOPIC).expect_err(why);
            assert!(told.contains(why), "{told}");
        }
    }

    #[test]
    fn a_subscription_that_weakens_the_guarantee_is_taken_with_a_warning() {
        assert_eq!(check(&ours(), TOPIC), Ok(vec![]));
        assert_eq!(
            check(&ours().set_push_config(PushConfig::new()), TOPIC),
            Ok(vec![])
        );
        let mut short = ours();
        short.message_retention_duration = Duration::from_mins(10).try_into().ok();
        let mut expiring = ours();
        expiring.expiration_policy.get_or_insert_default().ttl =
            Duration::from_hours(24).try_into().ok();
        let dead = DeadLetterPolicy::new()
            .set_dead_letter_topic("projects/p/topics/dead")
            .set_max_delivery_attempts(5);
        for (found, why) in [
            (short, "10m"),
            (expiring, "1day"),
            (
                ours().set_dead_letter_policy(dead),
                "projects/p/topics/dead after 5 attempts",
            ),
        ] {
            let warnings = check(&found, TOPIC).unwrap();
            assert!(
                warnings.len() == 1 && warnings[0].contains(why),
                "{warnings:?}"
            );
        }
    }
}
