"""Where a result is written and what it says of the run. Knows options and files."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from baton.errors import ConfigError


class ResultFile:
    """Where the result will be written. Raises ConfigError before anything is measured if it cannot be."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._folder = options.result_dir or Path()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--result-dir {self._folder} cannot be made: {error}") from error

    def path(self, model: str) -> Path:
        """The file for a model's name."""
        options = self._options
        most = f"-concurrency{options.max_concurrency}" if options.max_concurrency else ""
        usual = f"{options.label or options.backend}-{options.request_rate}qps{most}-{model.rstrip('/').split('/')[-1]}-{_date()}.json"
        return self._folder / (options.result_filename or usual)

    def write(self, found: dict[str, Any]) -> None:
        """One line of JSON, in the place of what is there or after it."""
        with self.path(str(found["model_id"])).open("a" if self._options.append_result else "w", encoding="utf-8") as out:
            out.write(json.dumps(found) + "\n")


def result_file(options: argparse.Namespace) -> ResultFile | None:
    """None if nothing is to be written. Raises ConfigError for folders that are not there, also of the picture."""
    if options.plot is not None and (options.plot.suffix != ".svg" or not options.plot.parent.is_dir()):
        raise ConfigError(f"--plot {options.plot}: name a .svg file in a folder that is there")
    return ResultFile(options) if options.save_result or options.append_result else None


def described(options: argparse.Namespace, model: str) -> dict[str, Any]:
    """What was run, by the names of `vllm bench serve`."""
    return {
        "date": _date(),
        "backend": options.backend,
        "endpoint_type": options.backend,
        "label": options.label,
        "model_id": model,
        "tokenizer_id": options.tokenizer or options.model or model,
        "dataset_name": options.dataset_name,
        "num_prompts": options.num_prompts,
        "seed": options.seed,
        "request_rate": "inf" if math.isinf(options.request_rate) else options.request_rate,
        "burstiness": "inf" if math.isinf(options.burstiness) else options.burstiness,
        "max_concurrency": options.max_concurrency,
        **dict(options.metadata),
    }


def _date() -> str:
    return time.strftime("%Y%m%d-%H%M%S")
