//! Addresses for processes that have to come back to the same one.

use std::{
    fs::File,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::atomic::{AtomicU16, Ordering},
};

/// Below the ports that the system gives to clients and to whoever binds port 0.
const FIRST: u16 = 20_000;
const COUNT: u16 = 10_000;

/// An address that no other test is given as long as this lives.
pub struct Address {
    pub address: SocketAddr,
    _lock: File,
}

/// Reserves an address where nobody listens.
pub fn reserve() -> Address {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let folder = std::env::temp_dir().join("tidemill-test-ports");
    std::fs::create_dir_all(&folder).unwrap();
    // Processes that run side by side begin at different places.
    let begin = u16::try_from(std::process::id() * 37 % u32::from(COUNT)).unwrap();
    for _ in 0..COUNT {
        let port = FIRST + (begin + NEXT.fetch_add(1, Ordering::Relaxed) % COUNT) % COUNT;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let lock = File::create(folder.join(port.to_string())).unwrap();
        if lock.try_lock().is_ok() && TcpListener::bind(address).is_ok() {
            return Address { address, _lock: lock };
        }
    }
    panic!("all ports are taken");
}
