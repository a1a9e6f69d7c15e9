"""Calibration of rejection: the fit, thresholds for an operating point, bounds that hold, and the command line."""

import json
import math

import numpy as np
import pytest
from evaluations import config_of

from evaluation import calibration
from evaluation.calibrate import main
from evaluation.calibration import Scores, sigmoid
from evaluation.loop import evaluate_rows
from evaluation.run import run_evaluation
from metrics.gres.presence import calibration_error


def drawn(images=300, per_image=4, slope=0.5, offset=-0.7, seed=0):
    """Scores whose true probability is sigmoid(slope · score + offset)."""
    random = np.random.default_rng(seed)
    scores = random.normal(0, 4, images * per_image)
    present = random.random(len(scores)) < sigmoid(slope * scores + offset)
    return Scores(scores, present, np.repeat(np.arange(images), per_image))


def rows_of(data: Scores, **more):
    facts = {"dataset": "grefcoco", "split": "val", "protocol": "slots", "threshold": 0.0, "model": "m", **more}
    return [
        {**facts, "image_id": str(image), "expression": f"e{n}", "is_no_target": not present, "is_rejected": bool(score < 0),
         "score": float(score), "intersection": 0, "union": 1}
        for n, (score, present, image) in enumerate(zip(data.scores, data.is_present, data.images))
    ]  # fmt: skip


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_fit_finds_the_true_parameters():
    temperature, offset = calibration.fit(drawn(images=5000))
    assert temperature == pytest.approx(2.0, rel=0.05) and offset == pytest.approx(-0.7, abs=0.05)


def test_separable_scores_get_finite_parameters():
    data = Scores(np.array([-3.0, -2.0, 2.0, 3.0] * 10), np.array([False, False, True, True] * 10), np.arange(40))
    temperature, offset = calibration.fit(data)
    assert 0 < temperature < 2 and abs(offset) < 1
    flat = Scores(np.array([3.0, 2.0, -2.0, -3.0] * 10), data.is_present, data.images)
    assert np.ptp(sigmoid(flat.scores / calibration.fit(flat)[0])) < 1e-3  # scores that say the opposite: no slope
    same = Scores(np.zeros(40), data.is_present, data.images)
    assert math.isfinite(calibration.fit(same)[0])


def test_too_few_of_a_kind_keep_the_scores_as_they_are():
    data = drawn(images=8)
    assert calibration.fit_or_keep(data)[:2] == (1.0, 0.0)
    assert "are needed to fit" in calibration.fit_or_keep(data)[2]


def test_probabilities_of_other_images_are_calibrated():
    data = drawn(images=1000, slope=0.2, offset=0.5)
    before = calibration_error(sigmoid(data.scores), data.is_present)
    after = calibration_error(calibration.cross_validated(data), data.is_present)
    assert before > 0.1 and after < before / 3


def test_no_image_is_in_the_fit_of_its_own_probability(monkeypatch):
    data, fits = drawn(images=20), []
    monkeypatch.setattr(
        calibration, "fit_or_keep", lambda part: fits.append(set(part.images.tolist())) or (1.0, 0.0, "")
    )
    calibration.cross_validated(data)
    assert len(fits) == calibration.FOLDS
    assert set.union(*(set(range(20)) - fit for fit in fits)) == set(range(20))


SMALL = Scores(np.array([-2.0, 1.0, 3.0, 0.0, 2.0, 4.0]), np.array([0, 0, 0, 1, 1, 1], dtype=bool), np.arange(6))


@pytest.mark.parametrize(
    ("choose", "wanted", "n_acc", "t_acc"),
    [
        (calibration.threshold_for_min_t_acc, 1.0, 1 / 3, 1.0),  # below 0: only -2 is rejected
        (calibration.threshold_for_min_t_acc, 0.6, 2 / 3, 2 / 3),
        (calibration.threshold_for_min_t_acc, 0.3, 1.0, 1 / 3),
        (calibration.threshold_for_min_n_acc, 0.3, 1 / 3, 1.0),
        (calibration.threshold_for_min_n_acc, 0.7, 1.0, 1 / 3),
    ],
)
def test_operating_points_by_hand(choose, wanted, n_acc, t_acc):
    assert calibration.accuracies(SMALL, choose(SMALL, wanted)) == pytest.approx((n_acc, t_acc))


def test_a_goal_that_no_threshold_reaches_says_the_best():
    kept = Scores(np.array([1.0, 2.0, 0.0, 3.0]), np.array([0, 0, 1, 1], dtype=bool), np.arange(4))
    with pytest.raises(
        ValueError, match=r"T_acc at 0.9; the best keeps 0.5000 and rejects 0.5000 .* lower --min_T_acc"
    ):
        calibration.threshold_for_min_t_acc(kept, 0.9)
    above = Scores(np.array([4.0, 2.0, 0.0, 3.0]), np.array([0, 0, 1, 1], dtype=bool), np.arange(4))
    with pytest.raises(
        ValueError, match=r"N_acc to 0.9; the best reaches 0.5000 and keeps 0.5000 .* lower --min_N_acc"
    ):
        calibration.threshold_for_min_n_acc(above, 0.9)


def test_held_out_images_are_a_share_by_seed():
    images = [str(n // 3) for n in range(60)]
    held = calibration.hold_out(images, 0.25)
    assert held.sum() == 15 and (held == calibration.hold_out(images, 0.25)).all()
    assert len({(image, is_held) for image, is_held in zip(images, held)}) == 20  # no image is in both parts
    assert (held != calibration.hold_out(images, 0.25, seed=1)).any()


def test_the_calibration_error_of_right_probabilities_is_chance():
    data = drawn(images=1000, slope=1.0, offset=0.0)
    least = calibration.least_calibration_error(sigmoid(data.scores))
    assert 0 < least < 0.02 and calibration_error(sigmoid(data.scores), data.is_present) < 2 * least
    assert calibration.least_calibration_error(np.array([0.0, 1.0])) == 0.0


def test_the_balance_by_hand():
    assert calibration.accuracies(SMALL, calibration.threshold_for_balance(SMALL)) == pytest.approx((2 / 3, 2 / 3))


def test_a_risk_bound_holds_as_often_as_it_says():
    """Of many validation sets, at most 1 - confidence choose a threshold whose true risk is above the wanted one."""
    population, wanted, above, chosen = drawn(images=20000, slope=1.0, offset=0.0, seed=99), 0.15, 0, 0
    for seed in range(60):
        try:
            threshold = calibration.threshold_for_max_risk(drawn(300, 3, 1.0, 0.0, seed), wanted, 0.9)
        except ValueError:
            continue
        chosen += 1
        kept = population.scores >= threshold
        above += (~population.is_present[kept]).mean() > wanted
    assert chosen > 50 and above / chosen <= 0.1


def test_an_impossible_risk_says_the_best():
    with pytest.raises(ValueError, match=r"lowest risk that holds is 0\.\d+\. Give a higher --max_risk"):
        calibration.threshold_for_max_risk(drawn(images=40), 0.001)


def test_binomial_bounds_by_hand():
    assert calibration.binomial_tail(0, 4, 0.5) == pytest.approx(1 / 16)
    assert calibration.binomial_tail(4, 4, 0.5) == pytest.approx(1.0)
    assert calibration.risk_bound(0, 10, 0.05) == pytest.approx(1 - 0.05**0.1, abs=1e-9)
    assert calibration.risk_bound(3, 3, 0.05) == 1.0


# --- the command line ---


@pytest.fixture
def rows_file(tmp_path):
    return write_rows(tmp_path / "rows_val.jsonl", rows_of(drawn(images=200)))


def test_a_calibration_is_written_and_used(model_dir, processor, make_picture, rows_file, tmp_path, capsys):
    import shutil

    from modeling_gsva import GsvaForConditionalGeneration

    shutil.copytree(model_dir, tmp_path / "model")
    before = json.loads((tmp_path / "model/config.json").read_text())
    assert main([str(rows_file), "--min_T_acc", "0.9", "--model", str(tmp_path / "model")]) == 0
    result = json.loads((tmp_path / "calibration.json").read_text())
    after = json.loads((tmp_path / "model/config.json").read_text())
    rejection = after.pop("rejection")
    before.pop("rejection", None)
    assert after == before and rejection["threshold"] == result["threshold"] and rejection["no_targets"] > 0
    assert result["T_acc"]["value"] >= 0.9 and result["T_acc"]["interval"][0] <= result["T_acc"]["value"]
    assert result["calibration_error"]["after"]["value"] < result["calibration_error"]["before"]["value"]
    page = (tmp_path / "calibration.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and f"{result['threshold']:.4f}" in page
    assert "reject below" in capsys.readouterr().out
    model = GsvaForConditionalGeneration.from_pretrained(tmp_path / "model")
    plain = GsvaForConditionalGeneration.from_pretrained(model_dir)
    inputs = processor(images=[make_picture()], expressions=[["a cat", "the dog", "two men"]], return_tensors="pt")
    (ours,) = processor.post_process_segmentation(model.segment(**inputs), inputs)
    (usual,) = processor.post_process_segmentation(plain.segment(**inputs), inputs)
    for mine, theirs in zip(ours, usual, strict=True):
        assert mine["score"] == theirs["score"] and mine["is_rejected"] == (mine["score"] < result["threshold"])
        logit = mine["score"] / result["temperature"] + result["offset"]
        assert mine["probability"] == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-6)
        assert theirs["is_rejected"] == (theirs["score"] < 0)
        assert theirs["probability"] == pytest.approx(1 / (1 + math.exp(-theirs["score"])), abs=1e-6)
    rows = [{"image": make_picture(), "image_id": "0", "height": 30, "width": 40, "expressions": []}]
    assert config_of(rows).for_model(model).threshold == result["threshold"]
    assert config_of(rows, threshold=0.25).for_model(model).threshold == 0.25


def test_half_of_the_images_measure_the_calibration_of_the_others(tmp_path, capsys):
    """The wanted T-acc holds within its interval, and the calibration error falls to a third, on images not looked at."""
    data = drawn(images=600, slope=0.25, offset=-1.5, seed=3)
    file = write_rows(tmp_path / "rows_val.jsonl", rows_of(data))
    assert main([str(file), "--min_T_acc", "0.9", "--hold_out", "0.5", "--output", str(tmp_path / "half")]) == 0
    result = json.loads((tmp_path / "half/calibration.json").read_text())
    assert result["images"] == result["measured_on"]["images"] == 300
    assert result["expressions"] + result["measured_on"]["expressions"] == 2400
    low, high = result["T_acc"]["interval"]
    assert low <= 0.9 <= high
    error = result["calibration_error"]
    assert error["after"]["value"] <= error["before"]["value"] / 3 and error["if_right"] > 0
    half = data.select(~calibration.hold_out([str(image) for image in data.images], 0.5))
    assert result["threshold"] == calibration.threshold_for_min_t_acc(half, 0.9)
    assert "on 300 images that were held out" in capsys.readouterr().out
    assert "300 images that were held out" in (tmp_path / "half/calibration.html").read_text()


def test_a_run_is_calibrated_by_its_slots_rows(model, processor, rows, tmp_path, capsys):
    for protocol in ("generate", "slots"):
        run_evaluation(model, processor, config_of(rows, protocol=protocol), tmp_path / "run", "as loaded", "tiny")
    assert main([str(tmp_path / "run"), "--balance"]) == 0
    result = json.loads((tmp_path / "run/calibration.json").read_text())
    scores = evaluate_rows(model, processor, config_of(rows)).rows
    assert result["expressions"] == len(scores) and result["notes"][0].startswith("Only 3 no-targets")
    assert any("more are needed for an interval of N_acc of ±0.05" in note for note in result["notes"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("two models", "model is"),
        ("two thresholds", "threshold is"),
        ("no scores", "have no score"),
        ("no no-targets", "hold no no-targets"),
        ("no file", "no such rows file"),
        ("no model", "has no config.json"),
        ("another model", "of type 'llama'"),
        ("risk", "No threshold keeps the risk"),
        ("T_acc", "No threshold that rejects a no-target keeps T_acc at 0.99"),
        ("a folder that cannot be written", "cannot be written; copy it"),
        ("half without no-targets", "rows hold no no-targets"),
    ],
)
def test_what_cannot_be_calibrated_is_named(rows_file, tmp_path, capsys, monkeypatch, damage, message):
    rows, words = [json.loads(line) for line in rows_file.read_text().splitlines()], [str(rows_file), "--balance"]
    if damage == "two models":
        rows[0]["model"] = "other"
    elif damage == "two thresholds":
        rows[0]["threshold"] = 1.0
    elif damage == "no scores":
        rows[0]["score"] = None
    elif damage == "no no-targets":
        rows = [row for row in rows if not row["is_no_target"]]
    elif damage == "no file":
        words[0] = str(tmp_path / "nothing.jsonl")
    elif damage == "risk":
        words[1:] = ["--max_risk", "0.0001"]
    elif damage == "T_acc":
        words[1:] = ["--min_T_acc", "0.99"]
        rows[0].update(is_no_target=False, score=-99.0)
        rows = [row for row in rows if row["is_no_target"] or row is rows[0]]
    elif damage == "half without no-targets":
        words += ["--hold_out", "0.5"]
        rows = [row for row in rows if not row["is_no_target"] or row["image_id"] == "3"]
    elif damage in ("no model", "another model", "a folder that cannot be written"):
        (tmp_path / "m").mkdir()
        words += ["--model", str(tmp_path / "m")]
        if damage != "no model":
            kind = "llama" if damage == "another model" else "gsva"
            (tmp_path / "m/config.json").write_text(json.dumps({"model_type": kind}))
        monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    write_rows(rows_file, rows)
    assert main(words) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "calibration.json").exists()


def test_a_confidence_needs_a_risk(rows_file, capsys):
    with pytest.raises(SystemExit):
        main([str(rows_file), "--balance", "--confidence", "0.9"])
    assert "--confidence belongs to --max_risk" in capsys.readouterr().err
