import lmdb
import numpy as np
import pytest

from esc_basicsr.common.errors import UserError
from esc_basicsr.data.building.lmdb_verification import verify_lmdb
from esc_basicsr.data.building.lmdb_writer import build_lmdb_sets


def _change(folder, **records):
    with lmdb.open(str(folder)) as environment, environment.begin(write=True) as transaction:
        for key, change in records.items():
            record = change(transaction.get(key.encode()))
            if record is None:
                transaction.delete(key.encode())
            else:
                transaction.put(key.encode(), record)


def _flipped(record):
    return record[:2000] + bytes([record[2000] ^ 1]) + record[2001:]


def test_sound_set_is_told_by_its_number_of_records(hr_lmdb):
    assert verify_lmdb(hr_lmdb) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_flipped, "record 'chelsea' has other bytes than were written"),
        (lambda record: record[:-1], "record 'chelsea' has other bytes than were written"),
        (lambda record: None, "record 'chelsea' is missing"),
    ],
)
def test_damaged_record_is_named(hr_lmdb, change, said):
    _change(hr_lmdb, chelsea=change)
    with pytest.raises(UserError, match=f"1 of 3 records are not what they should be: {said}. Build the set"):
        verify_lmdb(hr_lmdb)


def test_record_of_another_size_than_listed_is_named(hr_lmdb):
    listing = hr_lmdb / "meta_info.txt"
    listing.write_text(listing.read_text().replace("(96,120,3)", "(96,121,3)"))
    with pytest.raises(UserError, match=r"record 'chelsea' is 120x96, but meta_info\.txt says 121x96"):
        verify_lmdb(hr_lmdb)


def test_set_without_checksums_is_decoded(hr_lmdb):
    (hr_lmdb / "checksums.txt").unlink()
    assert verify_lmdb(hr_lmdb) == 3
    _change(hr_lmdb, chelsea=lambda record: record[:100], coffee=lambda record: b"")
    with pytest.raises(
        UserError, match=r"2 of 3 .*'chelsea' cannot be decoded; record 'coffee' cannot be dec"
    ):
        verify_lmdb(hr_lmdb)


def test_images_taken_out_of_the_list_are_no_fault_and_added_ones_are(hr_lmdb):
    lines = (hr_lmdb / "meta_info.txt").read_text().splitlines(keepends=True)
    (hr_lmdb / "meta_info.txt").write_text(lines[0] + lines[2])
    assert verify_lmdb(hr_lmdb) == 2
    (hr_lmdb / "meta_info.txt").write_text("other.png (8,8,3) 0\n" + lines[0])
    with pytest.raises(UserError, match="record 'other' is missing"):
        verify_lmdb(hr_lmdb)


def test_damaged_files_are_told(hr_lmdb):
    checksums = (hr_lmdb / "checksums.txt").read_text()
    (hr_lmdb / "checksums.txt").write_text(checksums.replace("chelsea", "chelsea "))
    assert verify_lmdb(hr_lmdb) == 3
    (hr_lmdb / "checksums.txt").write_text(checksums.replace("chelsea", "chel sea"))
    with pytest.raises(UserError, match=r"checksums\.txt, line 2: expected 'key bytes checksum'"):
        verify_lmdb(hr_lmdb)
    (hr_lmdb / "data.mdb").write_bytes(b"damaged" * 2000)
    with pytest.raises(UserError, match="cannot be read"):
        verify_lmdb(hr_lmdb)


def test_many_damaged_records_are_counted_and_the_first_named(tmp_path):
    images = {f"i{number:02d}": np.full((8, 8, 3), number, np.uint8) for number in range(30)}
    folder = build_lmdb_sets(images, tmp_path, "x", crop_size=0)[1]
    _change(folder, **{key: lambda record: b"" for key in images})
    with pytest.raises(
        UserError, match=r"30 of 30 records .*'i09' has other bytes[^;]*; and 20 more\. Build"
    ):
        verify_lmdb(folder)
