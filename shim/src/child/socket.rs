//! A connection between a listener and one client, with no name that anyone else could use.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// A listener and a client that is connected to it and waits to be accepted. The socket has the
/// name `path` only while it is made; `path` must be in a folder of this user alone.
///
/// # Errors
/// What the kernel says, `ENAMETOOLONG`'s kind for a path beyond `sockaddr_un` included.
pub fn connected(path: &Path) -> io::Result<(UnixListener, UnixStream)> {
    if let Err(e) = std::fs::remove_file(path)
        && e.kind() != io::ErrorKind::NotFound
    {
        return Err(e);
    }
    let listener = UnixListener::bind(path)?;
    let client = UnixStream::connect(path);
    std::fs::remove_file(path)?;
    Ok((listener, client?))
}
