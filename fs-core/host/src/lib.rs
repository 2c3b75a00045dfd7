//! User space's half of the platform boundary.
