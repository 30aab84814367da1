import tarfile
import zipfile

import pytest

from vlmsft.data.prepare.archive import match, unpack
from vlmsft.errors import UserError


@pytest.mark.parametrize("kind", ["zip_archive", "tar_archive"])
def test_only_what_is_named_is_unpacked_under_the_records_name(kind, request, photographs, tmp_path):
    archive, out = request.getfixturevalue(kind), tmp_path / "images"
    names = [f"coco/train2017/{name}" for name in list(photographs)[:4]]
    done = []
    assert unpack(archive, names, out, done.append) == ({}, None)
    assert {str(path.relative_to(out)) for path in out.rglob("*.*")} == set(names)
    assert (out / names[2]).read_bytes() == list(photographs.values())[2]
    assert sum(done) == 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("coco/train2017/1.jpg", [0]),  # the member lies less deep
        ("2.jpg", [1]),  # deeper
        ("train2017/1.jpg", [0]),  # the same
        ("3.jpg", [2, 3]),  # two may be meant
        ("b/3.jpg", [3]),
        ("val2017/1.jpg", []),
        ("evil.jpg", []),  # a member with ".." is never taken
    ],
)
def test_match(name, expected):
    members = ["train2017/1.jpg", "train2017/2.jpg", "a/3.jpg", "b/3.jpg", "../evil.jpg"]
    assert match(members, [name]) == {name: expected}


def test_zip_slip(zip_archive, tmp_path):
    problems, _ = unpack(zip_archive, ["evil.jpg"], tmp_path / "deep/er/images", lambda _: None)
    assert "no member for image evil.jpg" in str(problems["evil.jpg"])
    assert not list(tmp_path.rglob("evil.jpg"))


def test_two_members_for_one_name(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/1.jpg", b"1")
        file.writestr("b/1.jpg", b"2")
    problems, _ = unpack(path, ["1.jpg"], tmp_path / "images", lambda _: None)
    assert "2 members" in str(problems["1.jpg"]) and "a/1.jpg, b/1.jpg" in str(problems["1.jpg"])


def damage(path, data):
    content = bytearray(path.read_bytes())
    position = content.index(data[1000:1100])
    content[position : position + 50] = bytes(50)
    path.write_bytes(content)


def test_a_damaged_member_of_a_zip_is_named_and_the_others_are_unpacked(zip_archive, photographs, tmp_path):
    names = list(photographs)
    damage(zip_archive, photographs[names[2]])
    problems, cut = unpack(zip_archive, names, tmp_path / "images", lambda _: None)
    assert list(problems) == [names[2]] and cut is None
    assert f"train2017.zip: train2017/{names[2]}" in str(problems[names[2]]) and "CRC" in str(problems[names[2]])
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == sorted(set(names) - {names[2]})


def test_a_zip_that_is_cut_off(zip_archive, tmp_path):
    zip_archive.write_bytes(zip_archive.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"train2017.zip: found what can't be opened as zip.*at the end: get it again"):
        unpack(zip_archive, ["a.jpg"], tmp_path / "images", lambda _: None)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("where", ["data", "boundary", "header"])
def test_a_tar_that_is_cut_off_keeps_what_came_before(tmp_path, photographs, packed, where):
    import gzip

    path, names = tmp_path / "x.tar", list(photographs)
    with tarfile.open(path, "w") as tar:
        for name, data in photographs.items():
            (tmp_path / name).write_bytes(data)
            tar.add(tmp_path / name, name)
    with tarfile.open(path) as tar:
        member = tar.getmember(names[3])
    end = {"data": member.offset_data + 1000, "boundary": member.offset, "header": member.offset + 100}[where]
    content = path.read_bytes()
    path.write_bytes(
        gzip.compress(content)[:-9000]
        if packed and where == "data"
        else gzip.compress(content[:end])
        if packed
        else content[:end]
    )
    problems, cut = unpack(path, names, tmp_path / "images", lambda _: None)
    assert cut is not None and "cut off after" in str(cut)
    unpacked = {file.name for file in (tmp_path / "images").iterdir()}
    assert unpacked == set(names) - set(problems) and names[0] in unpacked and problems
    for name in unpacked:
        assert (tmp_path / "images" / name).read_bytes() == photographs[name]


def test_no_archive_at_all(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"nothing" * 1000)
    with pytest.raises(UserError, match="can't be opened as tar"):
        unpack(tmp_path / "x.tar", ["a.jpg"], tmp_path / "images", lambda _: None)
