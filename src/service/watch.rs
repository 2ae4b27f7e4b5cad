//! Live events of one batch, or of all.

use futures::{StreamExt, stream::BoxStream};

use super::{Service, ServiceError, Span, batches::shown, error, rules};
use crate::{
    access::Caller,
    domain::{Revision, Sequence},
    progress::{Event, EventKind},
};

/// Events as they come.
pub type Events = BoxStream<'static, Result<Event, ServiceError>>;

impl Service {
    /// The events of one batch after a revision. 0: its current state first.
    ///
    /// # Errors
    /// [`ServiceError`], at once or in the stream.
    pub async fn watch_batch(
        &self,
        caller: &Caller,
        id: &str,
        after: i64,
        min_interval: Option<Span>,
    ) -> Result<Events, ServiceError> {
        const FIELD: &str = "after_revision";
        let id = rules::batch_id(id)?;
        let after = Revision(rules::not_negative(after, FIELD)?);
        let interval = rules::min_interval(min_interval)?;
        self.find_batch(caller, &id).await?;
        let events = self.parts.hub.watch(&id, after, interval).await.map_err(|error| error::watch(error, FIELD))?;
        let caller = caller.clone();
        Ok(events
            .map(move |event| event.map(|event| seen(event, &caller)).map_err(|error| error::watch(error, FIELD)))
            .boxed())
    }

    /// The events of all of the caller's batches after a sequence number. 0: their current states first.
    ///
    /// # Errors
    /// [`ServiceError`], at once or in the stream.
    pub async fn watch_batches(
        &self,
        caller: &Caller,
        after: i64,
        min_interval: Option<Span>,
    ) -> Result<Events, ServiceError> {
        const FIELD: &str = "after_sequence";
        let after = Sequence(rules::not_negative(after, FIELD)?);
        let interval = rules::min_interval(min_interval)?;
        let events = self.parts.hub.watch_all(caller.scope(), after, interval).await;
        let events = events.map_err(|error| error::watch(error, FIELD))?;
        let caller = caller.clone();
        Ok(events
            .map(move |event| event.map(|event| seen(event, &caller)).map_err(|error| error::watch(error, FIELD)))
            .boxed())
    }
}

/// The event as the caller may see it.
fn seen(event: Event, caller: &Caller) -> Event {
    let public = |progress: Box<crate::progress::Progress>| Box::new(shown(caller, *progress));
    let kind = match event.kind {
        EventKind::StateChanged { batch, progress } => {
            EventKind::StateChanged { batch, progress: progress.map(public) }
        }
        EventKind::Progress(progress) => EventKind::Progress(public(progress)),
        EventKind::Heartbeat => EventKind::Heartbeat,
    };
    Event { kind, ..event }
}
