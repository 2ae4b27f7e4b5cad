//! One line of an input file.
