//! Encrypts stored secrets again after the master key was replaced, page by page, in small transactions.

use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, EntityTrait, IntoActiveModel, QueryFilter, QueryOrder, QueryResult,
    QuerySelect, Statement, sea_query::Expr,
};

use super::endpoints::lock;
use crate::{
    domain::{
        Scope, WebhookEndpointId,
        webhook::{SealedSecret, WebhookTarget},
    },
    store::{
        Store, StoreError,
        convert::{self, to_json},
        entity::{batch, webhook_delivery, webhook_endpoint},
        write::{commit, roll_back},
    },
};

/// Rows read, and at most changed, at a time.
const PAGE: u64 = 200;

/// What a stored secret belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecretOf<'a> {
    /// A registered endpoint.
    Endpoint(&'a WebhookEndpointId),
    /// A batch, or a delivery of one, to this URL.
    Webhook(&'a str),
}

impl Store {
    /// Seals every stored secret anew for which `reseal` gives another, so that an old master key can be dropped. It is not
    /// asked for deliveries' secrets that begin with `current`, the mark of the present key: there may be many of them. Returns
    /// how many were sealed anew. What is written meanwhile is left as it is written.
    ///
    /// # Errors
    /// [`StoreError`]: some may have been sealed anew; the same call again does the rest.
    pub async fn reseal_secrets(
        &self,
        current: &[u8],
        mut reseal: impl FnMut(SecretOf<'_>, &SealedSecret) -> Option<SealedSecret>,
    ) -> Result<u64, StoreError> {
        Ok(self.reseal_endpoints(&mut reseal).await?
            + self.reseal_batches(&mut reseal).await?
            + self.reseal_deliveries(current, &mut reseal).await?)
    }

    async fn reseal_endpoints(
        &self,
        reseal: &mut impl FnMut(SecretOf<'_>, &SealedSecret) -> Option<SealedSecret>,
    ) -> Result<u64, StoreError> {
        let mut changed = 0;
        let ids: Vec<String> = webhook_endpoint::Entity::find()
            .select_only()
            .column(webhook_endpoint::Column::Id)
            .into_tuple()
            .all(self.read())
            .await?;
        for id in ids.into_iter().map(WebhookEndpointId::from_text) {
            let Some(row) = webhook_endpoint::Entity::find_by_id(id.as_str()).one(self.read()).await? else { continue };
            let mut anew = |secret: &Option<Vec<u8>>| {
                let sealed = SealedSecret::from_bytes(secret.clone()?);
                reseal(SecretOf::Endpoint(&id), &sealed).map(|sealed| sealed.as_bytes().to_vec())
            };
            let (current, previous) = (anew(&row.secret), anew(&row.previous_secret));
            if current.is_none() && previous.is_none() {
                continue;
            }
            if self.replace_secrets(&id, &row, &current, &previous).await? {
                changed += 1;
            }
        }
        Ok(changed)
    }

    /// False: it has others than `seen` by now.
    async fn replace_secrets(
        &self,
        id: &WebhookEndpointId,
        seen: &webhook_endpoint::Model,
        current: &Option<Vec<u8>>,
        previous: &Option<Vec<u8>>,
    ) -> Result<bool, StoreError> {
        self.write(|tx| async move {
            let Some(mut row) = lock(&tx, id, &Scope::All).await? else { return roll_back(false) };
            if (&row.secret, &row.previous_secret) != (&seen.secret, &seen.previous_secret) {
                return roll_back(false);
            }
            row.secret = current.clone().or(row.secret);
            row.previous_secret = previous.clone().or(row.previous_secret);
            row.into_active_model().reset_all().update(&tx).await?;
            commit(tx, true)
        })
        .await
    }

    async fn reseal_batches(
        &self,
        reseal: &mut impl FnMut(SecretOf<'_>, &SealedSecret) -> Option<SealedSecret>,
    ) -> Result<u64, StoreError> {
        let (mut changed, mut after) = (0, String::new());
        loop {
            let page: Vec<(String, String)> = batch::Entity::find()
                .select_only()
                .columns([batch::Column::Id, batch::Column::Webhook])
                .filter(batch::Column::Webhook.is_not_null())
                .filter(batch::Column::Id.gt(after.as_str()))
                .order_by_asc(batch::Column::Id)
                .limit(PAGE)
                .into_tuple()
                .all(self.read())
                .await?;
            let Some((last, _)) = page.last() else { return Ok(changed) };
            after.clone_from(last);
            let mut anew = Vec::new();
            for (id, text) in page {
                let webhook: WebhookTarget = convert::json("webhook", &text)?;
                let sealed = webhook.secret.as_ref().and_then(|secret| reseal(SecretOf::Webhook(&webhook.url), secret));
                if let Some(secret) = sealed {
                    anew.push((id, text, to_json(&WebhookTarget { secret: Some(secret), ..webhook })?));
                }
            }
            if anew.is_empty() {
                continue;
            }
            changed += self.replace_batch_webhooks(&anew).await?;
        }
    }

    async fn replace_batch_webhooks(&self, anew: &[(String, String, String)]) -> Result<u64, StoreError> {
        self.write(|tx| async move {
            let mut changed = 0;
            for (id, before, now) in anew {
                let updated = batch::Entity::update_many()
                    .col_expr(batch::Column::Webhook, Expr::val(now))
                    .filter(batch::Column::Id.eq(id))
                    .filter(batch::Column::Webhook.eq(before))
                    .exec(&tx)
                    .await?;
                changed += updated.rows_affected;
            }
            commit(tx, changed)
        })
        .await
    }

    async fn reseal_deliveries(
        &self,
        current: &[u8],
        reseal: &mut impl FnMut(SecretOf<'_>, &SealedSecret) -> Option<SealedSecret>,
    ) -> Result<u64, StoreError> {
        let (mut changed, mut after) = (0, String::new());
        // The last of a page comes in any case: the next page begins after it.
        let sql = format!(
            "WITH page AS (SELECT id, url, secret FROM webhook_deliveries \
             WHERE secret IS NOT NULL AND id > $1 ORDER BY id LIMIT {PAGE}) \
             SELECT id, url, secret FROM page \
             WHERE substr(secret, 1, $2) <> $3 OR id = (SELECT MAX(id) FROM page) ORDER BY id"
        );
        let length = i32::try_from(current.len()).unwrap_or(i32::MAX);
        loop {
            let values = [after.as_str().into(), length.into(), current.to_vec().into()];
            let statement = Statement::from_sql_and_values(self.read().get_database_backend(), &sql, values);
            let rows = self.read().query_all_raw(statement).await?;
            let page: Vec<(String, String, Vec<u8>)> =
                rows.iter().map(QueryResult::try_get_many_by_index).collect::<Result<_, _>>()?;
            let Some((last, ..)) = page.last() else { return Ok(changed) };
            after.clone_from(last);
            let anew: Vec<_> = page
                .into_iter()
                .filter_map(|(id, url, before)| {
                    let sealed = reseal(SecretOf::Webhook(&url), &SealedSecret::from_bytes(before.clone()))?;
                    Some((id, before, sealed))
                })
                .collect();
            if anew.is_empty() {
                continue;
            }
            changed += self.replace_delivery_secrets(&anew).await?;
        }
    }

    async fn replace_delivery_secrets(&self, anew: &[(String, Vec<u8>, SealedSecret)]) -> Result<u64, StoreError> {
        self.write(|tx| async move {
            let mut changed = 0;
            for (id, before, now) in anew {
                let updated = webhook_delivery::Entity::update_many()
                    .col_expr(webhook_delivery::Column::Secret, Expr::val(now.as_bytes().to_vec()))
                    .filter(webhook_delivery::Column::Id.eq(id))
                    .filter(webhook_delivery::Column::Secret.eq(before.clone()))
                    .exec(&tx)
                    .await?;
                changed += updated.rows_affected;
            }
            commit(tx, changed)
        })
        .await
    }
}
