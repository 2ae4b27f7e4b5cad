//! Token counts, as workers report them.

use std::ops::AddAssign;

/// Sums of the `usage` objects of successful answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenUsage {
    /// Prompt tokens.
    pub input: i64,
    /// Prompt tokens that came from the prefix cache.
    pub cached_input: i64,
    /// Generated tokens.
    pub output: i64,
    /// Generated tokens that were spent on reasoning.
    pub reasoning: i64,
    /// Input and output tokens.
    pub total: i64,
}

impl AddAssign for TokenUsage {
    fn add_assign(&mut self, other: Self) {
        self.input = self.input.saturating_add(other.input);
        self.cached_input = self.cached_input.saturating_add(other.cached_input);
        self.output = self.output.saturating_add(other.output);
        self.reasoning = self.reasoning.saturating_add(other.reasoning);
        self.total = self.total.saturating_add(other.total);
    }
}
