//! Encrypts stored secrets again after the master key was replaced, page by page, in small transactions. A value that was
//! changed meanwhile is left as it is.

use sea_orm::{ColumnTrait, EntityTrait, QueryFilter, QueryOrder, QuerySelect, TryGetable, Value, sea_query::Expr};

use crate::{
    domain::webhook::{SealedSecret, WebhookTarget},
    store::{
        Store, StoreError,
        convert::{self, to_json},
        entity::{batch, webhook_delivery, webhook_endpoint},
        write::commit,
    },
};

/// Rows read, and at most changed, at a time.
const PAGE: u64 = 200;

/// What a stored secret belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecretOf<'a> {
    /// The registered endpoint of this id.
    Endpoint(&'a str),
    /// A batch, or a delivery of one, to this URL.
    Webhook(&'a str),
}

impl Store {
    /// Replaces every stored secret for which `reseal` returns another, so that an old master key can be removed. Returns
    /// how many were replaced.
    ///
    /// # Errors
    /// [`StoreError`]. Some may have been replaced; the same call again does the rest.
    pub async fn reseal_secrets(
        &self,
        mut reseal: impl FnMut(SecretOf<'_>, &SealedSecret) -> Option<SealedSecret>,
    ) -> Result<u64, StoreError> {
        let mut bytes = |of: SecretOf<'_>, sealed: &[u8]| {
            reseal(of, &SealedSecret::from_bytes(sealed.to_vec())).map(|anew| anew.as_bytes().to_vec())
        };
        let mut replaced = {
            use webhook_endpoint::{Column, Entity};
            let mut anew = |id: &str, sealed: &Vec<u8>| Ok(bytes(SecretOf::Endpoint(id), sealed));
            // In this order, because a rotation moves the first to the second.
            self.replace::<Entity, _>([Column::Id, Column::Id, Column::Secret], &mut anew).await?
                + self.replace::<Entity, _>([Column::Id, Column::Id, Column::PreviousSecret], &mut anew).await?
        };
        // Batches before deliveries, because the end of a batch copies its secret to a delivery.
        replaced += {
            use batch::{Column, Entity};
            let anew = |_: &str, text: &String| {
                let webhook: WebhookTarget = convert::json("webhook", text)?;
                let sealed = webhook.secret.as_ref().map(SealedSecret::as_bytes);
                let anew = sealed.and_then(|sealed| bytes(SecretOf::Webhook(&webhook.url), sealed));
                let anew = anew.map(|anew| WebhookTarget { secret: Some(SealedSecret::from_bytes(anew)), ..webhook });
                anew.as_ref().map(to_json).transpose()
            };
            self.replace::<Entity, _>([Column::Id, Column::Id, Column::Webhook], anew).await?
        };
        use webhook_delivery::{Column, Entity};
        let anew = |url: &str, sealed: &Vec<u8>| Ok(bytes(SecretOf::Webhook(url), sealed));
        Ok(replaced + self.replace::<Entity, _>([Column::Id, Column::Url, Column::Secret], anew).await?)
    }

    /// Replaces values of the third column: `anew` gets those of the second and the third column, and returns the new
    /// one. The first column is the key.
    async fn replace<E: EntityTrait, V: TryGetable + Into<Value> + Clone>(
        &self,
        [key, context, value]: [E::Column; 3],
        mut anew: impl FnMut(&str, &V) -> Result<Option<V>, StoreError>,
    ) -> Result<u64, StoreError> {
        let (mut replaced, mut after) = (0, String::new());
        loop {
            let page: Vec<(String, String, V)> = E::find()
                .select_only()
                .column_as(key, "key")
                .column_as(context, "context")
                .column_as(value, "value")
                .filter(value.is_not_null())
                .filter(key.gt(after.as_str()))
                .order_by_asc(key)
                .limit(PAGE)
                .into_tuple()
                .all(self.read())
                .await?;
            let Some((last, ..)) = page.last() else { return Ok(replaced) };
            after.clone_from(last);
            let mut changes = Vec::new();
            for (key, context, before) in page {
                if let Some(now) = anew(&context, &before)? {
                    changes.push((key, before, now));
                }
            }
            if changes.is_empty() {
                continue;
            }
            let changes = &changes;
            replaced += self
                .write(|tx| async move {
                    let mut replaced = 0;
                    for (id, before, now) in changes {
                        let update = E::update_many().col_expr(value, Expr::val(now.clone()));
                        let update = update.filter(key.eq(id.as_str())).filter(value.eq(before.clone()));
                        replaced += update.exec(&tx).await?.rows_affected;
                    }
                    commit(tx, replaced)
                })
                .await?;
        }
    }
}
