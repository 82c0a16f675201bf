//! The disk that carries the document to the guest.
//!
//! ```text
//!   0         8                 16
//!   "initdata" length (u64, LE)  gzip …  zeroes up to a multiple of 512
//! ```

use std::io::{self, Read, Write};

use crate::document::{COMPRESSED_MAX, DocumentError, Initdata};

/// Serial number of the disk.
pub const SERIAL: &str = "initdata";
/// What the disk begins with.
const MAGIC: [u8; 8] = *b"initdata";
/// Bytes of a sector.
const SECTOR: usize = 512;

/// Why a disk holds no initdata, or cannot be given it.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The disk cannot be read or written.
    #[error("the initdata disk cannot be read or written")]
    Io(#[from] io::Error),
    /// Not even what it begins with can be read.
    #[error("the first bytes of the disk cannot be read")]
    Head(#[source] io::Error),
    /// The disk begins with something else.
    #[error("the disk holds no initdata: it does not begin with \"initdata\"")]
    Magic,
    /// The disk says that it holds more than is taken.
    #[error("the initdata disk says that it holds {0} bytes; at most {COMPRESSED_MAX} are taken")]
    Length(u64),
    /// What it holds is no document.
    #[error("the initdata")]
    Document(#[from] DocumentError),
}

/// Writes the disk of `initdata`.
///
/// # Errors
/// What `to` refuses.
pub fn write_image(initdata: &Initdata, mut to: impl Write) -> Result<(), ImageError> {
    let gzip = initdata.to_gzip()?;
    let mut image = Vec::with_capacity(gzip.len() + 2 * SECTOR);
    image.extend_from_slice(&MAGIC);
    image.extend_from_slice(&(gzip.len() as u64).to_le_bytes());
    image.extend_from_slice(&gzip);
    image.resize(image.len().next_multiple_of(SECTOR), 0);
    Ok(to.write_all(&image)?)
}

/// Reads the disk. What it says of its length is believed up to the bound alone.
///
/// # Errors
/// A disk that cannot be read, ends too early, or holds something else.
pub fn read_image(mut from: impl Read) -> Result<Initdata, ImageError> {
    let (mut magic, mut length) = ([0; 8], [0; 8]);
    from.read_exact(&mut magic).map_err(ImageError::Head)?;
    if magic != MAGIC {
        return Err(ImageError::Magic);
    }
    from.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    if length > COMPRESSED_MAX {
        return Err(ImageError::Length(length));
    }
    let mut gzip = Vec::new();
    from.take(length).read_to_end(&mut gzip)?;
    if (gzip.len() as u64) < length {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(Initdata::from_gzip(&gzip)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn initdata() -> Initdata {
        Initdata::parse("version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\na = \"1\"\n".into()).unwrap()
    }

    #[test]
    fn disk_holds_the_document_in_whole_sectors() {
        let mut image = Vec::new();
        write_image(&initdata(), &mut image).unwrap();
        assert_eq!((image.len() % 512, &image[..8]), (0, &b"initdata"[..]));
        assert_eq!(read_image(&*image).unwrap(), initdata());
    }

    #[test]
    fn disk_that_lies_about_its_length_is_refused() {
        let mut image = Vec::new();
        write_image(&initdata(), &mut image).unwrap();
        image[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(read_image(&*image), Err(ImageError::Length(u64::MAX))));
        image[8..16].copy_from_slice(&(1024_u64 * 1024).to_le_bytes());
        assert!(matches!(read_image(&*image), Err(ImageError::Io(_))));
        image[8..16].copy_from_slice(&9_u64.to_le_bytes());
        assert!(matches!(read_image(&*image), Err(ImageError::Document(DocumentError::Gzip(_)))));
        assert!(matches!(read_image(&b"something else"[..]), Err(ImageError::Magic)));
        assert!(matches!(read_image(&b"init"[..]), Err(ImageError::Head(_))));
        assert!(matches!(read_image(&b"initdata"[..]), Err(ImageError::Io(_))));
    }

    proptest! {
        #[test]
        fn whatever_the_disk_holds_is_taken_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = read_image(&*bytes);
            let _ = read_image([&b"initdata"[..], &bytes].concat().as_slice());
        }
    }
}
