//! What a disk is made of: a raw file or a block device of the host, opened by somebody else. Offsets
//! are checked before they come here.
#![expect(
    unsafe_code,
    reason = "fallocate has no safe wrapper that says why it failed"
)]

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt};

use super::SECTOR;
use crate::virtio::{Buffers, Error, io as guest_io};

/// Longest serial, bytes (VIRTIO 1.2, 5.2.6).
const SERIAL_MAX: usize = 20;
/// Zeros written at a time where the disk cannot zero by itself, bytes.
const ZEROS: usize = 64 * 1024;

/// An open disk.
pub(super) struct Disk {
    file: File,
    sectors: u64,
    readonly: bool,
    serial: Vec<u8>,
    /// Whatever is written is on the disk before the guest hears that it is.
    write_through: bool,
}

impl Disk {
    pub(super) fn new(mut file: File, readonly: bool, serial: &str) -> Result<Self, Error> {
        let valid = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        if !(1..=SERIAL_MAX).contains(&serial.len()) || !serial.bytes().all(valid) {
            return Err(Error::Configuration(format!(
                "serial {serial:?} is not 1 to {SERIAL_MAX} of letters, digits, - and _"
            )));
        }
        let resource = |what| move |source| Error::Resource { what, source };
        let kind = file
            .metadata()
            .map_err(resource("look at the disk"))?
            .file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::Configuration(format!(
                "disk {serial} is neither a file nor a block device"
            )));
        }
        let length = file.seek(SeekFrom::End(0));
        let sectors = length.map_err(resource("measure the disk"))? / SECTOR;
        if sectors == 0 {
            return Err(Error::Configuration(format!(
                "disk {serial} has less than {SECTOR} bytes"
            )));
        }
        Ok(Self {
            file,
            sectors,
            readonly,
            serial: serial.as_bytes().to_vec(),
            write_through: false,
        })
    }

    /// Size, in units of [`SECTOR`].
    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    pub(super) fn readonly(&self) -> bool {
        self.readonly
    }

    pub(super) fn serial(&self) -> &[u8] {
        &self.serial
    }

    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(super) fn write_through(&mut self, wanted: bool) {
        self.write_through = wanted;
    }

    pub(super) fn read(&self, to: &Buffers<'_>, offset: u64) -> io::Result<()> {
        guest_io::read_at(&self.file, to, offset)
    }

    pub(super) fn write(&self, from: &Buffers<'_>, offset: u64) -> io::Result<()> {
        self.check_writable()?;
        guest_io::write_at(&self.file, from, offset)?;
        self.settle()
    }

    pub(super) fn flush(&self) -> io::Result<()> {
        match self.readonly {
            true => Ok(()),
            false => self.file.sync_data(),
        }
    }

    /// The guest has no use for what is there; it may stay.
    pub(super) fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check_writable()?;
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        match self.allocate(mode, offset, length) {
            Err(e) if unsupported(&e) => Ok(()),
            other => other,
        }
    }

    /// From now on zeros are read there.
    pub(super) fn zero(&self, offset: u64, length: u64, may_free: bool) -> io::Result<()> {
        self.check_writable()?;
        let how = match may_free {
            true => libc::FALLOC_FL_PUNCH_HOLE,
            false => libc::FALLOC_FL_ZERO_RANGE,
        };
        match self.allocate(how | libc::FALLOC_FL_KEEP_SIZE, offset, length) {
            Err(e) if unsupported(&e) => self.write_zeros(offset, length)?,
            other => other?,
        }
        self.settle()
    }

    fn write_zeros(&self, offset: u64, length: u64) -> io::Result<()> {
        let zeros = [0; ZEROS];
        let mut done = 0;
        while done < length {
            let count = (length - done).min(ZEROS as u64);
            self.file
                .write_all_at(&zeros[..count as usize], offset + done)?;
            done += count;
        }
        Ok(())
    }

    fn settle(&self) -> io::Result<()> {
        match self.write_through {
            true => self.file.sync_data(),
            false => Ok(()),
        }
    }

    fn check_writable(&self) -> io::Result<()> {
        match self.readonly {
            true => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
            false => Ok(()),
        }
    }

    fn allocate(&self, mode: libc::c_int, offset: u64, length: u64) -> io::Result<()> {
        if length == 0 {
            return Ok(()); // fallocate would call it an error
        }
        let convert = |value: u64| {
            libc::off_t::try_from(value).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
        };
        let (offset, length) = (convert(offset)?, convert(length)?);
        // SAFETY: no pointers are passed.
        match unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, length) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Whether the file system or the device just cannot do it.
fn unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
    )
}
