"""The published figures: some of them by hand, all of them by their names, and how they are laid beside one's own."""

import pytest

from ipt_fast.evaluation.protocols import PROTOCOLS
from ipt_fast.evaluation.published import (
    DATASETS,
    TRAINING,
    dataset_of,
    differences,
    format_published,
    matching,
    published_figures,
)
from ipt_fast.evaluation.runner import Evaluation, ImageScore

# (paper, table, task, data set, level, model): PSNR[, SSIM[, MAE, LPIPS]]
BY_HAND = {
    ("IPT-V2", "1", "denoise", "CBSD68", "15", "IPT-V2 Base"): (34.46,),
    ("IPT-V2", "1", "denoise", "CBSD68", "25", "IPT-V2 Small"): (31.79,),
    ("IPT-V2", "1", "denoise", "Urban100", "50", "IPT-V2 Base"): (30.53,),
    ("IPT-V2", "1", "denoise", "McMaster", "25", "GRL-B"): (33.46,),
    ("IPT-V2", "1", "gray_denoise", "Set12", "25", "DnCNN"): (30.44,),
    ("IPT-V2", "1", "gray_denoise", "BSD68", "50", "IPT-V2 Base"): (26.65,),
    ("IPT-V2", "1", "gray_denoise", "Urban100", "50", "IPT-V2 Base"): (28.83,),
    ("IPT-V2", "1", "denoise", "Kodak24", "50", "IPT"): (29.64,),
    ("IPT-V2", "2", "camera", "SIDD", "", "IPT-V2 Base"): (40.05, 0.961),
    ("IPT-V2", "2", "camera", "DND", "", "Restormer"): (40.03, 0.956),
    ("IPT-V2", "4", "defocus_deblur", "DPDD", "", "IPT-V2 Base"): (26.13, 0.822, 0.037, 0.168),
    ("IPT-V2", "4", "dual_pixel_deblur", "DPDD indoor", "", "GRL-B"): (29.83, 0.903, 0.022, 0.114),
    ("IPT-V2", "4", "dual_pixel_deblur", "DPDD outdoor", "", "IPT-V2 Small"): (24.23, 0.787, 0.046, 0.175),
    ("IPT-V2", "5", "derain", "Rain100L", "", "IPT-V2 Base"): (39.23, 0.978),
    ("IPT-V2", "5", "derain", "Test2800", "", "DerainNet"): (24.31, 0.861),
    ("IPT-V2", "11", "denoise", "Urban100", "50", "IPT-V2 Base+"): (30.60,),
    ("IPT-V2", "11", "gray_denoise", "Urban100", "50", "IPT-V2 Base+"): (28.90,),
    ("IPT-V2", "section 4.2", "motion_deblur", "GoPro", "", "IPT-V2 Base"): (33.92,),
    ("IPT", "1", "sr_x2", "Urban100", "x2", "IPT"): (33.76,),
    ("IPT", "1", "sr_x4", "Set5", "x4", "IPT"): (32.64,),
    ("IPT", "1", "sr_x3", "B100", "x3", "HAN"): (29.32,),
    ("IPT", "2", "denoise", "CBSD68", "50", "IPT"): (29.88,),
    ("IPT", "3", "derain", "Rain100L", "", "IPT"): (41.62, 0.9880),
    ("IPT", "3", "derain", "Rain100L", "", "RCDNet"): (40.00, 0.9860),
    ("IPT", "4", "denoise", "Urban100", "70", "IPT"): (28.80,),
    ("IPT", "supplement 1", "motion_deblur", "GoPro", "", "IPT+"): (32.91,),
}


def key(row):
    return row.paper, row.table, row.task, row.dataset, row.level, row.model


def test_figures_by_hand():
    found = {key(row): (row.psnr, row.ssim, row.mae, row.lpips) for row in published_figures()}
    for name, figures in BY_HAND.items():
        assert found[name] == (*figures, *[None] * (4 - len(figures))), name


def test_every_row_is_one_of_a_kind_with_names_that_are_known():
    rows = published_figures()
    assert len({key(row) for row in rows}) == len(rows) == 565
    tasks = {"denoise", "gray_denoise", "camera", "derain", "motion_deblur", "defocus_deblur", "dual_pixel_deblur"}
    assert {row.task for row in rows} == tasks | {"sr_x2", "sr_x3", "sr_x4"}
    assert {row.dataset for row in rows} == set(DATASETS)
    assert {row.protocol for row in rows} < set(PROTOCOLS)
    assert {row.paper for row in rows} == set(TRAINING)
    for row in rows:
        assert 14 < row.psnr < 45
        assert row.ssim is None or 0.4 < row.ssim < 1
        assert (row.mae is None) == (row.lpips is None) == (row.protocol != "dpdd")
        assert row.mae is None or 0.02 < row.mae < 0.07 < row.lpips < 0.4
        assert (row.level == "") == (row.task not in tasks or "denoise" not in row.task) or row.level.startswith("x")


def test_whole_tables_are_there():
    """As many figures as the tables have cells that are not empty."""
    counts = {}
    for row in published_figures():
        counts[row.paper, row.table] = counts.get((row.paper, row.table), 0) + 1
    assert counts == {
        ("IPT-V2", "1"): 11 * 12 + 2 * 4 + 9 * 9 + 3,
        ("IPT-V2", "2"): 33,
        ("IPT-V2", "4"): 18 * 3,
        ("IPT-V2", "5"): 12 * 3,
        ("IPT-V2", "11"): 7,
        ("IPT-V2", "section 4.2"): 1,
        ("IPT", "1"): 3 * 10 * 4,
        ("IPT", "2"): 9 * 4 - 2,
        ("IPT", "3"): 13,
        ("IPT", "4"): 8 * 4 - 4,
        ("IPT", "supplement 1"): 15,
    }


def an_evaluation(folder="/data/denoise/CBSD68", sigma=25.0, images=3, protocol="rgb", **more):
    score = ImageScore("a.png", 20.0, 30.0, 0.4, 0.8, **more)
    return Evaluation("CBSD68", protocol, sigma, (score,) * images, (), folder)


@pytest.mark.parametrize(
    ("folder", "name", "expected"),
    [
        ("/data/denoise/cbsd68", "", "CBSD68"),
        ("/data/Rain100L/input", "", "Rain100L"),
        ("/data/holiday", "", None),
        ("/data/holiday", "urban100", "Urban100"),
        ("/data/Set5/Set14", "", "Set14"),
    ],
)
def test_the_set_is_found_by_its_folder_or_named(folder, name, expected):
    assert dataset_of(an_evaluation(folder), name) == expected


def test_rows_of_the_level_and_the_task():
    assert {row.level for row in matching(an_evaluation(), "CBSD68")} == {"25"}
    assert {row.paper for row in matching(an_evaluation(sigma=50.0), "CBSD68")} == {"IPT", "IPT-V2"}
    assert matching(an_evaluation(sigma=12.5), "CBSD68") == []
    assert len(matching(an_evaluation(sigma=None), "Set5", scale=3)) == 10
    for two_views, task in ((False, "defocus_deblur"), (True, "dual_pixel_deblur")):
        assert {row.task for row in matching(an_evaluation(sigma=None), "DPDD", two_views=two_views)} == {task}


def test_what_differs():
    evaluation = an_evaluation(sigma=50.0)
    found = differences(evaluation, matching(evaluation, "CBSD68"), "CBSD68")
    assert found[:2] == ["images: 3 here, 68 there", "protocol: rgb here, ipt-y in IPT"]
    assert len(found) == 4 and "ImageNet" in found[2] and "300000" in found[3]
    whole = an_evaluation(images=68)
    assert len(differences(whole, matching(whole, "CBSD68"), "CBSD68")) == 1
    kodak = an_evaluation(images=24)
    assert "500 x 500" in differences(kodak, matching(kodak, "Kodak24"), "Kodak24")[0]


def test_the_table():
    lines = format_published("tiny", [an_evaluation(), an_evaluation("/data/holiday")]).splitlines()
    assert lines[0].split() == ["published:", "CBSD68,", "sigma", "25", "PSNR", "SSIM", "MAE", "LPIPS"]
    assert "  IPT-V2, table 1       denoise           IPT-V2 Base    31.84       -       -       -" in lines
    long = format_published("a model of a long name", [an_evaluation()]).splitlines()
    for table in (lines[: lines.index(next(line for line in lines if "here" in line)) + 1], long[:-2]):
        table = [line for line in table if not line.startswith("  differs")]
        assert len(table) > 10 and {len(line) for line in table} == {len(table[0])}
    own = next(line for line in lines if line.startswith("  here"))
    assert own.split() == ["here", "tiny", "30.00", "0.800", "-", "-"]
    assert lines[-1] == "published: nothing for CBSD68, sigma 25"
    more = {"mae_input": 0.1, "mae_output": 0.05, "lpips_input": 0.4, "lpips_output": 0.2}
    defocus = an_evaluation(sigma=None, protocol="dpdd", **more)
    table = format_published("tiny", [defocus], "DPDD", two_views=True)
    assert "section 4.2" not in table and "0.140" in table
    assert next(line for line in table.splitlines() if "here" in line).split()[2:] == [
        "30.00",
        "0.800",
        "0.050",
        "0.200",
    ]
    with pytest.raises(ValueError, match="--published must be one of CBSD68, .*; got Holidays"):
        format_published("tiny", [defocus], "Holidays")
