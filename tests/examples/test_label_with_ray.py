"""The example for Ray: 500 drawn images on two workers, one of which is killed; slow, and only where Ray is installed."""

import os
import signal

import pyarrow
import pyarrow.parquet
import pytest
from example_files import load_example
from paths import ROOT

import data_scripts
from evaluation.predictor import Predictor

pytest.importorskip("ray.data")
pytestmark = pytest.mark.slow
IMAGES, EXPRESSIONS = 500, ["the red circle", "all stars", "the green square"]
MODEL = str(ROOT / "assets/tiny_gsva")


@pytest.fixture(scope="module")
def example():
    import ray

    module = load_example("label_with_ray.py")
    # workers import the project and the example
    environment = {"env_vars": {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}", "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env=environment, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield module
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    rows = data_scripts.load("shapes", split="test", size=IMAGES, cache_dir=str(tmp_path_factory.mktemp("cache")))
    for number, row in enumerate(rows):
        row["image"].save(folder / f"{number:03d}.png")
    return folder


def worker_pids():
    """The processes of this machine's pool of workers, by the name that Ray gives them."""
    import psutil

    below = psutil.Process().children(recursive=True)
    return [process.pid for process in below if "MapWorker" in " ".join(process.cmdline())]


def sorted_rows(table):
    return sorted(table.to_pylist(), key=lambda row: (row["image_id"], row["expression"]))


def test_every_image_once_with_a_worker_killed_and_rows_equal_to_one_process(example, folder):
    tables, killed = [], []
    options = {"model": MODEL, "expressions": EXPRESSIONS, "threshold": 21.3}  # the base rejects nothing by itself
    for table in example.predictions(str(folder), workers=2, **options):
        tables.append(table)
        if not killed and sum(one.num_rows for one in tables) >= 100 * len(EXPRESSIONS):
            killed = worker_pids()[:1]
            os.kill(killed[0], signal.SIGKILL)
    assert killed and sum(one.num_rows for one in tables[:-1]) < IMAGES * len(EXPRESSIONS)  # there was work left
    found = sorted_rows(pyarrow.concat_tables(tables))
    paths = sorted(folder.iterdir())
    single = Predictor(**options)({"image": list(map(str, paths)), "image_id": [path.name for path in paths]})
    expected = sorted_rows(pyarrow.table(single, schema=tables[0].schema))
    assert [(row["image_id"], row["expression"]) for row in found] == [
        (path.name, text) for path in paths for text in sorted(EXPRESSIONS)
    ]
    floats = ("score", "probability", "iou_estimate")  # batches of other sizes are summed in another order
    for one, other in zip(found, expected):
        for name in floats:
            assert one.pop(name) == pytest.approx(other.pop(name), abs=1e-4)
        assert one == other
    assert 0 < sum(row["is_rejected"] for row in found) < len(found)


def test_a_second_start_goes_on_and_a_damaged_image_is_a_row(example, folder, tmp_path):
    photos = tmp_path / "photos"
    (photos / "below").mkdir(parents=True)
    for number in range(3):
        (photos / "below" / f"{number}.png").write_bytes((folder / f"{number:03d}.png").read_bytes())
    (photos / "broken.png").write_bytes(b"no image")
    options = {"model": MODEL, "expressions": EXPRESSIONS[:2], "workers": 1}
    assert example.label(str(photos), tmp_path / "out", **options) == 8
    (photos / "new.png").write_bytes((folder / "003.png").read_bytes())
    assert example.label(str(photos), tmp_path / "out", **options) == 2
    rows = pyarrow.concat_tables(map(pyarrow.parquet.read_table, sorted((tmp_path / "out").iterdir()))).to_pylist()
    assert {row["image_id"] for row in rows if row["error"] is None} == {
        "new.png",
        *(f"below/{n}.png" for n in range(3)),
    }
    broken = [row for row in rows if row["error"] is not None]
    assert [row["image_id"] for row in broken] == ["broken.png"] * 2 and all(row["mask"] is None for row in broken)


def test_a_predictor_takes_the_batches_of_read_images(example, folder):
    import ray

    images = ray.data.read_images([str(folder / f"{n:03d}.png") for n in range(4)], include_paths=True, mode="RGB",
                                  ray_remote_args={"num_cpus": 0.1})  # fmt: skip
    rows = images.map_batches(
        Predictor, fn_constructor_kwargs={"model": MODEL, "expressions": EXPRESSIONS}, num_cpus=0.9,
        compute=ray.data.ActorPoolStrategy(size=1),
    ).take_all()  # fmt: skip
    assert len(rows) == 12 and {row["expression"] for row in rows} == set(EXPRESSIONS)
    assert all(row["error"] is None for row in rows) and any(row["mask"] is not None for row in rows)
