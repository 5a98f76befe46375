"""The demo of the service in short form, through the same code: processes start, pictures come, everything is gone after."""

import json
from pathlib import Path

import psutil
import pytest
import yaml

from experiments.service_demo import main
from nodes.commands.service import free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The shipped simulation with one edge and one device, on free ports."""
    folder = tmp_path_factory.mktemp("demo")
    shipped = yaml.safe_load((ROOT / "configs/deployments/simulation.yaml").read_text())
    shipped["gateway"] |= {
        "control": f"tcp://127.0.0.1:{free_port()}", "data": f"tcp://127.0.0.1:{free_port()}", "http": None,
        "store": str(folder / "store"), "offer": [each for each in shipped["gateway"]["offer"] if each["family"] == "mini-sd3"],
    }  # fmt: skip
    cloud, phone = shipped["nodes"]["cloud"], shipped["nodes"]["phone"]
    cloud |= {"data": f"tcp://127.0.0.1:{free_port()}", "families": {"mini-sd3": ["large"]}}
    phone |= {"local": None, "families": {"mini-sd3": ["small"]}}
    shipped["nodes"] = {"cloud": cloud, "phone": phone}
    path = folder / "simulation.yaml"
    path.write_text(yaml.safe_dump(shipped))
    return path


def test_the_demo_leaves_pictures_a_sheet_a_summary_and_no_process(config, tmp_path):
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    main(config=config, out=tmp_path, prompts=4, gap=0.1, seed=0)
    jobs = json.loads((tmp_path / "summary.json").read_text())
    assert [job["stage"] for job in jobs] == ["done"] * 4
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 4
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    assert "4 of 4 pictures were made" in (tmp_path / "summary.md").read_text()
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
