//! Rounds: gathering, sweeping and mending.

use super::seen::Seen;
use super::{State, SAVE_NS, SPEED_NS};
use crate::btree::Tree;
use crate::engine::log::LogPlace;
use crate::engine::resilver::try_to_mend;
use crate::engine::survey::{Parts, Pass, Progress, Seen as SeenBlock, Visitor};
use crate::engine::{DamagedFile, Engine};
use crate::error::{Errno, Error, Incident};
use crate::format::chunk::ChunkKind;
use crate::format::key::{kind, Key};
use crate::format::ptr::BlockPtr;
use crate::format::scrub::ScrubItem;
use crate::format::space::{RefItem, Run};
use crate::intent::compare_copies;
use crate::pool::{Content, DataSource, Lost, Sweep};
use crate::subvol::store::{Result, Store};
use crate::units::{Ino, Logical, TreeId, Txg};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// Bytes of a round, one copy counted: they follow from how long the one before took.
const ROUND_BYTES_MIN: u64 = 1 << 20;
const ROUND_BYTES_MAX: u64 = 256 << 20;
/// Of pools with stripes: parts of blocks wait in memory for the others, of two rounds.
const STRIPED_BYTES_MAX: u64 = 32 << 20;
/// How long a round is to take, in nanoseconds, and when others use the devices.
const ROUND_NS: u64 = 400_000_000;
const ROUND_NS_IN_THE_WAY: u64 = 25_000_000;
/// When others use the devices, it rests so many times as long as it worked.
const REST: u64 = 3;
/// Bytes of a round in passes after the first.
const SHORT_PASS_BYTES: u64 = 64 << 20;
/// Rounds in a second when the rate is limited.
const LIMITED_ROUNDS: u64 = 5;
/// Memory that a round takes for what it is to read.
const GATHERED_BYTES_MAX: usize = 8 << 20;
/// Bytes of nodes that a round passes over at most.
const PASSED_BYTES_MAX: u64 = 16 << 20;
/// Runs without a good copy that are remembered.
const LOST_MAX: usize = 4096;
/// How often a round is made again, because something could be read at last and was passed over.
const AGAIN_MAX: u32 = 3;

/// What a scrub knows between two rounds.
pub(super) struct Rounds {
    /// That of the scrub when this was made.
    pub generation: u64,
    pass: Pass,
    /// Rounds of this pass that were gathered, if it began with the first of them.
    gathered: Option<u32>,
    /// The pass has come to its end.
    is_over: bool,
    /// Blocks that are younger are passed over.
    first: Txg,
    /// Nodes that are not younger are passed over; zero in the first pass.
    since: Txg,
    rate: u64,
    target_bytes: u64,
    /// Uptime when the last round ended.
    settled_ns: u64,
    /// The last round met with others who use the devices.
    was_in_the_way: bool,
    again: u32,
    seen: Seen,
    /// Runs without a good copy.
    lost: Vec<Run>,
    /// In passes after the first: all that was moved during the one before, if that is known.
    moved: Option<Arc<Seen>>,
}

/// Who names what is read.
struct Owner {
    /// Index of the content.
    content: usize,
    tree: TreeId,
    /// The item, for file data.
    key: Option<Key>,
    /// Its bytes are those of the file.
    is_plain: bool,
}

/// What is looked at together.
struct Round {
    sweep: Arc<Sweep>,
    /// By content.
    owners: Vec<Owner>,
    /// Blocks that are what was written, and make no sense.
    senseless: Vec<(TreeId, Error)>,
    /// Blocks that could not be read when they were come to, so that what they name was passed
    /// over.
    unread: Vec<BlockPtr>,
    /// Where the pass is after it.
    progress: Progress,
    /// Runs with several references.
    shared: Vec<Run>,
    /// Bytes of what is looked at, one copy counted.
    bytes: u64,
    /// Keeps what is read from being used for something else.
    _parts: Parts,
}

/// What a round found.
#[derive(Default)]
struct Losses {
    count: u64,
    bytes: u64,
    /// Device and bytes of each copy.
    copies: Vec<(u16, u64)>,
}

impl Rounds {
    pub(super) fn new(
        generation: u64,
        item: &ScrubItem,
        progress: &Progress,
        moved: Option<Arc<Seen>>,
    ) -> Rounds {
        let since = Txg(item.since);
        Rounds {
            generation,
            pass: Pass::resumed(since, progress),
            gathered: (*progress == Progress::default()).then_some(0),
            is_over: false,
            first: Txg(item.first),
            since,
            rate: item.rate,
            target_bytes: ROUND_BYTES_MIN * 32,
            settled_ns: 0,
            was_in_the_way: false,
            again: 0,
            seen: Seen::default(),
            lost: Vec::new(),
            moved,
        }
    }

    /// What was lost in the pass before is counted already.
    pub(super) fn keep_lost_of(&mut self, before: &mut Rounds) {
        self.lost = core::mem::take(&mut before.lost);
    }

    /// What was gathered since the last round that counted is gathered again.
    pub(super) fn go_back(&mut self, progress: &Progress) {
        self.pass = Pass::resumed(self.since, progress);
        (self.gathered, self.is_over) = (None, false);
    }
}

impl Engine {
    /// Makes rounds until it is time for something else, or the scrub has ended.
    #[inline(never)]
    pub(super) fn make_rounds(
        self: &Arc<Engine>,
        rounds: &mut Rounds,
        until_ns: u64,
    ) -> Result<()> {
        let clock = &self.store.platform.clock;
        rounds.settled_ns = clock.uptime_ns();
        let mut next = self.gather(rounds)?;
        next.iter().for_each(|round| round.sweep.start());
        while let Some(round) = next.take() {
            let has_time = clock.uptime_ns() < until_ns && !rounds.was_in_the_way;
            let following = match has_time && self.goes_on(rounds) {
                true => Some(self.begin_following(rounds, &round)),
                false => None,
            };
            let suspects = round.sweep.finish();
            let is_in_the_way = round.sweep.was_in_the_way();
            // What follows is not to take repairs for somebody else.
            let blind = |is_blind| {
                let begun = following.iter().flatten().flatten();
                begun.for_each(|round| round.sweep.set_blind(is_blind));
            };
            blind(true);
            let settled = self.mend(&round, &suspects, rounds);
            blind(false);
            let settled = settled.map(|losses| self.settle(rounds, &round, &losses, is_in_the_way));
            let goes_on = settled.is_ok() && self.goes_on(rounds);
            next = match following {
                Some(Ok(following)) if goes_on => following,
                // With others waiting it had better stop, and begin with less.
                Some(Ok(Some(given_up))) => {
                    given_up.sweep.cancel();
                    rounds.go_back(&self.scrub.state.lock().progress);
                    return settled;
                }
                Some(Err(error)) => return settled.and(Err(error)),
                // The pass is over, or there is no time.
                Some(Ok(None)) | None => return settled,
            };
        }
        // Seen as one group has it all, nothing can have moved behind the pass.
        if rounds.gathered != Some(1) && self.begin_pass(rounds) {
            return Ok(());
        }
        self.look_at_the_rest(rounds)
    }

    /// Begins the round after one that is swept, so that devices do not wait for what that does at
    /// its end.
    fn begin_following(
        &self,
        rounds: &mut Rounds,
        under_way: &Round,
    ) -> Result<Option<Box<Round>>> {
        under_way.sweep.set_blind(true);
        let following = self.gather(rounds);
        under_way.sweep.set_blind(false);
        following.iter().flatten().for_each(|round| round.sweep.start());
        following
    }

    /// Whether the next round may follow at once.
    fn goes_on(&self, rounds: &Rounds) -> bool {
        let now_ns = self.store.platform.clock.uptime_ns();
        if rounds.rate > 0 || self.store.writable().is_err() {
            return false;
        }
        let is_closed = self.closed.load(core::sync::atomic::Ordering::SeqCst);
        let state = self.scrub.state.lock();
        let fits = state.generation == rounds.generation && state.is_running();
        !is_closed && fits && now_ns >= state.rests_until_ns
    }

    /// The next part of what is to be looked at; `None` at the end of the pass.
    #[inline(never)]
    fn gather(&self, rounds: &mut Rounds) -> Result<Option<Box<Round>>> {
        if rounds.is_over {
            return Ok(None);
        }
        let parts = self.parts();
        let refs = self.store.has_references().then(|| parts.references()).flatten();
        let target_bytes = match rounds.rate {
            // Short passes are to end, whatever goes on.
            _ if rounds.since > Txg(0) => SHORT_PASS_BYTES,
            0 => rounds.target_bytes,
            rate => rounds.target_bytes.min((rate / LIMITED_ROUNDS).max(1)),
        };
        let mut gathered = Gathering {
            store: &self.store,
            refs,
            first: rounds.first,
            since: rounds.since,
            seen: &rounds.seen,
            lost: &rounds.lost,
            moved: rounds.moved.as_deref(),
            entries: Vec::new(),
            senseless: Vec::new(),
            unread: Vec::new(),
            shared: Vec::new(),
            bytes: 0,
            memory: 0,
            passed: 0,
            target_bytes,
        };
        while !rounds.is_over && !gathered.has_enough() {
            rounds.is_over = !rounds.pass.step(&self.store, &parts, &mut gathered)?;
        }
        rounds.gathered = rounds.gathered.map(|count| count + 1);
        if rounds.since == Txg(0) && parts.txg > rounds.first {
            // What was moved since it began is as young as what was written since, and was passed
            // over.
            rounds.gathered = None;
        }
        let Gathering { entries, senseless, unread, shared, .. } = gathered;
        if rounds.is_over && entries.is_empty() && senseless.is_empty() {
            return Ok(None);
        }
        let progress = rounds.pass.progress(&parts);
        let (contents, owners) = in_order(entries)?;
        let bytes = contents.iter().map(|content| content.run().bytes).sum();
        let sweep = Arc::new(Sweep::plan(self.store.pool.clone(), contents)?);
        let round =
            Round { sweep, owners, senseless, unread, progress, shared, bytes, _parts: parts };
        Ok(Some(Box::new(round)))
    }

    /// Repairs what was found bad, and tells of what cannot be.
    ///
    /// # Errors
    /// When the round has to be made again.
    #[inline(never)]
    fn mend(&self, round: &Round, suspects: &[usize], rounds: &mut Rounds) -> Result<Box<Losses>> {
        let mut losses = Losses::default();
        for (tree, error) in &round.senseless {
            losses.count += 1;
            self.name_metadata(*tree, error);
        }
        for index in suspects {
            let content = &round.sweep.contents()[*index];
            let lost = try_to_mend(&self.store.pool, content)?;
            self.note_lost(content, &lost, rounds, &mut losses)?;
            let Some(first_lost) = lost.first() else { continue };
            let first = round.owners.partition_point(|owner| owner.content < *index);
            for owner in round.owners[first..].iter().take_while(|owner| owner.content == *index) {
                self.name_owner(owner, first_lost);
            }
        }
        // What is good now was not when the pass came to it, and what it names was passed over.
        for ptr in &round.unread {
            let is_good = try_to_mend(&self.store.pool, &Content::Block(*ptr))?.is_empty();
            if is_good && rounds.again < AGAIN_MAX {
                rounds.again += 1;
                return Err(Error::Checksum { addr: ptr.addr, bytes: ptr.allocated() });
            }
        }
        rounds.again = 0;
        Ok(Box::new(losses))
    }

    fn note_lost(
        &self,
        content: &Content,
        lost: &[Lost],
        rounds: &mut Rounds,
        losses: &mut Losses,
    ) -> Result<()> {
        let start = content.run().addr.0;
        for Lost { range, .. } in lost {
            let run = Run { addr: Logical(start + range.start), bytes: range.end - range.start };
            if rounds.lost.contains(&run) {
                // Another file names it, too.
                continue;
            }
            if rounds.lost.len() < LOST_MAX {
                rounds.lost.push(run);
            }
            losses.count += 1;
            losses.bytes += run.bytes;
            match self.store.pool.pieces(run) {
                Ok(pieces) => {
                    for piece in pieces {
                        let copies = piece.copies.iter().map(|(device, _)| (*device, piece.bytes));
                        losses.copies.extend(copies);
                    }
                }
                Err(Error::Memory) => return Err(Error::Memory),
                // On no device.
                Err(_) => {}
            }
        }
        Ok(())
    }

    fn name_owner(&self, owner: &Owner, lost: &Lost) {
        match owner.key {
            Some(key) => {
                let offset = match owner.is_plain {
                    true => key.offset.saturating_add(lost.range.start),
                    false => key.offset,
                };
                self.name_file(owner.tree, Ino(key.object), offset, &lost.error);
            }
            None => self.name_metadata(owner.tree, &lost.error),
        }
    }

    fn name_file(&self, tree: TreeId, ino: Ino, offset: u64, error: &Error) {
        let found = self.open_version(tree.0).and_then(|subvol| {
            let inode = subvol.inode(ino)?;
            Ok(subvol.path_of(&inode))
        });
        let path = match found {
            Ok(path) => self.with_versions(|versions| versions.shown_file(tree.0, &path)),
            // It was removed meanwhile, or with the snapshot that it was in.
            Err(Error::Posix(Errno::Stale | Errno::NoEnt)) => return,
            Err(_) => {
                let path = alloc::format!("#{ino}");
                self.with_versions(|versions| versions.shown_file(tree.0, path.as_bytes()))
            }
        };
        self.name_damage(DamagedFile { tree, ino, path }, offset, error);
    }

    fn name_metadata(&self, tree: TreeId, error: &Error) {
        let path = match tree.is_subvol() {
            true => {
                let name = self.with_versions(|versions| versions.shown(tree.0));
                [&name[..], b" (metadata)"].concat()
            }
            false => b"(metadata of the pool)".to_vec(),
        };
        self.name_damage(DamagedFile { tree, ino: Ino(0), path }, 0, error);
    }

    fn name_damage(&self, file: DamagedFile, offset: u64, error: &Error) {
        let DamagedFile { tree, ino, ref path } = file;
        let path = String::from_utf8_lossy(path).into_owned();
        // Of each file one is told of once.
        if self.note_damaged(file) {
            let error = error.clone();
            let incident = Incident::FileDamaged { tree, ino, path, offset, error };
            self.store.platform.report.incident(&incident);
        }
    }

    /// The place moves on to the end of a round, and what was found is added up.
    #[inline(never)]
    fn settle(&self, rounds: &mut Rounds, round: &Round, losses: &Losses, is_in_the_way: bool) {
        let now_ns = self.store.platform.clock.uptime_ns();
        let took_ns = now_ns.saturating_sub(rounds.settled_ns).max(1);
        rounds.settled_ns = now_ns;
        rounds.was_in_the_way = is_in_the_way;
        let is_due = {
            let mut state = self.scrub.state.lock();
            if state.generation != rounds.generation {
                return;
            }
            state.count_mends(self.store.pool.members());
            state.add(round, losses, now_ns);
            if is_in_the_way {
                state.rests_until_ns = now_ns.saturating_add(took_ns.saturating_mul(REST));
            }
            if let Some(ms) = round.bytes.saturating_mul(1000).checked_div(rounds.rate) {
                let rest_ns = ms.saturating_mul(1_000_000).saturating_sub(took_ns);
                state.rests_until_ns = state.rests_until_ns.max(now_ns.saturating_add(rest_ns));
            }
            let is_due = now_ns >= state.save_due_ns;
            if is_due {
                state.save_due_ns = now_ns.saturating_add(SAVE_NS);
            }
            is_due
        };
        if is_due {
            self.want_commit();
        }
        for run in &round.shared {
            // What is not remembered is read once more.
            rounds.seen.add(*run);
        }
        let ms = took_ns / 1_000_000;
        let wanted = if is_in_the_way { ROUND_NS_IN_THE_WAY } else { ROUND_NS } / 1_000_000;
        let fitting = round.bytes.saturating_mul(wanted) / ms.max(1);
        let (least, most) = (rounds.target_bytes / 8, rounds.target_bytes.saturating_mul(2));
        let is_striped = [ChunkKind::Data, ChunkKind::Metadata]
            .iter()
            .any(|kind| self.store.pool.profile(*kind).is_striped());
        let bound = if is_striped { STRIPED_BYTES_MAX } else { ROUND_BYTES_MAX };
        rounds.target_bytes = fitting.clamp(least, most).clamp(ROUND_BYTES_MIN, bound);
    }

    /// What no tree names; then the scrub has ended.
    #[inline(never)]
    fn look_at_the_rest(self: &Arc<Engine>, rounds: &mut Rounds) -> Result<()> {
        let pool = &self.store.pool;
        let mut losses = Losses::default();
        {
            let parts = self.parts();
            if let Some(ptr) = &parts.residue {
                let content = Content::Block(*ptr);
                let lost = try_to_mend(pool, &content)?;
                self.note_lost(&content, &lost, rounds, &mut losses)?;
                lost.iter().for_each(|lost| self.name_metadata(TreeId::SPACE, &lost.error));
            }
            // Segments of the log are not used again before these parts are let go of.
            if let Some((start, end)) = self.log.needed() {
                let place = LogPlace::new(&self.store);
                let compared =
                    compare_copies(&place, pool.pool_id(), &start, &end, &mut |run, frame| {
                        pool.complete_copies(run, frame)
                    });
                if compared == Err(Error::Memory) {
                    return Err(Error::Memory);
                }
            }
        }
        pool.mend_labels()?;
        if pool.mend_superblocks(false)? {
            // One that was just being written looks like one that lacks.
            let _no_commit = self.committer();
            pool.mend_superblocks(true)?;
        }
        {
            let mut state = self.scrub.state.lock();
            if state.generation == rounds.generation {
                state.add_losses(&losses);
            }
        }
        self.finish_scrub(rounds.generation)
    }
}

impl State {
    fn add(&mut self, round: &Round, losses: &Losses, now_ns: u64) {
        if self.is_running() {
            self.count_time(now_ns);
        }
        self.progress = round.progress.clone();
        self.add_losses(losses);
        self.is_unsaved = true;
        let Some(record) = self.record.as_mut() else { return };
        let item = &mut record.item;
        item.done_bytes = item.done_bytes.saturating_add(round.bytes);
        if now_ns.saturating_sub(self.marks[1].0) >= SPEED_NS {
            self.marks = [self.marks[1], (now_ns, item.done_bytes)];
        }
    }

    fn add_losses(&mut self, losses: &Losses) {
        let Some(record) = self.record.as_mut() else { return };
        record.item.lost_count = record.item.lost_count.saturating_add(losses.count);
        record.item.lost_bytes = record.item.lost_bytes.saturating_add(losses.bytes);
        for (device, bytes) in &losses.copies {
            if let Some(device) = record.devices.get_mut(usize::from(*device)) {
                device.found = device.found.saturating_add(1);
                device.lost_bytes = device.lost_bytes.saturating_add(*bytes);
            }
        }
    }
}

/// Sorts what was gathered by address, and puts together what is the same.
fn in_order(
    mut entries: Vec<(Content, TreeId, Option<Key>)>,
) -> Result<(Vec<Content>, Vec<Owner>)> {
    entries.sort_unstable_by_key(|(content, _, _)| {
        let run = content.run();
        (run.addr, run.bytes)
    });
    let (mut contents, mut owners) = (Vec::new(), Vec::new());
    contents.try_reserve_exact(entries.len()).map_err(|_| Error::Memory)?;
    owners.try_reserve_exact(entries.len()).map_err(|_| Error::Memory)?;
    let mut last = None;
    for (content, tree, key) in entries {
        let run = key.is_some().then(|| content.run());
        let is_plain = matches!(content, Content::Data(DataSource::Plain { .. }));
        if run.is_none() || run != last {
            contents.push(content);
            last = run;
        }
        owners.push(Owner { content: contents.len() - 1, tree, key, is_plain });
    }
    Ok((contents, owners))
}

/// What is to be read.
struct Gathering<'a> {
    store: &'a Store,
    /// The tree of references, if there are any.
    refs: Option<Tree>,
    /// What is younger need not be read.
    first: Txg,
    /// What references name that are not younger was looked at.
    since: Txg,
    seen: &'a Seen,
    lost: &'a [Run],
    moved: Option<&'a Seen>,
    entries: Vec<(Content, TreeId, Option<Key>)>,
    senseless: Vec<(TreeId, Error)>,
    unread: Vec<BlockPtr>,
    shared: Vec<Run>,
    bytes: u64,
    memory: usize,
    /// Bytes of nodes that were come to.
    passed: u64,
    target_bytes: u64,
}

impl Gathering<'_> {
    fn push(&mut self, content: Content, tree: TreeId, key: Option<Key>) -> Result<()> {
        let sums = match &content {
            Content::Data(DataSource::Plain { checksums, .. }) => checksums.len(),
            _ => 0,
        };
        self.memory += size_of::<(Content, TreeId, Option<Key>)>() + sums;
        self.entries.try_reserve(1).map_err(|_| Error::Memory)?;
        self.entries.push((content, tree, key));
        Ok(())
    }

    /// Whether a run has several references, all of which come to it.
    fn is_shared(&self, run: Run) -> bool {
        let Some(refs) = &self.refs else { return false };
        let last = Key::new(run.end().0 - 1, kind::REF, 0);
        // What cannot be read of that tree is told of when the pass comes to it.
        let Ok(Some((key, value))) = refs.last_upto(self.store, &last) else { return false };
        let item = RefItem::decode(Logical(key.object), &value);
        item.is_ok_and(|item| key.object.saturating_add(item.bytes) > run.addr.0)
    }
}

impl Visitor for Gathering<'_> {
    fn rootless(&mut self, id: TreeId, error: &Error) {
        // The first pass tells.
        if self.since == Txg(0) {
            self.senseless.push((id, error.clone()));
        }
    }

    fn block(&mut self, seen: &SeenBlock<'_>) -> Result<()> {
        self.passed += self.store.node_bytes as u64;
        match seen.error {
            None if seen.ptr.birth > self.first => return Ok(()),
            None => {}
            Some(Error::Memory) => return Err(Error::Memory),
            Some(Error::Device { .. } | Error::Checksum { .. } | Error::Unmapped { .. }) => {
                self.unread.push(*seen.ptr);
            }
            Some(error) => self.senseless.push((seen.id, error.clone())),
        }
        self.bytes += seen.ptr.allocated();
        self.push(Content::Block(*seen.ptr), seen.id, None)
    }

    fn data(&mut self, id: TreeId, key: &Key, birth: Txg, source: DataSource) -> Result<()> {
        let is_wanted = match self.since {
            Txg(0) => birth <= self.first,
            since => birth > since,
        };
        let run = source.run();
        // What others go on writing while the scrub runs is not to keep it from ending.
        if !is_wanted || self.moved.is_some_and(|moved| !moved.touches(run)) {
            return Ok(());
        }
        if run.bytes > 0 && self.is_shared(run) {
            let is_lost = |lost: &Run| lost.addr < run.end() && run.addr < lost.end();
            // All who name what is lost are told.
            if self.seen.covers(run) && !self.lost.iter().any(is_lost) {
                return Ok(());
            }
            self.shared.try_reserve(1).map_err(|_| Error::Memory)?;
            self.shared.push(run);
        }
        self.bytes += run.bytes;
        self.push(Content::Data(source), id, Some(*key))
    }

    fn has_enough(&self) -> bool {
        self.bytes >= self.target_bytes
            || self.memory >= GATHERED_BYTES_MAX
            || self.passed >= PASSED_BYTES_MAX
    }
}
