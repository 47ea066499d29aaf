import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before any library reads them: nothing from the hub, nothing to W&B, no teacher from or for the user's own store.
os.environ.update(
    {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true", "TOKENIZERS_PARALLELISM": "false"}
)

import hydra
import pytest
from omegaconf import DictConfig

from distill.app import CONF


@pytest.fixture(scope="session", autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    os.environ["DISTILL_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def compose() -> Callable[..., DictConfig]:
    """The configuration for a list of overrides, as `train.py` composes it."""

    def composed(*overrides: str, **options: Any) -> DictConfig:
        with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            return hydra.compose("config", list(overrides), **options)

    return composed
