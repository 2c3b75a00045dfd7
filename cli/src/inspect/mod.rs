//! `cairn inspect`: what is stored, as it is stored.

mod chain;
mod describe;
mod file;
mod superblock;
mod tree;

use crate::arguments::{InSubvol, Inspect};
use crate::target;
use crate::view::View;
use crate::{Done, Failure};
use fs_core::btree::Tree;
use fs_core::units::TreeId;

pub(crate) fn run(command: &Inspect) -> Result<Done, Failure> {
    match command {
        Inspect::Superblock { device, all, json } => superblock::run(device, *all, *json),
        Inspect::Tree { of, tree, nodes, from, count } => {
            let view = open(of)?;
            let id = tree::id_of(*tree, &view, of.subvol);
            let limit = count.unwrap_or(usize::MAX);
            named(of, tree::run(&view, id, *nodes, *from, limit, of.json))
        }
        Inspect::Inode { of, inode } => {
            let (view, tree, ino) = open_file(of, inode)?;
            named(of, tree::run_object(&view, tree.id, ino, of.json))
        }
        Inspect::File { of, file } => {
            let (view, tree, ino) = open_file(of, file)?;
            named(of, file::run(&view, &tree, ino, of.json))
        }
        Inspect::Chain { of, file } => {
            let (view, tree, ino) = open_file(of, file)?;
            named(of, chain::run(&view, tree.id, ino, of.json))
        }
    }
}

fn open(of: &InSubvol) -> Result<View, Failure> {
    let view = target::view(std::slice::from_ref(&of.device), of.txg)?;
    if !view.superblock.clean && of.txg.is_none() {
        eprintln!(
            "cairn: {} was not unmounted: what is only in the log is not shown",
            of.device.display()
        );
    }
    Ok(view)
}

fn open_file(of: &InSubvol, name: &str) -> Result<(View, Tree, u64), Failure> {
    let view = open(of)?;
    let tree = named(of, view.tree(view.subvol_id(of.subvol)))?;
    let ino = view
        .find_inode(&tree, name)
        .map_err(|error| Failure::new(format_args!("{}: {name}: {error}", of.device.display())))?;
    Ok((view, tree, ino))
}

fn named<T>(of: &InSubvol, result: fs_core::platform::Result<T>) -> Result<T, Failure> {
    result.map_err(|error| Failure::new(format_args!("{}: {error}", of.device.display())))
}

/// What people call a tree.
fn tree_name(id: TreeId) -> String {
    match id {
        TreeId::POOL => "pool".into(),
        TreeId::CHUNK => "chunk".into(),
        TreeId::SPACE => "space".into(),
        TreeId::REFS => "refs".into(),
        TreeId::DEAD => "dead".into(),
        other => format!("subvol {other}"),
    }
}
