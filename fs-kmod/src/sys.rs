//! Bindings of kernel functions for which the kernel crate has none, made from `sys.h`.
#![allow(
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    non_snake_case,
    dead_code,
    unreachable_pub,
    unsafe_op_in_unsafe_fn,
    unused_imports,
    clippy::all,
    reason = "generated from C"
)]

use kernel::bindings::*;
use kernel::ffi;

type __kernel_size_t = usize;

include!(concat!(env!("CAIRN_OBJ"), "/sys.rs"));
