//! How long a connection may remain in its current activity. Pure: time is an argument.

use std::time::Duration;

use tokio::time::Instant;

/// How long a client has for the TLS handshake, and again for its first whole head: none needs longer.
pub(super) const HEAD: Duration = Duration::from_secs(10);
/// How long a connection without a request is kept. Longer than the 600 s after which Google's load balancers, the most
/// patient ones, stop using an idle connection: one that closes first turns a request into a 502.
pub(super) const IDLE: Duration = Duration::from_secs(660);
/// How long a client may read nothing of what is ready for it.
pub(super) const STALLED: Duration = Duration::from_secs(300);
/// How HTTP/2 begins.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Why the server ends a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// No whole head of a request came in time.
    Silent,
    /// It had no request for long.
    Idle,
    /// The client reads nothing of what is ready for it.
    Stalled,
}

/// What the first bytes of a connection say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    /// So many bytes of the preface of HTTP/2 have come, and nothing else.
    Unknown(usize),
    Http1,
    Http2,
}

/// What a connection does, and since when.
#[derive(Clone, Debug)]
pub(super) struct Activity {
    protocol: Protocol,
    /// Requests whose response has not ended.
    open: usize,
    /// At least one request has come.
    served: bool,
    /// Since it has no open request.
    idle_since: Instant,
    /// When the first bytes of the next request came, on HTTP/1.
    head_since: Option<Instant>,
    /// Since the client takes no bytes.
    blocked_since: Option<Instant>,
}

impl Activity {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            protocol: Protocol::Unknown(0),
            open: 0,
            served: false,
            idle_since: now,
            head_since: None,
            blocked_since: None,
        }
    }

    /// Bytes have come. Returns whether the connection is now due sooner than before.
    pub(super) fn read(&mut self, bytes: &[u8], now: Instant) -> bool {
        if let Protocol::Unknown(seen) = self.protocol {
            let expected = &PREFACE[seen..(seen + bytes.len()).min(PREFACE.len())];
            self.protocol = match bytes.starts_with(expected) {
                false => Protocol::Http1,
                true if seen + expected.len() == PREFACE.len() => Protocol::Http2,
                true => Protocol::Unknown(seen + expected.len()),
            };
        }
        let begins = self.protocol != Protocol::Http2 && self.open == 0 && self.head_since.is_none();
        if begins {
            self.head_since = Some(now);
        }
        begins
    }

    /// The client took no byte of what was offered. Returns whether the connection is now due sooner than before.
    pub(super) fn blocked(&mut self, now: Instant) -> bool {
        self.blocked_since.replace(self.blocked_since.unwrap_or(now)).is_none()
    }

    /// The client took some.
    pub(super) fn unblocked(&mut self) {
        self.blocked_since = None;
    }

    /// A request has come. Returns how many are open.
    pub(super) fn began(&mut self) -> usize {
        (self.open, self.served, self.head_since) = (self.open + 1, true, None);
        self.open
    }

    /// A response has ended. Returns how many are open.
    pub(super) fn ended(&mut self, now: Instant) -> usize {
        self.open = self.open.saturating_sub(1);
        self.idle_since = now;
        self.open
    }

    pub(super) fn is_idle(&self) -> bool {
        self.open == 0
    }

    /// When the connection is to be ended if nothing changes, and why.
    pub(super) fn due(&self) -> Option<(Instant, Ending)> {
        let stalled = self.blocked_since.map(|since| (since + STALLED, Ending::Stalled));
        let waits = match self.protocol {
            _ if self.open > 0 => None,
            Protocol::Http2 => Some((self.idle_since + IDLE, Ending::Idle)),
            Protocol::Unknown(_) | Protocol::Http1 if !self.served => Some((self.idle_since + HEAD, Ending::Silent)),
            Protocol::Unknown(_) | Protocol::Http1 => Some(match self.head_since {
                Some(since) => (since + HEAD, Ending::Silent),
                None => (self.idle_since + IDLE, Ending::Idle),
            }),
        };
        [stalled, waits].into_iter().flatten().min_by_key(|(at, _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn second(number: u64) -> Duration {
        Duration::from_secs(number)
    }

    #[test]
    fn a_connection_has_ten_seconds_for_its_first_head_however_slowly_it_comes() {
        let start = Instant::now();
        let mut one = Activity::new(start);
        assert_eq!(one.due(), Some((start + HEAD, Ending::Silent)));
        for (at, byte) in (0..9).zip(b"GET / HTT") {
            one.read(&[*byte], start + second(at));
            assert_eq!(one.due(), Some((start + HEAD, Ending::Silent)), "a byte buys no time");
        }
        let mut half = Activity::new(start);
        half.read(&PREFACE[..20], start + second(9));
        assert_eq!(half.due(), Some((start + HEAD, Ending::Silent)), "half a preface is no connection");
        one.began();
        assert_eq!(one.due(), None, "what runs may run");
    }

    #[test]
    fn http2_may_wait_before_its_first_request_and_between_requests() {
        let start = Instant::now();
        let mut one = Activity::new(start);
        assert!(one.read(&PREFACE[..3], start));
        one.read(&[&PREFACE[3..], b"settings"].concat(), start);
        assert_eq!(one.due(), Some((start + IDLE, Ending::Idle)));
        one.began();
        one.began();
        assert_eq!(one.ended(start + second(5)), 1);
        assert_eq!(one.due(), None);
        one.ended(start + second(7));
        // Its client asks whether the server lives: no request comes of that.
        assert!(!one.read(b"a ping", start + second(100)));
        assert_eq!(one.due(), Some((start + second(7) + IDLE, Ending::Idle)));
    }

    #[test]
    fn the_next_head_on_http1_has_ten_seconds_from_its_first_byte() {
        let start = Instant::now();
        let mut one = Activity::new(start);
        one.read(b"GET / HTTP/1.1\r\n\r\n", start);
        one.began();
        one.ended(start + second(1));
        assert_eq!(one.due(), Some((start + second(1) + IDLE, Ending::Idle)));
        assert!(one.read(b"G", start + second(60)), "now it is due sooner");
        assert!(!one.read(b"E", start + second(65)));
        assert_eq!(one.due(), Some((start + second(60) + HEAD, Ending::Silent)));
        one.began();
        assert_eq!(one.due(), None);
    }

    #[test]
    fn a_client_that_takes_nothing_is_due_and_one_that_takes_a_byte_is_not() {
        let start = Instant::now();
        let mut one = Activity::new(start);
        one.began();
        assert!(one.blocked(start + second(1)) && !one.blocked(start + second(200)));
        assert_eq!(one.due(), Some((start + second(1) + STALLED, Ending::Stalled)));
        one.unblocked();
        assert_eq!(one.due(), None);
    }
}
