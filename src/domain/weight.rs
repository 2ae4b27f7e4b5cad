//! The weights by which owners share the workers.

use std::{collections::BTreeMap, str::FromStr};

use super::Owner;

/// An owner's weight: three times the weight is three times the share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Weight(u16);

/// Not a valid weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a weight from 1 to {}", Weight::MAX)]
pub struct BadWeight;

impl Weight {
    /// The largest weight. It exceeds a worker's usual number of slots, so that any ratio can be expressed.
    pub const MAX: u16 = 1_000;

    /// A weight from 1 to [`Weight::MAX`]; `None` for any other number.
    #[must_use]
    pub fn new(value: u16) -> Option<Self> {
        (1..=Self::MAX).contains(&value).then_some(Self(value))
    }

    #[must_use]
    pub fn get(self) -> u16 {
        self.0
    }
}

impl Default for Weight {
    /// The default weight, 1.
    fn default() -> Self {
        Self(1)
    }
}

impl FromStr for Weight {
    type Err = BadWeight;

    fn from_str(text: &str) -> Result<Self, BadWeight> {
        text.parse().ok().and_then(Self::new).ok_or(BadWeight)
    }
}

/// The weights of owners. An owner that is not listed has weight 1.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Weights(BTreeMap<Owner, Weight>);

impl Weights {
    #[must_use]
    pub fn of(&self, owner: &Owner) -> Weight {
        self.0.get(owner).copied().unwrap_or_default()
    }
}

impl FromIterator<(Owner, Weight)> for Weights {
    fn from_iter<T: IntoIterator<Item = (Owner, Weight)>>(all: T) -> Self {
        Self(all.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_have_bounds() {
        assert_eq!("1".parse(), Ok(Weight::default()));
        assert_eq!("1000".parse::<Weight>().unwrap().get(), 1_000);
        for bad in ["", "0", "1001", "-1", "1.5", "99999999", "x", " 3"] {
            assert_eq!(bad.parse::<Weight>(), Err(BadWeight), "{bad}");
        }
    }

    #[test]
    fn who_is_not_named_weighs_one() {
        let weights: Weights = [("ana".into(), Weight(3))].into_iter().collect();
        assert_eq!((weights.of(&"ana".into()).get(), weights.of(&"bob".into()).get()), (3, 1));
    }
}
