"""The scratch disk: an empty ext4 file system, stored as its few non-zero blocks.

A job's disk is a sparse file with these blocks. The file system has no journal, since the disk never outlives its VM.
The kernel has nothing left to initialize in the background.
"""

import os
from pathlib import Path

from x07_sandbox.channel.contents import next_data
from x07_sandbox.errors import HostError, ImageError
from x07_sandbox.host.os_errors import raised_as
from x07_sandbox.images.manifest import Piece, ScratchDisk

DISK_BYTES = 8 * 1024**3
BLOCK = 4096
MAX_HEAD_BYTES = 4 * 1024 * 1024
UUID = "00000000-0000-4000-8000-000000000007"
HASH_SEED = "00000000-0000-4000-8000-000000000008"
# Listed explicitly, so that defaults do not matter. Without flex_bg, an unused block group has no non-zero block.
FEATURES = (
    "none,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,huge_file,large_file,metadata_csum,"
    "sparse_super2,64bit"
)
EXTENDED = (
    f"num_backup_sb=0,lazy_itable_init=1,assume_storage_prezeroed=1,nodiscard,hash_seed={HASH_SEED},root_owner=0:0"
)


def make_head(folder: Path) -> tuple[bytes, ScratchDisk]:
    """Make an empty scratch disk in *folder*. Return its non-zero blocks and their offsets. Raises ImageError."""
    import tempfile

    from x07_sandbox.images import commands

    with tempfile.NamedTemporaryFile(dir=folder, prefix="scratch-") as disk:
        disk.truncate(DISK_BYTES)
        argv = [commands.tool("mke2fs"), "-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-I", "256", "-i", "16384"]
        argv += ["-m", "0", "-U", UUID, "-O", FEATURES, "-E", EXTENDED, disk.name]
        env = {"E2FSPROGS_FAKE_TIME": str(commands.EPOCH), "MKE2FS_CONFIG": os.devnull}
        commands.run(argv, cwd=folder, timeout_s=60, extra_env=env)
        return read_disk(disk.fileno())


def read_disk(fd: int) -> tuple[bytes, ScratchDisk]:
    """Return the non-zero blocks of the disk *fd* and their offsets. Raises ImageError if there are too many blocks."""
    head = bytearray()
    pieces: list[Piece] = []
    for offset in _data_blocks(fd):
        block = os.pread(fd, BLOCK, offset)
        if not any(block):
            continue
        joins = pieces and pieces[-1].offset + pieces[-1].bytes == offset
        begin = pieces.pop().offset if joins else offset
        pieces.append(Piece(offset=begin, bytes=offset + BLOCK - begin))
        head += block
        if len(head) > MAX_HEAD_BYTES:
            why = f"mke2fs wrote more than {MAX_HEAD_BYTES} bytes"
            raise ImageError("cannot make the scratch disk", why, "Install Debian's e2fsprogs 1.47 or newer")
    return bytes(head), ScratchDisk(bytes=DISK_BYTES, pieces=pieces)


def _data_blocks(fd: int) -> list[int]:
    blocks: list[int] = []
    end = 0
    while True:
        start, end = next_data(fd, end, DISK_BYTES)
        if start == end:
            return blocks
        blocks += range(start - start % BLOCK, end, BLOCK)
        if len(blocks) > DISK_BYTES // BLOCK // 64:
            why = "the cache is on a file system without sparse files"
            fix = "Set X07_VM_CACHE_DIR to a folder on ext4, xfs or btrfs"
            raise ImageError("cannot make the scratch disk", why, fix)


def write_disk(scratch_fd: int, disk: ScratchDisk, fd: int) -> None:
    """Write a scratch disk to the empty file *fd*. scratch_fd: the image's verified scratch file."""
    what = "cannot make a scratch disk"
    fix = "Raise the file size limit with ulimit -f, or set X07_VM_STATE_DIR to a folder on ext4, xfs or btrfs"
    with raised_as(HostError, what, fix):
        os.ftruncate(fd, disk.bytes)
    position = 0
    for piece in disk.pieces:
        data = os.pread(scratch_fd, piece.bytes, position)
        if len(data) != piece.bytes:
            why = "the scratch part of the image was truncated"
            raise ImageError(what, why, "Try again: x07 then verifies the image")
        position += piece.bytes
        written = 0
        with raised_as(HostError, what, "Free disk space, or set X07_VM_STATE_DIR"):
            while written < len(data):  # a full disk accepts a part before it fails
                written += os.pwrite(fd, data[written:], piece.offset + written)
