"""The settings of baselines that a config keeps: chosen on validation prompts, so that a test run reports them alone.

mini-sd3:                        # a family's name
  steps: 28                      # the T at which they were chosen
  settings:
    fewer-steps: 11 of 28 steps  # baseline: label of its setting
    mag-cache: ["threshold 0.12, 3 in a row", "threshold 0.4, 8 in a row"]  # or of several

`relay-experiment choose` writes such a file. At another T the same label counts, or, where labels name T or steps of it,
the setting in the same place of the baseline's list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from experiments.baselines import NAMES
from relay.errors import BadRequest
from relay.files import read_yaml

if TYPE_CHECKING:
    from experiments.baselines.base import Baseline, Setting
    from relay.family import Family


class Chosen(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    steps: Annotated[int, msgspec.Meta(ge=1)]
    settings: dict[str, str | Annotated[list[str], msgspec.Meta(min_length=1)]]

    def of(self, baseline: str) -> list[str]:
        """The labels that are kept of a baseline."""
        found = self.settings[baseline]
        return [found] if isinstance(found, str) else found


def read_chosen(path: Path) -> dict[str, Chosen]:
    """Family -> what was chosen for it; BadRequest names the file."""
    return read_yaml(path, dict[str, Chosen])


def of_family(chosen: Mapping[str, Chosen] | None, family: Family, baselines: Sequence[Baseline]) -> Chosen | None:
    """What is kept of this family's baselines; None where all settings are. BadRequest on a name that is not known."""
    if chosen is None:
        return None
    if family.name not in chosen:
        raise BadRequest(
            f"nothing is chosen for {family.name}, only for {', '.join(chosen)}: `relay-experiment choose`"
        )
    mine = chosen[family.name]
    listed = [baseline.name for baseline in baselines]
    if unknown := [name for name in mine.settings if name not in listed and name not in NAMES]:
        raise BadRequest(f"{family.name}: unknown baseline {unknown[0]!r}: known are {', '.join((*NAMES, *listed))}")
    for baseline in baselines:
        if baseline.name not in mine.settings and baseline.applies(family) is None:
            raise BadRequest(f"{family.name}: nothing is chosen for the baseline {baseline.name}")
    return mine


def kept(baseline: Baseline, family: Family, total: int, chosen: Chosen | None) -> list[Setting]:
    """The settings of a baseline at T = total: all of them, or the chosen ones."""
    found = baseline.settings(family, total)
    if chosen is None:
        return found
    whose, labels = f"{family.name}: {baseline.name}", [s.label for s in baseline.settings(family, chosen.steps)]
    there = dict(zip(labels, found, strict=True)) if len(labels) == len(found) else {}
    there |= {setting.label: setting for setting in found}  # the same label before the same place
    for label in chosen.of(baseline.name):
        if label not in labels:
            raise BadRequest(f"{whose} has no setting {label!r} at T = {chosen.steps}, but {'; '.join(labels)}")
        if label not in there:
            raise BadRequest(
                f"{whose} has {len(found)} settings at T = {total} and {len(labels)} at T = {chosen.steps}: which of them is"
                f" {label!r} is not plain"
            )
    return [there[label] for label in chosen.of(baseline.name)]
