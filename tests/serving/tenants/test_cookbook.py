"""Recipes of tinker-cookbook, as they are, against a server of the pocket model."""

import asyncio
import json

import pytest
import tinker
from serving.tenants.clients import KEY, datum, text, tokens

from lorry import pocket

pytest.importorskip("tinker_cookbook")


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "pocket").symlink_to(pocket.PATH)  # where the recipes look for the tokenizer of a base of this name
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    return tmp_path


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_supervised_recipe(server, place):
    import chz
    from tinker_cookbook.supervised import train
    from tinker_cookbook.supervised.types import SupervisedDataset, SupervisedDatasetBuilder

    class Lines(SupervisedDataset):
        def get_batch(self, index):
            lines = pocket.examples("star", "train", 96, seed=0)
            return [datum(line) for line in lines[16 * index : 16 * (index + 1)]]

        def __len__(self):
            return 6

    @chz.chz
    class Builder(SupervisedDatasetBuilder):
        def __call__(self):
            return Lines(), None

    config = train.Config(
        log_path=str(place / "log"), model_name="pocket", recipe_name="star", dataset_builder=Builder(),
        learning_rate=1e-2, lora_rank=16, base_url=server.url, save_every=3, eval_every=0,
    )  # fmt: skip
    asyncio.run(train.main(config))
    found = [row["train_mean_nll"] for row in metrics(place / "log") if "train_mean_nll" in row]
    assert len(found) == 6 and found[-1] < 0.5 * found[0]
    saved = [json.loads(line) for line in (place / "log" / "checkpoints.jsonl").read_text().splitlines()]
    assert saved[-1]["state_path"].startswith("tinker://")


def test_the_recipe_for_rewards(server, place):
    import chz
    from tinker_cookbook.rl import train
    from tinker_cookbook.rl.types import Env, EnvGroupBuilder, RLDataset, RLDatasetBuilder, StepResult

    class Letters(Env):
        async def initial_observation(self):
            return tinker.ModelInput.from_ints(tokens("nz")), []

        async def step(self, action, *, extra=None):
            reward = sum(letter in "abcdefghijklm" for letter in text(action)) / 6
            over = tinker.ModelInput.empty()
            return StepResult(reward=reward, episode_done=True, next_observation=over, next_stop_condition=[])

    class Group(EnvGroupBuilder):
        async def make_envs(self):
            return [Letters() for _ in range(8)]

    class Prompts(RLDataset):
        def get_batch(self, index):
            return [Group(), Group()]

        def __len__(self):
            return 6

    @chz.chz
    class Builder(RLDatasetBuilder):
        async def __call__(self):
            return Prompts(), None

    config = train.Config(
        log_path=str(place / "log"), model_name="pocket", recipe_name="letters", dataset_builder=Builder(),
        learning_rate=1e-2, max_tokens=6, lora_rank=8, base_url=server.url, save_every=0, eval_every=0,
    )  # fmt: skip
    asyncio.run(train.main(config))
    found = [row["env/all/reward/total"] for row in metrics(place / "log") if "env/all/reward/total" in row]
    assert len(found) == 6 and sum(found[-2:]) / 2 > found[0] + 0.1, found
