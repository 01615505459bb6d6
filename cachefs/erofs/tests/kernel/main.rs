//! Images are given to the kernel and to `fsck.erofs`: what is seen through a mount is the tree that was written.

#[cfg(test)]
mod memory;
#[cfg(test)]
mod mounted;
#[cfg(test)]
mod shown;
