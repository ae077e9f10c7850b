"""Configurations and splits of a dataset's folder, as the Hugging Face Hub has them.

They are those of the folder's card, ``configs:`` at the head of its README.md. Without a card there
is one configuration, whose splits have conventional names.
"""

import re
from collections import defaultdict
from pathlib import Path, PurePosixPath

import yaml
from fsspec.utils import glob_translate
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from utils.settings import InputError, Json, require

WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
WORD = re.compile(rf"(?:^|[-._ \d])({'|'.join(sum(WORDS.values(), ()))})(?=[-._ \d]|$)")
LONGEST_CARD = 2**20  # bytes, of which the head is the first
SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}


def choose_split(
    root: Path, files: list[Path], card: Path | None, config: str | None, split: str
) -> tuple[list[Path], dict[str, list[Path]]]:
    """Of the files of a folder those of a split, and all others by the reason why not.

    Args:
        card: The folder's README.md, if it has one.

    Raises:
        InputError: There is no such configuration or split, or several and ``config`` is None.
    """
    configs = read_card(card) if card else {}
    chosen = choose_config(str(root), list(configs), _default_of(configs), config)
    splits = _splits_of(root, files, configs.get(chosen, {}))
    require_among(f"SPLIT of {root}", split, list(splits))
    require(
        bool(splits[split]),
        f"{root} has none of the files that its card README.md names for {split}, of a known type.",
    )
    passed_over = defaultdict(list)
    for file in files:
        if file not in splits[split]:
            others = [f"of the split {name}" for name, members in splits.items() if file in members]
            passed_over[(others or ["of no split in the card's configuration"])[0]].append(file)
    return [file for file in files if file in splits[split]], dict(passed_over)


def choose_config(name: str, configs: list[str], default: str | None, config: str | None) -> str:
    """The name of the configuration to read: ``config``, or the default or only one."""
    if config is None:
        require(
            default is not None or len(configs) < 2,
            f"{name} has several configurations: {', '.join(configs)}. Choose one with CONFIG.",
        )
        return default or next(iter(configs), "")
    require_among(f"CONFIG of {name}", config, configs)
    return config


def require_among(setting: str, value: str, names: list[str]) -> None:
    """Refuse the value of a setting that is not among the names there are, which are listed."""
    listed = f"one of {', '.join(names)}" if names else "left out, for there are none"
    require(value in names, f"{setting} must be {listed}; it is {value!r}.")


def read_card(card: Path) -> dict[str, dict[str, Json]]:
    """The configurations of a dataset's card by name.

    Raises:
        InputError: The card cannot be read.
    """
    with card.open("rb") as file:
        content = file.read(LONGEST_CARD)
    try:
        head = REGEX_YAML_BLOCK.search(content.decode("utf-8-sig", "replace"))
        configs = (yaml.safe_load(head[2]) or {}).get("configs") if head else None
        return {config.get("config_name", "default"): config for config in configs or ()}
    except Exception as error:  # a damaged card can raise any error
        raise InputError(
            f"The head of {card} must be a dataset card ({error}). Mend it, or name the files' "
            "folder without it."
        ) from error


def _default_of(configs: dict[str, dict[str, Json]]) -> str | None:
    marked = [name for name, config in configs.items() if config.get("default")]
    return (marked or ["default" if "default" in configs else None])[0]


def _splits_of(root: Path, files: list[Path], config: dict[str, Json]) -> dict[str, set[Path]]:
    """The files of each split of a configuration."""
    folder = root / (config.get("data_dir") or "")
    entries = config.get("data_files")
    if entries is None:
        return _conventional_splits(folder, files)
    entries = entries if isinstance(entries, list) else [entries]
    splits = defaultdict(set)
    for entry in entries:
        entry = entry if isinstance(entry, dict) else {"path": entry}
        require(
            "path" in entry,
            f"The card {root / 'README.md'} must name a path for each of its data_files; one has "
            f"none: {entry}.",
        )
        paths = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
        splits[entry.get("split", "train")] |= {
            file for file in files if any(_matches(file, folder, pattern) for pattern in paths)
        }
    return splits


def _matches(file: Path, folder: Path, pattern: str) -> bool:
    """Whether a pattern below a folder names a file, or one of the folders that it is in."""
    names = (p.relative_to(folder).as_posix() for p in (file, *file.parents) if folder in p.parents)
    rule = re.compile(glob_translate(PurePosixPath(pattern).as_posix()))
    return any(rule.fullmatch(name) for name in names)


def _conventional_splits(folder: Path, files: list[Path]) -> dict[str, set[Path]]:
    """By the first folder or file name with the word of a split in it; train without any."""
    splits = defaultdict(set)
    for file in files:
        if file.is_relative_to(folder):
            parts = file.relative_to(folder).parts
            words = (WORD.search(part.lower()) for part in parts)
            words = [word[1] for word in words if word]
            splits[SPLIT_OF[words[0]] if words else "train"].add(file)
    return splits
