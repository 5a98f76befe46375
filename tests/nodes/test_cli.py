"""`relay`, as a person at a terminal meets it: real commands, real files, one line for every mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nodes import cli
from relay.scenes.language import parse
from relay.scenes.render import render

PROMPT = "a large red heart at the top left"


@pytest.fixture
def relay(monkeypatch, capsys):
    """Run the command in this process; returns (exit code, stdout, stderr)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["relay", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


def pixels(path):
    return np.asarray(Image.open(path))


def test_help_needs_no_heavy_import():
    heavy = "assert not {'torch', 'diffusers', 'transformers', 'numpy', 'vowpal_wabbit_next'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"import sys, nodes.cli; {heavy}"], check=True, timeout=20)
    shown = subprocess.run([sys.executable, "-m", "nodes.cli", "--help"], check=True, timeout=20, capture_output=True)
    assert b"generate" in shown.stdout


def test_a_saved_picture_says_how_to_make_it_again_bit_for_bit(relay, tmp_path):
    first = tmp_path / "first.png"
    code, out, _ = relay(
        "generate", PROMPT, "--family", "mini-sdxl", "--steps", 6, "--handoff", 3, "--seed", 5, "--negative-prompt",
        "a blue ring", "--out", first,
    )  # fmt: skip
    assert code == 0
    assert "3 large" in out
    code, out, _ = relay("show", first)
    assert code == 0
    words = [w.strip("'") for w in _split(out)]
    again = tmp_path / "again.png"
    code, _, _ = relay(*words[1:-1], again)
    assert code == 0
    assert np.array_equal(pixels(first), pixels(again))


def _split(line):
    import shlex

    return shlex.split(line)


@pytest.mark.parametrize("family", ["mini-sd3", "mini-sdxl"])
def test_start_and_finish_over_a_file_give_the_picture_of_generate(relay, tmp_path, family):
    how = ["--family", family, "--steps", 6, "--handoff", 2, "--seed", 9]
    assert relay("generate", PROMPT, *how, "--out", tmp_path / "one.png")[0] == 0
    assert relay("start", PROMPT, *how, "--out", tmp_path / "a.handoff")[0] == 0
    assert relay("finish", tmp_path / "a.handoff", "--out", tmp_path / "two.png")[0] == 0
    assert np.array_equal(pixels(tmp_path / "one.png"), pixels(tmp_path / "two.png"))


def test_image_i_of_n_uses_seed_plus_i_and_goes_into_a_folder(relay, tmp_path):
    how = ["--steps", 4, "--handoff", 2, "--out"]
    assert relay("generate", PROMPT, "--seed", 3, "--num-images", 2, *how, tmp_path / "many")[0] == 0
    assert relay("generate", PROMPT, "--seed", 4, *how, tmp_path / "one.png")[0] == 0
    files = sorted((tmp_path / "many").glob("*.png"))
    assert [f.stem.rsplit("-", 1)[1] for f in files] == ["3", "4"]
    assert np.array_equal(pixels(files[1]), pixels(tmp_path / "one.png"))


def test_the_report_holds_what_was_really_done(relay, tmp_path):
    report = tmp_path / "report.json"
    code, _, _ = relay(
        "generate", PROMPT, "--steps", 6, "--handoff", 2, "--small-steps", 2, "--matching", "exact", "--seed", 1,
        "--deviation", "--out", tmp_path / "a.png", "--report", report,
    )  # fmt: skip
    assert code == 0
    entry = json.loads(report.read_text())["images"][0]
    assert entry["steps"] == {"large": 2, "small": 2}
    assert entry["handoff_bytes"] > 4096
    assert len(entry["deviation"]["per_step"]) == 2
    assert {"encode", "denoise[0] large", "handoff", "denoise[1] small", "decode"} <= entry["timings_s"].keys()
    assert 0 <= entry["score"]["attributes"] <= 1


def test_the_judge_reads_a_true_render(relay, tmp_path):
    scene = parse("a large red heart at the top left and a small blue ring at the right, on a yellow background")
    array = ((render([scene], np.random.default_rng(0))[0] + 1) * 127.5).byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "true.png")
    code, out, _ = relay("judge", tmp_path / "true.png", scene.text())
    assert code == 0
    assert "100%" in out
    code, out, _ = relay("judge", tmp_path / "true.png", "a green star", "--json")
    assert code == 0
    assert json.loads(out)["strict"] is False


def test_families_are_listed_for_people_and_for_programs(relay):
    code, out, _ = relay("families", "--json")
    assert code == 0
    rows = {(r["family"], r["member"]): r for r in json.loads(out)}
    assert {"mini-sd3", "mini-sdxl", "sdxl-vega", "sd35"} <= {f for f, _ in rows}
    assert rows["mini-sd3", "large"]["installed"]
    assert rows["mini-sd3", "large"]["parameters"] > 5 * rows["mini-sd3", "small"]["parameters"]
    assert not rows["sdxl-vega", "large"]["installed"]
    code, out, _ = relay("families")
    assert code == 0
    assert "Karras" in out


def test_the_doctor_says_what_a_role_needs_before_loading_it(relay):
    code, out, _ = relay("doctor", "--family", "mini-sd3", "--role", "device")
    assert code == 0
    assert "small" in out
    assert "large" not in out
    assert "memory needed" in out


def test_the_doctor_lists_a_family_that_was_not_fetched_with_its_sizes_unknown(relay, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, _ = relay("doctor", "--family", "sdxl-vega")
    assert code == 0
    assert "stabilityai/stable-diffusion-xl-base-1.0" in out
    assert "to download: size unknown" in out
    assert "not on this machine" in out


BAD = [
    (["generate", ""], "empty"),
    (["generate", "a red dragon"], "'dragon'"),
    (["generate", PROMPT, "--handoff", "29"], "between 0 and the 28 steps"),
    (["generate", PROMPT, "--handoff", "-1"], "handoff"),
    (["generate", PROMPT, "--steps", "0"], "num_inference_steps"),
    (["generate", PROMPT, "--steps", "many"], "--steps"),
    (["generate", PROMPT, "--mode", "cloud"], "cloud"),
    (["generate", PROMPT, "--mode", "full-cloud", "--handoff", "3"], "means handoff 28"),
    (["generate", PROMPT, "--matching", "closest"], "closest"),
    (["generate", PROMPT, "--codec", "jpeg"], "jpeg"),
    (["generate", PROMPT, "--conditioning", "guess"], "guess"),
    (["generate", PROMPT, "--guidance", "nan"], "--guidance"),
    (["generate", PROMPT, "--guidance", "1,2,3"], "--guidance"),
    (["generate", PROMPT, "--seed", "-3"], "--seed"),
    (["generate", PROMPT, "--size", "63x64"], "63x64"),
    (["generate", PROMPT, "--size", "big"], "WIDTHxHEIGHT"),
    (["generate", PROMPT, "--num-images", "0"], "--num-images"),
    (["generate", PROMPT, "--dtype", "int4"], "int4"),
    (["generate", PROMPT, "--device", "abacus"], "abacus"),
    (["generate", PROMPT, "--family", "maxi"], "unknown family"),
    (["generate", PROMPT, "--program", "mini-sd3"], "not a program"),
    (["generate", PROMPT, "--out", "picture.jpg"], "only .png"),
    (["generate", PROMPT, "--num-images", "2", "--out", "one.png"], "do not fit into one file"),
    (["generate", PROMPT, "--out", "/proc/none/a.png"], "/proc/none"),
    (["generate", PROMPT, "--family", "sdxl-vega", "--handoff", "10"], "stabilityai/stable-diffusion-xl-base-1.0"),
    (["generate"], "PROMPT"),
    (["generate", PROMPT, "--handof", "3"], "--handof"),
    (["start", PROMPT, "--handoff", "28", "--out", "x.handoff"], "hands nothing over"),
    (["finish", "missing.handoff", "--out", "a.png"], "missing.handoff"),
    (["judge", "missing.png", PROMPT], "missing.png"),
    (["show", "missing.png"], "missing.png"),
    (["doctor", "--role", "cloud"], "cloud"),
    (["doctor", "--family", "maxi"], "unknown family"),
    (["frobnicate"], "frobnicate"),
]


@pytest.mark.parametrize(("words", "named"), BAD, ids=[" ".join(w)[:60] for w, _ in BAD])
def test_bad_input_gets_one_clear_line_and_a_non_zero_exit(relay, tmp_path, monkeypatch, words, named):
    monkeypatch.chdir(tmp_path)
    code, out, err = relay(*words)
    assert code not in (0, None)
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err
    assert "Traceback" not in out + err


def test_a_damaged_handoff_is_refused_by_name(relay, tmp_path):
    file = tmp_path / "a.handoff"
    assert relay("start", PROMPT, "--steps", 4, "--handoff", 2, "--seed", 1, "--out", file)[0] == 0
    whole = file.read_bytes()
    for damaged in (whole[:100], whole[:-1], whole[:300] + b"\0" + whole[301:], b"", b"x" * 500):
        file.write_bytes(damaged)
        code, _, err = relay("finish", file, "--out", tmp_path / "a.png")
        assert code == 1
        assert err.startswith(f"error: {file}")
        assert err.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


def test_a_picture_without_parameters_cannot_be_shown(relay, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    code, _, err = relay("show", tmp_path / "plain.png")
    assert code == 2
    assert "carries no relay parameters" in err
    (tmp_path / "text.png").write_text("not an image")
    assert relay("judge", tmp_path / "text.png", PROMPT)[0] == 2


def test_ctrl_c_stops_cleanly(tmp_path):
    running = subprocess.Popen(
        [sys.executable, "-m", "nodes.cli", "generate", PROMPT, "--steps", "60", "--num-images", "500", "--out", tmp_path],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # a suite that runs in the background inherits "ignore Ctrl-C"; a person's terminal does not
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )  # fmt: skip
    ends = time.monotonic() + 180
    while not list(tmp_path.glob("*.png")) and time.monotonic() < ends:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert err.strip().splitlines()[-1] == "error: stopped"
    assert "Traceback" not in err
    assert not list(tmp_path.glob("*.part"))
