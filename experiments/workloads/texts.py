"""Prompts from files on disk: one a line, a column of a table, or a Hugging Face data set that was fetched before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from experiments.workloads.prompts import (
    ALL,
    SPLITS,
    Prompt,
    check_ask,
    generator,
    normalised,
    prompt_split,
    scene_of,
)
from experiments.workloads.tables import TABLES, read_column, read_lines
from relay.errors import BadRequest

Complexity = Literal["1", "2", "3", "4", "letters", "?"]


class Preset(NamedTuple):
    files: tuple[str, ...]  # globs in the folder; the first that finds something is taken
    column: str
    root: str | None
    complexity: Complexity
    fetch: str  # where the files come from


PRESETS = {
    "diffusiondb": Preset(
        ("metadata.parquet", "metadata-large.parquet", "**/*.parquet"), "prompt", None, "?",
        "hf download poloclub/diffusiondb metadata.parquet --repo-type dataset --local-dir FOLDER",
    ),
    "drawtext": Preset(  # 'letters': each prompt asks for a text to be drawn
        ("**/DrawTextCreative.txt", "*.txt", "*.csv"), "prompt", None, "letters",
        "DrawTextCreative.txt, one prompt a line, from MARIOEval of microsoft/unilm's textdiffuser (arXiv 2305.10855)",
    ),
    "coco": Preset(
        ("**/captions_val2014.json", "**/captions_train2014.json", "**/captions_*.json"), "caption", "annotations", "?",
        "annotations_trainval2014.zip of cocodataset.org, unpacked, with annotations/captions_val2014.json",
    ),
}  # fmt: skip


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A text file, one prompt a line, or a table with a `column`. Scenes in it keep the split that scenes have.

    `complexity` is for texts outside the scene language. Equal prompts count once. Split "all" is the whole file.
    """

    path: str
    column: str | None = None
    root: str | None = None
    complexity: Complexity = "?"
    name: str = "file"

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        check_ask(self.name, split, count, (*SPLITS, ALL))
        path = Path(self.path).expanduser()
        if path.suffix in TABLES:
            texts = read_column(path, self.column or "prompt", self.root)
        elif self.column:
            raise BadRequest(f"{path}: column {self.column!r} of a text file: tables are {', '.join(TABLES)}")
        else:
            texts = read_lines(path)
        key = f"{path.name}:{{}}"
        return _choose(_walk(texts, key, self.complexity, seed), str(path), split, count)


class Dataset(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Files of a data set in `folder`, nothing is fetched. `preset` names column and files; each may be given instead.

    The data set's own splits are not ours: name one with `files` ("data/test-*.parquet") to read only it. Prompts are
    taken as free text, never as scenes. Split "all" is the whole of it.
    """

    folder: str
    preset: str | None = None
    files: str | None = None
    column: str | None = None
    root: str | None = None
    complexity: Complexity | None = None
    name: str = "dataset"

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise BadRequest(
                f"workload {self.name}: unknown preset {self.preset!r}: choose one of {', '.join(PRESETS)}"
            )
        if self.preset is None and self.column is None:
            raise BadRequest(
                f"workload {self.name}: say which `column` holds the prompts, or a preset: {', '.join(PRESETS)}"
            )

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        check_ask(self.name, split, count, (*SPLITS, ALL))
        preset = PRESETS[self.preset] if self.preset else None
        column = self.column or (preset.column if preset else "")
        parts: list[Sequence[str | None]] = []
        for path in self._paths(preset):
            if path.suffix == ".txt":
                parts.append(read_lines(path))
                continue
            # the preset's root is that of COCO's own JSON; the same captions as parquet have none
            root = self.root or (preset.root if preset and path.suffix == ".json" else None)
            parts.append(read_column(path, column, root))
        label = self.preset or self.name
        complexity = self.complexity or (preset.complexity if preset else "?")
        walk = _walk(_Joined(parts), label + ":{}", complexity, seed, scenes=False)
        return _choose(walk, self.folder, split, count)

    def _paths(self, preset: Preset | None) -> list[Path]:
        folder = Path(self.folder).expanduser()
        fetch = f": fetch {preset.fetch.replace('FOLDER', str(folder))}" if preset else ": fetch the data set first"
        if not folder.is_dir():
            raise BadRequest(f"workload {self.preset or self.name}: there is no folder {folder}{fetch}")
        patterns = (self.files,) if self.files else preset.files if preset else tuple(f"**/*{each}" for each in TABLES)
        for pattern in patterns:
            if paths := sorted(path for path in folder.glob(pattern) if path.is_file()):
                return paths if preset is None or self.files or "*." in pattern else paths[:1]
        raise BadRequest(f"workload {self.preset or self.name}: {folder} holds no {' or '.join(patterns)}{fetch}")


class _Joined(Sequence):
    """Several columns as one, without a copy."""

    def __init__(self, parts: list[Sequence[str | None]]):
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index):  # noqa: ANN001, ANN204
        which = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[which][index - int(self.ends[which] - len(self.parts[which]))]


class _Found(NamedTuple):
    prompt: Prompt
    split: str


def _walk(texts: Sequence[str | None], key: str, complexity: str, seed: int, scenes: bool = True) -> Iterator[_Found]:
    """Every different prompt once, in random order, with its split. Lazy: of millions, only what is needed is looked at."""
    seen: set[str] = set()
    for i in generator(seed, "prompts").permutation(len(texts)).tolist():
        text = (texts[i] or "").strip()
        scene = scene_of(text) if scenes else None
        same = scene.text() if scene else normalised(text)
        if not same or same in seen:
            continue
        seen.add(same)
        yield _Found(
            Prompt(text, scene.complexity if scene else complexity, scene.text() if scene else None, key.format(i + 1)),
            prompt_split(scene, text),
        )


def _choose(found: Iterator[_Found], where: str, split: str, count: int) -> list[Prompt]:
    chosen: list[Prompt] = []
    others = dict.fromkeys(SPLITS, 0)
    for prompt, its_split in found:
        others[its_split] += 1
        if split in (ALL, its_split):
            chosen.append(prompt)
        if len(chosen) == count:
            return chosen
    if not sum(others.values()):
        raise BadRequest(f"{where} holds no prompt")
    have = ", ".join(f"{each} {number}" for each, number in others.items())
    raise BadRequest(
        f"{where} has {len(chosen)} different prompts in split {split}, not {count} ({have}; `{ALL}` takes any)"
    )
