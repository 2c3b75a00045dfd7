//! `cairn history`.

use crate::arguments::History;
use crate::target::{ask, ask_failed, daemon_gone, open_to_look, Target};
use crate::versions::utc;
use crate::{output, Done, Failure};
use cairn_host::admin::{AdminError, PastGroupInfo, Reply, Request};
use cairn_host::host_platform;
use cairn_host::mounts::Mount;
use cairn_host::parse::format_size;
use fs_core::engine::past;
use fs_core::platform::DeviceRef;
use std::path::PathBuf;

pub(crate) fn run(arguments: &History) -> Result<Done, Failure> {
    let data = !arguments.metadata_only;
    let groups = match Target::find(&arguments.of.pool)? {
        Target::Mounted(mount) => of_mount(&mount, data)?,
        Target::Devices(paths) => of_devices(&paths, data)?,
    };
    if arguments.of.json {
        output::json(&serde_json::json!({ "verified": verified(data), "groups": groups }));
    } else {
        cairn_host::output::text(&table(&groups, data));
    }
    let is_well = groups.first().is_some_and(|newest| newest.state == "newest");
    Ok(if is_well { Done::Whole } else { Done::Attention })
}

/// What of a group was looked at.
fn verified(data: bool) -> &'static str {
    match data {
        true => "all",
        false => "metadata",
    }
}

fn of_mount(mount: &Mount, data: bool) -> Result<Vec<PastGroupInfo>, Failure> {
    match ask(mount, Request::History { data }) {
        Ok(Reply::History(groups)) => Ok(groups),
        Ok(_) => Err(Failure::new("the daemon answered another question")),
        Err(AdminError::NoDaemon) => {
            let gone = std::fs::metadata(&mount.mount_point).err();
            match gone.and_then(|error| daemon_gone(&mount.mount_point, &error)) {
                Some(failure) => Err(failure),
                None => of_devices(std::slice::from_ref(&mount.source), data),
            }
        }
        Err(error) => Err(ask_failed(mount, &error)),
    }
}

fn of_devices(paths: &[PathBuf], data: bool) -> Result<Vec<PastGroupInfo>, Failure> {
    let devices = open_to_look(paths)?.into_iter().map(|device| device as DeviceRef);
    let devices: Vec<DeviceRef> = devices.collect();
    let groups = past::history(&devices, &host_platform(), data);
    let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    let groups =
        groups.map_err(|error| Failure::new(format_args!("{}: {error}", names.join(" "))))?;
    Ok(groups.iter().map(PastGroupInfo::of).collect())
}

fn table(groups: &[PastGroupInfo], data: bool) -> String {
    let heading = ["GROUP", "PUBLISHED", "STATE"].map(String::from);
    let time = |seconds: i64| match seconds {
        0 => "-".to_string(),
        seconds => utc(seconds),
    };
    let row =
        |group: &PastGroupInfo| [group.txg.to_string(), time(group.written), state(group, data)];
    let rows: Vec<[String; 3]> = core::iter::once(heading).chain(groups.iter().map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let (first, second) = (width(0), width(1));
    let line = |[group, published, state]: &[String; 3]| {
        format!("{group:>first$}  {published:<second$}  {}\n", output::printable(state))
    };
    rows.iter().map(line).collect()
}

/// What is left of a group, for people.
fn state(group: &PastGroupInfo, data: bool) -> String {
    match group.state.as_str() {
        "whole" if !data => "trees whole".into(),
        "partly" => {
            let places = if group.lost_count == 1 { "place is" } else { "places are" };
            let size = format_size(group.lost_bytes);
            format!("{} {places} overwritten or damaged ({size})", group.lost_count)
        }
        "gone" => format!("gone: {}", group.reason),
        state => state.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_groups_is_shown_in_words() {
        let group = |txg, state: &str| PastGroupInfo {
            txg,
            written: 951_782_399,
            state: state.into(),
            ..PastGroupInfo::default()
        };
        let mut groups = vec![group(12, "newest"), group(11, "whole"), group(9, "partly")];
        (groups[2].lost_count, groups[2].lost_bytes) = (2, 8192);
        groups.push(PastGroupInfo { written: 0, reason: "why".into(), ..group(8, "gone") });
        assert_eq!(
            table(&groups, true),
            "GROUP  PUBLISHED            STATE\n   12  2000-02-28 23:59:59  newest\n   \
             11  2000-02-28 23:59:59  whole\n    9  2000-02-28 23:59:59  2 places are overwritten \
             or damaged (8.00 KiB)\n    8  -                    gone: why\n"
        );
        assert_eq!(state(&groups[1], false), "trees whole");
        groups[2].lost_count = 1;
        assert!(state(&groups[2], true).starts_with("1 place is overwritten"));
    }
}
