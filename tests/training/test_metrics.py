"""Log, alarms, measures and plot."""

import json
import math

import pytest
import torch
from PIL import Image

from training.config import Resolved, TrainRecipe, lay_over
from training.data.samples import BadSample
from training.metrics import MAX_SKIPPED, STREAK, DivergedError, Log, PrototypeUse, Rails, rank_me
from training.plot import plot

K = 4096


def resolved(**changes) -> Resolved:
    base = {
        "name": "small",
        "run": "unused",
        "model": {"arch": "vit_small"},
        "data": {"parts": {"all": {"kind": "folder", "location": "unused"}}, "batch_size": 8},
        "objective": {"dino": {"head": {"num_prototypes": K}}, "temperature": {"warmup": 0}},
        "schedule": {"length": 1000, "warmup": 100},
    }
    return TrainRecipe.model_validate(lay_over(base, changes)).resolved("pretrain")


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def told(rails: Rails, record: dict, num: int = STREAK, first: int = 500) -> list[str]:
    return [alarm for step in range(first, first + num) for alarm in rails.check(record, step)]


def test_a_log_has_each_step_once_after_a_resume(tmp_path):
    path = tmp_path / "log.jsonl"
    with Log(path, from_step=0, is_main=True) as log:
        for step in range(5):
            log.write(step, {"dino": 1.0 + step})
        log.note(4, "odd")
    with path.open("a") as file:
        file.write('{"step": 5, "di')  # killed while it wrote
    with Log(path, from_step=3, is_main=True) as log:
        assert [line["step"] for line in lines(path)] == [0, 1, 2]
        log.write(3, {"dino": 9.0})
        assert [line["dino"] for line in lines(path)] == [1.0, 2.0, 3.0, 9.0], "a line is there at once"
    with Log(path, from_step=0, is_main=True):
        assert path.read_text() == ""


def test_a_line_cut_off_at_its_end_is_dropped_on_resume(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0, "dino": 1.0}\n{"step": 1, "dino": 2.0}')
    with Log(path, from_step=2, is_main=True) as log:
        log.write(2, {"dino": 3.0})
    assert [line["step"] for line in lines(path)] == [0, 2]


def test_a_log_is_json_even_where_a_value_is_not_finite(tmp_path):
    path = tmp_path / "log.jsonl"
    with Log(path, from_step=0, is_main=True) as log:
        log.write(0, {"dino": math.nan, "ibot": math.inf, "is_masked": True})
    (line,) = (json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines())
    assert line == {"step": 0, "dino": None, "ibot": None, "is_masked": True}
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"], "no picture was bad"


def test_bad_pictures_are_named_in_a_file_of_their_own_once_each_after_a_resume(tmp_path):
    path, bad_path = tmp_path / "log.jsonl", tmp_path / "bad_samples.jsonl"
    sample = BadSample(part="web", shard="000.tar", key="7", reason="decode_corrupt")
    with Log(path, from_step=0, is_main=True) as log:
        for step in (0, 3, 3, 5):
            log.bad(step, sample)
            log.write(step, {"dino": 1.0})
        assert len(lines(bad_path)) == 4, "a line is there at once"
    with Log(path, from_step=3, is_main=True) as log:
        log.bad(4, sample)
    named = {"part": "web", "shard": "000.tar", "key": "7", "reason": "decode_corrupt"}
    assert lines(bad_path) == [{"step": 0} | named, {"step": 4} | named]
    assert lines(path) == [{"step": 0, "dino": 1.0}]


def test_other_ranks_write_nothing(tmp_path):
    with Log(tmp_path / "log.jsonl", from_step=0, is_main=False) as log:
        log.write(0, {"dino": 1.0})
        log.note(0, "odd")
        log.bad(0, BadSample(part="web", shard="000.tar", key="7", reason="decode_corrupt"))
    assert list(tmp_path.iterdir()) == []


def test_scalars_for_tensorboard_or_a_note_that_there_are_none(tmp_path):
    path = tmp_path / "log.jsonl"
    with Log(path, from_step=0, is_main=True, tensorboard=True) as log:
        log.write(0, {"dino": 1.0})
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        assert "not installed" in lines(path)[0]["alarm"]
    else:
        assert any((tmp_path / "tensorboard").iterdir())


def test_steps_that_are_not_finite_are_told_and_end_the_run_when_too_many_follow_each_other():
    rails = Rails(resolved())
    bad, good = {"dino": math.nan, "norm_backbone": math.inf, "is_skipped": 1.0}, {"dino": 5.0, "is_skipped": 0.0}
    assert rails.check(bad, 0) == [
        "dino, norm_backbone not finite: step skipped, weights and teacher stay (1 in a row)"
    ]
    assert rails.check(good, 1) == []
    for step in range(MAX_SKIPPED - 1):
        assert len(rails.check(bad, 2 + step)) == 1
    with pytest.raises(DivergedError, match=r"dino, norm_backbone not finite for 10 steps in a row; go on with"):
        rails.check(bad, 20)


def test_uniform_collapse_is_told_once_past_the_warmup():
    rails, record = Rails(resolved()), {"dino": 8.3178, "is_skipped": 0.0}
    assert told(rails, record, first=0) == [], "all runs begin so"
    rails = Rails(resolved())
    assert told(rails, record, STREAK - 1) == [], "some steps may be chance"
    assert len(told(rails, record, 50)) == 1
    assert told(rails, {"dino": 7.0}, 50) == []
    assert "uniform" in told(rails, record)[0], "and again when it comes back"


def test_the_level_of_ibot_counts_crops_without_a_mask():
    rails = Rails(resolved(masks={"probability": 0.25}))
    assert told(rails, {"ibot": math.log(K) / 4}) != []
    rails = Rails(resolved(masks={"probability": 0.25}, objective={"ibot": {"start": 900}}))
    assert told(rails, {"ibot": 0.0}) == [], "it is not on yet"


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ({"dino": 0.01}, "nearly 0"),
        ({"dino": 5.0, "prototype_use": 0.001}, "prototypes"),
        ({"dino": 5.0, "duplicate_pairs": 3.0}, "3 pairs"),
        ({"dino": 5.0, "rank_me_val": 2.5}, "rank_me_val 2.5 of 384"),
        ({"dino": 5.0, "rank_me_val": math.nan}, "not finite"),
    ],
)
def test_each_other_collapse_is_told(record, word):
    alarms = told(Rails(resolved()), record)
    assert alarms
    assert word in alarms[0]


def test_a_healthy_run_raises_no_alarm():
    record = {"dino": 6.0, "ibot": 3.0, "prototype_use": 0.6, "prototypes_used": 16.0, "duplicate_pairs": 0.0}
    assert told(Rails(resolved()), record | {"rank_me_val": 100.0}, 50) == []


def test_prototype_use_looks_at_a_window_of_steps():
    use = PrototypeUse(8, window=2)
    eye = torch.eye(8)
    assert use.update(eye[[0, 0, 1, 1]]) == 2 / 4
    assert use.update(eye[[2, 2, 1, 3]]) == 4 / 8
    assert use.update(eye[[7, 7, 7, 7]]) == 4 / 8, "1, 2, 3, 7: prototype 0 was used too long ago"
    assert use.update(eye[[7, 7, 7, 7]]) == 1 / 8


def test_rank_me_counts_equal_directions():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64)).Q
    for num in (1, 5, 64):
        assert rank_me(basis[:num].repeat(3, 1)) == pytest.approx(num, rel=1e-3)
    assert rank_me(torch.ones(10, 6)) == pytest.approx(1, rel=1e-3)
    for value in (math.nan, math.inf):
        assert math.isnan(rank_me(torch.ones(10, 6).index_fill(1, torch.tensor([2]), value)))


def test_rank_me_is_the_formula_of_the_paper():
    torch.manual_seed(1)
    for shape in ((200, 12), (7, 30)):
        x = torch.randn(shape) * torch.rand(shape[1])
        values = torch.linalg.svdvals(x.double())
        p = values / values.sum() + 1e-7
        assert rank_me(x) == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-4)


def test_a_plot_is_drawn_of_a_short_log_a_long_one_and_one_without_losses(tmp_path):
    path = tmp_path / "log.jsonl"
    for num, record in ((1, {"dino": 5.0}), (5000, {"dino": 5.0, "lr": 0.1, "momentum": 0.9, "norm_backbone": 2.0})):
        with Log(path, from_step=0, is_main=True) as log:
            for step in range(num):
                log.write(step, record | ({"knn_val_20": 0.5} if step % 1000 == 0 else {"ibot": math.nan}))
            log.note(num - 1, "odd")
        (tmp_path / "recipe.json").write_text(resolved().model_dump_json())
        plot(path, tmp_path / "plot.png")
        with Image.open(tmp_path / "plot.png") as picture:
            assert picture.size[0] > 1000
            assert len(picture.convert("RGB").getcolors(10**6)) > 20
    path.write_text("")
    plot(path, tmp_path / "plot.png")
    assert {file.name for file in tmp_path.iterdir()} == {"log.jsonl", "plot.png", "recipe.json"}
