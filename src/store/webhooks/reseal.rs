//! Encrypts stored secrets again after the master key was replaced, page by page, in small transactions. What is written
//! meanwhile is left as it is written.

use sea_orm::{
    ActiveModelTrait, ColumnTrait, EntityTrait, IntoActiveModel, QueryFilter, QueryOrder, QuerySelect, sea_query::Expr,
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
    /// Seals every stored secret anew for which `reseal` gives another, so that an old master key can be dropped.
    /// Returns how many were sealed anew.
    ///
    /// # Errors
    /// [`StoreError`]: some may have been sealed anew; the same call again does the rest.
    pub async fn reseal_secrets(
        &self,
        mut reseal: impl FnMut(SecretOf<'_>, &SealedSecret) -> Option<SealedSecret>,
    ) -> Result<u64, StoreError> {
        Ok(self.reseal_endpoints(&mut reseal).await?
            + self.reseal_batches(&mut reseal).await?
            + self.reseal_deliveries(&mut reseal).await?)
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
            let (current, previous) = (&anew(&row.secret), &anew(&row.previous_secret));
            if current.is_none() && previous.is_none() {
                continue;
            }
            let (id, seen) = (&id, &row);
            let replaced = self.write(|tx| async move {
                let Some(mut row) = lock(&tx, id, &Scope::All).await? else { return roll_back(false) };
                if (&row.secret, &row.previous_secret) != (&seen.secret, &seen.previous_secret) {
                    return roll_back(false);
                }
                row.secret = current.clone().or(row.secret);
                row.previous_secret = previous.clone().or(row.previous_secret);
                row.into_active_model().reset_all().update(&tx).await?;
                commit(tx, true)
            });
            changed += u64::from(replaced.await?);
        }
        Ok(changed)
    }

    async fn reseal_batches(
        &self,
        reseal: &mut impl FnMut(SecretOf<'_>, &SealedSecret) -> Option<SealedSecret>,
    ) -> Result<u64, StoreError> {
        use batch::Column;
        let (mut changed, mut after) = (0, String::new());
        loop {
            let page: Vec<(String, String)> = batch::Entity::find()
                .select_only()
                .columns([Column::Id, Column::Webhook])
                .filter(Column::Webhook.is_not_null())
                .filter(Column::Id.gt(after.as_str()))
                .order_by_asc(Column::Id)
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
            let anew = &anew;
            let replaced = self.write(|tx| async move {
                let mut changed = 0;
                for (id, before, now) in anew {
                    let update = batch::Entity::update_many().col_expr(Column::Webhook, Expr::val(now));
                    let update = update.filter(Column::Id.eq(id)).filter(Column::Webhook.eq(before));
                    changed += update.exec(&tx).await?.rows_affected;
                }
                commit(tx, changed)
            });
            changed += if anew.is_empty() { 0 } else { replaced.await? };
        }
    }

    async fn reseal_deliveries(
        &self,
        reseal: &mut impl FnMut(SecretOf<'_>, &SealedSecret) -> Option<SealedSecret>,
    ) -> Result<u64, StoreError> {
        use webhook_delivery::Column;
        let (mut changed, mut after) = (0, String::new());
        loop {
            let page: Vec<(String, String, Vec<u8>)> = webhook_delivery::Entity::find()
                .select_only()
                .columns([Column::Id, Column::Url, Column::Secret])
                .filter(Column::Secret.is_not_null())
                .filter(Column::Id.gt(after.as_str()))
                .order_by_asc(Column::Id)
                .limit(PAGE)
                .into_tuple()
                .all(self.read())
                .await?;
            let Some((last, ..)) = page.last() else { return Ok(changed) };
            after.clone_from(last);
            let mut anew = Vec::new();
            for (id, url, before) in page {
                if let Some(sealed) = reseal(SecretOf::Webhook(&url), &SealedSecret::from_bytes(before.clone())) {
                    anew.push((id, before, sealed));
                }
            }
            let anew = &anew;
            let replaced = self.write(|tx| async move {
                let mut changed = 0;
                for (id, before, now) in anew {
                    let now = Expr::val(now.as_bytes().to_vec());
                    let update = webhook_delivery::Entity::update_many().col_expr(Column::Secret, now);
                    let update = update.filter(Column::Id.eq(id)).filter(Column::Secret.eq(before.clone()));
                    changed += update.exec(&tx).await?.rows_affected;
                }
                commit(tx, changed)
            });
            changed += if anew.is_empty() { 0 } else { replaced.await? };
        }
    }
}
