use super::*;
use crate::platform::VirtualClock;
use fs_core::vfs::{Filesystem, RenameFlags, SetAttr, XattrMode};

const ROOT_USER: Caller = Caller { uid: 0, gid: 0, umask: 0o022 };

fn model() -> Model {
    Model::new(Arc::new(VirtualClock::default()))
}

fn errno<T: std::fmt::Debug>(result: Result<T, Error>) -> Errno {
    result.unwrap_err().errno()
}

#[test]
fn a_directory_has_two_links_and_one_per_subdirectory() {
    let fs = model();
    let a = fs.mkdir(fs.root(), b"a", 0o755, &ROOT_USER).unwrap().ino;
    let b = fs.mkdir(a, b"b", 0o755, &ROOT_USER).unwrap().ino;
    let links = |ino| fs.getattr(ino).unwrap().nlink;
    assert_eq!((links(fs.root()), links(a), links(b)), (3, 3, 2));
    fs.rename(a, b"b", fs.root(), b"c", RenameFlags::default(), &ROOT_USER).unwrap();
    assert_eq!((links(fs.root()), links(a), links(b)), (4, 2, 2));
    fs.rmdir(fs.root(), b"c").unwrap();
    assert_eq!((links(fs.root()), links(b)), (3, 0));
}

#[test]
fn a_file_without_names_lives_while_it_is_held() {
    let fs = model();
    let file = fs.mknod(fs.root(), b"f", 0o100644, 0, &ROOT_USER).unwrap().ino;
    fs.write(file, 0, b"abc", Default::default()).unwrap();
    fs.unlink(fs.root(), b"f").unwrap();
    assert_eq!(fs.getattr(file).unwrap().nlink, 0);
    assert_eq!(errno(fs.link(file, fs.root(), b"g")), Errno::NoEnt);
    fs.forget(file, 1);
    assert_eq!(errno(fs.getattr(file)), Errno::Stale);
}

#[test]
fn a_directory_cannot_move_below_itself() {
    let fs = model();
    let a = fs.mkdir(fs.root(), b"a", 0o755, &ROOT_USER).unwrap().ino;
    let b = fs.mkdir(a, b"b", 0o755, &ROOT_USER).unwrap().ino;
    let rename = |dir, name: &[u8], new_dir, new_name: &[u8], exchange| {
        let flags = RenameFlags { exchange, ..Default::default() };
        fs.rename(dir, name, new_dir, new_name, flags, &ROOT_USER)
    };
    assert_eq!(errno(rename(fs.root(), b"a", b, b"x", false)), Errno::Inval);
    assert_eq!(errno(rename(a, b"b", fs.root(), b"a", false)), Errno::NotEmpty);
    assert_eq!(errno(rename(a, b"b", fs.root(), b"a", true)), Errno::Inval);
}

#[test]
fn a_default_acl_masks_the_mode_and_is_passed_on() {
    let fs = model();
    let dir = fs.mkdir(fs.root(), b"d", 0o755, &ROOT_USER).unwrap().ino;
    let default = acl::Acl::sample([7, 6, 5, 7, 0]).to_bytes();
    fs.setxattr(dir, acl::DEFAULT, &default, XattrMode::Either).unwrap();
    let file = fs.mknod(dir, b"f", 0o100666, 0, &ROOT_USER).unwrap();
    assert_eq!(file.mode, 0o100660);
    let access = fs.getxattr(file.ino, acl::ACCESS).unwrap();
    assert_eq!(access, acl::Acl::sample([6, 6, 5, 6, 0]).to_bytes());
    let sub = fs.mkdir(dir, b"s", 0o777, &ROOT_USER).unwrap();
    assert_eq!(fs.getxattr(sub.ino, acl::DEFAULT).unwrap(), default);
    let set = SetAttr { mode: Some(0o604), ..Default::default() };
    fs.setattr(file.ino, &set, &ROOT_USER).unwrap();
    let access = fs.getxattr(file.ino, acl::ACCESS).unwrap();
    assert_eq!(access, acl::Acl::sample([6, 6, 5, 0, 4]).to_bytes());
}

#[test]
fn an_acl_that_says_no_more_than_the_mode_becomes_the_mode() {
    let fs = model();
    let file = fs.mknod(fs.root(), b"f", 0o100644, 0, &ROOT_USER).unwrap().ino;
    let value = acl::Acl::minimal(0o751).to_bytes();
    fs.setxattr(file, acl::ACCESS, &value, XattrMode::Either).unwrap();
    assert_eq!(fs.getattr(file).unwrap().mode, 0o100751);
    assert_eq!(errno(fs.getxattr(file, acl::ACCESS)), Errno::NoData);
}

#[test]
fn what_is_made_in_a_set_gid_directory_gets_its_group() {
    let fs = model();
    let dir = fs.mkdir(fs.root(), b"d", 0o2755, &Caller { uid: 0, gid: 7, umask: 0 }).unwrap().ino;
    let file = fs.mknod(dir, b"f", 0o100644, 0, &ROOT_USER).unwrap();
    let sub = fs.mkdir(dir, b"s", 0o755, &ROOT_USER).unwrap();
    assert_eq!((file.gid, file.mode), (7, 0o100644));
    assert_eq!((sub.gid, sub.mode), (7, 0o042755));
}
