"""Untrusted files: names that lead out of their folder, and images that would fill the memory."""

import io
import os
import struct
import zlib

import data_trees as trees
import pytest
from PIL import Image

import data_scripts
from data_scripts.images import PictureError, read_image
from data_scripts.masks import max_image_pixels
from data_scripts.records import inside
from modeling_gsva import GsvaImageProcessor


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    trees.picture(tmp_path / "secret/1.jpg")
    return tmp_path / "data"


def bomb(side: int) -> bytes:
    """A PNG whose header states side x side pixels, in a hundred bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# ---- names -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["../x.jpg", "/etc/passwd", "a/../../x.jpg", "", None, 7, "a\0b", ".", ".."])
def test_names_that_lead_out(tmp_path, name):
    with pytest.raises(ValueError, match="file name"):
        inside(tmp_path, name)


def test_names_that_stay(tmp_path):
    assert inside(tmp_path, "a/b.jpg") == tmp_path / "a/b.jpg"  # whether it is there, whoever opens it says
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert inside(tmp_path / "link", "b.jpg") == tmp_path / "link/b.jpg"  # the folder itself is the user's
    assert inside(tmp_path, "link/b.jpg") == tmp_path / "link/b.jpg"


def test_links_that_lead_out(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "else").mkdir()
    (tmp_path / "data/x.jpg").symlink_to(tmp_path / "else/x.jpg")
    with pytest.raises(ValueError, match=r"data/x\.jpg is a link to .*else/x\.jpg.*GSVA_TRUSTED_FOLDERS"):
        inside(tmp_path / "data", "x.jpg")
    monkeypatch.setenv("GSVA_TRUSTED_FOLDERS", f"/nowhere{os.pathsep}{tmp_path / 'else'}")
    assert inside(tmp_path / "data", "x.jpg") == tmp_path / "data/x.jpg"


AWAY = "../secret/1.jpg"


@pytest.mark.parametrize(
    "name", ["refcoco", "refzom", "pascal_part", "llava_instruct_150k", "own", "ade20k", "ReasonSeg"]
)
def test_every_kind_of_reader_stays_in_its_folder(root, name):
    far = "../" * 8 + str(root.parent / "secret/1.jpg").lstrip("/")
    if name in ("refcoco", "refzom"):
        trees.referring(root, name, [trees.ref()])
        path = root / "refer_seg" / name / "instances.json"
        path.write_text(path.read_text().replace('"1.jpg"', f'"{far}"'))
    elif name == "pascal_part":
        trees.parts(root, name, "dog:head")
        path = root / "vlpart/pascal_part/train.json"
        path.write_text(path.read_text().replace('"1.jpg"', f'"{far}"'))
    elif name == "llava_instruct_150k":
        trees.llava(root, ("human", "<image>\nHi"), ("gpt", "Hi"), image=far)
    elif name == "own":
        trees.write(root / "train.jsonl", f'{{"image": "{AWAY}", "expressions": []}}')
    else:
        (trees.ade20k(root, trees.full(1)) if name == "ade20k" else trees.reason_seg(root))
        folder = root / ("ade20k/images/training" if name == "ade20k" else "reason_seg/ReasonSeg/train")
        (picture,) = folder.glob("*.jpg")
        picture.unlink()
        picture.symlink_to(root.parent / "secret/1.jpg")
    with pytest.raises(ValueError, match="leads out of|is a link to"):
        data_scripts.load(name, root)


def test_a_published_set_holds_its_pictures(root, tmp_path):
    import datasets

    features = data_scripts.schema.SEGMENTATION_FEATURES
    row = {"image": {"path": str(tmp_path / "secret/1.jpg"), "bytes": None}, "image_id": "1", "height": 30, "width": 40,
           "expressions": []}  # fmt: skip
    (root / "evil").mkdir(parents=True)
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([row], schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, root / "evil/train.parquet")
    assert datasets.load_dataset(str(root / "evil"), split="train")[0]["image"].size == (
        40,
        30,
    )  # by itself it is opened
    with pytest.raises(ValueError, match="names images by their paths instead of holding them"):
        data_scripts.load(str(root / "evil"))


def test_chats_stay_in_the_working_directory(processor, tmp_path, monkeypatch):
    trees.picture(tmp_path / "work/1.jpg")
    trees.picture(tmp_path / "secret/1.jpg")
    monkeypatch.chdir(tmp_path / "work")

    def chat(**image):
        content = [{"type": "image", **image}, {"type": "text", "text": "Where?"}]
        messages = [{"role": "user", "content": content}]
        return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")

    assert len(chat(path="1.jpg")["pixel_values"]) == len(chat(url=str(tmp_path / "work/1.jpg"))["pixel_values"]) == 1
    for name in ("path", "url", "image"):
        for file in ("../secret/1.jpg", str(tmp_path / "secret/1.jpg")):
            with pytest.raises(ValueError, match=r"names the file .*secret/1\.jpg.*GSVA_TRUSTED_FOLDERS"):
                chat(**{name: file})
    monkeypatch.setenv("GSVA_TRUSTED_FOLDERS", str(tmp_path / "secret"))
    assert len(chat(path="../secret/1.jpg")["pixel_values"]) == 1


# ---- sizes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", [10_000, 60_000])  # above Pillow's warning, and above what Pillow itself refuses
def test_absurd_pictures_are_refused_by_the_readers(tmp_path, side):
    path = trees.write(tmp_path / "bomb.png", bomb(side))
    for image in ({"path": str(path), "bytes": None}, {"path": "bomb.png", "bytes": path.read_bytes()}):
        with pytest.raises(
            PictureError, match=r"bomb\.png cannot be read .*(more than 89478485 pixels|exceeds limit)"
        ):
            read_image(image)


@pytest.mark.parametrize("said", ["1199", "1200"])
def test_the_readers_limit_is_settable(tmp_path, monkeypatch, said):
    path = trees.picture(tmp_path / "1.jpg")  # 30 x 40
    monkeypatch.setenv("GSVA_MAX_IMAGE_PIXELS", said)
    if said == "1200":
        assert read_image({"path": str(path), "bytes": None}).size == (40, 30)
        return
    with pytest.raises(PictureError, match="30 x 40 .height x width. is more than 1199 pixels.*GSVA_MAX_IMAGE_PIXELS"):
        read_image({"path": str(path), "bytes": None})
    with pytest.raises(PictureError, match="more than 1199"):
        read_image(Image.open(path))


@pytest.mark.parametrize("said", ["0", "-1", "many", "1e9"])
def test_a_limit_that_is_none(monkeypatch, said):
    monkeypatch.setenv("GSVA_MAX_IMAGE_PIXELS", said)
    with pytest.raises(ValueError, match="GSVA_MAX_IMAGE_PIXELS"):
        max_image_pixels()


def test_the_image_processor_refuses_before_decoding(tmp_path, monkeypatch):
    path = trees.write(tmp_path / "bomb.png", bomb(10_000))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"), raising=False)
    for image in (str(path), Image.open(io.BytesIO(bomb(10_000)))):
        with pytest.raises(ValueError, match="10000 x 10000 .height x width., more than max_image_pixels=89478485"):
            GsvaImageProcessor()(image)


def test_the_image_processors_limit_is_settable_and_saved(tmp_path):
    processor = GsvaImageProcessor(max_image_pixels=1199)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="30 x 40 .*max_image_pixels=1199"):
        GsvaImageProcessor.from_pretrained(tmp_path)(Image.new("RGB", (40, 30)))
    assert len(GsvaImageProcessor(max_image_pixels=1200)(Image.new("RGB", (40, 30)))["pixel_values"]) == 1
