//! Webhooks for the API: validates and encrypts what is requested, sends retries and tests.

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
    store::{ClaimedDelivery, EndpointChange, EndpointRecord, NewEndpoint, Settlement, Store, StoreError},
};

/// The options of delivery.
#[derive(Debug)]
pub struct Options {
    /// Decides where webhooks may go.
    pub guard: Guard,
    /// Encrypts and decrypts secrets.
    pub vault: Vault,
    /// The server's own secrets, the newest first, which sign if neither batch nor endpoint has one. Usually one; two
    /// during a rotation; if there is none, such deliveries are not signed.
    pub secrets: Vec<Secret>,
    /// Defaults of a webhook's fields.
    pub defaults: Defaults,
    /// The waits between attempts.
    pub schedule: Schedule,
    /// The most sends in flight to one target of one owner.
    pub per_target: usize,
    /// The most sends in flight in all.
    pub in_flight: usize,
    /// The longest time between two queries of the outbox. Commits of this node are noticed at once.
    pub poll: Duration,
    /// Time between two checks for expired leases and for a clock that was set back.
    pub reap: Duration,
    /// Time for sends in flight at shutdown.
    pub drain: Duration,
    /// How long settled deliveries and their attempts are kept.
    pub keep_deliveries: Duration,
    /// How long dead letters are kept.
    pub keep_dead_letters: Duration,
    /// Whether no other node uses this database (SQLite), so that leases at the start are a dead predecessor's.
    pub sole_node: bool,
    /// The seed of the jitter. `None`: a random one.
    pub seed: Option<u64>,
}

impl Options {
    /// The default options.
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
    /// These fields are invalid.
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

/// Why the outcome of a test event is not known.
#[derive(Debug, thiserror::Error)]
pub enum TestError {
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The server is stopping.
    #[error("the server stopped during the test")]
    Stopped,
}

/// The outcome of a test event.
#[derive(Debug)]
pub struct Tested {
    /// The delivery that was sent.
    pub claim: ClaimedDelivery,
    /// Its outcome.
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
    /// Set when a predecessor's leases have been ended.
    pub(super) taken_over: OnceCell<()>,
    /// Notified when there may be a job to run.
    pub(super) jobs: Notify,
    /// Notified when there may be something to send.
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

    /// The waits between this many attempts.
    #[must_use]
    pub fn schedule(&self, max_attempts: i32) -> Vec<Duration> {
        self.inner.options.schedule.waits(max_attempts)
    }

    /// The time from the first to the last of this many attempts.
    #[must_use]
    pub fn horizon(&self, max_attempts: i32) -> Duration {
        self.inner.options.schedule.horizon(max_attempts)
    }

    /// Validates a batch's webhook, fills in the defaults and encrypts its secret.
    ///
    /// # Errors
    /// [`AcceptError::Invalid`].
    pub async fn accept(&self, config: WebhookConfig) -> Result<WebhookTarget, AcceptError> {
        let (mut target, secret) = self.resolve(config).await?;
        target.secret = secret.map(|secret| self.inner.vault.seal(&secret, &batch_context(&target.url)));
        Ok(target)
    }

    /// Registers an endpoint. If no secret is given, one is generated. Returns the endpoint with its secret, which is
    /// never shown again.
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

    /// Changes an endpoint. A new URL is checked as at creation. `None` if there is no such endpoint.
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

    /// Gives an endpoint a new secret; the previous one also signs for `overlap`. `None` if there is no such endpoint.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn rotate_secret(
        &self,
        id: &WebhookEndpointId,
        scope: &Scope,
        secret: &Secret,
        overlap: Duration,
    ) -> Result<Option<EndpointRecord>, StoreError> {
        let sealed = self.inner.vault.seal(secret, id.as_str());
        self.inner.store.rotate_secret(id, scope, &sealed, overlap).await
    }

    /// Sends a test event to an endpoint once, like any other event. `None` if there is no such endpoint. Continues
    /// even if the caller stops waiting.
    ///
    /// # Errors
    /// [`TestError`].
    pub async fn test_endpoint(&self, id: &WebhookEndpointId, scope: &Scope) -> Result<Option<Tested>, TestError> {
        let (webhooks, id, scope) = (self.clone(), id.clone(), scope.clone());
        let test = async move { webhooks.test_endpoint_here(&id, &scope).await };
        // Once sent, the attempt must be recorded even if the caller has disconnected.
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
