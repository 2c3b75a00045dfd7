//! Operations on an inode's fields and extended attributes.

use crate::error::{Errno, Error};
use crate::format::inode::{flag, mode, InodeItem};
use crate::format::xattr::VALUE_BYTES_MAX;
use crate::space::Class;
use crate::subvol::change::Change;
use crate::subvol::inode::{Inode, State};
use crate::subvol::xattrs::{ACCESS_ACL, DEFAULT_ACL};
use crate::units::Ino;
use crate::vfs::acl::Acl;
use crate::vfs::property::Property;
use crate::vfs::volume::{AccessTime, Volume};
use crate::vfs::{Attr, Caller, Result, SetAttr, SetTime, XattrMode};
use alloc::sync::Arc;
use alloc::vec::Vec;

/// Seconds of a day: how old an access time may get under relatime.
const DAY: i64 = 86_400;

/// What a write or a change of owner by an unprivileged process takes from a mode.
pub(super) fn without_set_id(bits: u32) -> u32 {
    let mut bits = bits & !mode::SET_UID;
    if bits & 0o010 != 0 {
        bits &= !mode::SET_GID;
    }
    bits
}

impl Volume {
    pub(super) fn do_setattr(&self, ino: Ino, set: &SetAttr, _caller: &Caller) -> Result<Attr> {
        if let Some(size) = set.size {
            self.truncate(ino, size)?;
        }
        let reservation = self.reserve(0, 4, Class::Delete)?;
        let inode = self.inode(ino)?;
        let mut state = inode.state.write();
        if state.gone {
            return Err(Errno::Stale.into());
        }
        check_setattr(&state, set)?;
        let mut change = Change::begin(&self.subvol);
        let mut item = state.item;
        self.set_owner_and_mode(&mut change, ino, &mut item, set)?;
        self.set_times(&mut item, set);
        if let Some(flags) = set.flags {
            item.flags = flags;
        }
        if let Some(project) = set.project {
            item.project = project;
        }
        // POSIX wants the change time of what was asked for, even if it was so already.
        let asked = SetAttr { size: None, kill_priv: false, ..*set } != SetAttr::default();
        if asked || item != state.item {
            if set.ctime.is_none() {
                item.set_ctime(self.now());
            }
            item.version = item.version.wrapping_add(1);
            change.log_inode(&inode, &mut state, item);
            self.engine.keep(change.txg(), reservation);
            change.finish();
        }
        Ok(self.attr(ino, &state))
    }

    fn set_owner_and_mode(
        &self,
        change: &mut Change<'_>,
        ino: Ino,
        item: &mut InodeItem,
        set: &SetAttr,
    ) -> Result<()> {
        if let Some(uid) = set.uid {
            item.uid = uid;
        }
        if let Some(gid) = set.gid {
            item.gid = gid;
        }
        if set.kill_priv && !item.is_dir() {
            item.mode = without_set_id(item.mode);
            self.drop_capabilities(change, ino, item)?;
        }
        let Some(bits) = set.mode else { return Ok(()) };
        item.mode = item.file_type() | (bits & mode::PERMISSIONS);
        if let Some(bytes) = self.subvol.get_xattr(ino, item, ACCESS_ACL)? {
            let mut acl = Acl::decode(&bytes)?;
            acl.chmod(bits);
            self.subvol.set_xattr(change, ino, item, ACCESS_ACL, Some(&acl.encode()))?;
        }
        Ok(())
    }

    /// Removes file capabilities, as a change of content or owner must.
    pub(super) fn drop_capabilities(
        &self,
        change: &mut Change<'_>,
        ino: Ino,
        item: &mut InodeItem,
    ) -> Result<()> {
        const CAPABILITY: &[u8] = b"security.capability";
        if self.subvol.get_xattr(ino, item, CAPABILITY)?.is_some() {
            self.subvol.set_xattr(change, ino, item, CAPABILITY, None)?;
        }
        Ok(())
    }

    fn set_times(&self, item: &mut InodeItem, set: &SetAttr) {
        let resolve = |time: SetTime| match time {
            SetTime::Now => self.now(),
            SetTime::At(time) => time,
        };
        if let Some(time) = set.atime {
            item.set_atime(resolve(time));
        }
        if let Some(time) = set.mtime {
            item.set_mtime(resolve(time));
        }
        if let Some(time) = set.ctime {
            item.set_ctime(time);
        }
    }

    /// Notes that an inode was read, if the access time is to say so.
    pub(super) fn accessed(&self, inode: &Arc<Inode>) {
        let access_time = self.access_time();
        if access_time == AccessTime::Never || self.writable().is_err() {
            return;
        }
        let now = self.now();
        let stale = |item: &InodeItem| {
            let (atime, mtime, ctime) = (item.atime(), item.mtime(), item.ctime());
            let relative =
                atime <= mtime || atime <= ctime || now.secs.saturating_sub(atime.secs) >= DAY;
            let wanted = access_time == AccessTime::Strict || relative;
            wanted && atime < now && item.flags & flag::NOATIME == 0
        };
        if !stale(&inode.state.read().item) {
            return;
        }
        // Not worth waiting or failing for.
        let Ok(reservation) =
            self.engine.store.space.reserve(0, self.engine.store.node_bytes as u64, Class::Normal)
        else {
            return;
        };
        let mut state = inode.state.write();
        if state.gone || !stale(&state.item) {
            return;
        }
        let mut change = Change::begin(&self.subvol);
        change.touch(inode, &mut state);
        state.item.set_atime(now);
        self.engine.keep(change.txg(), reservation);
        change.finish();
    }

    pub(super) fn do_getxattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        check_xattr_name(name)?;
        let inode = self.inode(ino)?;
        let state = inode.state.read();
        let value = match Property::of(name) {
            Some(property) => property.get(&state.item),
            None => self.subvol.get_xattr(ino, &state.item, name)?,
        };
        value.ok_or(Error::Posix(Errno::NoData))
    }

    pub(super) fn do_listxattr(&self, ino: Ino) -> Result<Vec<u8>> {
        let inode = self.inode(ino)?;
        let state = inode.state.read();
        let mut names = Vec::new();
        if state.item.xattr_hint != 0 {
            self.subvol.each_xattr(ino, &mut |name| {
                names.extend_from_slice(name);
                names.push(0);
                true
            })?;
        }
        Ok(names)
    }

    pub(super) fn do_setxattr(
        &self,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        how: XattrMode,
    ) -> Result<()> {
        check_xattr_name(name)?;
        if value.len() > VALUE_BYTES_MAX {
            return Err(Errno::TooBig.into());
        }
        let items = 6 + (value.len() as u64).div_ceil(8192);
        let reservation = self.reserve(0, items, Class::Normal)?;
        let inode = self.inode(ino)?;
        let mut state = inode.state.write();
        check_xattr_change(&state)?;
        let property = Property::of(name);
        let there = self.has_xattr(ino, &state.item, name, property)?;
        match (how, there) {
            (XattrMode::Create, true) => return Err(Errno::Exist.into()),
            (XattrMode::Replace, false) => return Err(Errno::NoData.into()),
            _ => {}
        }
        let mut change = Change::begin(&self.subvol);
        let mut item = state.item;
        let value = match name {
            ACCESS_ACL | DEFAULT_ACL => apply_acl(name, value, &mut item)?,
            _ => Some(value),
        };
        if let Some(property) = property {
            property.set(&mut item, value)?;
        } else if value.is_some() || there {
            self.subvol.set_xattr(&mut change, ino, &mut item, name, value)?;
        }
        self.stamp_ctime(&mut item);
        self.done(change, reservation, &mut [(&inode, &mut state, item)]);
        Ok(())
    }

    /// Whether an inode has the attribute of that name, or the property that the name stands for.
    fn has_xattr(
        &self,
        ino: Ino,
        item: &InodeItem,
        name: &[u8],
        property: Option<Property>,
    ) -> Result<bool> {
        match property {
            Some(property) => Ok(property.get(item).is_some()),
            None => Ok(self.subvol.get_xattr(ino, item, name)?.is_some()),
        }
    }

    pub(super) fn do_removexattr(&self, ino: Ino, name: &[u8]) -> Result<()> {
        check_xattr_name(name)?;
        let reservation = self.reserve(0, 6, Class::Delete)?;
        let inode = self.inode(ino)?;
        let mut state = inode.state.write();
        check_xattr_change(&state)?;
        let property = Property::of(name);
        let there = self.has_xattr(ino, &state.item, name, property)?;
        if !there {
            return Err(Errno::NoData.into());
        }
        let mut change = Change::begin(&self.subvol);
        let mut item = state.item;
        match property {
            Some(property) => property.set(&mut item, None)?,
            None => drop(self.subvol.set_xattr(&mut change, ino, &mut item, name, None)?),
        }
        self.stamp_ctime(&mut item);
        self.done(change, reservation, &mut [(&inode, &mut state, item)]);
        Ok(())
    }
}

/// What setting an access list does to the mode, and what of it is stored.
fn apply_acl<'a>(name: &[u8], value: &'a [u8], item: &mut InodeItem) -> Result<Option<&'a [u8]>> {
    if item.file_type() == mode::SYMLINK {
        return Err(Errno::OpNotSupp.into());
    }
    let acl = Acl::decode(value)?;
    if name == DEFAULT_ACL {
        return if item.is_dir() { Ok(Some(value)) } else { Err(Errno::Access.into()) };
    }
    item.mode = (item.mode & !0o777) | acl.mode_bits();
    Ok(if acl.is_minimal() { None } else { Some(value) })
}

/// Whether an inode can have an attribute, which is stored as it is given.
pub(crate) fn check_attribute(name: &[u8], value: Option<&[u8]>, item: &InodeItem) -> bool {
    let may_have_list = match name {
        DEFAULT_ACL => item.is_dir(),
        ACCESS_ACL => item.file_type() != mode::SYMLINK,
        _ => return Property::of(name).is_none(),
    };
    may_have_list && value.is_none_or(|value| Acl::decode(value).is_ok())
}

fn check_xattr_name(name: &[u8]) -> Result<()> {
    if name.is_empty() || name.len() > 255 || name.contains(&0) {
        return Err(Errno::Range.into());
    }
    Ok(())
}

fn check_xattr_change(state: &State) -> Result<()> {
    if state.gone {
        return Err(Errno::Stale.into());
    }
    crate::vfs::volume::check_may_change(state)
}

/// What immutable and append-only files do not allow.
fn check_setattr(state: &State, set: &SetAttr) -> Result<()> {
    if let Some(flags) = set.flags {
        // chattr(1) must not claim to have set what is not kept.
        return match flags & !flag::KNOWN {
            0 => Ok(()),
            _ => Err(Errno::OpNotSupp.into()),
        };
    }
    let owner = set.mode.is_some() || set.uid.is_some() || set.gid.is_some();
    let exact_times = |time: Option<SetTime>| matches!(time, Some(SetTime::At(_)));
    let times = set.atime.is_some() || set.mtime.is_some();
    let exact = exact_times(set.atime) || exact_times(set.mtime);
    let immutable = state.item.flags & flag::IMMUTABLE != 0;
    let append = state.item.flags & flag::APPEND != 0;
    if (immutable && (owner || times)) || (append && (owner || exact)) {
        return Err(Errno::Perm.into());
    }
    Ok(())
}
