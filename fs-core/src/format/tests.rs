//! Encoding and decoding are inverse; random bytes never panic.

use super::*;
use crate::units::Txg;
use proptest::prelude::*;

proptest! {
    #[test]
    fn random_bytes_never_panic_a_decoder(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let _ = extent::Extent::decode(&bytes, 0, Txg(9));
        let _ = inode::InodeItem::decode(&bytes);
        let _ = dir::Entry::decode(&bytes);
        let _ = dir::decode_cookies(&bytes);
        let _ = xattr::decode(&bytes);
        let _ = chunk::Chunk::decode(crate::units::Logical(1 << 20), &bytes);
        let _ = chunk::DeviceItem::decode(&bytes);
        let _ = space::Residue::decode(&bytes, 1);
        let _ = log::LogRecord::decode(&bytes);
        let _ = pool::SubvolItem::decode(&bytes);
        let _ = label::Label::decode(&bytes);
        let _ = superblock::Superblock::decode(&bytes);
    }
}
