//! Calls take turns on the connections to PostgreSQL, and on the one that writes to a SQLite file, in the order in which they
//! come. The driver's own queue gives up each call after a fixed time, so a burst that takes longer than that fails although
//! the database answers all the while. Here a call waits as long as the calls before it are answered, and is given up only
//! when the database answers none of them.

use std::{
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use sea_orm::{ConnAcquireErr, DbErr, RuntimeErr};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep_until},
};

use super::error::is_locked;

/// The queue in front of a pool. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Turns {
    places: Arc<Semaphore>,
    /// When the database last answered a call.
    answered: Arc<Mutex<Instant>>,
    patience: Duration,
}

/// The right to one connection, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    _place: OwnedSemaphorePermit,
    /// The database's last answer before this turn, or the start of the wait.
    pub(super) alive: Instant,
}

impl Turns {
    /// A queue for this many connections. A call fails if the database has answered no other one for `patience`.
    pub(super) fn new(connections: u32, patience: Duration) -> Self {
        let places = usize::try_from(connections).unwrap_or(Semaphore::MAX_PERMITS);
        Self { places: Arc::new(Semaphore::new(places)), answered: Arc::new(Mutex::new(Instant::now())), patience }
    }

    /// Waits for a turn.
    pub(super) async fn wait(&self) -> Result<Turn, DbErr> {
        let came = Instant::now();
        let mut place = pin!(self.places.clone().acquire_owned());
        loop {
            let alive = self.answered().max(came);
            tokio::select! {
                biased;
                place = &mut place => {
                    let place = place.map_err(|_| DbErr::ConnectionAcquire(ConnAcquireErr::ConnectionClosed))?;
                    return Ok(Turn { _place: place, alive: self.answered().max(came) });
                }
                () = sleep_until(alive + self.patience) => {
                    if self.answered().max(came) == alive {
                        return Err(DbErr::ConnectionAcquire(ConnAcquireErr::Timeout));
                    }
                }
            }
        }
    }

    /// Records the result of a statement. A refusal is an answer too, but not that another process has locked the file.
    pub(super) fn note<T>(&self, of: &Result<T, DbErr>) {
        let answered = match of {
            Ok(_) => true,
            Err(error) if is_locked(error) => false,
            Err(
                DbErr::Conn(RuntimeErr::SqlxError(error))
                | DbErr::Exec(RuntimeErr::SqlxError(error))
                | DbErr::Query(RuntimeErr::SqlxError(error)),
            ) => error.as_database_error().is_some(),
            Err(_) => false,
        };
        if answered {
            *self.answered.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        }
    }

    fn answered(&self) -> Instant {
        *self.answered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    #[tokio::test(start_paused = true)]
    async fn a_queue_that_moves_on_gives_up_nobody_and_keeps_its_order() {
        let turns = Turns::new(2, PATIENCE);
        let (order, mut came) = tokio::sync::mpsc::unbounded_channel();
        let mut calls = tokio::task::JoinSet::new();
        for call in 0..200 {
            let (turns, order) = (turns.clone(), order.clone());
            calls.spawn(async move {
                let turn = turns.wait().await;
                order.send((call, turn.is_ok())).unwrap();
                // Each is slow, and all together take many times the patience.
                tokio::time::sleep(PATIENCE - Duration::from_millis(1)).await;
                turns.note(&Ok(()));
            });
        }
        calls.join_all().await;
        for call in 0..200 {
            assert_eq!(came.recv().await, Some((call, true)));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_queue_that_stands_still_is_left() {
        let turns = Turns::new(1, PATIENCE);
        let held = turns.wait().await.unwrap();
        let began = Instant::now();
        tokio::time::sleep(Duration::from_secs(3)).await;
        // That its connection could not be made is no answer.
        turns.note(&Err::<(), _>(DbErr::ConnectionAcquire(ConnAcquireErr::Timeout)));
        assert!(turns.wait().await.is_err());
        assert_eq!(began.elapsed(), Duration::from_secs(3) + PATIENCE);
        drop(held);
        assert!(turns.wait().await.is_ok(), "who left the queue holds no place");
    }
}
