//! Snapshots in a bucket of an S3-compatible store.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use coordinator::backup::{BucketSettings, Keeper, Place, Target};
use tokio_util::sync::CancellationToken;

use super::member::{CLUSTER, Member, key};
use super::store_of_objects::{ACCESS_KEY, BUCKET, REGION, SECRET_KEY, serve};

pub(crate) fn key_file(folder: &Path, secret: &str) -> PathBuf {
    let file = folder.join("bucket.keys");
    let text = format!("[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {secret}\n");
    std::fs::write(&file, text).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    file
}

pub(crate) fn place(address: std::net::SocketAddr, key_file: PathBuf) -> Place {
    Place::Bucket(BucketSettings {
        endpoint: format!("http://{address}").parse().unwrap(),
        region: REGION.to_owned(),
        bucket: BUCKET.to_owned(),
        prefix: "a miner/".replace(' ', "-"),
        key_file,
    })
}

#[tokio::test]
async fn snapshots_go_to_a_bucket_and_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let member = Member::founded(folder.path()).await;
    let (address, objects) = serve().await;
    let keys = tempfile::tempdir().unwrap();
    let place = place(address, key_file(keys.path(), SECRET_KEY));
    let foreign = [
        "a-miner/notes",
        "elsewhere/miner-1-20260102T030405Z-1.chutes-snapshot",
    ];
    for name in foreign {
        objects.stored.lock().unwrap().insert(name.to_owned(), vec![1]);
    }
    let settings = member.settings(place.clone(), 3);
    let target = Target::open(&place).unwrap();
    let mut made = Vec::new();
    for _ in 0..5 {
        let keeper = Keeper::new(member.snapshots(), Some(settings.clone()));
        let mut reports = keeper.reports().follow();
        let stop = CancellationToken::new();
        let task = tokio::spawn(keeper.run(stop.clone()));
        let told = |report: &coordinator::backup::Report| report.last.is_some() || report.failure.is_some();
        let report = reports.wait_for(told).await.unwrap().clone();
        assert!(report.failure.is_none(), "{report:?}");
        made.push(report.last.unwrap());
        stop.cancel();
        task.await.unwrap();
        member.pass_minutes(61);
    }
    let listed = target.list(CLUSTER).await.unwrap();
    let listed: Vec<String> = listed.iter().map(|name| name.text(CLUSTER)).collect();
    let newest: Vec<String> = made[2..].iter().map(|done| done.name.clone()).collect();
    assert_eq!(listed, newest);
    let stored = objects.stored.lock().unwrap().clone();
    assert!(
        foreign.iter().all(|name| stored.contains_key(*name)),
        "nothing else was touched"
    );
    assert!(!settings.spool.exists(), "nothing is left here");

    let fetched = folder.path().join("fetched");
    target.fetch(&made[4].name, &fetched).await.unwrap();
    assert_eq!(std::fs::metadata(&fetched).unwrap().len(), made[4].size_bytes);
    let opened = coordinator::backup::restore::unsealed(&fetched, &key()).unwrap();
    assert_eq!(opened.head().cluster, CLUSTER);
    let missing = target.fetch("nothing", &fetched).await.unwrap_err().to_string();
    assert!(missing.contains("NoSuchKey"), "{missing}");
    member.replica.shutdown().await;
}

#[tokio::test]
async fn what_the_store_says_is_passed_on_without_the_key() {
    let (address, objects) = serve().await;
    let keys = tempfile::tempdir().unwrap();
    let wrong = "wrong-secret-key";
    let target = Target::open(&place(address, key_file(keys.path(), wrong))).unwrap();
    let error = target.list(CLUSTER).await.unwrap_err().to_string();
    assert!(
        error.contains("403") && error.contains("SignatureDoesNotMatch"),
        "{error}"
    );
    assert!(!error.contains(wrong) && !format!("{target:?}").contains(wrong));
    assert!(objects.served.lock().unwrap().is_empty());

    let open = key_file(keys.path(), wrong);
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o644)).unwrap();
    let error = Target::open(&place(address, open)).unwrap_err().to_string();
    assert!(error.contains("chmod 600"), "{error}");
    let missing = Target::open(&place(address, keys.path().join("none")))
        .unwrap_err()
        .to_string();
    assert!(missing.contains("none"), "{missing}");
}
