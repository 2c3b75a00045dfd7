//! Streams: sending snapshots, receiving them, and looking at what a stream holds. Done by an
//! engine, be it the daemon's or one that a command has opened; what a stream is made of is told in
//! `docs/stream.md`.
//!
//! Several streams may follow each other in one: a subvolume with all its snapshots, each going on
//! from the one before.

use crate::parse::format_uuid;
use crate::properties;
use crate::versions::{self, VersionName};
use fs_core::engine::versions::{PropertyChange, VersionOp};
use fs_core::engine::Engine;
use fs_core::error::{Errno, Error};
use fs_core::format::pool::SubvolItem;
use fs_core::platform::{Codecs, Timestamp};
use fs_core::receive::{content_after, content_of, is_untouched, Destination, Receiver};
use fs_core::stream::record::{Begin, Decoder, Encoder, Mark, Record, FOLLOWED, PROPERTIES};
use fs_core::stream::send::{Parent, Sender, Shipment};
use fs_core::stream::verify::Verifier;
use fs_core::stream::{Content, Identity};
use fs_core::subvol::versions::Versions;
use fs_core::subvol::Subvol;
use fs_core::units::{TreeId, Txg};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::io::{self, BufWriter, ErrorKind, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of a stream that are written at once.
const WRITE_BYTES: usize = 256 << 10;

/// What to send.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sending {
    /// The snapshot.
    pub snapshot: VersionName,
    /// The snapshot that the receiver has.
    pub from: Option<VersionName>,
    /// Send all snapshots of the subvolume in between as well, or all that are older; so of all
    /// subvolumes below that have a snapshot of that name; and the properties of all.
    pub replicate: bool,
    /// Go on with what a receiver has a part of, instead of all that.
    pub token: Option<String>,
}

/// Where a sender can go on after a receiver broke off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Token {
    /// The snapshot, as the sender knows it.
    snapshot: [u8; 16],
    /// The snapshot that the receiver has, and the identity of its content.
    base: Option<([u8; 16], [u8; 32])>,
    /// The inode to go on with, and where in its data.
    next: (u64, u64),
}

impl Token {
    /// What was received in part in a subvolume.
    fn of(engine: &Engine, working: u64) -> Result<Token, Error> {
        let Mark { ino, offset } = fs_core::receive::position(engine, working)?;
        engine.with_versions(|all| {
            let item = all.get(working).map(|version| version.item);
            let item = item.ok_or(Error::Posix(Errno::NoEnt))?;
            let base = all.get(item.parent).map(|base| {
                let sent = [base.item.origin, base.item.id];
                let id = sent.into_iter().find(|id| *id != [0; 16]).unwrap_or_default();
                (id, base.item.content)
            });
            Ok(Token { snapshot: item.origin, base, next: (ino, offset) })
        })
    }

    fn encode(&self) -> String {
        let mut all =
            bincode::serde::encode_to_vec(self, bincode::config::standard()).unwrap_or_default();
        all.extend_from_slice(&crc32c::crc32c(&all).to_le_bytes());
        all.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn decode(text: &str) -> Result<Token, String> {
        let wrong = || "this is not a token of cairn receive, or not all of it".to_string();
        let digits = text.trim().as_bytes().chunks(2);
        let byte = |digits: &[u8]| {
            let digits = std::str::from_utf8(digits).ok().filter(|digits| digits.len() == 2)?;
            u8::from_str_radix(digits, 16).ok()
        };
        let all: Vec<u8> = digits.map(byte).collect::<Option<_>>().ok_or_else(wrong)?;
        let (body, sum) = all.split_last_chunk::<4>().ok_or_else(wrong)?;
        if crc32c::crc32c(body) != u32::from_le_bytes(*sum) {
            return Err(wrong());
        }
        let limits = bincode::config::standard().with_limit::<1024>();
        // It comes from another machine.
        match bincode::serde::decode_from_slice::<Token, _>(body, limits) {
            Ok((token, used)) if used == body.len() => {
                let (ino, offset) = token.next;
                let mark = Mark::decode(&Mark { ino, offset }.encode());
                mark.map(|_| token).map_err(|_| wrong())
            }
            _ => Err(wrong()),
        }
    }

    /// The snapshot that it names, and the one that the receiver has.
    fn find(&self, engine: &Engine) -> Result<(u64, Option<u64>), String> {
        engine.with_versions(|all| {
            let there = || {
                all.iter()
                    .filter(|(_, version)| version.item.is_snapshot() && !version.item.is_deleted())
            };
            let find =
                |id: [u8; 16]| there().find(|(_, version)| version.item.id == id).map(|(id, _)| id);
            let what = "the snapshot that the token goes on with is not here";
            let snapshot = find(self.snapshot).ok_or(what)?;
            let base = match self.base {
                None => None,
                Some((id, content)) => {
                    let same = || {
                        let is_same =
                            |item: &SubvolItem| content != [0; 32] && item.content == content;
                        there().find(|(_, version)| is_same(&version.item)).map(|(id, _)| id)
                    };
                    let what = "the snapshot that the receiver goes on from is not here any more";
                    Some(find(id).or_else(same).ok_or(what)?)
                }
            };
            Ok((snapshot, base))
        })
    }
}

/// Adds to what is being received where it can be gone on with.
pub(crate) fn add_tokens(engine: &Engine, all: &mut [crate::versions::VersionInfo]) {
    for info in all.iter_mut().filter(|info| info.is_receiving) {
        info.token = Token::of(engine, info.number).ok().map(|token| token.encode());
    }
}

/// What was sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sent {
    /// How many snapshots.
    pub snapshots: u64,
    /// Bytes of the stream.
    pub bytes: u64,
    /// Subvolumes below that were not sent: they have no snapshot of that name.
    pub left_out: Vec<String>,
}

/// What was received.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Received {
    /// The snapshots, with the identities of their contents: the last of them if they are many.
    pub snapshots: Vec<(String, String)>,
    /// How many came before those.
    pub earlier: u64,
    /// Subvolumes that are in use, or were changed since their newest snapshot, and so stay as they
    /// are.
    pub stays: Vec<String>,
}

/// What one stream holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamInfo {
    /// Name of the snapshot.
    pub snapshot: String,
    /// Its id, as `blkid` writes ids.
    pub id: String,
    /// When it was made, seconds since 1970.
    pub created: i64,
    /// The subvolume, from the one that the first stream is of; empty for that.
    pub below: String,
    /// Names and values of properties that come with it, if they do.
    pub properties: Option<Vec<(String, String)>>,
    /// Id of the snapshot that the stream goes on from.
    pub base: Option<String>,
    /// Identity of the content of that.
    pub base_identity: Option<String>,
    /// The stream goes on where another broke off, with this inode.
    pub resumes: Option<u64>,
    /// Identity of the content.
    pub identity: String,
    /// How many elements the content has.
    pub elements: u64,
    /// Inodes that are new or differ.
    pub inodes: u64,
    /// Inodes that went.
    pub gone: u64,
    /// Names that came.
    pub names: u64,
    /// Names that went, but for those in directories that went.
    pub unnamed: u64,
    /// Attributes that came or have another value.
    pub attributes: u64,
    /// Bytes of data.
    pub data_bytes: u64,
    /// Bytes that became holes.
    pub hole_bytes: u64,
    /// Bytes that other files of the stream, or of what it goes on from, have.
    pub cloned_bytes: u64,
    /// Records.
    pub records: u64,
    /// Bytes of the stream.
    pub bytes: u64,
}

/// How changes of versions are carried out where a pool may be in use.
pub trait Changes {
    /// Carries operations out while nobody is in what ends with them.
    ///
    /// # Errors
    /// Those of [`Engine::change_versions`].
    fn change(&self, ops: Vec<VersionOp>) -> Result<Vec<u64>, Error>;

    /// Lets a subvolume follow a snapshot of it if nobody is using it and its tree still has that
    /// root.
    ///
    /// # Errors
    /// EBUSY when somebody is, or it has not; those of [`Engine::change_versions`].
    fn follow(&self, subvolume: u64, snapshot: u64, root: [u8; 64]) -> Result<(), Error>;

    /// Whether changes are allowed at all, any more.
    ///
    /// # Errors
    /// EROFS.
    fn writable(&self) -> Result<(), Error>;
}

/// How often is asked whether the pool still takes changes: the kernel does not tell.
const ASK_EVERY: Duration = Duration::from_millis(200);
/// Snapshots that are told of one by one: an answer has a bound.
const TOLD_MAX: usize = 1000;
/// And subvolumes that are not sent.
const LEFT_OUT_MAX: usize = 100;

impl Received {
    fn add(&mut self, name: String, identity: String) {
        if self.snapshots.len() >= 2 * TOLD_MAX {
            self.snapshots.drain(..TOLD_MAX);
            self.earlier += TOLD_MAX as u64;
        }
        self.snapshots.push((name, identity));
    }
}

impl Changes for Engine {
    fn change(&self, ops: Vec<VersionOp>) -> Result<Vec<u64>, Error> {
        self.change_versions(ops)
    }

    fn follow(&self, _: u64, snapshot: u64, root: [u8; 64]) -> Result<(), Error> {
        self.change_versions(vec![VersionOp::Follow { snapshot, root }]).map(drop)
    }

    fn writable(&self) -> Result<(), Error> {
        self.store.writable()
    }
}

/// Counts what goes through.
struct Counted<'a> {
    out: BufWriter<&'a mut dyn Write>,
    bytes: u64,
}

impl Counted<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.bytes += bytes.len() as u64;
        self.out.write_all(bytes).map_err(written)
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn written(error: io::Error) -> String {
    format!("the stream could not be written: {error}")
}

/// A snapshot that is sent, or that the receiver has.
struct Known {
    id: u64,
    item: SubvolItem,
    subvol: Arc<Subvol>,
    content: Content,
}

impl Known {
    fn open(engine: &Engine, id: u64, after: Option<&Known>) -> Result<Known, Error> {
        let subvol = engine.open_version(id)?;
        let content = match after {
            Some(old) => {
                let old = (&old.subvol.view().tree, &old.content);
                content_after(engine, old, id, &mut |_| Ok(()))?
            }
            None => content_of(engine, id, &mut |_| Ok(()))?,
        };
        Ok(Known { id, item: subvol.item(), subvol, content })
    }
}

/// Writes a stream of a snapshot, or several. Names are as for [`versions::plan`].
///
/// # Errors
/// One sentence.
pub fn send(
    engine: &Engine,
    base: u64,
    what: &Sending,
    out: &mut dyn Write,
) -> Result<Sent, String> {
    let token = what.token.as_deref().map(Token::decode).transpose()?;
    let (last, from) = match &token {
        Some(token) => token.find(engine)?,
        None => {
            let from = what.from.as_ref();
            let from = from.map(|from| versions::snapshot(engine, base, from)).transpose()?;
            (versions::snapshot(engine, base, &what.snapshot)?, from)
        }
    };
    let resumes = token.map(|token| Mark { ino: token.next.0, offset: token.next.1 });
    let shown = engine.with_versions(|all| versions::name_of(all, last));
    let shown = shown.unwrap_or_else(|| what.snapshot.clone());
    let said = |error: Error| versions::said(&error, &shown);
    let mut out = Counted { out: BufWriter::with_capacity(WRITE_BYTES, out), bytes: 0 };
    let mut sent = Sent::default();
    let (legs, mut left_out) = legs(engine, (from, last), what)?;
    if left_out.len() > LEFT_OUT_MAX {
        let more = left_out.len() - LEFT_OUT_MAX;
        left_out.truncate(LEFT_OUT_MAX);
        left_out.push(format!("... ({more} more)"));
    }
    sent.left_out = left_out;
    let count: usize = legs.iter().map(|leg| leg.ids.len()).sum();
    for leg in &legs {
        let mut old = leg.from.map(|id| Known::open(engine, id, None)).transpose().map_err(said)?;
        for id in &leg.ids {
            let new = Known::open(engine, *id, old.as_ref()).map_err(said)?;
            let tree = |known: &Known| known.subvol.view().tree.id;
            if let Some(old) = old.as_ref().filter(|old| tree(old) != tree(&new)) {
                let name = |known: &Known| {
                    engine.with_versions(|all| versions::name_of(all, known.id)).unwrap_or_default()
                };
                let (from, to) = (name(old), name(&new));
                return Err(format!("{from} and {to} do not go back to one subvolume"));
            }
            sent.snapshots += 1;
            let is_followed = (sent.snapshots as usize) < count;
            let tells = what.replicate && what.token.is_none();
            let how = How { is_followed, resumes, below: &leg.below, tells };
            send_one(engine, old.as_ref(), (&new, how), &mut out, &said)?;
            old = Some(new);
        }
    }
    out.out.flush().map_err(written)?;
    sent.bytes = out.bytes;
    Ok(sent)
}

/// Snapshots of one subvolume.
struct Leg {
    /// The subvolume, from the one that was named; empty for that.
    below: String,
    /// What the first goes on from.
    from: Option<u64>,
    /// The snapshots, the oldest first.
    ids: Vec<u64>,
}

/// The snapshots to send: those of a subvolume before those of what is in it. And the subvolumes
/// that have none to send.
fn legs(
    engine: &Engine,
    (from, last): (Option<u64>, u64),
    what: &Sending,
) -> Result<(Vec<Leg>, Vec<String>), String> {
    if from == Some(last) {
        return Err(format!("{} cannot go on from itself", what.snapshot));
    }
    if !what.replicate || what.token.is_some() {
        return Ok((vec![Leg { below: String::new(), from, ids: vec![last] }], Vec::new()));
    }
    engine.with_versions(|all| {
        let item = |id: u64| all.get(id).map(|version| version.item);
        let name = |id: u64| all.get(id).map(|version| version.name.clone()).unwrap_or_default();
        let owner = item(last).map_or(0, |item| item.owner);
        if from.is_some_and(|from| item(from).map(|item| item.owner) != Some(owner)) {
            return Err("with -R both are snapshots of one subvolume".to_string());
        }
        let ids = between(all, owner, (from, last));
        let ids = ids.ok_or_else(|| format!("{} is the older of the two", what.snapshot))?;
        let mut legs = vec![Leg { below: String::new(), from, ids }];
        let mut left_out = Vec::new();
        let top = name(owner);
        for nested in all.nested(owner) {
            if all.is_receiving(nested) {
                continue;
            }
            let path = name(nested);
            let below = path.strip_prefix(&top[..]).unwrap_or(&path);
            let below = String::from_utf8_lossy(below).trim_matches('/').to_string();
            let newest = all.snapshot(nested, &name(last));
            let oldest = from.and_then(|from| all.snapshot(nested, &name(from)));
            let ids = newest.and_then(|newest| between(all, nested, (oldest, newest)));
            // There would be nothing for it to be in.
            let is_in = |out: &String| below.strip_prefix(out).is_some_and(|r| r.starts_with('/'));
            match ids.filter(|_| !left_out.iter().any(is_in)) {
                Some(ids) => legs.push(Leg { below, from: oldest, ids }),
                None => left_out.push(below),
            }
        }
        let parent = |leg: &Leg| {
            let first = leg.ids.first().filter(|_| leg.from.is_none());
            first.and_then(|id| item(*id)).map_or(0, |item| item.parent)
        };
        Ok((in_order(legs, &parent), left_out))
    })
}

/// Puts subvolumes behind what they lie in, and clones behind what they were cloned from, which
/// they go on from then. `parent` tells what the first snapshot of a leg goes on from; zero for
/// nothing.
fn in_order(legs: Vec<Leg>, parent: &dyn Fn(&Leg) -> u64) -> Vec<Leg> {
    let all: BTreeSet<u64> = legs.iter().flat_map(|leg| leg.ids.iter().copied()).collect();
    let names: BTreeSet<String> = legs.iter().map(|leg| leg.below.clone()).collect();
    let (mut sent, mut placed) = (BTreeSet::new(), BTreeSet::new());
    let (mut left, mut out) = (legs, Vec::new());
    while !left.is_empty() {
        let mut later = Vec::new();
        let before = out.len();
        // Of a clone that what it was cloned from lies in, that cannot be said.
        let mut in_circle = false;
        loop {
            for mut leg in left.drain(..) {
                let above = leg.below.rsplit_once('/').map_or("", |(above, _)| above);
                let is_in =
                    !names.contains(above) || placed.contains(above) || leg.below.is_empty();
                let origin = parent(&leg);
                let waits = all.contains(&origin) && !sent.contains(&origin) && !in_circle;
                if !is_in || waits {
                    later.push(leg);
                    continue;
                }
                if sent.contains(&origin) {
                    leg.from = Some(origin);
                }
                in_circle = false;
                sent.extend(leg.ids.iter().copied().chain(leg.from));
                placed.insert(leg.below.clone());
                out.push(leg);
            }
            if out.len() > before || in_circle {
                break;
            }
            (in_circle, left) = (true, std::mem::take(&mut later));
        }
        left = later;
    }
    out
}

/// Snapshots of a subvolume up to one, behind another if there is one; none when that is not older.
fn between(all: &Versions, owner: u64, (from, last): (Option<u64>, u64)) -> Option<Vec<u64>> {
    let mut ids = all.snapshots(owner);
    let place = |id: u64| ids.iter().position(|other| *other == id);
    let begin = match from {
        None => 0,
        Some(from) => place(from)? + 1,
    };
    let end = place(last).filter(|end| *end >= begin)?;
    ids.truncate(end + 1);
    Some(ids.split_off(begin))
}

/// How a stream begins and ends.
#[derive(Clone, Copy)]
struct How<'a> {
    is_followed: bool,
    resumes: Option<Mark>,
    /// The subvolume, from the one that was named.
    below: &'a str,
    /// Properties are told.
    tells: bool,
}

fn send_one(
    engine: &Engine,
    old: Option<&Known>,
    (new, how): (&Known, How<'_>),
    out: &mut Counted<'_>,
    said: &dyn Fn(Error) -> String,
) -> Result<(), String> {
    let name = engine.with_versions(|all| all.get(new.id).map(|version| version.name.clone()));
    let name = name.filter(|name| !name.is_empty()).ok_or("the snapshot was deleted")?;
    let base = old.map(|old| Parent {
        id: old.item.id,
        identity: old.content.identity(),
        tree: old.subvol.view().tree,
    });
    let properties = how.tells.then(|| engine.with_versions(|all| properties::chosen(all, new.id)));
    let shipment = Shipment {
        below: how.below.as_bytes(),
        properties: properties.as_deref(),
        id: new.item.id,
        created: Timestamp { secs: new.item.created, nanos: 0 },
        name: &name,
        tree: new.subvol.view().tree,
        tree_bytes: new.item.tree_bytes,
        content: &new.content,
        base,
        is_followed: how.is_followed,
        resumes: how.resumes,
    };
    let mut sender = Sender::new(&engine.store, &shipment);
    let mut encoder = Encoder::default();
    let codecs = &*engine.store.platform.codecs;
    while let Some(record) = sender.next_record().map_err(said)? {
        out.put(&encoder.put(codecs, &record))?;
    }
    Ok(())
}

/// Reads the records of streams that follow each other.
struct Records<'a> {
    codecs: &'a dyn Codecs,
    input: &'a mut dyn Read,
    decoder: Decoder,
    buf: Vec<u8>,
    /// Bytes of the streams before.
    before: u64,
    /// The stream says that another follows it.
    is_followed: bool,
}

impl<'a> Records<'a> {
    fn new(codecs: &'a dyn Codecs, input: &'a mut dyn Read) -> Records<'a> {
        Records {
            codecs,
            input,
            decoder: Decoder::default(),
            buf: Vec::new(),
            before: 0,
            is_followed: false,
        }
    }

    /// The next record and where it begins; `None` at the end of a stream.
    fn next(&mut self) -> Result<Option<(Record, u64)>, String> {
        loop {
            let need = self.decoder.need();
            if need == 0 {
                return Ok(None);
            }
            let at = self.decoder.position().bytes;
            self.buf.resize(need, 0);
            self.input.read_exact(&mut self.buf).map_err(|error| match error.kind() {
                ErrorKind::UnexpectedEof if self.before + at == 0 => "there is no stream".into(),
                ErrorKind::UnexpectedEof => {
                    format!("the stream is cut off: it ends within the record at byte {at}")
                }
                _ => format!("the stream could not be read: {error}"),
            })?;
            let taken = self.decoder.take(self.codecs, &self.buf);
            if let Ok(Some(Record::Begin(begin))) = &taken {
                self.is_followed = begin.compat & FOLLOWED != 0;
            }
            if let Some(record) = taken.map_err(|error| error.to_string())? {
                return Ok(Some((record, at)));
            }
        }
    }

    /// Goes on to the stream behind one that has ended; false when nothing is behind it.
    fn go_on(&mut self) -> Result<bool, String> {
        self.before += self.decoder.position().bytes;
        self.decoder = Decoder::default();
        let mut first = [0];
        let found = loop {
            match self.input.read(&mut first) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                other => break other.map_err(|e| format!("the stream could not be read: {e}"))?,
            }
        };
        if found == 0 {
            return match self.is_followed {
                true => Err("the stream is cut off: newer snapshots should follow".into()),
                false => Ok(false),
            };
        }
        // The first byte of its header.
        let need = self.decoder.need();
        self.buf.resize(need, 0);
        self.buf[0] = first[0];
        self.input.read_exact(&mut self.buf[1..]).map_err(|_| "something follows the stream")?;
        let taken = self.decoder.take(self.codecs, &self.buf);
        taken.map(|_| true).map_err(|error| format!("something follows the stream: {error}"))
    }

    fn begin(&mut self) -> Result<Box<Begin>, String> {
        match self.next()? {
            Some((Record::Begin(begin), _)) => Ok(begin),
            _ => Err("the stream has no beginning".into()),
        }
    }
}

/// Reads streams to their end, and tells what they hold. What can be known of them without
/// receiving them is verified.
///
/// # Errors
/// One sentence.
pub fn look(codecs: &dyn Codecs, input: &mut dyn Read) -> Result<Vec<StreamInfo>, String> {
    let mut records = Records::new(codecs, input);
    let mut all = Vec::new();
    loop {
        let mut verifier = Verifier::default();
        let (mut identity, mut elements, mut told) = (String::new(), 0, Vec::new());
        while let Some((record, at)) = records.next()? {
            match &record {
                Record::End { identity: of, elements: count } => {
                    (identity, elements) = (of.to_string(), *count);
                }
                Record::Property { name, value } => told.push((text(name), text(value))),
                _ => {}
            }
            verifier.take(codecs, &record, at).map_err(|error| error.to_string())?;
        }
        let (summary, position) = (verifier.summary(), records.decoder.position());
        let begin = verifier.begin().ok_or("the stream has no beginning")?;
        all.push(StreamInfo {
            snapshot: text(&begin.name),
            below: text(&begin.below),
            properties: (begin.compat & PROPERTIES != 0).then_some(told),
            id: format_uuid(&begin.id),
            created: begin.created.secs,
            base: begin.base.as_ref().map(|base| format_uuid(&base.id)),
            base_identity: begin.base.as_ref().map(|base| base.identity.to_string()),
            resumes: begin.resumes.map(|mark| mark.ino),
            identity,
            elements,
            inodes: summary.inodes,
            gone: summary.gone,
            names: summary.names,
            unnamed: summary.unnamed,
            attributes: summary.attributes,
            data_bytes: summary.data_bytes,
            hole_bytes: summary.hole_bytes,
            cloned_bytes: summary.cloned_bytes,
            records: position.records,
            bytes: position.bytes,
        });
        if !records.go_on()? {
            return Ok(all);
        }
    }
}

/// Receives streams in a subvolume, which the first makes if it is a full one.
///
/// # Errors
/// One sentence. Snapshots of streams before the one that failed stay.
pub fn receive(
    engine: &Arc<Engine>,
    base: u64,
    to: &VersionName,
    input: &mut dyn Read,
    changes: &dyn Changes,
) -> Result<Received, String> {
    let codecs = engine.store.platform.codecs.clone();
    let mut records = Records::new(&*codecs, input);
    let (mut received, mut follows) = (Received::default(), Vec::new());
    let all = receive_all(engine, (base, to), &mut records, changes, (&mut received, &mut follows));
    // Once, to the newest: to follow is a burden for whoever uses the subvolume.
    for Following { into, snapshot, name } in follows {
        if !go_on(engine, into, snapshot, changes) {
            received.stays.push(name);
        }
    }
    all.map(|()| received)
}

/// A subvolume that may follow to a snapshot of it.
struct Following {
    into: u64,
    snapshot: u64,
    /// What the subvolume is called.
    name: String,
}

/// Receives one after the other. Notes what came, and the newest snapshots that subvolumes may
/// follow to.
fn receive_all(
    engine: &Arc<Engine>,
    (base, to): (u64, &VersionName),
    records: &mut Records<'_>,
    changes: &dyn Changes,
    (received, follows): (&mut Received, &mut Vec<Following>),
) -> Result<(), String> {
    loop {
        let begin = records.begin()?;
        let to = &below(to, &begin);
        let shown = VersionName { snapshot: Some(text(&begin.name)), ..to.clone() };
        if let Some(identity) = already(engine, base, to, &begin) {
            pass_over(records, &begin, identity)?;
            received.add(shown.to_string(), Identity(identity).to_string());
            if !records.go_on()? {
                return Ok(());
            }
            continue;
        }
        let origin = origin(engine, &begin);
        let destination = versions::destination(engine, base, to, begin.base.is_some(), origin)?;
        let said = |error: Error| versions::said(&error, &shown);
        let receiver = Receiver::begin(engine, &destination, &begin, &mut |_| Ok(()));
        let receiver = receiver.map_err(said)?;
        let mut attempt = Attempt { engine, changes, working: Some(receiver.working()) };
        let mut receiver = receiver;
        let mut told = Vec::new();
        match take_all(&mut receiver, records, changes, &mut told) {
            Ok(()) => {}
            // What is wrong with the stream does not change when it is sent again; the rest may.
            Err(Stop::Refused(error @ (Error::Stream { .. } | Error::Argument { .. }))) => {
                return Err(said(error))
            }
            Err(Stop::Refused(error)) => return Err(attempt.keep(receiver, &said(error), to)),
            Err(Stop::BrokenOff(why)) => return Err(attempt.keep(receiver, &why, to)),
        }
        let mut arrival = receiver.finish(&mut |_| Ok(())).map_err(said)?;
        let identity = Identity(arrival.identity).to_string();
        arrival.choices = Some(told).filter(|_| begin.compat & PROPERTIES != 0);
        let published = changes.change(vec![VersionOp::Publish(*arrival)]).map_err(said)?;
        attempt.working = None;
        let id = published.first().copied().unwrap_or(0);
        if let Destination::Existing(into) = destination {
            follows.retain(|other: &Following| other.into != into);
            follows.push(Following { into, snapshot: id, name: to.to_string() });
        }
        received.add(shown.to_string(), identity);
        if !records.go_on()? {
            return Ok(());
        }
    }
}

/// Where a stream goes when several go to a place.
fn below(to: &VersionName, begin: &Begin) -> VersionName {
    if begin.below.is_empty() {
        return to.clone();
    }
    let below = text(&begin.below);
    let subvolume = match to.subvolume.as_str() {
        "" => below,
        above => format!("{above}/{below}"),
    };
    VersionName { subvolume, ..to.clone() }
}

/// The subvolume that has what a stream goes on from, if that is of another subvolume than the
/// stream is of: that was cloned.
fn origin(engine: &Engine, begin: &Begin) -> Option<u64> {
    let wanted = begin.base.filter(|_| !begin.below.is_empty())?;
    engine.with_versions(|all| {
        let is_it = |item: &SubvolItem| {
            let is_named = item.origin == wanted.id || item.id == wanted.id;
            item.is_snapshot() && !item.is_deleted() && is_named
        };
        let mut there = all.iter().filter(|(_, version)| is_it(&version.item));
        there.next().map(|(_, version)| version.item.owner)
    })
}

/// The identity of a snapshot that was received before, or that went out from here.
fn already(engine: &Engine, base: u64, to: &VersionName, begin: &Begin) -> Option<[u8; 32]> {
    let subvolume = versions::subvolume(engine, base, to)?;
    engine.with_versions(|all| {
        let item = all.get(all.snapshot(subvolume, &begin.name)?)?.item;
        let is_it = begin.id == item.origin || begin.id == item.id;
        (is_it && item.content != [0; 32]).then_some(item.content)
    })
}

/// Reads a stream that brings what is there already.
fn pass_over(records: &mut Records<'_>, begin: &Begin, identity: [u8; 32]) -> Result<(), String> {
    let mut found = None;
    while let Some((record, _)) = records.next()? {
        if let Record::End { identity: Identity(identity), .. } = record {
            found = Some(identity);
        }
    }
    match found == Some(identity) {
        true => Ok(()),
        false => {
            let name = String::from_utf8_lossy(&begin.name);
            Err(format!("@{name} is here already, and holds something else than the stream says"))
        }
    }
}

/// Deletes what has been received of a snapshot unless it became one, whatever happens.
struct Attempt<'a> {
    engine: &'a Engine,
    changes: &'a dyn Changes,
    working: Option<u64>,
}

impl Attempt<'_> {
    /// The stream broke off: keeps what came of it, if that is anything, and says how to go on.
    fn keep(&mut self, receiver: Receiver, why: &str, to: &VersionName) -> String {
        let Some(working) = self.working else { return why.into() };
        let paused = match self.changes.writable() {
            Ok(()) => receiver.pause(),
            Err(_) => {
                drop(receiver);
                Ok(())
            }
        };
        let token = paused.and_then(|()| Token::of(self.engine, working));
        match token {
            Ok(token) if token.next.0 > 0 => {
                self.working = None;
                let token = token.encode();
                format!(
                    "{why}; what came before is kept: go on with cairn send -t {token}, or delete \
                     what cairn subvolume list shows as receiving in {to}"
                )
            }
            _ => why.into(),
        }
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        let Some(id) = self.working else { return };
        let is_left = self.engine.with_versions(|versions| versions.is_receiving(id));
        if is_left && self.changes.writable().is_ok() {
            // If that fails it stays hidden until somebody deletes it or tries again. Why it could
            // not be received is what has to be told.
            let _ = self.engine.change_versions(vec![VersionOp::Delete { id }]);
        }
    }
}

/// Why a stream is not received to its end.
enum Stop {
    /// It ends too early, or cannot be read.
    BrokenOff(String),
    /// What it says cannot be.
    Refused(Error),
}

fn take_all(
    receiver: &mut Receiver,
    records: &mut Records<'_>,
    changes: &dyn Changes,
    told: &mut Vec<PropertyChange>,
) -> Result<(), Stop> {
    let mut asked = Instant::now();
    while let Some((record, at)) = records.next().map_err(Stop::BrokenOff)? {
        if let Record::Property { name, value } = &record {
            let (name, value) = (text(name), text(value));
            let what = "a property with a value that it cannot have";
            let change = properties::told(&name, &value);
            told.extend(change.map_err(|_| Stop::Refused(Error::Stream { what, at }))?);
        }
        if asked.elapsed() >= ASK_EVERY {
            changes.writable().map_err(Stop::Refused)?;
            asked = Instant::now();
        }
        receiver.take(record, at).map_err(Stop::Refused)?;
    }
    Ok(())
}

/// Lets a subvolume go on from a snapshot of it that was received, if it is what an older one is.
/// False when it was changed or is in use: it stays as it is then, and nothing is lost.
fn go_on(engine: &Engine, into: u64, snapshot: u64, changes: &dyn Changes) -> bool {
    let try_to = || -> Result<bool, Error> {
        if !engine.store.is_read_only() {
            engine.commit()?;
        }
        let parent = engine.with_versions(|all| {
            let parent = all.get(into).map_or(0, |version| version.item.parent);
            is_above(all, parent, snapshot).then_some(parent)
        });
        let Some(parent) = parent else { return Ok(false) };
        if parent == snapshot {
            return Ok(true);
        }
        let root = {
            let was = engine.open_version(parent)?;
            let Some(head) = engine.subvol(TreeId(into)) else { return Ok(false) };
            let (was, view, item) = (was.view(), head.view(), head.item());
            let root = item.root(Txg(u64::MAX)).map_err(|bad| bad.in_item(TreeId::POOL, into))?;
            // A group may have come between the two.
            if root != view.tree.root || !is_untouched(engine, &was.tree, &view.tree)? {
                return Ok(false);
            }
            item.root
        };
        changes.follow(into, snapshot, root).map(|()| true)
    };
    // It was received; the rest is a convenience.
    try_to().unwrap_or(false)
}

/// Whether a version goes on from another, however many come between.
fn is_above(all: &Versions, above: u64, mut id: u64) -> bool {
    // Parents of snapshots descend.
    while id != 0 && id != above {
        id = all.get(id).map_or(0, |version| version.item.parent);
    }
    above != 0 && id == above
}
