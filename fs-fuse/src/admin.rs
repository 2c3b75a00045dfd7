//! What the daemon tells the `cairn` command: the answers of `cairn_host::admin`.

use crate::notify::Kernel;
use cairn_host::admin::{
    DamagedInfo, DeviceChangeInfo, DeviceInfo, DeviceState, Handler, Parts, PastGroupInfo,
    PoolInfo, Reply, Request, ResilverInfo, ScrubChange, ScrubInfo, SpaceInfo, Usage,
};
use cairn_host::changes;
use cairn_host::dedupe;
use cairn_host::parse::format_uuid;
use cairn_host::streams;
use cairn_host::versions::{self, Change};
use fs_core::engine::versions::VersionOp;
use fs_core::engine::{past, DamagedFile, Engine};
use fs_core::error::{Errno, Error};
use fs_core::format::FORMAT_VERSION;
use fs_core::platform::DeviceRef;
use fs_core::space::KindUsage;
use fs_core::vfs::{property, Filesystem, Forest, Volume};
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of names of damaged files that are told at once: a message has a bound.
const DAMAGED_BYTES_MAX: usize = 512 << 10;

/// How long a change waits for operations under way in what it deletes or rolls back. Others that
/// come to it wait meanwhile.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long a subvolume that is to follow a snapshot waits for the kernel to forget it.
const FORGETTING: Duration = Duration::from_millis(500);

/// Answers requests about what is mounted, with options of which `options` are in force; `kernel`
/// is told what changes.
pub fn handler(forest: Arc<Forest>, kernel: Arc<Kernel>, options: Vec<String>) -> Arc<Handler> {
    // One change after another: what one holds off another may let in.
    let changing = Mutex::new(());
    Arc::new(move |request, parts| {
        let volume = forest.base();
        let is_change = match &request {
            Request::Change(_) | Request::ChangeAtSync(_) | Request::ClearErrors => true,
            Request::Scrub(_) | Request::Device(_) => true,
            Request::Info | Request::Df | Request::Sync | Request::Versions(_) => false,
            Request::Properties(_) => false,
            Request::Differences { .. } | Request::Identity(_) | Request::Damaged => false,
            Request::History { .. } => false,
            Request::Receive(_) => true,
            Request::Send(_) => false,
            Request::Dedupe(question) => question.is_change(),
        };
        if is_change && kernel.is_read_only() {
            return Reply::Failed("the pool is mounted read-only".into());
        }
        match request {
            Request::Info => {
                let info = pool_info(volume);
                Reply::Info(PoolInfo {
                    read_only: info.read_only || kernel.is_read_only(),
                    mount_options: options.clone(),
                    ..info
                })
            }
            Request::Df => Reply::Df(space_info(volume.engine())),
            Request::Sync => match volume.sync() {
                Ok(()) => Reply::Synced,
                Err(error) => Reply::Failed(error.to_string()),
            },
            Request::ClearErrors => match volume.engine().clear_errors() {
                Ok(()) => Reply::Changed,
                Err(error) => Reply::Failed(error.to_string()),
            },
            Request::Scrub(change) => {
                let engine = volume.engine();
                let changed = match change {
                    ScrubChange::Start { rate } => engine.start_scrub(rate),
                    ScrubChange::Pause => engine.pause_scrub(),
                    ScrubChange::Resume { rate } => engine.resume_scrub(rate),
                    ScrubChange::Cancel => engine.cancel_scrub(),
                };
                match changed {
                    Ok(()) => Reply::Changed,
                    Err(error) => Reply::Failed(error.to_string()),
                }
            }
            Request::Device(request) => {
                let _one = changing.lock();
                match changes::carry_out(volume.engine(), &request) {
                    Ok(()) => Reply::Changed,
                    Err(sentence) => Reply::Failed(sentence),
                }
            }
            Request::Damaged => {
                let files = volume.engine().damaged_files().into_iter().map(damaged_info);
                let mut bytes = 0;
                let fits = |file: &DamagedInfo| {
                    bytes += file.path.len() + 32;
                    bytes <= DAMAGED_BYTES_MAX
                };
                Reply::Damaged(files.take_while(fits).collect())
            }
            Request::History { data } => match history(volume.engine(), data) {
                Ok(groups) => Reply::History(groups),
                Err(error) => Reply::Failed(error.to_string()),
            },
            Request::Versions(skip) => Reply::Versions {
                base: versions::name_at(volume.engine(), volume.version()),
                next: versions::page(versions::list(volume.engine()), skip),
            },
            Request::Properties(name) => {
                let (engine, base) = (volume.engine(), volume.version());
                Reply::Properties(versions::properties(engine, base, &name))
            }
            Request::Differences { old, new, first } => {
                let base = (volume.engine(), volume.version());
                match versions::differences(base.0, base.1, (&old, &new), first) {
                    Ok(differences) => Reply::Differences(differences),
                    Err(sentence) => Reply::Failed(sentence),
                }
            }
            Request::Identity(name) => {
                match versions::identity(volume.engine(), volume.version(), &name) {
                    Ok(identity) => Reply::Identity(identity),
                    Err(sentence) => Reply::Failed(sentence),
                }
            }
            Request::Send(what) => {
                match streams::send(volume.engine(), volume.version(), &what, parts) {
                    Ok(sent) => Reply::Sent(sent),
                    Err(sentence) => Reply::Failed(sentence),
                }
            }
            Request::Receive(to) => {
                let changes = InUse { forest: &forest, kernel: &kernel, changing: &changing };
                let (engine, base) = (volume.engine(), volume.version());
                match streams::receive(engine, base, &to, parts, &changes) {
                    Ok(received) => Reply::Received(received),
                    Err(sentence) => Reply::Failed(sentence),
                }
            }
            Request::Dedupe(question) => match dedupe::answer(&forest, &question) {
                Ok(answer) => Reply::Dedupe(answer),
                Err(sentence) => Reply::Failed(sentence),
            },
            Request::Change(change) => {
                let _one = changing.lock();
                match carry_out(&forest, &kernel, &change) {
                    Ok(()) => Reply::Changed,
                    Err(sentence) => Reply::Failed(sentence),
                }
            }
            Request::ChangeAtSync(change) => {
                match carry_out_at_sync((&forest, &kernel), &changing, &change, parts) {
                    Ok(()) => Reply::Changed,
                    Err(sentence) => Reply::Failed(sentence),
                }
            }
        }
    })
}

/// Looks at older groups beside the pool that is open: its devices are only read.
fn history(engine: &Engine, data: bool) -> Result<Vec<PastGroupInfo>, Error> {
    let members = engine.store.pool.members().iter().filter(|member| member.is_there());
    let devices: Vec<DeviceRef> = members.map(|member| member.device()).collect();
    let groups = past::history(&devices, &engine.store.platform, data)?;
    Ok(groups.iter().map(PastGroupInfo::of).collect())
}

/// A pool whose subvolumes may be in use.
struct InUse<'a> {
    forest: &'a Forest,
    kernel: &'a Kernel,
    changing: &'a Mutex<()>,
}

impl streams::Changes for InUse<'_> {
    fn change(&self, ops: Vec<VersionOp>) -> Result<Vec<u64>, Error> {
        self.writable()?;
        let _one = self.changing.lock();
        change_all(self.forest, self.kernel, ops)
    }

    fn follow(&self, subvolume: u64, snapshot: u64, root: [u8; 64]) -> Result<(), Error> {
        self.writable()?;
        let _one = self.changing.lock();
        forgotten(self.forest, self.kernel, subvolume)?;
        change_all(self.forest, self.kernel, vec![VersionOp::Follow { snapshot, root }])?;
        Ok(())
    }

    fn writable(&self) -> Result<(), Error> {
        if self.kernel.is_read_only() {
            return Err(Errno::RoFs.into());
        }
        self.forest.base().engine().store.writable()
    }
}

/// Has the kernel forget a subvolume. It does not if somebody uses it, has a file of it open, or
/// wrote to it what has not come here yet.
fn forgotten(forest: &Forest, kernel: &Kernel, subvolume: u64) -> Result<(), Error> {
    if !forest.is_remembered(subvolume) {
        return Ok(());
    }
    let Some((dir, name)) = forest.appears(subvolume) else { return Err(Errno::Busy.into()) };
    let base = forest.base().version();
    let path = forest.base().engine().with_versions(|versions| {
        let name = |id| versions.get(id).map_or(&[][..], |version| &version.name);
        name(subvolume).strip_prefix(name(base)).unwrap_or_default().to_vec()
    });
    let path = Path::new(OsStr::from_bytes(&path));
    if kernel.has_mounts_in(path) {
        return Err(Errno::Busy.into());
    }
    kernel.name_changed(dir.0, &name);
    // It tells of each inode when it gets round to that.
    let begun = Instant::now();
    while forest.is_remembered(subvolume) {
        if begun.elapsed() >= FORGETTING {
            kernel.look_up_again(path);
            return Err(Errno::Busy.into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// As [`carry_out`], of a change that ends nothing, by the next sync of whoever asks: see `syncs`.
fn carry_out_at_sync(
    (forest, kernel): (&Forest, &Kernel),
    changing: &Mutex<()>,
    change: &Change,
    parts: &mut Parts<'_>,
) -> Result<(), String> {
    let (engine, base) = (forest.base().engine(), forest.base().version());
    let ops = versions::plan(engine, base, change)?;
    if !versions::ends(engine, &ops).is_empty() {
        return Err("that is not for a sync to carry out".into());
    }
    let outcome = Arc::new(Mutex::new(None));
    let work = {
        let (engine, ops, outcome) = (engine.clone(), ops.clone(), outcome.clone());
        move || {
            let made = engine.change_versions(ops);
            let is_durable = made.is_ok();
            *outcome.lock() = Some(made);
            is_durable
        }
    };
    let expected = kernel.syncs.expect(parts.peer(), Box::new(work));
    parts.agree().map_err(|error| format!("whoever asked for it is gone: {error}"))?;
    drop(expected);
    let made = {
        let _one = changing.lock();
        let done = outcome.lock().take();
        change_and_tell(forest, kernel, ops, |ops| match done {
            Some(made) => made,
            None => change_undisturbed(forest, ops, &[]),
        })
    };
    made.map(drop).map_err(|error| versions::sentence(&error, change))
}

/// Changes versions, and sees to it that the kernel does not remember what is not so any more.
fn carry_out(forest: &Forest, kernel: &Kernel, change: &Change) -> Result<(), String> {
    let (engine, base) = (forest.base().engine(), forest.base().version());
    let ops = versions::plan(engine, base, change)?;
    if versions::ends(engine, &ops).contains(&base) {
        return Err("that is what is mounted: unmount it, and name the device instead".into());
    }
    let made = change_all(forest, kernel, ops);
    made.map(drop).map_err(|error| versions::sentence(&error, change))
}

fn change_all(forest: &Forest, kernel: &Kernel, ops: Vec<VersionOp>) -> Result<Vec<u64>, Error> {
    let ends: Vec<u64> = versions::ends(forest.base().engine(), &ops);
    if ends.contains(&forest.base().version()) {
        return Err(Errno::Busy.into());
    }
    change_and_tell(forest, kernel, ops, |ops| change_undisturbed(forest, ops, &ends))
}

/// Has operations carried out, and tells the kernel what came of them.
fn change_and_tell(
    forest: &Forest,
    kernel: &Kernel,
    ops: Vec<VersionOp>,
    change: impl FnOnce(Vec<VersionOp>) -> Result<Vec<u64>, Error>,
) -> Result<Vec<u64>, Error> {
    let engine = forest.base().engine();
    let touched = versions::touched(engine, &ops);
    let mut places: Vec<_> = touched.iter().filter_map(|id| forest.appears(*id)).collect();
    let before = unchanging(engine);
    let made = change(ops)?;
    // What the kernel knows of files was to be relied on, or need not be asked for any more.
    let after = unchanging(engine);
    for id in before.symmetric_difference(&after) {
        forest.known(*id).into_iter().for_each(|ino| kernel.distrust_now(ino.0));
    }
    // Snapshots that are gone; space they held comes free when nobody looks into them.
    versions::gone(engine, &touched).into_iter().for_each(|id| forest.let_go(id));
    let shown = touched.into_iter().chain(made.iter().copied());
    places.extend(shown.filter_map(|id| forest.appears(id)));
    for (dir, name) in places {
        kernel.name_changed(dir.0, &name);
    }
    Ok(made)
}

/// The subvolumes that refuse changes.
fn unchanging(engine: &Engine) -> BTreeSet<u64> {
    let subvols = engine.subvols();
    let refuses = subvols.iter().filter(|subvol| subvol.settings().refuses_changes());
    refuses.map(|subvol| subvol.id.0).collect()
}

/// Carries operations out while nobody is in the versions that end with them. If nothing comes of
/// it those are as they were: files stay open, and what is written to them is kept.
fn change_undisturbed(
    forest: &Forest,
    ops: Vec<VersionOp>,
    ends: &[u64],
) -> Result<Vec<u64>, Error> {
    let engine = forest.base().engine();
    engine.store.writable()?;
    let begun = Instant::now();
    let follows = ops.iter().any(|op| matches!(op, VersionOp::Follow { .. }));
    let made = loop {
        if forest.hold_off(ends) {
            // Somebody may have come back since it was forgotten.
            if follows && ends.iter().any(|id| forest.is_remembered(*id)) {
                break Err(Errno::Busy.into());
            }
            break engine.change_versions(ops);
        }
        if begun.elapsed() >= PATIENCE {
            break Err(Errno::Busy.into());
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    match &made {
        Ok(_) => ends.iter().for_each(|id| forest.let_go(*id)),
        Err(_) => forest.let_in(ends),
    }
    made
}

fn pool_info(volume: &Volume) -> PoolInfo {
    let engine = volume.engine();
    let (_, superblock) = engine.published();
    let settings = engine.settings();
    let devices = device_infos(engine);
    PoolInfo {
        name: String::from_utf8_lossy(&volume.label()).trim_end_matches('\0').to_string(),
        id: format_uuid(&superblock.pool_id),
        format_version: FORMAT_VERSION,
        features: superblock.features,
        txg: superblock.txg.0,
        written: superblock.written,
        clean: false,
        read_only: engine.store.is_read_only() || engine.store.has_failed(),
        has_stopped: engine.store.has_failed(),
        mount_options: Vec::new(),
        node_bytes: superblock.node_bytes,
        chunk_bytes: superblock.chunk_bytes,
        data_profile: superblock.data_profile.name().into(),
        metadata_profile: superblock.metadata_profile.name().into(),
        compression: property::compression_name(settings.compression, settings.level),
        checksum: property::checksum_name(settings.checksum).into(),
        device_count: devices.len() as u16,
        devices,
        scrub: engine.scrub_status().map(|status| Box::new(ScrubInfo::of(&status))),
        device_change: engine.device_change().map(|status| Box::new(DeviceChangeInfo::of(&status))),
        is_split: false,
        damaged_count: engine.damaged_files().len() as u64,
        damaged: Vec::new(),
        resilver: engine.resilver_progress().map(|progress| ResilverInfo {
            done_bytes: progress.done_bytes,
            total_bytes: progress.total_bytes,
            waits: progress.waits,
        }),
    }
}

fn damaged_info(file: DamagedFile) -> DamagedInfo {
    let path = String::from_utf8_lossy(&file.path).into_owned();
    DamagedInfo { subvol: file.tree.0, ino: file.ino.0, path }
}

fn device_infos(engine: &Engine) -> Vec<DeviceInfo> {
    let pool = &engine.store.pool;
    let chunks = pool.chunks();
    let allocated = |index: u16| {
        chunks
            .iter()
            .map(|chunk| {
                let here = chunk.stripes.iter().filter(|stripe| stripe.device == index).count();
                chunk.stripe_bytes().saturating_mul(here as u64)
            })
            .sum()
    };
    pool.members()
        .iter()
        .filter(|member| !member.is_vacant())
        .map(|member| {
            let (identity, errors) = (member.identity(), member.errors());
            DeviceInfo {
                index: member.index(),
                name: member.name(),
                state: DeviceState::of(member.standing()),
                id: format_uuid(&identity.device_id),
                bytes: identity.bytes,
                allocated: Some(allocated(member.index())),
                read_errors: errors.read,
                write_errors: errors.write,
                checksum_errors: errors.checksum,
            }
        })
        .collect()
}

fn space_info(engine: &Engine) -> SpaceInfo {
    let pool = &engine.store.pool;
    let space = engine.store.space.usage();
    let items: Vec<_> = engine.subvols().iter().map(|subvol| subvol.item()).collect();
    let of_kind = |kind: &KindUsage| Usage { total: kind.chunk_bytes, used: kind.used_bytes };
    SpaceInfo {
        device_bytes: pool.device_bytes(),
        device_allocated: pool
            .chunks()
            .iter()
            .map(|chunk| chunk.stripe_bytes().saturating_mul(chunk.stripes.len() as u64))
            .sum(),
        unallocated: space.unallocated_bytes,
        data: of_kind(&space.data),
        metadata: of_kind(&space.metadata),
        system: of_kind(&space.system),
        reserve: space.reserve_bytes,
        pending_free: space.data.pending_bytes
            + space.metadata.pending_bytes
            + space.system.pending_bytes,
        available: Some(engine.room().available),
        stored_bytes: Some(items.iter().map(|item| item.stored_bytes).sum()),
        logical_bytes: Some(items.iter().map(|item| item.logical_bytes).sum()),
    }
}
