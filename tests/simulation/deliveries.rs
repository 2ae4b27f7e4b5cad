//! Webhook deliveries without IO: the state machine, the fairness and the schedule, all of them the real ones, in virtual
//! time. Receivers are well, slow, dead or gone for good; senders crash with what they have taken.

use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tidemill::{
    delivery::{
        fairness::{Due, Fairness},
        schedule::Schedule,
    },
    domain::{
        Owner,
        webhook::{Delivery, DeliveryState, DeliveryTrigger, Effect, apply},
    },
};

const PER_TARGET: usize = 2;
const IN_FLIGHT: usize = 5;
const LEASE: Duration = Duration::from_secs(60);
const TROUBLE: usize = 120;
const PATIENCE: usize = 5_000;
const TARGETS: usize = 3;

struct Row {
    target: usize,
    state: Delivery,
    due: Instant,
    lease: Option<Instant>,
    dead_letters: u32,
    /// The receiver has had it.
    received: bool,
}

pub struct Deliveries {
    random: StdRng,
    now: Instant,
    rows: Vec<Row>,
    /// What this sender has in flight.
    flights: Vec<usize>,
    fairness: Fairness,
    faults: bool,
}

impl Deliveries {
    pub fn run(seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        let now = Instant::now();
        let rows = (0..random.random_range(1..=12))
            .map(|_| Row {
                target: random.random_range(0..TARGETS),
                state: Delivery {
                    state: DeliveryState::Pending,
                    attempts: 0,
                    max_attempts: random.random_range(1..=5),
                    disposable: random.random_bool(0.3),
                },
                due: now,
                lease: None,
                dead_letters: 0,
                received: false,
            })
            .collect();
        let fairness = Fairness::new(PER_TARGET, IN_FLIGHT);
        let mut world = Self { random, now, rows, flights: Vec::new(), fairness, faults: true };
        for _ in 0..TROUBLE {
            world.step();
        }
        world.faults = false;
        let mut steps = 0;
        while !world.rows.iter().all(|row| is_settled(row.state.state)) {
            world.step();
            steps += 1;
            assert!(steps < PATIENCE, "a delivery is never settled");
        }
        for row in &world.rows {
            let dead = u32::from(row.state.state == DeliveryState::Dead);
            assert_eq!(row.dead_letters, dead, "delivered or a dead letter, never neither, never both");
            assert!(row.received || row.state.state != DeliveryState::Delivered);
            assert!(row.state.disposable || row.state.state != DeliveryState::Cancelled);
        }
    }

    fn step(&mut self) {
        match self.random.random_range(0..12) {
            0..2 => self.now += Duration::from_millis(self.random.random_range(0..90_000)),
            2..5 => self.claim(),
            5..9 => self.land(),
            9 => self.reap(),
            10 if self.faults => self.crash(),
            11 if self.faults => self.supersede(),
            _ => self.fairness.forget_idle(self.now),
        }
        assert!(self.flights.len() <= IN_FLIGHT);
        assert_eq!(self.fairness.free(), IN_FLIGHT - self.flights.len(), "every send in flight is counted once");
        for target in 0..TARGETS {
            assert!(self.flights.iter().filter(|at| self.rows[**at].target == target).count() <= PER_TARGET);
        }
    }

    fn input(&mut self, at: usize, input: DeliveryTrigger) -> bool {
        let row = &mut self.rows[at];
        let before = row.state;
        let Ok(step) = apply(before, input) else { return false };
        assert!(!is_settled(before.state), "a delivery that is settled changed");
        row.state.state = step.state;
        row.state.attempts = step.attempts;
        assert!((0..=row.state.max_attempts).contains(&step.attempts));
        row.lease = (step.state == DeliveryState::Leased).then(|| self.now + LEASE);
        match step.effect {
            Effect::None => {}
            Effect::Retry => {
                let wait = Schedule::default().wait(step.attempts, None, &mut self.random);
                assert!(wait <= Duration::from_secs(3_600 * 2));
                row.due = self.now + wait;
            }
            Effect::DeadLetter => row.dead_letters += 1,
        }
        true
    }

    fn claim(&mut self) {
        let ready = |row: &Row, now| row.state.state == DeliveryState::Pending && row.due <= now;
        let due: Vec<Due> = (0..TARGETS)
            .map(|target| Due { owner: owner(target), target: target.to_string(), host: (target / 2).to_string() })
            .collect();
        for share in self.fairness.shares(&due, self.now) {
            let target: usize = share.target.parse().unwrap();
            assert!(
                self.fairness.held_until(&share.owner, &share.target, self.now).is_none(),
                "a target that is held back"
            );
            let mine: Vec<usize> = (0..self.rows.len())
                .filter(|at| self.rows[*at].target == target && ready(&self.rows[*at], self.now))
                .collect();
            // Some of them somebody else has taken in the meantime.
            let there = share.count.min(mine.len());
            let taken = if self.faults { self.random.random_range(0..=there) } else { there };
            for at in &mine[..taken] {
                assert!(self.input(*at, DeliveryTrigger::Claimed));
                // Some are not sent, because the sender is stopped.
                if self.faults && self.random.random_bool(0.1) {
                    self.input(*at, DeliveryTrigger::Released);
                    self.fairness.give_back(&share.owner, &share.target, 1);
                } else {
                    self.flights.push(*at);
                }
            }
            self.fairness.give_back(&share.owner, &share.target, share.count - taken);
        }
    }

    fn land(&mut self) {
        if self.flights.is_empty() {
            return;
        }
        let at = self.flights.swap_remove(self.random.random_range(0..self.flights.len()));
        let (owner, target) = (owner(self.rows[at].target), self.rows[at].target.to_string());
        let input = match self.random.random_range(0..10) {
            0 if self.faults => DeliveryTrigger::FailedForGood,
            2..6 if self.faults => DeliveryTrigger::Failed,
            _ => DeliveryTrigger::Succeeded,
        };
        match input {
            DeliveryTrigger::Succeeded => {
                self.rows[at].received = true;
                self.fairness.succeeded(&owner, &target, self.now);
            }
            _ => {
                let asked = self.random.random_bool(0.2).then(|| Duration::from_secs(30));
                self.fairness.failed(&owner, &target, asked, self.now);
            }
        }
        // Refused: its lease was taken away.
        self.input(at, input);
    }

    /// Leases of senders that are gone. This one renews nothing: what it is slow with, it loses.
    fn reap(&mut self) {
        for at in 0..self.rows.len() {
            let expired = self.rows[at].lease.is_some_and(|lease| lease < self.now);
            // The real sender ends its attempts before their lease.
            if expired && !self.flights.contains(&at) {
                assert!(self.input(at, DeliveryTrigger::LeaseExpired));
            }
        }
    }

    fn crash(&mut self) {
        if self.random.random_bool(0.3) {
            self.flights.clear();
            self.fairness = Fairness::new(PER_TARGET, IN_FLIGHT);
        }
    }

    fn supersede(&mut self) {
        let at = self.random.random_range(0..self.rows.len());
        let disposable = self.rows[at].state.disposable;
        assert!(!self.input(at, DeliveryTrigger::Superseded) || disposable, "a delivery that matters was dropped");
    }
}

/// Whose a target is: two are one owner's, on one host.
fn owner(target: usize) -> Owner {
    if target / 2 == 0 { "one".into() } else { "two".into() }
}

fn is_settled(state: DeliveryState) -> bool {
    matches!(state, DeliveryState::Delivered | DeliveryState::Dead | DeliveryState::Cancelled)
}
