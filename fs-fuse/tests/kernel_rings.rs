//! The tests of `kernel`, with requests over io_uring, and what concerns that alone.

#[path = "kernel.rs"]
mod kernel;
