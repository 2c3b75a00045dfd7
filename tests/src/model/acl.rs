//! POSIX ACLs as Linux stores them in attributes: `acl(5)`, `include/uapi/linux/posix_acl_xattr.h`.

use fs_core::error::Errno;

/// Name of the attribute that holds the access ACL.
pub const ACCESS: &[u8] = b"system.posix_acl_access";
/// Name of the attribute that holds a directory's default ACL.
pub const DEFAULT: &[u8] = b"system.posix_acl_default";

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

/// A valid ACL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acl(Vec<Entry>);

impl Acl {
    /// Reads an attribute's value; `None` for one without entries, which means "no ACL".
    pub fn parse(bytes: &[u8]) -> Result<Option<Acl>, Errno> {
        if bytes.len() < 4 || (bytes.len() - 4) % 8 != 0 {
            return Err(Errno::Inval);
        }
        if bytes[..4] != VERSION.to_le_bytes() {
            return Err(Errno::OpNotSupp);
        }
        let entries: Vec<Entry> = bytes[4..]
            .chunks_exact(8)
            .map(|raw| Entry {
                tag: u16::from_le_bytes([raw[0], raw[1]]),
                perm: u16::from_le_bytes([raw[2], raw[3]]),
                id: u32::from_le_bytes([raw[4], raw[5], raw[6], raw[7]]),
            })
            .collect();
        if entries.is_empty() {
            return Ok(None);
        }
        let acl = Acl(entries);
        if acl.is_valid() {
            Ok(Some(acl))
        } else {
            Err(Errno::Inval)
        }
    }

    /// One owner, named users, one group, named groups, a mask if anyone is named, others: in this
    /// order.
    fn is_valid(&self) -> bool {
        let count = |tag| self.0.iter().filter(|e| e.tag == tag).count();
        let named = count(USER) + count(GROUP);
        self.0.windows(2).all(|w| w[0].tag <= w[1].tag)
            && self.0.iter().all(|e| e.perm <= 7 && [1, 2, 4, 8, 16, 32].contains(&e.tag))
            && [USER_OBJ, GROUP_OBJ, OTHER].iter().all(|tag| count(*tag) == 1)
            && count(MASK) <= 1
            && (named == 0 || count(MASK) == 1)
    }

    /// The attribute's value.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for entry in &self.0 {
            bytes.extend_from_slice(&entry.tag.to_le_bytes());
            bytes.extend_from_slice(&entry.perm.to_le_bytes());
            bytes.extend_from_slice(&entry.id.to_le_bytes());
        }
        bytes
    }

    /// Whether it says no more than permission bits can.
    pub fn is_equivalent_to_mode(&self) -> bool {
        self.0.iter().all(|e| [USER_OBJ, GROUP_OBJ, OTHER].contains(&e.tag))
    }

    fn perm(&mut self, tag: u16) -> Option<&mut u16> {
        self.0.iter_mut().find(|e| e.tag == tag).map(|e| &mut e.perm)
    }

    /// The entry that the group bits of the mode stand for.
    fn group_class(&mut self) -> &mut u16 {
        let tag = if self.0.iter().any(|e| e.tag == MASK) { MASK } else { GROUP_OBJ };
        self.perm(tag).expect("a valid ACL has a group entry")
    }

    /// The permission bits that go with the ACL.
    pub fn mode(&self) -> u32 {
        let mut acl = self.clone();
        let user = u32::from(*acl.perm(USER_OBJ).expect("valid"));
        let group = u32::from(*acl.group_class());
        let other = u32::from(*acl.perm(OTHER).expect("valid"));
        user << 6 | group << 3 | other
    }

    /// What chmod(2) does to an access ACL.
    pub fn chmod(&mut self, mode: u32) {
        *self.perm(USER_OBJ).expect("valid") = (mode >> 6 & 7) as u16;
        *self.group_class() = (mode >> 3 & 7) as u16;
        *self.perm(OTHER).expect("valid") = (mode & 7) as u16;
    }

    /// Turns a copy of a default ACL into the access ACL of what is made with `mode`; returns the
    /// mode it gets.
    pub fn inherit(&mut self, mode: u32) -> u32 {
        *self.perm(USER_OBJ).expect("valid") &= (mode >> 6 & 7) as u16;
        *self.group_class() &= (mode >> 3 & 7) as u16;
        *self.perm(OTHER).expect("valid") &= (mode & 7) as u16;
        mode & !0o777 | self.mode()
    }

    /// An ACL with a named user, for the generator.
    pub fn sample(perms: [u16; 5]) -> Acl {
        let entry = |tag, perm: u16, id| Entry { tag, perm: perm & 7, id };
        let nobody = u32::MAX;
        Acl(vec![
            entry(USER_OBJ, perms[0], nobody),
            entry(USER, perms[1], 1000),
            entry(GROUP_OBJ, perms[2], nobody),
            entry(MASK, perms[3], nobody),
            entry(OTHER, perms[4], nobody),
        ])
    }

    /// An ACL that permission bits could express, for the generator.
    pub fn minimal(mode: u32) -> Acl {
        let entry = |tag, perm: u32| Entry { tag, perm: (perm & 7) as u16, id: u32::MAX };
        Acl(vec![entry(USER_OBJ, mode >> 6), entry(GROUP_OBJ, mode >> 3), entry(OTHER, mode)])
    }
}
