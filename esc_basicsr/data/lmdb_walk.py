"""A program that reads where an LMDB's records are, and says what is wrong; it imports lmdb alone.

liblmdb notices most damage, and crashes on the rest: `lmdb_reader.check_lmdb` lets this program crash first.
Of the records' own pages none is read, so that it takes about a second for a million records.
"""

import os
import sys

import lmdb


def fault_of(folder: str) -> str | None:
    """Return what is wrong with the LMDB in ``folder``, or None."""
    size = os.path.getsize(os.path.join(folder, "data.mdb"))  # noqa: PTH118, PTH202 - pathlib takes longer to import
    try:
        with lmdb.open(folder, readonly=True, lock=False) as environment:
            stat = environment.stat()
            needed = (environment.info()["last_pgno"] + 1) * stat["psize"]
            if size < needed:
                return f"{size:,} bytes of {needed:,}"
            entries = pages = 0
            with environment.begin(buffers=True) as transaction:
                for record in transaction.cursor().iternext(keys=False):
                    entries += 1
                    if len(record) > stat["psize"] // 2:  # has pages of its own, which begin with 16 bytes
                        pages += (15 + len(record)) // stat["psize"] + 1
                    if entries > stat["entries"] or pages > stat["overflow_pages"]:
                        return "there is more in it than its head says"
            return None if entries == stat["entries"] else "there is less in it than its head says"
    except lmdb.Error as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(fault_of(sys.argv[1]))
