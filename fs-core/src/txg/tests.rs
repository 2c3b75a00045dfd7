use super::*;

#[test]
fn an_operation_stays_in_the_group_it_entered() {
    let groups = Groups::new(Txg(7));
    let handle = groups.enter();
    assert_eq!(handle.txg(), Txg(8));
    drop(handle);
    assert_eq!(groups.close(), Txg(8));
    assert_eq!(groups.enter().txg(), Txg(9));
    groups.publish(Txg(8));
    assert_eq!(groups.published(), Txg(8));
}

#[test]
fn buffers_count_until_they_are_gone() {
    let dirty = Dirty::new(100);
    dirty.adjust(0, 40);
    let buffer = dirty.buffer(20);
    assert!(dirty.over_soft() && !dirty.over_hard());
    let another = dirty.buffer(20);
    assert!(dirty.over_hard());
    drop(another);
    assert!(!dirty.over_hard());
    drop(buffer);
    assert!(!dirty.over_soft());
    assert_eq!(dirty.bytes(), 40);
}

#[test]
fn closing_waits_for_every_operation() {
    let groups = std::sync::Arc::new(Groups::new(Txg(1)));
    let handle = groups.enter();
    let other = groups.clone();
    let closer = std::thread::spawn(move || other.close());
    while groups.open() == Txg(2) {
        std::thread::yield_now();
    }
    assert!(!closer.is_finished());
    drop(handle);
    assert_eq!(closer.join().unwrap(), Txg(2));
}
