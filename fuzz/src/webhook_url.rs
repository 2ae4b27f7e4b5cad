use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use futures::FutureExt;
use tidemill::{
    delivery::egress::{Guard, Policy},
    domain::webhook::{Defaults, WebhookConfig, target_of},
};
use url::{Host, Url};

/// No URL leads to an address that is not public, whatever its spelling and whatever its name resolves to. The first bytes
/// are what names resolve to.
pub fn webhook_url(data: &[u8]) {
    let Some((head, text)) = data.split_first_chunk::<16>() else { return };
    let text = String::from_utf8_lossy(text);
    let v4 = Ipv4Addr::from_octets(*head.first_chunk().expect("16 bytes"));
    let addresses = vec![IpAddr::V4(v4), IpAddr::V6(Ipv6Addr::from_octets(*head))];
    let answer = match head[15] % 3 {
        0 => vec![addresses[0]],
        1 => vec![addresses[1]],
        _ => addresses,
    };
    let resolved = answer.clone();
    let lookup = Arc::new(move |_| {
        let resolved = resolved.clone();
        async move { Ok(resolved) }.boxed()
    });
    let guard = Guard::with_lookup(Policy::default(), lookup);
    let checked = guard.check_url(&text);
    // The check has a deadline, so it needs a clock.
    let clock = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let whole = clock.block_on(guard.check(&text));
    if let Ok(url) = &checked {
        assert!(matches!(url.scheme(), "http" | "https") && url.username().is_empty() && url.password().is_none());
        assert_eq!(Url::parse(url.as_str()).as_ref(), Ok(url), "it reads differently the second time");
        match url.host().expect("a host") {
            Host::Ipv4(address) => assert!(is_public(address.into()), "{text:?} goes to {address}"),
            Host::Ipv6(address) => assert!(is_public(address.into()), "{text:?} goes to {address}"),
            Host::Domain(name) => {
                assert!(!name.is_empty() && name.parse::<IpAddr>().is_err(), "{text:?} is an address");
                let public = answer.iter().all(|address| is_public(*address));
                assert!(public || whole.is_err(), "{text:?} goes to one of {answer:?}");
                assert!(!public || whole.is_ok(), "{text:?} is refused for {answer:?}");
            }
        }
    } else {
        assert!(whole.is_err());
    }
    assert!(!target_of(&text).contains('?') || Url::parse(&text).is_err());
    if let Err(invalid) = WebhookConfig::new(text.clone()).resolve(Defaults::default()) {
        assert!(invalid.iter().all(|one| one.field == "url" && !one.message.is_empty()));
    } else {
        assert!(Url::parse(&text).is_ok_and(|url| url.has_host()), "{text:?} was taken for a webhook's url");
    }
}

/// IANA's special-purpose registries, in other words than the guard's: by the properties that std knows, and the rest by
/// octet.
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            let [a, b, c, _] = address.octets();
            !(address.is_private()
                || address.is_loopback()
                || address.is_link_local()
                || address.is_multicast()
                || address.is_broadcast()
                || address.is_documentation()
                || a == 0
                || a >= 240
                || (a == 100 && b & 0xc0 == 64)
                || (a == 198 && b & 0xfe == 18)
                || matches!((a, b, c), (192, 0, 0) | (192, 31, 196) | (192, 52, 193) | (192, 88, 99)))
        }
        IpAddr::V6(address) => {
            let [a, b, ..] = address.segments();
            a & 0xe000 == 0x2000
                && !(a == 0x2001 && (b < 0x200 || b == 0xdb8))
                && a != 0x2002
                && !(a == 0x3fff && b < 0x1000)
        }
    }
}
