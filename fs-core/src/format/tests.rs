//! Encoding and decoding are inverse; random bytes never panic.

use super::*;
use crate::units::{Ino, Logical, Physical, TreeId, Txg, SECTOR_BYTES};
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
        let _ = pool::decode_user(&bytes);
        let _ = label::Label::decode(&bytes);
        let _ = superblock::Superblock::decode(&bytes);
    }
}

fn extent() -> impl Strategy<Value = extent::Extent> {
    use extent::{Blob, Extent};
    use ptr::{ChecksumKind, CompressionKind};
    let sum = prop_oneof![
        Just(ChecksumKind::None),
        Just(ChecksumKind::Crc32c),
        Just(ChecksumKind::Blake3)
    ];
    let plain = (sum.clone(), 1..64u64, 0..1u64 << 40, any::<u8>()).prop_map(
        |(checksum_kind, sectors, place, byte)| Extent::Plain {
            addr: Logical(place * SECTOR_BYTES),
            len: sectors * SECTOR_BYTES,
            checksum_kind,
            checksums: alloc::vec![byte; sectors as usize * checksum_kind.bytes()],
        },
    );
    let packed = (sum, 1..32u64, 0..32u64, 0..32u64, any::<[u8; 32]>()).prop_map(
        |(checksum_kind, sectors, before, after, mut checksum)| {
            checksum[checksum_kind.bytes()..].fill(0);
            let logical = ((before + sectors + after) * SECTOR_BYTES) as u32;
            let blob = Blob {
                addr: Logical(1 << 30),
                stored: logical / 2,
                logical,
                compression: CompressionKind::Zstd,
                checksum_kind,
                checksum,
            };
            let offset = (before * SECTOR_BYTES) as u32;
            Extent::Packed { blob, offset, len: sectors * SECTOR_BYTES }
        },
    );
    prop_oneof![plain, packed]
}

fn range_content() -> impl Strategy<Value = (u64, log::RangeContent)> {
    use log::RangeContent;
    prop_oneof![
        (1..4u64, any::<u8>()).prop_map(|(sectors, byte)| {
            let len = sectors * SECTOR_BYTES;
            (len, RangeContent::Bytes(alloc::vec![byte; len as usize]))
        }),
        extent().prop_map(|extent| (extent.len(), RangeContent::Written(extent))),
        extent().prop_map(|extent| (extent.len(), RangeContent::Shared(extent))),
        (1..u64::MAX >> 1).prop_map(|len| (len, RangeContent::Hole)),
        (1..1u64 << 30).prop_map(|sectors| (sectors * SECTOR_BYTES, RangeContent::Promised)),
    ]
}

fn record() -> impl Strategy<Value = log::Record> {
    use log::Record;
    let value = proptest::option::of(proptest::collection::vec(any::<u8>(), 0..4200));
    let item =
        (any::<(u64, u8, u64)>(), value, any::<bool>()).prop_map(|(key, value, keep_size)| {
            Record::Item { key: key::Key::new(key.0, key.1, key.2), value, keep_size }
        });
    let range =
        (any::<u64>(), 0..1u64 << 40, range_content()).prop_map(|(ino, sector, (len, content))| {
            Record::Range { ino: Ino(ino), offset: sector * SECTOR_BYTES, len, content }
        });
    prop_oneof![item, range]
}

proptest! {
    #[test]
    fn a_log_record_decodes_to_what_was_encoded_and_to_nothing_else(
        record in record(),
        txg in 1..u64::MAX,
        tree in 256..u64::MAX,
        tail in proptest::collection::vec(any::<u8>(), 0..50),
    ) {
        let record = log::LogRecord { txg: Txg(txg), tree: TreeId(tree), record };
        let mut bytes = alloc::vec![];
        record.encode_to(&mut bytes);
        let len = bytes.len();
        bytes.extend_from_slice(&tail);
        prop_assert_eq!(log::LogRecord::decode(&bytes), Ok((record, len)));
        prop_assert!(log::LogRecord::decode(&bytes[..len - 1]).is_err());
    }

    #[test]
    fn a_damaged_log_record_is_refused_or_encodes_to_the_same_bytes(
        record in record(),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let record = log::LogRecord { txg: Txg(7), tree: TreeId(300), record };
        let mut bytes = alloc::vec![];
        record.encode_to(&mut bytes);
        for (at, byte) in damage {
            let head = bytes.len().min(120);
            bytes[at.index(head)] = byte;
        }
        if let Ok((record, len)) = log::LogRecord::decode(&bytes) {
            let mut again = alloc::vec![];
            record.encode_to(&mut again);
            prop_assert_eq!(&again[..], &bytes[..len]);
        }
    }
}

fn user_properties() -> impl Strategy<Value = pool::UserProperties> {
    let property = ("[a-z0-9+._-]{0,9}:[a-z0-9:+._-]{0,20}", "[a-z\u{e9}\u{4e2d} =]{0,60}");
    proptest::collection::btree_map(property.0, property.1, 1..12).prop_map(|all| {
        let bytes = |(name, value): (alloc::string::String, alloc::string::String)| {
            (name.into_bytes(), value.into_bytes())
        };
        all.into_iter().map(bytes).collect()
    })
}

proptest! {
    #[test]
    fn properties_of_users_decode_to_what_was_encoded_and_to_nothing_else(
        all in user_properties(),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = pool::encode_user(&all);
        prop_assert_eq!(pool::decode_user(&bytes), Ok(all.clone()));
        if let Ok(fewer) = pool::decode_user(&bytes[..cut.index(bytes.len())]) {
            prop_assert!(fewer.len() < all.len());
        }
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(other) = pool::decode_user(&bytes) {
            prop_assert_eq!(pool::encode_user(&other), bytes);
        }
    }

    #[test]
    fn packed_settings_are_what_they_were(numbers in any::<[u8; 4]>(), level in any::<i8>()) {
        let [compression, checksum, read_only, access_time] = numbers;
        let all = pool::Settings { compression, level, checksum, read_only, access_time };
        prop_assert_eq!(pool::Settings::unpack(all.pack()), all);
    }
}

fn label() -> label::Label {
    label::Label {
        magic: label::LABEL_MAGIC,
        version: FORMAT_VERSION,
        sector_bytes: 4096,
        pool_id: [7; 16],
        device_id: [8; 16],
        device_index: 0,
        reserved0: [0; 6],
        device_bytes: 64 << 20,
        name: [b'n'; 64],
        written: -1,
        sequence: 3,
        epoch: 0,
        device_count: 0,
        reserved1: [0; 6],
        members: Skipped::ZEROS,
        reserved: Skipped::ZEROS,
        checksum: [0; 32],
    }
}

fn superblock() -> superblock::Superblock {
    let system = chunk::Chunk {
        logical: Logical(1 << 20),
        length: 1 << 20,
        birth: Txg(1),
        kind: chunk::ChunkKind::System,
        profile: chunk::Profile::Single,
        stripes: alloc::vec![chunk::Stripe { device: 0, physical: Physical(label::DATA_START) }],
    };
    superblock::Superblock {
        txg: Txg(5),
        written: 1,
        pool_id: [7; 16],
        features: [4, 0, 0],
        hash_secret: [9; 16],
        node_bytes: 16384,
        device_count: 1,
        data_profile: chunk::Profile::Single,
        metadata_profile: chunk::Profile::Dup,
        clean: true,
        next_chunk: Logical(1 << 30),
        chunk_bytes: 1 << 20,
        next_subvol: 257,
        default_subvol: 256,
        pool_root: None,
        chunk_root: None,
        space_root: None,
        refs_root: None,
        dead_root: None,
        residue: None,
        log: None,
        data_used: 1,
        metadata_used: 2,
        system_chunks: alloc::vec![system],
    }
}

fn is_corrupt<T>(result: &Result<T, crate::error::Error>) -> bool {
    matches!(result, Err(crate::error::Error::Corrupt { .. }))
}

/// Puts the right checksum after a change, so that a decoder comes to its other checks.
fn seal(bytes: &mut [u8]) {
    let checksum = *blake3::hash(&bytes[..0xfe0]).as_bytes();
    bytes[0xfe0..].copy_from_slice(&checksum);
}

#[test]
fn a_label_reads_back_as_it_was_written() {
    let bytes = label().encode(&[]);
    let mut read = label::Label::decode(&bytes).unwrap();
    assert_eq!(read.checksum, bytes[0xfe0..]);
    read.checksum = [0; 32];
    assert_eq!(read, label());
}

#[test]
fn a_superblock_reads_back_as_it_was_written() {
    let bytes = superblock().encode();
    assert_eq!(superblock::Superblock::decode(&bytes), Ok(superblock()));
}

proptest! {
    #[test]
    fn a_changed_byte_of_a_label_or_superblock_is_noticed(at in 0usize..4096, flip in 1u8..) {
        let mut bytes = label().encode(&[]);
        bytes[at] ^= flip;
        prop_assert!(label::Label::decode(&bytes).is_err());
        let mut bytes = superblock().encode();
        bytes[at] ^= flip;
        prop_assert!(superblock::Superblock::decode(&bytes).is_err());
    }

    #[test]
    fn bytes_in_the_reserved_end_are_refused_even_with_a_right_checksum(
        at in 0xc00usize..0xfe0, value in 1u8..,
    ) {
        let mut bytes = label().encode(&[]);
        bytes[at] = value;
        seal(&mut bytes);
        let refused = label::Label::decode(&bytes);
        prop_assert!(is_corrupt(&refused));
        let mut bytes = superblock().encode();
        bytes[at] = value;
        seal(&mut bytes);
        let refused = superblock::Superblock::decode(&bytes);
        prop_assert!(is_corrupt(&refused));
    }
}

#[test]
fn counters_of_an_inode_that_could_not_be_added_to_are_refused() {
    use inode::{mode, InodeItem, NLINK_MAX};
    let good = InodeItem { mode: mode::REGULAR | 0o644, nlink: NLINK_MAX, ..InodeItem::zeroed() };
    let is_read = |item: &InodeItem| InodeItem::decode(&item.to_bytes()).is_ok();
    assert!(is_read(&good));
    let lies: [fn(&mut InodeItem); 6] = [
        |item| item.stored_bytes = u64::MAX / 2,
        |item| item.promised_bytes = u64::MAX / 2,
        |item| item.entries = u64::MAX / 2,
        |item| item.next_cookie = u64::MAX / 2,
        |item| item.nlink = u32::MAX,
        |item| item.links = u32::MAX - 1,
    ];
    for (index, lie) in lies.iter().enumerate() {
        let mut item = good;
        lie(&mut item);
        assert!(!is_read(&item), "lie {index}");
    }
}
