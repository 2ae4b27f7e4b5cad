//! A set of a segment's lines, in the compact form of a database column.

/// A set of lines of a segment: bit `i` is line `first_line + i`. Stored as bytes, lowest bit first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LineSet {
    bits: Vec<u8>,
}

impl LineSet {
    /// Reads stored bytes.
    #[must_use]
    pub fn from_bytes(bits: Vec<u8>) -> Self {
        Self { bits }
    }

    /// The bytes to store.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bits
    }

    /// Adds a line. Returns whether it is new.
    pub fn insert(&mut self, line: u32) -> bool {
        let (byte, mask) = (line as usize / 8, 1u8 << (line % 8));
        if self.bits.len() <= byte {
            self.bits.resize(byte + 1, 0);
        }
        let new = self.bits[byte] & mask == 0;
        self.bits[byte] |= mask;
        new
    }

    #[must_use]
    pub fn contains(&self, line: u32) -> bool {
        self.bits.get(line as usize / 8).is_some_and(|byte| byte & (1 << (line % 8)) != 0)
    }

    /// Adds all lines of `other`.
    pub fn union(&mut self, other: &Self) {
        if self.bits.len() < other.bits.len() {
            self.bits.resize(other.bits.len(), 0);
        }
        for (mine, theirs) in self.bits.iter_mut().zip(&other.bits) {
            *mine |= theirs;
        }
    }

    /// The number of lines.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bits.iter().map(|byte| byte.count_ones() as usize).sum()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bits.iter().all(|byte| *byte == 0)
    }

    /// The lines, in order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.bits.iter().enumerate().flat_map(|(at, byte)| {
            (0..8u32)
                .filter(move |bit| byte & (1 << bit) != 0)
                .map(move |bit| u32::try_from(at).unwrap_or(u32::MAX) * 8 + bit)
        })
    }
}

impl FromIterator<u32> for LineSet {
    fn from_iter<I: IntoIterator<Item = u32>>(lines: I) -> Self {
        let mut set = Self::default();
        for line in lines {
            set.insert(line);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_set(a in proptest::collection::vec(0u32..5_000, 0..200), b in proptest::collection::vec(0u32..5_000, 0..200)) {
            let mut set: LineSet = a.iter().copied().collect();
            set.union(&b.iter().copied().collect());
            let set = LineSet::from_bytes(set.as_bytes().to_vec());
            let model: BTreeSet<u32> = a.iter().chain(&b).copied().collect();
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.len(), model.len());
            prop_assert_eq!(set.is_empty(), model.is_empty());
            for line in 0..5_000 {
                prop_assert_eq!(set.contains(line), model.contains(&line));
            }
        }
    }
}
