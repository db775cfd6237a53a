//! What a host says of itself: its identity from the configuration, its size from the system.

use std::io;
use std::path::Path;

use coordinator_core::state_machine::format::{NEWEST, announced};
use protocol::gpu::DeviceInfo;
use protocol::id::ServerId;
use protocol::report::HostFacts;

const GIB: u64 = 1 << 30;
/// Free disk space is told again when it has changed by so much.
const DISK_STEP_GB: u32 = 5;

/// What the configuration says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Names the server, also in its certificate.
    pub server: ServerId,
    /// Name that people use.
    pub name: String,
    /// Address under which validators reach it.
    pub address: String,
    /// Port of its GPU proof API.
    pub proof_port: u16,
}

/// Everything, with the free space of the disk that `folder` is on.
///
/// # Errors
/// When the system does not say how large it is.
pub fn gather(identity: &Identity, devices: Vec<DeviceInfo>, folder: &Path) -> io::Result<HostFacts> {
    let meminfo = std::fs::read_to_string("/proc/meminfo")?;
    let memory_gb = memory_gb(&meminfo)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/meminfo has no MemTotal"))?;
    let disk = rustix::fs::statvfs(folder)?;
    let free_gb = disk.f_bavail.saturating_mul(disk.f_frsize) / GIB;
    Ok(HostFacts {
        server: identity.server.clone(),
        name: identity.name.clone(),
        address: identity.address.clone(),
        proof_port: identity.proof_port,
        devices,
        cpu_count: u32::try_from(std::thread::available_parallelism()?.get()).unwrap_or(u32::MAX),
        memory_gb,
        disk_free_gb: u32::try_from(free_gb).unwrap_or(u32::MAX),
        agent_version: announced(env!("CARGO_PKG_VERSION"), NEWEST),
    })
}

fn memory_gb(meminfo: &str) -> Option<u32> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    u32::try_from(kib * 1024 / GIB).ok()
}

/// True when the coordinator should be told: free space goes up and down all the time.
#[must_use]
pub fn differ(last: &HostFacts, now: &HostFacts) -> bool {
    let same_disk = HostFacts {
        disk_free_gb: last.disk_free_gb,
        ..now.clone()
    };
    same_disk != *last || last.disk_free_gb.abs_diff(now.disk_free_gb) >= DISK_STEP_GB
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_of_the_machine_is_found() {
        assert_eq!(
            memory_gb("MemTotal:       65536000 kB\nMemFree: 1 kB\n"),
            Some(62)
        );
        assert_eq!(memory_gb("MemFree: 1 kB\n"), None);
        let identity = Identity {
            server: ServerId::parse("server-1").expect("valid"),
            name: "host-1".to_owned(),
            address: "127.0.1.1".to_owned(),
            proof_port: 30443,
        };
        let facts = gather(&identity, Vec::new(), Path::new("/")).expect("Linux");
        assert!(facts.cpu_count > 0);
        let mut later = facts.clone();
        later.disk_free_gb += DISK_STEP_GB - 1;
        assert!(!differ(&facts, &later));
        later.disk_free_gb += 1;
        assert!(differ(&facts, &later));
        later.disk_free_gb = facts.disk_free_gb;
        later.name.push('x');
        assert!(differ(&facts, &later));
    }
}
