//! Programs that people use, each doing what it is used for.

use super::Suite;
use crate::guard::{self, Guard};
use crate::run::Cmd;
use crate::steps::Outcome;
use crate::{checkout, need};
use anyhow::{bail, ensure, Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Unpacks a C library and builds it, then builds the filesystem's own core, all on the mount.
///
/// # Errors
/// When a build fails or its result does not work.
pub fn build(suite: &Suite<'_>) -> Result<Outcome> {
    need::tools(&[("cc", "gcc"), ("make", "make"), ("ar", "binutils")])?;
    let volume = suite.volume()?;
    let (scratch, _scratch) = scratch()?;
    let archive = scratch.join("zstd.tar");
    let source = crate_source("zstd-sys")?.join("zstd");
    Cmd::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&source).arg("lib").quiet()?;
    let dir = volume.dir().join("zstd");
    fs::create_dir(&dir)?;
    Cmd::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&dir).quiet()?;
    fs::write(dir.join("Makefile"), MAKEFILE)?;
    fs::write(dir.join("main.c"), MAIN_C)?;
    Cmd::new("make").args(["-j4", "--silent", "check"]).dir(&dir).quiet()?;
    Cmd::cargo(&["build", "--quiet", "--locked", "--package", "fs-core", "--target-dir"])
        .arg(volume.dir().join("target"))
        .run()?;
    Cmd::new("rm").arg("-rf").arg(&dir).quiet()?;
    volume.finish()?;
    Ok(Outcome::Passed("zstd with make and cc, fs-core with cargo".into()))
}

const MAKEFILE: &str = "\
SOURCES := $(wildcard lib/common/*.c lib/compress/*.c lib/decompress/*.c)
OBJECTS := $(SOURCES:.c=.o)
CFLAGS := -O1 -DZSTD_DISABLE_ASM

check: main
\t./main
main: main.c libzstd.a
\t$(CC) $(CFLAGS) -Ilib -o $@ main.c libzstd.a
libzstd.a: $(OBJECTS)
\tar rcs $@ $^
";

const MAIN_C: &str = r#"
#include <stdlib.h>
#include <string.h>
#include "zstd.h"
int main(void) {
    size_t n = 1 << 20, cap = ZSTD_compressBound(n);
    char *in = malloc(n), *mid = malloc(cap), *out = malloc(n);
    for (size_t i = 0; i < n; i++) in[i] = (char)(i * i >> 7);
    size_t m = ZSTD_compress(mid, cap, in, n, 3);
    if (ZSTD_isError(m) || ZSTD_decompress(out, n, mid, m) != n) return 1;
    return memcmp(in, out, n) != 0;
}
"#;

/// Where cargo keeps the source of a crate of this workspace.
fn crate_source(name: &str) -> Result<PathBuf> {
    let text = Cmd::cargo(&["metadata", "--format-version", "1", "--quiet"]).text()?;
    let metadata: serde_json::Value = serde_json::from_str(&text)?;
    let packages = metadata["packages"].as_array().context("cargo metadata without packages")?;
    let package = packages.iter().find(|package| package["name"] == name);
    let manifest = package.and_then(|package| package["manifest_path"].as_str());
    let manifest = manifest.with_context(|| format!("{name} is not a dependency of cairn"))?;
    Path::new(manifest).parent().map(Path::to_owned).context("a manifest is in a directory")
}

/// Makes a repository of the checkout's sources, commits, clones, collects garbage, checks.
///
/// # Errors
/// When git finds anything amiss.
pub fn git(suite: &Suite<'_>) -> Result<Outcome> {
    need::tools(&[("git", "git")])?;
    let mut volume = suite.volume()?;
    copy_sources(&volume.dir().join("origin"))?;
    let script = r#"
        export GIT_AUTHOR_NAME=t GIT_AUTHOR_EMAIL=t@t GIT_COMMITTER_NAME=t GIT_COMMITTER_EMAIL=t@t
        export GIT_CONFIG_GLOBAL=/dev/null
        cd origin
        git init -q -b main
        git add -A
        git commit -qm one
        for n in 1 2 3 4 5 6 7 8; do
            echo "$n" >> note
            git add note
            git commit -qm "$n"
        done
        git branch side
        cd ..
        git clone -q "file://$PWD/origin" clone
        cd clone
        git checkout -q -b work origin/side~4
        git merge -q origin/main
        git gc -q --prune=now
        git fsck --full --strict
        test -z "$(git status --porcelain)"
        cd ../origin
        git gc -q --aggressive --prune=now
        git fsck --full --strict
    "#;
    Cmd::shell(script).dir(volume.dir()).quiet()?;
    volume.remount()?;
    let check = "git -C origin fsck --full --strict && git -C clone fsck --full --strict";
    Cmd::shell(check).env("GIT_CONFIG_GLOBAL", "/dev/null").dir(volume.dir()).quiet()?;
    volume.finish()?;
    Ok(Outcome::Passed("init, commit, clone, merge, gc, fsck".into()))
}

/// Copies the checkout's sources.
///
/// # Errors
/// When a copy fails.
pub fn copy_sources(to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    let script = "git ls-files -z --cached | tar --null --files-from=- -c | tar -x -C \"$0\"";
    Cmd::shell(script).arg(to).dir(checkout::root()).quiet()
}

/// Two writers and a reader on one database, in both journal modes; a writer is killed.
///
/// # Errors
/// When a transaction is lost or the database is damaged.
pub fn sqlite(suite: &Suite<'_>) -> Result<Outcome> {
    need::tools(&[("sqlite3", "sqlite3")])?;
    let mut volume = suite.volume()?;
    let count: u64 = if suite.long { 20_000 } else { 400 };
    for mode in ["WAL", "DELETE"] {
        let name = format!("{mode}.db");
        load_database(volume.dir(), &name, mode, count)?;
        volume.remount()?;
        let check = "pragma integrity_check; select count(*) from t where length(b) = 900;";
        let out = Cmd::new("sqlite3").args([&name, check]).dir(volume.dir()).text()?;
        let (verdict, rows) = out.trim().split_once('\n').unwrap_or((out.trim(), ""));
        ensure!(verdict == "ok", "{mode}: {verdict}");
        let rows: u64 = rows.parse().with_context(|| format!("{mode}: {out}"))?;
        // What the killed writer had committed is there too, so there may be more.
        ensure!(rows >= 2 * count, "{mode}: {rows} rows of {} committed ones", 2 * count);
    }
    volume.finish()?;
    Ok(Outcome::Passed(format!("{} transactions a journal mode", 2 * count)))
}

fn load_database(dir: &Path, name: &str, mode: &str, count: u64) -> Result<()> {
    let setup = format!(
        "pragma journal_mode={mode}; create table t(a integer primary key, w int, b blob); \
         create index i on t(w, b);"
    );
    Cmd::new("sqlite3").args([name, &setup]).dir(dir).quiet()?;
    let script = format!(
        r#"
        load() {{
            for ((n = 0; n < $2; n++)); do
                echo "begin immediate; insert into t(w, b) values($1, randomblob(900));"
                echo "update t set b = randomblob(900) where a % 17 = $n % 17 and w = $1; commit;"
            done | sqlite3 -bail -cmd '.timeout 60000' {name}
        }}
        load 1 {count} & first=$!
        load 2 {count} & second=$!
        load 3 1000000 & victim=$!
        for n in 1 2 3; do
            sleep 0.3
            test "$(sqlite3 -cmd '.timeout 60000' {name} 'pragma quick_check')" = ok
        done
        pkill -9 -P $victim || true
        wait $victim || true
        wait $first
        wait $second
    "#
    );
    Cmd::shell(&script).dir(dir).limit(Duration::from_secs(600)).quiet()
}

/// `rsync -aHAX` there and back; nothing may differ.
///
/// # Errors
/// When something differs, with rsync's list of it.
pub fn rsync(suite: &Suite<'_>) -> Result<Outcome> {
    need::tools(&[("rsync", "rsync"), ("setfacl", "acl"), ("setfattr", "attr")])?;
    let mut volume = suite.volume()?;
    let (scratch, _scratch) = scratch()?;
    let source = scratch.join("source");
    make_odd_tree(&source)?;
    let there = volume.dir().join("there");
    let back = scratch.join("back");
    let sync = |from: &Path, to: &Path| {
        let slash = |path: &Path| format!("{}/", path.display());
        Cmd::new("rsync").arg("-aHAXS").args([slash(from), slash(to)]).quiet()
    };
    sync(&source, &there)?;
    volume.remount()?;
    sync(&there, &back)?;
    for other in [&there, &back] {
        let cmd = Cmd::new("rsync").args(["-aHAXn", "--checksum", "--delete", "--itemize-changes"]);
        let from = format!("{}/", source.display());
        let out = cmd.arg(from).arg(format!("{}/", other.display())).text()?;
        ensure!(out.trim().is_empty(), "differs from what was copied:\n{out}");
    }
    volume.finish()?;
    Ok(Outcome::Passed("-aHAX there and back".into()))
}

/// `tar --xattrs --acls` of a tree on the mount, unpacked on the mount.
///
/// # Errors
/// When the trees differ.
pub fn tar(suite: &Suite<'_>) -> Result<Outcome> {
    need::tools(&[("setfacl", "acl"), ("setfattr", "attr")])?;
    let volume = suite.volume()?;
    let source = volume.dir().join("source");
    make_odd_tree(&source)?;
    let unpacked = volume.dir().join("unpacked");
    fs::create_dir(&unpacked)?;
    let script = "tar --xattrs --xattrs-include='*' --acls --sparse -cf tree.tar -C source . && \
                  tar --xattrs --xattrs-include='*' --acls -xpf tree.tar -C unpacked";
    Cmd::shell(script).dir(volume.dir()).quiet()?;
    let (a, b) = (describe(&source)?, describe(&unpacked)?);
    if let Some((left, right)) = a.lines().zip(b.lines()).find(|(left, right)| left != right) {
        bail!("unpacked differently:\n{left}\n{right}");
    }
    ensure!(a.lines().count() == b.lines().count(), "something is missing or new");
    volume.finish()?;
    Ok(Outcome::Passed("--xattrs --acls --sparse".into()))
}

/// A tree with one of everything that copies tend to lose.
pub(super) fn make_odd_tree(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir)?;
    let script = r#"
        mkdir -p a/b/c many
        for n in $(seq 200); do echo "$n" > many/file-$n; done
        head -c 3000000 /dev/urandom > a/random
        yes cairn | head -c 3000000 > a/text || true
        ln a/random a/b/second-name
        ln -s ../text a/b/link
        ln -s nowhere a/b/dangling
        mkfifo a/b/pipe
        mknod a/b/null c 1 3
        truncate -s 50M a/sparse
        printf x | dd of=a/sparse bs=1 seek=30000000 conv=notrunc status=none
        : > 'a/b/c/a name with spaces and a
newline'
        printf '\xff\xfe' > a/b/c/$'\xff\xfe'
        chown 65534:65534 a/text
        chmod 4751 a/b/second-name
        chmod 1777 a/b/c
        setfattr -n user.colour -v green a/text
        setfattr -n user.big -v "$(head -c 2500 /dev/zero | tr '\0' v)" a/text
        setfattr -n user.empty -v '' a/b
        setfacl -m u:65534:rw,g:12:r a/text
        setfacl -d -m u:65534:rwx a/b
        touch -h -d '1999-12-31 23:59:59.123456789' a/b/link a/text
        touch -d '2106-02-07 06:28:17.5' a/random
        touch -d '1969-07-20 20:17:40.25' a/b/c many
    "#;
    Cmd::shell(script).dir(dir).quiet()
}

/// Names, types, modes, owners, times, links, content, attributes and ACLs of a tree.
pub(super) fn describe(dir: &Path) -> Result<String> {
    let script = r#"
        export LC_ALL=C
        find . ! -type d -printf '%P|%y|%m|%U|%G|%n|%s|%T@|%l\0' | sort -z | tr '\0' '\n'
        find . -type d -printf '%P|%y|%m|%U|%G|%T@\0' | sort -z | tr '\0' '\n'
        find . -type f -print0 | sort -z | xargs -0 sha256sum
        find . -print0 | sort -z | xargs -0 getfattr -h -d -m '^user' -e hex 2>&1
        find . ! -type l -print0 | sort -z | xargs -0 getfacl -n -p
    "#;
    Cmd::shell(script).dir(dir).text()
}

fn scratch() -> Result<(PathBuf, Guard)> {
    guard::temp_dir(&checkout::artefacts("scratch")?, "programs")
}
