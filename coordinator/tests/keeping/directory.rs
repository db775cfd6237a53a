//! Snapshots in a directory: by the schedule, and only so many of them.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use coordinator::backup::{Keeper, Place, Target};
use protocol::snapshot_file::Sealed;
use tokio_util::sync::CancellationToken;

use super::member::{CLUSTER, Member, key};

fn names(directory: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// Lets the schedule put one away, as a leader that has just begun would.
async fn begin(member: &Member, keep: usize, directory: &Path) -> Result<String, String> {
    let settings = member.settings(Place::Directory(directory.to_owned()), keep);
    let keeper = Keeper::new(member.snapshots(), Some(settings));
    let mut reports = keeper.reports().follow();
    let stop = CancellationToken::new();
    let task = tokio::spawn(keeper.run(stop.clone()));
    let told = |report: &coordinator::backup::Report| report.last.is_some() || report.failure.is_some();
    let report = reports.wait_for(told).await.unwrap().clone();
    stop.cancel();
    task.await.unwrap();
    match (report.last, report.failure) {
        (Some(done), None) => Ok(done.name),
        (_, failure) => Err(failure.unwrap().1),
    }
}

#[tokio::test]
async fn the_newest_are_kept_and_nothing_else_is_touched() {
    let folder = tempfile::tempdir().unwrap();
    let away = tempfile::tempdir().unwrap();
    let member = Member::founded(folder.path()).await;
    let others = [
        "notes.txt",
        "other-20260102T030405Z-1.chutes-snapshot",
        "miner-1-20260102T030405Z-1.chutes-snapshot.copy",
        ".other.part",
    ];
    for name in others {
        std::fs::write(away.path().join(name), name).unwrap();
    }
    let left = format!(".{CLUSTER}-20260102T030405Z-1.chutes-snapshot.part");
    std::fs::write(away.path().join(&left), "a crash left it").unwrap();
    let mut made = Vec::new();
    for _ in 0..4 {
        made.push(begin(&member, 2, away.path()).await.unwrap());
        member.pass_minutes(61);
    }
    let target = Target::open(&Place::Directory(away.path().to_owned())).unwrap();
    let kept = target.list(CLUSTER).await.unwrap();
    let kept: Vec<String> = kept.iter().map(|name| name.text(CLUSTER)).collect();
    assert_eq!(kept, made[2..]);
    let found = names(away.path());
    assert!(others.iter().all(|name| found.contains(*name)), "{found:?}");
    assert!(!found.contains(&left), "{found:?}");
    let newest = away.path().join(&made[3]);
    assert_eq!(
        std::fs::metadata(&newest).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let mut opened = Sealed::open(std::fs::File::open(newest).unwrap())
        .unwrap()
        .unseal(&key())
        .unwrap();
    std::io::copy(&mut opened, &mut std::io::sink()).unwrap();
    assert_eq!(opened.head().cluster, CLUSTER);
    assert_eq!(opened.summary().rows["hosts"], 1);
    member.replica.shutdown().await;
}

#[tokio::test]
async fn a_directory_that_is_not_there_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let member = Member::founded(folder.path()).await;
    let missing = folder.path().join("not-mounted");
    let error = begin(&member, 2, &missing).await.unwrap_err();
    assert!(error.contains("not-mounted"), "{error}");
    member.replica.shutdown().await;
}
