//! Commitment to a matrix: a Merkle tree of SHA-256 over tiles of rows. The root is what a work product
//! lists; tiles named afterwards are opened with their path.

use crate::digest::hash_fields;
use crate::matrix::Matrix;

/// Rows of one tile; the last tile may have fewer.
pub const TILE_ROWS: usize = 8;

/// One opened tile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opening {
    /// Which tile: rows from `tile * TILE_ROWS`.
    pub tile: usize,
    /// Its entries, row by row.
    pub entries: Vec<i8>,
    /// Hashes of the neighbours, from the tile upwards; none where a level has no neighbour.
    pub path: Vec<[u8; 32]>,
}

fn tiles(n: usize) -> usize {
    n.div_ceil(TILE_ROWS)
}

fn leaf(n: usize, tile: usize, entries: &[i8]) -> [u8; 32] {
    let bytes: Vec<u8> = entries.iter().map(|entry| entry.cast_unsigned()).collect();
    let (n, tile) = ((n as u64).to_le_bytes(), (tile as u64).to_le_bytes());
    hash_fields("tile", &[&n, &tile, &bytes])
}

fn tile_entries(matrix: &Matrix, tile: usize) -> Vec<i8> {
    let last = ((tile + 1) * TILE_ROWS).min(matrix.n());
    (tile * TILE_ROWS..last)
        .flat_map(|row| matrix.row(row).iter().copied())
        .collect()
}

/// All levels, leaves first, the root alone in the last. A hash without a neighbour moves up unchanged.
fn levels(matrix: &Matrix) -> Vec<Vec<[u8; 32]>> {
    let leaves = (0..tiles(matrix.n()))
        .map(|tile| leaf(matrix.n(), tile, &tile_entries(matrix, tile)))
        .collect();
    let mut levels: Vec<Vec<[u8; 32]>> = vec![leaves];
    while let Some(below) = levels.last().filter(|level| level.len() > 1) {
        let above = below
            .chunks(2)
            .map(|pair| match pair {
                [left, right] => hash_fields("pair", &[left, right]),
                [single, ..] => *single,
                [] => unreachable!("chunks are not empty"),
            })
            .collect();
        levels.push(above);
    }
    levels
}

/// The root over a matrix.
///
/// # Panics
/// If the matrix has no rows.
#[must_use]
pub fn root(matrix: &Matrix) -> [u8; 32] {
    levels(matrix)[..]
        .last()
        .and_then(|level| level.first())
        .copied()
        .expect("a matrix has rows")
}

/// Opens one tile; `None` if there is no such tile.
#[must_use]
pub fn open(matrix: &Matrix, tile: usize) -> Option<Opening> {
    if tile >= tiles(matrix.n()) {
        return None;
    }
    let mut at = tile;
    let mut path = Vec::new();
    for level in levels(matrix) {
        path.extend(level.get(at ^ 1).filter(|_| level.len() > 1));
        at /= 2;
    }
    Some(Opening {
        tile,
        entries: tile_entries(matrix, tile),
        path,
    })
}

/// True if the opened tile belongs to a matrix of this size under this root.
#[must_use]
pub fn verify(root: &[u8; 32], n: usize, opening: &Opening) -> bool {
    let (mut at, mut width) = (opening.tile, tiles(n));
    if at >= width || opening.entries.len() != ((at + 1) * TILE_ROWS).min(n) * n - at * TILE_ROWS * n {
        return false;
    }
    let mut hash = leaf(n, at, &opening.entries);
    let mut path = opening.path.iter();
    while width > 1 {
        if at ^ 1 < width {
            let Some(neighbour) = path.next() else {
                return false;
            };
            let pair: [&[u8]; 2] = if at % 2 == 0 {
                [&hash, neighbour]
            } else {
                [neighbour, &hash]
            };
            hash = hash_fields("pair", &pair);
        }
        (at, width) = (at / 2, width.div_ceil(2));
    }
    path.next().is_none() && hash == *root
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tile_opens_and_no_changed_tile_does() {
        for n in [1, 7, 8, 9, 24, 41, 48] {
            let matrix = Matrix::from_key(5, n);
            let root = root(&matrix);
            for tile in 0..tiles(n) {
                let opening = open(&matrix, tile).expect("a tile of the matrix");
                assert!(verify(&root, n, &opening), "n {n} tile {tile}");
                for change in 0..4 {
                    let mut forged = opening.clone();
                    match change {
                        0 => forged.entries[n - 1] ^= 1,
                        1 => forged.tile += 1,
                        2 => forged.path.push([0; 32]),
                        _ if forged.path.is_empty() => continue,
                        _ => forged.path[0][31] ^= 1,
                    }
                    assert!(!verify(&root, n, &forged), "n {n} tile {tile} change {change}");
                }
                assert!(!verify(&root, n + 1, &opening));
            }
            assert_eq!(open(&matrix, tiles(n)), None);
        }
    }

    #[test]
    fn any_changed_entry_changes_the_root() {
        let matrix = Matrix::from_key(5, 20);
        for at in [0, 19, 20, 399] {
            let mut entries: Vec<i8> = (0..20).flat_map(|row| matrix.row(row).to_vec()).collect();
            entries[at] = entries[at].wrapping_add(1);
            let changed = Matrix::from_entries(20, entries).expect("same size");
            assert_ne!(root(&changed), root(&matrix), "entry {at}");
        }
    }
}
