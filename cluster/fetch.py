"""Copies a folder of a bucket onto this machine while it is set up: python fetch.py s3://bucket/path FOLDER

Nothing there is an error: a machine without its data must not join.
"""

import sys

from pyarrow.fs import FileSystem, FileType, LocalFileSystem, copy_files


def fetch(source: str, folder: str) -> None:
    """Copy all files below ``source``; what cannot be copied ends the program with a line."""
    try:
        bucket, path = FileSystem.from_uri(source)
        if bucket.get_file_info(path).type is not FileType.Directory:
            sys.exit(f"error: there is nothing in {source}: see cluster/README.md, AWS, step 2")
        copy_files(path, folder, source_filesystem=bucket, destination_filesystem=LocalFileSystem())
    except (OSError, ValueError) as error:
        sys.exit(f"error: cannot copy {source} to {folder}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    fetch(*sys.argv[1:])
