//! cairn's simulator: the core run whole, on devices that misbehave, next to a model that does not.
//!
//! | module | owns |
//! | --- | --- |
//! | [`rng`] | the one source of chance: everything follows from a seed |
//! | [`platform`] | a deterministic [`fs_core::platform::Platform`] |
//! | [`device`] | devices in memory: copy-on-write images, recording, faults by name |
//! | [`crash`] | the images that power loss may leave, enumerated from a recording |
//! | [`model`] | the oracle: an in-memory filesystem, written to be read |
//! | [`gen`] | operations from a seed |
//! | [`run`] | carries operations out on a filesystem; compares two |
//! | [`fault`] | makes one request fail, for every request in turn |
//! | [`golden`] | images that every later version must open |
//! | [`drive`] | runs a subject next to the model; shrinks what fails |
//! | [`tree`] | everything a user can see of a filesystem, as one comparable value |
//! | [`history`] | what a crash may leave: the promise of fsync, as a predicate |
//! | [`power`] | cuts the power at every moment of a story |
//! | [`subject`] | the filesystem under test |
//! | [`versions`] | stories of subvolumes and snapshots, next to models |
//! | [`world`] | a pool in use, to which something is done meanwhile |
//!
//! Every failure prints the environment variables that replay it.

pub mod crash;
pub mod device;
pub mod drive;
pub mod fault;
pub mod gen;
pub mod golden;
pub mod history;
pub mod model;
pub mod platform;
pub mod power;
pub mod rng;
pub mod run;
pub mod subject;
pub mod tree;
pub mod versions;
pub mod world;
