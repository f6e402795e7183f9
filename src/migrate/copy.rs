//! Tables without a key.
