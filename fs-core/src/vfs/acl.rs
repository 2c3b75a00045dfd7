//! POSIX access control lists, as far as a filesystem must understand them: what `chmod` does to
//! them, what they do to the mode, and what a new file inherits. Who may do what is decided by the
//! caller.
//!
//! The form is that of the `system.posix_acl_*` attributes: version 2, then entries of tag,
//! permissions and id. See acl(5) and POSIX 1003.1e draft 17, section 23.

use crate::error::Errno;
use alloc::vec::Vec;

const VERSION: u32 = 2;
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    tag: u16,
    perm: u16,
    id: u32,
}

/// A valid list: ordered, each required entry once, a mask when there are named entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acl {
    entries: Vec<Entry>,
}

impl Acl {
    /// Reads a list.
    ///
    /// # Errors
    /// EINVAL when it is not valid, EOPNOTSUPP for another version.
    pub fn decode(bytes: &[u8]) -> Result<Acl, Errno> {
        let (head, tail) = bytes.split_at_checked(4).ok_or(Errno::Inval)?;
        if head != VERSION.to_le_bytes() {
            return Err(Errno::OpNotSupp);
        }
        if tail.is_empty() || tail.len() % 8 != 0 {
            return Err(Errno::Inval);
        }
        let entries = tail
            .chunks_exact(8)
            .map(|e| Entry {
                tag: u16::from_le_bytes([e[0], e[1]]),
                perm: u16::from_le_bytes([e[2], e[3]]),
                id: u32::from_le_bytes([e[4], e[5], e[6], e[7]]),
            })
            .collect();
        let acl = Acl { entries };
        acl.is_valid().then_some(acl).ok_or(Errno::Inval)
    }

    fn count(&self, tag: u16) -> usize {
        self.entries.iter().filter(|e| e.tag == tag).count()
    }

    fn is_valid(&self) -> bool {
        let known = [USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER];
        let ordered = self.entries.windows(2).all(|w| w[0].tag <= w[1].tag);
        let sane = self.entries.iter().all(|e| known.contains(&e.tag) && e.perm <= 7);
        let named = self.count(USER) + self.count(GROUP) > 0;
        ordered
            && sane
            && [USER_OBJ, GROUP_OBJ, OTHER].iter().all(|tag| self.count(*tag) == 1)
            && self.count(MASK) <= 1
            && (!named || self.count(MASK) == 1)
    }

    /// The list as an attribute's value.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for e in &self.entries {
            bytes.extend_from_slice(&e.tag.to_le_bytes());
            bytes.extend_from_slice(&e.perm.to_le_bytes());
            bytes.extend_from_slice(&e.id.to_le_bytes());
        }
        bytes
    }

    /// Whether the mode says all the list says.
    pub fn is_minimal(&self) -> bool {
        self.entries.len() == 3
    }

    fn perm_of(&self, tag: u16) -> Option<u32> {
        self.entries.iter().find(|e| e.tag == tag).map(|e| u32::from(e.perm))
    }

    /// The nine permission bits that stand for the list: the group bits are the mask's.
    pub fn mode_bits(&self) -> u32 {
        let group = self.perm_of(MASK).or(self.perm_of(GROUP_OBJ)).unwrap_or(0);
        let user = self.perm_of(USER_OBJ).unwrap_or(0);
        let other = self.perm_of(OTHER).unwrap_or(0);
        user << 6 | group << 3 | other
    }

    fn each_class(&mut self, mut change: impl FnMut(u32, &mut u16)) {
        let group_tag = if self.count(MASK) == 1 { MASK } else { GROUP_OBJ };
        for entry in &mut self.entries {
            let shift = match entry.tag {
                USER_OBJ => 6,
                OTHER => 0,
                tag if tag == group_tag => 3,
                _ => continue,
            };
            change(shift, &mut entry.perm);
        }
    }

    /// What chmod(2) does to the list.
    pub fn chmod(&mut self, mode: u32) {
        self.each_class(|shift, perm| *perm = (mode >> shift & 7) as u16);
    }

    /// What a new file gets from its directory's default list: the list, with the permissions of
    /// the classes cut to `mode`'s. Returns the nine bits of the new file.
    pub fn inherit(&mut self, mode: u32) -> u32 {
        self.each_class(|shift, perm| *perm &= (mode >> shift & 7) as u16);
        self.mode_bits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let list = entries.iter().map(|(tag, perm, id)| Entry { tag: *tag, perm: *perm, id: *id });
        Acl { entries: list.collect() }.encode()
    }

    #[test]
    fn a_named_entry_without_a_mask_is_refused() {
        let bytes = acl(&[(USER_OBJ, 7, 0), (USER, 7, 5), (GROUP_OBJ, 5, 0), (OTHER, 0, 0)]);
        assert_eq!(Acl::decode(&bytes), Err(Errno::Inval));
    }

    #[test]
    fn chmod_changes_the_mask_and_not_the_owning_group() {
        let bytes =
            acl(&[(USER_OBJ, 7, 0), (USER, 7, 5), (GROUP_OBJ, 5, 0), (MASK, 7, 0), (OTHER, 0, 0)]);
        let mut list = Acl::decode(&bytes).unwrap();
        assert_eq!(list.mode_bits(), 0o770);
        list.chmod(0o641);
        assert_eq!(list.mode_bits(), 0o641);
        assert_eq!(list.perm_of(GROUP_OBJ), Some(5));
    }

    #[test]
    fn a_new_file_gets_no_more_than_it_was_created_with() {
        let mut list =
            Acl::decode(&acl(&[(USER_OBJ, 7, 0), (GROUP_OBJ, 7, 0), (OTHER, 5, 0)])).unwrap();
        assert_eq!(list.inherit(0o644), 0o644);
        assert!(list.is_minimal());
    }
}
