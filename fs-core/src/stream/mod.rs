//! What a subvolume holds, apart from how it is stored: comparing two states of it, the identity
//! of its content, and streams that carry it elsewhere.
//!
//! Everything here reads published trees: a state is a [`Tree`], which whoever holds a
//! [`View`](crate::subvol::View) of it keeps from being reused. Nothing looks at what is not
//! published yet, and nothing waits for a commit.
//!
//! ```text
//! two trees --differences--> items --Comparison--> inodes, names, attributes, ranges of data
//!                                                    |                  |
//!                                             Content::update        Changes
//!                                              its identity       for people
//!                                                    |
//!                                                  Sender --records--> Verifier
//! ```
//!
//! | file | idea |
//! | --- | --- |
//! | `compare` | differing items become events that mean something, inode by inode |
//! | `read` | the data of a file in a tree |
//! | `sum` | a hash of a set that elements are added to and taken from |
//! | `content` | a subvolume's content as a set, and its hash: the identity |
//! | `changes` | what changed, by path |
//! | `record` | records of a stream: bytes to checked values and back |
//! | `shared` | data that several files share, and where a receiver has it |
//! | `send` | what differs as records that another pool can be brought up to date with |
//! | `verify` | whether the records of a stream make sense, without writing anything |
//!
//! All consumers cost what differs between the two trees. What a disk says is decoded as
//! everywhere; a crafted tree gives an error or a result that means nothing, and memory stays
//! bounded.
//!
//! [`Tree`]: crate::btree::Tree

pub mod changes;
pub mod compare;
pub mod content;
mod read;
pub mod record;
pub mod send;
mod shared;
mod sum;
pub mod verify;

#[cfg(test)]
pub(crate) mod tests;

pub use changes::{Change, Changes};
pub use content::{Content, Identity};
pub use shared::PLACES_MAX;

use crate::btree::NodeSource;
use crate::pool::Pool;
use crate::subvol::store::Store;

/// Where trees and data are read.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// Nodes of trees.
    pub nodes: &'a dyn NodeSource,
    /// Data.
    pub pool: &'a Pool,
}

impl<'a> Source<'a> {
    /// The source of an open pool.
    pub fn of(store: &'a Store) -> Source<'a> {
        Source { nodes: store, pool: &store.pool }
    }
}
