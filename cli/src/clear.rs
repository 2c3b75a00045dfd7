//! `cairn clear`: errors of devices are counted anew.

use crate::arguments::Clear;
use crate::target::{ask, ask_failed, Target};
use crate::versions::open;
use crate::{Done, Failure};
use cairn_host::admin::{Reply, Request};

pub(crate) fn run(arguments: &Clear) -> Result<Done, Failure> {
    match Target::find(&arguments.pool)? {
        Target::Mounted(mount) => match ask(&mount, Request::ClearErrors) {
            Ok(Reply::Changed) => Ok(Done::Whole),
            Ok(_) => Err(Failure::new("the daemon answered another question")),
            Err(error) => Err(ask_failed(&mount, &error)),
        },
        // As a mount does, this brings the pool up to date.
        Target::Devices(paths) => {
            let engine = open(&paths, false)?;
            let cleared = engine.clear_errors();
            cleared.and(engine.close()).map_err(Failure::new)?;
            Ok(Done::Whole)
        }
    }
}
