"""The engine's bench serves the same requests three ways, and counts what each has made."""

from itertools import islice, pairwise

import pytest
import torch

from experiments import engine_bench
from experiments.engine_bench import MIXES, WAYS, Bench, measure, requests, table

STEPS = [1, 2, 3]


@pytest.fixture
def bench(pipes):
    family = pipes["sd3"].family
    return Bench(
        denoiser=family.denoiser("large"),
        sigmas=family.schedules((32, 32))["large"](3).sigmas,
        cond=family.text.encode(["a red circle"], None, True, (32, 32)),
        guidance=3.0,
        curve={1: 0.01, 4: 0.01},
        max_batch=4,
    )


def test_requests_hold_every_s_as_often_and_are_the_same_for_every_way():
    noise = torch.randn(2, 4, 8, 8)
    steps = [request.steps for request in islice(requests(noise, STEPS, seed=1), 12)]
    assert sorted(steps) == sorted(STEPS * 4)
    assert steps == [request.steps for request in islice(requests(noise, STEPS, seed=1), 12)]
    assert steps[:3] != steps[3:6] or steps[:3] != steps[6:9]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_serves_all_that_ask_and_counts_the_steps_it_made(bench, way):
    coming = requests(torch.randn(2, 4, 16, 16), STEPS, seed=1)
    served = way(bench, coming, 3, 12)
    assert len(served) >= 12
    assert all(a.answered <= b.answered and a.image_steps <= b.image_steps for a, b in pairwise(served))
    assert all(each.asked < each.answered for each in served)
    asked = [request.steps for request in islice(requests(torch.randn(2, 4, 16, 16), STEPS, seed=1), 12)]
    under_way = 2 * max(STEPS) if way is engine_bench.engine else 0
    assert sum(asked) - under_way <= served[11].image_steps <= sum(asked) + under_way


def test_the_table_shows_a_row_for_each_number_of_askers_and_mix(checkpoints, tmp_path):
    from tiny import write_family

    path = write_family(tmp_path / "tiny.yaml", checkpoints["sd3"], "sd3")
    result = measure(str(path), [1, 2], steps=2, repeats=1)
    text = table("tiny", result)
    assert all(f"**{mix}**" in text for mix in MIXES)
    assert text.count("\n| 1 | ") == text.count("\n| 2 | ") == len(MIXES)
    for rows in result["summary"].values():
        assert all(value > 0 for row in rows.values() for value in row.values())


def test_how_far_company_moves_a_picture_is_measured_in_both_dtypes(tmp_path, checkpoints):
    from tiny import write_family

    from experiments import company

    family = str(write_family(tmp_path / "sd3.yaml", checkpoints["sd3"], "sd3"))
    found = {dtype: company.measure_company(family, dtype, 8) for dtype in ("fp32", "bf16")}
    assert found["fp32"]["latent_share"] < 1e-4
    assert found["bf16"]["latent_share"] < 5e-2  # not at all, where a row's sums do not depend on the batch
    assert set(found["fp32"]) == {"latent_share", "latent_max", "pixel"}
    assert company.table({"tiny": found}).count("| tiny |") == 2
