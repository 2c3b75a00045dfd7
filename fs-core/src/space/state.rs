//! What the lock protects, and every step that is made under it.

use super::bits::{Bits, FreeRun};
use super::chunk::{ChunkSpace, Find};
use super::group::{Deltas, Group};
use super::late::Freed;
use super::reserve::{Promised, Reserve, Room, Side};
use super::runs::{span, RunSet};
use super::{corrupt, ChunkSource};
use crate::error::Error;
use crate::format::chunk::{Chunk, ChunkKind};
use crate::format::space::{Residue, Run};
use crate::platform::Result;
use crate::units::{Logical, Txg, SECTOR_BYTES, SECTOR_SHIFT};
use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

/// Sums over the chunks of one kind.
#[derive(Clone, Copy, Default)]
pub(super) struct Totals {
    pub chunks: u64,
    pub bytes: u64,
    pub busy: u64,
    /// Bytes freed and not yet reusable; part of `busy`.
    pub pending: u64,
    /// Device bytes of the chunks.
    pub device_bytes: u64,
}

/// Where the next run of a kind is looked for first.
#[derive(Clone, Copy, Default)]
struct Cursor {
    chunk: Logical,
    sector: u32,
}

/// A chunk that a group drops.
pub(super) struct Dropped {
    pub txg: Txg,
    pub space: ChunkSpace,
}

/// A region whose bitmap is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub chunk: Logical,
    pub region: u32,
    pub start: Logical,
    /// Value of [`State::generation`] when it was found missing.
    pub generation: u64,
}

/// What a step under the lock came to.
pub(super) enum Step<T> {
    Done(T),
    /// Load this bitmap, then try again.
    Load(Wanted),
}

/// What is to be allocated, in sectors.
#[derive(Clone, Copy)]
pub(super) struct Request {
    pub kind: ChunkKind,
    pub want: u32,
    pub min: u32,
    pub txg: Txg,
    /// Only chunks of this group or older: younger ones are not in the group's chunk tree.
    pub newest_chunk: Txg,
    pub may_grow: bool,
}

pub(super) struct State {
    pub chunks: BTreeMap<Logical, ChunkSpace>,
    totals: [Totals; 3],
    cursors: [Cursor; 3],
    /// Regions in memory, in the order in which the eviction hand comes to them.
    resident: VecDeque<(Logical, u32)>,
    resident_max: usize,
    metadata_unit: u32,
    /// Counts publications: a bitmap read under an older number may be of an older root.
    pub generation: u64,
    pub published: Txg,
    /// The last group whose chunk tree is closed.
    pub sealed: Txg,
    /// What the published space tree does not know.
    pub residue: Arc<Deltas>,
    /// Groups that are not published.
    pub groups: BTreeMap<Txg, Group>,
    /// What published groups freed, until it is released.
    pub pending: BTreeMap<Txg, Freed>,
    /// Somebody was refused room: what is kept is to be given free.
    pub is_short: bool,
    /// What is being released: discarded, not yet free.
    pub releasing: RunSet,
    /// Chunks whose items the next cut deletes.
    pub dropped: BTreeMap<Logical, Dropped>,
    /// A free that cannot be true. Fails the next cut.
    pub fault: Option<Error>,
    pub promised: Promised,
}

pub(super) fn slot(kind: ChunkKind) -> usize {
    kind as usize - ChunkKind::Data as usize
}

pub(super) fn bytes_of(sectors: u32) -> u64 {
    u64::from(sectors) << SECTOR_SHIFT
}

impl State {
    pub fn new(published: Txg, resident_max: usize, metadata_unit: u64) -> State {
        State {
            chunks: BTreeMap::new(),
            totals: [Totals::default(); 3],
            cursors: [Cursor::default(); 3],
            resident: VecDeque::new(),
            resident_max,
            metadata_unit: (metadata_unit >> SECTOR_SHIFT) as u32,
            generation: 0,
            published,
            sealed: published,
            residue: Arc::default(),
            groups: BTreeMap::new(),
            pending: BTreeMap::new(),
            is_short: false,
            releasing: RunSet::default(),
            dropped: BTreeMap::new(),
            fault: None,
            promised: Promised::default(),
        }
    }

    pub fn totals(&self, kind: ChunkKind) -> Totals {
        self.totals[slot(kind)]
    }

    // Chunks.

    pub fn add_chunk(&mut self, chunk: &Chunk, summary: Option<u64>) -> Result<()> {
        let (sectors, used) = (chunk.length >> SECTOR_SHIFT, summary.unwrap_or(0));
        if used > sectors {
            return Err(corrupt("chunk summary counts more than the chunk has", chunk.logical));
        }
        let space = ChunkSpace::new(chunk, used as u32, summary.is_some());
        let range = space.span();
        let before = self.chunks.range(..Logical(range.end)).next_back();
        if before.is_some_and(|(_, other)| other.span().end > range.start) {
            return Err(corrupt("chunks overlap", chunk.logical));
        }
        let totals = &mut self.totals[slot(chunk.kind)];
        totals.chunks += 1;
        totals.bytes += space.bytes();
        totals.device_bytes += space.bytes() * space.copies;
        totals.busy += bytes_of(space.busy);
        self.chunks.insert(chunk.logical, space);
        Ok(())
    }

    pub fn remove_chunk(&mut self, chunk: Logical) -> Option<ChunkSpace> {
        let space = self.chunks.remove(&chunk)?;
        let totals = &mut self.totals[slot(space.kind)];
        totals.chunks -= 1;
        totals.bytes -= space.bytes();
        totals.device_bytes -= space.bytes() * space.copies;
        totals.busy -= bytes_of(space.busy);
        Some(space)
    }

    /// The chunk that holds all of `range`.
    pub fn chunk_of(&self, range: &Range<u64>) -> Option<&ChunkSpace> {
        let (_, chunk) = self.chunks.range(..=Logical(range.start)).next_back()?;
        (range.end <= chunk.span().end).then_some(chunk)
    }

    /// The end of the chunk that holds an address; used to cut runs, so anything will do for
    /// addresses in no chunk.
    pub fn chunk_end(&self, at: u64) -> u64 {
        let chunk = self.chunks.range(..=Logical(at)).next_back();
        chunk.map(|(_, chunk)| chunk.span().end).filter(|end| *end > at).unwrap_or(u64::MAX)
    }

    /// Counts sectors of a chunk as busy, or as no longer busy. False when the counter cannot
    /// follow: the summary it started from was a lie.
    pub fn count(&mut self, chunk: Logical, sectors: u32, busy: bool) -> bool {
        let Some(chunk) = self.chunks.get_mut(&chunk) else { return false };
        let totals = &mut self.totals[slot(chunk.kind)];
        let (whole, moved) = if busy {
            let moved = sectors.min(chunk.free());
            chunk.busy += moved;
            totals.busy += bytes_of(moved);
            (sectors, moved)
        } else {
            let moved = sectors.min(chunk.busy);
            chunk.busy -= moved;
            totals.busy -= bytes_of(moved);
            (sectors, moved)
        };
        whole == moved
    }

    /// Counts busy bytes of a kind as on their way to being free.
    pub fn add_pending(&mut self, kind: ChunkKind, bytes: u64) {
        self.totals[slot(kind)].pending += bytes;
    }

    /// What the published tree does not know, at the time a pool is opened.
    pub fn load_residue(&mut self, deltas: Deltas) -> Result<()> {
        for (set, busy) in [(&deltas.taken, true), (&deltas.freed, false)] {
            for run in set.to_runs(|at| self.chunk_end(at)) {
                let range = span(run);
                let chunk = self.chunk_of(&range).ok_or(Error::Unmapped { addr: run.addr })?;
                let (start, sectors) = (chunk.start, chunk.sectors_of(range));
                if !self.count(start, sectors.end - sectors.start, busy) {
                    return Err(corrupt("residue contradicts the summary of a chunk", run.addr));
                }
            }
        }
        self.residue = Arc::new(deltas);
        Ok(())
    }

    // Bitmaps.

    /// The bitmap of a region that is not in memory, from the item of the published tree: see
    /// "Bitmaps in memory" in the module's documentation.
    pub fn rebuild(&self, chunk: &ChunkSpace, region: u32, item: Option<&[u8]>) -> Result<Bits> {
        let start = chunk.region_start(region);
        let window = chunk.region_span(region);
        let mut bits = Bits::decode(start, chunk.region_sectors(region), item)?;
        apply_exact(&mut bits, &window, &self.residue)?;
        let mut mark = |set: &RunSet| {
            for part in set.within(window.clone()) {
                bits.set(sectors_in(&window, part));
            }
        };
        for deltas in self.groups.values().flat_map(Group::deltas) {
            mark(&deltas.taken);
        }
        self.pending.values().map(|freed| &freed.set).for_each(&mut mark);
        mark(&self.releasing);
        Ok(bits)
    }

    /// Puts a bitmap of the published tree in its place, unless another load was faster.
    pub fn install(&mut self, wanted: &Wanted, item: Option<&[u8]>) -> Result<()> {
        let Some(chunk) = self.chunks.get(&wanted.chunk) else { return Ok(()) };
        if chunk.bits(wanted.region).is_some() {
            return Ok(());
        }
        let bits = self.rebuild(chunk, wanted.region, item)?;
        self.make_room();
        let chunk = self.chunks.get_mut(&wanted.chunk).expect("the chunk was there above");
        chunk.insert_bits(wanted.region, bits)?;
        self.resident.push_back((wanted.chunk, wanted.region));
        Ok(())
    }

    /// Evicts until one more bitmap fits: the first that was not looked at since the last round.
    fn make_room(&mut self) {
        let mut patience = self.resident.len();
        while self.resident.len() >= self.resident_max {
            let Some((chunk, region)) = self.resident.pop_front() else { return };
            let space = self.chunks.get_mut(&chunk);
            let gone = space.is_none_or(|space| space.evict(region, patience == 0));
            patience = patience.saturating_sub(1);
            if !gone {
                self.resident.push_back((chunk, region));
            }
        }
    }

    /// Forgets every bitmap.
    pub fn forget_bitmaps(&mut self) {
        for (chunk, region) in core::mem::take(&mut self.resident) {
            if let Some(space) = self.chunks.get_mut(&chunk) {
                space.evict(region, true);
            }
        }
    }

    pub fn wanted(&self, chunk: Logical, region: u32) -> Wanted {
        let start = self.chunks.get(&chunk).map_or(chunk, |space| space.region_start(region));
        Wanted { chunk, region, start, generation: self.generation }
    }

    // Searching.

    /// Whether a request may be served from a chunk.
    fn serves(chunk: &ChunkSpace, request: &Request) -> bool {
        chunk.kind == request.kind && chunk.birth <= request.newest_chunk
    }

    /// The chunk to look for a run of `want` in, and the sector to start at: where the cursor is;
    /// else the fullest that has an eighth of it free, so that the others get a chance to become
    /// empty; else the emptiest.
    fn pick(&self, request: &Request, want: u32, loads: bool) -> Option<(Logical, u32)> {
        let able = |chunk: &ChunkSpace| State::serves(chunk, request) && chunk.reach(loads) >= want;
        let cursor = self.cursors[slot(request.kind)];
        if self.chunks.get(&cursor.chunk).is_some_and(able) {
            return Some((cursor.chunk, cursor.sector));
        }
        let rank = |chunk: &ChunkSpace| match chunk.free() >= chunk.sectors / 8 {
            true => (0, chunk.free()),
            false => (1, u32::MAX - chunk.free()),
        };
        let best = self.chunks.values().filter(|c| able(c)).min_by_key(|c| rank(c))?;
        Some((best.start, 0))
    }

    /// A run of at least `want` sectors, by next fit.
    fn fit(&mut self, request: &Request, want: u32, loads: bool) -> Result<Option<Step<Run>>> {
        while let Some((start, from)) = self.pick(request, want, loads) {
            if let Some(step) = self.find(request, start, from, want, loads)? {
                return Ok(Some(step));
            }
        }
        Ok(None)
    }

    /// The longest run there is, if it has at least `request.min` sectors.
    fn longest(&mut self, request: &Request, loads: bool) -> Result<Option<Step<Run>>> {
        loop {
            let able = self.chunks.values().filter(|chunk| State::serves(chunk, request));
            let reach = able.map(|chunk| (chunk.reach(loads), chunk.start));
            // The lowest address among equals: `max_by_key` would take the last.
            let best = reach.reduce(|best, next| if next.0 > best.0 { next } else { best });
            let Some((reach, start)) = best else { return Ok(None) };
            let target = reach.min(request.want);
            if target < request.min {
                return Ok(None);
            }
            if let Some(step) = self.find(request, start, 0, target, loads)? {
                return Ok(Some(step));
            }
        }
    }

    fn find(
        &mut self,
        request: &Request,
        start: Logical,
        from: u32,
        want: u32,
        loads: bool,
    ) -> Result<Option<Step<Run>>> {
        let chunk = self.chunks.get_mut(&start).expect("a chunk that was picked is there");
        match chunk.find(from, want, loads)? {
            Find::At(run) => self.hand_out(request, start, run, want).map(Step::Done).map(Some),
            Find::Load(region) => Ok(Some(Step::Load(self.wanted(start, region)))),
            Find::Nothing => Ok(None),
        }
    }

    /// Takes up to `want` sectors of a free run that has as many.
    fn hand_out(&mut self, request: &Request, at: Logical, run: FreeRun, want: u32) -> Result<Run> {
        let mut start = run.start;
        let mut len = want.min(run.len);
        if request.kind != ChunkKind::Data {
            // Blocks of one size at multiples of it leave holes that fit them. A block of another
            // size would shift all that follow; so they step back into line where they can.
            let aligned = start.next_multiple_of(self.metadata_unit);
            if len >= self.metadata_unit && aligned + len <= run.start + run.len {
                start = aligned;
            }
            len -= len % request.min;
        }
        let chunk = self.chunks.get_mut(&at).expect("a chunk that was picked is there");
        chunk.occupy(start..start + len);
        let addr = Logical(at.0 + bytes_of(start));
        self.count(at, len, true);
        self.cursors[slot(request.kind)] = Cursor { chunk: at, sector: start + len };
        let run = Run { addr, bytes: bytes_of(len) };
        self.note_taken(run, request.txg)?;
        Ok(run)
    }

    fn note_taken(&mut self, run: Run, txg: Txg) -> Result<()> {
        let taken = &mut self.groups.entry(txg).or_default().now.taken;
        taken.insert(span(run)).map_err(|_| corrupt("space taken twice by a group", run.addr))
    }

    /// One attempt at an allocation. `loads` says how many bitmaps were loaded for it so far.
    pub fn try_allocate(
        &mut self,
        request: &Request,
        loads: u32,
        source: &dyn ChunkSource,
    ) -> Result<Step<Run>> {
        if request.txg <= self.published {
            return Err(Error::Argument { what: "allocation for a published group" });
        }
        if let Some(step) = self.fit(request, request.want, loads < super::LOADS_MAX)? {
            return Ok(step);
        }
        if self.grow(request, false, source)? {
            if let Some(step) = self.fit(request, request.want, true)? {
                return Ok(step);
            }
        }
        if let Some(step) = self.longest(request, false)? {
            return Ok(step);
        }
        if let Some(step) = self.longest(request, true)? {
            return Ok(step);
        }
        if self.grow(request, true, source)? {
            if let Some(step) = self.longest(request, true)? {
                return Ok(step);
            }
        }
        Err(Error::NoSpace)
    }

    /// Creates a chunk if the promises allow it; `needed` when there is no other way.
    pub fn grow(
        &mut self,
        request: &Request,
        needed: bool,
        source: &dyn ChunkSource,
    ) -> Result<bool> {
        if !request.may_grow || request.txg <= self.sealed {
            return Ok(false);
        }
        let mut room = self.room(source);
        let reserve = self.reserve(&room);
        let price = room.chunk_bytes * source.copies(request.kind);
        if room.unallocated < price && !needed {
            return Ok(false);
        }
        // The pool makes a smaller chunk of a last bit. No promise counts on it; but when there is
        // no other way, it is better than nothing.
        room.unallocated = room.unallocated.saturating_sub(price);
        let allowed = match request.kind {
            ChunkKind::System => true,
            ChunkKind::Data => {
                room.data.free += room.chunk_bytes;
                // Whoever can make do with sectors was promised them. Who wants more in one piece
                // can do without.
                let is_promised = needed && request.min == 1;
                let reserve = if is_promised { Reserve::default() } else { reserve };
                if is_promised {
                    room.unallocated = source.promised_bytes().saturating_sub(price);
                }
                room.fits(&self.promised, reserve)
            }
            ChunkKind::Metadata => {
                // Only commits allocate metadata. Better to break a promise to an operation that
                // may still be refused than to fail a commit.
                room.metadata.free += room.chunk_bytes;
                needed || room.fits(&self.promised, reserve)
            }
        };
        if !allowed {
            return Ok(false);
        }
        // In the name of the oldest group that can still have chunks: then that group and all
        // younger ones may use it, and one group's promise cannot be spent by another's chunk.
        let owed = room.owed(&self.promised);
        match source.create_chunk(request.kind, self.sealed.next(), owed) {
            Ok(chunk) if chunk.kind == request.kind => {
                self.add_chunk(&chunk, None)?;
                Ok(true)
            }
            Ok(chunk) => Err(corrupt("new chunk of another kind", chunk.logical)),
            Err(Error::NoSpace) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether all of these sectors are in use.
    pub fn try_used(&self, run: Run) -> Result<Step<bool>> {
        let range = span(run);
        let chunk = self.chunk_of(&range).ok_or(Error::Unmapped { addr: run.addr })?;
        for (region, part) in ChunkSpace::parts(chunk.sectors_of(range)) {
            match chunk.bits(region) {
                None => return Ok(Step::Load(self.wanted(chunk.start, region))),
                Some(bits) if bits.next_free(part.start) < part.end => {
                    return Ok(Step::Done(false));
                }
                Some(_) => {}
            }
        }
        Ok(Step::Done(true))
    }

    /// Takes exactly these sectors.
    pub fn try_take(&mut self, run: Run, txg: Txg) -> Result<Step<()>> {
        let range = span(run);
        let found = self.chunk_of(&range);
        let chunk = found.ok_or(Error::Unmapped { addr: run.addr })?;
        let (start, sectors) = (chunk.start, chunk.sectors_of(range));
        for (region, part) in ChunkSpace::parts(sectors.clone()) {
            match chunk.bits(region) {
                None => return Ok(Step::Load(self.wanted(start, region))),
                Some(bits) if !bits.is_free(part) => {
                    return Err(corrupt("space named by the log is in use", run.addr));
                }
                Some(_) => {}
            }
        }
        if !self.count(start, sectors.end - sectors.start, true) {
            return Err(corrupt("chunk summary counts more than is used", start));
        }
        let chunk = self.chunks.get_mut(&start).expect("the chunk was there above");
        chunk.occupy(sectors);
        self.note_taken(run, txg)?;
        Ok(Step::Done(()))
    }

    /// Bytes of a kind that the group could be handed out without a new chunk, in blocks of `unit`;
    /// counted up to `enough`.
    pub fn handy(&self, request: &Request, unit: u32, enough: u64, loads: bool) -> Step<u64> {
        let mut bytes = 0;
        for chunk in self.chunks.values().filter(|chunk| State::serves(chunk, request)) {
            if chunk.reach(loads) < unit {
                continue;
            }
            for region in 0..chunk.region_count() {
                let Some(bits) = chunk.bits(region) else {
                    if loads && chunk.region_bound(region) >= unit {
                        return Step::Load(self.wanted(chunk.start, region));
                    }
                    continue;
                };
                let sectors: u32 = bits.free_runs(0).map(|run| run.len - run.len % unit).sum();
                bytes += bytes_of(sectors);
                if bytes >= enough {
                    return Step::Done(bytes);
                }
            }
        }
        Step::Done(bytes)
    }

    // Freeing.

    pub fn free(&mut self, run: Run, txg: Txg) {
        if let Err(error) = self.note_freed(run, txg) {
            self.fault.get_or_insert(error);
        }
    }

    /// Notes that a run is garbage, unless that cannot be.
    pub fn note_freed(&mut self, run: Run, txg: Txg) -> Result<()> {
        let end = run.addr.checked_add(run.bytes);
        let aligned = run.addr.0 % SECTOR_BYTES == 0 && run.bytes % SECTOR_BYTES == 0;
        if end.is_none() || !aligned || run.bytes == 0 {
            return Err(corrupt("freed run is not made of sectors", run.addr));
        }
        if txg <= self.published {
            return Err(corrupt("space freed by a published group", run.addr));
        }
        let range = span(run);
        let chunk = self.chunk_of(&range).ok_or(Error::Unmapped { addr: run.addr })?;
        let kind = chunk.kind;
        let group = self.groups.entry(txg).or_default();
        let before = group.cut.as_ref().is_some_and(|cut| cut.freed.touches(range.clone()));
        if before || group.now.freed.insert(range).is_err() {
            return Err(corrupt("space freed twice by a group", run.addr));
        }
        self.add_pending(kind, run.bytes);
        Ok(())
    }

    /// Makes a range of `releasing` free.
    pub fn vacate(&mut self, range: Range<u64>) {
        let mut at = range.start;
        while at < range.end {
            let end = self.chunk_end(at).min(range.end);
            if let Some(chunk) = self.chunk_of(&(at..end)) {
                let (start, kind) = (chunk.start, chunk.kind);
                let sectors = chunk.sectors_of(at..end);
                let count = sectors.end - sectors.start;
                self.chunks.get_mut(&start).expect("found above").vacate(sectors);
                let pending = &mut self.totals[slot(kind)].pending;
                *pending = pending.saturating_sub(end - at);
                if !self.count(start, count, false) {
                    let lie = corrupt("chunk summary counts less than is used", start);
                    self.fault.get_or_insert(lie);
                }
            }
            at = end;
        }
    }

    // Publishing.

    pub fn publish(&mut self, txg: Txg, residue: &Residue) {
        let group = self.groups.remove(&txg).unwrap_or_default();
        if group.residue(|at| self.chunk_end(at)) != *residue {
            // Too late for this group; but nothing more must be built on it.
            let addr = Logical(0);
            self.fault.get_or_insert(corrupt("residue written is not that of the group", addr));
        }
        self.residue = Arc::new(Deltas {
            taken: group.now.taken.without(&group.now.freed),
            freed: group.now.freed.without(&group.now.taken),
        });
        for (start, used) in group.summaries {
            if let Some(chunk) = self.chunks.get_mut(&start) {
                chunk.tree_used = used;
                chunk.in_tree = true;
            }
        }
        let mut freed = group.now.freed;
        let before = group.cut.map(|cut| cut.freed.clone()).unwrap_or_default();
        freed.merge(before).expect("a free after the cut was compared with those before it");
        if !freed.is_empty() {
            self.pending.insert(txg, Freed::new(freed));
        }
        self.dropped.retain(|_, dropped| dropped.txg > txg);
        self.generation += 1;
        self.published = self.published.max(txg);
        self.sealed = self.sealed.max(txg);
    }

    /// Moves what groups up to `txg` freed from pending to releasing; returns its bytes.
    pub fn begin_release(&mut self, txg: Txg) -> u64 {
        while let Some(entry) = self.pending.first_entry().filter(|entry| *entry.key() <= txg) {
            let freed = entry.remove().set;
            if self.releasing.merge(freed).is_err() {
                let fault = corrupt("space freed by two groups", Logical(0));
                self.fault.get_or_insert(fault);
            }
        }
        self.releasing.bytes()
    }

    /// Makes up to `count` ranges free; false when none is left.
    pub fn release_some(&mut self, count: usize) -> bool {
        for _ in 0..count {
            match self.releasing.pop_first() {
                Some(range) => self.vacate(range),
                None => return false,
            }
        }
        true
    }

    // Dropping.

    /// Chunks that are empty as far as the counters know, of kinds that may be dropped.
    pub fn empty_chunks(&self) -> Vec<Logical> {
        let empty = self.chunks.values().filter(|chunk| self.is_idle(chunk));
        empty.map(|chunk| chunk.start).collect()
    }

    /// Whether neither the published group nor a younger one has anything in the chunk.
    fn is_idle(&self, chunk: &ChunkSpace) -> bool {
        chunk.kind != ChunkKind::System && chunk.busy == 0 && chunk.birth <= self.published
    }

    /// Whether an empty chunk can be spared. Its room must not be promised: that the pool makes a
    /// new chunk of its place at once is not relied on. As long as there is unallocated space, room
    /// is kept for a chunk or a sixteenth of the kind, so that chunks do not come and go.
    pub fn may_drop(&self, start: Logical, source: &dyn ChunkSource) -> bool {
        let Some(chunk) = self.chunks.get(&start).filter(|chunk| self.is_idle(chunk)) else {
            return false;
        };
        let totals = self.totals(chunk.kind);
        let left = totals.bytes - totals.busy - chunk.bytes();
        let room = self.room(source);
        let reserve = self.reserve(&room);
        let promised = match chunk.kind {
            ChunkKind::Data => self.promised.data.saturating_add(reserve.data),
            _ => self.promised.metadata().saturating_add(reserve.metadata),
        };
        let dearest = room.chunk_bytes * room.data.copies.max(room.metadata.copies);
        let keep = match room.unallocated < dearest {
            true => 0,
            false => room.chunk_bytes.max(totals.bytes / 16),
        };
        totals.chunks > 1 && left >= promised && left >= keep
    }

    // Accounting.

    pub fn room(&self, source: &dyn ChunkSource) -> Room {
        let side = |kind| Side {
            free: self.totals(kind).bytes - self.totals(kind).busy,
            copies: source.copies(kind).max(1),
        };
        Room {
            chunk_bytes: source.chunk_bytes(),
            unallocated: source.unallocated_bytes(),
            data: side(ChunkKind::Data),
            metadata: side(ChunkKind::Metadata),
        }
    }

    /// Bytes of data on top of all promises that leave the reserve alone.
    pub fn data_left(&self, source: &dyn ChunkSource) -> u64 {
        let room = self.room(source);
        room.data_left(&self.promised, self.reserve(&room))
    }

    /// As [`data_left`](Self::data_left), with what is kept: that is given free when it is wanted.
    pub fn data_to_be_had(&self, source: &dyn ChunkSource) -> u64 {
        let mut room = self.room(source);
        let reserve = self.reserve(&room);
        room.data.free += self.kept(ChunkKind::Data);
        room.metadata.free += self.kept(ChunkKind::Metadata);
        room.data_left(&self.promised, reserve)
    }

    /// Device bytes of the reserve.
    pub fn reserve_device_bytes(&self, room: &Room) -> u64 {
        let reserve = self.reserve(room);
        reserve.data * room.data.copies + reserve.metadata * room.metadata.copies
    }

    /// Bytes of the devices: of chunks, and unallocated.
    pub fn device_bytes(&self, room: &Room) -> u64 {
        let held: u64 = self.totals.iter().map(|totals| totals.device_bytes).sum();
        held.saturating_add(room.unallocated)
    }

    /// What normal operations must leave alone.
    pub fn reserve(&self, room: &Room) -> Reserve {
        let device_bytes = self.device_bytes(room);
        Reserve::of(device_bytes, room.metadata.copies, bytes_of(self.metadata_unit))
    }
}

/// The sectors of a byte range within a window that contains it.
pub(super) fn sectors_in(window: &Range<u64>, part: Range<u64>) -> Range<u32> {
    let sector = |at: u64| ((at - window.start) >> SECTOR_SHIFT) as u32;
    sector(part.start)..sector(part.end)
}

/// Applies what was taken and freed to a bitmap that must be the one before: nothing taken may be
/// used, nothing freed may be free. Returns by how many sectors more, and fewer, are used.
pub(super) fn apply_exact(
    bits: &mut Bits,
    window: &Range<u64>,
    deltas: &Deltas,
) -> Result<(u32, u32)> {
    let (mut more, mut fewer) = (0, 0);
    for part in deltas.taken.within(window.clone()) {
        let (at, sectors) = (Logical(part.start), sectors_in(window, part));
        let count = sectors.end - sectors.start;
        if bits.set(sectors) != count {
            return Err(corrupt("space taken that was in use", at));
        }
        more += count;
    }
    for part in deltas.freed.within(window.clone()) {
        let (at, sectors) = (Logical(part.start), sectors_in(window, part));
        let count = sectors.end - sectors.start;
        if bits.clear(sectors) != count {
            return Err(corrupt("space freed that was not in use", at));
        }
        fewer += count;
    }
    Ok((more, fewer))
}
