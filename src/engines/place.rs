//! On which GPUs an engine goes: by count and memory. Pure.

use std::collections::BTreeSet;

/// The share of a GPU's memory that may be held by others where a model takes the whole GPU. vLLM takes 0.92 of it.
const OTHERS: f64 = 0.08;
/// The share of a GPU's memory that engines which sleep may hold where a model takes the whole GPU. The new engine gets
/// a smaller share than usual then.
const SLEEPERS: f64 = 0.25;
/// What an engine that sleeps still holds of each of its GPUs: 0.5 to 1.3 GiB were seen.
const ASLEEP: u64 = 1536 * 1024 * 1024;

/// Names an engine: one process tree that serves one model. No two engines ever have the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EngineId(pub u64);

/// A GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Its number.
    pub index: u32,
    /// Its memory in bytes; 0 if that is unknown: then only models that take whole GPUs fit.
    pub total: u64,
    /// The bytes of it that are held by processes that are not our engines.
    pub foreign: u64,
}

/// What an engine needs of each of its GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// All of it: no other engine is awake there.
    Whole,
    /// So many bytes.
    Bytes(u64),
}

/// An engine that is on GPUs.
#[derive(Clone, Copy, Debug)]
pub struct Holder<'a> {
    /// Which one.
    pub engine: EngineId,
    /// Where.
    pub gpus: &'a [u32],
    /// What it needs when it is awake.
    pub memory: Memory,
    /// Whether it sleeps, so that it holds little.
    pub sleeps: bool,
    /// The price of making it leave. `None`: it stays.
    pub price: Option<f64>,
}

/// GPUs for an engine.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// Which ones, in ascending order.
    pub gpus: Vec<u32>,
    /// The engines that must leave first.
    pub evict: Vec<EngineId>,
    /// What it costs that they leave.
    pub price: f64,
}

/// What one GPU can offer.
struct Offer {
    gpu: u32,
    evict: Vec<EngineId>,
    price: f64,
    /// The bytes left over beside the new engine: the tightest place is the best.
    left: u64,
}

/// The cheapest GPUs for an engine of `count` GPUs, or none. Of equally cheap ones those with the least room to spare are
/// taken, so that large models find whole GPUs.
#[must_use]
pub fn place(gpus: &[Gpu], holders: &[Holder<'_>], count: usize, memory: Memory) -> Option<Place> {
    let mut offers: Vec<Offer> = gpus.iter().filter_map(|gpu| offer(gpu, holders, memory)).collect();
    if offers.len() < count {
        return None;
    }
    offers.sort_by(|a, b| a.price.total_cmp(&b.price).then(a.left.cmp(&b.left)).then(a.gpu.cmp(&b.gpu)));
    // The cheapest GPUs one by one are not always the cheapest set, because one engine may be on several: so the GPUs of
    // each engine are also tried together.
    let together = holders.iter().map(|holder| set(&offers, holders, count, holder.gpus));
    let sets = std::iter::once(set(&offers, holders, count, &[])).chain(together);
    sets.min_by(|a, b| a.price.total_cmp(&b.price))
}

/// The first `count` offers, those of the `wanted` GPUs before all others.
fn set(offers: &[Offer], holders: &[Holder<'_>], count: usize, wanted: &[u32]) -> Place {
    let is_wanted = |offer: &&Offer| wanted.contains(&offer.gpu);
    let chosen = offers.iter().filter(is_wanted).chain(offers.iter().filter(|offer| !is_wanted(offer))).take(count);
    let (mut gpus, mut evict) = (Vec::with_capacity(count), BTreeSet::new());
    for offer in chosen {
        gpus.push(offer.gpu);
        evict.extend(offer.evict.iter().copied());
    }
    gpus.sort_unstable();
    let price = holders.iter().filter(|holder| evict.contains(&holder.engine)).filter_map(|holder| holder.price).sum();
    Place { gpus, evict: evict.into_iter().collect(), price }
}

/// What must leave one GPU, the cheapest first, until an engine fits.
fn offer(gpu: &Gpu, holders: &[Holder<'_>], memory: Memory) -> Option<Offer> {
    let mut here: Vec<&Holder<'_>> = holders.iter().filter(|holder| holder.gpus.contains(&gpu.index)).collect();
    let mut leaving: Vec<&Holder<'_>> = here.iter().copied().filter(|holder| holder.price.is_some()).collect();
    leaving.sort_by(|a, b| a.price.unwrap_or(0.0).total_cmp(&b.price.unwrap_or(0.0)).then(a.engine.cmp(&b.engine)));
    let (mut evict, mut price) = (Vec::new(), 0.0);
    let mut next = leaving.into_iter();
    loop {
        if let Some(left) = fits(gpu, &here, memory) {
            return Some(Offer { gpu: gpu.index, evict, price, left });
        }
        let holder = next.next()?;
        here.retain(|one| one.engine != holder.engine);
        evict.push(holder.engine);
        price += holder.price.unwrap_or(0.0);
    }
}

/// The bytes that would be left over, or `None` if it does not fit.
fn fits(gpu: &Gpu, here: &[&Holder<'_>], memory: Memory) -> Option<u64> {
    let asleep = here.iter().filter(|holder| holder.sleeps).map(|_| ASLEEP).sum::<u64>();
    let mut awake = 0u64;
    for holder in here.iter().filter(|holder| !holder.sleeps) {
        match holder.memory {
            Memory::Whole => return None,
            Memory::Bytes(bytes) => awake = awake.saturating_add(bytes),
        }
    }
    match memory {
        Memory::Whole => {
            let is_empty = awake == 0 && here.iter().all(|holder| holder.sleeps);
            let known = gpu.total > 0;
            let few = |bytes: u64, share: f64| !known || bytes as f64 <= gpu.total as f64 * share;
            (is_empty && few(gpu.foreign, OTHERS) && few(asleep, SLEEPERS)).then_some(0)
        }
        Memory::Bytes(bytes) => {
            gpu.total.checked_sub(gpu.foreign)?.checked_sub(asleep)?.checked_sub(awake)?.checked_sub(bytes)
        }
    }
}

/// Whether an engine of `count` GPUs could be placed if it had all GPUs for itself, whatever others hold now.
#[must_use]
pub fn could_fit(gpus: &[Gpu], count: usize, memory: Memory) -> bool {
    let empty: Vec<Gpu> = gpus.iter().map(|gpu| Gpu { foreign: 0, ..*gpu }).collect();
    place(&empty, &[], count, memory).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn gpus(count: u32) -> Vec<Gpu> {
        (0..count).map(|index| Gpu { index, total: 80 * GIB, foreign: 0 }).collect()
    }

    fn holder(id: u64, gpus: &[u32], memory: Memory, price: Option<f64>) -> Holder<'_> {
        Holder { engine: EngineId(id), gpus, memory, sleeps: false, price }
    }

    #[test]
    fn idle_gpus_come_first_and_whole_ones_are_kept_for_large_models() {
        let holders = [holder(1, &[0], Memory::Bytes(30 * GIB), None)];
        let small = place(&gpus(2), &holders, 1, Memory::Bytes(40 * GIB)).unwrap();
        assert_eq!((small.gpus, small.evict), (vec![0], vec![]), "beside the other one");
        assert_eq!(place(&gpus(2), &holders, 1, Memory::Bytes(60 * GIB)).unwrap().gpus, [1]);
        assert_eq!(place(&gpus(2), &holders, 1, Memory::Whole).unwrap().gpus, [1]);
        assert_eq!(place(&gpus(2), &holders, 2, Memory::Whole), None, "one is taken, and nobody may be told to leave");
    }

    #[test]
    fn only_what_must_leave_leaves_and_the_cheapest_does() {
        let memory = Memory::Bytes(30 * GIB);
        let holders = [holder(1, &[0], memory, Some(9.0)), holder(2, &[0], memory, Some(3.0))];
        let found = place(&gpus(1), &holders, 1, Memory::Bytes(40 * GIB)).unwrap();
        assert_eq!((found.evict, found.price), (vec![EngineId(2)], 3.0));
        let found = place(&gpus(1), &holders, 1, Memory::Whole).unwrap();
        assert_eq!(found.evict, [EngineId(1), EngineId(2)]);
    }

    #[test]
    fn one_engine_on_two_gpus_may_be_cheaper_than_two_engines() {
        let whole = Memory::Whole;
        let holders = [
            holder(1, &[0], whole, Some(4.0)),
            holder(2, &[1], whole, Some(4.0)),
            holder(3, &[2, 3], whole, Some(5.0)),
        ];
        let found = place(&gpus(4), &holders, 2, whole).unwrap();
        assert_eq!((found.gpus, found.evict, found.price), (vec![2, 3], vec![EngineId(3)], 5.0));
        let found = place(&gpus(4), &holders, 1, whole).unwrap();
        assert_eq!((found.gpus, found.evict), (vec![0], vec![EngineId(1)]));
    }

    #[test]
    fn memory_of_others_and_of_sleepers_counts() {
        let mut held = gpus(1);
        held[0].foreign = 72 * GIB;
        assert_eq!(place(&held, &[], 1, Memory::Whole), None);
        assert_eq!(place(&held, &[], 1, Memory::Bytes(9 * GIB)), None);
        assert!(place(&held, &[], 1, Memory::Bytes(8 * GIB)).is_some());
        assert!(could_fit(&held, 1, Memory::Whole), "once the others are gone");
        let asleep = Holder { sleeps: true, ..holder(1, &[0], Memory::Whole, None) };
        assert!(place(&gpus(1), &[asleep], 1, Memory::Whole).is_some());
        assert_eq!(place(&gpus(1), &[asleep], 1, Memory::Bytes(79 * GIB)), None, "1.5 GiB are held by the sleeper");
        let small = [Gpu { index: 0, total: 5 * GIB, foreign: 0 }];
        assert_eq!(place(&small, &[asleep], 1, Memory::Whole), None, "it holds more than a quarter");
        let gone = Holder { price: Some(1.0), ..asleep };
        assert_eq!(place(&small, &[gone], 1, Memory::Whole).unwrap().evict, [EngineId(1)]);
    }

    #[test]
    fn where_memory_is_unknown_only_whole_gpus_are_given() {
        let unknown = [Gpu { index: 3, total: 0, foreign: 0 }];
        assert_eq!(place(&unknown, &[], 1, Memory::Whole).unwrap().gpus, [3]);
        assert_eq!(place(&unknown, &[], 1, Memory::Bytes(1)), None);
        assert!(!could_fit(&unknown, 2, Memory::Whole));
        assert_eq!(place(&[], &[], 0, Memory::Whole).unwrap().gpus, [0u32; 0], "an engine without a GPU fits anywhere");
    }
}
