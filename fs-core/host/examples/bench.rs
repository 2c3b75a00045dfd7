//! Measures the choices this crate makes on the machine at hand: how batches reach a device, how
//! fast checksums and compression are.
//!
//! `cargo run --release -p cairn-host --example bench [DEVICE-OR-IMAGE]`: the file is overwritten.

use cairn_host::{Access, FileDevice, HostCodecs, HostWorkers, IoMethod, OpenOptions, Wait};
use fs_core::buf::Buf;
use fs_core::platform::{Codecs, Device, ReadOp, Workers, WriteOp};
use fs_core::units::Physical;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long each measurement runs.
const RUN: Duration = Duration::from_millis(500);

fn main() {
    codecs();
    workers();
    if let Some(path) = std::env::args().nth(1) {
        for (direct, method) in
            [(true, IoMethod::Uring), (true, IoMethod::Vectored), (false, IoMethod::Vectored)]
        {
            device(Path::new(&path), OpenOptions { access: Access::ReadWrite, method, direct });
        }
    }
}

/// Calls `work` for a while; calls a second.
fn rate(mut work: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut calls = 0;
    while start.elapsed() < RUN {
        work();
        calls += 1;
    }
    f64::from(calls) / start.elapsed().as_secs_f64()
}

fn codecs() {
    let codecs = HostCodecs::new();
    for bytes in [4096, 16384, 131_072] {
        let text: Vec<u8> = (0..bytes).map(|i| ((i * i) >> 7) as u8 & 0x1f).collect();
        let mut packed = vec![0; bytes];
        let n = codecs.zstd_compress(&text, &mut packed, 3).expect("compressible");
        let mut back = vec![0; bytes];
        let gb = bytes as f64 / 1e9;
        println!(
            "{bytes:>7} bytes, GB/s: blake3 {:.2}, crc32c {:.2}, zstd:3 {:.2}, back {:.2}",
            gb * rate(|| {
                std::hint::black_box(codecs.blake3(&text));
            }),
            gb * rate(|| {
                std::hint::black_box(codecs.crc32c(&text));
            }),
            gb * rate(|| {
                codecs.zstd_compress(&text, &mut packed, 3);
            }),
            gb * rate(|| {
                codecs.zstd_expand(&packed[..n], &mut back);
            }),
        );
    }
}

fn workers() {
    let workers = HostWorkers::new();
    let per_second = rate(|| workers.parallel_for(8, &|_| {}));
    println!("parallel_for over 8 empty steps: {:.1} us", 1e6 / per_second);
}

fn device(path: &Path, options: OpenOptions) {
    let device = FileDevice::open(path, options, &Wait::none()).expect("the device opens");
    println!("{:?}, direct {}", options.method, device.is_direct());
    let span = device.geometry().bytes;
    for (count, bytes) in [(1, 4096), (16, 4096), (128, 4096), (16, 131_072), (4, 1 << 20)] {
        let mut seed = 1u64;
        let mut place = move || {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            Physical((seed >> 16) % (span / bytes) * bytes)
        };
        let buf = || Buf::zeroed(bytes as usize).expect("memory");
        let mut writes: Vec<WriteOp> = (0..count)
            .map(|_| WriteOp { at: place(), bufs: vec![buf().into_slice()], result: Ok(()) })
            .collect();
        let mut reads: Vec<ReadOp> =
            (0..count).map(|_| ReadOp { at: place(), buf: buf(), result: Ok(()) }).collect();
        let mb = (count * bytes) as f64 / 1e6;
        let written = rate(|| {
            device.write(&mut writes);
            writes.iter_mut().for_each(|op| op.at = place());
        });
        device.flush().expect("flush");
        let read = rate(|| {
            device.read(&mut reads);
            reads.iter_mut().for_each(|op| op.at = place());
        });
        println!(
            "  {count:>3} x {bytes:>7}: write {:>7.0} MB/s, read {:>7.0} MB/s",
            written * mb,
            read * mb
        );
    }
}
