"""Tar shards, Parquet, Hugging Face data sets, addresses and videos: the images that were put in come out, in order."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

from traj_ood import Detector, Normalised
from traj_ood.cli import main
from traj_ood.data import Split, load_benchmark
from traj_ood.data.encoded import read_encoded
from traj_ood.data.equal_files import EqualImages
from traj_ood.data.id_images import choose_id_images
from traj_ood.data.records import Opening, files_of, is_records, read_records
from traj_ood.errors import TrajOODError

FILES = [tiny.png(seed) for seed in range(30)]


def tar(path: Path, files: list[tuple[str, bytes]], mode: Any = "w") -> str:
    with tarfile.open(path, mode) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def shards(folder: Path, mode: Any = "w", suffix: str = ".tar") -> str:
    for shard in range(2):
        part = range(15 * shard, 15 * shard + 15)
        pairs = [[(f"{i:03d}.png", FILES[i]), (f"{i:03d}.cls", str(i % 3).encode())] for i in part]
        tar(folder / f"a-{shard:02d}{suffix}", [file for pair in pairs for file in pair], mode)
    return str(folder / f"a-{{00..01}}{suffix}")


def parquet(path: Path, rows: list[Any], column: str = "image") -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({column: rows, "label": [i % 3 for i in range(len(rows))]}), path)
    return str(path)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_tar_shards(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("webdataset", reason="needs traj_ood[sources]")
    source = shards(tmp_path, "w" if suffix == ".tar" else "w:gz", suffix)
    records = list(read_records(source))
    assert [record.content for record in records] == FILES
    assert [record.label for record in records] == [str(i % 3) for i in range(30)]
    assert records[16].key == str(tmp_path / f"a-01{suffix}") + "/016.png"
    tar(tmp_path / "b.tar", [("x/1.png", FILES[0]), ("x/2.txt", b"no image"), ("x/3.jpg", b"torn")])
    assert [bool(record.error) for record in read_records(str(tmp_path / "b.tar"))] == [False, True, False]


_HOSTILE = ("link", "hard link", "absolute", "dots", "device", "bomb", "sparse", "sparse 1.0", "head", "name", "sample")


@pytest.mark.parametrize("kind", [*_HOSTILE, "torn", "empty"])
def test_hostile_tars_are_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("webdataset", reason="needs traj_ood[sources]")
    path = tmp_path / "evil.tar"
    member = tarfile.TarInfo({"absolute": "/etc/1.png", "dots": "a/../../1.png"}.get(kind, "1.png"))
    member.size = len(FILES[0])
    types = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}
    if kind in types:
        member.type, member.linkname, member.size = types[kind], "/etc/passwd", 0
    if kind == "bomb":
        monkeypatch.setattr("traj_ood.data.records.MAX_MEMBER", 10)
    if kind == "sparse":
        member.type = tarfile.GNUTYPE_SPARSE
    if kind == "sparse 1.0":
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "99"}
    if kind == "name":
        member.name = "a/" * 40_000 + "1.png"
    if kind == "sample":
        monkeypatch.setattr("traj_ood.data.records.MAX_SAMPLE", len(FILES[0]) + 1)
    with tarfile.open(path, "w") as archive:
        if kind == "head":
            attributes = tarfile.TarInfo("1.png")
            attributes.type, attributes.size = tarfile.XHDTYPE, 10**5
            archive.addfile(attributes, io.BytesIO(b"x" * 10**5))
        if kind != "empty":
            archive.addfile(member, io.BytesIO(FILES[0]))
        if kind == "sample":
            member.name = "1.jpg"
            archive.addfile(member, io.BytesIO(FILES[0]))
    if kind == "torn":
        path.write_bytes(path.read_bytes()[:700])
    text = {"torn": "cannot be read as a tar", "empty": "found none"}.get(kind, "do not trust")
    with pytest.raises(TrajOODError, match=text):
        list(read_records(str(path)))


def test_of_what_is_no_image_nothing_is_read(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="needs traj_ood[sources]")
    files = [("README", b"r" * 9000), ("1.png", FILES[0]), ("1.json", b"j" * 9000), ("1.cls", b"cat" + b" " * 9000)]
    (one,) = read_records(tar(tmp_path / "a.tar", files))
    assert (one.content, one.label) == (FILES[0], "cat")


def test_files_of_a_source_have_its_records(tmp_path: Path) -> None:
    source = shards(tmp_path)
    (tmp_path / "p").mkdir()
    for i in range(2):
        parquet(tmp_path / "p" / f"{i}.parquet", FILES[i : i + 1])
    for whole in (source, str(tmp_path / "p")):
        files = files_of(whole)
        assert len(files) == 2
        assert [r for file in files for r in read_records(file)] == list(read_records(whole))
    assert files_of("s3://b/a-{08..10}.tar") == [f"s3://b/a-{n}.tar" for n in ("08", "09", "10")]
    assert files_of("hf:name@train") == ["hf:name@train"]


def test_parquet_with_bytes_and_as_hugging_face_writes_it(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    plain = parquet(tmp_path / "a.parquet", FILES, "jpg")
    rows = [{"bytes": content, "path": None} for content in FILES]
    parquet(tmp_path / "folder" / "0.parquet", [*rows, {"bytes": None, "path": "gone"}])
    for source, more in ((plain, 0), (str(tmp_path / "folder"), 1)):
        records = list(read_records(source))
        assert [record.content for record in records] == FILES + [None] * more
        assert [record.label for record in records[:30]] == [str(i % 3) for i in range(30)]
    assert records[30].error == "expected the bytes of an image, found none"
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    with pytest.raises(TrajOODError, match=r"expected a column of images .* got x"):
        list(read_records(str(tmp_path / "x.parquet")))


@pytest.mark.slow
def test_hugging_face_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="needs traj_ood[sources]")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for i in range(4):
        (tmp_path / "set" / "train" / "cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / "train" / "cat" / f"{i}.png").write_bytes(FILES[i])
    records = list(read_records(f"hf:{tmp_path / 'set'}@train"))
    assert sorted(r.content for r in records) == sorted(FILES[:4])


def test_addresses_need_to_be_allowed(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec", reason="needs traj_ood[sources]")
    memory = fsspec.filesystem("memory")
    for i in range(4):
        memory.pipe(f"/bucket/in/{i}.png", FILES[i])
    memory.pipe("/bucket/in/notes.txt", b"none")
    memory.pipe("/bucket/index/0.png", FILES[5])
    allowed = Opening(allow=("memory://bucket/in",))
    records = list(read_records("memory://bucket/in", allowed))
    assert [record.content for record in records] == FILES[:4]
    assert records[0].key == "memory://bucket/in/0.png"
    (one,) = read_records("memory://bucket/in/3.png", allowed)
    assert one.content == FILES[3]
    for address in ("memory://bucket/index", "memory://bucket", "memory://bucket/in/../index", "file:///etc/passwd"):
        with pytest.raises(TrajOODError, match="not an allowed address"):
            list(read_records(address, allowed))
    with pytest.raises(TrajOODError, match=r"allowed: none\): add its prefix with --allow"):
        list(read_records("https://example.org/a.png"))


def test_one_image_of_a_sample_is_meant_or_the_sample_is_broken(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="needs traj_ood[sources]")
    named = [("a.mask.png", 0), ("a.png", 1), ("b.01.png", 2), ("b.02.png", 3), ("c.v1.png", 4)]
    path = tar(tmp_path / "a.tar", [(name, FILES[i]) for name, i in named])
    first, second, third = read_records(path)
    assert (first.key, first.content) == (f"{path}/a.png", FILES[1])
    assert (second.content, third.content) == (None, FILES[4])
    assert second.error == "expected an image in the sample, found 01.png, 02.png (a key ends at the first dot)"


def test_a_benchmark_and_its_commands_read_addresses_that_are_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec = pytest.importorskip("fsspec", reason="needs traj_ood[sources]")
    for name, part in (("train", FILES[:12]), ("test", FILES[12:20]), ("far", FILES[20:])):
        for i, content in enumerate(part):
            fsspec.filesystem("memory").pipe(f"/splits/{name}/{i:02d}.png", content)
    start = "memory://splits"
    path = tmp_path / "b.yaml"
    path.write_text(f"train: {start}/train\ntest: {start}/test\nfar: {{a: '{start}/far'}}\n")
    with pytest.raises(TrajOODError, match=r"allowed: none\): add its prefix with --allow"):
        load_benchmark(str(path))
    found = load_benchmark(str(path), opening=Opening(allow=(start,)))
    assert [len(split.images) for split in found.splits()] == [12, 8, 10]
    assert len(choose_id_images(str(path), opening=Opening(allow=(start,))).fit) == 10
    tiny.conv().save_pretrained(tmp_path / "conv")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAJ_OOD_ALLOW", start)
    here = ["--model", tmp_path / "conv", "--scorers", "field", "--bootstrap", 0, "--no-plots", "--device", "cpu"]
    size = {"family": "conv", "image_size": 8, "channels": 1, "model": {"width": 4, "bottleneck": 6}}
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"name": "c", "benchmark": str(path), **size, "recipe": {"epochs": 1}}))
    for command in (("bench", path, *here), ("train", config, "--out", tmp_path / "own", "--quiet", "--device", "cpu")):
        done = CliRunner().invoke(main, [str(a) for a in command], prog_name="traj-ood")
        assert done.exit_code == 0, done.output


def test_files_at_an_address_keep_what_stands_before_their_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fsspec", reason="needs traj_ood[sources]")
    from fsspec.implementations.ftp import FTPFileSystem
    from fsspec.implementations.local import LocalFileSystem

    class Served(LocalFileSystem):  # paths of ftp and sftp lack the host
        _strip_protocol = FTPFileSystem._strip_protocol

    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(FILES[i])
    for start in (f"file://{tmp_path}", f"ftp://host:21{tmp_path}"):
        monkeypatch.setattr("fsspec.core.url_to_fs", lambda url, **_: (Served(), Served._strip_protocol(url)))
        if start.startswith("file"):
            monkeypatch.undo()
        for source, count in ((start, 3), (f"{start}/", 3), (f"{start}/1.png", 1)):
            found = list(read_records(source, Opening(allow=(start,))))
            assert [record.key for record in found][-1] == f"{start}/{2 if count == 3 else 1}.png"
            assert [record.error for record in found] == [""] * count


def test_frames_of_a_video_at_a_stride(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="needs traj_ood[sources]")
    path = tmp_path / "a.mkv"
    shades = [10 * i for i in range(20)]
    with av.open(str(path), "w") as video:
        stream = video.add_stream("ffv1", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "gray"
        for shade in shades:
            frame = av.VideoFrame.from_ndarray(np.full((16, 16), shade, dtype=np.uint8), format="gray")
            for packet in stream.encode(frame):
                video.mux(packet)
        for packet in stream.encode():
            video.mux(packet)
    records = list(read_records(str(path), Opening(stride=5)))
    assert [record.key for record in records] == [f"{path}#frame={n}" for n in (0, 5, 10, 15)]
    images = read_encoded(str(path), opening=Opening(stride=5))
    assert [np.asarray(images.load(i).convert("L"))[3, 3] for i in range(4)] == pytest.approx([0, 50, 100, 150], abs=2)
    content = path.read_bytes()
    path.write_bytes(content[:100])
    (torn,) = read_records(str(path))
    assert "cannot be decoded any further" in torn.error
    path.write_bytes(content[:1000] + bytes(b ^ 0x5A for b in content[1000:]))
    *whole, torn = read_records(str(path))
    assert 0 < len(whole) < 20
    assert torn.key == f"{path}#frame={len(whole)}"
    assert read_encoded(str(path)).missing() == [f"a.mkv#frame={len(whole)} ({torn.error})"]


def test_a_playlist_is_no_video_and_a_film_of_any_kind_is(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="needs traj_ood[sources]")
    for text in ("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile b.mp4\n"):
        (tmp_path / "a.mp4").write_text(text)
        (one,) = read_records(str(tmp_path / "a.mp4"))
        assert "cannot be decoded any further" in one.error
    for suffix, codec in ((".mp4", "mpeg4"), (".avi", "mpeg4"), (".mkv", "ffv1"), (".mpg", "mpeg2video")):
        with av.open(str(tmp_path / f"b{suffix}"), "w") as video:
            stream = video.add_stream(codec, rate=25)
            stream.width = stream.height = 32
            stream.pix_fmt = "yuv420p"
            frame = av.VideoFrame.from_ndarray(np.full((48, 32), 90, dtype=np.uint8), format="yuv420p")
            for packet in (*stream.encode(frame), *stream.encode()):
                video.mux(packet)
        assert [record.error for record in read_records(str(tmp_path / f"b{suffix}"))] == [""]


# ---------------------------------------------------------------------- in the commands


def test_fit_calibrate_score_and_bench_take_them(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="needs traj_ood[sources]")
    source = shards(tmp_path)
    tiny.vit().save_pretrained(tmp_path / "mae")

    def run(*arguments: object) -> Any:
        done = CliRunner().invoke(main, [str(a) for a in arguments], prog_name="traj-ood")
        assert done.exit_code in (0, 3), done.output
        return done

    held = parquet(tmp_path / "held.parquet", [tiny.png(100 + i) for i in range(25)])
    here = ["--device", "cpu"]
    run("fit", source, "--model", tmp_path / "mae", "--calibrate", held, "--out", tmp_path / "d", *here, "-q")
    run("calibrate", tmp_path / "d", held, "--tpr", "0.9", "--out", tmp_path / "d2", "--device", "cpu")
    bad = tar(tmp_path / "bad.tar", [("1.png", FILES[0]), ("2.png", b"torn"), ("3.txt", b"")])
    out = tmp_path / "rows.jsonl"
    done = run("score", tmp_path / "d2", source, bad, held, "--out", out, "--device", "cpu", "-q")
    assert done.exit_code == 3
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 30 + 3 + 25
    assert [i for i, row in enumerate(rows) if row["reason"].startswith("invalid")] == [31, 32]
    detector = Detector.load(tmp_path / "d2", device="cpu")
    again = detector.decide([Image.open(io.BytesIO(content)) for content in FILES])
    assert [row["score"] for row in rows[:30]] == pytest.approx([one.score for one in again], rel=1e-3)
    run("score", tmp_path / "d2", source, bad, held, "--out", out, "--device", "cpu", "-q", "--resume")

    parquet(tmp_path / "odd.parquet", [tiny.png(200 + i, 9) for i in range(5)])
    (tmp_path / "b.yaml").write_text("name: b\ntrain: a-{00..01}.tar\ntest: held.parquet\nfar: {odd: odd.parquet}\n")
    data = load_benchmark(str(tmp_path / "b.yaml"))
    assert (len(data.train.images), len(data.test.images)) == (30, 25)
    assert data.train.images.ids[0] == "train/a-00.tar/000.png"
    assert data.train.images.labels[:3] == ("0", "1", "2")


def test_bad_records_are_skipped_and_counted_by_a_fit(tmp_path: Path) -> None:
    source = parquet(tmp_path / "a.parquet", [*FILES, b"torn", None])
    images = read_encoded(source)
    model = tiny.conv()
    with pytest.raises(TrajOODError, match=r"first a.parquet#31 \(expected the bytes of an image, found none\)"):
        Detector.fit(model, images, "field")
    made = Detector.fit(model, images, "field", on_error="skip")
    assert (made.training["images"], made.training["skipped"]) == (30, 2)
    whole = torch.stack([model.transform(images.load(i)) for i in range(30)])
    again = Detector.fit(model, Normalised(whole), "field")
    new = Normalised(tiny.images(4, (1, 8, 8), seed=3))
    torch.testing.assert_close(made.score(new), again.score(new), rtol=1e-9, atol=0)


def test_records_that_are_read_otherwise_are_another_split(tmp_path: Path) -> None:
    images = read_encoded(parquet(tmp_path / "a.parquet", FILES))
    one, other = (Split("a", "test", replace(images, exif=on)).digests() for on in (False, True))
    assert one["contents"] != other["contents"]


def test_records_that_are_broken_alike_are_no_copies_of_each_other(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="needs traj_ood[sources]")
    for number, name in enumerate(("train", "test", "far")):
        several = [("0.left.png", FILES[2 * number]), ("0.right.png", FILES[2 * number + 1])]
        tar(tmp_path / f"{name}.tar", [*several, (f"{number + 1}.png", FILES[10 + number // 2])])
    (tmp_path / "b.yaml").write_text("train: train.tar\ntest: test.tar\nfar: {far: far.tar}\n")
    found = load_benchmark(str(tmp_path / "b.yaml"))
    equal = found.copies({s.name: EqualImages(s.images, 8).contents() for s in found.splits()})
    for copies in (found.copies(), equal):  # both shards have FILES[10]
        assert [(c.first, c.second, c.example[0]) for c in copies] == [("train", "test", "test/test.tar/2.png")]


def test_names_tell_the_kind(tmp_path: Path) -> None:
    assert [is_records(n) for n in ("a.tar", "a-{0..3}.tar.gz", "hf:x", "a.parquet", "s3://b/c", "v.MP4")] == [True] * 6
    assert [is_records(n) for n in ("photos", "a.png", "-", "list.txt", "fashion", str(tmp_path))] == [False] * 6
