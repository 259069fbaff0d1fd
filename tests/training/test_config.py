import dataclasses

import pytest

from ipt_fast.training.config import TrainingConfig


def test_single_values_are_one_stage():
    config = TrainingConfig("data", "out", iterations=10, patch_size=8, batch_size=2)
    assert config.iterations == (10,) and config.patch_size == (8,) and config.batch_size == (2,)
    staged = TrainingConfig("data", "out", iterations=[10, 5], patch_size=[8, 16], batch_size=[4, 1])
    assert staged.total_iterations == 15


@pytest.mark.parametrize(
    "name, value, kind",
    [
        ("iterations", 0, ValueError),
        ("iterations", 1.5, TypeError),
        ("iterations", (10, 10), ValueError),
        ("iterations", (), ValueError),
        ("patch_size", -8, ValueError),
        ("batch_size", True, TypeError),
        ("sigma", (50, 5), ValueError),
        ("sigma", (-1, 5), ValueError),
        ("sigma", (5, float("nan")), ValueError),
        ("sigma", 25, ValueError),
        ("lr", -1.0, ValueError),
        ("lr", float("inf"), ValueError),
        ("lr", "fast", TypeError),
        ("lr_min", 1.0, ValueError),
        ("warmup", -1, ValueError),
        ("weight_decay", -0.1, ValueError),
        ("grad_clip", -1, ValueError),
        ("loss", "l2", ValueError),
        ("ema", 1, ValueError),
        ("seed", -1, ValueError),
        ("seed", 2**63, ValueError),
        ("data_weights", 3, TypeError),
        ("task", {5: 1.0}, TypeError),
        ("val", ("a", "b"), ValueError),
        ("amp", "fp16", ValueError),
        ("val_sigma", -1, ValueError),
        ("log_every", 0, ValueError),
        ("save_every", 0, ValueError),
        ("workers", -1, ValueError),
        ("model_config", "width=8", TypeError),
    ],
)
def test_bad_values_are_named(name, value, kind):
    with pytest.raises(kind, match=r"\blr\b" if name == "lr_min" else name):
        TrainingConfig("data", "out", **{name: value})


def test_resume_may_change_only_what_leaves_the_weights_alone():
    config = TrainingConfig("data", "out")
    saved = config.to_dict()
    dataclasses.replace(config, data="moved", out="elsewhere", val="images", log_every=7).check_resumable(saved)
    for change in ({"lr": 1e-3}, {"seed": 1}, {"iterations": 5}, {"patch_size": 16}, {"model_config": {"width": 8}}):
        with pytest.raises(ValueError, match=f"{next(iter(change))} must be .*, as in the run to resume; got"):
            dataclasses.replace(config, **change).check_resumable(saved)


def test_a_run_of_another_version_is_refused():
    config = TrainingConfig("data", "out", lr=1e-3)
    saved = config.to_dict()
    del saved["schedule"]
    with pytest.raises(ValueError, match="checkpoint must be of this version to be resumed; got one without schedule"):
        config.check_resumable(saved)
