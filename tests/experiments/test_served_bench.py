"""The served bench asks real servers in processes of their own, and each way answers with the picture that was asked."""

import asyncio
import io

import numpy as np
import pytest
from PIL import Image
from tiny import write_family

from experiments import served_bench
from experiments.served_bench import MIXES, WAYS, Server, allowed, measure_served, requests, table


@pytest.fixture(scope="module")
def family(checkpoints, tmp_path_factory):
    return str(write_family(tmp_path_factory.mktemp("served") / "tiny-sd3.yaml", checkpoints["sd3"], "sd3"))


def test_the_short_form_measures_every_way_and_they_draw_the_same(family, pipes, monkeypatch):
    drawn = {}
    real = served_bench.serve

    def spying(server: Server, programs, prompts, askers, seed):
        if server.name not in drawn:
            drawn[server.name] = asyncio.run(one(server, "a red circle", 3, programs[1 % len(programs)]))
        return real(server, programs, prompts, askers, seed)

    async def one(server, prompt, seed, program):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(server.question(prompt, seed, program))
        body = await served_bench._answer(reader)
        writer.close()
        return program, np.asarray(Image.open(io.BytesIO(body))).astype(int)

    monkeypatch.setattr(served_bench, "serve", spying)
    result = measure_served(family, [1, 2], steps=4, repeats=1, threads=1, service=False)
    program, first = drawn["engine"]
    ours = np.asarray(
        pipes["sd3"]("a red circle", program=program.replace("tiny-sd3", pipes["sd3"].family.name), seed=3).images[0]
    )
    for way in WAYS:
        assert drawn[way][0] == program
        assert np.abs(drawn[way][1] - first).max() <= 1
    assert np.abs(first - ours.astype(int)).max() <= 1
    text = table("tiny", result)
    assert all(f"**{mix}**" in text for mix in MIXES)
    assert text.count("\n| 1 | ") == text.count("\n| 2 | ") == len(MIXES)
    for rows in result["summary"].values():
        assert all(value > 0 for row in rows.values() for value in row.values())


def test_requests_hold_every_program_as_often_and_differ_in_prompt_and_seed():
    coming = requests(["p", "q"], ["a", "b", "c"], seed=1)
    first = [next(coming) for _ in range(6)]
    again = requests(["p", "q"], ["a", "b", "c"], seed=1)
    assert first == [next(again) for _ in range(6)]
    assert sorted(program for _, _, program in first) == ["p"] * 3 + ["q"] * 3
    assert len({(prompt, seed) for prompt, seed, _ in first}) == 6


def test_what_the_curves_allow_is_the_best_batch_up_to_the_askers_and_the_ends():
    turn = {"curves": {"large": {1: 0.1, 2: 0.12}, "small": {1: 0.02, 2: 0.04}}, "ends_s": (0.01, 0.03)}
    relay = "tiny-sd3/large:6:0-3/small:6:3-6/match=direct/codec=fp16/guidance=3,3/conditioning=encode"
    assert allowed(turn, [relay], 1) == pytest.approx(1 / (0.04 + 0.3 + 0.06))
    assert allowed(turn, [relay], 2) == pytest.approx(1 / (0.04 + 0.18 + 0.06))
