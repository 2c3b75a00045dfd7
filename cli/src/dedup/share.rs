//! Sharing what was found equal.
//!
//! The list of blocks is read from its beginning. The first block of a content is remembered, and
//! each later one is to share with it. When no more can be remembered, the list is read to its end
//! all the same; then everything is forgotten, and the list is read again from the first block on
//! that could not be remembered, without those that were dealt with. So a run ends when each block
//! was compared with all others, and needs a bit for each besides.
//!
//! Blocks that follow each other, and are to share with blocks that follow each other, are one
//! *run*: they are asked for together.

use super::{
    odd, Answer, Ask, Block, Bounded, Files, How, Place, Question, Seen, Spill, Told,
    BLOCK_RECORD_BYTES, NOWHERE,
};
use crate::Failure;
use cairn_host::dedupe::{Shared, RANGE_BYTES_MAX};
use cairn_host::parse::format_size;
use cairn_host::say;

/// One bit for each of many things.
struct Bits(Vec<u64>);

impl Bits {
    fn new(count: u64) -> Result<Bits, Failure> {
        let words = usize::try_from(count.div_ceil(64)).ok();
        let mut bits = Vec::new();
        match words.map(|words| bits.try_reserve_exact(words).map(|()| words)) {
            Some(Ok(words)) => bits.resize(words, 0),
            _ => return Err(Failure::new("there are too many blocks: choose larger ones (-b)")),
        }
        Ok(Bits(bits))
    }

    fn has(&self, index: u64) -> bool {
        self.0[(index / 64) as usize] >> (index % 64) & 1 == 1
    }

    /// Sets one; false when it was set before.
    fn set(&mut self, index: u64) -> bool {
        let is_new = !self.has(index);
        self.0[(index / 64) as usize] |= 1 << (index % 64);
        is_new
    }
}

/// Where the first block of a content is.
#[derive(Clone, Copy)]
struct First {
    place: Place,
    file: u32,
    index: u32,
}

/// Blocks that follow each other in two files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    source: (u32, u32),
    target: (u32, u32),
    blocks: u32,
    bytes: u64,
}

impl Run {
    fn of(first: &First, block: &Block) -> Run {
        let (source, target) = ((first.file, first.index), (block.file, block.index));
        Run { source, target, blocks: 1, bytes: u64::from(block.bytes) }
    }

    /// Takes on another one, if it is what follows.
    fn join(&mut self, next: &Run) -> bool {
        let is_next = |(file, index): (u32, u32), next: (u32, u32)| {
            file == next.0 && index.checked_add(self.blocks) == Some(next.1)
        };
        if !is_next(self.source, next.source) || !is_next(self.target, next.target) {
            return false;
        }
        self.blocks += next.blocks;
        self.bytes += next.bytes;
        true
    }
}

/// Shares all that is equal.
pub(super) fn all(
    asking: &mut dyn Ask,
    files: &Files,
    blocks: &Spill,
    how: &How,
    told: &mut Told,
    seen: &mut Seen,
) -> Result<(), Failure> {
    let count = blocks.len() / BLOCK_RECORD_BYTES as u64;
    let mut done = Bits::new(count)?;
    let mut firsts: Bounded<[u8; 16], First> = Bounded::new(how, count);
    let shared_files = Bits::new(u64::from(files.count))?;
    let mut sharer = Sharer { asking, files, how, told, seen, shared_files, bad: None };
    let mut start = 0;
    loop {
        firsts.map.clear();
        let mut left_over = None;
        let mut run: Option<Run> = None;
        let from = start * BLOCK_RECORD_BYTES as u64;
        for (at, record) in (start..).zip(blocks.pieces::<BLOCK_RECORD_BYTES>(from)) {
            let block = Block::of_bytes(&record?);
            if done.has(at) || sharer.bad == Some(block.file) {
                continue;
            }
            let Some(first) = firsts.map.get(&block.content).copied() else {
                match firsts.is_full() {
                    true => left_over = left_over.or(Some(at)),
                    false => {
                        let Block { content, place, file, index, .. } = block;
                        firsts.map.insert(content, First { place, file, index });
                    }
                }
                continue;
            };
            done.set(at);
            if (first.file, first.index) == (block.file, block.index) {
                continue;
            }
            if first.place == block.place && block.place != NOWHERE {
                sharer.seen.before += u64::from(block.bytes);
                continue;
            }
            let next = Run::of(&first, &block);
            if !run.as_mut().is_some_and(|run| run.join(&next)) {
                run.replace(next).map_or(Ok(()), |run| sharer.share(&run))?;
                sharer.told.bar.set_position(at);
            }
        }
        run.map_or(Ok(()), |run| sharer.share(&run))?;
        match left_over {
            Some(at) => start = at,
            None => return Ok(()),
        }
    }
}

struct Sharer<'a> {
    asking: &'a mut dyn Ask,
    files: &'a Files,
    how: &'a How,
    told: &'a mut Told,
    seen: &'a mut Seen,
    /// Those that share something.
    shared_files: Bits,
    /// The last file that could not share: more is not tried with it.
    bad: Option<u32>,
}

impl Sharer<'_> {
    fn share(&mut self, run: &Run) -> Result<(), Failure> {
        if self.bad == Some(run.target.0) {
            return Ok(());
        }
        if self.how.dry_run {
            self.note(run, run.bytes)?;
            return Ok(());
        }
        let (source, target) = (self.files.get(run.source.0)?, self.files.get(run.target.0)?);
        let block = self.how.block;
        let (from, to) = (u64::from(run.source.1) * block, u64::from(run.target.1) * block);
        let (mut done, mut shared, mut most) = (0, 0, RANGE_BYTES_MAX);
        while done < run.bytes {
            let bytes = (run.bytes - done).min(most);
            let (source, target) = ((source.ino, from + done), (target.ino, to + done));
            match self.asking.ask(Question::Share { source, target, bytes })? {
                Ok(Answer::Shared(Shared { same, shared: more, differs })) => {
                    done += same;
                    shared += more;
                    if same == bytes {
                        continue;
                    }
                    if differs && bytes > block {
                        // Which block was changed is found by asking for each.
                        most = block;
                    } else if differs || same == 0 {
                        let next = ((done / block + 1) * block).min(run.bytes);
                        self.seen.changed += next - done;
                        (done, most) = (next, RANGE_BYTES_MAX);
                    }
                }
                Ok(Answer::Gone) => {
                    self.seen.changed += run.bytes - done;
                    break;
                }
                Ok(_) => return Err(odd()),
                Err(why) => {
                    self.tell(run, &why)?;
                    break;
                }
            }
        }
        self.note(run, shared)
    }

    fn note(&mut self, run: &Run, shared: u64) -> Result<(), Failure> {
        if shared == 0 {
            return Ok(());
        }
        self.seen.shared += shared;
        if self.shared_files.set(u64::from(run.target.0)) {
            self.seen.shared_files += 1;
        }
        self.told.bar.set_message(format!("{} ", format_size(self.seen.shared)));
        if self.how.verbose {
            let [source, target] = self.names(run)?;
            let size = format_size(shared);
            self.told.bar.suspend(|| say!("{source} -> {target}: {size}"));
        }
        Ok(())
    }

    fn tell(&mut self, run: &Run, why: &str) -> Result<(), Failure> {
        self.bad = Some(run.target.0);
        let [source, _] = self.names(run)?;
        let target = self.files.name(&self.files.get(run.target.0)?)?;
        self.told.tell(&target, format_args!("{why}; it was to share with {source}"));
        Ok(())
    }

    fn names(&self, run: &Run) -> Result<[String; 2], Failure> {
        let name = |index| {
            let name = self.files.name(&self.files.get(index)?)?;
            Ok(crate::output::printable(&name.display().to_string()))
        };
        Ok([name(run.source.0)?, name(run.target.0)?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_takes_on_what_follows_in_both_files_and_nothing_else() {
        let run = |source, target, bytes| Run { source, target, blocks: 1, bytes };
        let mut first = run((1, 4), (2, 0), 100);
        for other in [((1, 6), (2, 1)), ((1, 5), (2, 2)), ((3, 5), (2, 1)), ((1, 5), (1, 1))] {
            assert!(!first.join(&run(other.0, other.1, 100)), "{other:?}");
        }
        assert!(first.join(&run((1, 5), (2, 1), 30)));
        assert!(first.join(&run((1, 6), (2, 2), 1)));
        assert_eq!(first, Run { source: (1, 4), target: (2, 0), blocks: 3, bytes: 131 });
    }

    #[test]
    fn a_bit_is_set_once() {
        let mut bits = Bits::new(130).unwrap();
        for index in [0, 63, 64, 129] {
            assert!(!bits.has(index) && bits.set(index) && bits.has(index) && !bits.set(index));
        }
        assert!(!bits.has(1) && !bits.has(128));
        assert!(Bits::new(u64::MAX).is_err());
    }
}
