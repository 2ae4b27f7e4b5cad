//! The night: sixty batches for six models on one GPU, eight hours of work, a tenth of the batches with windows of two
//! to six hours. They come in its first hour.

use super::machine::{Batch, Machine, costs, gpus, spec};

/// A small generator, so that the nights are the same for ever.
pub(super) struct Lots(pub(super) u64);

impl Lots {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(super) fn share(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.bits() % end
    }
}

const HOUR: f64 = 3600.0;

fn batches(seed: u64, comes_within: f64) -> Vec<Batch> {
    let mut lots = Lots(seed);
    // The logarithm of a size is about normal, as sums of twelve lots are.
    let sizes: Vec<f64> = (0..60).map(|_| ((0..12).map(|_| lots.share()).sum::<f64>() - 6.0).exp()).collect();
    let all: f64 = sizes.iter().sum();
    let batch = |size: &f64| {
        let arrives = lots.share() * comes_within;
        let is_short = lots.share() < 0.1;
        let window = if is_short { 2.0 + 4.0 * lots.share() } else { 24.0 };
        Batch {
            model: format!("model-{}", lots.below(6)).as_str().into(),
            arrives,
            work: size / all * 8.0 * HOUR,
            closes: Some(arrives + window * HOUR),
            priority: 1,
        }
    };
    sizes.iter().map(batch).collect()
}

/// Loads, hours and missed windows, on average of some nights.
fn nights(count: u32, comes_within: f64, swap: f64) -> [f64; 3] {
    let mut sums = [0.0; 3];
    for seed in 0..count {
        let specs: Vec<_> = (0..6).map(|at| spec(&format!("model-{at}"))).collect();
        let costs = costs(&specs, swap);
        let mut machine = Machine::new(gpus(1), specs, costs, batches(seed.into(), comes_within));
        while !machine.is_done() {
            let again_at = machine.decide().again_at;
            machine.pass(again_at, 600.0);
            assert!(machine.now < 24.0 * HOUR, "the night has no end");
        }
        let night = [f64::from(machine.loads), machine.now / HOUR, f64::from(machine.missed)];
        sums.iter_mut().zip(night).for_each(|(sum, value)| *sum += value / f64::from(count));
    }
    sums
}

#[test]
fn sixty_batches_of_six_models_need_few_swaps_and_miss_few_windows() {
    let [swaps, hours, missed] = nights(30, HOUR, 120.0);
    assert!(swaps <= 12.0 && hours <= 8.5 && missed <= 0.3, "{swaps:.1} swaps, {hours:.2} h, {missed:.2} missed");
    // If the next batch were always the one that came first, there would be this many.
    let mut changes = 0;
    for seed in 0..30 {
        let mut all = batches(seed, HOUR);
        all.sort_by(|a, b| a.arrives.total_cmp(&b.arrives));
        changes += all.windows(2).filter(|pair| pair[0].model != pair[1].model).count();
    }
    assert!(changes / 30 > 40, "{}", changes / 30);
}

#[test]
fn the_night_is_as_good_if_all_comes_at_once_or_slowly_and_if_swaps_are_dear_or_cheap() {
    for (comes_within, swap, most) in [
        (1.0, 120.0, [12.0, 8.5, 0.5]),
        (2.0 * HOUR, 120.0, [14.0, 8.5, 0.5]),
        (HOUR, 300.0, [12.0, 8.9, 0.5]),
        (HOUR, 5.0, [40.0, 8.2, 0.5]),
    ] {
        let night = nights(6, comes_within, swap);
        let good = night.iter().zip(most).all(|(is, most)| *is <= most);
        assert!(good, "within {comes_within} s, {swap} s a swap: swaps, hours, missed: {night:.2?}");
    }
}
