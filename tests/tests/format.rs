//! The format is a contract: golden images open, and the specification tells where everything is.

use cairn_tests::device::Image;
use cairn_tests::device::{refs, RamDevice};
use cairn_tests::golden::{describe, directory, ALL};
use cairn_tests::platform::{Spawn, TestPlatform};
use cairn_tests::subject::{Pool, Subject};
use cairn_tests::tree::Tree;
use std::collections::BTreeMap;
use std::fs;

#[test]
fn golden_images_open_check_clean_and_show_what_they_showed() {
    let subject = Pool::default();
    let mut names = Vec::new();
    for entry in fs::read_dir(directory()).unwrap() {
        let path = entry.unwrap().path();
        let file_name = path.file_name().unwrap().to_string_lossy().into_owned();
        let Some(name) = file_name.strip_suffix(".cairn.zst") else { continue };
        let content = zstd::decode_all(&fs::read(&path).unwrap()[..]).unwrap();
        let wanted = fs::read_to_string(directory().join(format!("{name}.txt"))).unwrap();
        let devices = refs(&[RamDevice::of(name, Image::of(&content))]);
        let core = TestPlatform::new(1, Spawn::AtOnce).platform();
        for when in ["as it is", "after it was opened and closed"] {
            let findings = subject.check(&devices, &core).unwrap();
            assert!(findings.is_empty(), "{name} {when}: {}", findings.join("\n"));
            let mounted = subject.open(&devices, &core).unwrap();
            let found = describe(&Tree::read(&*mounted.fs()).unwrap());
            assert_eq!(found, wanted, "{name} {when}");
            mounted.close().unwrap();
        }
        names.push(name.to_owned());
    }
    for golden in ALL {
        assert!(names.iter().any(|name| name == golden.name), "{} is missing", golden.name);
    }
}

/// A structure's table in the specification: offset and length by field.
struct Table(BTreeMap<String, (usize, usize)>);

impl Table {
    fn of(specification: &str, name: &str) -> Table {
        let mark = format!("<!-- table: {name} -->");
        let (_, rest) = specification.split_once(&mark).unwrap_or_else(|| panic!("no {mark}"));
        let rows = rest.lines().skip_while(|line| !line.starts_with("| 0x"));
        let rows = rows.take_while(|line| line.starts_with("| 0x"));
        let field = |row: &str| {
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            let offset = usize::from_str_radix(cells[1].trim_start_matches("0x"), 16).unwrap();
            (cells[4].trim_matches('`').to_owned(), (offset, cells[2].parse().unwrap()))
        };
        Table(rows.map(field).collect())
    }

    fn bytes<'a>(&self, structure: &'a [u8], field: &str) -> &'a [u8] {
        let (offset, len) = self.0[field];
        &structure[offset..offset + len]
    }

    fn number(&self, structure: &[u8], field: &str) -> u64 {
        let mut raw = [0; 8];
        let bytes = self.bytes(structure, field);
        raw[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(raw)
    }
}

/// Only what the specification says is used here: none of the core's own decoders.
#[test]
fn a_pool_can_be_read_by_the_offsets_of_the_specification() {
    let root = env!("CARGO_MANIFEST_DIR");
    let specification = fs::read_to_string(format!("{root}/../docs/format.md")).unwrap();
    let table = |name| Table::of(&specification, name);
    let golden = ALL.iter().find(|golden| golden.name == "v1-closed").unwrap();
    let image = (golden.make)().unwrap().0.to_vec();
    let size = image.len();

    let label = &image[64 << 10..];
    let labels = table("Label");
    assert_eq!(labels.bytes(label, "magic"), b"cairn\xf5\x0fL");
    assert_eq!(labels.number(label, "device_bytes") as usize, size);
    let pool_id = labels.bytes(label, "pool_id");

    let superblocks = table("SuperblockRaw");
    let slots = (0..16).map(|slot| &image[(128 << 10) + slot * 4096..][..4096]);
    let valid = slots.filter(|slot| {
        let sum = blake3::hash(&slot[..0xfe0]);
        superblocks.bytes(slot, "magic") == b"cairn\xf5\x0fS"
            && superblocks.bytes(slot, "checksum") == sum.as_bytes()
    });
    let newest = valid.max_by_key(|slot| superblocks.number(slot, "txg")).unwrap();
    assert_eq!(superblocks.bytes(newest, "pool_id"), pool_id);
    let node_bytes = superblocks.number(newest, "node_bytes") as usize;

    // The first system chunk: its address, then its CHUNK value with its stripes.
    let system = superblocks.bytes(newest, "system");
    let chunk_start = u64::from_le_bytes(system[..8].try_into().unwrap());
    let chunks = table("ChunkHeader");
    let chunk = &system[8..];
    assert!(chunks.number(chunk, "stripe_count") >= 1);
    let header_bytes = 48;
    let physical = table("StripeItem").number(&chunk[header_bytes..], "physical");

    // The root of the chunk tree.
    let pointers = table("BlockPtrRaw");
    let pointer = superblocks.bytes(newest, "chunk_root");
    let addr = pointers.number(pointer, "addr");
    let place = (addr - chunk_start + physical) as usize;
    let node = &image[place..place + node_bytes];
    assert_eq!(pointers.bytes(pointer, "checksum"), blake3::hash(node).as_bytes());

    let nodes = table("NodeHeader");
    assert_eq!(nodes.bytes(node, "magic"), b"CrnN");
    assert_eq!(nodes.number(node, "tree"), 2);
    assert_eq!(nodes.number(node, "addr"), addr);
    assert_eq!(nodes.bytes(node, "pool_id"), pool_id);
    assert_eq!(nodes.number(node, "level"), 0);

    // Its items: among them the chunk the node itself is in, and the device.
    let heads = table("ItemHead");
    let mut kinds = Vec::new();
    for index in 0..nodes.number(node, "count") as usize {
        let head = &node[96 + index * 24..][..24];
        let kind = heads.number(head, "kind");
        let tail = heads.number(head, "value_tail") as usize;
        let value = &node[node_bytes - tail..][..heads.number(head, "value_bytes") as usize];
        if kind == 0x60 && heads.number(head, "object") == chunk_start {
            assert_eq!(value, &chunk[..value.len()]);
        }
        if kind == 0x61 {
            assert_eq!(table("DeviceItem").number(value, "bytes") as usize, size);
        }
        kinds.push(kind);
    }
    assert!(kinds.contains(&0x60) && kinds.contains(&0x61), "{kinds:x?}");
}
