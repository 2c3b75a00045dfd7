//! Makes the golden images and streams that are missing.

use cairn_tests::golden::{clones_stream, describe, directory, streams, ALL};
use std::fs;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    fs::create_dir_all(directory())?;
    for golden in ALL {
        let image_path = directory().join(format!("{}.cairn.zst", golden.name));
        if image_path.exists() {
            println!("{} is there", golden.name);
            continue;
        }
        let (image, tree) = (golden.make)()?;
        let packed = zstd::encode_all(&image.to_vec()[..], 19)?;
        println!("{}: {} bytes", golden.name, packed.len());
        fs::write(image_path, packed)?;
        fs::write(directory().join(format!("{}.txt", golden.name)), describe(&tree))?;
    }
    let path = streams().join("clones-1.stream");
    if !path.exists() {
        fs::write(path, clones_stream()?)?;
    }
    Ok(())
}
