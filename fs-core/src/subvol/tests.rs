//! Range maps by themselves.

use crate::buf::Buf;
use crate::format::extent::{Blob, Extent};
use crate::format::ptr::{ChecksumKind, CompressionKind};
use crate::subvol::intents::Intents;
use crate::subvol::ranges::{Content, RangeMap};
use crate::units::{Ino, Logical, TreeId, Txg};
use std::vec::Vec;

fn packed(addr: u64, logical: u32) -> Extent {
    let blob = Blob {
        addr: Logical(addr),
        stored: 4096,
        logical,
        compression: CompressionKind::Zstd,
        checksum_kind: ChecksumKind::Crc32c,
        checksum: [0; 32],
    };
    Extent::Packed { blob, offset: 0, len: u64::from(logical) }
}

fn plain(addr: u64, len: u64) -> Extent {
    let (checksum_kind, checksums) = (ChecksumKind::None, Vec::new());
    Extent::Plain { addr: Logical(addr), len, checksum_kind, checksums }
}

#[test]
fn a_blob_cut_in_two_by_another_is_given_back_once() {
    let mut map = RangeMap::default();
    let mut garbage = Vec::new();
    map.put(0, 65536, Content::Written(packed(1 << 20, 65536)), &mut garbage);
    map.put(16384, 8192, Content::Written(packed(2 << 20, 8192)), &mut garbage);
    assert!(garbage.is_empty());
    map.put_bytes(0, Buf::zeroed(65536).unwrap().into_slice(), &mut garbage);
    garbage.sort_unstable();
    let addrs: Vec<u64> = garbage.iter().map(|run| run.addr.0).collect();
    assert_eq!(addrs, [1 << 20, 2 << 20]);
}

#[test]
fn what_is_left_of_a_buffer_does_not_keep_all_of_it() {
    let mut map = RangeMap::default();
    let mut garbage = Vec::new();
    let whole: Vec<u8> = (0..1 << 20).map(|n: u32| (n >> 12) as u8).collect();
    map.put_bytes(0, Buf::copy_of(&whole).unwrap().into_slice(), &mut garbage);
    for at in (0..1 << 20).step_by(16 * 4096) {
        map.put(at + 4096, 15 * 4096, Content::Hole, &mut garbage);
    }
    let mut kept = 0;
    for (at, piece) in map.iter() {
        if let Content::Bytes { data, .. } = &piece.content {
            assert_eq!(data[..], whole[at as usize..at as usize + data.len()]);
            kept += data.held();
        }
    }
    assert_eq!(map.data_bytes(), 16 * 4096);
    assert!(kept <= 2 * 16 * 4096, "{kept} bytes are kept for {}", map.data_bytes());
    assert!(map.memory() > map.data_bytes());
}

#[test]
fn bytes_that_the_log_lacks_are_counted_whatever_is_cut_and_written() {
    let mut map = RangeMap::default();
    let mut garbage = Vec::new();
    let zeros = |len| Buf::zeroed(len).unwrap().into_slice();
    map.put_bytes(0, zeros(65536), &mut garbage);
    map.put(8192, 4096, Content::Hole, &mut garbage);
    assert_eq!((map.data_bytes(), map.fresh_bytes()), (61440, 61440));
    let mut logged = 0;
    map.log_fresh(|_, piece| logged += piece.len);
    assert_eq!((logged, map.data_bytes(), map.fresh_bytes()), (65536, 61440, 0));
    // Over logged bytes and beyond them.
    map.put_bytes(61440, zeros(8192), &mut garbage);
    assert_eq!((map.data_bytes(), map.fresh_bytes()), (65536, 8192));
    let ids: Vec<u64> = map.byte_runs().iter().flat_map(|run| run.ids.clone()).collect();
    map.written(0, &plain(1 << 20, 65536), &ids, &mut garbage);
    assert_eq!((map.data_bytes(), map.fresh_bytes()), (4096, 4096));
    assert!(map.lacks());
}

#[test]
fn bytes_that_changed_while_they_were_written_stay() {
    let mut map = RangeMap::default();
    let mut garbage = Vec::new();
    map.put_bytes(0, Buf::zeroed(65536).unwrap().into_slice(), &mut garbage);
    let ids = map.byte_runs()[0].ids.clone();
    map.put_bytes(4096, Buf::zeroed(4096).unwrap().into_slice(), &mut garbage);
    map.written(0, &plain(1 << 20, 65536), &ids, &mut garbage);
    assert_eq!(map.data_bytes(), 4096);
    assert_eq!(garbage.len(), 1);
    assert_eq!((garbage[0].addr.0, garbage[0].bytes), ((1 << 20) + 4096, 4096));
}

#[test]
fn files_that_names_wait_for_are_forgotten_with_their_group_and_not_before() {
    let intents = Intents::new(1 << 20);
    let needed = |first, last| intents.take(Txg(first), Txg(last)).map(|pending| pending.needed);
    intents.need(Txg(5), TreeId(1), Ino(70));
    intents.need(Txg(6), TreeId(1), Ino(80));
    intents.published(Txg(5));
    assert_eq!(needed(6, 7), Some(std::vec![(TreeId(1), Ino(80))]));
    assert_eq!(needed(6, 7), Some(Vec::new()));
}
