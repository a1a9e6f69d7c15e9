"""Label Studio's backend. PyPI has no label-studio-ml that installs beside numpy 2, so its published interface is stood in for;
what is predicted is read by Label Studio's own SDK where that is installed."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from example_files import load_example

from data_scripts.label_studio import decode_brush

TEXTS = ["the red circle", "all stars", "a unicorn"]
INTERFACE = (
    '<View><Image name="photo" value="$picture"/><BrushLabels name="brush" toName="photo">'
    + "".join(f'<Label value="{text}"/>' for text in TEXTS)
    + "</BrushLabels></View>"
)


class LabelStudioMLBase:
    """What label_studio_ml.model.LabelStudioMLBase publishes and the example uses."""

    def __init__(self, project_id=None, label_config=None):
        self.values = {}
        if label_config is not None:
            try:
                from label_studio_sdk.label_interface import LabelInterface

                self.label_interface = LabelInterface(label_config)
            except ImportError:
                tag = SimpleNamespace(labels=dict.fromkeys(TEXTS))
                self.label_interface = SimpleNamespace(
                    get_first_tag_occurence=lambda control, of: ("brush", "photo", "picture"),
                    get_tag=lambda name: tag,
                )
        self.setup()

    def set(self, key, value):
        self.values[key] = value

    def get(self, key):
        return self.values[key]

    def get_local_path(self, url, project_dir=None, ls_host=None, ls_access_token=None, task_id=None):
        return url.removeprefix("upload://")


class ModelResponse(SimpleNamespace):
    pass


@pytest.fixture
def backend(model_dir, monkeypatch):
    for name, entry in (("model", LabelStudioMLBase), ("response", ModelResponse)):
        module = ModuleType(f"label_studio_ml.{name}")
        setattr(module, entry.__name__, entry)
        monkeypatch.setitem(sys.modules, f"label_studio_ml.{name}", module)
    monkeypatch.setitem(sys.modules, "label_studio_ml", ModuleType("label_studio_ml"))
    monkeypatch.setenv("GSVA_MODEL", f"{model_dir}/")
    module = load_example("label_studio_backend.py")
    return module.GsvaBackend(label_config=INTERFACE), module


def task(folder, picture, **data):
    picture.save(folder / "a.png")
    return {"id": 3, "data": {"picture": f"upload://{folder / 'a.png'}", **data}}


def test_a_mask_for_each_label_that_is_there(backend, make_picture, tmp_path, model_dir):
    model, module = backend
    picture = make_picture(0)
    response = model.predict([task(tmp_path, picture)])
    expected = {one["text"]: one for one in module.segmenter()(picture, expressions=TEXTS) if not one["is_rejected"]}
    (prediction,) = response.predictions
    assert response.model_version == model_dir.name
    assert expected and [result["value"]["brushlabels"] for result in prediction["result"]] == [
        [text] for text in expected
    ]
    for result in prediction["result"]:
        assert (result["from_name"], result["to_name"], result["type"]) == ("brush", "photo", "brushlabels")
        (text,) = result["value"]["brushlabels"]
        assert (decode_brush(result["value"]["rle"], picture.height, picture.width) == expected[text]["mask"]).all()
        assert result["score"] == pytest.approx(expected[text]["probability"])
    assert 0 < prediction["score"] < 1


def test_a_task_may_ask_for_less(backend, make_picture, tmp_path):
    model, _ = backend
    chosen = model.predict([task(tmp_path, make_picture(0), expressions=["all stars", "no label"])]).predictions[0]
    assert {label for result in chosen["result"] for label in result["value"]["brushlabels"]} <= {"all stars"}
    nothing = model.predict([task(tmp_path, make_picture(0), expressions=["no label"])]).predictions
    assert nothing == [{"result": [], "score": 0.0}]


def test_label_studios_sdk_accepts_the_prediction(backend, make_picture, tmp_path):
    pytest.importorskip("label_studio_sdk")
    model, _ = backend
    response = model.predict([task(tmp_path, make_picture(0))])
    prediction = {"model_version": response.model_version, **response.predictions[0]}
    assert prediction["result"] and model.label_interface.validate_prediction(prediction)


def test_without_a_model_the_error_names_the_variable(backend, monkeypatch):
    _, module = backend
    monkeypatch.delenv("GSVA_MODEL")
    with pytest.raises(ValueError, match="GSVA_MODEL is not set"):
        module.segmenter()
