//! Webhooks as the API sees them: what is asked for is checked and sealed here, retried and tried out here.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, OnceCell},
    time::Instant,
};

use super::{
    egress::{Forbidden, Guard},
    fairness, metrics,
    schedule::Schedule,
    secrets::Vault,
    send::{Sender, Sent, batch_context},
};
use crate::{
    domain::{
        Owner, Scope, WebhookEndpointId,
        webhook::{AttemptResult, Defaults, Invalid, Secret, WebhookConfig, WebhookTarget},
    },
    fault::{self, Fault},
    store::{
        ClaimedDelivery, DeletedEndpoint, EndpointChange, EndpointRecord, NewEndpoint, Settlement, Store, StoreError,
    },
};

/// How long the secret before signs too, after a rotation that does not say.
pub const DEFAULT_OVERLAP: Duration = Duration::from_secs(24 * 3_600);
/// The longest that it may.
pub const MAX_OVERLAP: Duration = Duration::from_secs(7 * 24 * 3_600);

/// How webhooks are to be delivered.
#[derive(Debug)]
pub struct Options {
    /// Where they may go.
    pub guard: Guard,
    /// Seals and opens secrets.
    pub vault: Vault,
    /// The server's own secrets, the newest first: they sign where neither batch nor endpoint has one. Mostly one; two while
    /// it is being replaced; none: such deliveries go unsigned.
    pub secrets: Vec<Secret>,
    /// What a client need not say.
    pub defaults: Defaults,
    /// The waits between attempts.
    pub schedule: Schedule,
    /// Sends in flight to one target of one owner.
    pub per_target: usize,
    /// Sends in flight in all.
    pub in_flight: usize,
    /// The longest between two looks at the outbox. Commits of this node are noticed at once.
    pub poll: Duration,
    /// How often leases that have run out and a clock that was set back are looked for.
    pub reap: Duration,
    /// How long sends in flight may take at shutdown.
    pub drain: Duration,
    /// How long settled deliveries and their attempts are kept.
    pub keep_deliveries: Duration,
    /// How long dead letters are kept.
    pub keep_dead_letters: Duration,
    /// No other node has this database (SQLite): then what is leased at the start is a dead predecessor's.
    pub sole_node: bool,
    /// Of the jitter. None: a new one each time.
    pub seed: Option<u64>,
}

impl Options {
    /// Everything by default.
    #[must_use]
    pub fn new(guard: Guard, vault: Vault) -> Self {
        Self {
            guard,
            vault,
            secrets: Vec::new(),
            defaults: Defaults::default(),
            schedule: Schedule::default(),
            per_target: fairness::PER_TARGET,
            in_flight: fairness::IN_FLIGHT,
            poll: Duration::from_secs(1),
            reap: Duration::from_secs(10),
            drain: Duration::from_secs(30),
            keep_deliveries: Duration::from_secs(7 * 24 * 3_600),
            keep_dead_letters: Duration::from_secs(30 * 24 * 3_600),
            sole_node: false,
            seed: None,
        }
    }
}

/// Why a webhook was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// These fields break their rules.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Invalid(Vec<Invalid>),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<Forbidden> for AcceptError {
    fn from(forbidden: Forbidden) -> Self {
        Self::Invalid(vec![Invalid { field: "url".into(), message: forbidden.to_string() }])
    }
}

/// Why nobody knows what came of a test event.
#[derive(Debug, thiserror::Error)]
pub enum TestError {
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The server is stopping.
    #[error("the server stopped during the test")]
    Stopped,
}

/// What came of a test event.
#[derive(Debug)]
pub struct Tested {
    /// What was sent.
    pub claim: ClaimedDelivery,
    /// What came of it.
    pub result: AttemptResult,
}

/// The webhooks of this node. Cheap to clone.
#[derive(Clone)]
pub struct Webhooks {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) store: Store,
    pub(super) sender: Sender,
    pub(super) vault: Arc<Vault>,
    pub(super) options: Options,
    /// What a predecessor left under lease is over.
    pub(super) taken_over: OnceCell<()>,
    /// There may be a job to run.
    pub(super) jobs: Notify,
    /// There may be something to send.
    pub(super) wake: Notify,
}

impl Webhooks {
    /// # Errors
    /// If the system's TLS roots can't be loaded.
    pub fn new(store: Store, mut options: Options) -> Result<Self, reqwest::Error> {
        super::metrics::describe();
        let vault = Arc::new(std::mem::take(&mut options.vault));
        let sender = Sender::new(options.guard.clone(), vault.clone(), options.secrets.clone())?;
        let (taken_over, jobs, wake) = (OnceCell::new(), Notify::new(), Notify::new());
        let inner = Inner { store, sender, vault, options, taken_over, jobs, wake };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The store that it works on.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.inner.store
    }

    /// The waits between the attempts of a delivery with so many of them.
    #[must_use]
    pub fn schedule(&self, max_attempts: i32) -> Vec<Duration> {
        self.inner.options.schedule.waits(max_attempts)
    }

    /// From the first to the last of so many attempts.
    #[must_use]
    pub fn horizon(&self, max_attempts: i32) -> Duration {
        self.inner.options.schedule.horizon(max_attempts)
    }

    /// Checks a batch's webhook, fills in the defaults and seals its secret.
    ///
    /// # Errors
    /// [`AcceptError::Invalid`].
    pub async fn accept(&self, config: WebhookConfig) -> Result<WebhookTarget, AcceptError> {
        let (mut target, secret) = self.resolve(config).await?;
        target.secret = secret.map(|secret| self.inner.vault.seal(&secret, &batch_context(&target.url)));
        Ok(target)
    }

    /// Registers an endpoint. Without a secret one is made. Returns it with the secret, which is never shown again.
    ///
    /// # Errors
    /// [`AcceptError`].
    pub async fn create_endpoint(
        &self,
        owner: &Owner,
        config: WebhookConfig,
    ) -> Result<(EndpointRecord, Secret), AcceptError> {
        let (target, secret) = self.resolve(config).await?;
        let secret = secret.unwrap_or_else(Secret::generate);
        let id = WebhookEndpointId::generate();
        let sealed = self.inner.vault.seal(&secret, id.as_str());
        let new = NewEndpoint {
            id,
            owner: owner.clone(),
            url: target.url,
            events: target.events,
            secret: Some(sealed),
            max_attempts: target.max_attempts,
            timeout: target.timeout,
        };
        Ok((self.inner.store.create_endpoint(new).await?, secret))
    }

    /// Changes an endpoint. A new URL is checked as at creation. None if there is no such endpoint.
    ///
    /// # Errors
    /// [`AcceptError`].
    pub async fn update_endpoint(
        &self,
        id: &WebhookEndpointId,
        scope: &Scope,
        mut change: EndpointChange,
    ) -> Result<Option<EndpointRecord>, AcceptError> {
        if let Some(url) = &mut change.url {
            *url = self.resolve(WebhookConfig::new(url.as_str())).await?.0.url;
        }
        let changed = self.inner.store.update_endpoint(id, scope, change).await?;
        self.inner.wake.notify_one();
        Ok(changed)
    }

    /// Gives an endpoint a new secret, made here if none is given; the one before signs too for `overlap`. None if there is no
    /// such endpoint. The secret is never shown again.
    ///
    /// # Errors
    /// [`AcceptError`].
    pub async fn rotate_secret(
        &self,
        id: &WebhookEndpointId,
        scope: &Scope,
        secret: Option<String>,
        overlap: Duration,
    ) -> Result<Option<(EndpointRecord, Secret)>, AcceptError> {
        let invalid =
            |field: &str, message: String| AcceptError::Invalid(vec![Invalid { field: field.into(), message }]);
        if overlap > MAX_OVERLAP {
            return Err(invalid("overlap", format!("the overlap is at most {} days", MAX_OVERLAP.as_secs() / 86_400)));
        }
        let secret = match secret {
            Some(text) => Secret::try_new(text).map_err(|error| invalid("secret", error.to_string()))?,
            None => Secret::generate(),
        };
        let sealed = self.inner.vault.seal(&secret, id.as_str());
        let rotated = self.inner.store.rotate_secret(id, scope, &sealed, overlap).await?;
        Ok(rotated.map(|endpoint| (endpoint, secret)))
    }

    /// Deletes an endpoint that nothing waits for.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn delete_endpoint(&self, id: &WebhookEndpointId, scope: &Scope) -> Result<DeletedEndpoint, StoreError> {
        self.inner.store.delete_endpoint(id, scope).await
    }

    /// Sends an endpoint a test event, now and once, just as any other event is sent. None if there is no such endpoint. Goes on
    /// if the caller does not wait for it.
    ///
    /// # Errors
    /// [`TestError`].
    pub async fn test_endpoint(&self, id: &WebhookEndpointId, scope: &Scope) -> Result<Option<Tested>, TestError> {
        let (webhooks, id, scope) = (self.clone(), id.clone(), scope.clone());
        let test = async move { webhooks.test_endpoint_here(&id, &scope).await };
        // Once sent it must be written down, also when the caller has hung up.
        Ok(tokio::spawn(test).await.map_err(|_| TestError::Stopped)??)
    }

    async fn test_endpoint_here(&self, id: &WebhookEndpointId, scope: &Scope) -> Result<Option<Tested>, StoreError> {
        self.take_over().await;
        let Some(claim) = self.inner.store.begin_test(id, scope).await? else { return Ok(None) };
        let Sent { result, .. } = self.send(&claim).await;
        let settlement = Settlement {
            id: claim.id.clone(),
            lease: claim.lease.clone(),
            attempt: claim.attempt,
            result: Some(result.clone()),
            wait: Duration::ZERO,
        };
        self.inner.store.settle_deliveries(&[settlement]).await?;
        Ok(Some(Tested { claim, result }))
    }

    /// One attempt, measured.
    pub(super) async fn send(&self, claim: &ClaimedDelivery) -> Sent {
        fault::point(Fault::DeliveryAttempt);
        let began = Instant::now();
        let sent = self.inner.sender.send(claim).await;
        fault::point(Fault::DeliveryAnswered);
        metrics::attempt(&sent.result, began.elapsed());
        sent
    }

    async fn resolve(&self, config: WebhookConfig) -> Result<(WebhookTarget, Option<Secret>), AcceptError> {
        let resolved = config.resolve(self.inner.options.defaults).map_err(AcceptError::Invalid)?;
        self.inner.options.guard.check(&resolved.0.url).await?;
        Ok(resolved)
    }
}
