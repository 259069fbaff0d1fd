"""What closes a run of benchmarks: of every case ours beside the best rival, read from pytest-benchmark's records."""

import math

import pytest

from benchmarks import results, roofline, table


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    """Ratios of medians, after pytest-benchmark's table."""
    groups = {}
    for row in config._benchmarksession.benchmarks:
        if row:
            groups.setdefault(row.group, {})[row.name] = row
    lines, left_out = summary(groups)
    if lines:
        terminalreporter.section(f"ipt_fast beside its best rival ({roofline.kind()})")
        for line in [*lines, *left_out]:
            terminalreporter.write_line(line)


def summary(groups):
    """(a line for each form of ipt_fast in each of {case: {contender: record}}, lines on who was left out and why)."""
    lines, ratios, left_out = [], [], {}
    for case, rows in groups.items():
        medians = {name: row["median"] for name, row in rows.items()}
        for name in filter(results.is_ours, rows):
            best, info = results.best_rival(medians), rows[name].extra_info
            ratios.append(results.times_faster(medians, name))
            left_out |= info["left_out"]
            share = info["share_of_roofline"]
            lines.append(
                f"{ratios[-1]:6.2f}x  {case}: {name} {table.time(1e3 * medians[name])}, "
                f"{best} {table.time(1e3 * medians[best])}"
                + (f"; {share:.0%} of the roofline" if share is not None else "")
            )
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        slower = sum(ratio < 1 for ratio in ratios)
        lines.append(f"{mean:6.2f}x  geometric mean of {len(ratios)}; a rival is faster in {slower}")
    return lines, [f"  left out: {name}, {reason}" for name, reason in left_out.items()]
