//! The table of hashes that QEMU places in guest memory for direct boot, and that the firmware
//! compares with what it is given to boot (QEMU `target/i386/sev.c`, `sev_add_kernel_loader_hashes`).

use crate::crypto::sha256;

const PAGE: usize = 4096;
const TABLE_HEADER: u128 = 0x9438d606_4f22_4cc9_b479_a793d411fd21;
const COMMAND_LINE: u128 = 0x97d02dd8_bd20_4c94_aa78_e7714d36ab2a;
const INITRD: u128 = 0x44baf731_3a2f_4bd7_9af1_41e29169781d;
const KERNEL: u128 = 0x4de79437_abd2_427f_b835_d5b172d2045b;
/// GUID, length, hash.
const ENTRY: u16 = 16 + 2 + 32;
const TABLE: u16 = 16 + 2 + 3 * ENTRY;

/// Hashes of what is booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelHashes {
    kernel: [u8; 32],
    initrd: [u8; 32],
    command_line: [u8; 32],
}

impl KernelHashes {
    /// Of a kernel file, the initial RAM disk if there is one, and the command line.
    pub fn new(kernel: &[u8], initrd: Option<&[u8]>, command_line: &str) -> Self {
        // The command line is hashed with its terminating NUL, as the firmware reads it.
        let line = [command_line.as_bytes(), &[0]].concat();
        Self {
            kernel: sha256(kernel),
            initrd: sha256(initrd.unwrap_or_default()),
            command_line: sha256(&line),
        }
    }

    /// The page with the table at an offset; `None` if it does not fit.
    pub(super) fn page(&self, offset: usize) -> Option<Vec<u8>> {
        let mut table = guid(TABLE_HEADER).to_vec();
        table.extend(TABLE.to_le_bytes());
        for (id, hash) in [
            (COMMAND_LINE, self.command_line),
            (INITRD, self.initrd),
            (KERNEL, self.kernel),
        ] {
            table.extend(guid(id));
            table.extend(ENTRY.to_le_bytes());
            table.extend(hash);
        }
        let mut page = vec![0; PAGE];
        page.get_mut(offset..offset + table.len())?
            .copy_from_slice(&table);
        Some(page)
    }
}

fn guid(id: u128) -> [u8; 16] {
    let mut bytes = id.to_be_bytes();
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}
